"""Grid-World: reference numbers, closed forms, brute force, distributions, and what the public interface gives.

Reference numbers are every `groove_env_*.npz` and `groove_levels_*.npz` in or below `tests/data/`, or the folder named
by PUREJAX_BILEVEL_REFERENCE_DATA; all sizes come from the files.
"""

import functools
import hashlib
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from purejax_bilevel import environments
from purejax_bilevel.environments import grid_world
from purejax_bilevel.environments.grid_world import levels, mazes, modes, optimum
from purejax_bilevel.environments.grid_world.world import TIME_UNIT, Draws, GridWorld, State
from purejax_bilevel.errors import UserError
from tests.programs.programs import mostly

VARIABLE = "PUREJAX_BILEVEL_REFERENCE_DATA"
FOLDER = Path(os.environ.get(VARIABLE, Path(__file__).parents[1] / "data"))
STAY = 4

Entries = dict[str, np.ndarray]


def files(prefix: str) -> list[Path]:
    return sorted(FOLDER.rglob(f"{prefix}*.npz"))


def test_there_are_golden_files() -> None:
    assert VARIABLE in os.environ or (len(files("groove_env_")) == 4 and len(files("groove_levels_")) == 6)


# --- reference numbers ------------------------------------------------------------------------------------------------


def mode_of(golden: Entries) -> modes.Mode:
    """A mode with the sizes of a file."""
    kinds = [modes.Kind(1, 0.0, 0.0, 0.0)] * (int(golden["max_object_types"]) - 1)
    kinds.append(modes.Kind(int(golden["max_objects"]) - len(kinds), 0.0, 0.0, 0.0))
    side = int(golden["max_grid_size"])
    return modes.Mode((modes.LevelRange((side, side), (1, 1), (), tuple(kinds)),), bool(golden["tabular"]))


def levels_of(golden: Entries, prefix: str = "") -> levels.Level:
    """All levels of a file, `[levels, ...]`."""
    names = ("grid_size", "start_cell", "object_cell", "object_type")
    numbers = ("object_reward", "object_p_terminate", "object_p_respawn")
    return levels.Level(
        max_steps_in_episode=golden[f"{prefix}max_steps"],
        num_objects=golden[f"{prefix}n_objects"],
        wall=golden[f"{prefix}wall_flat"],
        **{name: golden[prefix + name] for name in (*names, *numbers)},
    )


def observed(golden: Entries, when: str, obs_dim: int) -> np.ndarray:
    """The observations of a file as vectors."""
    if not golden["tabular"]:
        return golden[f"step/{when}observation"]
    one_hot = np.eye(obs_dim, dtype=np.float32)[golden[f"step/{when}observation_index"]]
    one_hot[:, -1] = golden[f"step/{when}observation_time"]
    return one_hot


@pytest.mark.parametrize("path", files("groove_env_"), ids=lambda path: path.stem)
def test_transitions_are_those_of_the_reference(path: Path) -> None:
    golden = dict(np.load(path))
    world, every = GridWorld(mode_of(golden)), levels_of(golden, "level/")
    of_step = jax.tree.map(lambda leaf: leaf[golden["step/level"]], every)
    given = {name.removeprefix("step/"): value for name, value in golden.items() if name.startswith("step/")}
    state = State(
        given["time"], given["cell"], given["object_cell"], given["object_exists"], np.zeros(len(given["time"]), bool)
    )
    draws = Draws(given["draw_respawn"], given["draw_new_cell"], given["draw_terminate"])
    after, reward = jax.jit(jax.vmap(world.transition))(state, given["action"], of_step, draws)
    for name in ("time", "cell", "object_exists", "object_cell"):
        np.testing.assert_array_equal(getattr(after, name), given[f"next_{name}"], err_msg=name)
    np.testing.assert_array_equal(after.terminated, given["next_early_terminated"])
    np.testing.assert_array_equal(after.terminated | jax.vmap(world.is_truncated)(after, of_step), given["done"])
    np.testing.assert_allclose(reward, given["reward"], rtol=1e-6, atol=1e-7)
    _, collected = jax.vmap(world._collect)(state, given["action"], of_step)
    np.testing.assert_array_equal(collected, given["collected"])
    for when, at in (("", state), ("next_", after)):
        vectors = jax.jit(jax.vmap(world.observe_state))(at, of_step)
        np.testing.assert_allclose(vectors, observed(golden, when, world.obs_dim), rtol=1e-6)


@pytest.mark.parametrize("path", files("groove_env_"), ids=lambda path: path.stem)
def test_deterministic_levels_need_no_luck(path: Path) -> None:
    """`step_env` with its own draws, on levels whose probabilities are 0 and 1."""
    golden = dict(np.load(path))
    world, every = GridWorld(mode_of(golden)), levels_of(golden, "level/")
    steps = np.flatnonzero(golden["level/deterministic"][golden["step/level"]])
    given = {name.removeprefix("step/"): golden[name][steps] for name in golden if name.startswith("step/")}
    of_step = jax.tree.map(lambda leaf: leaf[given["level"]], every)
    state = State(
        given["time"], given["cell"], given["object_cell"], given["object_exists"], np.zeros(len(steps), bool)
    )
    keys = jax.random.split(jax.random.key(0), len(steps))
    _, after, reward, terminated, _ = jax.jit(jax.vmap(world.step_env))(keys, state, given["action"], of_step)
    np.testing.assert_array_equal(after.object_exists, given["next_object_exists"])
    np.testing.assert_array_equal(terminated, given["next_early_terminated"])
    np.testing.assert_allclose(reward, given["reward"], rtol=1e-6)


@pytest.mark.parametrize(
    "path", [path for path in files("groove_env_") if np.load(path)["tabular"]], ids=lambda path: path.stem
)
def test_trajectories_with_automatic_reset(path: Path) -> None:
    golden = dict(np.load(path))
    world, every = GridWorld(mode_of(golden)), levels_of(golden, "level/")
    given = {name.removeprefix("trajectory/"): golden[name] for name in golden if name.startswith("trajectory/")}

    def play(level: levels.Level, actions: jax.Array) -> Any:
        def step(state: State, action: jax.Array) -> Any:
            before = state
            obs, state, reward, terminated, truncated, _ = world.step(jax.random.key(0), state, action, level)
            return state, (before, state, obs, reward, terminated | truncated)

        return jax.lax.scan(step, world.reset(jax.random.key(0), level)[1], actions)[1]

    first = jax.tree.map(lambda leaf: leaf[: len(given["action"])], every)
    before, after, obs, reward, done = jax.jit(jax.vmap(play))(first, given["action"])
    for when, state in (("", before), ("next_", after)):
        for name in ("time", "cell", "object_exists"):
            np.testing.assert_array_equal(getattr(state, name), given[when + name])
    np.testing.assert_array_equal(done, given["done"])
    np.testing.assert_allclose(reward, given["reward"], rtol=1e-6)
    np.testing.assert_array_equal(np.asarray(obs)[..., :-1].argmax(-1), given["next_observation_index"])
    np.testing.assert_allclose(obs[..., -1], given["next_observation_time"], rtol=1e-6)


@pytest.mark.parametrize(
    "path", [path for path in files("groove_levels_") if np.load(path)["tabular"]], ids=lambda path: path.stem
)
def test_optimal_returns_are_those_of_the_reference(path: Path, float64: Any) -> None:
    golden = dict(np.load(path))
    every = jax.tree.map(jnp.asarray, levels_of(golden))
    values = np.asarray(jax.jit(jax.vmap(optimum.optimal_values))(every))
    assert values.dtype == np.float64
    present = np.asarray(jax.vmap(optimum.all_present)(every))
    found = values[np.arange(len(values)), present]
    starts = golden["start_cell"]
    np.testing.assert_allclose(found[np.arange(len(found)), starts], golden["optimal_return"], rtol=1e-10, atol=1e-12)
    for level in range(len(values)):
        side, expected = golden["grid_size"][level], golden["optimal_return_from_cell"][level]
        inside = found[level, : side * side].reshape(side, side)
        blocked = np.isnan(expected)
        assert blocked[side:].all()
        assert blocked[:, side:].all()
        wall = golden["wall_flat"][level, : side * side].reshape(side, side)
        np.testing.assert_array_equal(blocked[:side, :side], wall)
        np.testing.assert_allclose(inside[~wall], expected[:side, :side][~wall], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("path", files("groove_levels_"), ids=lambda path: path.stem)
def test_sizes_and_given_settings_are_those_of_the_reference(path: Path) -> None:
    golden = dict(np.load(path))
    assert GridWorld(mode_of(golden)).obs_dim == golden["observation_size"]
    if (mode := str(golden["mode"])) not in grid_world.MODES:
        return
    world = GridWorld(mode)
    assert (world.obs_dim, world.mode.horizon) == (golden["observation_size"], golden["horizon"])
    assert world.mode.max_objects == golden["max_objects"]
    if world.mode.settings[0].kinds:  # nothing but cells is drawn
        drawn = levels.numbered(mode, 3)
        for ours, theirs in zip(jax.tree.leaves(drawn), jax.tree.leaves(levels_of(golden)), strict=True):
            assert ours.shape == theirs.shape[1:]
        for name in ("wall", "grid_size", "num_objects", "object_type", "object_reward", "object_p_respawn"):
            ours, theirs = getattr(drawn, name), getattr(levels_of(golden), name)
            np.testing.assert_allclose(ours.astype(float), theirs[0], rtol=1e-6, err_msg=name)


# --- closed forms and brute force -------------------------------------------------------------------------------------


def one_object(steps: int, cell: int, reward: float, p_terminate: float, p_respawn: float) -> levels.Level:
    """3 x 3, start in the corner, one object."""
    numbers = (np.array([value], float) for value in (reward, p_terminate, p_respawn))
    return levels.Level(steps, 3, 1, np.zeros(9, bool), 0, np.array([cell]), np.array([0]), *numbers)


CLOSED_FORMS = {
    (3, 8, 1, 1, 0): 0,
    (4, 8, 1, 1, 0): 1,
    (50, 8, 1, 1, 0): 1,
    (10, 1, 1, 0, 1): 5,
    (11, 1, 1, 0, 1): 6,
    (10, 1, 1, 0, 0.5): 3.77734375,
    (10, 1, 1, 0.5, 1): 1.9375,
    (10, 1, -1, 0, 1): 0,
}


@pytest.mark.parametrize(("setting", "expected"), CLOSED_FORMS.items())
def test_optimum_of_one_object(setting: tuple, expected: float, float64: Any) -> None:
    assert float(jax.jit(optimum.optimal_return)(one_object(*setting))) == pytest.approx(expected, abs=1e-12)


def best_by_enumeration(level: levels.Level, side: int) -> float:
    """Plain recursion over every action and every way that chance can go, in row and column, without tables."""
    wall = np.asarray(level.wall)[: side * side].reshape(side, side)
    objects = [divmod(int(cell), side) for cell in level.object_cell]

    @functools.cache
    def value(row: int, column: int, exists: tuple[bool, ...], left: int) -> float:
        if left == 0:
            return 0.0
        best = -np.inf
        for down, right in ((-1, 0), (1, 0), (0, -1), (0, 1), (0, 0)):
            to = (row + down, column + right)
            if not (0 <= to[0] < side and 0 <= to[1] < side) or wall[to]:
                to = (row, column)
            taken = [there and place == to for there, place in zip(exists, objects, strict=True)]
            reward = sum(float(level.object_reward[i]) for i, is_taken in enumerate(taken) if is_taken)
            goes_on = 1.0 - sum(float(level.object_p_terminate[i]) for i, is_taken in enumerate(taken) if is_taken)
            rest = 0.0
            for after in np.ndindex(*(2,) * len(objects)):
                p = 1.0
                for i, there in enumerate(after):
                    back = float(level.object_p_respawn[i]) if i < level.num_objects else 0.0
                    p_there = 0.0 if taken[i] else 1.0 if exists[i] else back
                    p *= p_there if there else 1.0 - p_there
                if p > 0:
                    rest += p * value(*to, tuple(map(bool, after)), left - 1)
            best = max(best, reward + goes_on * rest)
        return best

    present = tuple(i < level.num_objects for i in range(len(objects)))
    row, column = divmod(int(level.start_cell), side)
    return value(row, column, present, int(level.max_steps_in_episode))


@pytest.mark.parametrize("number", range(4))
def test_optimum_is_that_of_brute_force(number: int, float64: Any) -> None:
    drawn = jax.jit(levels.draw, static_argnums=1)(jax.random.key(number), "debug")
    level = jax.tree.map(lambda leaf: leaf.astype(float) if leaf.dtype == jnp.float32 else leaf, drawn)
    expected = best_by_enumeration(jax.tree.map(np.asarray, level), int(level.grid_size))
    assert expected > 0
    assert float(jax.jit(optimum.optimal_return)(level)) == pytest.approx(expected, rel=1e-12)


@functools.partial(jax.jit, static_argnums=(0, 3, 4))
def mean_return(world: GridWorld, level: levels.Level, key: jax.Array, episodes: int, optimal: bool) -> Any:
    """Mean and standard error of the return of the optimal or the uniform policy."""
    best = optimum.optimal_policy(level, world.mode.horizon) if optimal else None

    def episode(key: jax.Array) -> jax.Array:
        reset_key, play_key = jax.random.split(key)

        def step(carry: tuple, i: jax.Array) -> tuple:
            state, alive, total = carry
            action_key, world_key = jax.random.split(jax.random.fold_in(play_key, i))
            action = jax.random.randint(action_key, (), 0, levels.NUM_ACTIONS)
            if best is not None:
                left = jnp.maximum(level.max_steps_in_episode - state.time, 1)
                action = best[left - 1, optimum.bits(state.object_exists), state.cell]
            _, state, reward, terminated, _ = world.step_env(world_key, state, action, level)
            total += jnp.where(alive, reward, 0.0)
            return (state, alive & ~terminated & ~world.is_truncated(state, level), total), None

        start = world.reset_env(reset_key, level)[1], jnp.bool_(True), jnp.float32(0)
        return jax.lax.scan(step, start, jnp.arange(world.mode.horizon))[0][2]

    returns = jax.vmap(episode)(jax.random.split(key, episodes))
    return returns.mean(), returns.std() / jnp.sqrt(episodes)


def test_greedy_policy_gets_the_optimum_and_the_uniform_one_less() -> None:
    """Within 3 standard errors on 20 levels; one of 20 may be a little beyond."""
    world, number, episodes = GridWorld("small"), 20, 400
    every = jax.jit(jax.vmap(lambda key: levels.draw(key, "small")))(jax.random.split(jax.random.key(1), number))
    values = np.asarray(jax.jit(jax.vmap(optimum.optimal_return))(every))

    def of_all(optimal: bool, seed: int) -> tuple[np.ndarray, np.ndarray]:
        keys = jax.random.split(jax.random.key(seed), number)
        play = lambda level, key: mean_return(world, level, key, episodes, optimal)  # noqa: E731
        return jax.tree.map(np.asarray, jax.jit(jax.vmap(play))(every, keys))

    mean, error = of_all(True, 2)
    deviation = np.abs(mean - values) / np.maximum(error, 1e-3)
    assert np.sum(deviation > 3) <= 1
    assert deviation.max() < 4.5
    mean, error = of_all(False, 3)
    assert (mean < values + 3 * error).all()
    assert mean.mean() < 0.5 * values.mean()


# --- distributions ----------------------------------------------------------------------------------------------------

OBSERVATIONS = {
    **dict.fromkeys(("dense", "long", "long_dense"), 1937),
    **dict.fromkeys(("all", "all_shortlife", "all_randlife", "all_vrandlife", "large"), 3201),
    **{"small": 289, "medium": 1025, "debug": 65, "sparse": 677, "longer": 2593, "tabular": 5409, "rand_all": 601},
    **dict.fromkeys(("mazes", *mazes.WALLS), 1353),
    **{"rand_dense": 11 * 11 * 4 + 1, "rand_long": 11 * 11 * 3 + 1, "rand_very_dense": 11 * 11 * 2 + 1},
    **{"rand_small": 7 * 7 * 3 + 1, "rand_sparse": 7 * 7 * 3 + 1, "rand_tiny": 3 * 3 * 2 + 1},
}


def draw_many(mode: str, number: int, solvable: bool = False) -> levels.Level:
    draw = jax.jit(jax.vmap(lambda key: levels.draw(key, mode, solvable)))
    return jax.tree.map(np.asarray, draw(jax.random.split(jax.random.key(7), number)))


# One mode of each kind; the others differ from it in numbers.
KINDS = {"small", "medium", "all", "dense", "tabular", "rand_tiny", "rand_all", "sixteen_rooms", "mazes", "debug"}


@pytest.mark.parametrize("mode", mostly(grid_world.MODES, set(grid_world.MODES) - KINDS))
def test_every_mode_draws_valid_levels(mode: str) -> None:
    world, number = GridWorld(mode), 200
    assert world.obs_dim == OBSERVATIONS[mode]
    assert world.num_actions == 5
    drawn = draw_many(mode, number)
    side = drawn.grid_size
    assert drawn.max_steps_in_episode.max() <= world.mode.horizon
    cells = np.concatenate([drawn.start_cell[:, None], drawn.object_cell], 1)
    assert (cells < side[:, None] ** 2).all()
    assert not np.take_along_axis(drawn.wall, cells, 1).any()
    assert all(len(set(row)) == len(row) for row in cells.tolist())
    settings = world.mode.settings
    assert set(side.tolist()) == {s for setting in settings for s in range(setting.grid[0], setting.grid[1] + 1)}
    counts = {n for setting in settings for n in range(*(setting.objects if setting.objects[1] else (0, 0)))}
    counts |= {setting.most_objects for setting in settings}
    assert set(drawn.num_objects.tolist()) == counts
    assert (drawn.object_type < world.mode.max_types).all()
    steps = [bound for setting in settings for bound in setting.steps]
    assert min(steps) <= drawn.max_steps_in_episode.min()
    if isinstance(settings[0].walls, int):
        assert (drawn.wall.sum(1) == settings[0].walls).all()
        rewards = drawn.object_reward
        assert 0 <= rewards[:, 0].min() < 0.1
        assert 0.9 < rewards.max() < 1
        assert rewards.shape[1] == 1 or -1 < rewards[:, 1:].min() < -0.9
        assert 0.01 <= drawn.object_p_terminate.min() < 0.012
        assert 0.0009 <= drawn.object_p_respawn.min() < 0.0012
        assert np.median(drawn.object_p_terminate) == pytest.approx(0.1, rel=0.4)
        assert np.median(drawn.object_p_respawn) == pytest.approx(0.01, rel=0.4)


def test_statistics_of_all() -> None:
    """Numbers measured on the released code: walls inside by side, and the median time limit."""
    drawn = draw_many("all", 4000)
    beyond = np.arange(100) >= drawn.grid_size[:, None] ** 2
    inside = (drawn.wall & ~beyond).sum(1)
    means = [inside[drawn.grid_size == side].mean() for side in range(4, 11)]
    np.testing.assert_allclose(means, [2.4, 3.7, 5.4, 7.5, 9.5, 12.3, 15.0], atol=0.25)
    assert np.median(drawn.max_steps_in_episode) == pytest.approx(114, abs=14)


def test_all_cells_are_drawn_and_no_cell_twice() -> None:
    allowed = jnp.array([1, 0, 1, 1, 0, 1, 0, 1], bool)
    drawn = jax.jit(jax.vmap(lambda key: levels.draw_cells(key, allowed, 4)))
    cells = np.asarray(drawn(jax.random.split(jax.random.key(0), 6000)))
    orders, counts = np.unique(cells, axis=0, return_counts=True)
    assert set(orders.ravel().tolist()) == {0, 2, 3, 5, 7}
    assert all(len(set(order)) == 4 for order in orders.tolist())
    assert len(orders) == 5 * 4 * 3 * 2
    assert (counts > 20).all()  # of 50 expected: four standard deviations
    assert (counts < 80).all()


def distances_by_search(level: levels.Level) -> dict[int, int]:
    side, steps, waiting = int(level.grid_size), {int(level.start_cell): 0}, [int(level.start_cell)]
    for cell in waiting:
        row, column = divmod(cell, side)
        for r, c in ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)):
            to = r * side + c
            if 0 <= r < side and 0 <= c < side and not level.wall[to] and to not in steps:
                steps[to] = steps[cell] + 1
                waiting.append(to)
    return steps


def test_unsolvable_levels_are_told_and_rejected() -> None:
    number = 600
    drawn = draw_many("all", number)
    told = np.asarray(jax.jit(jax.vmap(lambda level: levels.is_solvable(level, False)))(drawn))
    for i in range(number):
        level = jax.tree.map(lambda leaf, i=i: leaf[i], drawn)
        steps = distances_by_search(level)
        good = [int(c) for c, r in zip(level.object_cell[: level.num_objects], level.object_reward) if r > 0]  # noqa: B905
        assert told[i] == any(steps.get(cell, 10**6) <= level.max_steps_in_episode for cell in good)
    assert 0.003 < 1 - told.mean() < 0.035
    kept = draw_many("all", number, solvable=True)
    assert jax.vmap(lambda level: levels.is_solvable(level, False))(kept).all()


def test_optima_of_the_distributions() -> None:
    """Means that were measured on the released code."""
    best = jax.jit(jax.vmap(optimum.optimal_return))
    small = np.asarray(best(draw_many("small", 256)))
    assert small.mean() == pytest.approx(1.1, abs=0.25)
    np.testing.assert_allclose(best(draw_many("sparse", 8)), 1.0, rtol=1e-6)


@pytest.mark.slow  # long lives: dynamic programmes of thousands of steps
def test_optima_of_the_distributions_of_long_lives() -> None:
    best = jax.jit(jax.vmap(optimum.optimal_return))
    for mode, mean, tolerance in (
        ("dense", 42, 8),
        ("long", 21.05, 1.5),
        ("longer", 9.83, 0.1),
        ("long_dense", 42.6, 2),
    ):
        assert np.asarray(best(draw_many(mode, 2))).mean() == pytest.approx(mean, abs=tolerance)
    assert np.asarray(best(draw_many("all", 32))).mean() == pytest.approx(2.4, abs=1.0)


def test_lifetimes() -> None:
    def drawn(mode: str) -> np.ndarray:
        draw = jax.jit(jax.vmap(lambda key: levels.draw_lifetime(key, mode)))
        return np.asarray(draw(jax.random.split(jax.random.key(0), 4000)))

    fixed = {
        "small": 250,
        "medium": 1000,
        "large": 2500,
        "all": 1000,
        "rand_dense": 25_000,
        "rand_tiny": 250,
        "debug": 4,
    }
    for mode, lifetime in fixed.items():
        assert set(drawn(mode).tolist()) == {lifetime}
    assert drawn("all_randlife").mean() == pytest.approx(124, abs=4)
    very = drawn("all_vrandlife")
    assert (very.min(), very.max()) == (10, 250)
    assert very.mean() == pytest.approx(74, abs=4)
    assert np.median(very) == pytest.approx(51, abs=5)


CHECKSUMS = {
    "sixteen_rooms": "c1fc81240baa",
    "labyrinth": "a23aa3b1ad4c",
    "labyrinth_flipped": "f6ea2ad32cc9",
    "standard_maze": "e78692239ef6",
}


def test_mazes_are_whole_layouts() -> None:
    assert set(CHECKSUMS) < set(mazes.WALLS)
    assert len(modes.MODES["mazes"].settings) == 9
    for name, walls in mazes.WALLS.items():
        drawing = "".join("01"[cell in walls] for cell in range(mazes.SIZE**2))
        if name in CHECKSUMS:
            assert hashlib.sha256(drawing.encode()).hexdigest()[:12] == CHECKSUMS[name]
        start = drawing.index("0")
        wall = np.array(list(drawing)) == "1"
        steps = distances_by_search(levels.Level(1, mazes.SIZE, 0, wall, start, *[np.zeros(0)] * 5))
        assert len(steps) == drawing.count("0"), f"{name} falls into pieces"


# --- dynamics ---------------------------------------------------------------------------------------------------------


def random_play(mode: str, steps: int, number: int = 32) -> Any:
    """Random actions in many levels: levels, and state before, action, observation, ..., after, `[levels, steps]`."""
    world, drawn = GridWorld(mode), draw_many(mode, number)

    def play(level: levels.Level, key: jax.Array) -> Any:
        reset_key, key = jax.random.split(key)

        def step(state: State, i: jax.Array) -> tuple:
            action_key, world_key = jax.random.split(jax.random.fold_in(key, i))
            action = jax.random.randint(action_key, (), 0, levels.NUM_ACTIONS)
            _, after, reward, terminated, truncated, info = world.step(world_key, state, action, level)
            return after, (state, action, reward, terminated, truncated, info["final_observation"], after)

        return jax.lax.scan(step, world.reset(reset_key, level)[1], jnp.arange(steps))[1]

    keys = jax.random.split(jax.random.key(5), number)
    return drawn, jax.tree.map(np.asarray, jax.jit(jax.vmap(play))(drawn, keys))


@pytest.mark.parametrize("mode", ["small", "rand_small", "tabular", "rand_all"])
def test_step_identities(mode: str) -> None:
    """What a step does, and that nobody and nothing is ever in a wall."""
    drawn, (before, action, reward, terminated, truncated, final, after) = random_play(mode, 200)
    collected = before.object_exists & (before.object_cell == moved(drawn, before.cell, action)[..., None])
    np.testing.assert_allclose(reward, (collected * drawn.object_reward[:, None]).sum(-1), rtol=1e-5, atol=1e-6)
    done = terminated | truncated
    assert collected.any()
    assert done.any()
    assert not (collected & after.object_exists)[~done].any()
    np.testing.assert_array_equal(truncated, before.time + 1 == drawn.max_steps_in_episode[:, None])
    assert not (terminated & ~(collected & (drawn.object_p_terminate[:, None] > 0)).any(-1)).any()
    np.testing.assert_allclose(final[..., -1], TIME_UNIT * (before.time + 1), rtol=1e-6)
    np.testing.assert_array_equal(after.time, np.where(done, 0, before.time + 1))
    for state in (before, after):
        for cells in (state.cell[..., None], state.object_cell):
            assert (cells < drawn.grid_size[:, None, None] ** 2).all()
            assert not np.take_along_axis(drawn.wall[:, None], cells, 2).any()
        assert not (state.object_exists & (np.arange(cells.shape[-1]) >= drawn.num_objects[:, None, None])).any()
    moved_objects = (after.object_cell != before.object_cell)[~done]
    assert moved_objects.any() == (not GridWorld(mode).mode.tabular)


def moved(drawn: levels.Level, cell: np.ndarray, action: np.ndarray) -> np.ndarray:
    """Where actions lead, in rows and columns."""
    side = drawn.grid_size[:, None]
    row, column = cell // side, cell % side
    to_row = np.clip(row + np.array([-1, 1, 0, 0, 0])[action], 0, side - 1)
    to_column = np.clip(column + np.array([0, 0, -1, 1, 0])[action], 0, side - 1)
    to = to_row * side + to_column
    return np.where(np.take_along_axis(drawn.wall, to, 1), cell, to)


@pytest.mark.parametrize("mode", ["small", "rand_small"])
def test_frequencies_of_chance(mode: str) -> None:
    """Objects come back and end episodes as often as their probabilities say, and come back anywhere but in walls."""
    world, level = GridWorld(mode), levels.numbered(mode, 2)
    level = level.replace(object_p_respawn=np.full_like(level.object_reward, 0.25))
    level = level.replace(object_p_terminate=np.full_like(level.object_reward, 0.3))
    cell = int(level.start_cell)
    exists = np.arange(world.mode.max_objects) == 0
    state = State(
        jnp.int32(0), jnp.int32(cell), jnp.full(world.mode.max_objects, cell, jnp.int32), exists, jnp.bool_(False)
    )
    step = jax.jit(jax.vmap(lambda key: world.step_env(key, state, STAY, level)))
    _, after, _, terminated, _ = jax.tree.map(np.asarray, step(jax.random.split(jax.random.key(0), 6000)))
    assert terminated.mean() == pytest.approx(0.3, abs=0.025)
    assert not after.object_exists[:, 0].any()
    back = after.object_exists[:, 1:]
    assert back[:, : level.num_objects - 1].mean() == pytest.approx(0.25, abs=0.02)
    if not world.mode.tabular:
        places, counts = np.unique(after.object_cell[:, 1:][back], return_counts=True)
        np.testing.assert_array_equal(places, np.flatnonzero(level.free))
        assert counts.max() < 2 * counts.min()


@pytest.mark.parametrize("mode", ["small", "rand_dense"])
def test_places_read_the_rows_that_a_product_adds(mode: str) -> None:
    """Also where two objects of a type share a cell, which the vector shows once."""
    drawn, (before, *_) = random_play(mode, 60, 16)
    cells = before.object_cell.copy()
    cells[:, ::3, 1] = cells[:, ::3, 0]
    before = before.replace(object_cell=cells)
    world = GridWorld(mode)
    rows = jax.random.normal(jax.random.key(0), (world.obs_dim, 3))

    def both(state: State, level: levels.Level) -> Any:
        places, time = world.places(state, level)
        read = jnp.take(rows, places, axis=0, mode="fill", fill_value=0).sum(0) + time * rows[-1]
        added = jnp.zeros(world.obs_dim).at[places].add(1.0, mode="drop").at[-1].set(time)
        vector = world.observe_state(state, level)
        return read, jnp.dot(vector, rows, precision="highest"), added, vector

    read, product, added, vector = jax.jit(jax.vmap(jax.vmap(both, (0, None))))(before, drawn)
    np.testing.assert_allclose(read, product, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(added, vector)
    assert set(np.unique(np.asarray(vector)[..., :-1]).tolist()) == {0.0, 1.0}


# --- names ------------------------------------------------------------------------------------------------------------


def test_names_give_levels_that_stay_the_same() -> None:
    task = environments.make("GridWorld-small")
    assert (task.obs_dim, task.num_actions) == (289, 5)
    assert not environments.is_continuous("GridWorld-small")
    again, other = environments.make("GridWorld-small-0"), environments.make("GridWorld-small-1")
    assert task.environment is again.environment
    jax.tree.map(np.testing.assert_array_equal, task.params, again.params)
    assert task.params.start_cell != other.params.start_cell
    assert task.max_steps == task.params.max_steps_in_episode
    jax.tree.map(np.testing.assert_array_equal, task.environment.default_params, task.params)


@pytest.mark.parametrize("mode", ["small", "tabular"])
def test_levels_and_transitions_are_the_same_with_64_bits(mode: str, float64: Any) -> None:
    with jax.enable_x64(False):
        levels.numbered.cache_clear()
        expected = levels.numbered(mode, 5)
    levels.numbered.cache_clear()
    level = levels.numbered(mode, 5)
    for ours, theirs in zip(jax.tree.leaves(level), jax.tree.leaves(expected), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    world = GridWorld(mode)
    reset_key, step_key = jax.random.split(jax.random.key(0))
    _, state = world.reset(reset_key, level)
    obs, after, reward, *_ = world.step(step_key, state, STAY, level)
    assert (obs.dtype, reward.dtype, after.cell) == (np.float32, np.float32, state.cell)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("GridWorld-tiny", "Grid-Worlds are GridWorld-<mode>"),
        ("GridWorld-", "with a mode of small, medium"),
        ("GridWorld-small-x", "Grid-Worlds are"),
        ("GridWorld-small-4294967296", "numbers below 4294967296"),
        ("GridWord-small", "did you mean GridWorld-small"),
    ],
)
def test_wrong_names_are_refused(name: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as raised:
        environments.make(name)
    assert name in str(raised.value)
    assert "\n" not in str(raised.value)


def test_the_names_are_taken() -> None:
    with pytest.raises(UserError, match="is an environment already"):
        environments.register("GridWorld-mine", GridWorld("debug"))

"""Evolution strategies against the numbers of evosax 0.1.4 and 0.3.2, and on fitness functions with a known optimum.

Files are those of `tests/data`, and of the folder named by PUREJAX_BILEVEL_REFERENCE_DATA where it has some.
"""

import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from purejax_bilevel import evolution
from purejax_bilevel.configuration import replace, validate
from purejax_bilevel.errors import UserError
from purejax_bilevel.evolution import Evolution, SearchState, Strategy

OWN = Path(__file__).parent / "data"
GIVEN = os.environ.get("PUREJAX_BILEVEL_REFERENCE_DATA")


def files(pattern: str) -> list[Path]:
    given = sorted(Path(GIVEN).rglob(pattern)) if GIVEN else []
    found = {path.name: path for path in [*sorted(OWN.rglob(pattern)), *given]}
    assert found, pattern
    return list(found.values())


# --- reference numbers ------------------------------------------------------------------------------------------------


def open_groups() -> list[Any]:
    """A group of a file is a search; all files name their groups in the same way."""
    cases = []
    for path in files("open_ppo_es_*.npz"):
        groups = {name.split("/")[0] for name in np.load(path).files if "/" in name}
        cases += [pytest.param(path, group, id=f"{path.stem}-{group}") for group in sorted(groups)]
    return cases


def group_of(path: Path, group: str) -> dict[str, np.ndarray]:
    """The arrays of a group; where its pairs are neighbours they are put into our order."""
    golden = {
        name.removeprefix(f"{group}/"): array for name, array in np.load(path).items() if name.startswith(f"{group}/")
    }
    if "order" in golden:
        ours = np.argsort(golden["order"])
        golden |= {name: golden[name][:, ours] for name in ("population", "fitness", "shaped")}
    return golden


def settings_of(golden: dict[str, np.ndarray]) -> Evolution:
    config = {
        name.removeprefix("config/"): array.item() for name, array in golden.items() if name.startswith("config/")
    }
    old = "lr_limit" in config
    return Evolution(
        population=config["popsize"],
        fitness_shaping="pairs" if config.get("mode") == "pair" else "ranks",
        ties="by_order" if old else "shared",
        sigma=config["sigma_init"],
        sigma_decay=config["sigma_decay"],
        sigma_floor=config.get("sigma_limit", 0.0),
        es_lr=config["lr_init"],
        es_lr_decay=config["lr_decay"],
        es_lr_floor=config.get("lr_limit", 0.0),
        es_beta_1=config["beta1"],
        es_beta_2=config["beta2"],
    )


def moments(state: SearchState) -> Any:
    return state.optimizer.inner_state[0]


@pytest.mark.parametrize(("path", "group"), open_groups())
def test_open_es_steps(path: Path, group: str, float64: Any) -> None:
    """All generations of a search; the current evosax keeps its rate in float32, and its sigma lags a generation."""
    golden = group_of(path, group)
    old = "adam_m" in golden
    settings = settings_of(golden)
    strategy = Strategy(settings, jnp.asarray(golden["mean"][0]))
    state, tell = strategy.init(jnp.asarray(golden["mean"][0]), settings), jax.jit(strategy.tell)
    tolerance = 1e-13 if old else 2e-9
    for i, population in enumerate(golden["population"]):
        sigma = golden["sigma"][i]
        np.testing.assert_allclose(state.sigma, sigma if old else _scheduled(golden, i), rtol=1e-13)
        np.testing.assert_allclose(
            evolution.scheduled_rate(settings, state.generation), golden["lr"][i], rtol=1e-13 if old else 1e-6
        )
        shaped = evolution.shaped(jnp.asarray(golden["fitness"][i]), settings)
        np.testing.assert_allclose(shaped, _expected(golden, i), rtol=0, atol=1e-15)
        state = tell(jnp.asarray(population), shaped, state._replace(sigma=jnp.asarray(sigma)), settings)
        np.testing.assert_allclose(strategy.mean(state), golden["mean"][i + 1], rtol=0, atol=tolerance)
        if old:
            np.testing.assert_allclose(moments(state).mu, golden["adam_m"][i], rtol=0, atol=1e-13)
            np.testing.assert_allclose(moments(state).nu, golden["adam_v"][i], rtol=0, atol=1e-13)


def _scheduled(golden: dict[str, np.ndarray], generation: int) -> float:
    return golden["config/sigma_init"] * golden["config/sigma_decay"] ** generation


def _expected(golden: dict[str, np.ndarray], generation: int) -> np.ndarray:
    """Wins of pairs are -1 and 0 in the file."""
    shaped = golden["shaped"][generation]
    return shaped + 0.5 if golden.get("config/mode") == "pair" else shaped


@pytest.mark.parametrize("path", [pytest.param(path, id=path.stem) for path in files("groove_es_*.npz")])
def test_pairs_of_the_original_meta_learner(path: Path, float64: Any) -> None:
    """Pairs are neighbours in the files, and winners have 1. The original's SGD takes the gradient before the last."""
    golden = dict(np.load(path))
    adam = str(golden["optimizer"]) == "adam"
    settings = Evolution(
        population=int(golden["population"]),
        fitness_shaping="pairs",
        es_optimizer="adam" if adam else "sgd",
        es_lr=golden["lrate_init"].item(),
        es_lr_decay=golden["lrate_decay"].item(),
        es_lr_floor=golden["lrate_limit"].item(),
        sigma=golden["sigma_init"].item(),
        sigma_decay=golden["sigma_decay"].item(),
        sigma_floor=golden["sigma_limit"].item(),
        mean_decay=golden["mean_decay"].item(),
    )
    mean = jnp.asarray(golden["mean_0"])
    strategy = Strategy(settings, mean)
    state = strategy.init(mean, settings)
    count = sum(name.endswith("/candidates") for name in golden)
    for i in range(count):
        entry = {
            name.removeprefix(f"generation_{i}/"): array
            for name, array in golden.items()
            if name.startswith(f"generation_{i}/")
        }
        np.testing.assert_allclose(state.sigma, entry["sigma"], rtol=1e-13)
        np.testing.assert_allclose(
            evolution.scheduled_rate(settings, state.generation), entry["learning_rate"], rtol=1e-13
        )
        fitness, candidates = (jnp.asarray(_halves(entry[name])) for name in ("fitness", "candidates"))
        old = {}
        for ties, name in (("by_order", ""), ("shared", "_neutral_ties")):
            shaped = evolution.shaped(fitness, replace(settings, ties=ties))
            np.testing.assert_array_equal(shaped, 0.5 - _halves(entry[f"shaped_fitness{name}"]))
            old[name] = strategy.tell(candidates, shaped, state, settings)
            if adam:
                np.testing.assert_allclose(
                    strategy.mean(old[name]), entry[f"out/mean{name}"], rtol=0, atol=1e-13, err_msg=ties
                )
        if not adam:
            step = (state.mean - old[""].mean) / entry["learning_rate"]
            np.testing.assert_allclose(step, entry["out/sgd_m"], rtol=0, atol=1e-12)
        state = old[""] if adam else old[""]._replace(mean=jnp.asarray(entry["out/mean"]))
        if adam:
            np.testing.assert_allclose(moments(state).mu, entry["out/adam_m"], rtol=0, atol=1e-13)
            np.testing.assert_allclose(moments(state).nu, entry["out/adam_v"], rtol=0, atol=1e-13)


def _halves(rows: np.ndarray) -> np.ndarray:
    """First ones of all pairs, then their mirror images."""
    return np.concatenate([rows[::2], rows[1::2]])


# --- candidates -------------------------------------------------------------------------------------------------------

SOLUTION = {"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)}


@pytest.mark.parametrize("name", ["open_es", "pgpe"])
def test_candidates_are_mirrored_trees(name: str) -> None:
    settings = Evolution(strategy=name, population=6, sigma=0.5)
    strategy = Strategy(settings, SOLUTION)
    state = strategy.init(SOLUTION, settings)
    asked = strategy.ask(jax.random.key(0), state, settings)
    assert jax.tree.map(jnp.shape, asked) == {"kernel": (6, 3, 2), "bias": (6, 2)}
    for leaf, middle in zip(jax.tree.leaves(asked), jax.tree.leaves(SOLUTION), strict=True):
        np.testing.assert_allclose(leaf[:3] + leaf[3:], jnp.broadcast_to(2 * middle, leaf[:3].shape), atol=1e-6)
        assert 0.2 < (leaf - middle).std() < 0.8
    jax.tree.map(np.testing.assert_array_equal, strategy.mean(state), SOLUTION)
    assert [evolution.pair_of(i, 6) for i in range(6)] == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize(("name", "shaping"), [("open_es", "ranks"), ("open_es", "pairs"), ("pgpe", "ranks")])
def test_members_climb_with_their_own_rates(name: str, shaping: str) -> None:
    """Two members of one compiled program; the one with a tiny rate stays where it is."""
    goal = jnp.asarray([1.0, -2.0, 0.5])
    settings = Evolution(
        strategy=name, population=20, fitness_shaping=shaping, sigma=0.2, sigma_floor=0.05, es_lr_decay=0.99
    )
    strategy = Strategy(settings, jnp.zeros(3))

    def search(rate: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        own = replace(settings, es_lr=rate)

        def generation(state: SearchState, t: jax.Array) -> tuple[SearchState, None]:
            candidates = strategy.ask(jax.random.fold_in(key, t), state, own)
            fitness = -jnp.square(candidates - goal).sum(-1)
            return strategy.tell(candidates, evolution.shaped(fitness, own), state, own), None

        end, _ = jax.lax.scan(generation, strategy.init(jnp.zeros(3), own), jnp.arange(300))
        return end.mean, end.sigma

    means, sigmas = jax.jit(jax.vmap(search))(jnp.asarray([0.05, 1e-6]), jax.random.split(jax.random.key(1), 2))
    assert jnp.linalg.norm(means[0] - goal) < 0.15
    assert jnp.linalg.norm(means[1]) < 1e-3
    assert (sigmas >= 0.05 - 1e-7).all()
    if name == "pgpe":
        assert (sigmas[0] < 0.19).all()  # near the optimum a smaller spread is better


@pytest.mark.parametrize("name", ["open_es", "pgpe"])
def test_equal_fitness_moves_nothing(name: str) -> None:
    for shaping in ("ranks", "pairs"):
        settings = Evolution(strategy=name, population=8, fitness_shaping=shaping)
        strategy = Strategy(settings, jnp.zeros(4))

        @jax.jit
        def generation(strategy: Strategy = strategy, settings: Evolution = settings) -> SearchState:
            state = strategy.init(jnp.ones(4), settings)
            asked = strategy.ask(jax.random.key(0), state, settings)
            return strategy.tell(asked, evolution.shaped(jnp.full(8, 3.0), settings), state, settings)

        after = generation()
        np.testing.assert_allclose(after.mean, jnp.ones(4), atol=1e-7)
        assert after.generation == 1


# --- fitness ----------------------------------------------------------------------------------------------------------


def test_centred_ranks() -> None:
    fitness = jnp.asarray([3.0, -1.0, jnp.nan, 3.0, 10.0, 0.0])
    np.testing.assert_allclose(evolution.centred_ranks(fitness), [-0.2, 0.3, 0.5, -0.2, -0.5, 0.1], atol=1e-6)
    np.testing.assert_allclose(evolution.centred_ranks(fitness, False), [-0.3, 0.3, 0.5, -0.1, -0.5, 0.1], atol=1e-6)


def test_wins_of_pairs() -> None:
    fitness = jnp.asarray([3.0, -1.0, jnp.nan, 5.0, 10.0, -1.0, -2.0, 5.0])
    np.testing.assert_array_equal(evolution.pair_wins(fitness), [0.5, 0, 0.5, 0, -0.5, 0, -0.5, 0])
    np.testing.assert_array_equal(evolution.pair_wins(fitness, False), [0.5] * 4 + [-0.5] * 4)


@pytest.mark.parametrize("population", [7, 0, 1, 1_000_000_000])
def test_a_population_is_even(population: int) -> None:
    with pytest.raises(
        UserError, match=f"--population must be an even whole number from 2 to 1000000, got {population}"
    ):
        validate(Evolution(population=population))

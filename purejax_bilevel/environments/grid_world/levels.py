"""Levels: what one is, where an agent can go in it, and how one is drawn.

Cells are flat, row * side + column, where the side is the level's own: the arrays have room for the largest grid of a
mode, and what lies beyond the side means nothing.
"""

import functools
import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from purejax_bilevel.environments.grid_world.modes import MODES, Mode

NUM_ACTIONS = 5  # up, down, left, right, stay
_DOWN, _RIGHT = np.array([-1, 1, 0, 0, 0]), np.array([0, 0, -1, 1, 0])


@flax.struct.dataclass
class Level:
    """Parameters of a Grid-World; G is the largest grid side of the mode, M its largest number of objects."""

    max_steps_in_episode: Any  # []
    grid_size: Any  # [], side
    num_objects: Any  # [], the first ones of M
    wall: Any  # [G * G], whether a flat cell is one
    start_cell: Any  # []
    object_cell: Any  # [M]; where objects come back anywhere: of no meaning
    object_type: Any  # [M]
    object_reward: Any  # [M], for collecting it
    object_p_terminate: Any  # [M], probability that collecting it ends the episode
    object_p_respawn: Any  # [M], probability per step that it comes back

    @property
    def used(self) -> jax.Array:
        """Which of the M objects there are, `[M]`."""
        return jnp.arange(self.object_cell.shape[0]) < self.num_objects

    @property
    def free(self) -> jax.Array:
        """Cells within the grid that are no walls, `[G * G]`."""
        return (jnp.arange(self.wall.shape[0]) < self.grid_size**2) & ~self.wall


def move(level: Level, cell: jax.Array, action: jax.Array) -> jax.Array:
    """The cell that an action leads to: the same one where a wall or the border is in the way; any shape."""
    row = cell // level.grid_size + jnp.asarray(_DOWN)[action]
    column = cell % level.grid_size + jnp.asarray(_RIGHT)[action]
    inside = (row >= 0) & (row < level.grid_size) & (column >= 0) & (column < level.grid_size)
    target = jnp.where(inside, row * level.grid_size + column, cell)
    return jnp.where(jnp.asarray(level.wall)[target], cell, target)


def neighbours(level: Level) -> jax.Array:
    """Where every action leads from every cell, `[5, G * G]`."""
    return move(level, jnp.arange(level.wall.shape[0]), jnp.arange(NUM_ACTIONS)[:, None])


def distances(level: Level) -> jax.Array:
    """Steps from the start to every cell, `[G * G]`; G * G for cells that cannot be reached."""
    unreached = level.wall.shape[0]
    around = neighbours(level)

    def shorter(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        steps, _ = carry
        return jnp.where(level.free, jnp.minimum(steps, steps[around].min(0) + 1), unreached), steps

    start = jnp.full(unreached, unreached).at[level.start_cell].set(0)
    return jax.lax.while_loop(lambda carry: (carry[0] != carry[1]).any(), shorter, (start, start + 1))[0]


def is_solvable(level: Level, random_respawn: bool) -> jax.Array:
    """Whether an object of positive reward can be collected.

    Args:
        level: of one Grid-World.
        random_respawn: whether objects come back anywhere; then it is enough that the agent can leave its cell.
    """
    steps = distances(level)
    if random_respawn:
        reached: jax.Array = (steps < steps.shape[0]).sum() > 1
    else:
        reached = steps[level.object_cell] <= jnp.minimum(level.max_steps_in_episode, steps.shape[0] - 1)
    return (level.used & (level.object_reward > 0.0) & reached).any()


def draw_cells(key: jax.Array, allowed: jax.Array, number: int) -> jax.Array:
    """Different cells, uniformly among those allowed.

    Args:
        key: consumed.
        allowed: `[cells]`, at least `number` of them true.
        number: how many to draw.

    Returns:
        `[number]`.
    """
    count = allowed.sum(dtype=jnp.int32)
    picks = jax.random.randint(key, (number,), 0, count - jnp.arange(number, dtype=jnp.int32), jnp.int32)
    # Fisher and Yates's shuffle of the places of all allowed cells, of which only the swaps are kept.
    ranks: list[jax.Array] = []
    lasts: list[jax.Array] = []  # what has come to the place of an earlier pick
    for i in range(number):
        rank, last = picks[i], count - 1 - i
        for j in range(i):
            rank = jnp.where(picks[i] == picks[j], lasts[j], rank)
            last = jnp.where(count - 1 - i == picks[j], lasts[j], last)
        ranks.append(rank)
        lasts.append(last)
    return (jnp.cumsum(allowed) <= jnp.stack(ranks)[:, None]).sum(1, dtype=jnp.int32)


# --- drawing levels ---------------------------------------------------------------------------------------------------


def draw(key: jax.Array, mode: str, solvable: bool = True) -> Level:
    """Draws a level; may be mapped and compiled.

    Args:
        key: consumed.
        mode: a name in `MODES`.
        solvable: whether levels without a positive object that can be reached in time are drawn again.
    """
    distribution = MODES[mode]
    if not solvable:
        return _draw(key, distribution)

    def again(carry: tuple[jax.Array, Level, jax.Array]) -> tuple[jax.Array, Level, jax.Array]:
        next_key, level_key = jax.random.split(carry[0])
        level = _draw(level_key, distribution)
        return next_key, level, is_solvable(level, not distribution.tabular)

    shapes = jax.eval_shape(functools.partial(_draw, mode=distribution), key)
    nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return jax.lax.while_loop(lambda carry: ~carry[2], again, (key, nothing, jnp.bool_(False)))[1]


@functools.cache
def numbered(mode: str, number: int) -> Level:
    """Level of a number of a mode, in numpy: the same everywhere, and one that can be solved."""
    level = jax.jit(draw, static_argnums=1)(jax.random.key(number), mode)
    return jax.tree.map(np.asarray, level)


def draw_lifetime(key: jax.Array, mode: str) -> jax.Array:
    """How many updates an agent of meta-training lives."""
    return _log_uniform(key, *MODES[mode].lifetime)


def _draw(key: jax.Array, mode: Mode) -> Level:
    setting_key, steps_key, grid_key, wall_key, objects_key, cells_key = jax.random.split(key, 6)
    tables = _tables(mode)
    if len(mode.settings) > 1:
        setting = jax.random.randint(setting_key, (), 0, len(mode.settings), jnp.int32)
        tables = jax.tree.map(lambda table: jnp.asarray(table)[setting], tables)
    else:
        tables = jax.tree.map(lambda table: table[0], tables)
    grid_size = _uniform(grid_key, *tables["grid"])
    wall = jnp.asarray(tables["wall"])
    if isinstance(number := mode.settings[0].walls, int):
        wall = _draw_subset(wall_key, wall.size, number)
    free = ~wall & (jnp.arange(wall.size) < grid_size**2)
    cells = draw_cells(cells_key, free, 1 + mode.max_objects)
    return Level(
        max_steps_in_episode=_log_uniform(steps_key, *tables["steps"]),
        grid_size=grid_size,
        wall=wall,
        start_cell=cells[0],
        object_cell=cells[1:],
        **_draw_objects(objects_key, mode, tables),
    )


def _draw_objects(key: jax.Array, mode: Mode, tables: dict[str, Any]) -> dict[str, jax.Array]:
    number_key, first_key, rewards_key, terminate_key, respawn_key = jax.random.split(key, 5)
    if mode.settings[0].kinds:
        return {name: jnp.asarray(tables[name]) for name in _OBJECTS}
    shape = (mode.max_objects,)
    rewards = jax.random.uniform(rewards_key, shape, jnp.float32, *mode.settings[0].rewards)
    return {
        "num_objects": _uniform(number_key, *mode.settings[0].objects),
        "object_type": jnp.arange(mode.max_objects, dtype=jnp.int32),
        "object_reward": rewards.at[0].set(jax.random.uniform(first_key, (), jnp.float32)),
        "object_p_terminate": _log_uniform_number(terminate_key, shape, 0.01, 1.0),
        "object_p_respawn": _log_uniform_number(respawn_key, shape, 0.001, 0.1),
    }


_OBJECTS = ("num_objects", "object_type", "object_reward", "object_p_terminate", "object_p_respawn")


@functools.cache
def _tables(mode: Mode) -> dict[str, Any]:
    """What the settings say, `[settings, ...]`; walls and objects that are drawn are left empty."""
    rows = []
    for setting in mode.settings:
        wall = np.zeros(mode.max_grid_size**2, bool)
        if not isinstance(setting.walls, int):
            wall[list(setting.walls)] = True
        kinds = [(i, kind) for i, kind in enumerate(setting.kinds) for _ in range(kind.number)]
        values = np.zeros((4, mode.max_objects), np.float32)
        for column, (i, kind) in enumerate(kinds):
            values[:, column] = i, kind.reward, kind.p_terminate, kind.p_respawn
        rows.append(
            {
                "grid": np.array(setting.grid, np.int32),
                "steps": np.array(setting.steps, np.int32),
                "wall": wall,
                "num_objects": np.int32(len(kinds)),
                "object_type": values[0].astype(np.int32),
                **dict(zip(_OBJECTS[2:], values[1:], strict=True)),
            }
        )
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def _draw_subset(key: jax.Array, size: int, number: int) -> jax.Array:
    """Some of `size` things, `[size]`: all subsets of `number` are equally likely. A sort would compile for seconds."""
    luck, place = jax.random.uniform(key, (size,), jnp.float32), jnp.arange(size)
    luckier = (luck > luck[:, None]) | ((luck == luck[:, None]) & (place < place[:, None]))
    return luckier.sum(1) < number


def _uniform(key: jax.Array, low: jax.Array | int, high: jax.Array | int) -> jax.Array:
    return jax.random.randint(key, (), low, high + 1, jnp.int32)


def _log_uniform_number(key: jax.Array, shape: tuple[int, ...], low: float, high: float) -> jax.Array:
    return jnp.exp(jax.random.uniform(key, shape, jnp.float32, math.log(low), math.log(high)))


def _log_uniform(key: jax.Array, low: jax.Array | int, high: jax.Array | int) -> jax.Array:
    logarithms = jnp.log(jnp.float32(low)), jnp.log(jnp.float32(high))
    drawn = jnp.exp(jax.random.uniform(key, (), jnp.float32, *logarithms))
    return jnp.clip(jnp.round(drawn), low, high).astype(jnp.int32)  # rounding errors of float32 leave the bounds

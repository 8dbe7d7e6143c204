"""The best that can be done in a level: an exact dynamic programme over (objects present, cell, steps left).

For tabular modes, whose objects keep their cells. The value of a state is the expected undiscounted return,
V_n(s) = max_a r + (1 - p_terminate) E V_{n-1}(s'), where the objects present factorise: one that is collected is gone,
one that is there stays, one that is not comes back with its probability. All functions may be mapped over levels.
"""

import jax
import jax.numpy as jnp

from purejax_bilevel.environments.grid_world.levels import NUM_ACTIONS, Level, neighbours


def optimal_return(level: Level) -> jax.Array:
    """Expected return of the best policy from the start, with all objects present and all steps left."""
    return optimal_values(level)[all_present(level), level.start_cell]


def optimal_values(level: Level) -> jax.Array:
    """Values with all steps left.

    Args:
        level: of a tabular mode; computed in the precision of its rewards.

    Returns:
        `[2^M, G * G]` by objects present (bit i for object i) and cell; of no meaning in walls and beyond the grid.
    """
    around = neighbours(level)
    best = lambda _, values: _action_values(level, around, values).max(0)  # noqa: E731
    return jax.lax.fori_loop(0, level.max_steps_in_episode, best, _no_values(level))


def optimal_policy(level: Level, horizon: int) -> jax.Array:
    """The best actions; the first of equally good ones, which is never to stay if another is as good.

    Args:
        level: of a tabular mode.
        horizon: the longest time limit of the mode.

    Returns:
        `[horizon, 2^M, G * G]` by steps left less one, objects present and cell.
    """
    around = neighbours(level)

    def backward(values: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        q = _action_values(level, around, values)
        return q.max(0), q.argmax(0).astype(jnp.int8)

    return jax.lax.scan(backward, _no_values(level), length=horizon)[1]


def all_present(level: Level) -> jax.Array:
    """The objects at a reset, as bits."""
    return bits(level.used)


def bits(exists: jax.Array) -> jax.Array:
    """Which objects `[..., M]` exist, as a number: bit i for object i."""
    return (exists << jnp.arange(exists.shape[-1])).sum(-1)


def _no_values(level: Level) -> jax.Array:
    return jnp.zeros((2 ** level.object_cell.shape[0], level.wall.shape[0]), level.object_reward.dtype)


def _action_values(level: Level, around: jax.Array, values: jax.Array) -> jax.Array:
    """Values `[5, 2^M, G * G]` of actions, from the values `[2^M, G * G]` of what they lead to."""
    number = level.object_cell.shape[0]
    present = (jnp.arange(2**number)[:, None] >> jnp.arange(number)) & 1 == 1
    here = level.object_cell[:, None] == jnp.arange(values.shape[1])
    collected = present[:, :, None] & here  # [2^M, M, G * G]
    reward, p_terminate = (
        jnp.where(collected, jnp.asarray(per_object)[:, None], 0.0).sum(1)
        for per_object in (level.object_reward, level.object_p_terminate)
    )
    for i in range(number):
        values = _expect(values, i, here[i], jnp.where(level.used[i], level.object_p_respawn[i], 0.0))
    arrived = reward + (1.0 - jnp.minimum(p_terminate, 1.0)) * values
    return jnp.stack([arrived[:, around[action]] for action in range(NUM_ACTIONS)])


def _expect(values: jax.Array, i: int, here: jax.Array, p_respawn: jax.Array) -> jax.Array:
    """Expectation over whether object i exists in the next step, given whether it does in this one."""
    gone, there = jnp.moveaxis(values.reshape(-1, 2, 2**i, values.shape[1]), 1, 0)
    before_gone, before_there = gone + p_respawn * (there - gone), jnp.where(here, gone, there)
    return jnp.stack([before_gone, before_there], 1).reshape(values.shape)

"""Replay buffer inside a compiled loop: one packed row per transition, addressed by the shared step counter.

The step `t` is the same for all members of a program, so the write is an in-place slice update even when members are
batched (a counter of each member's own would turn it into a scatter over the whole buffer, 30 to 40 times slower).
Samples are drawn by *age* (0 = just written), with replacement, at a cost that does not depend on the capacity.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp


class Batch(NamedTuple):
    """Transitions, features first and samples last.

    `next_obs` is the observation before any auto-reset, and `terminated` is 0 at a time limit: targets bootstrap
    through truncation.
    """

    obs: jax.Array  # [obs, batch]
    action: jax.Array  # [action, batch], one-hot where actions are discrete
    reward: jax.Array  # [batch]
    next_obs: jax.Array  # [obs, batch]
    terminated: jax.Array  # [batch], 0.0 or 1.0
    # [obs, batch] standard normals for models that sample, or [action, batch] for policies that do
    noise: jax.Array | None = None


def init(capacity: int, obs_dim: int, action_dim: int) -> jax.Array:
    """Empty storage `[capacity, 2 obs + action + 2]`."""
    return jnp.zeros((capacity, 2 * obs_dim + action_dim + 2))


def add(
    storage: jax.Array,
    t: jax.Array,
    obs: jax.Array,
    action: jax.Array,
    reward: jax.Array,
    next_obs: jax.Array,
    terminated: jax.Array,
) -> jax.Array:
    """Writes the transition of step `t` (obs and next_obs `[obs]`, action `[action]`) over the oldest one."""
    return add_block(storage, t, obs[None], action[None], reward[None], next_obs[None], terminated[None])


def add_block(
    storage: jax.Array,
    t: jax.Array,
    obs: jax.Array,
    action: jax.Array,
    reward: jax.Array,
    next_obs: jax.Array,
    terminated: jax.Array,
) -> jax.Array:
    """Writes the transitions of step `t`, one of each copy of the environment, as one slice over the oldest ones.

    They are numbers t n .. t n + n - 1 for `sample`.

    Args:
        storage: `[capacity, row]`; its capacity must be a multiple of the number n of copies.
        t: number of the step, shared by all members.
        obs, next_obs: `[n, obs]`.
        action: `[n, action]`.
        reward, terminated: `[n]`.

    Raises:
        AssertionError: the shapes do not fit each other or the storage, told while the program is traced.
    """
    count = reward.shape[0]
    chex.assert_shape([obs, next_obs], (count, (storage.shape[1] - action.shape[1] - 2) // 2))
    chex.assert_shape([action, reward, terminated], [(count, None), (count,), (count,)])
    rows = packed(obs, action, reward.astype(storage.dtype), next_obs, terminated.astype(storage.dtype))
    return jax.lax.dynamic_update_slice_in_dim(storage, rows, (t * rows.shape[0]) % storage.shape[0], 0)


def sample(
    storage: jax.Array,
    t: jax.Array,
    key: jax.Array,
    batch_size: int,
    obs_dim: int,
    since: jax.Array | int = 0,
    decay: jax.Array | float | None = None,
) -> Batch:
    """Draws transitions with replacement among those written at steps `since..t`, as far as they are still stored.

    Args:
        storage: `[capacity, row]`.
        t: the step last written.
        key: consumed.
        batch_size: number of transitions.
        obs_dim: size of an observation.
        since: oldest step allowed (the buffer counts as cleared before it).
        decay: None for uniform sampling, else probability proportional to exp(-decay * age), age in steps.
    """
    capacity = storage.shape[0]
    stored = jnp.clip(t - since + 1, 1, capacity)
    if decay is None:
        age = jax.random.randint(key, (batch_size,), 0, stored)
    else:
        age = truncated_geometric(key, batch_size, decay, stored)
    return unpacked(storage[(t - age) % capacity], obs_dim)


def packed(
    obs: jax.Array, action: jax.Array, reward: jax.Array, next_obs: jax.Array, terminated: jax.Array
) -> jax.Array:
    """Transitions as rows `[n, row]`: obs and next_obs are `[n, obs]`, action `[n, action]`, the others `[n]`."""
    return jnp.concatenate([obs, next_obs, action, jnp.stack([reward, terminated], axis=1)], axis=1)


def unpacked(rows: jax.Array, obs_dim: int) -> Batch:
    """The transitions that rows `[n, row]` hold."""
    rows = rows.T
    return Batch(
        obs=rows[:obs_dim],
        next_obs=rows[obs_dim : 2 * obs_dim],
        action=rows[2 * obs_dim : -2],
        reward=rows[-2],
        terminated=rows[-1],
    )


def truncated_geometric(key: jax.Array, num_samples: int, decay: jax.Array | float, count: jax.Array) -> jax.Array:
    """Integers `[num_samples]` in 0..count-1 with probability proportional to exp(-decay * i), by inversion."""
    uniform = jax.random.uniform(key, (num_samples,))
    total = -jnp.expm1(-decay * count.astype(uniform.dtype))
    age = jnp.floor(-jnp.log1p(-uniform * total) / decay).astype(jnp.int32)
    return jnp.minimum(age, count - 1)

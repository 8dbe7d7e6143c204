"""Ring buffers in which every row that can be drawn was stored: first in, first out, of rows that may be masked.

Model rollouts end at different times, so of the rows of a step only some are to be stored. They are written one after
another behind the last ones, the others nowhere: there is no padding among the rows, and none can be drawn. Rows are
those of `replay` (`packed`), or of anything else.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from purejax_bilevel import replay
from purejax_bilevel.replay import Batch


class Ring(NamedTuple):
    """The last rows stored."""

    rows: jax.Array  # [capacity, row]; only the first `size` of them hold something
    pointer: jax.Array  # [], where the next row goes
    size: jax.Array  # [], rows stored


def empty(capacity: int, row_size: int) -> Ring:
    """A ring without rows."""
    return Ring(jnp.zeros((capacity, row_size)), jnp.int32(0), jnp.int32(0))


def store(ring: Ring, rows: jax.Array, is_valid: jax.Array | None = None) -> Ring:
    """Writes rows over the oldest ones.

    Args:
        ring: where to.
        rows: `[n, row]`, n at most the capacity.
        is_valid: which of them, `[n]`; None: all.

    Raises:
        AssertionError: the shapes do not fit, told while the program is traced.
    """
    capacity, count = ring.rows.shape[0], rows.shape[0]
    chex.assert_shape(rows, (count, ring.rows.shape[1]))
    assert count <= capacity, f"{count} rows at once in a ring of {capacity}"
    is_valid = jnp.ones(count, bool) if is_valid is None else is_valid
    place = (ring.pointer + jnp.cumsum(is_valid) - 1) % capacity
    place = jnp.where(is_valid, place, capacity)  # beyond the end: written nowhere
    number = is_valid.sum()
    return Ring(
        rows=ring.rows.at[place].set(rows.astype(ring.rows.dtype), mode="drop"),
        pointer=((ring.pointer + number) % capacity).astype(jnp.int32),
        size=jnp.minimum(ring.size + number, capacity).astype(jnp.int32),
    )


def sample(ring: Ring, key: jax.Array, count: int) -> jax.Array:
    """Rows `[count, row]` drawn uniformly, with replacement, from a ring that has some."""
    return ring.rows[jax.random.randint(key, (count,), 0, jnp.maximum(ring.size, 1))]


def oldest(ring: Ring) -> jax.Array:
    """Place of the oldest row."""
    return jnp.where(ring.size < ring.rows.shape[0], 0, ring.pointer)


def mixed(
    real: jax.Array,
    ring: Ring | None,
    key: jax.Array,
    batch_size: int,
    obs_dim: int,
    real_ratio: jax.Array | float,
    stored: jax.Array | int | None = None,
) -> Batch:
    """A batch of which `real_ratio`, rounded to whole rows, comes from the dataset, and all while the ring is empty.

    Args:
        real: rows of the dataset, `[rows, row]`.
        ring: of the model's transitions; None: there are none.
        key: consumed.
        batch_size: transitions.
        obs_dim: entries of an observation.
        real_ratio: share of the dataset; may be traced.
        stored: how many of its first rows there are; None: all.
    """
    real_key, ring_key = jax.random.split(key)
    rows = real[jax.random.randint(real_key, (batch_size,), 0, real.shape[0] if stored is None else stored)]
    if ring is not None:
        is_real = jnp.arange(batch_size) < jnp.round(real_ratio * batch_size)
        rows = jnp.where((is_real | (ring.size == 0))[:, None], rows, sample(ring, ring_key, batch_size))
    return replay.unpacked(rows, obs_dim)

"""Ring buffers: order, masks, and that nothing but stored rows is ever drawn."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from purejax_bilevel.programs.offline import buffers

numbers = functools.partial(np.arange, dtype=np.float32)
store = jax.jit(buffers.store)


def test_rows_go_round():
    """Capacity 100, 80 and then 57 rows: the oldest one left is the 38th."""
    ring = store(buffers.empty(100, 1), numbers(80)[:, None])
    assert (int(ring.size), int(ring.pointer), int(buffers.oldest(ring))) == (80, 80, 0)
    ring = store(ring, numbers(80, 137)[:, None])
    assert (int(ring.size), int(ring.pointer), int(buffers.oldest(ring))) == (100, 37, 37)
    assert float(ring.rows[37, 0]) == 37.0
    assert float(ring.rows[36, 0]) == 136.0
    np.testing.assert_array_equal(np.roll(np.asarray(ring.rows[:, 0]), -37), numbers(37, 137))


def test_a_ring_filled_to_the_brim_goes_on_at_its_start():
    ring = store(store(buffers.empty(4, 1), numbers(4)[:, None]), numbers(10, 11)[:, None])
    np.testing.assert_array_equal(ring.rows[:, 0], [10, 1, 2, 3])


def test_masked_rows_are_stored_nowhere():
    random, expected, ring = np.random.default_rng(1), [], buffers.empty(16, 2)
    for step in range(40):
        rows, is_valid = np.full((5, 2), step + 1.0) + random.random((5, 2)), random.random(5) < 0.4
        ring, expected = store(ring, rows, is_valid), [*expected, *rows[is_valid]][-16:]
    assert int(ring.size) == 16
    in_order = np.roll(np.asarray(ring.rows), -int(buffers.oldest(ring)), 0)
    np.testing.assert_allclose(in_order, np.array(expected), rtol=1e-6)


def test_neither_padding_nor_masked_rows_are_drawn():
    """A hundredth of a large ring holds something, half of what was offered."""
    count = 10_000
    rows, is_valid = numbers(1, 2 * count + 1)[:, None], np.arange(2 * count) % 2 == 0
    ring = store(buffers.empty(1_000_000, 1), rows, is_valid)
    drawn = np.asarray(jax.jit(buffers.sample, static_argnums=2)(ring, jax.random.key(0), 1_000_000))[:, 0]
    assert (drawn % 2 == 1).all()
    counts = np.unique(drawn, return_counts=True)[1]
    assert len(counts) == count
    assert abs(counts.std() - 10.0) < 1.0  # 100 each on average, Poisson


def test_batches_have_the_real_ratio():
    real = jnp.full((7, 9), -1.0)
    ring = store(buffers.empty(20, 9), np.full((3, 9), 1.0, np.float32))
    draw = jax.jit(lambda ring, ratio: buffers.mixed(real, ring, jax.random.key(2), 40, 3, ratio))
    for ratio, count in ((0.0, 0), (0.05, 2), (0.5, 20), (1.0, 40)):
        assert int((draw(ring, ratio).reward < 0).sum()) == count
    assert (np.asarray(draw(buffers.empty(20, 9), 0.0).reward) == -1).all()  # nothing imagined yet
    assert (np.asarray(buffers.mixed(real, None, jax.random.key(2), 40, 3, 0.0).reward) == -1).all()

"""The replay buffer against a plain deque."""

from collections import deque

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from purejax_bilevel import replay

CAPACITY, OBS, ACTION = 7, 3, 2


def filled(steps: int) -> jax.Array:
    """A buffer in which every number of the transition of step t tells t."""
    storage = replay.init(CAPACITY, OBS, ACTION)
    for t in range(steps):
        obs, action = jnp.full(OBS, t + 0.25), jnp.full(ACTION, t + 0.5)
        storage = replay.add(storage, jnp.int32(t), obs, action, jnp.float32(-t), obs + 0.5, jnp.float32(t % 2))
    return storage


@pytest.mark.parametrize(("steps", "since"), [(1, 0), (5, 0), (7, 0), (23, 0), (23, 20), (30, 23)])
def test_samples_are_the_latest_transitions(steps: int, since: int):
    expected = deque(range(since, steps), maxlen=CAPACITY)
    batch = replay.sample(filled(steps), jnp.int32(steps - 1), jax.random.key(0), 500, OBS, since)
    steps_drawn = np.asarray(-batch.reward).astype(int)
    assert set(steps_drawn) == set(expected)
    np.testing.assert_array_equal(batch.obs, np.tile(steps_drawn + 0.25, (OBS, 1)))
    np.testing.assert_array_equal(batch.action, np.tile(steps_drawn + 0.5, (ACTION, 1)))
    np.testing.assert_array_equal(batch.next_obs, np.tile(steps_drawn + 0.75, (OBS, 1)))
    np.testing.assert_array_equal(batch.terminated, steps_drawn % 2)


def test_uniform_sampling_is_uniform():
    batch = replay.sample(filled(10), jnp.int32(9), jax.random.key(1), 70_000, OBS)
    counts = np.unique(np.asarray(batch.reward), return_counts=True)[1]
    np.testing.assert_allclose(counts, 10_000, rtol=0.05)


@pytest.mark.parametrize("decay", [0.05, 1.0])
def test_time_weights_fall_exponentially_with_age_in_steps(decay: float):
    batch = replay.sample(filled(12), jnp.int32(11), jax.random.key(2), 100_000, OBS, decay=jnp.float32(decay))
    age = 11 + np.asarray(batch.reward).astype(int)
    expected = np.exp(-decay * np.arange(CAPACITY))
    frequency = np.bincount(age, minlength=CAPACITY) / age.size
    np.testing.assert_allclose(frequency, expected / expected.sum(), atol=0.006)

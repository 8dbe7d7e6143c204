"""The replay buffer against a plain deque."""

from collections import deque

import chex
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


@pytest.mark.parametrize("wrong", [{"next_obs": (OBS - 1,)}, {"obs": (OBS, 1)}, {"action": (ACTION + 2,)}])
def test_a_transition_that_does_not_fit_the_storage_is_refused(wrong: dict[str, tuple[int, ...]]):
    shapes = {"obs": (OBS,), "action": (ACTION,), "reward": (), "next_obs": (OBS,), "terminated": ()} | wrong
    with pytest.raises(AssertionError):
        replay.add(filled(1), jnp.int32(1), **{name: jnp.zeros(shape) for name, shape in shapes.items()})


def test_step_since_and_decay_may_change_without_a_new_program():
    draw = chex.assert_max_traces(lambda *numbers: replay.sample(filled(9), *numbers[:2], 5, OBS, *numbers[2:]), n=1)
    compiled = jax.jit(draw)
    drawn = [
        compiled(jnp.int32(t), jax.random.key(0), jnp.int32(since), jnp.float32(decay)).reward
        for t, since, decay in ((8, 0, 0.1), (7, 2, 0.3))
    ]
    assert not np.array_equal(*drawn)

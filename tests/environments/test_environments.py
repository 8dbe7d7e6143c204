"""Environments: what is accepted, time limits, and the non-stationary reward."""

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from purejax_bilevel import environments
from purejax_bilevel.environments import non_stationary
from purejax_bilevel.errors import UserError


@pytest.mark.parametrize(
    ("name", "obs_dim", "num_actions"), [("CartPole-v1", 4, 2), ("Acrobot-v1", 6, 3), ("MountainCar-v0", 2, 3)]
)
def test_sizes(name: str, obs_dim: int, num_actions: int):
    task = environments.make(name)
    assert (task.obs_dim, task.num_actions) == (obs_dim, num_actions)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("CartPole-v7", "did you mean CartPole-v1"),
        ("qqqq", "known are"),
        ("Pendulum-v1", "continuous actions"),
        ("Breakout-MinAtar", "observations of shape"),
    ],
)
def test_refusals_name_the_environment(name: str, sentence: str):
    with pytest.raises(UserError, match=sentence) as raised:
        environments.make(name)
    assert name in str(raised.value)


def rollout(environment, params, steps: int, seed: int = 0):
    """Observations after each step (before any reset), rewards and the two kinds of ends under random actions."""

    def step(carry, key):
        obs, state = carry
        action_key, step_key = jax.random.split(key)
        action = jax.random.randint(action_key, (), 0, environment.num_actions)
        obs, state, reward, terminated, truncated, info = environment.step(step_key, state, action, params)
        return (obs, state), (info["final_observation"], reward, terminated, truncated)

    reset_key, key = jax.random.split(jax.random.key(seed))
    start = environment.reset(reset_key, params)
    return jax.tree.map(np.asarray, jax.lax.scan(step, start, jax.random.split(key, steps))[1])


def test_reward_interval_keeps_reward_only_inside():
    plain, params = gymnax.make("CartPole-v1")
    wrapped = non_stationary.RewardInterval(plain)
    low, high = -0.03, 0.05
    interval = non_stationary.IntervalParams(params, low, high)
    final, reward, terminated, _ = rollout(wrapped, interval, 400)
    same_final, same_reward, same_terminated, _ = rollout(plain, params, 400)
    np.testing.assert_array_equal(final, same_final)
    np.testing.assert_array_equal(terminated, same_terminated)
    angle = final[:, non_stationary.POLE_ANGLE]
    inside = (angle >= low) & (angle <= high)
    assert 0.1 < inside.mean() < 0.9
    np.testing.assert_array_equal(reward, np.where(inside, same_reward, 0))


def test_time_limit_truncates_without_terminating():
    plain, params = gymnax.make("CartPole-v1")
    wrapped = non_stationary.RewardInterval(plain)
    interval = non_stationary.IntervalParams(params.replace(max_steps_in_episode=5))
    _, _, terminated, truncated = rollout(wrapped, interval, 15)
    np.testing.assert_array_equal(truncated, np.arange(15) % 5 == 4)
    assert not terminated.any()


def test_drift_goes_from_start_to_end_and_back():
    positions = [float(non_stationary.drift_position(jnp.int32(t), 10, 5)) for t in range(31)]
    assert positions[:6] == [0] * 6
    np.testing.assert_allclose(positions[10], 0.5)
    assert positions[15:21] == [1] * 6
    np.testing.assert_allclose(positions[25], 0.5)
    assert positions[30] == 0
    ends = [int(non_stationary.last_transition_end(jnp.int32(t), 10, 5)) for t in (0, 14, 15, 29, 30)]
    assert ends == [0, 0, 15, 15, 30]


def test_interval_moves_from_the_start_to_the_end_interval():
    for position, expected in ((0.0, non_stationary.START_INTERVAL), (1.0, non_stationary.END_INTERVAL)):
        params = non_stationary.interval_params(None, jnp.float32(position))
        np.testing.assert_allclose((params.low, params.high), expected, rtol=1e-6)

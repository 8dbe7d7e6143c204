"""Evaluation episodes, in an environment whose returns say how long each went on."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnax.environments.environment import Environment

from purejax_bilevel.programs.control import rollouts

LONGEST, EPISODES, FINAL_EPISODES = 6, 8, 20


@flax.struct.dataclass
class State:
    length: jax.Array
    time: jax.Array


@flax.struct.dataclass
class Params:
    max_steps_in_episode: int = LONGEST


class Countdown(Environment):
    """An episode ends after 1 to 6 steps, drawn at its reset; the reward is the action."""

    @property
    def default_params(self) -> Params:
        return Params()

    def reset_env(self, key: jax.Array, params: Params) -> tuple[jax.Array, State]:
        state = State(jax.random.randint(key, (), 1, LONGEST + 1), jnp.int32(0))
        return self._observe(state), state

    def step_env(self, key: jax.Array, state: State, action: jax.Array, params: Params) -> tuple:
        state = State(state.length, state.time + 1)
        terminated = self.is_terminated(state, params)
        return self._observe(state), state, jnp.asarray(action, float), terminated, {}

    def is_terminated(self, state: State, params: Params) -> jax.Array:
        return state.time >= state.length

    def _observe(self, state: State) -> jax.Array:
        return jnp.array([state.length, state.time], float)


def policy(obs: jax.Array, key: jax.Array) -> jax.Array:
    """1 in the first step, 10 in the second, 100 in the third..."""
    return 10.0 ** obs[1]


def evaluated(
    is_last: bool, limit: int, counts: tuple[int, int] = (EPISODES, FINAL_EPISODES)
) -> tuple[dict[str, Any], np.ndarray]:
    """The evaluation, and how long its episodes are."""
    environment, params = Countdown(), Params(limit)
    measured = rollouts.evaluate(environment, params, limit, policy, jax.random.key(3), *counts, jnp.bool_(is_last))
    keys = jax.random.split(jax.random.split(jax.random.key(3))[0], max(counts))
    return measured, np.minimum(jax.vmap(environment.reset_env, (0, None))(keys, params)[1].length, limit)


@pytest.mark.parametrize("limit", [LONGEST, 4])
def test_a_return_is_that_of_one_episode(limit: int):
    measured, lengths = evaluated(True, limit)
    assert len(set(lengths.tolist())) == limit
    np.testing.assert_allclose(measured["final_return"], (10.0**lengths - 1) / 9, rtol=1e-6)
    np.testing.assert_allclose(measured["evaluation_return"], measured["final_return"].mean(), rtol=1e-6)


def test_only_the_last_evaluation_plays_all_episodes():
    measured, lengths = evaluated(False, LONGEST)
    returns = (10.0**lengths - 1) / 9
    np.testing.assert_allclose(measured["final_return"][:EPISODES], returns[:EPISODES], rtol=1e-6)
    assert np.isnan(measured["final_return"][EPISODES:]).all()
    np.testing.assert_allclose(measured["evaluation_return"], returns[:EPISODES].mean(), rtol=1e-6)


def test_fewer_episodes_in_the_last_evaluation_are_all_played():
    """Nothing that was not played stands among the final returns: it would look like a member that failed."""
    measured, lengths = evaluated(True, LONGEST, (EPISODES, 3))
    returns = (10.0 ** lengths[:3] - 1) / 9
    np.testing.assert_allclose(measured["final_return"], returns, rtol=1e-6)
    np.testing.assert_allclose(measured["evaluation_return"], returns.mean(), rtol=1e-6)
    measured, lengths = evaluated(False, LONGEST, (EPISODES, 3))
    np.testing.assert_allclose(measured["evaluation_return"], ((10.0**lengths - 1) / 9).mean(), rtol=1e-6)


@pytest.mark.parametrize("limit", [LONGEST, 4])
def test_an_episode_for_a_video_ends_once(limit: int):
    for seed in range(5):
        observations, alive = rollouts.episode(Countdown(), Params(limit), limit, policy, jax.random.key(seed))
        length = min(int(observations[0, 0]), limit)
        np.testing.assert_array_equal(alive, np.arange(limit) < length)
        np.testing.assert_array_equal(observations[:length, 1], np.arange(length))

"""Continuous environments: which names there are, actions in [-1, 1], distractors, ends of episodes."""

import sys

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnax.environments import spaces
from gymnax.environments.classic_control.pendulum import Pendulum
from gymnax.environments.environment import Environment, EnvParams, EnvState

from purejax_bilevel import environments
from purejax_bilevel.environments.continuous import UnitActions
from purejax_bilevel.errors import UserError
from tests import compilation


@pytest.mark.parametrize(
    ("name", "obs_dim", "action_dim", "max_steps"),
    [
        ("Pendulum-v1", 3, 1, 200),
        ("MountainCarContinuous-v0", 2, 1, 999),
        ("PointRobot-misc", 6, 2, 100),
        ("Swimmer-misc", 16, 2, 500),
        ("probe-all-continuous", 8, 1, 2),
    ],
)
def test_sizes(name: str, obs_dim: int, action_dim: int, max_steps: int):
    task = environments.make_continuous(name, dim_distract=3)
    assert (task.obs_dim, task.action_dim, task.max_steps) == (obs_dim + 3, action_dim, max_steps)
    assert environments.is_continuous(name)
    assert task.environment.action_space(task.params).shape == (action_dim,)
    assert task.environment.observation_space(task.params).shape == (task.obs_dim,)

    def two_observations(key: jax.Array):
        obs, state = task.environment.reset(key, task.params)
        step = task.environment.step(jax.random.fold_in(key, 1), state, jnp.zeros(action_dim), task.params)
        return obs, step[0], step[-1]["final_observation"]

    assert {obs.shape for obs in jax.eval_shape(two_observations, jax.random.key(0))} == {(task.obs_dim,)}


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("pendulum", "did you mean Pendulum-v1"),
        ("half_cheetah", "did you mean halfcheetah"),
        ("qqqq", "known are"),
        ("CartPole-v1", "discrete actions; .* Pendulum-v1"),
        ("probe-all", "discrete actions"),
        ("Breakout-MinAtar", "discrete actions"),
        ("halfcheetah:bullet", "must be one of generalized, spring"),
        ("CheetahRun:spring", "not allowed there"),
    ],
)
def test_refusals_name_the_environment(name: str, sentence: str):
    with pytest.raises(UserError, match=sentence) as raised:
        environments.make_continuous(name)
    assert f"--env_name {name}" in str(raised.value)


def test_observations_must_be_vectors(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Pendulum, "observation_space", lambda self, params: spaces.Box(0.0, 1.0, (10, 10, 3)))
    with pytest.raises(UserError, match=r"--env_name Pendulum-v1 has observations of shape \(10, 10, 3\)"):
        environments.make_continuous("Pendulum-v1")


def test_a_download_that_fails_is_one_sentence(monkeypatch: pytest.MonkeyPatch):
    def fail(name: str):
        raise OSError("no route to host")

    monkeypatch.setattr(gymnax, "make", fail)
    with pytest.raises(UserError, match=r"needs a download, which failed \(no route"):
        environments.make("MNISTBandit-bsuite")


def test_number_of_distractors_is_checked():
    with pytest.raises(UserError, match="--dim_distract must be at least 0, got -1"):
        environments.make_continuous("Pendulum-v1", dim_distract=-1)


@pytest.mark.parametrize("name", ["CartPole-v1", "Breakout-MinAtar", "probe-all", "qqqq", ""])
def test_what_is_not_continuous(name: str):
    assert not environments.is_continuous(name)


@pytest.mark.parametrize("name", ["halfcheetah", "ant:spring", "CheetahRun"])
def test_names_are_known_without_importing_the_suites(name: str, monkeypatch: pytest.MonkeyPatch):
    for module in ("brax", "mujoco", "mujoco_playground"):
        monkeypatch.setitem(sys.modules, module, None)  # from here on an import fails
    assert environments.is_continuous(name)


class Echo(Environment):
    """Torques have uneven bounds; the reward is the torque that arrived."""

    def action_space(self, params=None):
        return spaces.Box(jnp.array([-1.0, 0.0]), jnp.array([3.0, 10.0]), (2,))

    def step_env(self, key, state, action, params):
        return jnp.zeros(1), state, action, jnp.bool_(False), {}

    def reset_env(self, key, params):
        return jnp.zeros(1), EnvState(jnp.int32(0))


@pytest.mark.parametrize(
    ("action", "torque"),
    [((-1, -1), (-1, 0)), ((0, 0), (1, 5)), ((0.5, 1), (2, 10)), ((1, -0.5), (3, 2.5)), ((-7, 7), (-1, 10))],
)
def test_actions_are_clipped_and_scaled(action: tuple, torque: tuple):
    environment = UnitActions(Echo())
    arguments = (jax.random.key(0), EnvState(jnp.int32(0)), jnp.array(action, float), EnvParams())
    for step in (environment.step_env, environment.step):
        np.testing.assert_array_equal(step(*arguments)[2], torque)


LIMIT, STEPS = 40, 2000


def rollout(dim_distract: int):
    """Observations (after the reset and before it), rewards and ends of random actions."""
    task = environments.make_continuous("Pendulum-v1", dim_distract)
    params = task.params.replace(max_steps_in_episode=LIMIT)

    def step(carry, i):
        _, state = carry
        action_key, step_key = jax.random.split(jax.random.fold_in(jax.random.key(1), i))
        action = jax.random.uniform(action_key, (1,), minval=-1.0, maxval=1.0)
        obs, state, reward, terminated, truncated, info = task.environment.step(step_key, state, action, params)
        assert {"terminated", "truncated", "final_observation"} <= info.keys()
        return (obs, state), (obs, info["final_observation"], reward, terminated, truncated)

    start = task.environment.reset(jax.random.key(0), params)
    play = jax.jit(lambda: jax.lax.scan(step, start, jnp.arange(STEPS))[1]).lower()
    return jax.tree.map(np.asarray, play.compile(compilation.USUAL)())


@pytest.fixture(scope="module")
def plain():
    return rollout(0)


@pytest.fixture(scope="module")
def distracted():
    return rollout(5)


def test_distractors_do_not_disturb_the_physics(plain: tuple, distracted: tuple):
    for i in (0, 1):
        np.testing.assert_array_equal(distracted[i][:, :3], plain[i])
    for i in (2, 3, 4):
        np.testing.assert_array_equal(distracted[i], plain[i])


def test_distractors_are_independent_standard_normals(distracted: tuple):
    scipy_stats = pytest.importorskip("scipy.stats")
    obs, final, *_, truncated = distracted
    noise = np.concatenate([final[:, 3:], obs[truncated, 3:]])
    assert scipy_stats.kstest(noise.ravel(), "norm").pvalue > 1e-3
    assert len(np.unique(noise)) > 0.999 * noise.size  # none is used twice
    between_columns = np.corrcoef(noise.T) - np.eye(5)
    between_steps = [np.corrcoef(noise[1:, i], noise[:-1, i])[0, 1] for i in range(5)]
    assert np.abs(between_columns).max() < 5 / np.sqrt(STEPS)
    assert np.abs(between_steps).max() < 5 / np.sqrt(STEPS)


@pytest.mark.parametrize("run", ["plain", "distracted"])
def test_time_limit_truncates_and_the_last_observation_is_kept(run: str, request: pytest.FixtureRequest):
    obs, final, _, terminated, truncated = request.getfixturevalue(run)
    assert not terminated.any()
    np.testing.assert_array_equal(truncated, np.arange(STEPS) % LIMIT == LIMIT - 1)
    np.testing.assert_array_equal(obs[~truncated], final[~truncated])
    assert (np.abs(obs[truncated] - final[truncated]).max(1) > 1e-3).all()
    assert np.abs(obs[truncated, 2]).max() <= 1  # a reset starts at speeds up to 1


def test_a_step_without_reset_is_the_step_before_its_reset():
    task = environments.make_continuous("Pendulum-v1", 2)
    params = task.params.replace(max_steps_in_episode=1)
    _, state = task.environment.reset(jax.random.key(0), params)
    action = jnp.array([0.3])
    *_, reward, terminated, truncated, info = task.environment.step(jax.random.key(1), state, action, params)
    _, end, same_reward, same_terminated, _ = task.environment.step_env(jax.random.key(1), state, action, params)
    final = info["final_observation"]
    assert truncated
    assert task.environment.is_truncated(end, params)
    assert not task.environment.is_truncated(state, params)
    np.testing.assert_allclose(final[:3], [jnp.cos(end.theta), jnp.sin(end.theta), end.theta_dot], rtol=1e-6)
    assert (reward, terminated) == (same_reward, same_terminated)


def test_a_goal_terminates():
    task = environments.make_continuous("MountainCarContinuous-v0")
    _, state = task.environment.reset(jax.random.key(0), task.params)
    near = state.replace(position=jnp.float32(0.44), velocity=jnp.float32(0.06))
    _, after, reward, terminated, truncated, info = task.environment.step(
        jax.random.key(1), near, jnp.array([1.0]), task.params
    )
    assert terminated
    assert not truncated
    assert reward > 90
    assert info["final_observation"][0] >= 0.45
    assert after.time == 0

"""The adapter of the physics suites: on a suite of this file's own, and on the real ones where the extra is there."""

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from purejax_bilevel import environments
from purejax_bilevel.environments import brax
from purejax_bilevel.errors import UserError
from purejax_bilevel.programs.learned_optimizers.program import Config, PolicyOptimization

INSTALLED = importlib.util.find_spec("brax") is not None and importlib.util.find_spec("mujoco_playground") is not None
needs_extra = pytest.mark.skipif(not INSTALLED, reason="the extra brax is not installed")


# --- without the extra ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "package"), [("ant", "brax"), ("hopper:mjx", "brax"), ("FishSwim", "mujoco_playground")]
)
def test_a_missing_extra_is_one_sentence(name: str, package: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError) as raised:
        environments.make_continuous(name)
    sentence = str(raised.value)
    assert f"--env_name {name} needs the extra brax" in sentence
    assert "PUREJAX_BILEVEL_EXTRAS=brax ./setup/run" in sentence
    assert "pip install -e '.[brax]'" in sentence
    assert "\n" not in sentence


@pytest.mark.parametrize("name", ["halfcheetah", "CheetahRun"])
def test_discrete_programs_refuse_without_importing(name: str, monkeypatch: pytest.MonkeyPatch):
    for package in ("brax", "mujoco_playground"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=f"--env_name {name} has continuous actions"):
        environments.make(name)


@flax.struct.dataclass
class BallState:
    pipeline_state: dict
    obs: jax.Array
    reward: jax.Array
    done: jax.Array
    metrics: dict
    info: dict


class Ball:
    """A suite's environment: a ball on a line is pushed, and lost beyond 1 (an end) or -1 (its place is no number)."""

    def reset(self, key: jax.Array) -> BallState:
        kept, key = jax.random.split(key)
        place = jax.random.uniform(key, (1,), minval=-0.1, maxval=0.1)
        physics = {"cache": jnp.ones((4, 4)), "place": place, "speed": jnp.zeros(1), "steps": 0}
        zero = jnp.zeros(())
        return BallState(physics, place, zero, zero, {"force": zero}, {"key": kept})

    def step(self, state: BallState, action: jax.Array) -> BallState:
        physics = state.pipeline_state
        speed = physics["speed"] + action
        place = physics["place"] + speed
        place = jnp.where(place < -1, jnp.nan, place)
        physics = {"cache": place * jnp.ones((4, 4)), "place": place, "speed": speed, "steps": physics["steps"] + 1}
        done = (place[0] > 1).astype(float)
        return state.replace(
            pipeline_state=physics, obs=place, reward=speed[0], done=done, metrics={"force": action[0]}
        )


@pytest.fixture(scope="module")
def ball() -> brax.SuiteEnvironment:
    return brax.SuiteEnvironment("ball", Ball(), np.array([[-1.0, 1.0]], np.float32))


def test_only_what_a_later_step_reads_is_carried(ball: brax.SuiteEnvironment):
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(ball.template)[0]]
    carried = {path for path, carried in zip(paths, ball.carried, strict=True) if carried}
    assert carried == {".pipeline_state['place']", ".pipeline_state['speed']"}
    _, state = ball.reset(jax.random.key(0), ball.default_params)
    assert len(jax.tree.leaves(state)) == 3


def play(environment: brax.SuiteEnvironment, params: Any, seed: int, actions: jax.Array):
    """Observations after and before resets, rewards and ends, and the first observation."""
    key = jax.random.key(seed)

    def step(state: Any, numbered: tuple) -> tuple[Any, tuple]:
        i, action = numbered
        obs, state, reward, terminated, truncated, info = environment.step(
            jax.random.fold_in(key, i + 1), state, action, params
        )
        return state, (obs, info["final_observation"], reward, terminated, truncated)

    first, state = environment.reset(jax.random.fold_in(key, 0), params)
    return first, *jax.lax.scan(step, state, (jnp.arange(len(actions)), actions))[1]


@pytest.mark.parametrize(("push", "lost_at"), [(0.4, 2), (-0.4, 2)])
def test_a_lost_ball_terminates_with_finite_numbers(ball: brax.SuiteEnvironment, push: float, lost_at: int):
    first, obs, final, reward, terminated, truncated = play(ball, brax.Params(), 0, jnp.full((3, 1), push))
    np.testing.assert_array_equal(terminated, [False, True, False])
    assert not truncated.any()
    np.testing.assert_allclose(final[0], first + push, rtol=1e-6)
    np.testing.assert_array_equal(obs[0], final[0])
    assert np.isfinite(final).all()
    assert np.isfinite(reward).all()
    if push > 0:
        np.testing.assert_allclose(final[1], first + 3 * push, rtol=1e-6)
        np.testing.assert_allclose(reward[1], 2 * push, rtol=1e-6)
    assert np.abs(obs[1]) <= 0.1
    assert obs[1] != first
    np.testing.assert_allclose(final[2], obs[1] + push, rtol=1e-6)  # it goes on from the fresh state, at rest


def test_time_limit_truncates_and_every_reset_is_fresh(ball: brax.SuiteEnvironment):
    _, obs, final, _, terminated, truncated = play(ball, brax.Params(4), 0, jnp.zeros((20, 1)))
    assert not terminated.any()
    np.testing.assert_array_equal(truncated, np.arange(20) % 4 == 3)
    assert len(np.unique(obs[truncated])) == 5
    np.testing.assert_array_equal(obs[~truncated], final[~truncated])
    np.testing.assert_array_equal(final[1:][truncated[1:]], obs[:-1][truncated[1:]])  # a ball at rest stays


def test_a_batch_resets_each_member_when_it_is_due(ball: brax.SuiteEnvironment):
    actions = jnp.array([0.0, 0.3, 0.4, -0.2])[:, None, None] * jnp.ones((4, 12, 1))
    limits = jnp.array([5, 7, 1000, 3])

    def member(seed: jax.Array, limit: jax.Array, action: jax.Array) -> tuple:
        return play(ball, brax.Params(limit), seed, action)

    alone = [member(seed, limits[seed], actions[seed]) for seed in range(4)]
    together = jax.jit(jax.vmap(member))(jnp.arange(4), limits, actions)
    for seed in range(4):
        jax.tree.map(np.testing.assert_array_equal, alone[seed], tuple(leaf[seed] for leaf in together))
    nested = jax.jit(jax.vmap(jax.vmap(member)))(
        *(x.reshape(2, 2, *x.shape[1:]) for x in (jnp.arange(4), limits, actions))
    )
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.reshape(a.shape)), together, nested)


@pytest.mark.parametrize("batch_axes", [0, 1, 2])
def test_a_reset_stays_a_branch_in_a_batch(ball: brax.SuiteEnvironment, batch_axes: int):
    """Else every step would pay for it."""
    step = lambda key, state, action: ball.step(key, state, action, brax.Params())  # noqa: E731
    shape = (2,) * batch_axes
    reset = ball.reset
    for _ in range(batch_axes):
        step, reset = jax.vmap(step), jax.vmap(reset, (0, None))
    keys = jax.random.split(jax.random.key(0), shape) if shape else jax.random.key(0)
    _, state = jax.eval_shape(lambda keys: reset(keys, brax.Params()), keys)
    jaxpr = jax.make_jaxpr(step)(keys, state, jnp.zeros((*shape, 1))).jaxpr
    assert "random_bits" in set(primitives(jaxpr, into_branches=True))
    assert "random_bits" not in set(primitives(jaxpr, into_branches=False))


def primitives(jaxpr: Any, into_branches: bool) -> Iterator[str]:
    """Names of all operations of a program, those inside of `cond` included or not."""
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        if into_branches or equation.primitive.name != "cond":
            for parameter in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
                inner = getattr(parameter, "jaxpr", parameter)
                if hasattr(inner, "eqns"):
                    yield from primitives(inner, into_branches)


# --- with the extra ---------------------------------------------------------------------------------------------------

suites = pytest.mark.filterwarnings("ignore:Accessing `(ncon|contact)`:DeprecationWarning")


@needs_extra
@suites
def test_names_are_those_of_the_suites():
    from brax import envs
    from mujoco_playground import registry

    assert set(brax.BRAX) == set(envs._envs) - {"fast"}  # a dummy of brax's own tests
    assert set(brax.PLAYGROUND) == set(registry.dm_control_suite.ALL_ENVS)


@needs_extra
@suites
@pytest.mark.parametrize(
    ("name", "sizes"), [("inverted_pendulum", (4, 1)), ("reacher:spring", (11, 2)), ("CheetahRun", (17, 6))]
)
def test_real_physics(name: str, sizes: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The adapter's numbers are the suite's own; episodes are cut off, and go on from fresh states."""
    monkeypatch.chdir(tmp_path)
    task = environments.make_continuous(name)
    assert (task.obs_dim, task.action_dim, task.max_steps) == (*sizes, 1000)
    assert not list(tmp_path.iterdir())  # MuJoCo's log
    environment = task.environment.wrapped
    low, high = environment.bounds.T
    key, steps, limit = jax.random.key(3), 12, 5
    actions = 0.1 * jax.random.uniform(jax.random.key(4), (steps, len(low)), minval=low, maxval=high)  # no falls

    def both(start_key: jax.Array, actions: jax.Array) -> tuple:
        state = environment._reset(start_key)  # the suite's own functions, with all of their state
        own = jax.lax.scan(lambda state, action: [environment._step(state, action)] * 2, state, actions[:4])[1]
        return (own.obs, own.reward), play(environment, brax.Params(limit), 3, actions)

    (obs, reward), played = jax.jit(both)(jax.random.fold_in(key, 0), actions)
    first, after, final, rewards, terminated, truncated = jax.tree.map(np.asarray, played)
    np.testing.assert_allclose(final[:4], obs, atol=1e-4, rtol=1e-3)
    np.testing.assert_allclose(rewards[:4], reward, atol=1e-4, rtol=1e-3)
    assert not terminated[:4].any()
    assert truncated[4]
    assert np.isfinite(final).all()
    starts = np.stack([first, *after[terminated | truncated]])
    assert len(np.unique(starts.round(5), axis=0)) == len(starts) >= 3


@needs_extra
@suites
def test_size_of_the_published_agent_for_ant():
    """Parameters of actor and critic, spec section 2.6."""
    config = Config(env_name="ant:positional", hidden_dim=64, optimizer="open", model="multi").resolved()
    made = PolicyOptimization(config)
    state = jax.eval_shape(lambda: made.init(jax.random.key(0), config, made.shared()))
    sizes = {net: sum(leaf.size for leaf in jax.tree.leaves(own)) for net, own in state.agent.learner.params.items()}
    assert sizes == {"actor": 6480, "critic": 6017}

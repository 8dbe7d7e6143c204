"""The parts of PPO against closed forms: probe environments, truncation, normalisation, returns, update rules."""

import functools
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from purejax_bilevel.configuration import replace
from purejax_bilevel.environments import probes
from purejax_bilevel.programs.learned_optimizers import actor_critic, normalisation, ppo, tasks, tuned, update_rules
from purejax_bilevel.programs.learned_optimizers.program import Config

DISCOUNT = 0.5
SITUATIONS = jnp.stack([situation.observation for situation in probes.SITUATIONS])


# --- probes -----------------------------------------------------------------------------------------------------------

PROBES = Config(
    env_name="probe-all",
    num_train_steps=120,
    num_envs=16,
    num_steps=8,
    num_minibatches=2,
    hidden_dim=16,
    discount=DISCOUNT,
    gae_lambda=0.8,
    entropy_weight=0.0,
    lr=1e-2,
)
CASES: dict[str, dict[str, Any]] = {
    "discrete": {},
    "continuous": {"env_name": "probe-all-continuous", "activation": "tanh", "num_train_steps": 300},
}


@pytest.fixture(scope="module", params=CASES)
def learned(request: pytest.FixtureRequest) -> tuple[str, np.ndarray, np.ndarray]:
    """Values and most likely actions `[seeds, situations]`."""
    config = replace(PROBES, **CASES[request.param]).resolved()
    task = tasks.make(config)

    def member(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        rule = update_rules.make(config)
        advance = lambda t, state: ppo.iteration(state, config, task, rule, t, config.horizon)[0]  # noqa: E731
        state = jax.lax.fori_loop(0, config.num_train_steps, advance, ppo.init(key, config, task, rule))
        params = state.learner.params
        action = actor_critic.mode(actor_critic.policy(params, SITUATIONS, config.activation))
        return actor_critic.value(params, SITUATIONS, config.activation), action.reshape(len(SITUATIONS))

    keys = jnp.stack([jax.random.key(seed) for seed in range(3)])
    values, actions = jax.jit(lambda keys: jax.lax.map(member, keys)).lower(keys).compile()(keys)
    return request.param, np.asarray(values), np.asarray(actions)


def test_values_are_those_of_the_best_policy(learned: tuple[str, np.ndarray, np.ndarray]) -> None:
    case, values, _ = learned
    for i, situation in enumerate(probes.SITUATIONS):
        best = probes.best_action(situation, case == "continuous")
        value = probes.optimal_value(situation, best or 0.0, DISCOUNT, 0.0, case == "continuous")
        # A Gaussian policy keeps some of its noise, which costs its variance.
        tolerance = 0.25 if case == "continuous" else 0.1
        assert abs(np.median(values[:, i]) - value) < tolerance, (situation, values[:, i], value)


def test_actions_are_those_of_the_best_policy(learned: tuple[str, np.ndarray, np.ndarray]) -> None:
    case, _, actions = learned
    for i, situation in enumerate(probes.SITUATIONS):
        best = probes.best_action(situation, case == "continuous")
        assert best is None or np.median(np.abs(actions[:, i] - best)) < 0.15, (situation, actions[:, i])


# --- experience -------------------------------------------------------------------------------------------------------


def test_advantages_are_sums_of_discounted_errors() -> None:
    random = np.random.default_rng(0)
    shape, discount, decay = (7, 3), 0.9, 0.8
    value, next_value, reward = random.standard_normal((3, *shape))
    done = random.random(shape) < 0.3
    terminated = done & (random.random(shape) < 0.5)
    nothing = np.zeros(shape)
    numbers = (value, next_value, reward, terminated.astype(float), done.astype(float))
    found = jax.jit(ppo.advantages)(ppo.Rollout(nothing, nothing, nothing, *map(jnp.asarray, numbers)), discount, decay)
    error = reward + discount * next_value * ~terminated - value
    for t, env in np.ndindex(*shape):
        expected, weight = 0.0, 1.0
        for k in range(t, shape[0]):
            expected += weight * error[k, env]
            weight *= discount * decay
            if done[k, env]:
                break
        np.testing.assert_allclose(found[t, env], expected, rtol=1e-5, atol=1e-6)


def collected(**changes: Any) -> tuple[Config, ppo.State, ppo.Rollout, Any]:
    """A rollout of 30 steps in an environment with a time limit of 12."""
    config = Config(num_envs=4, num_steps=30, num_minibatches=2, hidden_dim=8, **changes).resolved()
    task = tasks.make(config)
    task = tasks.dataclasses.replace(task, params=task.params.replace(max_steps_in_episode=12))

    @jax.jit
    def run() -> Any:
        rule = update_rules.make(config)
        start = ppo.init(jax.random.key(0), config, task, rule)
        return ppo.collect(start, config, task, jax.random.key(1))

    return config, *run()


def test_the_value_after_a_truncation_is_that_of_the_last_observation() -> None:
    """Pendulum never terminates: a value follows every step, the next one's unless the episode was cut."""
    config, state, rollout, metrics = collected(env_name="Pendulum-v1")
    done = np.asarray(rollout.done, bool)
    np.testing.assert_array_equal(np.flatnonzero(done[:, 0]), [11, 23])
    assert not rollout.terminated.any()
    following = np.asarray(rollout.value[1:])
    np.testing.assert_allclose(rollout.next_value[:-1][~done[:-1]], following[~done[:-1]], rtol=1e-5, atol=1e-6)
    assert (np.abs(rollout.next_value[:-1] - following)[done[:-1]] > 1e-4).all()  # not of the observation after a reset
    last = actor_critic.value(state.learner.params, state.obs, config.activation)
    np.testing.assert_allclose(rollout.next_value[-1], last, rtol=1e-5, atol=1e-6)
    returns = np.asarray(rollout.reward).cumsum(0)
    ends = np.stack([returns[11], returns[23] - returns[11]])
    np.testing.assert_allclose(metrics["training_return"], [ends.sum(), 8.0], rtol=1e-5)
    np.testing.assert_allclose(state.episodes.last, ends[1], rtol=1e-5)
    np.testing.assert_allclose(state.episodes.running, returns[29] - returns[23], rtol=1e-4)


def test_the_originals_treatment_of_truncations() -> None:
    _, _, rollout, _ = collected(env_name="Pendulum-v1", truncation_is_end=True)
    np.testing.assert_array_equal(rollout.terminated, rollout.done)
    assert rollout.done.sum() == 8
    np.testing.assert_array_equal(rollout.next_value[:-1], rollout.value[1:])


def test_normalisation_is_that_of_all_that_was_seen() -> None:
    config = Config(normalize_observations=True, normalize_rewards=True)
    random = np.random.default_rng(0)
    batches = 3.0 + 2.0 * random.standard_normal((6, 5, 2))
    normaliser, first = normalisation.init(config, jnp.asarray(batches[0], jnp.float32))
    np.testing.assert_allclose(first, (batches[0] - batches[0].mean(0)) / batches[0].std(0), rtol=2e-3, atol=1e-3)
    rewards, done = random.standard_normal((5, 5)) + 1.0, random.random((5, 5)) < 0.3
    returns, seen = np.zeros(5), []
    for batch, reward, ended in zip(batches[1:], rewards, done, strict=True):
        normaliser, found = normalisation.observe(normaliser, jnp.asarray(batch, jnp.float32))
        normaliser, scaled = normalisation.reward(
            normaliser, jnp.asarray(reward, jnp.float32), jnp.asarray(ended, jnp.float32), 0.9
        )
        returns = 0.9 * returns * ~ended + reward
        seen.append(returns)
        np.testing.assert_allclose(scaled, reward / np.std(seen), rtol=1e-3)
    everything = batches.reshape(-1, 2)
    np.testing.assert_allclose(found, (batches[-1] - everything.mean(0)) / everything.std(0), rtol=1e-3, atol=1e-4)


def test_nothing_is_normalised_unless_asked() -> None:
    obs = jnp.ones((2, 3))
    normaliser, same = normalisation.init(Config(), obs)
    assert jax.tree.leaves(normaliser) == []
    assert normalisation.observe(normaliser, obs)[1] is obs
    assert same is obs


# --- distributions ----------------------------------------------------------------------------------------------------


def drawn(policy: actor_critic.Policy) -> list[np.ndarray]:
    """Actions, their log-probabilities and the entropy."""

    @jax.jit
    def draw(policy: actor_critic.Policy) -> tuple[jax.Array, jax.Array, jax.Array]:
        action = actor_critic.sample(policy, jax.random.key(0))
        return action, actor_critic.log_prob(policy, action), actor_critic.entropy(policy)

    return [np.asarray(array) for array in draw(policy)]


def test_a_gaussian_policy() -> None:
    policy = actor_critic.Policy(jnp.asarray(np.tile([0.5, -1.0], (20_000, 1))), jnp.asarray(np.log([0.5, 2.0])))
    action, log_prob, entropy = drawn(policy)
    np.testing.assert_allclose(action.mean(0), [0.5, -1.0], atol=0.05)
    np.testing.assert_allclose(action.std(0), [0.5, 2.0], rtol=0.02)
    # The entropy is the mean of minus the log-density.
    np.testing.assert_allclose(-log_prob.mean(), entropy, rtol=0.01)


def test_a_categorical_policy() -> None:
    policy = actor_critic.Policy(jnp.asarray(np.log(np.tile([0.2, 0.5, 0.3], (20_000, 1)))), None)
    action, log_prob, entropy = drawn(policy)
    np.testing.assert_allclose(np.bincount(action) / 20_000, [0.2, 0.5, 0.3], atol=0.015)
    np.testing.assert_allclose(-log_prob.mean(), entropy[0], rtol=0.02)
    assert (np.asarray(actor_critic.mode(policy)) == 1).all()


# --- update rules -----------------------------------------------------------------------------------------------------

OPTAX = {
    "adam": lambda rate: optax.adam(rate, 0.8, 0.95, 1e-4),
    "rmsprop": lambda rate: optax.rmsprop(rate, 0.95, 1e-4),
    "lion": lambda rate: optax.lion(rate, 0.8, 0.95, weight_decay=0.0),
    "sgd": lambda rate: optax.sgd(rate, 0.8),
}
VALUES = {"beta1": 0.8, "beta2": 0.95, "epsilon": 1e-4}


@pytest.mark.parametrize("name", OPTAX)
def test_update_rules_are_those_of_optax_with_a_staircase(name: str) -> None:
    """Three iterations of two epochs of two minibatches; the rate falls between iterations."""
    anneal, rates = 0.4, {rate: VALUES[rate] for rate in VALUES if getattr(tuned.GENERAL[name], rate) is not None}
    config = Config(optimizer=name, lr=0.1, anneal=anneal, num_train_steps=3, num_epochs=2, num_minibatches=2, **rates)
    config = config.resolved()
    own = update_rules.make(config)
    other = OPTAX[name](lambda count: 0.1 * (1 - anneal * (count // 4) / 3))
    params = {"a": jnp.array([1.0, -2.0, 3.0])}

    @jax.jit
    def run() -> tuple[jax.Array, jax.Array]:
        def both(states: Any, step: jax.Array) -> tuple[Any, tuple[jax.Array, jax.Array]]:
            gradient = {"a": jnp.sin(step + jnp.arange(3.0))}
            clues = ppo.clues_of(step, config, 3)
            found, first = own.update(gradient, states[0], params, activations=None, **clues)
            expected, second = other.update(gradient, states[1], params)
            return (first, second), (found["a"], expected["a"])

        return jax.lax.scan(both, (own.init(params), other.init(params)), jnp.arange(12))[1]

    np.testing.assert_allclose(*run(), rtol=1e-5, atol=1e-7)


def test_what_open_is_told_to_do_without() -> None:
    switches = update_rules.switches(Config(optimizer="open", without="dormancy", zero_mean="network"))
    assert not switches.dormancy
    assert switches.noise
    assert switches.zero_mean == "network"
    bare = update_rules.switches(Config(optimizer="no_features"))
    assert not any((bare.parameter, bare.training_clock, bare.batch_clock, bare.layer, bare.dormancy, bare.noise))


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_values_are_clipped_on_both_sides(sign: float) -> None:
    """A value that moved by 0.5 towards a target at 1 counts as one that moved by 0.2."""
    zero = np.zeros(1)
    batch = ppo.OnPolicyBatch(zero, zero, zero, zero, zero, np.array([sign]))
    assert float(ppo._value_loss(np.array([0.5 * sign]), batch, 0.2)) == pytest.approx(0.5 * 0.8**2)


def test_gradients_of_actor_and_critic_are_clipped_apart() -> None:
    gradients = {"actor": {"a": jnp.array([3.0, 4.0])}, "critic": {"b": jnp.array([0.1])}}
    clipped, norms = ppo.clip_each(gradients, 0.5)
    np.testing.assert_allclose(clipped["actor"]["a"], [0.3, 0.4], rtol=1e-6)
    np.testing.assert_allclose(clipped["critic"]["b"], [0.1], rtol=1e-6)
    np.testing.assert_allclose(norms["actor_gradient_norm"], 5.0)


def test_dormant_neurons_are_counted_in_every_layer() -> None:
    actor = {"Dense_0": jnp.array([0.0, 1.0, 1.0, 2.0]), "log_std": None}
    share = actor_critic.dormant_share({"actor": actor, "critic": {"Dense_0": jnp.ones(4)}})
    np.testing.assert_allclose(share, 1 / 8)


def test_an_evaluation_lasts_as_long_as_the_longest_level() -> None:
    config = Config(env_name="GridWorld-rand_all", draw_level=True)
    assert tasks.make(config).max_steps == 750  # of level 0 it is less
    assert tasks.make(replace(config, draw_level=False)).max_steps < 750


def test_python_of_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced only: agents are mapped over candidates for the weights of their optimiser."""
    page = Path(tasks.__file__).parent / "README.md"
    text, *_ = re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)
    monkeypatch.setattr(jax, "jit", lambda function: functools.partial(jax.eval_shape, function))
    names: dict[str, Any] = {}
    exec(text, names)
    assert names["fitness"].shape == (2,)

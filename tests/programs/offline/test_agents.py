"""Updates of single agents: cloning, TD3+BC and COMBO against formulas written out by hand."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import logsumexp

from purejax_bilevel.configuration import replace
from purejax_bilevel.networks import apply_network, normalised_relu
from purejax_bilevel.programs.offline import agents
from purejax_bilevel.programs.offline.agents import OOD_ACTIONS, Learner, Pair, Sources, Units
from purejax_bilevel.programs.offline.settings import Learning
from purejax_bilevel.replay import Batch

OBS, ACTION, BATCH = 3, 2, 6
CONFIG = replace(Learning(), hidden_dim=4, discount=0.9, q_lr=1e-2, policy_lr=1e-2)
NORMED = replace(CONFIG, layer_norm=True, num_critics=3)


@pytest.fixture(autouse=True)
def _double(float64: Any) -> None:
    """All comparisons are in float64."""


def batch_of(seed: int = 0) -> Batch:
    random = np.random.default_rng(seed)
    batch = Batch(
        obs=random.standard_normal((OBS, BATCH)),
        action=random.uniform(-1, 1, (ACTION, BATCH)),
        reward=random.standard_normal(BATCH),
        next_obs=random.standard_normal((OBS, BATCH)),
        terminated=(np.arange(BATCH) % 3 == 0).astype(float),
        noise=random.standard_normal((ACTION, BATCH)),
    )
    return jax.tree.map(jnp.asarray, batch)


@functools.cache
def initial(agent_type: str) -> Learner:
    units = Units(jnp.array([0.1, 0.2, -0.3]), jnp.array([1.5, 2.0, 0.5]))
    make = agents.AGENTS[agent_type].init
    return jax.jit(lambda key: make(NORMED if agent_type == "mopo" else CONFIG, key, units, ACTION))(jax.random.key(0))


def learner_of(agent_type: str) -> Learner:
    """With random networks, those of the targets being others, and units that are not 1; mopo's have a layer norm."""
    random, learner = np.random.default_rng(1), initial(agent_type)
    changed = {
        name: jax.tree.map(lambda leaf: leaf + 0.5 * random.standard_normal(leaf.shape), getattr(learner, name))
        for name in ("q", "target_q", "policy", "target_policy")
        if hasattr(learner, name)
    }
    return learner.replace(**changed)


def network(layers: Any, inputs: np.ndarray) -> np.ndarray:
    for layer in layers[:-1]:
        inputs = np.maximum(np.asarray(layer.kernel).T @ inputs + np.asarray(layer.bias)[:, None], 0.0)
    return np.asarray(layers[-1].kernel).T @ inputs + np.asarray(layers[-1].bias)[:, None]


def seen(learner: Learner, obs: Any) -> np.ndarray:
    return (np.asarray(obs) - np.asarray(learner.units.mean)[:, None]) / np.asarray(learner.units.std)[:, None]


def values(learner: Learner, critics: Any, obs: Any, action: Any) -> np.ndarray:
    return np.stack([network(head, np.concatenate([seen(learner, obs), action]))[0] for head in critics])


def test_cloning_is_least_squares_and_changes_the_policy_alone():
    learner, batch = learner_of("behavioral_cloning"), batch_of()
    sources = Sources(mixed=lambda key: 1 / 0, real=lambda key: batch)  # type: ignore[arg-type,return-value]
    step = jax.jit(lambda learner: agents.cloning_step(CONFIG, learner, sources, jax.random.key(2), jnp.int32(0)))
    own = np.tanh(network(learner.policy, seen(learner, batch.obs))[:ACTION])
    after, losses = step(learner)
    np.testing.assert_allclose(losses["policy_loss"], np.square(own - batch.action).mean(), rtol=1e-9)
    for _ in range(300):
        after, last = step(after)
    assert last["policy_loss"] < 0.7 * losses["policy_loss"]
    jax.tree.map(np.testing.assert_array_equal, after.q, learner.q)


def test_deterministic_targets_have_a_slow_policy_and_clipped_noise():
    learner: Any = learner_of("td3_bc")
    batch = batch_of()
    noise = np.clip(CONFIG.policy_noise * np.asarray(batch.noise), -CONFIG.noise_clip, CONFIG.noise_clip)
    action = np.clip(np.tanh(network(learner.target_policy, seen(learner, batch.next_obs))[:ACTION]) + noise, -1, 1)
    smallest = values(learner, learner.target_q, batch.next_obs, action).min(0)
    expected = batch.reward + 0.9 * (1 - batch.terminated) * smallest
    np.testing.assert_allclose(learner.target(CONFIG, batch), expected, rtol=1e-9)
    taken = values(learner, learner.q, batch.obs, np.asarray(batch.action))
    error = np.square(taken - expected).mean(1).sum()
    np.testing.assert_allclose(learner.q_loss(CONFIG, learner.q, batch), error, rtol=1e-9)


def test_the_deterministic_policy_steps_every_other_time():
    learner, batch = learner_of("td3_bc"), batch_of()
    sources = Sources(mixed=lambda key: 1 / 0, real=lambda key: batch)  # type: ignore[arg-type,return-value]
    step = jax.jit(lambda learner, t: agents.deterministic_step(CONFIG, learner, sources, jax.random.key(2), t)[0])
    first, second = step(learner, 0), step(learner, 1)
    jax.tree.map(np.testing.assert_array_equal, first.policy, learner.policy)
    assert not np.array_equal(second.policy[0].kernel, learner.policy[0].kernel)
    assert not np.array_equal(first.q[0][0].kernel, learner.q[0][0].kernel)
    own = np.tanh(network(learner.policy, seen(learner, batch.obs))[:ACTION])
    value = values(learner, learner.q[:1], batch.obs, own)[0]
    expected = -2.5 * value.mean() / np.abs(value).mean() + np.square(own - batch.action).mean()
    found = agents.deterministic_loss(CONFIG, learner, learner.policy, batch)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_conservative_critics_are_low_elsewhere_and_high_on_the_data():
    learner, mixed, real = learner_of("combo"), batch_of(), batch_of(3)
    noise = np.random.default_rng(4).standard_normal((ACTION, (1 + 2 * OOD_ACTIONS) * BATCH))
    pair: Any = Pair(mixed._replace(noise=jnp.asarray(noise)), real)
    config = replace(CONFIG, conservatism=0.7)
    plain = Learner.q_loss(learner, config, learner.q, mixed._replace(noise=jnp.asarray(noise[:, :BATCH])))
    action, log_density = (np.asarray(part) for part in learner._elsewhere(pair.mixed))  # type: ignore[attr-defined]
    assert np.abs(action).max() <= 1
    sampled, log_prob = learner.sample(
        learner.policy, jnp.tile(mixed.obs, OOD_ACTIONS), jnp.asarray(noise[:, BATCH : (1 + OOD_ACTIONS) * BATCH])
    )
    np.testing.assert_allclose(action[:, : OOD_ACTIONS * BATCH], sampled, rtol=1e-9)
    np.testing.assert_allclose(log_density[:OOD_ACTIONS].ravel(), log_prob, rtol=1e-9)
    np.testing.assert_allclose(log_density[OOD_ACTIONS:], -ACTION * np.log(2.0))
    elsewhere = values(learner, learner.q, np.tile(mixed.obs, 2 * OOD_ACTIONS), action)
    soft = logsumexp(elsewhere.reshape(2, 2 * OOD_ACTIONS, BATCH) - log_density, axis=1) - np.log(2 * OOD_ACTIONS)
    gap = soft.mean(1) - values(learner, learner.q, real.obs, np.asarray(real.action)).mean(1)
    np.testing.assert_allclose(learner.q_loss(config, learner.q, pair), plain + 0.7 * gap.sum(), rtol=1e-9)
    strong = replace(config, conservatism=1e3)
    gradient = jax.jit(jax.grad(lambda q: learner.q_loss(strong, q, pair)))(learner.q)
    assert np.abs(gradient[0][0].kernel).max() > 1  # the part elsewhere has one


def test_layer_norm_normalises_every_unit_over_its_layer():
    inputs = jnp.asarray(np.random.default_rng(0).standard_normal((5, 7)))
    own = np.asarray(normalised_relu(inputs))
    centred = np.asarray(inputs) - np.asarray(inputs).mean(0)
    np.testing.assert_allclose(own, np.maximum(centred / np.sqrt(np.square(centred).mean(0) + 1e-6), 0), rtol=1e-6)
    learner = learner_of("mopo")
    found = learner.critic(learner.q, inputs[:OBS], inputs[OBS:])
    assert found.shape == (3, 1, 7)
    first = apply_network(learner.q[0], jnp.concatenate([learner.units(inputs[:OBS]), inputs[OBS:]]), normalised_relu)
    np.testing.assert_allclose(found[0], first, rtol=1e-9)


def test_a_temperature_rate_of_0_keeps_the_temperature():
    learner, batch = learner_of("mopo"), batch_of()
    step = jax.jit(lambda rate: agents.soft_step(replace(NORMED, temperature_lr=rate), learner, batch, batch)[0])
    for rate, stays in ((0.0, True), (1e-3, False)):
        after = step(rate)
        assert (float(after.log_temperature) == float(learner.log_temperature)) == stays

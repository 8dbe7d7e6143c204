"""What LPG's parts must do whatever the numbers: where information flows, identities of updates, ends of lives."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from purejax_bilevel.environments import grid_world
from purejax_bilevel.environments.grid_world import GridWorld, Places
from purejax_bilevel.programs.meta_objectives import learners, meta_gradient, network, worlds
from purejax_bilevel.programs.meta_objectives.learners import Build, LivingAgent, Rollout
from purejax_bilevel.programs.meta_objectives.meta_gradient import Switches
from purejax_bilevel.programs.meta_objectives.settings import ObjectiveTraining, defects

WORKERS, STEPS, TARGETS, ROWS = 3, 20, 4, 12
BUILD = Build(ROWS + 1, 5)
CONFIG = ObjectiveTraining(actor_lr=40.0, critic_lr=4.0, lpg_target_width=TARGETS)


def rollout_of(seed: int) -> Rollout:
    chance = np.random.default_rng(seed)
    time = 0.001 * np.arange(STEPS + 1.0)
    observations = Places(
        jnp.asarray(chance.integers(0, ROWS, (WORKERS, STEPS + 1, 1))), jnp.broadcast_to(time, (WORKERS, STEPS + 1))
    )
    done = np.zeros((WORKERS, STEPS), bool)
    done[:, 9] = True
    reward = chance.standard_normal((WORKERS, STEPS))
    return Rollout(observations, *map(jnp.asarray, (chance.integers(0, 5, (WORKERS, STEPS)), reward, done)))


def agent_of(seed: int, critic_outputs: int = TARGETS, build: Build = BUILD, lifetime: int = 9) -> LivingAgent:
    actor_key, critic_key = jax.random.split(jax.random.key(seed))
    actor, critic = build.learner(actor_key, 5), build.learner(critic_key, critic_outputs)
    return LivingAgent(actor, critic, jnp.int32(0), jnp.int32(lifetime))


def weights_of(seed: int, has_clocks: bool = False) -> network.Weights:
    return network.init(jax.random.key(seed), network.shapes(TARGETS, 4, 8, has_clocks))


# --- the network ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("has_clocks", "count"), [(False, 203_946), (True, 205_482)])
def test_the_number_of_weights(has_clocks: bool, count: int) -> None:
    assert sum(int(np.prod(shape)) for shape in network.shapes(8, 16, 256, has_clocks)) == count


def test_nothing_flows_forwards_or_across_the_end_of_an_episode() -> None:
    chance, rollout = np.random.default_rng(0), rollout_of(1)
    predictions = chance.dirichlet(np.ones(TARGETS), (2, WORKERS, STEPS))
    numbers = (rollout.reward, rollout.done, chance.uniform(size=(WORKERS, STEPS)), *predictions)
    inputs = network.Inputs(*map(jnp.asarray, numbers))
    apply = jax.jit(functools.partial(network.apply, weights_of(2)))
    before = apply(inputs)
    rewarded = apply(inputs._replace(reward=inputs.reward.at[:, 15].add(1.0)))
    for old, new in zip(before, rewarded, strict=True):
        same = np.array([np.array_equal(old[:, t], new[:, t]) for t in range(STEPS)])
        np.testing.assert_array_equal(same, [t not in range(10, 16) for t in range(STEPS)])
    ended = apply(inputs._replace(next_prediction=inputs.next_prediction.at[:, 9].set(0.7)))
    jax.tree.map(np.testing.assert_array_equal, before, ended)


# --- updates ----------------------------------------------------------------------------------------------------------


def test_minus_advantages_give_the_step_of_a2c(float64: None) -> None:
    config = ObjectiveTraining(actor_lr=40.0, critic_lr=4.0, lpg_agent_target_coeff=0.0, entropy_coeff=0.0)
    agent, rollout = agent_of(3, 1), rollout_of(4)

    def both(agent: LivingAgent) -> tuple[LivingAgent, LivingAgent]:
        judged = learners.advantages(config, rollout, learners.values(agent.critic.network, rollout))
        told = -learners.standardised(judged), jnp.ones((WORKERS, STEPS, 1))
        return learners.push(BUILD, config, agent, rollout, *told)[0], learners.a2c_update(
            BUILD, config, agent, rollout
        )[0]

    before, one, other = (
        each.actor.network[0].kernel for each in (agent, *jax.jit(both).lower(agent).compile()(agent))
    )
    assert np.abs(one - before).max() > 1e-3
    np.testing.assert_allclose(one, other, rtol=1e-9)


def test_an_agent_that_does_as_told_does_not_move(float64: None) -> None:
    agent, rollout = agent_of(5), rollout_of(6)

    @jax.jit
    def gradients(agent: LivingAgent) -> Any:
        told = learners.probabilities(agent.critic.network, learners.first_observations(rollout))
        given = (agent.actor.network, agent.critic.network, rollout, jnp.zeros((WORKERS, STEPS)), told, 0.5)
        return jax.grad(learners.agent_loss, (0, 1), has_aux=True)(*given)[0]

    for leaf in jax.tree.leaves(gradients(agent)):
        np.testing.assert_allclose(leaf, 0.0, atol=1e-9)


def test_a_value_critic_learns_and_every_action_has_its_advantage() -> None:
    critic, rollout = BUILD.learner(jax.random.key(7), 1), rollout_of(8)
    rollout = rollout._replace(reward=jnp.ones((WORKERS, STEPS)))
    judge = jax.jit(lambda critic: learners.judge(BUILD, CONFIG, critic, rollout))
    losses = []
    for _ in range(20):
        critic, found, loss = judge(critic)
        losses.append(float(loss))
    assert found.shape == (WORKERS, STEPS)
    assert losses[-1] < 0.9 * losses[0]
    with pytest.raises(AssertionError, match="an advantage for every action"):
        learners.policy_loss(jnp.ones((WORKERS, STEPS, 5)), rollout, found[..., None])


@pytest.mark.parametrize("build", [BUILD, Build(ROWS + 1, 5, (6,), "adam")], ids=["linear", "hidden layer"])
def test_a_gradient_of_zero_has_a_derivative(build: Build) -> None:
    """The norm and the root of Adam see zeros only: an objective that says nothing, and a prediction that fits."""
    agent, rollout = agent_of(9, build=build), rollout_of(12)
    still, y_hat = jax.tree.map(jnp.zeros_like, agent.critic), jnp.full((WORKERS, STEPS, TARGETS), 1.0 / TARGETS)
    agent = agent.replace(critic=still)

    @jax.jit
    @jax.grad
    def slope(pi_hat: jax.Array) -> jax.Array:
        after, _ = learners.push(build, CONFIG, agent, rollout, pi_hat, y_hat)
        return sum(leaf.sum() for leaf in jax.tree.leaves(after.actor.network))

    found = slope(jnp.zeros((WORKERS, STEPS)))
    assert np.isfinite(found).all()
    assert np.abs(found).max() > 0 or build.optimizer == "adam"


def test_a_life_ends_after_its_updates() -> None:
    agent, weights, rollout = agent_of(13, lifetime=3), weights_of(14), rollout_of(15)
    follow = jax.jit(lambda agent: meta_gradient.follow(BUILD, Switches(), CONFIG, weights, agent, rollout)[0])
    lived = [agent]
    for _ in range(5):
        lived.append(follow(lived[-1]))
    assert [int(each.step) for each in lived] == [0, 1, 2, 3, 3, 3]
    moved = [not np.array_equal(a.actor.network[0].kernel, b.actor.network[0].kernel) for a, b in zip(lived, lived[1:])]  # noqa: B905, RUF007
    assert moved == [True, True, True, False, False]


def test_clocks() -> None:
    agent = agent_of(16, lifetime=250).replace(step=jnp.int32(50))
    assert meta_gradient.clocks(Switches(), agent) is None
    np.testing.assert_allclose(meta_gradient.clocks(Switches(True), agent), [0.2, np.log(250.0)], rtol=1e-6)
    np.testing.assert_allclose(meta_gradient.clocks(Switches(True, raw_clocks=True), agent), [50.0, 250.0])


@pytest.mark.parametrize(("text", "found"), [("", ""), ("B1", "B1"), (" B4, B2", "B2 B4"), ("all", "B1 B2 B4 B5 B8")])
def test_compat_names_defects(text: str, found: str) -> None:
    assert sorted(defects(text)) == found.split()


# --- worlds -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["small", "rand_small"])
def test_rows_are_the_product_with_the_whole_observation(mode: str) -> None:
    world, environment = worlds.grid(mode), GridWorld(mode)
    level = grid_world.numbered(mode, 3)
    learner = world.build.learner(jax.random.key(0), 7)
    assert len(learner.network) == (1 if mode == "small" else 2)

    @jax.jit
    @jax.vmap
    def both(key: jax.Array) -> Any:
        obs, state = environment.reset_env(key, level)
        return learners.outputs(learner.network, environment.places(state, level)), learners.outputs(
            learner.network, obs
        )

    rows, product = both(jax.random.split(jax.random.key(1), 6))
    np.testing.assert_allclose(rows, product, rtol=1e-5, atol=1e-6)


def test_actions_follow_their_probabilities() -> None:
    chances = jnp.array([0.1, 0.0, 0.6, 0.3])
    actions = worlds.choose(jax.random.key(2), jnp.broadcast_to(chances, (20_000, 4)))
    np.testing.assert_allclose(np.bincount(actions, minlength=4) / 20_000, chances, atol=0.015)

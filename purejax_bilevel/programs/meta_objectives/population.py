"""A population of lives: births, meta-steps through all of them, and trials on levels that nobody has lived on."""

import math
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from purejax_bilevel.program import own_individuals, population_mean
from purejax_bilevel.programs.meta_objectives import learners, meta_gradient, worlds
from purejax_bilevel.programs.meta_objectives.learners import LivingAgent, Rollout
from purejax_bilevel.programs.meta_objectives.meta_gradient import Judged, Switches, Terms
from purejax_bilevel.programs.meta_objectives.network import Weights
from purejax_bilevel.programs.meta_objectives.settings import ObjectiveTraining, defects
from purejax_bilevel.programs.meta_objectives.worlds import Acting, Finished, World


class Life(flax.struct.PyTreeNode):
    """An agent, its critic in the meta-loss, its environment and its workers."""

    params: Any  # of the environment
    judged: Judged
    acting: Acting

    @property
    def is_over(self) -> jax.Array:
        return self.judged.agent.step >= self.judged.agent.lifetime


class Lived(NamedTuple):
    """What one agent's part of a meta-step was like."""

    terms: Terms
    returns: Finished
    rollout: Rollout  # the last one


def switches_of(config: ObjectiveTraining) -> Switches:
    """What a configuration says about the objective's inputs and the released code's defects."""
    restored = defects(config.compat)
    return Switches(bool(config.lifetime_conditioning), "B4" in restored, "B2" not in restored, "B1" not in restored)


def born(world: World, config: ObjectiveTraining, key: jax.Array) -> Life:
    """A new agent on a new level; the key is consumed."""
    level_key, lifetime_key, key = jax.random.split(key, 3)
    return born_in(world, config, key, world.draw(level_key), world.draw_lifetime(lifetime_key, config.lifetime))


def born_in(world: World, config: ObjectiveTraining, key: jax.Array, params: Any, lifetime: jax.Array) -> Life:
    """A new agent in a given environment; the key is consumed."""
    agent_key, value_key, begin_key = jax.random.split(key, 3)
    agent = new_agent(world, agent_key, lifetime, config.lpg_target_width)
    judged = Judged(agent, world.build.learner(value_key, 1))
    return Life(params, judged, worlds.begin(world, params, begin_key, config.env_workers))


def new_agent(world: World, key: jax.Array, lifetime: jax.Array, critic_outputs: int) -> LivingAgent:
    """An agent before its first update; the key is consumed."""
    actor_key, critic_key = jax.random.split(key)
    actor = world.build.learner(actor_key, world.build.num_actions)
    return LivingAgent(actor, world.build.learner(critic_key, critic_outputs), jnp.zeros_like(lifetime), lifetime)


def nobody(world: World, config: ObjectiveTraining, key: jax.Array) -> Life:
    """Lives of this device before the first meta-step, leaves `[agents here, ...]`: all over, after 0 updates.

    Where lives begin is compiled once, in the meta-step.
    """
    here = own_individuals(config.num_agents).shape[0]
    shapes = jax.eval_shape(lambda key: born(world, config, key), key)
    return jax.tree.map(lambda leaf: jnp.zeros((here, *leaf.shape), leaf.dtype), shapes)


def reborn(world: World, config: ObjectiveTraining, keys: jax.Array, lives: Life) -> Life:
    """The lives `[agents here, ...]` with a new one in place of each that is over."""

    def replaced() -> Life:
        return renewed(config, lives, jax.vmap(lambda key: born(world, config, key))(keys))

    return jax.lax.cond(lives.is_over.any(), replaced, lambda: lives)


def renewed(config: ObjectiveTraining, lives: Life, fresh: Life) -> Life:
    """The lives `[agents here, ...]` with fresh ones where they are over; the first ones of all have their ages."""
    before, agent = lives.judged.agent, fresh.judged.agent
    aged = agent.replace(step=jnp.where(before.lifetime == 0, first_ages(config, agent.lifetime), agent.step))
    fresh = fresh.replace(judged=fresh.judged.replace(agent=aged))
    choose = lambda over, *both: jax.tree.map(lambda new, old: jnp.where(over, new, old), *both)  # noqa: E731
    return jax.vmap(choose)(lives.is_over, fresh, lives)


def first_ages(config: ObjectiveTraining, lifetime: jax.Array) -> jax.Array:
    """Updates `[agents here]` that the first agents are taken to have lived through, spread over their lifetimes.

    The first lives are as much shorter. Otherwise all would end at once, again and again, and a meta-gradient would see
    one age only (B8).
    """
    if "B8" in defects(config.compat):
        return jnp.zeros_like(lifetime)
    stride = config.num_agent_updates
    ages = stride * (own_individuals(config.num_agents) * -(-lifetime // stride) // config.num_agents)
    return ages.astype(lifetime.dtype)


# --- meta-gradient ----------------------------------------------------------------------------------------------------


def gradient(
    world: World, config: ObjectiveTraining, weights: Weights, lives: Life, keys: jax.Array
) -> tuple[Weights, Life, Lived]:
    """The meta-gradient of the whole population.

    Args:
        world: where the agents live.
        config: of one member.
        weights: of the objective.
        lives: of this device, leaves `[agents here, ...]`.
        keys: of these agents, consumed.

    Returns:
        The gradient, mean over all agents on all devices; the lives after their updates; what they were like.
    """
    here = keys.shape[0]
    parts = here // math.gcd(here, config.num_agents // config.num_mini_batches)

    def loss(weights: Weights, lives: Life, keys: jax.Array) -> tuple[jax.Array, tuple[Life, Lived]]:
        losses, found = jax.vmap(lambda life, key: _loss(world, config, weights, life, key))(lives, keys)
        return losses.mean(), found

    slope = jax.grad(loss, has_aux=True)
    if parts == 1:
        found, (lives, lived) = slope(weights, lives, keys)
        return population_mean(jax.tree.map(lambda leaf: leaf[None], found)), lives, lived

    def part(total: Weights, given: tuple[Life, jax.Array]) -> tuple[Weights, tuple[Life, Lived]]:
        found, lived = slope(weights, *given)
        return jax.tree.map(lambda a, b: a + b / parts, total, found), lived

    divided = jax.tree.map(lambda leaf: leaf.reshape(parts, -1, *leaf.shape[1:]), (lives, keys))
    total, found = jax.lax.scan(part, jax.tree.map(jnp.zeros_like, weights), divided)
    lives, lived = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), found)
    return population_mean(jax.tree.map(lambda leaf: leaf[None], total)), lives, lived


def _loss(
    world: World, config: ObjectiveTraining, weights: Weights, life: Life, key: jax.Array
) -> tuple[jax.Array, tuple[Life, Lived]]:
    def collect(k: jax.Array, actor: learners.Network, place: tuple) -> tuple[tuple, Rollout]:
        acting, finished, _ = place
        own = jax.random.fold_in(key, k)
        acting, rollout, found = worlds.collect(world, life.params, actor, acting, own, config.train_rollout_len)
        return (acting, finished.joined(found), rollout), rollout

    actor, zero = life.judged.agent.actor.network, jnp.zeros(())
    start = (life.acting, Finished(zero, zero, jnp.full((), -jnp.inf)))
    unseen = jax.eval_shape(lambda key: collect(jnp.int32(0), actor, (*start, None))[1], key)
    unseen = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), unseen)
    given = (weights, life.judged, (*start, unseen), collect)
    loss, (judged, place, terms) = meta_gradient.meta_loss(world.build, switches_of(config), config, *given)
    acting, finished, rollout = place
    return loss, (life.replace(judged=judged, acting=acting), Lived(terms, finished, rollout))


# --- trials -----------------------------------------------------------------------------------------------------------


def trial(
    world: World,
    config: ObjectiveTraining,
    weights: Weights,
    params: Any,
    key: jax.Array,
    is_a2c: jax.Array | bool = False,
    lifetime: jax.Array | None = None,
    longest: jax.Array | None = None,
) -> jax.Array:
    """Mean return `[]` of an agent at the end of a whole life.

    Args:
        world: where it lives.
        config: of one member.
        weights: of the objective.
        params: of its environment.
        key: consumed.
        is_a2c: whether it learns by A2C instead; its value is then the first output of its critic.
        lifetime: of the agent; None: the longest of the environment.
        longest: lifetime of those that live side by side with it; nothing else than time depends on it.
    """
    agent_key, begin_key, life_key, play_key = jax.random.split(key, 4)
    if lifetime is None:
        lifetime = jnp.where(config.lifetime > 0, config.lifetime, world.lifetime[1]).astype(jnp.int32)
    agent = new_agent(world, agent_key, lifetime, config.lpg_target_width)
    acting = worlds.begin(world, params, begin_key, config.env_workers)
    switches = switches_of(config)

    def by_a2c(agent: LivingAgent, rollout: Rollout) -> LivingAgent:
        return learners.a2c_update(world.build, config, agent, rollout, switches.own_steps)[0]

    def by_objective(agent: LivingAgent, rollout: Rollout) -> LivingAgent:
        return meta_gradient.follow(world.build, switches, config, weights, agent, rollout)[0]

    def step(t: jax.Array, carry: tuple[LivingAgent, Acting]) -> tuple[LivingAgent, Acting]:
        agent, acting = carry
        own, steps = jax.random.fold_in(life_key, t), config.train_rollout_len
        acting, rollout, _ = worlds.collect(world, params, agent.actor.network, acting, own, steps)
        if is_a2c is False:
            return by_objective(agent, rollout), acting
        return jax.lax.cond(is_a2c, by_a2c, by_objective, agent, rollout), acting

    agent, _ = jax.lax.fori_loop(0, lifetime if longest is None else longest, step, (agent, acting))
    return worlds.play(world, params, agent.actor.network, play_key, config.env_workers).mean()

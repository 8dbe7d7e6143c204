"""The antagonist of algorithmic regret: an A2C agent that lives beside each agent, on the same level, for as long.

Its updates are as many as the agent's in every meta-step, so that regret needs two policies' returns at the end of a
life and no training then.
Source: Jackson et al. 2023 (GROOVE), section 4.1.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from purejax_bilevel.environments.grid_world import optimal_return
from purejax_bilevel.programs.meta_objectives import learners, worlds
from purejax_bilevel.programs.meta_objectives.learners import Agent, Network
from purejax_bilevel.programs.meta_objectives.settings import MetaTraining
from purejax_bilevel.programs.meta_objectives.worlds import Acting, World


class Antagonist(flax.struct.PyTreeNode):
    """An A2C agent and its workers."""

    agent: Agent
    acting: Acting


def born(world: World, config: MetaTraining, params: Any, lifetime: jax.Array, key: jax.Array) -> Antagonist:
    """A new antagonist; the key is consumed."""
    actor_key, critic_key, begin_key = jax.random.split(key, 3)
    actor = world.build.learner(actor_key, world.build.num_actions)
    agent = Agent(actor, world.build.learner(critic_key, 1), jnp.zeros_like(lifetime), lifetime)
    return Antagonist(agent, worlds.begin(world, params, begin_key, config.env_workers))


def train(
    world: World, config: MetaTraining, antagonist: Antagonist, params: Any, key: jax.Array, own_steps: bool = True
) -> Antagonist:
    """As many updates as an agent makes in a meta-step.

    Args:
        world: where it lives.
        config: of one member.
        antagonist: before.
        params: of its environment.
        key: consumed.
        own_steps: as of `learners.policy_loss`.
    """

    def update(antagonist: Antagonist, k: jax.Array) -> tuple[Antagonist, None]:
        actor, own_key = antagonist.agent.actor.network, jax.random.fold_in(key, k)
        acting, rollout, _ = worlds.collect(world, params, actor, antagonist.acting, own_key, config.train_rollout_len)
        agent, _ = learners.a2c_update(world.build, config, antagonist.agent, rollout, own_steps)
        return Antagonist(agent, acting), None

    return jax.lax.scan(update, antagonist, jnp.arange(config.num_agent_updates))[0]


# --- at the end of a life ---------------------------------------------------------------------------------------------


def last_returns(
    world: World, actors: Network, params: Any, finished: jax.Array, keys: jax.Array, episodes: int, at_once: int
) -> jax.Array:
    """Mean returns of whole episodes by the policies of the agents whose lives have ended.

    All policies of an agent play with the same key. Few lives end in a meta-step, so that they are gone through
    `at_once` at a time, and nothing is done if there are none.

    Args:
        world: where they live.
        actors: leaves `[agents, policies, ...]`.
        params: of their environments, leaves `[agents, ...]`.
        finished: `[agents]`.
        keys: `[agents]`, consumed.
        episodes: per policy, side by side.
        at_once: agents.

    Returns:
        `[agents, policies]`, NaN where not finished.
    """

    def play(actor: Network, params: Any, data: jax.Array) -> jax.Array:
        return worlds.play(world, params, actor, jax.random.wrap_key_data(data), episodes).mean()

    function = lambda given: jax.vmap(jax.vmap(play, (0, None, None)))(*given)  # noqa: E731
    # Each key is used once, which cannot be seen when they are picked in a loop.
    return of_finished(function, (actors, params, jax.random.key_data(keys)), finished, at_once)


def last_optima(params: Any, finished: jax.Array, at_once: int) -> jax.Array:
    """The best returns in the levels of the agents whose lives have ended; arguments as of `last_returns`.

    Returns:
        `[agents]`, NaN where not finished.
    """
    return of_finished(jax.vmap(optimal_return), params, finished, at_once)


def of_finished(function: Any, given: Any, finished: jax.Array, at_once: int) -> jax.Array:
    """A function of some of the agents, `at_once` at a time.

    Args:
        function: `leaves [at_once, ...] -> [at_once, ...]`, numbers.
        given: leaves `[agents, ...]`.
        finished: `[agents]`, of which agents.
        at_once: at most the number of agents.

    Returns:
        `[agents, ...]`, NaN for the others.
    """
    agents = finished.shape[0]
    order, count = jnp.argsort(~finished), finished.sum()  # stable: the finished ones come first
    order = jnp.concatenate([order, jnp.full(at_once, agents, order.dtype)])
    shape = jax.eval_shape(function, jax.tree.map(lambda leaf: leaf[:at_once], given))
    nothing = jnp.full((agents, *shape.shape[1:]), jnp.nan, shape.dtype)

    def some(i: jax.Array, found: jax.Array) -> jax.Array:
        numbers = i * at_once + jnp.arange(at_once)
        places = order[numbers]
        results = function(jax.tree.map(lambda leaf: leaf[jnp.minimum(places, agents - 1)], given))
        return found.at[jnp.where(numbers < count, places, agents)].set(results, mode="drop")

    return jax.lax.fori_loop(0, (count + at_once - 1) // at_once, some, nothing)

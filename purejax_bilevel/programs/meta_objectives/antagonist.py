"""The antagonist of algorithmic regret: an A2C agent that lives beside each agent, on the same level, for as long.

Its updates are as many as the agent's in every meta-step, so that regret needs two policies' returns at the end of a
life and no training then.
Source: Jackson et al. 2023 (GROOVE), section 4.1.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from purejax_bilevel.programs.meta_objectives import learners, population, worlds
from purejax_bilevel.programs.meta_objectives.learners import LivingAgent
from purejax_bilevel.programs.meta_objectives.population import Life
from purejax_bilevel.programs.meta_objectives.settings import ObjectiveTraining
from purejax_bilevel.programs.meta_objectives.worlds import Acting, World


class Antagonist(flax.struct.PyTreeNode):
    """An A2C agent and its workers."""

    agent: LivingAgent
    acting: Acting


def born(world: World, config: ObjectiveTraining, life: Life, key: jax.Array) -> Antagonist:
    """The antagonist of a new life; the key is consumed."""
    agent_key, begin_key = jax.random.split(key)
    agent = population.new_agent(world, agent_key, life.judged.agent.lifetime, 1)
    return Antagonist(agent, worlds.begin(world, life.params, begin_key, config.env_workers))


def train(
    world: World, config: ObjectiveTraining, antagonist: Antagonist, params: Any, key: jax.Array, own_steps: bool = True
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

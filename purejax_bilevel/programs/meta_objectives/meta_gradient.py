"""The loss of a learned objective on one agent, through several of the agent's updates.

    for k in 0 .. K - 1:    roll out, update the agent as the objective says, and its value critic
    roll out once more;     minus the advantage-weighted log-probabilities of the updated agent, and regularisers

The gradient with respect to the objective's weights goes through the updates; the agent that comes in, everything that
workers saw and what the objective reads are constants of it.
Source: Oh et al. 2020 (LPG), section 3.3; Jackson et al. 2023 (GROOVE).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from purejax_bilevel.programs.meta_objectives import learners, network
from purejax_bilevel.programs.meta_objectives.learners import Build, Flag, Learner, LivingAgent, Rollout
from purejax_bilevel.programs.meta_objectives.settings import ObjectiveTraining, Updates

Collector = Callable[[jax.Array, learners.Network, Any], tuple[Any, Rollout]]


class Judged(flax.struct.PyTreeNode):
    """An agent, and the value critic that the meta-loss judges it by."""

    agent: LivingAgent
    value: Learner


class Switches(NamedTuple):
    """What an objective reads, and what is done otherwise than in the released code (`settings.DEFECTS`)."""

    has_clocks: bool = False
    raw_clocks: Flag = False  # B4
    own_steps: Flag = True  # not B2
    trained_value: Flag = True  # not B1


class Terms(NamedTuple):
    """What a meta-loss is made of, for one agent; means over the updates, except the losses."""

    meta_loss: jax.Array
    policy_loss: jax.Array
    value_loss: jax.Array
    policy_entropy: jax.Array
    target_entropy: jax.Array
    policy_l2: jax.Array
    target_l2: jax.Array
    divergence: jax.Array


def clocks(switches: Switches, agent: LivingAgent) -> jax.Array | None:
    """Where an agent is in its life, `[2]`: n / N and log N, where the objective reads that."""
    if not switches.has_clocks:
        return None
    step, lifetime = agent.step.astype(jnp.result_type(float)), agent.lifetime.astype(jnp.result_type(float))
    return jnp.where(switches.raw_clocks, jnp.stack([step, lifetime]), jnp.stack([step / lifetime, jnp.log(lifetime)]))


def follow(
    build: Build, switches: Switches, config: Updates, weights: network.Weights, agent: LivingAgent, rollout: Rollout
) -> tuple[LivingAgent, learners.Diagnostics]:
    """One update of an agent under a learned objective.

    Args:
        build: of the agent.
        switches: what the objective reads.
        config: rates, clipping norm and alpha_y.
        weights: of the objective.
        agent: before.
        rollout: of the agent.
    """
    told = network.apply(weights, learners.network_inputs(agent, rollout), clocks(switches, agent))
    return learners.push(build, config, agent, rollout, *told)


def meta_loss(
    build: Build,
    switches: Switches,
    config: ObjectiveTraining,
    weights: network.Weights,
    judged: Judged,
    place: Any,
    collect: Collector,
) -> tuple[jax.Array, tuple[Judged, Any, Terms]]:
    """The loss on one agent.

    Args:
        build: of the agent.
        switches: see there.
        config: of one member.
        weights: of the objective.
        judged: the agent before its updates.
        place: where its workers are, or anything else that `collect` carries on.
        collect: `(k, actor, place) -> (place, rollout)`, number k of 0 .. K.

    Returns:
        The loss; the agent after its updates, the place, and the terms of the loss.
    """
    judge = lambda value, rollout: learners.judge(build, config, value, rollout, switches.trained_value)  # noqa: E731
    # Its states are computed again in the backward pass: what is kept per update is the agent and what it saw.
    update = jax.checkpoint(lambda *given: follow(build, switches, config, *given))

    def step(carry: tuple[Judged, Any], k: jax.Array) -> tuple[tuple[Judged, Any], learners.Diagnostics]:
        judged, place = carry
        place, rollout = collect(k, jax.lax.stop_gradient(judged.agent.actor.network), place)
        agent, measured = update(weights, judged.agent, rollout)
        return (Judged(agent, judge(judged.value, rollout)[0]), place), measured

    (judged, place), measured = jax.lax.scan(step, (judged, place), jnp.arange(config.num_agent_updates))
    actor = judged.agent.actor.network
    place, rollout = collect(jnp.int32(config.num_agent_updates), jax.lax.stop_gradient(actor), place)
    value, found, value_loss = judge(judged.value, rollout)
    chances = learners.probabilities(actor, learners.first_observations(rollout))
    policy_loss = learners.policy_loss(chances, rollout, found, switches.own_steps)
    mean = jax.tree.map(lambda each: each.mean(), measured)
    loss = (
        policy_loss
        - config.lpg_policy_entropy_coeff * mean.policy_entropy
        - config.lpg_target_entropy_coeff * mean.target_entropy
        + config.lpg_policy_l2_coeff * mean.policy_l2
        + config.lpg_target_l2_coeff * mean.target_l2
    )
    return loss, (judged.replace(value=value), place, Terms(loss, policy_loss, value_loss, *mean))

"""The agents that live under a learned objective: small networks, their optimisers, and one update of each kind.

An agent acts by softmax probabilities pi and carries a prediction y, a distribution over m categories that means what
the objective makes of it. Observations are vectors `[..., obs]`, or `Places`: row numbers of the first kernel.
"""

import dataclasses
from typing import Any, Literal, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax

from purejax_bilevel.environments.grid_world import Places
from purejax_bilevel.programs.meta_objectives import network
from purejax_bilevel.programs.meta_objectives.settings import Returns, Updates

Observations = Places | jax.Array
Flag = bool | jax.Array
EPSILON = 1e-8  # added to probabilities before a logarithm
_INIT = jax.nn.initializers.lecun_normal()


class Layer(NamedTuple):
    """A dense layer; linear agents have no bias."""

    kernel: jax.Array  # [in, out]
    bias: jax.Array | None  # [out]


Network = tuple[Layer, ...]


class Learner(flax.struct.PyTreeNode):
    """A network and the state of its optimiser."""

    network: Network
    optimizer: optax.OptState


class LivingAgent(flax.struct.PyTreeNode):
    """An agent between two updates."""

    actor: Learner
    critic: Learner  # of the prediction y
    step: jax.Array  # [], updates so far
    lifetime: jax.Array  # [], updates in all


class Rollout(NamedTuple):
    """What the workers of one agent saw; after the end of an episode the next observation is the first of another."""

    observations: Observations  # leaves [workers, steps + 1, ...]
    action: jax.Array  # [workers, steps]
    reward: jax.Array  # [workers, steps]
    done: jax.Array  # [workers, steps], whether the episode ended with the step, for whatever reason


@dataclasses.dataclass(frozen=True)
class Build:
    """What agents are made of.

    Args:
        obs_dim: rows of the first kernels.
        num_actions: that the actor chooses among.
        hidden: units of the hidden layers; none: one kernel without a bias.
        optimizer: plain gradient steps with clipped norm, or Adam without.
    """

    obs_dim: int
    num_actions: int
    hidden: tuple[int, ...] = ()
    optimizer: Literal["sgd", "adam"] = "sgd"

    def learner(self, key: jax.Array, outputs: int) -> Learner:
        """A new network with that many outputs; the key is consumed."""
        sizes = (self.obs_dim, *self.hidden, outputs)
        keys = jax.random.split(key, len(sizes) - 1)
        pairs = zip(keys, sizes[:-1], sizes[1:], strict=True)
        layers = tuple(Layer(_INIT(own, (i, o)), jnp.zeros(o) if self.hidden else None) for own, i, o in pairs)
        return Learner(layers, self.rule().init(layers))

    def rule(self) -> optax.GradientTransformation:
        """The optimiser, before the learning rate."""
        # Where a gradient is exactly 0 the square root of Adam has no derivative, which a meta-gradient asks for.
        return optax.scale_by_adam(eps_root=1e-30) if self.optimizer == "adam" else optax.identity()

    def descend(self, learner: Learner, gradient: Network, rate: Any, max_norm: Any) -> Learner:
        """A learner after one step down a gradient."""
        if self.optimizer == "sgd":
            gradient = clipped(gradient, max_norm)
        updates, optimizer = self.rule().update(gradient, learner.optimizer)
        stepped = jax.tree.map(lambda old, step: (old - rate * step).astype(old.dtype), learner.network, updates)
        return Learner(stepped, optimizer)


def clipped(gradient: Any, max_norm: Any) -> Any:
    """A gradient shortened to a norm; unlike optax's it has a derivative where the gradient is 0."""
    square = sum(jnp.square(leaf).sum() for leaf in jax.tree.leaves(gradient))
    scale = jnp.where(square > max_norm**2, max_norm / jnp.sqrt(jnp.maximum(square, max_norm**2)), 1.0)
    return jax.tree.map(lambda leaf: scale.astype(leaf.dtype) * leaf, gradient)


def outputs(layers: Network, observations: Observations) -> jax.Array:
    """Evaluates a network, `[..., outputs]`."""
    first, *rest = layers
    if isinstance(observations, Places):
        rows = jnp.take(first.kernel, observations.places, axis=0, mode="fill", fill_value=0)
        activations = rows.sum(-2) + observations.time[..., None].astype(rows.dtype) * first.kernel[-1]
    else:
        activations = observations @ first.kernel
    activations = activations if first.bias is None else activations + first.bias
    for layer in rest:
        activations = jax.nn.relu(activations) @ layer.kernel
        activations = activations if layer.bias is None else activations + layer.bias
    return activations


def probabilities(layers: Network, observations: Observations) -> jax.Array:
    """Softmax of the outputs: pi of an actor, y of a critic."""
    return jax.nn.softmax(outputs(layers, observations))


def of_actions(per_action: jax.Array, action: jax.Array) -> jax.Array:
    """Entries `[...]` of `[..., actions]`."""
    return jnp.take_along_axis(per_action, action[..., None], -1)[..., 0]


def entropy(chances: jax.Array) -> jax.Array:
    """Mean entropy of distributions `[..., n]`."""
    safe = chances + EPSILON
    return -(safe * jnp.log(safe)).sum(-1).mean()


def first_observations(rollout: Rollout) -> Observations:
    """Those that actions were taken on, leaves `[workers, steps, ...]`."""
    return jax.tree.map(lambda leaf: leaf[:, :-1], rollout.observations)


# --- under a learned objective ----------------------------------------------------------------------------------------


class Diagnostics(NamedTuple):
    """Numbers of one update that the meta-loss reads; means over the rollout."""

    policy_entropy: jax.Array  # of the updated agent
    target_entropy: jax.Array  # of the updated agent's prediction
    policy_l2: jax.Array  # squares of pi_hat
    target_l2: jax.Array  # summed squares of y_hat
    divergence: jax.Array  # KL of the prediction from y_hat, before the update


def network_inputs(agent: LivingAgent, rollout: Rollout) -> network.Inputs:
    """What the objective reads; constants of every gradient."""
    chances = probabilities(agent.actor.network, first_observations(rollout))
    predictions = probabilities(agent.critic.network, rollout.observations)
    inputs = network.Inputs(
        rollout.reward, rollout.done, of_actions(chances, rollout.action), predictions[:, :-1], predictions[:, 1:]
    )
    return jax.lax.stop_gradient(inputs)


def agent_loss(
    actor: Network, critic: Network, rollout: Rollout, pi_hat: jax.Array, y_hat: jax.Array, target_coeff: Any
) -> tuple[jax.Array, jax.Array]:
    """What an agent minimises: mean log pi * pi_hat + alpha_y KL(y, y_hat); and the mean divergence.

    Args:
        actor: layers of the policy.
        critic: layers of the prediction.
        rollout: of the agent.
        pi_hat: `[workers, steps]`.
        y_hat: `[workers, steps, m]`.
        target_coeff: alpha_y.
    """
    observations = first_observations(rollout)
    chance = of_actions(probabilities(actor, observations), rollout.action)
    prediction = probabilities(critic, observations)
    ratio = jnp.log(prediction + EPSILON) - jnp.log(y_hat + EPSILON)
    divergence = (prediction * ratio).sum(-1).mean()
    return (jnp.log(chance + EPSILON) * pi_hat).mean() + target_coeff * divergence, divergence


def push(
    build: Build, config: Updates, agent: LivingAgent, rollout: Rollout, pi_hat: jax.Array, y_hat: jax.Array
) -> tuple[LivingAgent, Diagnostics]:
    """One update of an agent as an objective says; nothing changes once its life is over.

    Args:
        build: of the agent.
        config: rates, the clipping norm and alpha_y.
        agent: before.
        rollout: of the agent.
        pi_hat: `[workers, steps]`.
        y_hat: `[workers, steps, m]`.
    """
    loss = jax.grad(agent_loss, (0, 1), has_aux=True)
    given = (agent.actor.network, agent.critic.network, rollout, pi_hat, y_hat, config.lpg_agent_target_coeff)
    (actor_gradient, critic_gradient), divergence = loss(*given)
    moved = agent.replace(
        actor=build.descend(agent.actor, actor_gradient, config.actor_lr, config.max_grad_norm),
        critic=build.descend(agent.critic, critic_gradient, config.critic_lr, config.max_grad_norm),
        step=agent.step + 1,
    )
    agent = while_alive(agent, moved)
    observations = first_observations(rollout)
    measured = Diagnostics(
        policy_entropy=entropy(probabilities(agent.actor.network, observations)),
        target_entropy=entropy(probabilities(agent.critic.network, observations)),
        policy_l2=jnp.square(pi_hat).mean(),
        target_l2=jnp.square(y_hat).sum(-1).mean(),
        divergence=divergence,
    )
    return agent, measured


def while_alive(before: LivingAgent, after: LivingAgent) -> LivingAgent:
    """An agent after an update, or before it if its life was over."""
    is_over = before.step >= before.lifetime
    return jax.tree.map(lambda old, new: jnp.where(is_over, old, new), before, after)


# --- under advantages -------------------------------------------------------------------------------------------------


def values(critic: Network, rollout: Rollout) -> jax.Array:
    """Values of all observations, `[workers, steps + 1]`."""
    return outputs(critic, rollout.observations)[..., 0]


def advantages(config: Returns, rollout: Rollout, estimates: jax.Array) -> jax.Array:
    """Generalised advantages `[workers, steps]`; ends of episodes are ends of returns.

    Args:
        config: gamma and lambda.
        rollout: of an agent.
        estimates: values `[workers, steps + 1]`.

    Source: Schulman et al. 2016, "High-dimensional continuous control using generalized advantage estimation".
    """
    goes_on = config.gamma * (1.0 - rollout.done.astype(estimates.dtype))
    errors = rollout.reward + goes_on * estimates[:, 1:] - estimates[:, :-1]

    def step(later: jax.Array, now: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        error, goes = now
        later = error + goes * config.gae_lambda * later
        return later, later

    return jax.lax.scan(step, jnp.zeros_like(errors[:, 0]), (errors.T, goes_on.T), reverse=True)[1].T


def standardised(found: jax.Array) -> jax.Array:
    """Advantages with mean 0 and standard deviation 1 over the whole rollout."""
    return (found - found.mean()) / (found.std() + EPSILON)


def policy_loss(chances: jax.Array, rollout: Rollout, found: jax.Array, own_steps: Flag = True) -> jax.Array:
    """Minus the mean of log pi(a) * advantage.

    Args:
        chances: pi `[workers, steps, actions]`.
        rollout: of the agent.
        found: standardised advantages `[workers, steps]`.
        own_steps: whether each log-probability meets its own advantage; False: the mean one of its worker (B2).
    """
    logs = jnp.log(of_actions(chances, rollout.action) + EPSILON)
    assert logs.shape == found.shape, "an advantage for every action"
    return -jnp.where(own_steps, (logs * found).mean(), (logs.mean(1) * found.mean(1)).mean())


def judge(
    build: Build, config: Updates, critic: Learner, rollout: Rollout, trained: Flag = True
) -> tuple[Learner, jax.Array, jax.Array]:
    """A value critic after one step on a rollout, and what it thought of the rollout before.

    Args:
        build: of the agent.
        config: gamma, lambda, rate and clipping norm.
        critic: before.
        rollout: to judge and to learn from.
        trained: False: nothing is learned (B1).

    Returns:
        The critic, standardised advantages `[workers, steps]` and the loss.
    """
    estimates = values(critic.network, rollout)
    found = advantages(config, rollout, estimates)
    target = jax.lax.stop_gradient(found + estimates[:, :-1])
    error = lambda layers: jnp.square(target - values(layers, rollout)[:, :-1]).mean()  # noqa: E731
    loss, gradient = jax.value_and_grad(error)(critic.network)
    after = build.descend(critic, gradient, config.critic_lr, config.max_grad_norm)
    critic = jax.tree.map(lambda old, new: jnp.where(trained, new, old), critic, after)
    return critic, standardised(found), loss


def a2c_loss(config: Updates, actor: Network, rollout: Rollout, found: jax.Array, own_steps: Flag = True) -> jax.Array:
    """What the actor of A2C minimises; arguments as of `policy_loss`."""
    chances = probabilities(actor, first_observations(rollout))
    return policy_loss(chances, rollout, found, own_steps) - config.entropy_coeff * entropy(chances)


def a2c_update(
    build: Build, config: Updates, agent: LivingAgent, rollout: Rollout, own_steps: Flag = True
) -> tuple[LivingAgent, jax.Array]:
    """One update of an agent whose critic gives values, and the critic's loss before; nothing changes after its life.

    Args:
        build: of the agent.
        config: rates and weights.
        agent: before; its critic has one output.
        rollout: of the agent.
        own_steps: as of `policy_loss`.

    Source: Mnih et al. 2016, "Asynchronous methods for deep reinforcement learning", with generalised advantages.
    """
    critic, found, loss = judge(build, config, agent.critic, rollout)
    gradient = jax.grad(a2c_loss, 1)(config, agent.actor.network, rollout, found, own_steps)
    actor = build.descend(agent.actor, gradient, config.actor_lr, config.max_grad_norm)
    return while_alive(agent, agent.replace(actor=actor, critic=critic, step=agent.step + 1)), loss

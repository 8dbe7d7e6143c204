"""What is learned with discrete actions: the world model, the Q-function, their networks, optimisers and losses.

theta = world model (outer variable), phi = Q-function (inner variable). Arrays are features first.
"""

from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax

from purejax_bilevel import networks
from purejax_bilevel.bilevel import smoothing
from purejax_bilevel.networks import Heads, Network
from purejax_bilevel.programs.control.settings import Hypergradient, Inner, ModelHeads, QLearning, SoftQ
from purejax_bilevel.replay import Batch

LOG_STD_RANGE = (-5.0, 2.0)
NUM_LAYERS = 2

Losses = dict[str, jax.Array]


class Model(NamedTuple):
    """World model: one head for the next observation, one for the reward (None when the true reward is used)."""

    next_obs: Network
    reward: Network | None


class Learner(flax.struct.PyTreeNode):
    """Everything that is learned, with the optimisers' states.

    Its methods say what model and Q-function are; the agents below need nothing else of them, so that a subclass may
    have others (`soft_actor_critic_agents.Learner`: continuous actions). Which settings that takes is the subclass's
    business: their `config` is that of its own program.
    """

    # inner problem
    q: Heads
    target_q: Heads
    q_optimizer: optax.OptState
    # outer problem
    model: Any  # a Model; a subclass may have another
    model_optimizer: optax.OptState
    # fixed random value functions (vep), dual network (funcbo with num_dual_Q_steps > 0)
    values: Heads | None
    dual: Heads | None
    dual_optimizer: optax.OptState | None

    def predict(self, config: Any, model: Any, batch: Batch) -> Batch:
        """The batch as `model` (the learner's own, or one to differentiate in) would have it."""
        return predict(config, model, batch)

    def model_error(self, config: Any, model: Any, batch: Batch, predicted: Batch) -> jax.Array:
        """Mean squared distance of the predicted next observation, with `prob_model` of its mean, from the real one."""
        if config.prob_model:
            assert batch.noise is not None
            predicted = self.predict(config, model, batch._replace(noise=jnp.zeros_like(batch.noise)))
        return model_error(predicted, batch)

    def init_q(self, config: Any, key: jax.Array, obs_dim: int, action_dim: int) -> Heads:
        """A fresh Q-function; the key is consumed."""
        return init_q(config, key, obs_dim, action_dim)

    def q_values(self, q: Heads, batch: Batch) -> jax.Array:
        """Values `[heads, actions, batch]` of `q` on the batch's observations."""
        return networks.apply_heads(q, batch.obs)

    def taken(self, batch: Batch) -> jax.Array:
        """Which of the values are of actions taken, one-hot `[actions, batch]`."""
        return batch.action

    def q_rule(self, config: Any) -> optax.GradientTransformation:
        """How the Q-function steps along its gradient."""
        return q_optimizer(config)

    def target(self, config: Any, batch: Batch) -> jax.Array:
        """Bellman targets `[batch]`."""
        return bellman_target(config, self.target_q, batch)

    def q_loss(self, config: Any, q: Heads, batch: Batch) -> jax.Array:
        """L_Q(q; target Q, batch)."""
        return q_objective(self.q_values(q, batch), self.target(config, batch), self.taken(batch))

    def inner_step(self, config: Any, batch: Batch, key: jax.Array | None) -> "tuple[Learner, Losses]":
        """One step of the inner problem on `batch`; the key is for what a subclass draws."""
        del key
        return q_step(config, self, batch)

    def inner_key(self, config: Any, key: jax.Array) -> jax.Array | None:
        """The key of a bilevel agent's inner steps, derived from that of its update; None where they draw nothing."""
        del config, key
        return None

    def outer_batch(self, config: Any, batch: Batch, key: jax.Array) -> Batch:
        """The batch of the outer loss and of the hypergradient, from that of the inner problem and the update's key."""
        del config, key
        return batch


# --- construction -----------------------------------------------------------------------------------------------------


def init_learner(
    config: QLearning, key: jax.Array, obs_dim: int, num_actions: int, has_values: bool = False, has_dual: bool = False
) -> Learner:
    """Initial networks and optimiser states.

    Args:
        config: of one member.
        key: consumed.
        obs_dim: entries of an observation.
        num_actions: number of actions.
        has_values: with random value functions.
        has_dual: with a dual network, where it takes steps (`num_dual_Q_steps`).
    """
    q_key, next_obs_key, reward_key, value_key, dual_key = jax.random.split(key, 5)
    q = init_q(config, q_key, obs_dim, num_actions)
    model = _init_model(config, next_obs_key, reward_key, obs_dim, num_actions)
    hidden = [config.max_hidden_dim] * NUM_LAYERS
    values = dual = None
    if has_values:
        values = networks.init_heads(value_key, config.num_ensemble_vep, (obs_dim, *hidden, 1), config.hidden_dim)
    if has_dual and config.num_dual_Q_steps > 0:
        dual = init_q(config, dual_key, obs_dim, num_actions)
    return Learner(
        q=q,
        target_q=q,
        q_optimizer=q_optimizer(config).init(q),
        model=model,
        model_optimizer=model_optimizer(config).init(model),
        values=values,
        dual=dual,
        dual_optimizer=None if dual is None else optax.adam(config.dual_lr).init(dual),
    )


def init_q(config: SoftQ, key: jax.Array, obs_dim: int, num_actions: int) -> Heads:
    """Two Q heads, or one with `no_double`."""
    sizes = (obs_dim, *[config.max_hidden_dim] * NUM_LAYERS, num_actions)
    return networks.init_heads(key, 1 if config.no_double else 2, sizes, config.hidden_dim)


def _init_model(
    config: ModelHeads, next_obs_key: jax.Array, reward_key: jax.Array, obs_dim: int, num_actions: int
) -> Model:
    inputs, hidden = obs_dim + num_actions, [config.max_model_hidden_dim] * NUM_LAYERS
    outputs = 2 * obs_dim if config.prob_model else obs_dim
    next_obs = networks.init_network(next_obs_key, (inputs, *hidden, outputs), config.model_hidden_dim)
    if config.no_learn_reward:
        return networks.joined(Model(next_obs, None))
    reward = networks.init_network(reward_key, (inputs, *hidden, 1), config.model_hidden_dim)
    return networks.joined(Model(next_obs, reward))


def q_optimizer(config: Inner) -> optax.GradientTransformation:
    """Adam of the inner problem."""
    return optax.adam(config.inner_lr, eps_root=config.eps_root)


def model_optimizer(config: Hypergradient) -> optax.GradientTransformationExtraArgs:
    """Adam of the outer problem, behind time smoothing of the hypergradient where asked."""
    adam = optax.adam(config.lr, eps_root=config.eps_root)
    if config.smoothing == "window":
        smooth = smoothing.window_average(config.smoothing_window, config.beta, config.max_smoothing_window)
        return optax.with_extra_args_support(optax.chain(smooth, adam))
    if config.smoothing == "ema":
        smooth = smoothing.exponential_average(config.smoothing_window, config.beta)
        return optax.with_extra_args_support(optax.chain(smooth, adam))
    return optax.with_extra_args_support(adam)


# --- losses -----------------------------------------------------------------------------------------------------------


def predict(config: ModelHeads, model: Model, batch: Batch) -> Batch:
    """The batch as the model would have it: its next observations and rewards for the same observations and actions.

    With `prob_model` the next observation is a reparametrised sample with the batch's noise.
    """
    inputs = jnp.concatenate([batch.obs, batch.action])
    outputs = networks.apply_each(model, inputs)
    next_obs = next(outputs)
    if config.prob_model:
        assert batch.noise is not None
        mean, log_std = mean_and_log_std(next_obs)
        next_obs = mean + jnp.exp(log_std) * batch.noise
    reward = next(outputs, None)
    return batch._replace(next_obs=next_obs, reward=batch.reward if reward is None else reward[0])


def mean_and_log_std(outputs: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Those of a Gaussian model's outputs `[2 obs, batch]`."""
    mean, log_std = jnp.split(outputs, 2)
    return mean, jnp.clip(log_std, *LOG_STD_RANGE)


def state_value(config: SoftQ, q: Heads, obs: jax.Array) -> jax.Array:
    """Soft value alpha * logsumexp(min_j Q_j / alpha) of `obs` `[obs, batch]`, or the hard maximum; `[batch]`."""
    smallest = networks.apply_heads(q, obs).min(0)
    if config.hard:
        return smallest.max(0)
    return config.alpha * jax.nn.logsumexp(smallest / config.alpha, axis=0)


def bellman_target(config: SoftQ, target_q: Heads, batch: Batch) -> jax.Array:
    """y = r + gamma (1 - terminated) V(s'), `[batch]`."""
    return batch.reward + config.discount * (1.0 - batch.terminated) * state_value(config, target_q, batch.next_obs)


def q_objective(values: jax.Array, target: jax.Array, action: jax.Array) -> jax.Array:
    """Mean squared Bellman error in the space of values: 1/2 sum over the two heads, or the plain mean of a single
    head.

    Args:
        values: `[heads, actions, batch]`.
        target: `[batch]`.
        action: one-hot, `[actions, batch]`.
    """
    squared = (((values * action).sum(1) - target) ** 2).mean(-1)
    return 0.5 * squared.sum() if values.shape[0] > 1 else squared.sum()


def q_loss(config: SoftQ, q: Heads, target_q: Heads, batch: Batch) -> jax.Array:
    """L_Q(phi; target phi, batch)."""
    target = bellman_target(config, target_q, batch)
    return q_objective(networks.apply_heads(q, batch.obs), target, batch.action)


def model_error(predicted: Batch, batch: Batch) -> jax.Array:
    """Mean over the batch of the squared distance |s'_hat - s'|^2."""
    return ((predicted.next_obs - batch.next_obs) ** 2).sum(0).mean()


def q_step(config: Inner, learner: Learner, batch: Batch) -> tuple[Learner, Losses]:
    """One Adam step on L_Q, then the soft update of the target network."""
    loss, gradient = jax.value_and_grad(lambda q: learner.q_loss(config, q, batch))(learner.q)
    updates, optimizer_state = learner.q_rule(config).update(gradient, learner.q_optimizer, learner.q)
    q = optax.apply_updates(learner.q, updates)
    target_q = optax.incremental_update(q, learner.target_q, config.tau)
    losses = {"q_loss": loss, "q_gradient_norm": optax.tree.norm(gradient)}
    return learner.replace(q=q, target_q=target_q, q_optimizer=optimizer_state), losses

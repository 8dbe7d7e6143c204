"""Agents that learn from a dataset, and from what a model imagines: soft actor-critic as in `control`, and its like.

The agents are the values of `AGENTS`, at the end of this file. Each has a function
`step(config, learner, sources, key, t) -> (Learner, losses)`, one update; `sources` gives batches. What they share with
agents that act in the environment is that code: `control.agents.q_step`, `soft_actor_critic_agents.policy_step`.

What differs from the original (Mr-Pepe's offline-model-based-rl): the temperature is learned unless `temperature_lr` is
0; no weight decay by default; behavioural cloning squashes its actions as all policies here do.
Sources: SAC, Haarnoja et al. 2018 (arXiv 1812.05905); TD3+BC, Fujimoto and Gu 2021 (2106.06860); COMBO, Yu et al. 2021
(2102.08363); MOPO 2020 (2005.13239); MOReL 2020 (2005.05951).
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax

from purejax_bilevel import networks
from purejax_bilevel.agents import Agent, Agents, Alias
from purejax_bilevel.networks import Heads, Network
from purejax_bilevel.programs.control import agents as control
from purejax_bilevel.programs.control import policies, soft_actor_critic_agents
from purejax_bilevel.programs.control.soft_actor_critic_agents import with_new_noise
from purejax_bilevel.programs.offline.settings import ActorCritic, Conservative, Networks
from purejax_bilevel.replay import Batch

LOG_STD_RANGE = (-20.0, 2.0)
OUTPUT_GAIN = 1e-2
OOD_ACTIONS = 5  # uniform ones, and as many of the policy, at which combo lowers the critics

Losses = dict[str, jax.Array]


class Units(NamedTuple):
    """What the networks see: observations from a mean in units of a deviation, actions times a limit."""

    mean: jax.Array  # [obs]
    std: jax.Array  # [obs]
    action_limit: jax.Array | float = 1.0

    def __call__(self, obs: jax.Array) -> jax.Array:
        """Observations `[obs, n]` as the networks see them."""
        return (obs - self.mean[:, None]) / self.std[:, None]


class Learner(soft_actor_critic_agents.Learner):
    """Policy and critics of `control`, with any number of critics, weight decay and observations in units of the data.

    Its model, where it has one, is not its own business (`program`).
    """

    units: Units
    has_layer_norm: bool = flax.struct.field(pytree_node=False)

    def q_loss(self, config: ActorCritic, q: Heads, batch: Batch) -> jax.Array:
        """Sum over the critics of the mean squared Bellman error, as in the original: twice that of `control`."""
        return jnp.square(self.q_values(q, batch)[:, 0] - self.target(config, batch)).mean(-1).sum()  # type: ignore[arg-type]

    def critic(self, q: Heads, obs: jax.Array, action: jax.Array) -> jax.Array:
        """Values `[critics, 1, n]` of `obs` `[obs, n]` and `action` `[action, n]`."""
        activation = networks.normalised_relu if self.has_layer_norm else jax.nn.relu
        return networks.apply_heads(q, jnp.concatenate([self.units(obs), action]), activation)

    def sample(self, policy: Network, obs: jax.Array, noise: jax.Array) -> tuple[jax.Array, jax.Array]:
        """A policy's actions `[action, n]` for `obs` `[obs, n]`; log-probabilities `[n]`, of actions in [-1, 1]."""
        outputs = networks.apply_network(policy, self.units(obs))
        action, log_prob = policies.sample_and_log_prob(outputs, noise, LOG_STD_RANGE)
        return self.units.action_limit * action, log_prob

    def mean_action(self, policy: Network, obs: jax.Array) -> jax.Array:
        """A policy's actions `[action, n]` without noise for `obs` `[obs, n]`."""
        return self.units.action_limit * policies.mean_action(networks.apply_network(policy, self.units(obs)))

    def value(self, obs: jax.Array) -> jax.Array:
        """Lowest critic's values `[n]` of the mean actions at `obs` `[obs, n]`."""
        return self.critic(self.q, obs, self.mean_action(self.policy, obs))[:, 0].min(0)

    def q_rule(self, config: ActorCritic) -> optax.GradientTransformation:
        return optax.adamw(config.q_lr, weight_decay=config.weight_decay)

    def policy_rule(self, config: ActorCritic) -> optax.GradientTransformation:  # type: ignore[override]
        return optax.adamw(config.policy_lr, weight_decay=config.weight_decay)


class DeterministicLearner(Learner):
    """Critics of TD3: their targets have a slow policy, and noise."""

    target_policy: Network

    def target(self, config: Conservative, batch: Batch) -> jax.Array:  # type: ignore[override]
        """Bellman targets `[batch]` with the target policy's action and clipped noise, both within the bounds."""
        assert batch.noise is not None
        limit = self.units.action_limit
        noise = limit * jnp.clip(config.policy_noise * batch.noise, -config.noise_clip, config.noise_clip)
        action = jnp.clip(self.mean_action(self.target_policy, batch.next_obs) + noise, -limit, limit)
        smallest = self.critic(self.target_q, batch.next_obs, action)[:, 0].min(0)
        return batch.reward + config.discount * (1.0 - batch.terminated) * smallest


class Pair(NamedTuple):
    """A batch to learn values from, and one of the dataset alone."""

    mixed: Batch
    real: Batch


class ConservativeLearner(Learner):
    """Critics that are low where the policy would go and high where the dataset is (COMBO, equation 3)."""

    def q_loss(self, config: Conservative, q: Heads, batch: Pair) -> jax.Array:  # type: ignore[override]
        """The Bellman error of the mixed batch, plus `conservatism` times the soft maximum over actions at its states
        minus the values of the dataset."""
        action, log_density = self._elsewhere(batch.mixed)
        repeated = jnp.tile(batch.mixed.obs, 2 * OOD_ACTIONS)
        values = self.critic(q, repeated, action)[:, 0].reshape(-1, *log_density.shape)
        soft = jax.nn.logsumexp(values - log_density, axis=1) - math.log(2 * OOD_ACTIONS)
        gap = soft.mean(-1) - self.q_values(q, batch.real)[:, 0].mean(-1)
        return super().q_loss(config, q, batch.mixed) + config.conservatism * gap.sum()

    def _elsewhere(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Actions `[action, 2 k n]` that are not the dataset's and their log-densities `[2 k, n]`.

        The batch's noise is `[action, (1 + 2 k) n]`: of the target, of the policy and, by the normal distribution
        function, uniform.
        """
        assert batch.noise is not None
        count = batch.reward.shape[0]
        sampled, uniform = jnp.split(batch.noise[:, count:], 2, axis=1)
        own, log_prob = self.sample(self.policy, jnp.tile(batch.obs, OOD_ACTIONS), sampled)
        uniform = self.units.action_limit * (2.0 * jax.scipy.stats.norm.cdf(uniform) - 1.0)
        density = jnp.full((OOD_ACTIONS, count), -own.shape[0] * math.log(2.0))
        action = jax.lax.stop_gradient(jnp.concatenate([own, uniform], 1))
        return action, jax.lax.stop_gradient(jnp.concatenate([log_prob.reshape(OOD_ACTIONS, count), density]))

    def target(self, config: Any, batch: Batch) -> jax.Array:
        """As before, with the part of the noise that is meant for it."""
        assert batch.noise is not None
        return super().target(config, batch._replace(noise=batch.noise[:, : batch.reward.shape[0]]))


# --- construction -----------------------------------------------------------------------------------------------------


def init_learner(
    config: ActorCritic, key: jax.Array, units: Units, action_dim: int, kind: type[Learner] = Learner
) -> Learner:
    """Initial networks and optimiser states.

    Args:
        config: of one member.
        key: consumed.
        units: of observations and actions.
        action_dim: entries of an action.
        kind: of learner.
    """
    q_key, policy_key = jax.random.split(key)
    obs_dim = units.mean.shape[0]
    q = networks.init_heads(q_key, config.num_critics, _sizes(config, obs_dim + action_dim, 1), None, OUTPUT_GAIN)
    policy = networks.init_network(policy_key, _sizes(config, obs_dim, 2 * action_dim), None, OUTPUT_GAIN)
    log_temperature = jnp.log(jnp.asarray(config.init_temperature, jnp.result_type(float)))
    absent: Any = dict.fromkeys(("model", "model_optimizer", "values", "dual", "dual_optimizer"))
    optimizers: Any = dict.fromkeys(("q_optimizer", "policy_optimizer", "temperature_optimizer"))
    slow: Any = {"target_policy": policy} if kind is DeterministicLearner else {}
    learned: Any = {"q": q, "target_q": q, "policy": policy, "log_temperature": log_temperature, **slow}
    learner = kind(**learned, **absent, **optimizers, units=units, has_layer_norm=config.layer_norm)
    return learner.replace(
        q_optimizer=learner.q_rule(config).init(q),
        policy_optimizer=learner.policy_rule(config).init(policy),
        temperature_optimizer=learner.temperature_rule(config).init(log_temperature),
    )


def _sizes(config: Networks, inputs: int, outputs: int) -> tuple[int, ...]:
    return (inputs, *[config.hidden_dim] * config.num_layers, outputs)


# --- updates ----------------------------------------------------------------------------------------------------------


class Sources(NamedTuple):
    """Where batches come from: each is a function of a key."""

    mixed: Callable[[jax.Array], Batch]  # of dataset and imagination
    real: Callable[[jax.Array], Batch]  # of the dataset


def actor_critic_step(
    config: ActorCritic, learner: Learner, sources: Sources, key: jax.Array, t: jax.Array
) -> tuple[Learner, Losses]:
    """Critics, then policy and temperature, on one batch with a noise for each of the two."""
    del t
    batch_key, critic_key, policy_key = jax.random.split(key, 3)
    batch = sources.mixed(batch_key)
    return soft_step(config, learner, with_new_noise(batch, critic_key), with_new_noise(batch, policy_key))


def soft_step(config: ActorCritic, learner: Learner, critic_batch: Any, policy_batch: Batch) -> tuple[Learner, Losses]:
    """One update of soft actor-critic on batches that have their noise."""
    trained, critic_losses = control.q_step(config, learner, critic_batch)  # type: ignore[arg-type]
    after, policy_losses = soft_actor_critic_agents.policy_step(config, trained, policy_batch)  # type: ignore[arg-type]
    return after, critic_losses | policy_losses  # type: ignore[return-value]


def conservative_step(
    config: Conservative, learner: Learner, sources: Sources, key: jax.Array, t: jax.Array
) -> tuple[Learner, Losses]:
    """As `actor_critic_step`, with batches for the conservative part of the critics' loss."""
    del t
    batch_key, real_key, critic_key, policy_key = jax.random.split(key, 4)
    batch = sources.mixed(batch_key)
    actions, count = batch.action.shape
    noise = jax.random.normal(critic_key, (actions, (1 + 2 * OOD_ACTIONS) * count), batch.action.dtype)
    pair = Pair(batch._replace(noise=noise), sources.real(real_key))
    return soft_step(config, learner, pair, with_new_noise(batch, policy_key))


def cloning_step(
    config: ActorCritic, learner: Learner, sources: Sources, key: jax.Array, t: jax.Array
) -> tuple[Learner, Losses]:
    """A step on the mean squared distance of the policy's actions from the dataset's."""
    del t
    batch = sources.real(key)
    loss, gradient = jax.value_and_grad(lambda policy: cloning_loss(learner, policy, batch))(learner.policy)
    learner = _along(config, learner, gradient)
    return learner, {"policy_loss": loss, "policy_gradient_norm": optax.tree.norm(gradient)}


def cloning_loss(learner: Learner, policy: Network, batch: Batch) -> jax.Array:
    """Mean squared distance of a policy's mean actions from the batch's."""
    return jnp.square(learner.mean_action(policy, batch.obs) - batch.action).mean()


def _along(config: ActorCritic, learner: Learner, gradient: Network) -> Learner:
    updates, state = learner.policy_rule(config).update(gradient, learner.policy_optimizer, learner.policy)
    return learner.replace(policy=optax.apply_updates(learner.policy, updates), policy_optimizer=state)


def deterministic_step(
    config: Conservative, learner: Learner, sources: Sources, key: jax.Array, t: jax.Array
) -> tuple[Learner, Losses]:
    """TD3+BC: critics as in TD3; every `policy_delay` updates the policy, which is also to be near the dataset's."""
    batch_key, noise_key = jax.random.split(key)
    batch = with_new_noise(sources.real(batch_key), noise_key)
    trained: Any
    trained, losses = control.q_step(config, learner, batch)  # type: ignore[arg-type]
    loss_of = lambda policy: deterministic_loss(config, trained, policy, batch)  # noqa: E731
    loss, gradient = jax.value_and_grad(loss_of)(trained.policy)
    after = _along(config, trained, gradient)
    after = after.replace(target_policy=optax.incremental_update(after.policy, trained.target_policy, config.tau))
    is_due = (t + 1) % config.policy_delay == 0
    learner = jax.tree.map(lambda new, old: jnp.where(is_due, new, old), after, trained)
    return learner, losses | {"policy_loss": loss, "policy_gradient_norm": optax.tree.norm(gradient)}


def deterministic_loss(config: Conservative, learner: Learner, policy: Network, batch: Batch) -> jax.Array:
    """Minus the first critic's value, scaled to `cloning_weight` on average, plus the cloning loss (equation 5)."""
    action = learner.mean_action(policy, batch.obs)
    value = learner.critic(learner.q, batch.obs, action)[0, 0]
    scale = config.cloning_weight / jax.lax.stop_gradient(jnp.abs(value).mean() + 1e-8)
    return -scale * value.mean() + jnp.square(action - batch.action).mean()


# --- agents -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class OfflineAgent(Agent):
    """An agent that learns from a dataset.

    Args:
        step: `(config, learner, sources, key, t) -> (Learner, losses)`; `config` is a `program.Config` of one member.
        init: `(config, key, units, action_dim) -> Learner`; a subclass of `Learner` may carry more.
        has_model: whether it learns from what a model imagines.
        has_values: whether its critics learn.
    """

    step: Callable[..., tuple[Learner, Losses]]
    init: Callable[..., Learner] = init_learner
    has_model: bool = False
    has_values: bool = True


PESSIMISTIC = ("mode", "uncertainty")


def model_based(name: str, text: str, tuned: dict[str, Any], **others: Any) -> OfflineAgent:
    """An agent that learns in a model, with soft actor-critic's step unless another is given."""
    defaults: dict[str, Any] = {
        "mode": "none",
        "pessimism": 1.0,
        "ood_threshold": 1.0,
        "rollout_length": 5,
        "real_ratio": 0.05,
    }
    functions = {"step": actor_critic_step, **others}
    return OfflineAgent(name, text, defaults=defaults | tuned, settings=PESSIMISTIC, has_model=True, **functions)


WITHOUT_MODEL = {"mode": "none", "pessimism": 1.0, "ood_threshold": 1.0, "rollout_length": 1, "real_ratio": 1.0}

AGENTS = Agents(
    OfflineAgent,
    [
        OfflineAgent("offline_sac", "soft actor-critic on the dataset", actor_critic_step, defaults=WITHOUT_MODEL),
        OfflineAgent(
            "behavioral_cloning", "the dataset's actions", cloning_step, defaults=WITHOUT_MODEL, has_values=False
        ),
        OfflineAgent(
            "td3_bc",
            "TD3 with a cloning term",
            deterministic_step,
            init=functools.partial(init_learner, kind=DeterministicLearner),
            defaults=WITHOUT_MODEL,
            settings=("policy_delay",),
        ),
        model_based("offline_mbpo", "soft actor-critic in the model, without pessimism", {}),
        model_based("mopo", "reward minus lambda times the largest standard deviation", {"mode": "mopo"}),
        model_based("morel", "halts where the networks disagree", {"mode": "morel", "real_ratio": 0.01}),
        Alias("aleatoric_penalty", "mopo", {"mode": "aleatoric-penalty"}),
        Alias("epistemic_penalty", "mopo", {"mode": "epistemic-penalty"}),
        Alias("aleatoric_partitioning", "morel", {"mode": "aleatoric-partitioning"}),
        Alias("epistemic_partitioning", "morel", {"mode": "epistemic-partitioning"}),
        model_based(
            "combo",
            "conservative critics instead of penalties",
            {"real_ratio": 0.5},
            step=conservative_step,
            init=functools.partial(init_learner, kind=ConservativeLearner),
        ),
        model_based(
            "long_rollouts",
            "no penalty: long rollouts, cut where the networks disagree",
            {"mode": "truncation", "rollout_length": 1000, "real_ratio": 0.5},
        ),
    ],
)

ONLINE_AGENTS = Agents(
    OfflineAgent,
    [
        model_based(
            "mbpo", "soft actor-critic on real transitions and short rollouts in a model", {"rollout_length": 1}
        ),
        OfflineAgent("online_sac", "the same without a model", actor_critic_step, defaults=WITHOUT_MODEL),
    ],
)

"""The agents of bilevel model-based control with continuous actions: those of `agents.py` with soft actor-critic's
critic.

theta = world model (outer variable), phi = twin critic (inner variable), psi = policy, B = batch of real transitions.
The agents are the values of `AGENTS`, at the end of this file.

Only the critic learns from the model. Policy and temperature take a step on real observations after it, so the policy
is the same in inner problem, outer loss and hypergradient of a step.

The soft value of the model's next observation is V(s') = min_j target Q_j(s', a') - temperature * log psi(a'|s') with
a' drawn from psi at s'. Its derivative in s' is that of the target critic alone: a' and its log-probability count as
given, as in OMD's code. (With the derivative through psi a model earns entropy by predicting observations at which the
policy saturates, and nothing is learned on Pendulum.)

What differs from OMD's code in one update, and the option that follows it (the preset `omd_continuous_original` has
them all): there, policy and temperature step after each critic step, so before the outer loss (`policy_with_critic`);
each critic step and the outer loss have noise of their own, here one noise is shared (`separate_noise`); one batch
serves all, here the policy draws its own and mle draws three (`one_batch`); Adam's state of the critic is carried
(`warm_opt`). No option: there the critic's loss is twice and the hypergradient four times the one here, which Adam
undoes up to its eps of 1e-8.

Each agent has a function `step(config, learner, draw, key, t) -> (Learner, losses)` doing one update; `draw(key)` gives
a batch of real transitions with the policy's noise. Arrays are features first.
Sources: SAC, Haarnoja et al. 2018 (arXiv 1812.05905); OMD, Nikishin et al. 2021 (arXiv 2106.03273, section 6); the
others as in `agents.py`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp
import optax

from purejax_bilevel import networks
from purejax_bilevel.agents import Agent, Agents, Alias
from purejax_bilevel.networks import Heads, Network
from purejax_bilevel.programs.control import agents, policies
from purejax_bilevel.programs.control.agents import (
    DUAL,
    INNER,
    NUM_LAYERS,
    PREDICTIVE,
    SMOOTHED,
    SOLVER,
    Draw,
    Losses,
    Step,
)
from purejax_bilevel.programs.control.settings import Inner, PolicyLearning, SoftActorCritic
from purejax_bilevel.replay import Batch

# Of the last layers. That of critic and model is as in OMD's code; the policy's is 1 here, over means and log standard
# deviations together, and sqrt(2) there, where each of the two has a layer of its own (`separate_policy_heads`).
OUTPUT_GAIN = 2.0**0.5
POLICY_OUTPUT_GAIN = 1.0

# Named streams of random numbers.
INNER_NOISE, OUTER_NOISE, BATCH = range(3)  # of an update
HEADS = 0  # of the policy's initial layers


class Tempered(Protocol):
    """Settings with a rate of the temperature."""

    @property
    def temperature_lr(self) -> float: ...


class Learner(agents.Learner):
    """Everything that is learned, with the optimisers' states.

    The model is one `Network` from [obs, action] to [next obs, reward]; None for the agent that has no model.
    """

    # policy
    policy: Network
    policy_optimizer: optax.OptState
    log_temperature: jax.Array
    temperature_optimizer: optax.OptState

    def predict(self, config: object, model: Network, batch: Batch) -> Batch:
        """The batch as `model` would have it: next observation and reward for the same observation and action."""
        del config
        outputs = networks.apply_network(model, jnp.concatenate([batch.obs, batch.action]))
        return batch._replace(next_obs=outputs[:-1], reward=outputs[-1])

    def model_error(self, config: object, model: Network, batch: Batch, predicted: Batch) -> jax.Array:
        """Mean squared distance of the predicted next observation from the real one."""
        del config, model
        return agents.model_error(predicted, batch)

    def init_q(self, config: Inner, key: jax.Array, obs_dim: int, action_dim: int) -> Heads:
        """A fresh twin critic; the key is consumed."""
        return init_q(config, key, obs_dim, action_dim)

    def q_values(self, q: Heads, batch: Batch) -> jax.Array:
        """Values `[heads, 1, batch]` of `q` on the batch's observations and actions."""
        return self.critic(q, batch.obs, batch.action)

    def critic(self, q: Heads, obs: jax.Array, action: jax.Array) -> jax.Array:
        """Values `[heads, 1, n]` of `obs` `[obs, n]` and `action` `[action, n]`."""
        return networks.apply_heads(q, jnp.concatenate([obs, action]))

    def sample(self, policy: Network, obs: jax.Array, noise: jax.Array) -> tuple[jax.Array, jax.Array]:
        """A policy's actions `[action, n]` for `obs` `[obs, n]`, and their log-probabilities `[n]`."""
        return policies.sample_and_log_prob(networks.apply_network(policy, obs), noise)

    def policy_rule(self, config: PolicyLearning) -> optax.GradientTransformation:
        """How the policy steps along its gradient."""
        return optax.adam(config.policy_lr, eps_root=config.eps_root)

    def temperature_rule(self, config: Tempered) -> optax.GradientTransformation:
        """How the temperature's logarithm steps along its gradient."""
        return optax.adam(config.temperature_lr)

    def taken(self, batch: Batch) -> jax.Array:
        """All values are of actions taken, `[1, batch]`."""
        return jnp.ones_like(batch.reward)[None]

    def target(self, config: Inner, batch: Batch) -> jax.Array:
        """y = r + discount (1 - terminated) V(s') with the soft value V of a sampled next action, `[batch]`."""
        assert batch.noise is not None
        action, log_prob = self.sample(self.policy, jax.lax.stop_gradient(batch.next_obs), batch.noise)
        smallest = self.critic(self.target_q, batch.next_obs, action)[:, 0].min(0)
        value = smallest - jnp.exp(self.log_temperature) * log_prob
        return batch.reward + config.discount * (1.0 - batch.terminated) * value

    def inner_step(self, config: SoftActorCritic, batch: Batch, key: jax.Array | None) -> tuple[agents.Learner, Losses]:
        """One step of the critic; with `policy_with_critic` one of policy and temperature after it."""
        if key is None:
            return agents.q_step(config, self, batch)
        critic_key, policy_key = jax.random.split(key)
        own = with_new_noise(batch, critic_key) if config.separate_noise else batch
        learner, losses = agents.q_step(config, self, own)
        if not config.policy_with_critic:
            return learner, losses
        # The batch may be the model's: the policy looks at observations alone, and these are the real ones.
        learner, policy_losses = policy_step(config, learner, with_new_noise(batch, policy_key))  # type: ignore[arg-type]
        return learner, losses | policy_losses

    def inner_key(self, config: SoftActorCritic, key: jax.Array) -> jax.Array | None:
        """The key of inner steps that draw noise of their own."""
        return jax.random.fold_in(key, INNER_NOISE) if config.policy_with_critic or config.separate_noise else None

    def outer_batch(self, config: SoftActorCritic, batch: Batch, key: jax.Array) -> Batch:
        """The batch itself; with `separate_noise` its noise is another one."""
        return with_new_noise(batch, jax.random.fold_in(key, OUTER_NOISE)) if config.separate_noise else batch


def with_new_noise(batch: Batch, key: jax.Array) -> Batch:
    """The batch with standard normals for the policy, drawn with the key."""
    return batch._replace(noise=jax.random.normal(key, batch.action.shape, batch.action.dtype))


# --- construction -----------------------------------------------------------------------------------------------------


def init_learner(
    config: SoftActorCritic,
    key: jax.Array,
    obs_dim: int,
    action_dim: int,
    has_model: bool = True,
    has_values: bool = False,
    has_dual: bool = False,
) -> Learner:
    """Initial networks and optimiser states.

    Args:
        config: of one member.
        key: consumed.
        obs_dim: entries of an observation.
        action_dim: entries of an action.
        has_model: with a world model.
        has_values: with random value functions.
        has_dual: with a dual network, where it takes steps (`num_dual_Q_steps`).
    """
    q_key, model_key, value_key, dual_key, policy_key = jax.random.split(key, 5)
    q = init_q(config, q_key, obs_dim, action_dim)
    hidden = [config.max_hidden_dim] * NUM_LAYERS
    policy = init_policy(config, policy_key, obs_dim, action_dim)
    log_temperature = jnp.log(jnp.asarray(config.init_temperature, jnp.result_type(float)))
    model = values = dual = None
    if has_model:
        sizes = (obs_dim + action_dim, *[config.max_model_hidden_dim] * NUM_LAYERS, obs_dim + 1)
        model = networks.init_network(model_key, sizes, config.model_hidden_dim, OUTPUT_GAIN)
    if has_values:
        sizes = (obs_dim, *hidden, 1)
        values = networks.init_heads(value_key, config.num_ensemble_vep, sizes, config.hidden_dim, OUTPUT_GAIN)
    if has_dual and config.num_dual_Q_steps > 0:
        dual = init_q(config, dual_key, obs_dim, action_dim)
    return Learner(
        q=q,
        target_q=q,
        q_optimizer=agents.q_optimizer(config).init(q),
        model=model,
        model_optimizer=None if model is None else agents.model_optimizer(config).init(model),
        values=values,
        dual=dual,
        dual_optimizer=None if dual is None else optax.adam(config.dual_lr).init(dual),
        policy=policy,
        policy_optimizer=optax.adam(config.policy_lr).init(policy),
        log_temperature=log_temperature,
        temperature_optimizer=optax.adam(config.temperature_lr).init(log_temperature),
    )


def init_q(config: Inner, key: jax.Array, obs_dim: int, action_dim: int) -> Heads:
    """Twin critic of observation and action."""
    sizes = (obs_dim + action_dim, *[config.max_hidden_dim] * NUM_LAYERS, 1)
    return networks.init_heads(key, 2, sizes, config.hidden_dim, OUTPUT_GAIN)


def init_policy(config: SoftActorCritic, key: jax.Array, obs_dim: int, action_dim: int) -> Network:
    """Policy network: means and log standard deviations of an observation; the key is consumed.

    With `separate_policy_heads` each of the two starts as an orthogonal layer of its own. Side by side they are one
    layer: nothing else differs.
    """
    sizes = (obs_dim, *[config.max_hidden_dim] * NUM_LAYERS, 2 * action_dim)
    if not config.separate_policy_heads:
        return networks.init_network(key, sizes, config.hidden_dim, POLICY_OUTPUT_GAIN)
    layers = networks.init_layers(key, sizes, config.hidden_dim, POLICY_OUTPUT_GAIN)
    heads = [
        networks.orthogonal(head_key, sizes[-2], action_dim, OUTPUT_GAIN, config.hidden_dim)
        for head_key in jax.random.split(jax.random.fold_in(key, HEADS))
    ]
    last = layers[-1]._replace(kernel=jnp.concatenate(heads, axis=1))
    return networks.network_of((*layers[:-1], last))


# --- policy -----------------------------------------------------------------------------------------------------------


def policy_loss(learner: Learner, policy: Network, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """mean (temperature * log psi(a|s) - min_j Q_j(s, a)) over actions sampled with the batch's noise; entropy."""
    assert batch.noise is not None
    action, log_prob = learner.sample(policy, batch.obs, batch.noise)
    smallest = learner.critic(learner.q, batch.obs, action)[:, 0].min(0)
    return (jnp.exp(learner.log_temperature) * log_prob - smallest).mean(), -log_prob.mean()


def policy_step(config: PolicyLearning, learner: Learner, batch: Batch) -> tuple[Learner, Losses]:
    """One Adam step on the policy and one on the temperature, whose loss is temperature * (entropy - target)."""
    differentiate = jax.value_and_grad(lambda policy: policy_loss(learner, policy, batch), has_aux=True)
    (loss, entropy), gradient = differentiate(learner.policy)
    updates, policy_state = learner.policy_rule(config).update(gradient, learner.policy_optimizer, learner.policy)
    policy = optax.apply_updates(learner.policy, updates)

    temperature = jnp.exp(learner.log_temperature)
    excess = entropy - config.target_entropy * batch.action.shape[0]
    rule = learner.temperature_rule(config)
    update, temperature_state = rule.update(temperature * excess, learner.temperature_optimizer)
    learner = learner.replace(
        policy=policy,
        policy_optimizer=policy_state,
        log_temperature=learner.log_temperature + update,
        temperature_optimizer=temperature_state,
    )
    losses = {
        "policy_loss": loss,
        "policy_gradient_norm": optax.tree.norm(gradient),
        "entropy": entropy,
        "temperature": temperature,
    }
    return learner, losses


# --- agents -----------------------------------------------------------------------------------------------------------


def with_policy(train_critic: Step) -> Step:
    """The step of an agent that lets `train_critic` take its own, then policy and temperature on a real batch.

    With `policy_with_critic` they have stepped already; with `one_batch` all draw the same transitions.
    """

    def step(
        config: SoftActorCritic, learner: Learner, draw: Draw, key: jax.Array, t: jax.Array
    ) -> tuple[Learner, Losses]:
        critic_key, policy_key = jax.random.split(key)
        if config.one_batch:
            batch = draw(jax.random.fold_in(key, BATCH))
            draw = lambda key: with_new_noise(batch, key)  # noqa: E731
        trained, critic_losses = train_critic(config, learner, draw, critic_key, t)
        if config.policy_with_critic:
            return trained, critic_losses  # type: ignore[return-value]
        learner, policy_losses = policy_step(config, trained, draw(policy_key))  # type: ignore[arg-type]
        return learner, critic_losses | policy_losses

    return step  # type: ignore[return-value]


@dataclasses.dataclass(frozen=True)
class ContinuousAgent(Agent):
    """An agent for continuous actions.

    Args:
        step: `(config, learner, draw, key, t) -> (Learner, losses)`, of the policy too (see `with_policy`); `config` is
            a `soft_actor_critic.Config` of one member.
        init: `(config, key, obs_dim, action_dim) -> Learner`; a subclass of `Learner` may carry more.
    """

    step: Step
    init: Callable[..., Learner] = init_learner


# Tuned values: the paper's rate, and for the bilevel agents what learned in this project's own runs on Pendulum-v1
# (README, "Continuous control"). omd with one critic step did so for few seeds: model and critic chase each other.
# (That was not the paper's omd: Adam states were fresh, rates others, and the steps in another order.)
PAPER = {"lr": 3e-4, "inner_lr": 3e-4, "num_Q_steps": 1}

# What `--adapt` may name, as in `agents.py`; the validation loss keeps the policy that is there, too.
OF_CRITIC = {"inner_lr": 1, "discount": 1, "tau": 2, "policy_lr": 2, "temperature_lr": 2}
OF_MODEL_FIRST = {"lr": 1, **OF_CRITIC}
OF_MODEL_LAST = {"lr": 2, "beta": 2, **OF_CRITIC}

AGENTS = Agents(
    ContinuousAgent,
    [
        ContinuousAgent(
            name="omd",
            text="implicit differentiation of the inner problem's optimality in the critic's parameters",
            step=with_policy(agents.bilevel_agent(agents.hypergradient_omd)),
            defaults={"lr": 1e-3, "inner_lr": 5e-4, "num_Q_steps": 3},
            settings=(*SOLVER, *SMOOTHED, *INNER),
            adaptable=OF_MODEL_LAST,
        ),
        ContinuousAgent(
            name="funcbo",
            text="functional differentiation, adjoint in the space of the critic's values",
            step=with_policy(agents.bilevel_agent(agents.hypergradient_funcbo)),
            init=functools.partial(init_learner, has_dual=True),
            defaults={"lr": 1e-4, "inner_lr": 1e-3, "num_Q_steps": 1},
            settings=(*DUAL, *SMOOTHED, *INNER),
            adaptable=OF_MODEL_LAST,
        ),
        Alias("smoothfbo", "funcbo", {"smoothing": "window"}),
        ContinuousAgent(
            name="mle",
            text="likelihood of the observed transitions",
            step=with_policy(agents.predictive_agent(agents.squared_error_loss)),
            defaults=PAPER,
            settings=PREDICTIVE,
            adaptable=OF_MODEL_FIRST,
        ),
        ContinuousAgent(
            name="vep",
            text="value-equivalent prediction under random value functions",
            step=with_policy(agents.predictive_agent(agents.value_equivalence_loss)),
            init=functools.partial(init_learner, has_values=True),
            defaults=PAPER,
            settings=(*PREDICTIVE, "num_ensemble_vep"),
            adaptable=OF_MODEL_FIRST,
        ),
        ContinuousAgent(
            name="sac",
            text="no model, soft actor-critic on real transitions",
            step=with_policy(agents.model_free_agent),
            init=functools.partial(init_learner, has_model=False),
            defaults=PAPER,
            adaptable=OF_CRITIC,
        ),
    ],
)

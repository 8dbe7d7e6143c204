"""The agents of bilevel model-based Q-learning: what differs between them is where the model's gradient comes from.

theta = world model (outer variable), phi = Q-function (inner variable), B = batch of real transitions. The agents are
the values of `AGENTS`, at the end of this file. What they share is here too, for agents of your own: `init_learner`,
`bilevel_agent` (of a hypergradient), `predictive_agent` (of a loss of the model), `model_free_agent`, `q_step`.

Each has a function `step(config, learner, draw, key, t) -> (Learner, losses)` doing one outer step; `draw(key)` gives a
batch of real transitions. Arrays are features first.
Sources: OMD, Nikishin et al. 2021 (arXiv 2106.03273); funcBO, Petrulionyte et al. 2024; SmoothFBO: the same with a
smoothed gradient; VEP, Grimm et al. 2020.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax

from purejax_bilevel import networks
from purejax_bilevel.agents import Agent, Agents, Alias
from purejax_bilevel.bilevel import functional, implicit, smoothing
from purejax_bilevel.networks import Heads, Network
from purejax_bilevel.programs.control.settings import (
    Hypergradient,
    Inner,
    Learning,
    ModelHeads,
    Outer,
    QLearning,
    SoftQ,
    WarmStart,
)
from purejax_bilevel.replay import Batch

LOG_STD_RANGE = (-5.0, 2.0)
NUM_LAYERS = 2
MOST_WRITTEN_OUT = 4  # steps: each adds to the time to compile
GMRES_CYCLES = 20  # a full Krylov space first of all: short ones stagnate on the critic's indefinite Hessian


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


Losses = dict[str, jax.Array]
Draw = Callable[[jax.Array], Batch]
Step = Callable[[Any, Learner, Draw, jax.Array, jax.Array], tuple[Learner, Losses]]


def measured(losses: Losses) -> dict[str, tuple[jax.Array, jax.Array]]:
    """The losses of a step as metrics: `(sum, count)`."""
    return {name: (loss, jnp.ones_like(loss)) for name, loss in losses.items()}


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
    return optax.adam(config.inner_lr)


def model_optimizer(config: Hypergradient) -> optax.GradientTransformationExtraArgs:
    """Adam of the outer problem, behind time smoothing of the hypergradient where asked."""
    if config.smoothing == "window":
        smooth = smoothing.window_average(config.smoothing_window, config.beta, config.max_smoothing_window)
        return optax.with_extra_args_support(optax.chain(smooth, optax.adam(config.lr)))
    if config.smoothing == "ema":
        smooth = smoothing.exponential_average(config.smoothing_window, config.beta)
        return optax.with_extra_args_support(optax.chain(smooth, optax.adam(config.lr)))
    return optax.with_extra_args_support(optax.adam(config.lr))


def linear_solver(config: Hypergradient) -> implicit.LinearSolver:
    """How (inverse Hessian) times (outer gradient) is found."""
    if config.with_inv_jac == "cg":
        return implicit.conjugate_gradient(config.damping, max_steps=config.solver_steps)
    if config.with_inv_jac == "gmres":
        return implicit.gmres(config.damping, max_steps=GMRES_CYCLES, restart=config.solver_steps)
    if config.with_inv_jac == "neumann":
        return implicit.neumann(config.solver_steps, config.neumann_step_size)
    if config.with_inv_jac == "dense":
        return implicit.dense(config.damping)
    return implicit.identity()


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
        mean, log_std = _mean_and_log_std(next_obs)
        next_obs = mean + jnp.exp(log_std) * batch.noise
    reward = next(outputs, None)
    return batch._replace(next_obs=next_obs, reward=batch.reward if reward is None else reward[0])


def _mean_and_log_std(outputs: jax.Array) -> tuple[jax.Array, jax.Array]:
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


def _reward_error(predicted: Batch, batch: Batch) -> jax.Array:
    return ((predicted.reward - batch.reward) ** 2).mean()


def squared_error_loss(config: Outer, learner: Learner, batch: Batch, predicted: Batch) -> jax.Array:
    """mean |s'_hat - s'|^2 + mean (r_hat - r)^2."""
    del config, learner
    return model_error(predicted, batch) + _reward_error(predicted, batch)


def likelihood_loss(config: ModelHeads, learner: Learner, batch: Batch, predicted: Batch) -> jax.Array:
    """Squared error of next observation (summed) and reward; Gaussian negative log-likelihood with `prob_model`."""
    if not config.prob_model:
        return squared_error_loss(config, learner, batch, predicted)
    outputs = next(networks.apply_each(learner.model, jnp.concatenate([batch.obs, batch.action])))
    mean, log_std = _mean_and_log_std(outputs)
    negative_log_likelihood = -jax.scipy.stats.norm.logpdf(batch.next_obs, mean, jnp.exp(log_std))
    return negative_log_likelihood.sum(0).mean() + _reward_error(predicted, batch)


def value_equivalence_loss(config: Outer, learner: Learner, batch: Batch, predicted: Batch) -> jax.Array:
    """sum_k mean (V_k(s') - V_k(s'_hat))^2 + mean (r_hat - r)^2 over fixed random value functions V_k."""
    assert learner.values is not None
    real, modelled = (networks.apply_heads(learner.values, x.next_obs) for x in (batch, predicted))
    return ((real - modelled) ** 2).mean((1, 2)).sum() + _reward_error(predicted, batch)


# --- inner problem ----------------------------------------------------------------------------------------------------


def q_step(config: Inner, learner: Learner, batch: Batch) -> tuple[Learner, Losses]:
    """One Adam step on L_Q, then the soft update of the target network."""
    loss, gradient = jax.value_and_grad(lambda q: learner.q_loss(config, q, batch))(learner.q)
    updates, optimizer_state = learner.q_rule(config).update(gradient, learner.q_optimizer, learner.q)
    q = optax.apply_updates(learner.q, updates)
    target_q = optax.incremental_update(q, learner.target_q, config.tau)
    losses = {"q_loss": loss, "q_gradient_norm": optax.tree.norm(gradient)}
    return learner.replace(q=q, target_q=target_q, q_optimizer=optimizer_state), losses


def solve_inner(
    config: WarmStart, learner: Learner, predicted: Batch, key: jax.Array, step_key: jax.Array | None = None
) -> tuple[Learner, Losses]:
    """`num_Q_steps` steps on one model batch, from the carried Q-function (`no_warm`: from a fresh one, which takes
    the key).

    Adam starts afresh unless `warm_opt`. `step_key` is for the steps, where they draw something.
    """
    if config.no_warm:
        q = learner.init_q(config, key, predicted.obs.shape[0], predicted.action.shape[0])
        learner = learner.replace(q=q, target_q=q)
    if not config.warm_opt:
        learner = learner.replace(q_optimizer=q_optimizer(config).init(learner.q))
    step = lambda learner, key: learner.inner_step(config, predicted, key)  # noqa: E731
    return _repeat(step, learner, step_key, config.num_Q_steps)


def _repeat(
    step: Callable[[Learner, Any], tuple[Learner, Losses]], learner: Learner, key: jax.Array | None, count: int | None
) -> tuple[Learner, Losses]:
    """Runs `step(learner, key)` `count` times, with a key each if there is one; the losses are those of the last."""
    assert count is not None, "resolved"
    if count == 1:
        return step(learner, key)
    keys = None if key is None else jax.random.split(key, count)
    # On an accelerator a few steps are written out: what is the same in all of them is computed once.
    written_out = networks.together() and count <= MOST_WRITTEN_OUT
    learner, losses = jax.lax.scan(step, learner, keys, length=count, unroll=count if written_out else 1)
    return learner, jax.tree.map(lambda x: x[-1], losses)


def _model_step(config: Hypergradient, learner: Learner, gradient: Model, t: jax.Array) -> Learner:
    # t is shared by all members: the smoothing window is then written in place.
    updates, optimizer_state = model_optimizer(config).update(gradient, learner.model_optimizer, learner.model, step=t)
    return learner.replace(model=optax.apply_updates(learner.model, updates), model_optimizer=optimizer_state)


# --- bilevel agents ---------------------------------------------------------------------------------------------------


def hypergradient_omd(config: Hypergradient, learner: Learner, batch: Batch) -> tuple[Losses, Model, Learner]:
    """Hypergradient of L_Q on the real batch through the optimality condition of phi on the model batch.

    -(d f/d theta)^T v with f = grad_phi L_Q(phi; target phi, model batch) and v = H^-1 grad_phi L_Q(real batch); the
    identity approximation takes H = I (OMD, section 4).

    Returns:
        `model_loss` and, where a linear solver is used, its relative residual `solver_residual`; the hypergradient; the
        learner.
    """
    outer_loss, outer_gradient = jax.value_and_grad(lambda q: learner.q_loss(config, q, batch))(learner.q)

    def inner_loss(model: Model, q: Heads) -> jax.Array:
        return learner.q_loss(config, q, learner.predict(config, model, batch))

    solver, losses = linear_solver(config), {"model_loss": outer_loss}
    arguments = (inner_loss, learner.model, learner.q, outer_gradient, solver)
    if config.with_inv_jac == "identity":
        return losses, implicit.minimum_hypergradient(*arguments), learner
    damping = 0.0 if config.with_inv_jac == "neumann" else config.damping
    gradient, residual = implicit.minimum_hypergradient_and_residual(*arguments, damping)
    return losses | {"solver_residual": residual}, gradient, learner


def hypergradient_funcbo(config: Hypergradient, learner: Learner, batch: Batch) -> tuple[Losses, Model, Learner]:
    """Hypergradient of L_Q on the real batch through the Q-values of the batch as minimiser of the inner objective.

    The adjoint a solves H a = -dF/dq, where H = 1/batch on the actions taken, in closed form; or a dual network is
    fitted to it: `num_dual_Q_steps` Adam steps at `dual_lr` on the adjoint's quadratic objective, network and Adam
    state carried to the next outer step. (The original code fits +dF/dq by least squares instead, at `inner_lr`, with a
    fresh Adam state each time.)

    Returns:
        `model_loss`; the hypergradient; the learner.
    """
    return _functional(
        config,
        learner,
        batch,
        lambda model: learner.predict(config, model, batch),
        functional.closed_form_adjoint,
    )


def hypergradient_reward_only(config: Hypergradient, learner: Learner, batch: Batch) -> tuple[Losses, Model, Learner]:
    """That of funcbo by the rule of the OFBO code: the model's next observation gets no gradient, and the closed form
    takes the Hessian for the identity.
    """
    return _functional(
        config,
        learner,
        batch,
        lambda model: learner.predict(config, model, batch)._replace(next_obs=batch.next_obs),
        lambda cotangent, hessian: -cotangent,
    )


def _functional(
    config: Hypergradient,
    learner: Learner,
    batch: Batch,
    predict: Callable[[Any], Batch],
    closed_form: Callable[[jax.Array, jax.Array], jax.Array],
) -> tuple[Losses, Model, Learner]:
    values = learner.q_values(learner.q, batch)
    target, taken = learner.target(config, batch), learner.taken(batch)
    outer_loss, cotangent = jax.value_and_grad(lambda values: q_objective(values, target, taken))(values)

    def inner_objective(model: Model, values: jax.Array) -> jax.Array:
        return q_objective(values, learner.target(config, predict(model)), taken)

    if learner.dual is not None:
        adjoint, learner = _dual_adjoint(config, learner, batch, cotangent)
    else:
        adjoint = closed_form(cotangent, _value_hessian(values, taken))
    gradient = functional.functional_hypergradient(inner_objective, learner.model, values, adjoint)
    return {"model_loss": outer_loss}, gradient, learner


def _value_hessian(values: jax.Array, action: jax.Array) -> jax.Array:
    """Diagonal Hessian of `q_objective` in the values: 1/batch on the actions taken (one head: 2/batch), else 0."""
    num_heads, _, batch_size = values.shape
    return jnp.broadcast_to((1.0 if num_heads > 1 else 2.0) / batch_size * action, values.shape)


def _dual_adjoint(
    config: Hypergradient, learner: Learner, batch: Batch, cotangent: jax.Array
) -> tuple[jax.Array, Learner]:
    taken = learner.taken(batch)
    hessian = _value_hessian(cotangent, taken)

    def objective(dual: Heads) -> jax.Array:
        adjoint = learner.q_values(dual, batch)
        return (0.5 * hessian * adjoint**2 + cotangent * adjoint).sum()

    dual, optimizer_state, _ = functional.fit_dual(
        objective, learner.dual, learner.dual_optimizer, optax.adam(config.dual_lr), config.num_dual_Q_steps
    )
    adjoint = learner.q_values(dual, batch) * taken
    return adjoint, learner.replace(dual=dual, dual_optimizer=optimizer_state)


def bilevel_agent(hypergradient: Callable[[Any, Learner, Batch], tuple[Losses, Model, Learner]]) -> Step:
    """The step of an agent that solves the inner problem on a model batch and moves the model along a hypergradient."""

    def step(config: Learning, learner: Learner, draw: Draw, key: jax.Array, t: jax.Array) -> tuple[Learner, Losses]:
        batch_key, init_key = jax.random.split(key) if config.no_warm else (key, key)  # no step without a use for it
        batch = draw(batch_key)
        predicted = learner.predict(config, learner.model, batch)
        error = learner.model_error(config, learner.model, batch, predicted)
        learner, losses = solve_inner(config, learner, predicted, init_key, learner.inner_key(config, key))
        outer_losses, gradient, learner = hypergradient(config, learner, learner.outer_batch(config, batch, key))
        losses |= outer_losses | {
            "model_gradient_norm": optax.tree.norm(gradient),
            "model_error": error,
        }
        return _model_step(config, learner, gradient, t), losses

    return step


# --- agents without a hypergradient -----------------------------------------------------------------------------------


def predictive_agent(objective: Callable[[Any, Learner, Batch, Batch], jax.Array]) -> Step:
    """The step of an agent that takes `num_T_steps` model steps, then `num_Q_steps` Q steps on model batches, each on a
    fresh batch.

    Args:
        objective: the model's own loss, of `(config, learner, batch, predicted batch)`.
    """

    def step(config: Learning, learner: Learner, draw: Draw, key: jax.Array, t: jax.Array) -> tuple[Learner, Losses]:
        def step_model(learner: Learner, key: jax.Array) -> tuple[Learner, Losses]:
            batch = draw(key)

            def loss_of(model: Model) -> tuple[jax.Array, jax.Array]:
                predicted = learner.predict(config, model, batch)
                error = learner.model_error(config, model, batch, predicted)
                return objective(config, learner.replace(model=model), batch, predicted), error

            (loss, error), gradient = jax.value_and_grad(loss_of, has_aux=True)(learner.model)
            losses = {"model_loss": loss, "model_gradient_norm": optax.tree.norm(gradient), "model_error": error}
            return _model_step(config, learner, gradient, t), losses

        def step_q(learner: Learner, key: jax.Array) -> tuple[Learner, Losses]:
            predicted = learner.predict(config, learner.model, draw(key))
            return learner.inner_step(config, predicted, learner.inner_key(config, key))

        model_key, q_key = jax.random.split(key)
        learner, model_losses = _repeat(step_model, learner, model_key, config.num_T_steps)
        learner, q_losses = _repeat(step_q, learner, q_key, config.num_Q_steps)
        return learner, model_losses | q_losses

    return step


def model_free_agent(
    config: Inner, learner: Learner, draw: Draw, key: jax.Array, t: jax.Array
) -> tuple[Learner, Losses]:
    """The inner problem on real batches: soft double Q-learning."""
    del t

    def step(learner: Learner, key: jax.Array) -> tuple[Learner, Losses]:
        return learner.inner_step(config, draw(key), learner.inner_key(config, key))

    return _repeat(step, learner, key, config.num_Q_steps)


# --- the agents as values ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class DiscreteAgent(Agent):
    """An agent for discrete actions.

    Args:
        step: `(config, learner, draw, key, t) -> (Learner, losses)`; `config` is a `q_learning.Config` of one member.
        init: `(config, key, obs_dim, num_actions) -> Learner`; a subclass of `Learner` may carry more.
    """

    step: Step
    init: Callable[..., Learner] = init_learner


SMOOTHED = ("smoothing", "smoothing_window", "beta")
SOLVED = ("with_inv_jac", "damping", "solver_steps", "neumann_step_size")
DUAL = ("num_dual_Q_steps", "dual_lr")
INNER = ("no_warm", "warm_opt")
PREDICTIVE = ("num_T_steps",)

# Tuned values: found with this project's own runs on CartPole-v1 (README, "Learning").
AGENTS = Agents(
    DiscreteAgent,
    [
        DiscreteAgent(
            name="omd",
            text="implicit differentiation of the inner problem's optimality in the Q-function's parameters",
            step=bilevel_agent(hypergradient_omd),
            defaults={"lr": 1e-3, "inner_lr": 5e-4, "tau": 0.02},
            settings=(*SOLVED, *SMOOTHED, *INNER),
        ),
        DiscreteAgent(
            name="funcbo",
            text="functional differentiation, adjoint in the space of Q-values",
            step=bilevel_agent(hypergradient_funcbo),
            init=functools.partial(init_learner, has_dual=True),
            defaults={"lr": 1e-4, "inner_lr": 1e-3, "tau": 0.005},
            settings=(*DUAL, *SMOOTHED, *INNER),
        ),
        DiscreteAgent(
            name="funcbo_reward_only",
            text="the same by the OFBO code's rule, no gradient for the model's next observation",
            step=bilevel_agent(hypergradient_reward_only),
            init=functools.partial(init_learner, has_dual=True),
            defaults={"lr": 1e-4, "inner_lr": 1e-3, "tau": 0.005},
            settings=(*DUAL, *SMOOTHED, *INNER),
        ),
        Alias("smoothfbo", "funcbo", {"smoothing": "window"}),
        DiscreteAgent(
            name="mle",
            text="likelihood of the observed transitions",
            step=predictive_agent(likelihood_loss),
            defaults={"lr": 1e-3, "inner_lr": 1e-3, "tau": 0.01},
            settings=PREDICTIVE,
        ),
        DiscreteAgent(
            name="vep",
            text="value-equivalent prediction under random value functions",
            step=predictive_agent(value_equivalence_loss),
            init=functools.partial(init_learner, has_values=True),
            defaults={"lr": 3e-3, "inner_lr": 1e-3, "tau": 0.01},
            settings=(*PREDICTIVE, "num_ensemble_vep"),
        ),
        DiscreteAgent(
            name="sql",
            text="no model, soft double Q-learning on real transitions",
            step=model_free_agent,
            defaults={"lr": 1e-3, "inner_lr": 1e-3, "tau": 0.005},
        ),
    ],
)

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
from typing import Any

import jax
import jax.numpy as jnp
import optax

from purejax_bilevel import networks
from purejax_bilevel.agents import Agent, Agents, Alias
from purejax_bilevel.bilevel import functional, implicit
from purejax_bilevel.networks import Heads
from purejax_bilevel.programs.control.learners import (  # noqa: F401 (all of it is for agents of your own, too)
    LOG_STD_RANGE,
    NUM_LAYERS,
    Learner,
    Losses,
    Model,
    bellman_target,
    init_learner,
    init_q,
    mean_and_log_std,
    model_error,
    model_optimizer,
    predict,
    q_loss,
    q_objective,
    q_optimizer,
    q_step,
    state_value,
)
from purejax_bilevel.programs.control.settings import (
    Hypergradient,
    Inner,
    Learning,
    ModelHeads,
    Outer,
    WarmStart,
)
from purejax_bilevel.replay import Batch

MOST_WRITTEN_OUT = 4  # steps: each adds to the time to compile
GMRES_CYCLES = 20  # a full Krylov space first of all: short ones stagnate on the critic's indefinite Hessian

Draw = Callable[[jax.Array], Batch]
Step = Callable[[Any, Learner, Draw, jax.Array, jax.Array], tuple[Learner, Losses]]


def measured(losses: Losses) -> dict[str, tuple[jax.Array, jax.Array]]:
    """The losses of a step as metrics: `(sum, count)`."""
    return {name: (loss, jnp.ones_like(loss)) for name, loss in losses.items()}


# --- losses of the model, without a hypergradient ---------------------------------------------------------------------


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
    mean, log_std = mean_and_log_std(outputs)
    negative_log_likelihood = -jax.scipy.stats.norm.logpdf(batch.next_obs, mean, jnp.exp(log_std))
    return negative_log_likelihood.sum(0).mean() + _reward_error(predicted, batch)


def value_equivalence_loss(config: Outer, learner: Learner, batch: Batch, predicted: Batch) -> jax.Array:
    """sum_k mean (V_k(s') - V_k(s'_hat))^2 + mean (r_hat - r)^2 over fixed random value functions V_k."""
    assert learner.values is not None
    real, modelled = (networks.apply_heads(learner.values, x.next_obs) for x in (batch, predicted))
    return ((real - modelled) ** 2).mean((1, 2)).sum() + _reward_error(predicted, batch)


# --- inner problem ----------------------------------------------------------------------------------------------------


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
    imagine: Callable[[Any], Batch],
    closed_form: Callable[[jax.Array, jax.Array], jax.Array],
) -> tuple[Losses, Model, Learner]:
    values = learner.q_values(learner.q, batch)
    target, taken = learner.target(config, batch), learner.taken(batch)
    outer_loss, cotangent = jax.value_and_grad(lambda values: q_objective(values, target, taken))(values)

    def inner_objective(model: Model, values: jax.Array) -> jax.Array:
        return q_objective(values, learner.target(config, imagine(model)), taken)

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

    rule = optax.adam(config.dual_lr, eps_root=config.eps_root)
    dual, optimizer_state, _ = functional.fit_dual(
        objective, learner.dual, learner.dual_optimizer, rule, config.num_dual_Q_steps
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
SOLVER = ("with_inv_jac", "damping", "solver_steps", "neumann_step_size")
DUAL = ("num_dual_Q_steps", "dual_lr")
INNER = ("no_warm", "warm_opt")
PREDICTIVE = ("num_T_steps",)

# What `--adapt` may name. The validation loss keeps the target network that is there, so that tau works through the
# next update's target alone; a bilevel agent's model steps at the end of its update.
OF_Q = {"inner_lr": 1, "discount": 1, "alpha": 1, "tau": 2}
OF_MODEL_FIRST = {"lr": 1, **OF_Q}
OF_MODEL_LAST = {"lr": 2, "beta": 2, **OF_Q}

# Tuned values: found with this project's own runs on CartPole-v1 (README, "Learning").
AGENTS = Agents(
    DiscreteAgent,
    [
        DiscreteAgent(
            name="omd",
            text="implicit differentiation of the inner problem's optimality in the Q-function's parameters",
            step=bilevel_agent(hypergradient_omd),
            defaults={"lr": 1e-3, "inner_lr": 5e-4, "tau": 0.02},
            settings=(*SOLVER, *SMOOTHED, *INNER),
            adaptable=OF_MODEL_LAST,
        ),
        DiscreteAgent(
            name="funcbo",
            text="functional differentiation, adjoint in the space of Q-values",
            step=bilevel_agent(hypergradient_funcbo),
            init=functools.partial(init_learner, has_dual=True),
            defaults={"lr": 1e-4, "inner_lr": 1e-3, "tau": 0.005},
            settings=(*DUAL, *SMOOTHED, *INNER),
            adaptable=OF_MODEL_LAST,
        ),
        DiscreteAgent(
            name="funcbo_reward_only",
            text="the same by the OFBO code's rule, no gradient for the model's next observation",
            step=bilevel_agent(hypergradient_reward_only),
            init=functools.partial(init_learner, has_dual=True),
            defaults={"lr": 1e-4, "inner_lr": 1e-3, "tau": 0.005},
            settings=(*DUAL, *SMOOTHED, *INNER),
            adaptable=OF_MODEL_LAST,
        ),
        Alias("smoothfbo", "funcbo", {"smoothing": "window"}),
        DiscreteAgent(
            name="mle",
            text="likelihood of the observed transitions",
            step=predictive_agent(likelihood_loss),
            defaults={"lr": 1e-3, "inner_lr": 1e-3, "tau": 0.01},
            settings=PREDICTIVE,
            adaptable=OF_MODEL_FIRST,
        ),
        DiscreteAgent(
            name="vep",
            text="value-equivalent prediction under random value functions",
            step=predictive_agent(value_equivalence_loss),
            init=functools.partial(init_learner, has_values=True),
            defaults={"lr": 3e-3, "inner_lr": 1e-3, "tau": 0.01},
            settings=(*PREDICTIVE, "num_ensemble_vep"),
            adaptable=OF_MODEL_FIRST,
        ),
        DiscreteAgent(
            name="sql",
            text="no model, soft double Q-learning on real transitions",
            step=model_free_agent,
            defaults={"lr": 1e-3, "inner_lr": 1e-3, "tau": 0.005},
            adaptable=OF_Q,
        ),
    ],
)

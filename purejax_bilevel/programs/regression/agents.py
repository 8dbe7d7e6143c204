"""The agents of non-stationary regression: where the gradient of the lag weights lambda comes from.

Inner problem at time t, on inputs x_i and the targets Y_(s,i) that they had s = 1, 2, ... steps ago:

    L_in(lambda, h) = sum_s lambda_s mean_i |h(x_i) - Y_(s,i)|^2      for the network h
    F(h)            = mean_(i,j) (h_j(x'_i) - y_(j,i))^2              outer loss, on other inputs and today's targets

All lags share their inputs, so h depends on lambda only through a `Summary`: the total weight and the weighted sum of
the targets. One forward pass serves the whole window, and an agent differentiates with respect to the summary; what
that means for each lambda_s is `window.pull_back`'s business.

Each agent, a value of `AGENTS` at the end of this file, has a function
`step(config, learner, data, summary) -> (Step, Learner)`. Arrays are features first.
Sources: functional bilevel optimisation, Petrulionyte et al. 2024; the problem and its smoothing in time: OFBO.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax

from purejax_bilevel import networks
from purejax_bilevel.agents import Agent, Agents
from purejax_bilevel.bilevel import functional, implicit, smoothing, unrolled
from purejax_bilevel.networks import Network
from purejax_bilevel.programs.regression.settings import Hypergradient, Inner, Learning, Outer

NUM_LAYERS = 2
HIDDEN_GAIN, OUTPUT_GAIN = 1.0, 0.1


class Summary(NamedTuple):
    """What the inner problem sees of lambda and of the past targets; also a gradient with respect to that."""

    weight: jax.Array  # [], sum_s lambda_s
    target: jax.Array  # [outputs, batch], sum_s lambda_s Y_s


class Data(NamedTuple):
    """Inputs of one time step."""

    x_inner: jax.Array  # [inputs, batch]
    x_outer: jax.Array  # [inputs, batch]
    y_outer: jax.Array  # [outputs, batch], today's targets of x_outer
    y_inner: jax.Array | None = None  # [outputs, batch], today's targets of x_inner (exact only)


class Learner(flax.struct.PyTreeNode):
    """Everything that is learned, with the optimisers' states."""

    # inner problem
    inner: Network
    inner_optimizer: optax.OptState
    # adjoint (funcbo): None for the other agents
    dual: Network | None
    dual_optimizer: optax.OptState | None
    # outer problem
    weights: jax.Array  # lambda, [lags]
    outer_optimizer: optax.OptState


class Step(NamedTuple):
    """What an agent found out in one time step."""

    outer_loss: jax.Array
    inner_loss: jax.Array  # without the part that does not depend on the network
    gradient: Summary  # of the outer loss


# --- construction -----------------------------------------------------------------------------------------------------


def init_learner(config: Learning, key: jax.Array, has_dual: bool = False) -> Learner:
    """Initial networks, weights and optimiser states, with a dual network where asked; the key is consumed."""
    both = jax.vmap(lambda key: init_network(config, key))(jax.random.split(key))  # together: less to compile
    inner, dual = (jax.tree.map(lambda leaf, i=i: leaf[i], both) for i in range(2))
    dual = dual if has_dual else None
    weights = jnp.full(config.max_window_size, config.lambda_reg, jnp.result_type(float))
    return Learner(
        inner=inner,
        inner_optimizer=inner_optimizer(config).init(inner),
        dual=dual,
        dual_optimizer=None if dual is None else dual_optimizer(config).init(dual),
        weights=weights,
        outer_optimizer=outer_optimizer(config).init(weights),
    )


def init_network(config: Inner, key: jax.Array) -> Network:
    """A network of the inner problem (or its dual): two hidden layers with GELU."""
    sizes = (config.input_dim, *[config.max_hidden_dim] * NUM_LAYERS, config.output_dim)
    return networks.init_network(key, sizes, config.hidden_dim, OUTPUT_GAIN, HIDDEN_GAIN)


def predict(network: Network, inputs: jax.Array) -> jax.Array:
    """Values `[outputs, batch]` on `inputs` `[inputs, batch]`."""
    return networks.apply_network(network, inputs, networks.gelu)


def inner_optimizer(config: Hypergradient) -> optax.GradientTransformation:
    """Adam of the inner problem; `eps_root` keeps its derivative finite where a gradient is zero."""
    return optax.adam(config.inner_lr, eps_root=config.eps_root)


def dual_optimizer(config: Hypergradient) -> optax.GradientTransformation:
    """Adam of the dual network."""
    return optax.adam(jnp.where(config.dual_lr > 0, config.dual_lr, config.inner_lr))


def outer_optimizer(config: Outer) -> optax.GradientTransformationExtraArgs:
    """Adam of the weights, behind the time average of the hypergradient where it is asked for."""
    adam = optax.adam(config.outer_lr)
    if not config.average_hypergradients:
        return optax.with_extra_args_support(adam)
    smooth = smoothing.window_average(config.grad_buffer_size, config.newest_share, config.max_grad_buffer_size)
    return optax.with_extra_args_support(optax.chain(smooth, adam))


# --- losses -----------------------------------------------------------------------------------------------------------


def inner_objective(summary: Summary, values: jax.Array) -> jax.Array:
    """L_in as a function of the values `[outputs, batch]`, up to a constant: (Lambda |h|^2 - 2 <sum_s lambda_s Y_s, h>)
    / batch.

    It stays meaningful where all weights are zero.
    """
    return (summary.weight * jnp.vdot(values, values) - 2.0 * jnp.vdot(summary.target, values)) / values.shape[-1]


def inner_loss(summary: Summary, inner: Network, inputs: jax.Array) -> jax.Array:
    """`inner_objective` of a network on `inputs` `[inputs, batch]`."""
    return inner_objective(summary, predict(inner, inputs))


def outer_loss(values: jax.Array, targets: jax.Array) -> jax.Array:
    """Mean squared error over outputs and samples."""
    return jnp.mean((values - targets) ** 2)


# --- inner problem ----------------------------------------------------------------------------------------------------


def solve_inner(
    config: Hypergradient,
    inner: Network,
    optimizer_state: optax.OptState,
    inputs: jax.Array,
    summary: Summary,
    num_steps: int,
) -> tuple[Network, optax.OptState, jax.Array]:
    """`num_steps` Adam steps on the inner problem, from the carried network and optimiser state.

    Returns:
        (network, optimiser state, `inner_loss` before the last step).
    """
    optimizer = inner_optimizer(config)

    def step(carry: tuple, _: None) -> tuple[tuple, jax.Array]:
        inner, state = carry
        loss, gradient = jax.value_and_grad(lambda inner: inner_loss(summary, inner, inputs))(inner)
        updates, state = optimizer.update(gradient, state, inner)
        return (optax.apply_updates(inner, updates), state), loss

    (inner, optimizer_state), losses = jax.lax.scan(step, (inner, optimizer_state), length=num_steps)
    return inner, optimizer_state, losses[-1]


def solve_inner_without_data(
    config: Hypergradient, inner: Network, optimizer_state: optax.OptState, num_steps: int
) -> Network:
    """The network after `solve_inner` with all weights zero: what Adam's momentum does, without a pass through it."""
    optimizer, zeros = inner_optimizer(config), jax.tree.map(jnp.zeros_like, inner)

    def step(_: jax.Array, carry: tuple) -> tuple:
        inner, state = carry
        updates, state = optimizer.update(zeros, state, inner)
        return optax.apply_updates(inner, updates), state

    return jax.lax.fori_loop(0, num_steps, step, (inner, optimizer_state))[0]


def _solve(config: Hypergradient, learner: Learner, data: Data, summary: Summary) -> tuple[Learner, jax.Array]:
    inner, state, loss = solve_inner(
        config, learner.inner, learner.inner_optimizer, data.x_inner, summary, config.num_inner_steps
    )
    return learner.replace(inner=inner, inner_optimizer=state), loss


# --- agents -----------------------------------------------------------------------------------------------------------


def functional_agent(config: Hypergradient, learner: Learner, data: Data, summary: Summary) -> tuple[Step, Learner]:
    """funcbo: the adjoint is a dual network a, fitted to the minimum of Lambda mean_i |a(x_i)|^2 + <a(x'), dF/dh(x')>.

    The dual and its optimiser are carried to the next time step. `reference_dual` follows the original code instead:
    the dual starts anew at every step, dF/dh is divided by the batch size once more, and the hypergradient has the
    opposite sign.
    """
    learner, inner_value = _solve(config, learner, data, summary)
    loss, gradient, learner = dual_hypergradient(config, learner, data, summary)
    return Step(loss, inner_value, gradient), learner


def dual_hypergradient(
    config: Hypergradient, learner: Learner, data: Data, summary: Summary
) -> tuple[jax.Array, Summary, Learner]:
    """That of funcbo at the network as it is: outer loss, gradient, and the learner with its dual network fitted."""
    assert learner.dual is not None
    batch_size = data.x_inner.shape[-1]
    both = predict(learner.inner, jnp.concatenate([data.x_inner, data.x_outer], axis=1))
    values, outer_values = both[:, :batch_size], both[:, batch_size:]
    loss, cotangent = jax.value_and_grad(outer_loss)(outer_values, data.y_outer)
    if config.reference_dual:
        cotangent = cotangent / batch_size
    curvature = 2.0 * summary.weight / batch_size  # Hessian of the inner objective in each value

    def objective(dual: Network) -> jax.Array:
        adjoint = predict(dual, jnp.concatenate([data.x_inner, data.x_outer], axis=1))
        return functional.adjoint_objective(adjoint[:, :batch_size], curvature, adjoint[:, batch_size:], cotangent)

    dual, dual_state, _ = functional.fit_dual(
        objective, learner.dual, learner.dual_optimizer, dual_optimizer(config), config.num_dual_steps
    )
    adjoint = predict(dual, data.x_inner)
    if config.reference_dual:
        adjoint = -adjoint
    else:
        learner = learner.replace(dual=dual, dual_optimizer=dual_state)
    return loss, functional.functional_hypergradient(inner_objective, summary, values, adjoint), learner


def exact_agent(config: Hypergradient, learner: Learner, data: Data, summary: Summary) -> tuple[Step, Learner]:
    """exact: the adjoint -dF/dh / (2 Lambda / batch) in closed form.

    It is known where inner and outer loss share their inputs, so dF/dh is taken on the inner inputs with today's
    targets there. A total weight below `adjoint_floor` counts as that: the adjoint grows without bound towards
    lambda = 0.
    """
    learner, inner_value = _solve(config, learner, data, summary)
    gradient = closed_form_hypergradient(config, learner, data, summary)
    loss = outer_loss(predict(learner.inner, data.x_outer), data.y_outer)
    return Step(loss, inner_value, gradient), learner


def closed_form_hypergradient(config: Hypergradient, learner: Learner, data: Data, summary: Summary) -> Summary:
    """That of exact at the network as it is."""
    values = predict(learner.inner, data.x_inner)
    cotangent = jax.grad(outer_loss)(values, data.y_inner)
    curvature = 2.0 * jnp.maximum(summary.weight, config.adjoint_floor) / values.shape[-1]
    adjoint = functional.closed_form_adjoint(cotangent, curvature)
    return functional.functional_hypergradient(inner_objective, summary, values, adjoint)


def implicit_agent(config: Hypergradient, learner: Learner, data: Data, summary: Summary) -> tuple[Step, Learner]:
    """aid: -(d^2 L_in / d lambda d phi) (H + aid_cg_reg I)^-1 dF/dphi, with conjugate gradient on the Hessian H in phi.

    It stops at |residual| <= aid_cg_tol (1 + |dF/dphi|), or after `aid_cg_iters` products. H need not be positive.
    """
    learner, inner_value = _solve(config, learner, data, summary)
    loss, cotangent = jax.value_and_grad(lambda inner: outer_loss(predict(inner, data.x_outer), data.y_outer))(
        learner.inner
    )
    tolerance = config.aid_cg_tol * (1.0 + optax.tree.norm(cotangent))
    solver = implicit.conjugate_gradient(config.aid_cg_reg, 0.0, config.aid_cg_iters, tolerance)
    gradient = implicit.minimum_hypergradient(
        lambda summary, inner: inner_loss(summary, inner, data.x_inner), summary, learner.inner, cotangent, solver
    )
    return Step(loss, inner_value, gradient), learner


def unrolled_agent(
    config: Hypergradient, learner: Learner, data: Data, summary: Summary, num_steps: int | None = None
) -> tuple[Step, Learner]:
    """unroll1, unroll: the derivative through the Adam steps themselves; the carried network and Adam state count as
    constants.

    Args:
        config: of one member.
        learner: before the step.
        data: of this time.
        summary: of lambda and the past targets.
        num_steps: Adam steps; None: `num_inner_steps`.
    """
    loss, gradient, inner, state = unrolled.unrolled_hypergradient(
        lambda summary, inner: inner_loss(summary, inner, data.x_inner),
        lambda _, inner: outer_loss(predict(inner, data.x_outer), data.y_outer),
        summary,
        learner.inner,
        learner.inner_optimizer,
        inner_optimizer(config),
        config.num_inner_steps if num_steps is None else num_steps,
    )
    inner_value = inner_loss(summary, inner, data.x_inner)
    return Step(loss, inner_value, gradient), learner.replace(inner=inner, inner_optimizer=state)


def outer_step(config: Outer, learner: Learner, hypergradient: jax.Array, t: jax.Array) -> Learner:
    """Moves the weights `[lags]` along a hypergradient and projects them to 0 or above."""
    # t is shared by all members: the smoothing window is then written in place.
    updates, state = outer_optimizer(config).update(hypergradient, learner.outer_optimizer, learner.weights, step=t)
    weights = jnp.maximum(optax.apply_updates(learner.weights, updates), 0.0)
    return learner.replace(weights=weights, outer_optimizer=state)


# --- the agents as values ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class RegressionAgent(Agent):
    """An agent of non-stationary regression.

    Args:
        step: `(config, learner, data, summary) -> (Step, Learner)`; `config` is a `program.Config` of one member.
        init: `(config, key) -> Learner`; a subclass of `Learner` may carry more.
        inner_targets: whether it sees today's targets on the inner inputs, `Data.y_inner`.
        inner_steps: Adam steps of the inner problem per time step.
    """

    step: Callable[[Any, Learner, Data, Summary], tuple[Step, Learner]]
    init: Callable[..., Learner] = init_learner
    inner_targets: bool = False
    inner_steps: Callable[[Inner], int] = operator.attrgetter("num_inner_steps")


AVERAGED = ("average_hypergradients", "grad_buffer_size", "newest_share")
DUAL = ("num_inner_steps", "num_dual_steps", "dual_lr", "reference_dual")

AGENTS = Agents(
    RegressionAgent,
    [
        RegressionAgent(
            name="funcbo",
            text="functional differentiation, the adjoint a dual network that is fitted all along; averaged over time",
            step=functional_agent,
            init=functools.partial(init_learner, has_dual=True),
            defaults={"average_hypergradients": True},
            settings=(*DUAL, *AVERAGED),
        ),
        RegressionAgent(
            name="funcbo_nosmooth",
            text="the same, never averaged",
            step=functional_agent,
            init=functools.partial(init_learner, has_dual=True),
            defaults={"average_hypergradients": False},
            settings=DUAL,
        ),
        RegressionAgent(
            name="aid",
            text="implicit differentiation in the network's parameters, conjugate gradient",
            step=implicit_agent,
            defaults={"average_hypergradients": False},
            settings=("num_inner_steps", "aid_cg_iters", "aid_cg_tol", "aid_cg_reg", *AVERAGED),
        ),
        RegressionAgent(
            name="unroll1",
            text="through one Adam step of the inner problem, its only one",
            step=functools.partial(unrolled_agent, num_steps=1),
            defaults={"average_hypergradients": False},
            settings=("eps_root", *AVERAGED),
            inner_steps=lambda config: 1,
        ),
        RegressionAgent(
            name="unroll",
            text="through all Adam steps of the inner problem",
            step=unrolled_agent,
            defaults={"average_hypergradients": False},
            settings=("num_inner_steps", "eps_root", *AVERAGED),
        ),
        RegressionAgent(
            name="exact",
            text="functional differentiation, the adjoint in closed form with today's targets on the inner inputs; "
            "averaged over time",
            step=exact_agent,
            defaults={"average_hypergradients": True},
            settings=("num_inner_steps", "adjoint_floor", *AVERAGED),
            inner_targets=True,
        ),
    ],
)

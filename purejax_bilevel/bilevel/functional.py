"""Functional implicit differentiation: the inner problem is solved over functions, its Hessian is in their values.

The inner objective depends on the inner function only through its values q = h(x) on a batch. There it is usually
convex, often quadratic and separable, although it is neither in the function's parameters. With F the outer loss and
g = dF/dq:

    adjoint equation   H a = -g,   H = Hessian of the inner objective in the values,
    hypergradient      B^T a,      B = d^2 (inner objective) / (d outer d values).

The adjoint a is a function too. It is known in closed form where H is diagonal and inner and outer losses share their
inputs; otherwise a second, "dual" network is fitted to the quadratic objective whose minimum is a.
Source: Petrulionyte, Mairal and Arbel 2024, "Functional bilevel optimization for machine learning".
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax import lax

from purejax_bilevel.bilevel._common import PyTree, checked_count, full_precision


def functional_hypergradient(
    inner_objective: Callable[[PyTree, PyTree], jax.Array], outer: PyTree, values: PyTree, adjoint: PyTree
) -> PyTree:
    """Hypergradient B^T a: the gradient over `outer` of the inner objective's directional derivative along the adjoint.

    Args:
        inner_objective: L(outer, values) -> scalar, a function of function values.
        outer: outer variables (floating point leaves).
        values: values of the inner solution on the batch, e.g. `[heads, batch, actions]`.
        adjoint: values of the adjoint function at the same places, a pytree like `values`.

    Returns:
        A pytree like `outer`: the indirect part of the outer gradient.
    """
    with full_precision():

        def derivative_along_adjoint(outer):
            return jax.jvp(lambda q: inner_objective(outer, q), (values,), (adjoint,))[1]

        return jax.grad(derivative_along_adjoint)(outer)


def separable_hessian(inner_objective: Callable[[PyTree, PyTree], jax.Array], outer: PyTree, values: PyTree) -> PyTree:
    """Diagonal of the Hessian in the values, for an objective that is a sum over single values (one Hessian product).

    For a squared Bellman error this is 2/N (1/N with the factor 1/2) on the taken actions and 0 on the others.

    Args:
        inner_objective: L(outer, values) -> scalar, without terms that couple two values: they would add up here.
        outer: outer variables.
        values: where to differentiate, e.g. `[heads, batch, actions]`.

    Returns:
        A pytree like `values`.
    """
    gradient = lambda q: jax.grad(inner_objective, argnums=1)(outer, q)  # noqa: E731
    with full_precision():
        return jax.jvp(gradient, (values,), (jax.tree.map(jnp.ones_like, values),))[1]


def closed_form_adjoint(outer_cotangent: PyTree, hessian_diagonal: PyTree) -> PyTree:
    """Solve H a = -g for a diagonal H: a = -g / h where h > 0, and 0 where the inner objective does not see the value.

    Args:
        outer_cotangent: g, gradient of the outer loss with respect to the values, e.g. `[heads, batch, actions]`.
        hessian_diagonal: h, a pytree with the same structure whose leaves broadcast against those of g.

    Returns:
        The adjoint's values, a pytree like `outer_cotangent`.
    """

    def divide(g, h):
        seen = h > 0
        return jnp.where(seen, -g / jnp.where(seen, h, 1), 0).astype(g.dtype)

    return jax.tree.map(divide, outer_cotangent, hessian_diagonal)


def adjoint_objective(
    inner_adjoint: PyTree, hessian_diagonal: PyTree, outer_adjoint: PyTree, outer_cotangent: PyTree
) -> jax.Array:
    """Quadratic objective that the adjoint minimises: 1/2 <a, H a> on the inner inputs + <a, g> on the outer inputs.

    Args:
        inner_adjoint: values of a where the inner objective looks, e.g. `[batch, outputs]`.
        hessian_diagonal: h, leaves broadcast against those of `inner_adjoint`.
        outer_adjoint: values of a where the outer loss looks (the same values if both look at the same inputs).
        outer_cotangent: g, gradient of the outer loss with respect to its values, a pytree like `outer_adjoint`.

    Returns:
        A scalar; its minimiser over functions satisfies H a = -g. It is bounded below only if a large a on the outer
        inputs is also large on inner inputs with positive curvature: train on fresh batches, not on one fixed pair.
    """
    curved = jax.tree.map(lambda a, h: h * a, inner_adjoint, hessian_diagonal)
    return 0.5 * optax.tree.vdot(inner_adjoint, curved) + optax.tree.vdot(outer_adjoint, outer_cotangent)


def fit_dual(
    objective: Callable[[PyTree], jax.Array],
    dual_params: PyTree,
    opt_state: optax.OptState,
    optimizer: optax.GradientTransformation,
    num_steps: int,
) -> tuple[PyTree, optax.OptState, jax.Array]:
    """Fit the dual network a_xi by `num_steps` optimiser steps on its quadratic objective.

    The caller carries parameters and optimiser state from one outer step to the next: the adjoint moves slowly, so a
    few steps each time follow it.

    Args:
        objective: xi -> scalar, normally `adjoint_objective` of the dual network's values.
        dual_params: xi.
        opt_state: state of `optimizer` for xi.
        optimizer: any optax transformation.
        num_steps: at least 1.

    Returns:
        (parameters, optimiser state, objective before the last step).

    Raises:
        ValueError: if num_steps < 1.
    """
    num_steps = checked_count("num_steps", num_steps)

    def step(carry, _):
        params, state = carry
        value, gradient = jax.value_and_grad(objective)(params)
        updates, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), value

    (dual_params, opt_state), values = lax.scan(step, (dual_params, opt_state), length=num_steps)
    return dual_params, opt_state, values[-1]

"""Unrolled differentiation: the exact gradient of the outer loss through k steps of the inner optimiser.

No optimality condition and no linear solve, so no error when the inner problem is far from solved; memory and time
grow with k. With `checkpoint` the backward pass recomputes each step and keeps k copies of (inner, optimiser state)
only.

Adam needs `eps_root > 0` here. Without it, the derivative of sqrt(nu) at nu = 0 is infinite, and a single inner
gradient entry that is exactly zero (a dead relu, a zero weight on the data) makes the hypergradient NaN.
"""

from collections.abc import Callable

import jax
import optax
from jax import lax

from purejax_bilevel.bilevel._common import PyTree, checked_count


def iterated_hypergradient(
    step: Callable[[PyTree, PyTree], PyTree],
    outer_loss: Callable[[PyTree, PyTree], jax.Array],
    outer: PyTree,
    start: PyTree,
    num_steps: int,
    checkpoint: bool = True,
) -> tuple[jax.Array, PyTree, PyTree]:
    """Value and gradient of outer_loss(outer, state after k steps) for any iteration that solves the inner problem.

    Args:
        step: (outer, state) -> state, such as a step of gradient descent or of value iteration.
        outer_loss: F(outer, state) -> scalar.
        outer: outer variables (floating point leaves).
        start: where the iteration starts; taken as constant.
        num_steps: k, at least 1.
        checkpoint: recompute each step in the backward pass instead of storing its intermediate values.

    Returns:
        (outer loss after k steps, hypergradient like `outer`, state after k steps).

    Raises:
        ValueError: if num_steps < 1.
    """

    def loss_after_steps(outer):
        last = iterated(step, outer, start, num_steps, checkpoint)
        return outer_loss(outer, last), last

    (value, last), hypergradient = jax.value_and_grad(loss_after_steps, has_aux=True)(outer)
    return value, hypergradient, last


def iterated(
    step: Callable[[PyTree, PyTree], PyTree], outer: PyTree, start: PyTree, num_steps: int, checkpoint: bool = True
) -> PyTree:
    """The state after `num_steps` steps; arguments as for `iterated_hypergradient`."""
    num_steps = checked_count("num_steps", num_steps)

    def body(state, _):
        return step(outer, state), None

    # the scan already keeps the compiler from merging forward and recomputed steps
    body = jax.checkpoint(body, prevent_cse=False) if checkpoint else body
    return lax.scan(body, start, length=num_steps)[0]


def unrolled_hypergradient(
    inner_loss: Callable[[PyTree, PyTree], jax.Array],
    outer_loss: Callable[[PyTree, PyTree], jax.Array],
    outer: PyTree,
    inner: PyTree,
    opt_state: optax.OptState,
    optimizer: optax.GradientTransformation,
    num_steps: int,
    checkpoint: bool = True,
) -> tuple[jax.Array, PyTree, PyTree, optax.OptState]:
    """Value and gradient of outer_loss(outer, phi_k(outer)), where phi_k is `inner` after k optimiser steps.

    Args:
        inner_loss: L(outer, inner) -> scalar, minimised over inner.
        outer_loss: F(outer, inner) -> scalar.
        outer: outer variables (floating point leaves).
        inner: where the inner optimiser starts; taken as constant.
        opt_state: state of `optimizer` at `inner`; taken as constant.
        optimizer: any differentiable optax transformation.
        num_steps: k, at least 1.
        checkpoint: recompute each step in the backward pass instead of storing its intermediate values.

    Returns:
        (outer loss at phi_k, hypergradient like `outer`, phi_k, optimiser state after k steps).

    Raises:
        ValueError: if num_steps < 1.
    """

    def step(outer, carry):
        inner, state = carry
        gradient = jax.grad(inner_loss, argnums=1)(outer, inner)
        updates, state = optimizer.update(gradient, state, inner)
        return optax.apply_updates(inner, updates), state

    loss_of = lambda outer, carry: outer_loss(outer, carry[0])  # noqa: E731
    start = (inner, opt_state)
    value, hypergradient, (inner, opt_state) = iterated_hypergradient(
        step, loss_of, outer, start, num_steps, checkpoint
    )
    return value, hypergradient, inner, opt_state

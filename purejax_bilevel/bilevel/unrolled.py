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
    num_steps = checked_count("num_steps", num_steps)

    def loss_after_steps(outer):
        def step(carry, _):
            inner, state = carry
            gradient = jax.grad(inner_loss, argnums=1)(outer, inner)
            updates, state = optimizer.update(gradient, state, inner)
            return (optax.apply_updates(inner, updates), state), None

        # the scan already keeps the compiler from merging forward and recomputed steps
        body = jax.checkpoint(step, prevent_cse=False) if checkpoint else step
        (last_inner, last_state), _ = lax.scan(body, (inner, opt_state), length=num_steps)
        return outer_loss(outer, last_inner), (last_inner, last_state)

    (value, (inner, opt_state)), hypergradient = jax.value_and_grad(loss_after_steps, has_aux=True)(outer)
    return value, hypergradient, inner, opt_state

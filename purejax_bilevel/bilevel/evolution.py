"""Evolution strategies: the gradient of a smoothed outer loss from its values alone, where no derivative is to be had.

With F the outer loss after any solution of the inner problem, and e standard normal,

    grad E[F(outer + sigma e)] = E[(F(outer + sigma e) - F(outer - sigma e)) e] / (2 sigma).

Unbiased for the smoothed loss, whatever F does inside; its variance grows with the number of outer variables.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree

from purejax_bilevel.bilevel._common import PyTree, Scalar, check_between, checked_count


def antithetic_gradient(
    loss: Callable[[PyTree], jax.Array], outer: PyTree, key: jax.Array, num_pairs: int, sigma: Scalar
) -> PyTree:
    """Mean of (F(outer + sigma e) - F(outer - sigma e)) e / (2 sigma) over pairs of mirrored samples.

    Args:
        loss: F(outer) -> scalar; it is not differentiated.
        outer: outer variables (floating point leaves).
        key: consumed.
        num_pairs: pairs, each of two evaluations of `loss`; all are evaluated together (vmap).
        sigma: standard deviation of the samples, above 0; may be traced.

    Returns:
        A pytree like `outer`.

    Raises:
        ValueError: if num_pairs < 1 or a known sigma is negative.

    Source: Salimans et al. 2017, "Evolution strategies as a scalable alternative to reinforcement learning".
    """
    num_pairs = checked_count("num_pairs", num_pairs)
    check_between("sigma", sigma, 0)
    flat, unravel = ravel_pytree(lax.stop_gradient(outer))
    noise = jax.random.normal(key, (num_pairs, flat.size), flat.dtype)
    sigma = jnp.asarray(sigma, flat.dtype)

    def difference(direction):
        return loss(unravel(flat + sigma * direction)) - loss(unravel(flat - sigma * direction))

    return unravel(jax.vmap(difference)(noise) @ noise / (2 * sigma * num_pairs))

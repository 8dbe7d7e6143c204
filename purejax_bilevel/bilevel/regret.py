"""Regret of an online bilevel method: how much worse it did than it could have, when the problem changes with time.

Local regret asks for small smoothed hypergradients and needs no comparator; static regret compares with the best fixed
choice in hindsight, here the best one of a grid.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from purejax_bilevel.bilevel._common import PyTree, Scalar
from purejax_bilevel.bilevel.smoothing import WindowAverageState, window_average


class LocalRegretState(NamedTuple):
    """State of `local_regret`."""

    average: WindowAverageState
    increment: jax.Array  # [] the newest squared norm
    cumulative: jax.Array  # [] sum of the squared norms so far, as exact as its type can say it
    remainder: jax.Array  # [] what rounding has left out of that sum


class LocalRegret(NamedTuple):
    """The pair returned by `local_regret`: init(params) -> state, update(hypergradient, state) -> (regret, state)."""

    init: Callable
    update: Callable


def local_regret(window: Scalar, max_window: int | None = None) -> LocalRegret:
    """Bilevel local regret: sum over time of |mean of the last `window` hypergradients|^2.

    The sum is compensated: increments far below the last digit of what has been summed are not lost but kept until they
    move it (after 1e12 a million of 1e4 each add 1e10 in 32 bits too). How large the newest one is, the state says.

    Args:
        window: number of hypergradients averaged; may be traced (then max_window is needed).
        max_window: see `window_average`.

    Returns:
        A pair (init, update). `init(outer)` makes the state; `update(hypergradient, state, step=None)` returns
        (regret up to now, state); `step` is as in `window_average`.

    Raises:
        ValueError: as `window_average`.
    """
    average = window_average(window, beta=0.0, max_window=max_window)

    def init(outer: PyTree) -> LocalRegretState:
        return LocalRegretState(average.init(outer), jnp.zeros(()), jnp.zeros(()), jnp.zeros(()))

    def update(hypergradient: PyTree, state: LocalRegretState, step=None) -> tuple[jax.Array, LocalRegretState]:
        mean, average_state = average.update(hypergradient, state.average, step=step)
        increment = optax.tree.norm(mean, squared=True).astype(state.cumulative.dtype)
        cumulative, remainder = _two_sum(state.cumulative, increment + state.remainder)
        return cumulative, LocalRegretState(average_state, increment, cumulative, remainder)

    return LocalRegret(init, update)


def _two_sum(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """a + b rounded, and the rounding error exactly (Knuth 1969); no error is known of a sum that is not finite."""
    total = a + b
    seen = total - a
    error = (a - (total - seen)) + (b - seen)
    return total, jnp.where(jnp.isfinite(total), error, 0.0)


def static_regret(losses: jax.Array, comparator_losses: jax.Array) -> jax.Array:
    """Cumulative loss minus that of the best fixed comparator in hindsight, at every step.

    Args:
        losses: losses of the method, `[steps]`.
        comparator_losses: losses of each fixed choice at the same steps, `[steps, comparators]`.

    Returns:
        `[steps]`; entry t compares the first t + 1 steps with the comparator that is best over them. It may be
        negative.

    Raises:
        ValueError: if the shapes do not fit.
    """
    if jnp.ndim(losses) != 1 or jnp.ndim(comparator_losses) != 2 or len(losses) != len(comparator_losses):
        raise ValueError(
            f"losses has shape {jnp.shape(losses)} and comparator_losses {jnp.shape(comparator_losses)}, they must be "
            "[steps] and [steps, comparators]."
        )
    return jnp.cumsum(losses) - jnp.cumsum(comparator_losses, axis=0).min(axis=1)

"""How well an ensemble knows what it does not know: errors against uncertainties, and coverage of its intervals.

All on rows that it has not learned from: held-out ones, or those of another dataset.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import ndtri

from purejax_bilevel.programs.offline import KINDS, LEVELS, ensemble, uncertainty
from purejax_bilevel.programs.offline.ensemble import Architecture, Prediction, Transitions
from purejax_bilevel.programs.offline.fitting import Model

CHUNK = 4096  # rows at a time


class Calibration(NamedTuple):
    """Of some rows."""

    error: jax.Array  # [row], distance of a network's next observation from the real one, mean over networks
    uncertainty: jax.Array  # [kind, row], in the order of KINDS
    rank_correlation: jax.Array  # [kind], Spearman's, of error and uncertainty
    coverage: jax.Array  # [level], share of the real numbers inside a network's central interval; NaN: deterministic


class Statistics(NamedTuple):
    """Of the uncertainties of some rows, `[kind]` in the order of KINDS."""

    largest: jax.Array
    mean: jax.Array
    std: jax.Array


def calibrate(architecture: Architecture, model: Model, rows: Transitions) -> Calibration:
    """Compares predictions with what came next.

    Args:
        architecture: of the ensemble.
        model: fitted.
        rows: `[rows, ...]`.
    """
    prediction = ensemble.predict(architecture, model.networks, model.normaliser, rows.obs, rows.action)
    distance = model.normaliser(prediction.mean[..., :-1]) - model.normaliser(rows.next_obs)
    error = jnp.sqrt(jnp.square(distance).sum(-1)).mean(0)
    found = _uncertainties(prediction, model)
    correlation = rank_correlations(error, found)
    return Calibration(error, found, correlation, _coverage(architecture, prediction, rows))


def _uncertainties(prediction: Prediction, model: Model) -> jax.Array:
    return jnp.stack([uncertainty.uncertainty(kind, prediction, model.normaliser) for kind in KINDS])


def _coverage(architecture: Architecture, prediction: Prediction, rows: Transitions) -> jax.Array:
    if not architecture.probabilistic:
        return jnp.full(len(LEVELS), jnp.nan)
    target = jnp.concatenate([rows.next_obs, rows.reward[:, None]], -1)
    distance = jnp.abs(target - prediction.mean) / prediction.std
    half_widths = ndtri(0.5 + 0.5 * np.array(LEVELS))
    return jnp.stack([(distance <= width).mean() for width in half_widths])


def rank_correlations(first: jax.Array, others: jax.Array) -> jax.Array:
    """Spearman's correlation `[other]` of `[row]` with each of `[other, row]`.

    Equal numbers are ranked in their order; 0 where one of the two does not vary.
    """
    columns = jnp.concatenate([first[None], others])
    order = jnp.argsort(columns, axis=1)  # one sort of all: it is what takes long to compile
    places = jnp.arange(columns.shape[1], dtype=first.dtype)
    ranks = jax.vmap(lambda order: jnp.zeros_like(places).at[order].set(places))(order) - places.mean()
    varies = jnp.ptp(columns, axis=1) > 0
    correlation = ranks[1:] @ ranks[0] / jnp.square(ranks[0]).sum()  # all ranks have the same size
    return jnp.where(varies[1:] & varies[0], correlation, 0.0)


def uncertainty_statistics(architecture: Architecture, model: Model, obs: jax.Array, action: jax.Array) -> Statistics:
    """Largest, mean and standard deviation of each uncertainty over `[rows, obs]` and `[rows, action]`.

    With them lambda and tau can be given in units that go from one dataset to another (`r_max / u_max`, `u_max`).
    """
    count = obs.shape[0]
    size = min(CHUNK, count)

    def chunk(carry: None, start: jax.Array) -> tuple[None, jax.Array]:
        # The last chunk overlaps the one before: what counts twice is left out below.
        own = (jax.lax.dynamic_slice_in_dim(columns, start, size) for columns in (obs, action))
        return carry, _uncertainties(ensemble.predict(architecture, model.networks, model.normaliser, *own), model)

    starts = [min(start, count - size) for start in range(0, count, size)]
    _, found = jax.lax.scan(chunk, None, jnp.array(starts))
    new = np.arange(size)[None] + np.array(starts)[:, None] >= np.arange(0, count, size)[:, None]  # [chunk, row]
    mean = jnp.where(new[:, None], found, 0.0).sum((0, 2)) / count
    square = jnp.where(new[:, None], jnp.square(found - mean[:, None]), 0.0).sum((0, 2)) / count
    return Statistics(found.max((0, 2)), mean, jnp.sqrt(square))

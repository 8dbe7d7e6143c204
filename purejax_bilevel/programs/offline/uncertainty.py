"""How uncertain an ensemble is about a prediction: one number per row, in several ways.

Epistemic ones say how far the networks disagree, aleatoric ones how large the variances are that they learned.
Normalised units are those of the data's standard deviation: without a normaliser, the data's own.
Sources: MOReL, Kidambi et al. 2020 (arXiv 2005.05951); MOPO, Yu et al. 2020 (2005.13239); Lu et al. 2022, "Revisiting
design choices in offline model-based reinforcement learning" (2110.04135).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from purejax_bilevel.programs.offline.ensemble import Normaliser, Prediction


def max_distance(prediction: Prediction, normaliser: Normaliser, used: jax.Array) -> jax.Array:
    """Largest distance between the mean next observations of two networks, in normalised units (MOReL; the
    reference's epistemic uncertainty)."""
    means = normaliser(prediction.mean[..., :-1])
    largest = jnp.zeros(means.shape[1:-1], means.dtype)
    for shift in range(1, means.shape[0] // 2 + 1):  # all pairs of networks around a circle
        square = jnp.square(means - jnp.roll(means, shift, 0)).sum(-1)
        both = (used & jnp.roll(used, shift))[:, None]
        largest = jnp.maximum(largest, jnp.where(both, square, 0.0).max(0))
    return jnp.sqrt(largest)


def mean_spread(prediction: Prediction, normaliser: Normaliser, used: jax.Array) -> jax.Array:
    """Norm over the observation of the standard deviation of the networks' means, in normalised units."""
    return jnp.sqrt(_variance_of_means(prediction, normaliser, used).sum(-1))


def max_variance(prediction: Prediction, normaliser: Normaliser, used: jax.Array) -> jax.Array:
    """Largest variance of any network and number of the next observation, as learned (the reference's aleatoric
    uncertainty); the reward's does not count."""
    del normaliser
    largest = jnp.exp(prediction.log_var[..., :-1]).max(-1)
    return jnp.where(used[:, None], largest, 0.0).max(0)


def max_std_norm(prediction: Prediction, normaliser: Normaliser, used: jax.Array) -> jax.Array:
    """Largest norm of a network's standard deviations, with the reward's, as learned (MOPO)."""
    del normaliser
    square = jnp.exp(prediction.log_var).sum(-1)
    return jnp.sqrt(jnp.where(used[:, None], square, 0.0).max(0))


def ensemble_std(prediction: Prediction, normaliser: Normaliser, used: jax.Array) -> jax.Array:
    """Norm over the observation of the mixture's standard deviation, in normalised units (Lu et al. 2022)."""
    weight = (used / used.sum())[:, None, None]
    own = jnp.square(prediction.std[..., :-1] / normaliser.std[: prediction.mean.shape[-1] - 1])
    return jnp.sqrt(((weight * own).sum(0) + _variance_of_means(prediction, normaliser, used)).sum(-1))


def _variance_of_means(prediction: Prediction, normaliser: Normaliser, used: jax.Array) -> jax.Array:
    weight = (used / used.sum())[:, None, None]
    means = normaliser(prediction.mean[..., :-1])
    centre = (weight * means).sum(0)
    return (weight * jnp.square(means - centre)).sum(0)


UNCERTAINTIES: dict[str, Callable[[Prediction, Normaliser, jax.Array], jax.Array]] = {
    "max_distance": max_distance,
    "mean_spread": mean_spread,
    "max_variance": max_variance,
    "max_std_norm": max_std_norm,
    "ensemble_std": ensemble_std,
}
"""Kind -> `(prediction of all networks, normaliser, networks in use [network] as booleans) -> [batch]`."""
ALEATORIC = ("max_variance", "max_std_norm")  # say nothing where variances are not learned
EPISTEMIC_KIND, ALEATORIC_KIND = "max_distance", "max_variance"  # what the reference means by these words


def uncertainty(kind: str, prediction: Prediction, normaliser: Normaliser, used: jax.Array | None = None) -> jax.Array:
    """Uncertainty `[batch]` of a prediction of all networks.

    Args:
        kind: one of `UNCERTAINTIES`.
        prediction: of all networks, `[network, batch, ...]`.
        normaliser: of the data.
        used: which networks count, booleans `[network]`; None: all.
    """
    used = jnp.ones(prediction.mean.shape[0], bool) if used is None else used
    return UNCERTAINTIES[kind](prediction, normaliser, used)

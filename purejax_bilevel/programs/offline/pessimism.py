"""Pessimism: what is made of a model's predictions where the model is uncertain, as one pure function.

What each mode (`modes.py`) does; u is the uncertainty of a prediction, lambda `pessimism` and tau `ood_threshold`:

    penalty                            mean reward of the networks - lambda u
    mopo                               sampled reward - lambda u (Yu et al. 2020, arXiv 2005.13239, equation 4)
    partitioning, morel                u > tau: reward -r_max, terminated (Kidambi et al. 2020, arXiv 2005.05951)
    survival                           reward 1 up to tau, else 0 and terminated
    offline-exploration-penalty        reward lambda u; terminated beyond tau
    offline-exploration-partitioning   reward 0 and terminated beyond tau, 1 between lambda and tau, else as sampled
    underestimation                    lowest sampled reward of the networks, at least -1.00001 r_max
    truncation                         beyond tau the prediction is not used and the rollout is cut, not terminated
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from purejax_bilevel.programs.offline.modes import mode_named

SLACK = 1.00001  # of the bound on underestimated rewards


class Imagined(NamedTuple):
    """What a model says comes next, all `[batch]` but `next_obs`."""

    next_obs: jax.Array  # [batch, obs], sampled from one network
    reward: jax.Array  # sampled from the same one
    terminated: jax.Array  # boolean
    mean_reward: jax.Array  # of the means of all networks
    lowest_reward: jax.Array  # of the samples of all networks
    is_used: jax.Array  # boolean: whether anything is learned from it, and the rollout goes on


def pessimise(
    prediction: Imagined,
    uncertainty: jax.Array,
    mode: str,
    pessimism: jax.Array | float,
    threshold: jax.Array | float,
    r_max: jax.Array | float,
) -> Imagined:
    """Predictions as an agent that does not trust the model should see them.

    Args:
        prediction: of the model.
        uncertainty: of the mode's kind, `[batch]`.
        mode: one of `MODES`.
        pessimism: lambda.
        threshold: tau.
        r_max: size of the reward that stands for a state not to be entered.

    Raises:
        UserError: there is no such mode.
    """
    treatment = mode_named(mode).treatment
    beyond = ~(uncertainty <= threshold)  # what is not a number too
    halted = prediction._replace(terminated=prediction.terminated | beyond)
    zero, one = jnp.zeros_like(prediction.reward), jnp.ones_like(prediction.reward)
    if treatment == "penalty":
        return prediction._replace(reward=prediction.mean_reward - pessimism * uncertainty)
    if treatment == "sampled penalty":
        return prediction._replace(reward=prediction.reward - pessimism * uncertainty)
    if treatment == "partitioning":
        return halted._replace(reward=jnp.where(beyond, -r_max, prediction.reward))
    if treatment == "survival":
        return halted._replace(reward=jnp.where(beyond, zero, one))
    if treatment == "bonus":
        return halted._replace(reward=pessimism * uncertainty)
    if treatment == "band":
        inside = jnp.where(uncertainty > pessimism, one, prediction.reward)
        return halted._replace(reward=jnp.where(beyond, zero, inside))
    if treatment == "underestimation":
        return prediction._replace(reward=jnp.maximum(prediction.lowest_reward, -SLACK * r_max))
    if treatment == "truncation":
        return prediction._replace(is_used=prediction.is_used & ~beyond)
    return prediction


def coefficients(
    pessimism: jax.Array | float,
    threshold: jax.Array | float,
    largest_reward: jax.Array | float,
    largest: jax.Array | float,
) -> tuple[jax.Array | float, jax.Array | float]:
    """Lambda and tau from relative ones: in units of r_max / u_max and of u_max, so that they transfer between tasks.

    With lambda 1 the most uncertain transition of the dataset loses as much as the largest reward of the dataset is.

    Args:
        pessimism: relative lambda.
        threshold: relative tau.
        largest_reward: r_max, largest size of a reward of the dataset.
        largest: u_max, largest uncertainty of a transition of the dataset.
    """
    return pessimism * largest_reward / largest, threshold * largest

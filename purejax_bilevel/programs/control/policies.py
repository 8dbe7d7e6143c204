"""Policies for continuous actions in [-1, 1]: a diagonal Gaussian through tanh, made of distrax's bijectors.

A policy network gives `outputs` `[2 action, n]`, the means and the logarithms of the standard deviations. An action is
tanh(mean + std * noise): the noise is an argument, so that a loss and its derivatives can share it. Arrays are features
first; log-probabilities are sums over the action's dimensions. Only this file imports distrax.
"""

import distrax
import jax
import jax.numpy as jnp

LOG_STD_RANGE = (-10.0, 2.0)
LARGEST_ACTION = 1.0 - 1e-6  # the largest whose inverse tanh is safe in 32 bits


def _squash(outputs: jax.Array, log_std_range: tuple[float, float] = LOG_STD_RANGE) -> distrax.Bijector:
    """From standard normal noise to actions, `[action, n]` both."""
    mean, log_std = jnp.split(outputs, 2)
    return distrax.Chain([distrax.Tanh(), distrax.ScalarAffine(mean, log_scale=jnp.clip(log_std, *log_std_range))])


def sample_and_log_prob(
    outputs: jax.Array, noise: jax.Array, log_std_range: tuple[float, float] = LOG_STD_RANGE
) -> tuple[jax.Array, jax.Array]:
    """Actions and their log-probabilities.

    The density is evaluated at the noise itself, never at the action: exact however saturated tanh is and however small
    the standard deviation.

    Args:
        outputs: of the policy network, `[2 action, n]`.
        noise: standard normals `[action, n]`.
        log_std_range: to which the logarithms of the standard deviations are clipped.

    Returns:
        Actions `[action, n]`, differentiable in `outputs` (reparametrised), and log-probabilities `[n]`.
    """
    action, log_det = _squash(outputs, log_std_range).forward_and_log_det(noise)
    return action, (_standard_normal().log_prob(noise) - log_det).sum(0)


def log_prob(outputs: jax.Array, action: jax.Array) -> jax.Array:
    """Log-probabilities `[n]` of given actions `[action, n]`; actions at the bounds count as just inside of them."""
    inside = jnp.clip(action, -LARGEST_ACTION, LARGEST_ACTION)
    return distrax.Transformed(_standard_normal(), _squash(outputs)).log_prob(inside).sum(0)


def mean_action(outputs: jax.Array) -> jax.Array:
    """The action `[action, n]` without noise: tanh of the Gaussian's mean."""
    return jnp.tanh(jnp.split(outputs, 2)[0])


def _standard_normal() -> distrax.Normal:
    zero = jnp.zeros(())
    return distrax.Normal(zero, jnp.ones_like(zero))

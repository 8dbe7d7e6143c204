"""Running normalisation of observations and rewards, as PureJaxRL's wrappers do it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from purejax_bilevel.programs.learned_optimizers.settings import PPO

START_WEIGHT, FLOOR = 1e-4, 1e-8


class Moments(NamedTuple):
    """Mean and variance `[...]` of all that was seen, and how much that was."""

    mean: jax.Array
    variance: jax.Array
    weight: jax.Array


class Returns(NamedTuple):
    """What rewards are scaled by."""

    moments: Moments  # [], of discounted returns
    discounted: jax.Array  # [envs], returns so far


class Normaliser(NamedTuple):
    """Statistics of one agent; None for what is not normalised."""

    obs: Moments | None  # [obs]
    reward: Returns | None


def _start(shape: tuple[int, ...]) -> Moments:
    return Moments(jnp.zeros(shape), jnp.ones(shape), jnp.asarray(START_WEIGHT, jnp.result_type(float)))


def _updated(moments: Moments, batch: jax.Array) -> Moments:
    """With a batch `[batch, ...]` more (Chan et al. 1983)."""
    size = batch.shape[0]
    weight = moments.weight + size
    delta = batch.mean(0) - moments.mean
    squares = moments.variance * moments.weight + batch.var(0) * size + delta**2 * moments.weight * size / weight
    return Moments(moments.mean + delta * size / weight, squares / weight, weight)


def init(config: PPO, obs: jax.Array) -> tuple[Normaliser, jax.Array]:
    """The statistics after a reset, and its observations `[envs, obs]` normalised."""
    normaliser = Normaliser(
        _updated(_start(obs.shape[1:]), obs) if config.normalize_observations else None,
        Returns(_start(()), jnp.zeros(obs.shape[0])) if config.normalize_rewards else None,
    )
    return normaliser, observations(normaliser, obs)


def observe(normaliser: Normaliser, obs: jax.Array) -> tuple[Normaliser, jax.Array]:
    """The statistics after observations `[envs, obs]`, and these normalised by them."""
    if normaliser.obs is not None:
        normaliser = normaliser._replace(obs=_updated(normaliser.obs, obs))
    return normaliser, observations(normaliser, obs)


def observations(normaliser: Normaliser, obs: jax.Array) -> jax.Array:
    """Observations `[..., obs]`, normalised; the statistics stay."""
    if normaliser.obs is None:
        return obs
    return (obs - normaliser.obs.mean) / jnp.sqrt(normaliser.obs.variance + FLOOR)


def reward(
    normaliser: Normaliser, reward: jax.Array, done: jax.Array, discount: jax.Array | float
) -> tuple[Normaliser, jax.Array]:
    """The statistics after rewards `[envs]`, and these divided by the deviation of discounted returns.

    As in the original, the return restarts with the last reward of an episode.
    """
    if normaliser.reward is None:
        return normaliser, reward
    discounted = normaliser.reward.discounted * discount * (1.0 - done) + reward
    moments = _updated(normaliser.reward.moments, discounted)
    normaliser = normaliser._replace(reward=Returns(moments, discounted))
    return normaliser, reward / jnp.sqrt(moments.variance + FLOOR)

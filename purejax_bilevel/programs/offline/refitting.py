"""Fitting an ensemble again and again to a replay buffer that grows, inside a compiled program.

Which rows only measure the error is decided by their places in the buffer, every fifth with the default `held_out`: no
network has ever learned from one of them, whatever was fitted before. (In MBPO's code they are drawn anew each time.)
"""

import jax
import jax.numpy as jnp

from purejax_bilevel.programs.offline import ensemble, fitting
from purejax_bilevel.programs.offline.ensemble import Architecture, Normaliser, Transitions
from purejax_bilevel.programs.offline.fitting import Fit
from purejax_bilevel.programs.offline.settings import Fitting

SHORTEST_EPOCH = 50  # steps: a few rows make a few batches, and patience would end before anything could improve


def period(config: Fitting) -> int:
    """One in so many places of the buffer is held out; the capacity must be a multiple of it."""
    return max(2, round(1 / config.held_out))


def learned_places(number: jax.Array, every: int) -> jax.Array:
    """Places of the rows that are learned from, by their numbers 0, 1, ..."""
    return number + number // (every - 1)


def held_out_places(number: jax.Array, every: int) -> jax.Array:
    """Places of the rows that are held out, by their numbers 0, 1, ..."""
    return every * number + every - 1


def normaliser_of(rows: jax.Array, stored: jax.Array, obs_dim: int) -> Normaliser:
    """Mean and standard deviation of observations and actions of the first rows.

    Args:
        rows: `[capacity, row]` of `replay`.
        stored: how many of them there are.
        obs_dim: entries of an observation.
    """
    columns = jnp.concatenate([rows[:, :obs_dim], rows[:, 2 * obs_dim : -2]], 1)
    is_stored = (jnp.arange(rows.shape[0]) < stored)[:, None]
    mean = jnp.where(is_stored, columns, 0.0).sum(0) / stored
    square = jnp.where(is_stored, jnp.square(columns - mean), 0.0).sum(0) / jnp.maximum(stored - 1, 1)
    std = jnp.sqrt(square)
    return Normaliser(mean, jnp.where(std > ensemble.SMALLEST_STD, std, 1.0))


def refit(
    config: Fitting, architecture: Architecture, fit: Fit, rows: jax.Array, stored: jax.Array, key: jax.Array
) -> tuple[Fit, jax.Array, jax.Array]:
    """Fits until no network gets better, from the best networks so far.

    Args:
        config: of one member.
        architecture: of the ensemble.
        fit: of the last time.
        rows: `[capacity, row]` of `replay`, the capacity a multiple of `period`.
        stored: how many of them there are, at least one held out and one not.
        key: consumed.

    Returns:
        The fit, the mean loss of its last epoch, and its epochs.
    """
    every, obs_dim = period(config), architecture.obs_dim
    held_out, normaliser = stored // every, fit.normaliser
    learned = stored - held_out
    if not config.raw_inputs:
        normaliser = normaliser_of(rows, stored, obs_dim)
    seed_key, key = jax.random.split(key)

    def draw(key: jax.Array) -> Transitions:
        if config.no_bootstrap:
            number = jax.random.randint(key, (config.model_batch_size,), 0, learned)
        else:
            number = ensemble.bootstrapped(key, architecture.networks, config.model_batch_size, learned, seed_key)
        return fitting.transitions(rows[learned_places(number, every)], obs_dim)

    most = min(config.most_held_out, rows.shape[0] // every)
    spread = jnp.arange(most) * jnp.maximum(held_out / most, 1.0)  # all of them, or as many spread over them
    measured = fitting.transitions(rows[held_out_places(spread.astype(jnp.int32) % held_out, every)], obs_dim)
    steps = jnp.int32(config.model_epoch_steps or jnp.maximum(learned // config.model_batch_size, SHORTEST_EPOCH))

    def goes_on(carry: tuple[Fit, jax.Array, jax.Array]) -> jax.Array:
        fit, _, epochs = carry
        return ~fit.is_over & (epochs < config.model_epochs)

    def one_more(carry: tuple[Fit, jax.Array, jax.Array]) -> tuple[Fit, jax.Array, jax.Array]:
        fit, _, epochs = carry
        own_key = jax.random.fold_in(key, epochs)
        fit, loss = fitting.epoch(config, architecture, fit, draw, measured, own_key, steps)
        return fit, loss, epochs + 1

    return jax.lax.while_loop(goes_on, one_more, (fitting.again(config, fit, normaliser), jnp.zeros(()), jnp.int32(0)))

"""Fitting an ensemble to a dataset until it gets no better: settings, state and one epoch, for any program's stage.

    state = begin(config, architecture, normaliser, key)
    state, loss = epoch(config, architecture, state, draw, held_out, key, steps)    # many times, until
    state.is_over
    model = fitted(state)                                                           # the best networks, ranked

Each network draws its own batches from its own resample of the rows and is kept as it was when its error on held-out
rows was lowest. Fitting is over when in `model_patience` epochs no network has improved by `model_improvement` (MBPO,
Janner et al. 2019, whose code has 5 epochs and 1 %).
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from purejax_bilevel.errors import UserError
from purejax_bilevel.programs.offline import ensemble
from purejax_bilevel.programs.offline.datasets import Dataset
from purejax_bilevel.programs.offline.ensemble import Architecture, Networks, Normaliser, Transitions
from purejax_bilevel.programs.offline.settings import Fitting

HEAD_UNITS, HEAD_LAYERS = 64, 3  # of the trunks of reward and terminals


def architecture_of(config: Fitting, obs_dim: int, action_dim: int, learned_terminals: bool = False) -> Architecture:
    """The ensemble that settings describe."""
    head = (HEAD_UNITS,) * HEAD_LAYERS
    return Architecture(
        obs_dim,
        action_dim,
        networks=config.model_networks,
        hidden=(config.model_hidden_dim,) * config.model_layers,
        reward_hidden=() if config.model_joint else head,
        probabilistic=config.model_type == "probabilistic",
        activation=config.model_activation,
        layer_norm=config.model_layer_norm,
        normalise_targets=not config.raw_targets,
        trainable_bounds=not config.fixed_bounds,
        terminal_hidden=head if learned_terminals else None,
    )


# --- rows -------------------------------------------------------------------------------------------------------------


class Split(NamedTuple):
    """How many rows there are to learn from and to measure on."""

    learned: int
    held_out: int


def split_of(config: Fitting, rows: int, source: str = "the dataset") -> Split:
    """The sizes of the two parts of a dataset.

    Raises:
        UserError: too few rows.
    """
    held_out = min(int(config.held_out * rows), config.most_held_out)
    if not held_out or rows - held_out < config.model_batch_size:
        raise UserError(
            f"{source} has {rows} rows, which is too few for --model_batch_size {config.model_batch_size} and "
            f"--held_out {config.held_out:g}."
        )
    return Split(rows - held_out, held_out)


def epoch_steps(config: Fitting, split: Split) -> int:
    """Steps of an epoch."""
    return config.model_epoch_steps or split.learned // config.model_batch_size


@functools.cache  # programs that share a dataset must return the same object
def shared_rows(dataset: Dataset, raw_inputs: bool) -> Mapping[str, np.ndarray]:
    """What all members read: `rows` as `Dataset.rows`, a random `order` of them, `mean` and `std` of the columns.

    The held-out rows are the last ones of the order, the same for all members.
    """
    inputs = np.concatenate([dataset.obs, dataset.action], 1)
    count = inputs.shape[1]
    std = inputs.std(0, ddof=1, dtype=np.float64)
    std = np.where(std > ensemble.SMALLEST_STD, std, 1.0)
    return {
        "rows": dataset.rows,
        "order": np.random.default_rng(0).permutation(len(dataset)).astype(np.int32),
        "mean": np.zeros(count, np.float32) if raw_inputs else inputs.mean(0, dtype=np.float64).astype(np.float32),
        "std": np.ones(count, np.float32) if raw_inputs else std.astype(np.float32),
    }


def transitions(rows: jax.Array, obs_dim: int) -> Transitions:
    """Rows `[..., 2 obs + action + 2]` of `Dataset.rows` by their names."""
    obs, next_obs, action, scalars = jnp.split(rows, [obs_dim, 2 * obs_dim, rows.shape[-1] - 2], -1)
    return Transitions(obs, action, scalars[..., 0], next_obs, scalars[..., 1])


def rows_at(shared: Mapping[str, jax.Array], places: jax.Array, obs_dim: int) -> Transitions:
    """The rows at places `[...]` of the random order."""
    return transitions(shared["rows"][shared["order"][places]], obs_dim)


def held_out_rows(shared: Mapping[str, jax.Array], split: Split, obs_dim: int) -> Transitions:
    """The rows that nothing is learned from, `[held out, ...]`."""
    return rows_at(shared, split.learned + jnp.arange(split.held_out), obs_dim)


def drawer(
    config: Fitting, architecture: Architecture, split: Split, shared: Mapping[str, jax.Array], seed_key: jax.Array
) -> Callable[[jax.Array], Transitions]:
    """A function that draws a batch with a key: `[network, batch, ...]`, or `[batch, ...]` without the bootstrap.

    Args:
        config: of one member.
        architecture: of the ensemble.
        split: of the rows.
        shared: of `shared_rows`.
        seed_key: of the networks' resamples, the same for all epochs of a member.
    """
    size, rows = config.model_batch_size, split.learned

    def draw(key: jax.Array) -> Transitions:
        if config.no_bootstrap:
            places = jax.random.randint(key, (size,), 0, rows)
        else:
            places = ensemble.bootstrapped(key, architecture.networks, size, rows, seed_key)
        return rows_at(shared, places, architecture.obs_dim)

    return draw


# --- state ------------------------------------------------------------------------------------------------------------


class Fit(flax.struct.PyTreeNode):
    """An ensemble that is being fitted, with the best of each network so far."""

    networks: Networks
    optimizer: optax.OptState
    normaliser: Normaliser
    errors: jax.Array  # [network], on held-out rows
    best: Networks
    best_errors: jax.Array  # [network]
    milestones: jax.Array  # [network], the error that an improvement is measured from
    epochs_since: jax.Array  # [], epochs since the last improvement
    is_over: jax.Array  # [], whether that is too long


class Model(NamedTuple):
    """A fitted ensemble: what other runs may start from."""

    networks: Networks
    normaliser: Normaliser
    ranking: jax.Array  # [network], numbers of the networks, the best first
    errors: jax.Array  # [network], on held-out rows


def begin(config: Fitting, architecture: Architecture, normaliser: Normaliser, key: jax.Array) -> Fit:
    """A fresh ensemble; the key is consumed."""
    networks = ensemble.init(architecture, key)
    infinite = jnp.full(architecture.networks, jnp.inf)
    state = ensemble.optimizer(config.model_lr, config.model_weight_decay).init(networks)
    return Fit(networks, state, normaliser, infinite, networks, infinite, infinite, jnp.int32(0), jnp.bool_(False))


def again(config: Fitting, fit: Fit, normaliser: Normaliser) -> Fit:
    """The best networks, to be fitted to other rows: nothing is known of their errors there.

    Adam starts afresh: steps in units of the last fit's small gradients would undo what was learned.
    """
    infinite = jnp.full_like(fit.errors, jnp.inf)
    return fit.replace(
        networks=fit.best,
        optimizer=ensemble.optimizer(config.model_lr, config.model_weight_decay).init(fit.best),
        normaliser=normaliser,
        errors=infinite,
        best_errors=infinite,
        milestones=infinite,
        epochs_since=jnp.int32(0),
        is_over=jnp.bool_(False),
    )


def begun_from(config: Fitting, model: Model) -> Fit:
    """An ensemble that another run has fitted, to be fitted on; its optimiser starts afresh."""
    model = jax.tree.map(jnp.asarray, model)
    state = ensemble.optimizer(config.model_lr, config.model_weight_decay).init(model.networks)
    networks, errors = model.networks, model.errors
    return Fit(networks, state, model.normaliser, errors, networks, errors, errors, jnp.int32(0), jnp.bool_(False))


def epoch(
    config: Fitting,
    architecture: Architecture,
    fit: Fit,
    draw: Callable[[jax.Array], Transitions],
    held_out: Transitions,
    key: jax.Array,
    steps: int | jax.Array,
) -> tuple[Fit, jax.Array]:
    """Steps on batches, then the errors on held-out rows.

    Args:
        config: of one member.
        architecture: of the ensemble.
        fit: before the epoch.
        draw: gives a batch for a key.
        held_out: rows that measure the error, `[held out, ...]`.
        key: consumed.
        steps: of the epoch; may be traced.

    Returns:
        After the epoch; the mean loss of its steps.
    """

    def step(carry: tuple[Networks, optax.OptState], number: jax.Array) -> tuple[Any, jax.Array]:
        networks, state = carry
        batch, rates = draw(jax.random.fold_in(key, number)), (config.model_lr, config.model_weight_decay)
        networks, state, found = ensemble.train_step(architecture, networks, fit.normaliser, state, batch, *rates)
        return (networks, state), found.loss

    (networks, optimizer), loss = _repeated(step, (fit.networks, fit.optimizer), steps)
    errors = ensemble.validation_errors(architecture, networks, fit.normaliser, held_out)
    return _judged(config, fit.replace(networks=networks, optimizer=optimizer), errors), loss


def _repeated(
    step: Callable[[Any, jax.Array], tuple[Any, jax.Array]], carry: Any, steps: int | jax.Array
) -> tuple[Any, jax.Array]:
    """The carry after some steps, and the mean of what they return beside it."""
    if isinstance(steps, int):
        carry, losses = jax.lax.scan(step, carry, jnp.arange(steps))
        return carry, losses.mean()

    def added(number: jax.Array, found: tuple[Any, jax.Array]) -> tuple[Any, jax.Array]:
        carry, loss = step(found[0], number)
        return carry, found[1] + loss

    carry, total = jax.lax.fori_loop(0, steps, added, (carry, jnp.zeros(())))
    return carry, total / steps


def _judged(config: Fitting, fit: Fit, errors: jax.Array) -> Fit:
    """Keeps each network that is better than before."""
    better = errors < fit.best_errors
    improved = errors < (1.0 - config.model_improvement) * fit.milestones

    def keep(new: jax.Array, old: jax.Array) -> jax.Array:
        return jnp.where(better.reshape(-1, *(1,) * (new.ndim - 1)), new, old)

    epochs_since = jnp.where(improved.any(), 0, fit.epochs_since + 1)
    return fit.replace(
        errors=errors,
        best=jax.tree.map(keep, fit.networks, fit.best),
        best_errors=jnp.where(better, errors, fit.best_errors),
        milestones=jnp.where(improved, errors, fit.milestones),
        epochs_since=epochs_since,
        is_over=epochs_since >= config.model_patience,
    )


def fitted(fit: Fit) -> Model:
    """The best networks, ranked by their errors on held-out rows."""
    return Model(fit.best, fit.normaliser, jnp.argsort(fit.best_errors).astype(jnp.int32), fit.best_errors)

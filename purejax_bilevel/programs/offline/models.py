"""Ensembles that other runs left: read, checked against the dataset, and what they are made of."""

import functools
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from purejax_bilevel.configuration import fields, replace, validate
from purejax_bilevel.errors import UserError
from purejax_bilevel.programs.offline import ensemble, fitting
from purejax_bilevel.programs.offline.datasets import Dataset
from purejax_bilevel.programs.offline.ensemble import Architecture
from purejax_bilevel.programs.offline.ensemble_program import KIND
from purejax_bilevel.programs.offline.fitting import Model
from purejax_bilevel.programs.offline.settings import Fitting, Offline

C = TypeVar("C", bound=Offline)
PARTS = (
    "model_networks",
    "model_type",
    "model_hidden_dim",
    "model_layers",
    "model_joint",
    "model_activation",
    "model_layer_norm",
    "raw_inputs",
    "raw_targets",
)  # settings that say what an ensemble is made of
SAME = 1e-5  # by how much, in standard deviations, the means and deviations of the data may differ


@functools.cache  # programs that share an ensemble must return the same object
def load(place: str, architecture: Architecture) -> Model:
    """An ensemble that a run left; numpy arrays.

    Args:
        place: `runs/x` (its first member) or `runs/x#3`.
        architecture: what it must be.

    Raises:
        UserError: it is not there, not whole, or of other sizes.
    """
    from purejax_bilevel.runtime import artefacts

    where, member = artefacts.place_and_member(place)
    found: Model = artefacts.load(where, KIND).member(member, _shapes(architecture))
    return found


def _shapes(architecture: Architecture) -> Model:
    def made() -> Model:
        networks = ensemble.init(architecture, jax.random.key(0))
        count = architecture.networks
        return Model(
            networks, ensemble.no_normaliser(architecture), jnp.arange(count, dtype=jnp.int32), jnp.ones(count)
        )

    with jax.enable_x64(False):
        shapes: Model = jax.eval_shape(made)
    return shapes


def with_architecture(config: C, data: Dataset) -> C:
    """The configuration with the static settings of the ensemble that it names.

    Raises:
        UserError: there is none, or it was fitted to another dataset.
    """
    arrays, saved = _read(config)
    told = f"--dataset {config.dataset}"
    _check_sizes(config, arrays["normaliser.mean"], told, data.obs_dim, data.action_dim)
    _check_data(config, data, arrays["normaliser.mean"], arrays["normaliser.std"])
    return _with_settings(config, saved)


def with_parts(config: C, environment: str, obs_dim: int, action_dim: int) -> C:
    """The configuration with what the ensemble that it names is made of, to be fitted on to other data.

    Whether terminals are learned is the ensemble's; how it is fitted is the configuration's own.

    Args:
        config: has `model`, the place of one.
        environment: where the policy acts.
        obs_dim: of the environment.
        action_dim: of the environment.

    Raises:
        UserError: there is none, or it is for other observations or actions.
    """
    arrays, saved = _read(config)
    _check_sizes(config, arrays["normaliser.mean"], f"--env_name {environment}", obs_dim, action_dim)
    learned = any(name.startswith("networks.trunks.terminal") for name in arrays)
    parts = {name: value for name, value in saved.items() if name in PARTS}
    return _with_settings(config, parts | {"model_terminals": "learned" if learned else config.model_terminals})


def _read(config: Offline) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Arrays and settings of the ensemble that a configuration names."""
    from purejax_bilevel.runtime import artefacts

    where, member = artefacts.place_and_member(config.model)
    artefact = artefacts.load(where, KIND)
    arrays = artefact.member(member)
    normaliser = [arrays.get(f"normaliser.{name}") for name in ("mean", "std")]
    if any(np.ndim(array) != 1 for array in normaliser):
        raise UserError(f"--model {config.model} has no normaliser: it is no ensemble of this program.")
    return arrays, artefact.about["config"]


def _with_settings(config: C, saved: dict[str, Any]) -> C:
    own = {field.name for field in fields(Fitting, is_traced=False)}
    return validate(replace(config, **{name: saved[name] for name in own & set(saved)}))


def _check_sizes(config: Offline, mean: np.ndarray, told: str, obs_dim: int, action_dim: int) -> None:
    if len(mean) != obs_dim + action_dim:
        raise UserError(
            f"--model {config.model} predicts from {len(mean)} numbers, observations and actions of {told} have "
            f"{obs_dim} and {action_dim}."
        )


def _check_data(config: Offline, data: Dataset, mean: np.ndarray, std: np.ndarray) -> None:
    told = f"--model {config.model}"
    own = fitting.shared_rows(data, bool((mean == 0).all() and (std == 1).all()))
    if np.abs((mean - own["mean"]) / own["std"]).max() > SAME or np.abs(std / own["std"] - 1).max() > SAME:
        raise UserError(f"{told} was fitted to another dataset than --dataset {config.dataset}: fit one to this.")

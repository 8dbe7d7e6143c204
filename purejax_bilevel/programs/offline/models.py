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
from purejax_bilevel.programs.offline.fitting import Fitting, Model

C = TypeVar("C", bound=Fitting)
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
    from purejax_bilevel.runtime import artefacts

    where, member = artefacts.place_and_member(config.model)  # type: ignore[attr-defined]
    artefact = artefacts.load(where, KIND)
    arrays = artefact.member(member)
    normaliser = [arrays.get(f"normaliser.{name}") for name in ("mean", "std")]
    if any(np.ndim(array) != 1 for array in normaliser):
        raise UserError(f"--model {config.model} has no normaliser: it is no ensemble of this program.")  # type: ignore[attr-defined]
    _check_data(config, data, *normaliser)
    saved = artefact.about["config"]
    own = {field.name for field in fields(Fitting, is_traced=False)}
    return validate(replace(config, **{name: saved[name] for name in own & set(saved)}))


def _check_data(config: Any, data: Dataset, mean: np.ndarray, std: np.ndarray) -> None:
    told = f"--model {config.model}"
    if len(mean) != data.obs_dim + data.action_dim:
        raise UserError(
            f"{told} predicts from {len(mean)} numbers, observations and actions of --dataset {config.dataset} have "
            f"{data.obs_dim} and {data.action_dim}."
        )
    own = fitting.shared_rows(data, bool((mean == 0).all() and (std == 1).all()))
    if np.abs((mean - own["mean"]) / own["std"]).max() > SAME or np.abs(std / own["std"] - 1).max() > SAME:
        raise UserError(f"{told} was fitted to another dataset than --dataset {config.dataset}: fit one to this.")

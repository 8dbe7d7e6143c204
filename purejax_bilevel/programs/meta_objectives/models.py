"""Learned objectives that were saved: those of runs, and the one that comes with this package."""

import functools
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from purejax_bilevel.errors import UserError
from purejax_bilevel.programs.meta_objectives import network
from purejax_bilevel.programs.meta_objectives.network import Weights
from purejax_bilevel.programs.meta_objectives.settings import defects
from purejax_bilevel.runtime import artefacts

SHIPPED = Path(__file__).parent / "shipped"


class Model(NamedTuple):
    """A learned objective and how it is told the lifetime."""

    weights: Weights  # numpy
    raw_clocks: bool  # it was trained with B4

    @property
    def has_clocks(self) -> bool:
        return self.weights.input_kernel.shape[0] > network.NUM_INPUTS

    @property
    def target_width(self) -> int:
        """Categories of the prediction that agents must have."""
        return self.weights.target_kernel.shape[1]


@functools.cache  # the same arrays each time, so that sub-programs share them
def load(place: str) -> Model:
    """Reads a learned objective.

    Args:
        place: `runs/x`, `runs/x#3` (member 3) or the path of an artefact's file; "": the one of this package.

    Raises:
        UserError: it is not there, or of another kind or shape.
    """
    path, member = artefacts.place_and_member(place or str(SHIPPED))
    found = artefacts.load(path, network.ARTEFACT_KIND)
    arrays = found.member(member)
    if set(arrays) != set(Weights._fields):
        raise UserError(f"{path} does not have the arrays of a learned objective: {', '.join(Weights._fields)}.")
    plain: dict[str, Any] = {name: np.asarray(array) for name, array in arrays.items()}
    weights = Weights(**plain)
    _check_shapes(path, weights)
    return Model(weights, "B4" in defects(str(found.about["config"].get("compat", ""))))


def _check_shapes(path: str, weights: Weights) -> None:
    """Sizes that fit each other, as those of any run do."""
    inputs, outputs = (np.shape(kernel) for kernel in (weights.input_kernel, weights.target_kernel))
    fit = len(inputs) == len(outputs) == 2 and inputs[0] in (
        network.NUM_INPUTS,
        network.NUM_INPUTS + network.NUM_CLOCKS,
    )
    if fit:
        has_clocks = inputs[0] > network.NUM_INPUTS
        wanted = network.shapes(outputs[1], weights.embed_bias.size, outputs[0], has_clocks)
        fit = all(np.shape(array) == shape for array, shape in zip(weights, wanted, strict=True))
    if not fit:
        found = ", ".join(f"{name} {list(np.shape(array))}" for name, array in weights._asdict().items())
        raise UserError(f"the arrays of {path} do not fit together as a learned objective: {found}.")

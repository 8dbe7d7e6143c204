"""Warns of linear solvers that did not solve: their hypergradients are not those of implicit differentiation.

The programs log `solver_residual`, |b - (Hessian + damping) x| / |b| for a solver that was to make it 0, as a mean
since the last evaluation. 1 is what x = 0 leaves.
"""

import collections
from typing import Any

import numpy as np
import xarray

from purejax_bilevel.members import format_value
from purejax_bilevel.results import statistics
from purejax_bilevel.results.dataset import SEED, STEP, setting_dimensions, setting_labels

VARIABLE, SOLVER = "solver_residual", "with_inv_jac"
LARGE = 0.1
ADVICE = {
    "cg": "raise --damping ({damping}), since the Hessian may be indefinite, or --solver_steps ({solver_steps})",
    "gmres": "raise --solver_steps ({solver_steps}), the size of its Krylov space, or --damping ({damping})",
    "neumann": "raise --solver_steps ({solver_steps}) or --neumann_step_size ({neumann_step_size}); where the residual "
    "is above 1 the series diverges, then raise neither but lower the step size",
    "dense": "raise --damping ({damping}), since the Hessian is nearly singular in 32 bits",
}


def warnings(dataset: xarray.Dataset) -> list[str]:
    """A sentence for each setting whose median residual over seeds and evaluations is above `LARGE`.

    Args:
        dataset: of a run, or of one agent of a sweep.

    Returns:
        Sentences that name agent, setting, solver, residual and what to change; none where no solver was used.
    """
    config = dataset.attrs.get("config", {})
    if VARIABLE not in dataset or (SOLVER not in config and SOLVER not in dataset.coords):
        return []
    residuals = dataset[VARIABLE].transpose(*setting_dimensions(dataset), SEED, STEP).values
    residuals = residuals.reshape(-1, *residuals.shape[-2:])
    failed = statistics.failed_members(dataset)
    agent = str(dataset.attrs.get("agent") or config.get("agent_type") or dataset.attrs["program"])
    sentences = []
    for setting, values, ended in zip(setting_labels(dataset), residuals, failed, strict=True):
        measured = values[~ended & np.isfinite(values).any(axis=-1)]
        residual = float(np.nanmedian(measured)) if measured.size else 0.0
        if residual > LARGE:
            sentences.append(_sentence(agent, setting, {**config, **setting}, residual))
    return sentences


def _values(value: Any) -> str:
    return " ".join(format_value(each) for each in (value if isinstance(value, list) else [value]))


def _sentence(agent: str, setting: dict[str, Any], config: dict[str, Any], residual: float) -> str:
    solver = str(config[SOLVER])
    where = ", ".join([agent, *(f"{name}={format_value(value)}" for name, value in setting.items())])
    values = collections.defaultdict(lambda: "not set", {name: _values(value) for name, value in config.items()})
    advice = ADVICE.get(solver, "change its settings").format_map(values)
    return (
        f"{where}: the solver {solver} left a relative residual of {residual:.2g} (median over seeds and evaluations), "
        f"so its hypergradients are not those of implicit differentiation; {advice}."
    )

"""What came out of a run: host arrays of all members, and the labelled results that they become."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray

from purejax_bilevel.configuration import to_dict
from purejax_bilevel.program import Configuration, Measure, Part
from purejax_bilevel.results import dataset as datasets
from purejax_bilevel.runtime.schedule import StageSchedule


@dataclasses.dataclass
class Outcome:
    """What came out of a run, per part: host arrays of all members, in every process.

    `state` is the exception: of several processes only process 0 has it, and only if there is a folder; else it is [].
    """

    steps: int
    rows: list[dict[str, np.ndarray]]
    failed: list[np.ndarray]
    state: list[Any]
    compile_seconds: float
    run_seconds: float
    num_traces: int
    bytes_per_member: list[int]
    stage_of: dict[str, str] = dataclasses.field(default_factory=dict)  # of what is not measured in the last stage


def last_values(array: np.ndarray) -> np.ndarray:
    """The last row `[members, ...]` of `[members, evaluations, ...]` that holds numbers: a member may be done early."""
    members, rows = array.shape[:2]
    there = ~np.isnan(array.reshape(members, rows, -1)).all(-1)
    last = np.where(there.any(1), rows - 1 - there[:, ::-1].argmax(1), rows - 1)
    return array[np.arange(members), last]


def to_dataset(
    part: Part, outcome: Outcome, number: int, config: Configuration, attrs: dict[str, Any]
) -> xarray.Dataset:
    """The labelled results of one part.

    Args:
        part: the sub-program and its members.
        outcome: from `train`.
        number: of the part.
        config: the configuration as the user wrote it.
        attrs: further attributes.
    """
    rows = outcome.rows[number]
    final_names = part.program.finals
    series = {name: array for name, array in rows.items() if name not in final_names}
    finals = {name: last_values(rows[name]) for name in final_names} | {"failed": outcome.failed[number]}
    about = {
        "program": part.program.name,
        "title": config.title,
        "environment": getattr(config, "env_name", ""),
        "config": {name: value for name, value in to_dict(config).items() if name not in part.program.adapts},
        "versions": datasets.collect_versions(),
        "headline": part.program.headline,
        "figures": part.program.figures,
        "tables": [measure.name for measure in part.program.measures if measure.tabled],
        "compile_seconds": outcome.compile_seconds,
        "run_seconds": outcome.run_seconds,
        "step_name": part.program.step_unit,
        "ends_early": part.program.stages[-1].done is not None,
        "bytes_per_member": outcome.bytes_per_member[number],
        **attrs,
    }
    schedule = StageSchedule.of(part.program)
    *earlier, steps = (schedule.row_steps(stage) for stage in schedule.stages)
    described = _described(part.program.measures, outcome.stage_of)
    named = dict(zip(schedule.names, earlier, strict=False))
    dataset = datasets.build_dataset(part.grid, steps, series, finals, about, described, named)
    return dataset.assign_coords({name: list(labels) for name, labels in part.program.labels.items()})


def _described(measures: Sequence[Measure], stage_of: dict[str, str]) -> dict[str, dict[str, Any]]:
    """What the results say of each variable."""
    return {
        measure.name: {
            "long_name": measure.text,
            "dims": measure.dims,
            "stage": stage_of.get(measure.name, ""),
            **{key: value for key in ("units", "better") if (value := getattr(measure, key))},
        }
        for measure in measures
    }

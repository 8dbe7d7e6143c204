"""What a sweep reports: as its file says, the scores of each agent's settings and which of them is best.

The best setting is chosen on seeds that are not reported. Members that failed are counted against a setting when it is
chosen and left out of its numbers.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray

from purejax_bilevel.errors import UserError
from purejax_bilevel.results import dataset as datasets
from purejax_bilevel.results import plots, statistics
from purejax_bilevel.results.checks import choice, known_entries, mapping_of, number_of, text_of
from purejax_bilevel.results.dataset import SEED, STEP, setting_dimensions
from purejax_bilevel.results.statistics import Estimate, ranking, setting_scores, stratified_bootstrap_interval

SELECTION = "selection_score"
NEEDED = {"sensitivity": "axis", "curves": "variable", "own": "figure"}  # by kind of figure


# ---------------------------------------------------------------- what a sweep file says


@dataclasses.dataclass(frozen=True)
class Reporting:
    """What is measured and shown.

    Args:
        variable: what is reported; by default the program's final or headline variable.
        over: share of the run, counted from its end, that a series is averaged over; 0: the last evaluation.
        select_by: what chooses the best setting; by default `variable`.
        select_over: as `over`, for `select_by`.
        solved: score regarded as solved, for the optimality gap.
        baseline: label of an agent whose mean on each task all scores are divided by, in a section of the report.
        figures: the study's own, first in the report: {kind: sensitivity, axis: lr}, {kind: curves, variable: x} or
            {kind: own, figure: x}, x being a name in the FIGURES of the module that draws the program's results; for
            own may stand how the program's name begins.
    """

    variable: str = ""
    over: float = 0.0
    select_by: str = ""
    select_over: float | None = None
    solved: float | None = None
    baseline: str = ""
    figures: tuple = ()


def reporting(given: Any) -> Reporting:
    """The section `report` of a sweep file.

    Raises:
        UserError: an unknown entry or a value that is not allowed.
    """
    stated = known_entries(given, [field.name for field in dataclasses.fields(Reporting)], "report")
    values = {name: value for name, value in stated.items() if value not in (None, "")}
    for name in ("variable", "select_by", "baseline"):
        text_of(values.get(name, "the default"), f"report: {name}")
    for name in ("over", "select_over", "solved"):
        if name in values:
            values[name] = number_of(values[name], f"report: {name}")
    for name in ("over", "select_over"):
        if not 0 <= values.get(name, 0) <= 1:
            raise UserError(f"report: {name} must be a share of the run from 0 to 1, got {values[name]!r}.")
    figures = values.get("figures", [])
    if not isinstance(figures, list | tuple):
        raise UserError(f"report: figures must be a list, got {figures!r}.")
    return Reporting(**{**values, "figures": tuple(_figure(figure) for figure in figures)})


def _figure(given: Any) -> dict[str, str]:
    kind = mapping_of(given, "a figure").get("kind")
    if not (isinstance(kind, str) and "figure" in given):  # else it may be the beginning of a program's name
        choice(kind, tuple(NEEDED), "the kind of a figure")
    needed = NEEDED.get(str(kind), "figure")
    figure = known_entries(given, ("kind", needed, "title"), f"a figure of kind {kind}")
    if needed not in figure:
        raise UserError(f"a figure of kind {kind} needs {needed}.")
    return {name: text_of(value, f"{name} of a figure of kind {kind}") for name, value in figure.items()}


# ---------------------------------------------------------------- what the numbers are


@dataclasses.dataclass(frozen=True)
class AgentResult:
    """Scores of one agent's settings.

    Args:
        label: the agent.
        dataset: its results.
        settings: hyper-parameters of each setting, without the task.
        scores: `[settings, seeds, tasks]` of the reported variable; NaN for failed members.
        quality: `[settings]`, by which settings are chosen, higher is better; NaN where a choosing seed failed.
        order: settings from best to worst.
        chosen_on: positions of the seeds that chose; none if they are not in these results.
        reported: positions of the seeds that are reported.
    """

    label: str
    dataset: xarray.Dataset
    settings: list[dict[str, Any]]
    scores: np.ndarray
    quality: np.ndarray
    order: np.ndarray
    chosen_on: np.ndarray
    reported: np.ndarray

    @property
    def best(self) -> int:
        return int(self.order[0])

    def runs(self, setting: int) -> np.ndarray:
        """Scores of a setting on the seeds that are reported, `[seeds, tasks]`."""
        return self.scores[setting, self.reported]

    @property
    def best_runs(self) -> np.ndarray:
        return self.runs(self.best)


def analyse(label: str, dataset: xarray.Dataset, select: Sequence[int], report: Reporting) -> AgentResult:
    """Scores and the choice of the best setting.

    Args:
        label: the agent.
        dataset: its results; its attributes `selected_by` and `selected_over` say what chooses. A variable
            `selection_score` says that a search has chosen already, on other seeds.
        select: seeds that choose.
        report: what is measured.
    """
    variable = reported_variable(dataset, report)
    scores = scores_of(dataset, variable, report.over)
    seeds = dataset[SEED].values
    every = np.arange(len(seeds))
    settings = statistics.settings_without_tasks(dataset)
    if SELECTION in dataset:
        lower = statistics.lower_is_better(dataset, SELECTION)
        given = dataset[SELECTION].transpose(*setting_dimensions(dataset), SEED).values.reshape(len(settings), -1)[:, 0]
        quality = -given if lower else given
        return AgentResult(label, dataset, settings, scores, quality, ranking(quality), every[:0], every)
    by, over = str(dataset.attrs["selected_by"]), float(dataset.attrs["selected_over"])
    lower = statistics.lower_is_better(dataset, by)
    chosen_on = np.flatnonzero(np.isin(seeds, select))
    if len(settings) == 1 or not len(chosen_on):
        quality = setting_scores(scores_of(dataset, by, over), lower)
        return AgentResult(label, dataset, settings, scores, quality, ranking(quality), every[:0], every)
    choosing = scores_of(dataset, by, over)[:, chosen_on]
    quality = setting_scores(choosing, lower)
    reported = np.setdiff1d(every, chosen_on)
    order = _order(choosing, quality, lower)
    return AgentResult(
        label, dataset, settings, scores, quality, order, chosen_on, reported if len(reported) else every
    )


def _order(choosing: np.ndarray, quality: np.ndarray, lower: bool) -> np.ndarray:
    """From best to worst; a setting with fewer failed seeds comes before one with more."""
    failed = np.isnan(choosing).sum(axis=(1, 2))
    partial = statistics.iqm(choosing) * (-1 if lower else 1)
    value = np.where(np.isnan(quality), partial, quality)
    return np.lexsort((np.where(np.isnan(value), np.inf, -value), failed))


def scores_of(dataset: xarray.Dataset, variable: str, over: float) -> np.ndarray:
    """One number per member, `[settings, seeds, tasks]`: see `statistics.member_scores`."""
    return statistics.by_task(dataset, statistics.member_scores(dataset, variable, over))


def curve(dataset: xarray.Dataset, setting: int, variable: str) -> np.ndarray:
    """A series of one setting, `[seeds, steps, tasks]`; NaN for failed members.

    Raises:
        UserError: there is no such variable.
    """
    dims = (*setting_dimensions(dataset), SEED, STEP)
    array = statistics.require_variable(dataset, variable)
    array = array.mean([name for name in array.dims if name not in dims]).transpose(*dims)
    failed = statistics.failed_members(dataset).reshape(array.shape[:-1])
    values = np.where(failed[..., None], np.nan, array.values)
    return np.stack([statistics.by_task(dataset, row)[setting] for row in np.moveaxis(values, -1, 0)], axis=1)


def words(setting: dict[str, Any]) -> str:
    return ", ".join(f"{name}={plots._text(value)}" for name, value in setting.items())


def reported_variable(dataset: xarray.Dataset, report: Reporting) -> str:
    """What a sweep reports: as it says, else the program's final or headline variable."""
    if report.variable:
        return report.variable
    steps = {datasets.step_dimension(stage) for stage in ("", *dataset.attrs.get("stages", ()))}
    others = ("failed", SELECTION)
    known = {str(name): array for name, array in dataset.data_vars.items() if name not in others}
    final = [name for name, array in known.items() if steps.isdisjoint(array.dims)]
    return final[0] if final else str(dataset.attrs["headline"])


@dataclasses.dataclass(frozen=True)
class Sensitivity:
    """One agent's scores along an axis; without values it does not vary with it and is drawn as a level.

    Args:
        label: the agent.
        values: positions on the axis, numbers or names.
        scores: one per value, or a single one.
        joined: whether neighbouring values are connected (not in a random search).
    """

    label: str
    values: tuple
    scores: tuple[Estimate, ...]
    joined: bool = True


def along(agent: AgentResult, axis: str) -> Sensitivity:
    """The agent's score at each value of an axis, with the best of its other hyper-parameters at each, on the seeds
    that are reported."""
    values = [setting.get(axis) for setting in agent.settings]
    different = list(dict.fromkeys(value for value in values if value is not None))
    if not different:
        return Sensitivity(agent.label, (), (stratified_bootstrap_interval(agent.best_runs),))
    if _varies_together(agent.dataset, axis):  # points of a random search: every setting is shown
        return Sensitivity(
            agent.label,
            tuple(values),
            tuple(stratified_bootstrap_interval(agent.runs(i)) for i in range(len(values))),
            joined=False,
        )
    scores = []
    for value in different:
        best = next(int(number) for number in agent.order if values[number] == value)
        scores.append(stratified_bootstrap_interval(agent.runs(best)))
    return Sensitivity(agent.label, tuple(different), tuple(scores))


def _varies_together(dataset: xarray.Dataset, axis: str) -> bool:
    return any(axis in names and len(names) > 1 for names in dataset.attrs["axes"].values())

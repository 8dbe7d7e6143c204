"""Several runs side by side: a list of those in a folder, and a comparison of some in one table and one figure.

A run counts with its results file, a sweep with that of each of its agents.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import xarray
from rich.markup import escape
from rich.table import Table

from purejax_bilevel.errors import UserError
from purejax_bilevel.members import counted
from purejax_bilevel.results import comparison, statistics
from purejax_bilevel.results import dataset as datasets
from purejax_bilevel.results.analysis import Reporting, curve, reported_variable, scores_of, words
from purejax_bilevel.results.dataset import STEP
from purejax_bilevel.results.statistics import Estimate, stratified_bootstrap_interval

CONFIG = "config.yaml"
MOST_ROWS = 32  # settings shown of one comparison


@dataclasses.dataclass(frozen=True)
class Result:
    """A results file and the name it goes by."""

    name: str
    dataset: xarray.Dataset


def results_of(folder: Path, name: str) -> list[Result]:
    """What a run's or a sweep's folder holds: one result, or one per agent, under its name.

    Raises:
        UserError: there is none.
    """
    if (folder / datasets.FILE_NAME).is_file():
        return [Result(name, datasets.load(folder))]
    files = sorted(folder.glob(f"*/{datasets.FILE_NAME}"))
    if not files or not (folder / CONFIG).is_file():
        raise UserError(f"{folder} holds no results: name the folder of a finished run or sweep.")
    loaded = [datasets.load(file) for file in files]
    return [Result(f"{name}: {dataset.attrs['agent']}", dataset) for dataset in loaded]


# ---------------------------------------------------------------- a list


def listing(folder: Path) -> Table:
    """The runs and sweeps in a folder, the latest first.

    Raises:
        UserError: there is no such folder, or no run in it.
    """
    places = [place.parent for place in folder.glob(f"*/{CONFIG}")] if folder.is_dir() else []
    if not places:
        raise UserError(f"{folder} holds no runs: name the folder that they are in (--output_dir, by default runs).")
    table = Table(title=f"{counted(len(places), 'run')} in {escape(str(folder))}", title_justify="left")
    for name in ("run", "what", "members", "steps", "best setting: IQM (95 % interval)"):
        table.add_column(name, overflow="fold", justify="right" if name in ("members", "steps") else "left")
    for place in sorted(places, key=lambda place: (place / CONFIG).stat().st_mtime, reverse=True):
        for row in _rows_of(place):
            table.add_row(*map(escape, row))
    return table


def _rows_of(place: Path) -> list[tuple[str, ...]]:
    try:
        found = results_of(place, place.name)
    except UserError:
        return [(place.name, "not finished: go on with --resume", "", "", "")]
    rows: list[tuple[str, ...]] = []
    for result in found:
        dataset = result.dataset
        variable = reported_variable(dataset, Reporting())
        (best, *_) = _settings(result, variable, 0.0)
        members = statistics.failed_members(dataset).size
        what = str(dataset.attrs.get("title", dataset.attrs["program"]))
        steps = f"{int(dataset[STEP].values[-1]):,}"
        score = f"{variable.replace('_', ' ')} {best.score.in_words()}"
        rows.append((result.name, what, str(members), steps, score))
    return rows


# ---------------------------------------------------------------- a comparison


@dataclasses.dataclass(frozen=True)
class Row:
    """One setting of a result: its scores `[seeds, tasks]` and their interquartile mean."""

    name: str
    number: int  # of the setting
    setting: str
    runs: np.ndarray
    score: Estimate


def compare(folders: Sequence[Path], path: Path, variable: str = "", over: float = 0.0) -> Table:
    """Draws the learning curves of the best setting of each run, and returns the table of all settings.

    Args:
        folders: of runs and sweeps.
        path: the figure's file.
        variable: what is compared; by default what the first run reports.
        over: share of the run, counted from its end, that a series is averaged over; 0: its last row.

    Raises:
        UserError: a folder without results, a variable that some do not measure, or a place that is not writable.
    """
    short = len({folder.name for folder in folders}) == len(folders)  # else whole paths tell them apart
    found = [result for folder in folders for result in results_of(folder, folder.name if short else str(folder))]
    first = found[0].dataset
    variable = variable or reported_variable(first, Reporting())
    lower = statistics.lower_is_better(first, variable)
    settings = [_settings(result, variable, over) for result in found]
    _draw(found, [rows[0] for rows in settings], variable, path)
    return _table(settings, variable, lower)


def _settings(result: Result, variable: str, over: float) -> list[Row]:
    """All settings, from the best to the worst."""
    dataset = result.dataset
    scores = scores_of(dataset, variable, over)
    lower = statistics.lower_is_better(dataset, variable)
    settings = [words(setting) for setting in statistics.settings_without_tasks(dataset)]
    order = statistics.ranking(statistics.iqm(scores) * (-1 if lower else 1))
    estimates = [stratified_bootstrap_interval(own) for own in scores]
    return [Row(result.name, int(i), settings[i], scores[i], estimates[i]) for i in order]


def _table(settings: Sequence[Sequence[Row]], variable: str, lower: bool) -> Table:
    table = Table(title=variable.replace("_", " "), title_justify="left")
    reference = settings[0][0]
    better = f"P(better than {escape(reference.name)})"
    for name in ("run", "setting", "IQM (95 % interval)", "runs", "failed", better):
        table.add_column(name, overflow="fold", justify="right" if name in ("runs", "failed") else "left")
    rows = [row for own in settings for row in own[: max(1, MOST_ROWS // len(settings))]]
    for row in rows:
        finite = np.isfinite(row.runs)
        cells = (row.name, row.setting or "its only one", row.score.in_words())
        counts = (str(int(finite.sum())), str(int((~finite).sum())))
        table.add_row(*map(escape, cells), *counts, "" if row is reference else _better(row, reference, lower))
    left_out = sum(map(len, settings)) - len(rows)
    several = any(len(own) > 1 for own in settings)
    notes = ["Settings are in order of their score on these seeds: the best of many is too good."] if several else []
    notes += [f"{counted(left_out, 'more setting')} in the files."] if left_out else []
    table.caption = " ".join(notes) or None
    return table


def _better(row: Row, reference: Row, lower: bool) -> str:
    if row.runs.shape[1] != reference.runs.shape[1]:
        return "other tasks"
    sign = -1.0 if lower else 1.0
    found = statistics.probability_of_improvement(sign * row.runs, sign * reference.runs)
    if not np.isfinite(found.estimate):
        return "unknown"
    return f"{found.estimate:.2f} ({found.low:.2f} to {found.high:.2f})"


def _draw(found: Sequence[Result], best: Sequence[Row], variable: str, path: Path) -> None:
    """Curves of the reported variable where it is a series, else of the first run's headline."""
    shown = variable if STEP in found[0].dataset[variable].dims else str(found[0].dataset.attrs["headline"])
    units = dict.fromkeys(str(result.dataset.attrs.get("step_name", "steps")) for result in found)
    series = [
        (
            f"{row.name}, {row.setting}" if row.setting else row.name,
            result.dataset[STEP].values,
            curve(result.dataset, row.number, shown),
        )
        for result, row in zip(found, best, strict=True)
    ]
    comparison.curves(series, " or ".join(units), shown.replace("_", " "), path)

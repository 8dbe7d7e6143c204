"""Statistics over runs with the definitions of rliable, vectorised over settings and steps.

Scores are `[..., runs, tasks]`: one number per run (seed) and task (environment); `[runs]` alone is one task. The
interval is the percentile bootstrap, stratified by task: runs are drawn again within each task. A score that is NaN (a
failed member) is left out and counted, never averaged away unseen.

With one task the interval of the interquartile mean needs no loop over resamples: drawing runs is drawing ranks, so
the resampled means are one matrix product of rank weights `[resamples, runs]` with the sorted scores `[runs, cells]`.

Source: Agarwal et al. 2021, "Deep Reinforcement Learning at the Edge of the Statistical Precipice". The package
`rliable` itself does not work with pandas 3, and only numpy is needed.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import xarray
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from purejax_bilevel.errors import UserError
from purejax_bilevel.members import format_value
from purejax_bilevel.results.dataset import SEED, STEP, setting_dimensions, setting_labels

# Axes that say what is solved: scores are aggregated over them, none is a best setting. Programs declare them, and
# results name them (`tasks`); these are those of files that do not.
TASKS = (
    "env_name", "further_envs", "level", "dataset", "mdp", "mdp_file", "garnet_seed", "shift_type", "transition_steps",
    "plateau_steps",
)  # fmt: skip
BLOCK = 4_000_000  # numbers held at once by the bootstrap


class Estimate(NamedTuple):
    """Estimate with its confidence interval; every field has the leading axes of the scores."""

    estimate: np.ndarray
    low: np.ndarray
    high: np.ndarray
    used: np.ndarray  # scores that entered
    excluded: np.ndarray  # scores left out because they are NaN

    def in_words(self) -> str:
        """Of one cell: four digits, and the interval where there is one."""
        if not math.isfinite(self.estimate):
            return "all failed"
        interval = f" ({self.low:.4g} to {self.high:.4g})" if math.isfinite(self.low) else ""
        return f"{self.estimate:.4g}{interval}"


# ---------------------------------------------------------------- statistics


def iqm(scores: np.ndarray) -> np.ndarray:
    """Interquartile mean: the mean of the middle half of all scores of runs and tasks together.

    Args:
        scores: `[..., runs, tasks]` or `[runs]`; NaN is left out.

    Returns:
        `[...]`; NaN where no score is left. Equals `scipy.stats.trim_mean(scores, 0.25, axis=None)`.
    """
    ordered = np.sort(_flat(scores), axis=-1)  # NaN goes last
    count = np.isfinite(ordered).sum(axis=-1, keepdims=True)
    cut = (0.25 * count).astype(int)
    rank = np.arange(ordered.shape[-1])
    kept = (rank >= cut) & (rank < count - cut)
    return _divide(np.where(kept, ordered, 0.0).sum(axis=-1), kept.sum(axis=-1))


def mean(scores: np.ndarray) -> np.ndarray:
    """Mean over runs and tasks, `[..., runs, tasks]` to `[...]`; NaN is left out."""
    flat = _flat(scores)
    return _divide(np.where(np.isfinite(flat), flat, 0.0).sum(axis=-1), np.isfinite(flat).sum(axis=-1))


def optimality_gap(scores: np.ndarray, gamma: float) -> np.ndarray:
    """Mean shortfall from `gamma`, where scores above it count as `gamma`.

    Args:
        scores: `[..., runs, tasks]` or `[runs]`.
        gamma: score regarded as solved (500 for CartPole-v1).

    Returns:
        `[...]`, smaller is better.
    """
    return gamma - mean(np.minimum(scores, gamma))


def stratified_bootstrap_interval(
    scores: np.ndarray,
    statistic: Callable[[np.ndarray], np.ndarray] = iqm,
    reps: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """Percentile bootstrap interval of a statistic; runs are resampled within each task.

    Args:
        scores: `[..., runs, tasks]` or `[runs]`. Leading axes are separate cells (settings, steps).
        statistic: maps `[..., runs, tasks]` to `[...]` and leaves NaN out.
        reps: number of resamples.
        confidence: probability inside the interval.
        seed: of the resampling; the same resamples serve all cells.

    Returns:
        Estimate with the leading axes. With fewer than two runs in every task nothing is known about the spread: low
        and high are NaN.
    """
    scores = _clean(scores)
    leading = scores.shape[:-2]
    cells = scores.reshape(-1, *scores.shape[-2:])
    finite = np.isfinite(cells)
    bounds = np.full((2, len(cells)), np.nan)
    fast = statistic is iqm and cells.shape[-1] == 1
    resample = _resampled_iqm if fast else lambda part, *rest: _resampled(part, statistic, *rest)
    for counts, members in _groups(finite.sum(axis=1)):
        if max(counts, default=0) < 2:
            continue
        generator = np.random.default_rng(seed)
        bounds[:, members] = resample(cells[members], counts, reps, _tails(confidence), generator)
    used = finite.sum(axis=(1, 2))
    fields = (statistic(cells), *bounds, used, finite[0].size - used if len(cells) else used)
    return Estimate(*(np.asarray(field).reshape(leading) for field in fields))


def probability_of_improvement(
    x: np.ndarray, y: np.ndarray, reps: int = 2000, confidence: float = 0.95, seed: int = 0
) -> Estimate:
    """Probability that a run of X scores higher than a run of Y on the same task, averaged over tasks; ties count one
    half.

    Args:
        x: `[runs of X, tasks]` or `[runs of X]`.
        y: `[runs of Y, tasks]` or `[runs of Y]`.
        reps: number of resamples, drawn for X and Y separately.
        confidence: probability inside the interval.
        seed: of the resampling.

    Returns:
        Estimate; `used` and `excluded` count the scores of X and Y together. Tasks without a score on either side are
        left out.
    """
    x, y = _clean(x), _clean(y)
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise ValueError(f"expected [runs, tasks] with the same tasks, got shapes {x.shape} and {y.shape}")
    generator = np.random.default_rng(seed)
    estimates, resampled = [], []
    for task in range(x.shape[1]):
        first, second = (side[np.isfinite(side[:, task]), task] for side in (x, y))
        if not (len(first) and len(second)):
            continue
        better = (first[:, None] > second) + 0.5 * (first[:, None] == second)
        estimates.append(better.mean())
        weights = _run_weights(generator, reps, len(first)), _run_weights(generator, reps, len(second))
        resampled.append(np.einsum("rx,xy,ry->r", weights[0], better, weights[1], optimize=True))
    used = np.isfinite(x).sum() + np.isfinite(y).sum()
    excluded = np.asarray(x.size + y.size - used)
    if not estimates:
        unknown = np.asarray(np.nan)
        return Estimate(unknown, unknown, unknown, np.asarray(used), excluded)
    low, high = np.quantile(np.mean(resampled, axis=0), _tails(confidence))
    return Estimate(np.mean(estimates), low, high, np.asarray(used), excluded)


def performance_profile(
    scores: np.ndarray, thresholds: np.ndarray, reps: int = 2000, confidence: float = 0.95, seed: int = 0
) -> Estimate:
    """Fraction of runs that score above each threshold, averaged over tasks, with pointwise intervals.

    Args:
        scores: `[runs, tasks]` or `[runs]`.
        thresholds: `[thresholds]`.
        reps: number of resamples.
        confidence: probability inside the interval.
        seed: of the resampling.

    Returns:
        Estimate of `[thresholds]`.
    """
    scores = _clean(scores)
    if scores.ndim != 2:
        raise ValueError(f"expected scores [runs, tasks], got shape {scores.shape}")
    generator = np.random.default_rng(seed)
    thresholds = np.asarray(thresholds, dtype=float)
    fractions, resampled = [], []
    for column in scores.T:
        column = column[np.isfinite(column)]
        if not len(column):
            continue
        above = (column[:, None] > thresholds).astype(float)
        fractions.append(above.mean(axis=0))
        resampled.append(_run_weights(generator, reps, len(column)) @ above)
    used, excluded = (np.full(thresholds.shape, count) for count in (np.isfinite(scores).sum(), np.isnan(scores).sum()))
    if not fractions:
        unknown = np.full(thresholds.shape, np.nan)
        return Estimate(unknown, unknown, unknown, used, excluded)
    low, high = np.quantile(np.mean(resampled, axis=0), _tails(confidence), axis=0)
    return Estimate(np.mean(fractions, axis=0), low, high, used, excluded)


# ---------------------------------------------------------------- resampling


def _groups(counts: np.ndarray):
    """Cells with the same number of runs per task: pairs of (`[tasks]` counts, cell indices)."""
    if len(counts):
        different, which = np.unique(counts, axis=0, return_inverse=True)
        for index, row in enumerate(different):
            yield row, np.flatnonzero(which.reshape(-1) == index)


def _resampled_iqm(
    cells: np.ndarray, counts: np.ndarray, reps: int, tails: tuple[float, float], generator: np.random.Generator
) -> np.ndarray:
    """Bounds `[2, cells]` of the interquartile mean of `[cells, runs, 1]` that all have `counts[0]` runs."""
    count = int(counts[0])
    cut = int(0.25 * count)
    kept = np.sort(generator.integers(count, size=(reps, count)), axis=1)[:, cut : count - cut]
    weights = np.zeros((reps, count))
    np.add.at(weights, (np.arange(reps)[:, None], kept), 1.0 / kept.shape[1])
    ordered = np.sort(cells[..., 0], axis=1)[:, :count]
    step = max(1, BLOCK // reps)
    blocks = [ordered[start : start + step] @ weights.T for start in range(0, len(ordered), step)]
    return np.concatenate([_quantiles(block, tails) for block in blocks], axis=1)


def _resampled(
    cells: np.ndarray,
    statistic: Callable[[np.ndarray], np.ndarray],
    counts: np.ndarray,
    reps: int,
    tails: tuple[float, float],
    generator: np.random.Generator,
) -> np.ndarray:
    """Bounds `[2, cells]` of any statistic of `[cells, runs, tasks]` whose tasks have `counts` runs each."""
    runs, tasks = cells.shape[1:]
    drawn = generator.integers(np.maximum(counts, 1), size=(reps, runs, tasks))
    present = np.arange(runs)[:, None] < counts  # a task with fewer runs is resampled to its own number
    ordered = np.sort(cells, axis=1)  # moves NaN behind the runs that count
    step = max(1, BLOCK // (reps * runs * tasks))
    bounds = []
    for start in range(0, len(cells), step):
        resamples = ordered[start : start + step][:, drawn, np.arange(tasks)]
        bounds.append(_quantiles(statistic(np.where(present, resamples, np.nan)), tails))
    return np.concatenate(bounds, axis=1)


def _quantiles(values: np.ndarray, tails: tuple[float, float]) -> np.ndarray:
    """Two linear quantiles over the last axis, `[2, ...]`, by a partial sort."""
    positions = [tail * (values.shape[-1] - 1) for tail in tails]
    needed = sorted({neighbour for p in positions for neighbour in (math.floor(p), math.ceil(p))})
    ordered = np.partition(values, needed, axis=-1)
    return np.stack(
        [ordered[..., math.floor(p)] * (1 - p % 1) + ordered[..., math.ceil(p)] * (p % 1) for p in positions]
    )


def _run_weights(generator: np.random.Generator, reps: int, runs: int) -> np.ndarray:
    """Share of each run in each resample, `[reps, runs]`."""
    return generator.multinomial(runs, np.full(runs, 1.0 / runs), size=reps) / runs


def _tails(confidence: float) -> tuple[float, float]:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}; expected a number between 0 and 1")
    return (1 - confidence) / 2, (1 + confidence) / 2


def _clean(scores: np.ndarray) -> np.ndarray:
    """Float64 `[..., runs, tasks]`; infinite scores are failures as NaN is."""
    scores = np.asarray(scores, dtype=np.float64)
    scores = scores[:, None] if scores.ndim == 1 else scores
    return np.where(np.isfinite(scores), scores, np.nan)


def _flat(scores: np.ndarray) -> np.ndarray:
    scores = _clean(scores)
    return scores.reshape(*scores.shape[:-2], -1)


def _divide(total: np.ndarray, count: np.ndarray) -> np.ndarray:
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


# ---------------------------------------------------------------- choosing settings


def setting_scores(scores: np.ndarray, lower: bool) -> np.ndarray:
    """Quality of settings, higher is better, NaN where any seed failed.

    Args:
        scores: `[settings, seeds]` or `[settings, seeds, tasks]`.
        lower: whether lower scores are better.
    """
    scores = scores if scores.ndim == 3 else scores[..., None]
    complete = np.isfinite(scores).all(axis=(1, 2))
    value = iqm(np.where(complete[:, None, None], scores, 0.0))
    return np.where(complete, -value if lower else value, np.nan)


def ranking(quality: np.ndarray) -> np.ndarray:
    """Numbers of settings from best to worst; failed ones last, ties in order."""
    return np.argsort(np.where(np.isnan(quality), np.inf, -quality), kind="stable")


# ---------------------------------------------------------------- tables


@dataclasses.dataclass(frozen=True)
class SettingRow:
    """One hyper-parameter setting's result over its seeds."""

    setting: dict[str, Any]
    index: tuple[int, ...]  # position along `results.setting_dimensions`
    iqm: float
    low: float
    high: float
    runs: int  # members that entered
    failed: int  # members left out

    @property
    def label(self) -> str:
        """Setting in words, for example `lr=0.001, model_hidden_dim=3`."""
        return ", ".join(f"{name}={format_value(value)}" for name, value in self.setting.items()) or "all"


def member_scores(dataset: xarray.Dataset, variable: str, over: float = 0.0) -> np.ndarray:
    """One score per member: see `row_scores`.

    Args:
        dataset: from `results.build_dataset`.
        variable: name of a measured variable.
        over: share of a series, counted from its end, that is averaged; 0: its last row.

    Returns:
        `[settings, seeds]`, settings in C order; NaN for members that failed.

    Raises:
        UserError: there is no such variable.
    """
    array = require_variable(dataset, variable)
    members = (*setting_dimensions(dataset), SEED)
    rest = sorted((name for name in array.dims if name not in members), key=lambda name: name != STEP)
    values = array.transpose(*members, *rest).values
    values = values.reshape(-1, *values.shape[len(members) :])
    values = values if STEP in array.dims else values[:, None]
    values = _held(values) if dataset.attrs.get("ends_early") else values
    failed = failed_members(dataset)
    return row_scores(values, failed.reshape(-1), over).reshape(failed.shape)


def row_scores(rows: np.ndarray, failed: np.ndarray, over: float = 0.0) -> np.ndarray:
    """One number per member: the mean of its last row, or of the last share `over` of its rows.

    Args:
        rows: `[members, rows, ...]`. NaN is a row without a value (no episode has ended) and does not count.
        failed: `[members]`.
        over: 0 for the last row.

    Returns:
        `[members]`; NaN for members that failed, have no value or an infinite one.
    """
    rows = np.asarray(rows, np.float64)
    count = max(1, math.ceil(over * rows.shape[1]))
    kept = rows[:, rows.shape[1] - count :].reshape(len(rows), -1)
    present = np.isfinite(kept)
    average = _divide(np.where(present, kept, 0.0).sum(axis=1), present.sum(axis=1))
    return np.where(failed | np.isinf(kept).any(axis=1), np.nan, average)


def _held(rows: np.ndarray) -> np.ndarray:
    """Rows `[members, rows, ...]` in which a member that was done keeps its last values."""
    held = np.array(rows, np.float64)
    for row in range(1, held.shape[1]):
        held[:, row] = np.where(np.isnan(held[:, row]), held[:, row - 1], held[:, row])
    return held


def by_task(dataset: xarray.Dataset, scores: np.ndarray) -> np.ndarray:
    """Scores `[settings, seeds]` as `[settings without tasks, seeds, tasks]`: see `task_dimensions`."""
    dimensions = setting_dimensions(dataset)
    tasks = [number for number, name in enumerate(dimensions) if name in task_dimensions(dataset)]
    grid = scores.reshape(*(dataset.sizes[name] for name in dimensions), -1)
    moved = np.moveaxis(grid, tasks, range(-len(tasks), 0))
    count = math.prod(dataset.sizes[dimensions[number]] for number in tasks)
    return moved.reshape(-1, dataset.sizes[SEED], count)


def settings_without_tasks(dataset: xarray.Dataset) -> list[dict[str, Any]]:
    """Hyper-parameters of every setting, in the order of `by_task`."""
    return setting_labels(dataset.isel(dict.fromkeys(task_dimensions(dataset), 0)))


def tasks_of(dataset: xarray.Dataset) -> list[dict[str, Any]]:
    """The tasks, in the order of `by_task`; a single one without a name where none is an axis."""
    tasks = task_dimensions(dataset)
    return setting_labels(dataset.isel({name: 0 for name in setting_dimensions(dataset) if name not in tasks}))


def task_dimensions(dataset: xarray.Dataset) -> tuple[str, ...]:
    """Those of `setting_dimensions` that say what is solved."""
    tasks = dataset.attrs.get("tasks", TASKS)
    return tuple(name for name in setting_dimensions(dataset) if name in tasks)


def failed_members(dataset: xarray.Dataset) -> np.ndarray:
    """Members marked as diverged by the variable `failed`, `[settings, seeds]`."""
    shape = (-1, dataset.sizes[SEED])
    if "failed" not in dataset:
        return np.zeros([dataset.sizes[name] for name in (*setting_dimensions(dataset), SEED)], bool).reshape(shape)
    return dataset["failed"].transpose(*setting_dimensions(dataset), SEED).values.astype(bool).reshape(shape)


def require_variable(dataset: xarray.Dataset, variable: str) -> xarray.DataArray:
    """Variable of the dataset, or one sentence that lists what there is."""
    if variable not in dataset.data_vars:
        raise UserError(f"the results hold no variable {variable!r}; there is {', '.join(map(str, dataset.data_vars))}")
    return dataset[variable]


def summary_table(
    dataset: xarray.Dataset, variable: str, over: float = 0.0, reps: int = 2000, seed: int = 0
) -> list[SettingRow]:
    """Interquartile mean over seeds with its 95 % interval, one row per setting in the order of the axes.

    Args:
        dataset: from `results.build_dataset`.
        variable: usually a final score such as `final_return`.
        over: see `member_scores`.
        reps: number of bootstrap resamples.
        seed: of the resampling.

    Raises:
        UserError: there is no such variable.
    """
    scores = member_scores(dataset, variable, over)
    found = stratified_bootstrap_interval(scores[..., None], iqm, reps, seed=seed)
    indices = np.ndindex(*(dataset.sizes[name] for name in setting_dimensions(dataset)))
    numbers = zip(*(np.atleast_1d(field).tolist() for field in found), strict=True)
    return [
        SettingRow(setting, index, *row)
        for setting, index, row in zip(setting_labels(dataset), indices, numbers, strict=True)
    ]


def lower_is_better(dataset: xarray.Dataset, variable: str) -> bool:
    """Whether the variable's attribute `better` says `lower`; returns are better when higher."""
    return require_variable(dataset, variable).attrs.get("better", "higher") == "lower"


def render_table(
    rows: Sequence[SettingRow],
    console: Console | None = None,
    title: str | None = None,
    lower: bool = False,
    limit: int | None = 32,
) -> None:
    """Prints one line per setting, the best one in bold; of more than `limit` settings only the best are shown.

    Args:
        rows: from `summary_table`.
        console: where to print.
        title: what was measured, with its unit.
        lower: whether lower is better.
        limit: most lines shown; None for all.
    """
    console = console or Console()
    shown = list(rows)
    if limit is not None and len(rows) > limit:
        order = sorted(rows, key=lambda row: (math.isnan(row.iqm), row.iqm if lower else -row.iqm))
        shown = order[:limit]
    finite = [row for row in rows if math.isfinite(row.iqm)]
    best = min(finite, key=lambda row: row.iqm if lower else -row.iqm) if len(finite) > 1 else None
    table = Table(title=title and escape(title), title_justify="left", title_style="bold")
    for name in rows[0].setting if rows else ():
        table.add_column(escape(name), justify="right", overflow="fold")
    for name in ("IQM", "95 % interval", "runs", "failed"):
        table.add_column(name, justify="right", no_wrap=True)
    digits = _decimals(rows)
    for row in shown:
        interval = f"{row.low:.{digits}f} to {row.high:.{digits}f}" if math.isfinite(row.low) else "unknown"
        score = f"{row.iqm:.{digits}f}" if math.isfinite(row.iqm) else "none"
        failed = f"[red]{row.failed}[/red]" if row.failed else "0"
        values = [escape(format_value(value)) for value in row.setting.values()]
        table.add_row(*values, score, interval, str(row.runs), failed, style="bold" if row is best else None)
    console.print(table)
    if len(shown) < len(rows):
        console.print(f"The best {len(shown)} of {len(rows)} settings; the results file holds all.", style="dim")


def _decimals(rows: Sequence[SettingRow]) -> int:
    """Digits after the point that show about four figures of the largest score."""
    largest = max((abs(row.iqm) for row in rows if math.isfinite(row.iqm)), default=0.0)
    return int(np.clip(3 - math.floor(math.log10(largest)), 0, 8)) if largest > 0 else 1

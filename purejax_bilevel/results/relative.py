"""Scores task by task, as they are and over those of a baseline: what makes tasks of different scales comparable.

A score on a task is divided by the baseline's mean on it (where less is better, the baseline's mean by the score), so
that 1 is as good as the baseline: the A2C-normalised returns of Jackson et al. 2023 (GROOVE) are of this kind.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from purejax_bilevel.members import counted
from purejax_bilevel.results import comparison, statistics
from purejax_bilevel.results.analysis import AgentResult, words
from purejax_bilevel.results.document import Block, Heading, Paragraph, Picture, Table
from purejax_bilevel.results.statistics import stratified_bootstrap_interval

ENOUGH = 0.75  # of the baseline, for the share of runs that reach it
LEVEL = "level"  # the task within a set of levels
MOST_TASKS = 40  # rows shown


def normalised(runs: np.ndarray, baseline: np.ndarray, lower: bool) -> np.ndarray:
    """Scores relative to the baseline's mean on each task; higher is better.

    Args:
        runs: `[seeds, tasks]`.
        baseline: scores of the baseline, `[seeds, tasks]`.
        lower: whether lower scores are better.

    Returns:
        `[seeds, tasks]`; NaN for tasks on which the baseline's mean is not above 0, where a ratio says nothing.
    """
    means = statistics.mean(np.moveaxis(baseline[..., None], 1, 0))
    means = np.where(means > 0, means, np.nan)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(runs > 0, means / runs, np.nan) if lower else runs / means


def blocks(
    agents: Sequence[AgentResult], baseline: AgentResult, lower: bool, score_name: str, path: Path
) -> list[Block]:
    """The section of a report: a table over all tasks, performance profiles, a table by task.

    Args:
        agents: whose best settings are compared.
        baseline: one of them.
        lower: whether lower scores are better.
        score_name: of what was measured.
        path: of the figure.
    """
    scores = [(agent.label, normalised(agent.best_runs, baseline.best_runs, lower)) for agent in agents]
    left_out = int(np.isnan(scores[agents.index(baseline)][1]).all(axis=0).sum())
    tasks = baseline.best_runs.shape[1]
    found: list[Block] = [Heading(f"Relative to {baseline.label}")]
    if left_out == tasks:
        return [*found, Paragraph(f"{baseline.label} is not above 0 on any task: there is nothing to divide by.")]
    of = f"{score_name} of {baseline.label}'s best setting, mean over its seeds"
    text = f"Every score is divided by the {of}, task by task." if not lower else f"The {of}, over every score."
    if left_out:
        text += f" Without {counted(left_out, 'task')} of {tasks}, on which that mean is not above 0."
    picture = comparison.profiles(scores, f"{score_name} relative to {baseline.label}", path)
    return [
        *found,
        Paragraph(text),
        Table(("agent", "IQM (95 % interval)", "mean", f"runs of at least {ENOUGH:g}"), [_row(*own) for own in scores]),
        Picture(picture, f"Fraction of runs that are better than a multiple of {baseline.label}."),
        *by_task(baseline, scores),
    ]


def _row(label: str, values: np.ndarray) -> tuple[str, ...]:
    finite = values[np.isfinite(values)]
    if not len(finite):
        return (label, "all failed", "-", "-")
    interval = stratified_bootstrap_interval(values)
    return (label, interval.in_words(), f"{finite.mean():.4g}", f"{100 * (finite >= ENOUGH).mean():.0f} %")


def by_task(agent: AgentResult, scores: Sequence[tuple[str, np.ndarray]]) -> list[Block]:
    """One row per set of levels where levels are the tasks of several environments, else per task; none for one task.

    Args:
        agent: any one, for the tasks.
        scores: of each label, `[seeds, tasks]`.
    """
    tasks = statistics.tasks_of(agent.dataset)
    if len(tasks) < 2:
        return []
    sets = [words({name: value for name, value in task.items() if name != LEVEL}) for task in tasks]
    names = sets if len(set(sets)) > 1 else [words(task) for task in tasks]
    shown = list(dict.fromkeys(names))
    rows = []
    for name in shown[:MOST_TASKS]:
        own = np.array([task == name for task in names])
        cells = [stratified_bootstrap_interval(values[:, own]).in_words() for _, values in scores]
        rows.append((name, *cells))
    table = Table(("task", *(label for label, _ in scores)), rows)
    more = len(shown) - len(rows)
    return [table, *([Paragraph(f"And {counted(more, 'more task')}.")] if more else [])]

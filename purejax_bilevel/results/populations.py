"""What became of populations that trained themselves (`--search pbt`), from results datasets alone: who was copied from
whom, and the schedules of all settings.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import xarray
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from purejax_bilevel.results import plots, statistics
from purejax_bilevel.results.analysis import AgentResult, words
from purejax_bilevel.results.dataset import (
    BEST,
    PARENT,
    POPULATIONS,
    SEED,
    STEP,
    of_population,
    setting_dimensions,
)
from purejax_bilevel.results.document import Block, Heading, Paragraph, Picture, Table

LINEAGE = "#000000"
MOST_ROWS = 20  # replicates in the table of each agent

# --- the section of a report ------------------------------------------------------------------------------------------


def blocks(agents: Sequence[AgentResult], lower: bool, place: Callable[[str], Path]) -> list[Block]:
    """What a report says of the agents whose members are populations.

    Args:
        agents: of a sweep.
        lower: whether lower scores are better.
        place: the path of a figure by its name.
    """
    found: list[Block] = []
    for number, agent in enumerate(agents):
        if POPULATIONS in agent.dataset.attrs:
            found += _of_agent(agent, lower, place(f"populations-{number}.png"))
    return [Heading("Populations"), *found] if found else []


def _of_agent(agent: AgentResult, lower: bool, path: Path) -> list[Block]:
    dataset, about = agent.dataset, agent.dataset.attrs[POPULATIONS]
    counts = tuple(dataset.sizes[name] for name in setting_dimensions(dataset))
    numbers = statistics.by_task(dataset, np.arange(math.prod(counts) * dataset.sizes[SEED]))[agent.best]
    scores = agent.scores[agent.best]
    tasks = [words(task) for task in statistics.tasks_of(dataset)]
    names = [
        ", ".join(filter(None, [task, f"seed {seed}"])) for seed in dataset[SEED].values.tolist() for task in tasks
    ]
    members, reached = numbers.ravel(), scores.ravel()
    chosen = shown(reached, lower)
    titles = [f"{names[i]}{f' ({word})' if word else ''}" for i, word in chosen]
    schedules(dataset, [int(members[i]) for i, _ in chosen], titles, path)
    ends = [final_settings(history(dataset, int(member))) for member in members[:MOST_ROWS]]
    rows = [
        (name, f"{score:.4g}", *(f"{value:.3g}" for value in end.values()))
        for name, score, end in zip(names, reached, ends, strict=False)
    ]
    text = (
        f"{agent.label}: each member is a population of {about['population']} individuals, which take "
        f"{about['population']} times the steps of one; after every {about['interval']} steps the worst "
        f"{100 * about['fraction']:.3g} % go on from one of the best. Scores are of the individual that was best at "
        "the latest trial; those of evaluations are of others than the trial's."
    )
    return [
        Paragraph(text),
        Picture(path, "Settings and headline of all individuals; black: the lineage of the best one at the end."),
        Table(("member", "score", *(f"{name} at the end" for name in ends[0])), rows),
    ]


# --- one population ---------------------------------------------------------------------------------------------------


class History(NamedTuple):
    """One member: a population from its first row to its last."""

    steps: np.ndarray  # [rows]
    settings: dict[str, np.ndarray]  # [rows, individuals] each: the values with which the steps up to a row were made
    fitness: np.ndarray  # [rows, individuals], headline after them
    parents: np.ndarray  # [rows, individuals], whom each went on from after the row before
    best: np.ndarray  # [rows]


def history(dataset: xarray.Dataset, member: int) -> History:
    """One member's history.

    Args:
        dataset: whose members are populations.
        member: its number, seeds fastest.
    """

    def own(name: str) -> np.ndarray:
        kept = (*setting_dimensions(dataset), SEED, STEP)
        array = dataset[name].transpose(*kept, ...).values
        return array.reshape(-1, *array.shape[len(kept) - 1 :])[member]

    names = [entry["name"] for entry in dataset.attrs[POPULATIONS]["space"]]
    settings = {name: own(of_population(name)) for name in names}
    fitness = own(of_population(str(dataset.attrs["headline"])))
    return History(dataset[STEP].values, settings, fitness, own(PARENT), own(BEST))


def lineage(found: History) -> np.ndarray:
    """The individuals `[rows]` that the best one at the end descends from, itself last."""
    line = [int(found.best[-1])]
    for parents in found.parents[:0:-1]:
        line.append(int(parents[line[-1]]))
    return np.array(line[::-1])


def final_settings(found: History) -> dict[str, float]:
    """Settings of the best individual at the end."""
    return {name: float(values[-1, found.best[-1]]) for name, values in found.settings.items()}


def schedules(dataset: xarray.Dataset, members: Sequence[int], titles: Sequence[str], path: str | Path) -> Path:
    """Draws settings and headline of all individuals against the step, and the lineage of the final best one.

    Args:
        dataset: whose members are populations.
        members: numbers of those drawn, a column each.
        titles: of the columns.
        path: the figure's file; its ending says the format.

    Returns:
        The path.
    """
    found = [history(dataset, member) for member in members]
    headline = str(dataset.attrs["headline"])
    known = np.concatenate([own.fitness[np.isfinite(own.fitness)] for own in found])
    norm = Normalize(*((known.min(), known.max()) if len(known) else (0.0, 1.0)))
    space = dataset.attrs[POPULATIONS]["space"]
    with matplotlib.rc_context(plots.STYLE):
        figure = Figure(figsize=(1.6 + 3.2 * len(found), 0.8 + 1.7 * (len(space) + 1)), layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(len(space) + 1, len(found), sharex=True, sharey="row", squeeze=False)
        for column, own, title in zip(panels.T, found, titles, strict=True):
            column[0].set_title(title)
            for panel, entry in zip(column, space, strict=False):
                _draw_setting(panel, own, entry, norm)
            _draw_headline(column[-1], own, norm)
            column[-1].set_xlabel(str(dataset[STEP].attrs.get("long_name", STEP)))
            column[-1].xaxis.set_major_formatter(EngFormatter(sep=""))
        for panel, name in zip(panels[:, 0], [*(entry["name"] for entry in space), headline], strict=True):
            panel.set_ylabel(name.replace("_", " "))
        colors = matplotlib.cm.ScalarMappable(norm, "viridis")
        figure.colorbar(colors, ax=panels.ravel().tolist(), label=headline.replace("_", " "), shrink=0.6)
        return plots._write(figure, path)


def _draw_setting(panel: Axes, found: History, entry: dict[str, Any], norm: Normalize) -> None:
    """Values stay between two rows; a thin line leads from a parent's to its copy's."""
    values, edges = found.settings[entry["name"]], np.concatenate([[0], found.steps])
    count = values.shape[1]
    stays = [[(edges[k], values[k, i]), (edges[k + 1], values[k, i])] for k in range(len(values)) for i in range(count)]
    panel.add_collection(_lines(stays, found.fitness.ravel(), norm))
    copies = [
        [(edges[k], values[k - 1, found.parents[k, i]]), (edges[k], values[k, i])]
        for k in range(1, len(values))
        for i in range(count)
        if found.parents[k, i] != i
    ]
    panel.add_collection(LineCollection(copies, colors=plots.GREY, linewidths=0.6, zorder=1))
    line = values[np.arange(len(values)), lineage(found)]
    panel.plot(edges, np.concatenate([line[:1], line]), color=LINEAGE, drawstyle="steps-pre", linewidth=1.0, zorder=4)
    panel.set_yscale("log" if entry["scale"] == "log" else "linear")
    panel.set_ylim(*_widened(entry["low"], entry["high"], entry["scale"] == "log"))


def _draw_headline(panel: Axes, found: History, norm: Normalize) -> None:
    steps, fitness = found.steps, found.fitness
    joined = [
        [(steps[k - 1], fitness[k - 1, found.parents[k, i]]), (steps[k], fitness[k, i])]
        for k in range(1, len(steps))
        for i in range(fitness.shape[1])
    ]
    panel.add_collection(_lines(joined, fitness[1:].ravel(), norm))
    panel.plot(steps, fitness[np.arange(len(steps)), lineage(found)], color=LINEAGE, linewidth=1.0, zorder=4)
    panel.set_xlim(0, steps[-1])
    panel.autoscale_view(scalex=False)


def _lines(segments: list, fitness: np.ndarray, norm: Normalize) -> LineCollection:
    colors = matplotlib.colormaps["viridis"].with_extremes(bad=plots.GREY)(norm(np.ma.masked_invalid(fitness)))
    return LineCollection(segments, colors=colors, linewidths=1.5, alpha=0.9, zorder=2)


def _widened(low: float, high: float, is_log: bool) -> tuple[float, float]:
    if is_log:
        factor = math.exp(0.05 * math.log(high / low))
        return low / factor, high * factor
    return low - 0.05 * (high - low), high + 0.05 * (high - low)


def shown(scores: np.ndarray, lower: bool) -> list[tuple[int, str]]:
    """Members whose histories are drawn: the best, the median and the worst by their scores, at most all.

    Args:
        scores: `[members]`; NaN for those that failed, which are drawn only where there are no others.
        lower: whether lower is better.

    Returns:
        Number and a word for each.
    """
    order = statistics.ranking(-scores if lower else scores)
    order = order[: max(1, int(np.isfinite(scores).sum()))]
    chosen = {0: "best", len(order) // 2: "median", len(order) - 1: "worst"}
    return [(int(order[place]), word if len(order) > 1 else "") for place, word in sorted(chosen.items())]

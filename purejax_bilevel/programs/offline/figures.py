"""Figures of offline agents, from results datasets alone: scores and what the ensemble promises against pessimism.

Lines are means over seeds, bands 95 % bootstrap intervals of the mean. The best snapshot of a run is chosen by its true
return, which an offline agent does not know: it shows what stopping in time would be worth.
"""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path

import matplotlib
import numpy as np
import xarray
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from purejax_bilevel.programs.offline.protocol import Curve
from purejax_bilevel.results import outputs, plots, statistics
from purejax_bilevel.results.dataset import SEED, STEP, setting_dimensions

Datasets = Mapping[str, xarray.Dataset]  # by agent

LABELS = {
    "pessimism": "pessimism (lambda{units})",
    "ood_threshold": "largest uncertainty that is trusted (tau{units})",
}
UNITS = {"pessimism": ", in units of r_max / u_max", "ood_threshold": ", in units of u_max"}


def write_figures(dataset: xarray.Dataset, folder: Path) -> None:
    """Writes the figures of a run into a folder."""
    plots.learning_curves(dataset, folder / outputs.CURVES, dataset.attrs["headline"], title=dataset.attrs["title"])
    for axis in LABELS:
        if setting_dimensions(dataset) == (axis,):
            against(axis, {dataset.attrs["title"]: dataset}, folder / f"{axis}.png")


def against(axis: str, datasets: Datasets, path: str | Path) -> Path:
    """Draws true scores, of the last and of the best snapshot, and the gaps between what agent and ensemble expect and
    what comes true, against a coefficient.

    Args:
        axis: `pessimism` or `ood_threshold`.
        datasets: by agent, with that dimension.
        path: the figure's file; its ending says the format.

    Returns:
        The path.

    Raises:
        UserError: other hyper-parameters vary too, or the place is not writable.
    """
    with matplotlib.rc_context(plots.STYLE):
        figure = Figure(figsize=(12.0, 3.8), layout="constrained")
        FigureCanvasAgg(figure)
        true, belief, gap = figure.subplots(1, 3)
        for number, (label, dataset) in enumerate(datasets.items()):
            color, variable = plots.PALETTE[number % len(plots.PALETTE)], _score(dataset)
            plots.draw_means(true, dataset, axis, statistics.member_scores(dataset, variable), color, label)
            best, name = _best(dataset, variable), f"{label}, best snapshot"
            plots.draw_means(true, dataset, axis, best, color, name, dashed=True, banded=False)
            plots.draw_means(belief, dataset, axis, statistics.member_scores(dataset, "value_gap"), color, label)
            plots.draw_means(gap, dataset, axis, statistics.member_scores(dataset, "return_gap"), color, label)
        dataset = next(iter(datasets.values()))
        seeds = max(own.sizes[SEED] for own in datasets.values())
        over = f"\nmean over {seeds} seeds, 95 % interval" if seeds > 1 else ""
        true.set(ylabel=f"{dataset[_score(dataset)].attrs['long_name']}{over}")
        belief.set(ylabel="critics' value minus true discounted return")
        gap.set(ylabel="return predicted by the ensemble minus true return")
        units = UNITS[axis] if dataset.attrs["config"].get("units") == "relative" else ""
        for panel in (belief, gap):
            panel.axhline(0.0, color=plots.GREY, linewidth=1.0, zorder=1)
        for panel in (true, belief, gap):
            panel.set(xlabel=LABELS[axis].format(units=units))
        true.legend(loc="best", fontsize=7)
        return plots._write(figure, path)


FIGURES: dict[str, Callable[[Datasets, str | Path], Path]] = {axis: functools.partial(against, axis) for axis in LABELS}
AXES = {axis: axis for axis in LABELS}  # of the figures


def bandit(curves: Mapping[str, Curve], variable: str, path: str | Path) -> Path:
    """Draws the true mean of the policy that a bandit chooses against the episodes that it has spent.

    Args:
        curves: by run.
        variable: that policies are compared by.
        path: the figure's file.

    Returns:
        The path.

    Raises:
        UserError: the place is not writable.
    """
    with matplotlib.rc_context(plots.STYLE):
        figure = Figure(figsize=(6.0, 4.0), layout="constrained")
        FigureCanvasAgg(figure)
        panel = figure.subplots()
        for number, (label, curve) in enumerate(curves.items()):
            color, episodes = plots.PALETTE[number % len(plots.PALETTE)], np.arange(1, len(curve.mean) + 1)
            panel.plot(episodes, curve.mean, color=color, label=label)
            panel.fill_between(episodes, curve.low, curve.high, color=color, alpha=0.2, linewidth=0)
        panel.set(xscale="log", xlabel="episodes spent", ylabel=f"true mean {variable} of the policy chosen")
        panel.legend(loc="best", fontsize=7)
        return plots._write(figure, path)


def _score(dataset: xarray.Dataset) -> str:
    return "score" if "score" in dataset else "evaluation_return"


def _best(dataset: xarray.Dataset, variable: str) -> np.ndarray:
    """Of each member the highest score of an evaluation, `[values, seeds]`; NaN for members that failed."""
    array = dataset[variable].transpose(*setting_dimensions(dataset), SEED, STEP)
    return np.where(statistics.failed_members(dataset), np.nan, array.max(STEP).values)

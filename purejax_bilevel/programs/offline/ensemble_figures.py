"""Figures of a fitted ensemble, from a results dataset alone: learning curve, calibration, and the sine with a gap.

calibration.png: error by decile of each uncertainty, coverage of intervals, error against the networks' distance.
sine.png: what each network says of the toy dataset, and both kinds of uncertainty over the gap.
All are of the setting with the lowest error on held-out rows, with all of its seeds; sine.png is of its first seed.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import matplotlib
import numpy as np
import xarray
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from purejax_bilevel.programs.offline import KINDS, LEVELS, toy
from purejax_bilevel.results import outputs, plots, statistics
from purejax_bilevel.results.dataset import SEED, setting_dimensions

CALIBRATION, SINE = "calibration.png", "sine.png"
DECILES = 10
SHOWN = "max_distance"  # in the panel of single rows
SOURCES = ("held-out rows", "other dataset")


def write_figures(dataset: xarray.Dataset, folder: Path) -> None:
    """Writes the figures into a folder."""
    plots.learning_curves(dataset, folder / outputs.CURVES, "validation_error", title=dataset.attrs["title"])
    calibration(dataset, folder / CALIBRATION)
    if dataset.attrs["config"].get("test_dataset") == toy.GRID:
        sine(dataset, folder / SINE)


def _of_first(draw: Callable[[xarray.Dataset, str | Path], Path]) -> Callable[[Mapping, str | Path], Path]:
    """A figure of a report, which has a dataset for each agent: this program has one agent."""
    return lambda datasets, path: draw(next(iter(datasets.values())), path)


def best_setting(dataset: xarray.Dataset) -> xarray.Dataset:
    """The members of the setting with the lowest error that did not fail: dimension `seed` alone."""
    scores = statistics.member_scores(dataset, "network_error")  # NaN for members that failed
    means = np.where(np.isfinite(scores), scores, np.inf).mean(-1)
    dimensions = setting_dimensions(dataset)
    place = np.unravel_index(means.argmin(), [dataset.sizes[name] for name in dimensions]) if dimensions else ()
    chosen = dataset.isel(dict(zip(dimensions, place, strict=True)))
    fine = ~chosen["failed"].values
    return chosen.isel({SEED: fine}) if fine.any() else chosen


def calibration(dataset: xarray.Dataset, path: str | Path) -> Path:
    """Draws how errors and uncertainties go together.

    Args:
        dataset: from a run of the ensemble program.
        path: the figure's file.

    Returns:
        The path.
    """
    chosen = best_setting(dataset)
    with matplotlib.rc_context(plots.STYLE):
        figure = Figure(figsize=(11.0, 4.4), layout="constrained")
        FigureCanvasAgg(figure)
        deciles, coverage, rows = figure.subplots(1, 3)
        for source in range(chosen.sizes["source"]):
            _deciles(deciles, chosen, source)
            _coverage(coverage, chosen, source)
            _rows(rows, chosen, source)
        deciles.set(xlabel="decile of the uncertainty", ylabel="mean error of the next observation", yscale="log")
        coverage.set(xlabel="probability of the interval", ylabel="share of numbers inside", xlim=(0, 1), ylim=(0, 1))
        coverage.plot([0, 1], [0, 1], color=plots.GREY, linewidth=1.0, zorder=1)
        rows.set(xlabel=f"uncertainty ({SHOWN})", ylabel="error", xscale="log", yscale="log")
        rows.xaxis.set_minor_formatter(NullFormatter())
        deciles.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=chosen.sizes["source"], fontsize=7)
        for panel in (coverage, rows):
            panel.legend(loc="best")
        seeds = f", {chosen.sizes[SEED]} seeds" if chosen.sizes[SEED] > 1 else ""
        figure.suptitle(f"{dataset.attrs['title']}: calibration{seeds}")
        return plots._write(figure, path)


def _deciles(panel: Axes, chosen: xarray.Dataset, source: int) -> None:
    error = chosen["row_error"].values[:, source]  # [seed, row]
    for number, kind in enumerate(KINDS):
        uncertainty = chosen["row_uncertainty"].values[:, source, number]
        if np.ptp(uncertainty) == 0:
            continue  # no variances are learned
        means = np.mean([_by_decile(*pair) for pair in zip(uncertainty, error, strict=True)], 0)
        correlation = chosen["rank_correlation"].values[:, source, number].mean()
        label = f"{kind} ({correlation:.2f})" if source == 0 else f"{kind}, {SOURCES[1]} ({correlation:.2f})"
        style = plots.DASHES[source]
        panel.plot(np.arange(1, DECILES + 1), means, color=plots.PALETTE[number], linestyle=style, label=label)


def _by_decile(uncertainty: np.ndarray, error: np.ndarray) -> list[float]:
    return [float(part.mean()) for part in np.array_split(error[np.argsort(uncertainty, kind="stable")], DECILES)]


def _coverage(panel: Axes, chosen: xarray.Dataset, source: int) -> None:
    shares = chosen["coverage"].values[:, source].mean(0)
    if np.isfinite(shares).all():
        panel.plot(LEVELS, shares, color=plots.PALETTE[source], marker="o", markersize=3.5, label=SOURCES[source])


def _rows(panel: Axes, chosen: xarray.Dataset, source: int) -> None:
    uncertainty = chosen["row_uncertainty"].values[:, source, KINDS.index(SHOWN)].ravel()
    error = chosen["row_error"].values[:, source].ravel()
    panel.scatter(uncertainty, error, s=4, alpha=0.4, color=plots.PALETTE[source], linewidth=0, label=SOURCES[source])


def sine(dataset: xarray.Dataset, path: str | Path) -> Path:
    """Draws what the networks say of the toy dataset over its gap, and how uncertain they are.

    Args:
        dataset: from a run of the ensemble program on `sine`, with `sine-grid` as the other dataset.
        path: the figure's file.

    Returns:
        The path.
    """
    chosen = best_setting(dataset).isel({SEED: 0})
    x = toy.grid(chosen.sizes["row"])
    with matplotlib.rc_context(plots.STYLE):
        figure = Figure(figsize=(8.0, 6.0), layout="constrained")
        FigureCanvasAgg(figure)
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
        for panel in (above, below):
            for side in (-1, 1):
                panel.axvspan(*sorted((side * np.pi, side * 2 * np.pi)), color=plots.GREY, alpha=0.2, linewidth=0)
        above.plot(x, np.sin(x), color="#404040", linewidth=1.0, label="sin x")
        means, stds = chosen["row_reward"].values, chosen["row_reward_std"].values
        for number, (mean, std) in enumerate(zip(means, stds, strict=True)):
            color = plots.PALETTE[number % len(plots.PALETTE)]
            above.plot(x, mean, color=color, linewidth=0.8, label="networks" if number == 0 else None)
            above.fill_between(x, mean - std, mean + std, color=color, alpha=0.08, linewidth=0)
        uncertainties = chosen["row_uncertainty"].values[1]
        below.plot(x, uncertainties[KINDS.index("max_distance")], label="max_distance", color=plots.PALETTE[0])
        below.plot(x, stds.mean(0), label="standard deviation learned", color=plots.PALETTE[1])
        below.plot(x, toy.noise_std(x), label="of the noise", color="#404040", linewidth=1.0, linestyle=plots.DASHES[1])
        above.set(ylabel="y", ylim=(-3, 3))
        below.set(xlabel="x (grey: where there is data)", yscale="log")
        above.legend(loc="upper right", ncols=3)
        below.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)
        figure.suptitle(f"{dataset.attrs['title']}: mean and standard deviation of each network")
        return plots._write(figure, path)


# Of reports, as in the other programs; no figure needs an axis of settings.
FIGURES: dict[str, Callable[[Mapping[str, xarray.Dataset], str | Path], Path]] = {
    "calibration": _of_first(calibration),
    "sine": _of_first(sine),
}
AXES = dict.fromkeys(FIGURES)

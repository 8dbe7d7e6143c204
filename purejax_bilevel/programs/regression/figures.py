"""Figures of non-stationary regression, from a results dataset alone: how well the shift is tracked, with which past
data, and what the fitted function looks like.

curves.png: loss and regrets against time. lambda.png: weight of each lag against time. approximation.png: network and
truth at five times.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
import xarray
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from purejax_bilevel.members import counted
from purejax_bilevel.programs.regression import GRID_LIMIT, GRID_POINTS
from purejax_bilevel.results import plots, statistics
from purejax_bilevel.results.dataset import SEED, STEP, setting_dimensions, setting_labels

CURVES, WEIGHTS, APPROXIMATION = "curves.png", "lambda.png", "approximation.png"
# A sum that starts with 1e12 is a flat line whatever comes after: the increments show that, on a logarithmic scale.
PANELS = ("evaluation_mse", "outer_loss", "local_regret", "local_regret_increment", "static_regret")
NUM_TIMES = 5
MOST_MAPS = 9  # settings in lambda.png
MOST_ROWS = 4  # settings in approximation.png
TRUTH_COLOR, NETWORK_COLOR = "#404040", plots.PALETTE[1]


def write_figures(dataset: xarray.Dataset, folder: Path) -> None:
    """Writes the three figures into a folder."""
    curves(dataset, folder / CURVES)
    weights(dataset, folder / WEIGHTS)
    approximation(dataset, folder / APPROXIMATION)


# ---------------------------------------------------------------- loss and regrets


def curves(dataset: xarray.Dataset, path: str | Path) -> Path:
    """Draws losses and regrets against time, one line per setting: interquartile mean and interval over seeds.

    Args:
        dataset: from a run of the regression program.
        path: the figure's file.

    Returns:
        The path.
    """
    names = [name for name in PANELS if _has_values(dataset, name)] or list(PANELS[:1])
    all_curves = [plots._curves(dataset, name) for name in names]
    layout = _one_panel_layout(dataset, all_curves[0])
    with matplotlib.rc_context(plots.STYLE):
        columns = math.ceil(len(names) / 2)
        figure = Figure(figsize=(0.4 + 3.5 * columns, 5.0), layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(2, columns, sharex=True).flatten().tolist()
        for empty in panels[len(names) :]:
            empty.remove()
        for above in panels[len(names) - columns : columns]:
            above.tick_params(labelbottom=True)
        for panel, name, series in zip(panels, names, all_curves, strict=False):
            for line in layout.lines:
                plots._draw_curve(panel, series, line)
            _finish_curve(panel, series, plots._heading(dataset, name))
        plots._legend(figure, panels[: len(names)], layout.legend)
        plots._label(figure, panels[: len(names)], dataset[STEP].attrs.get("long_name", STEP), "")
        figure.suptitle(_title(dataset, _seeds_in_words(dataset)))
        return plots._write(figure, path)


def _one_panel_layout(dataset: xarray.Dataset, series: plots.Curves) -> plots.Arrangement:
    dimensions = setting_dimensions(dataset)
    count = math.prod(dataset.sizes[name] for name in dimensions)
    if count <= plots.ONE_PANEL:
        return plots._one_panel(dataset)
    if len(dimensions) == 1 and plots._is_number(dataset, dimensions[0]):
        return plots._ordered_lines(dataset, dimensions[0])
    return plots._best_in_colour(dataset, series)


def _finish_curve(panel: Axes, series: plots.Curves, title: str) -> None:
    panel.set_title(title)
    panel.set_xlim(series.steps[0], max(series.steps[-1], series.steps[0] + 1))
    panel.xaxis.set_major_formatter(EngFormatter(sep=""))
    panel.locator_params(axis="x", nbins=5)
    values = series.interval.estimate[np.isfinite(series.interval.estimate)]
    if len(values) and values.min() > 0 and values.max() > 300 * values.min():
        panel.set_yscale("log")
    else:
        panel.ticklabel_format(axis="y", scilimits=(-3, 5), useMathText=True)


def _has_values(dataset: xarray.Dataset, name: str) -> bool:
    return name in dataset and bool(np.isfinite(dataset[name].values).any())  # older files lack the increments


# ---------------------------------------------------------------- lambda


def weights(dataset: xarray.Dataset, path: str | Path) -> Path:
    """Draws lambda as a map, lag against time, one per setting (the best nine of more), mean over seeds.

    Args:
        dataset: from a run of the regression program.
        path: the figure's file.

    Returns:
        The path.
    """
    maps = _by_setting(dataset, "lambda")
    maps = np.where(statistics.failed_members(dataset)[..., None, None], np.nan, maps)
    shown = _best_settings(dataset, MOST_MAPS)
    means = {setting: _mean(maps[setting]) for setting in shown}  # [steps, lags]
    largest = max(max((np.nanmax(m) for m in means.values() if np.isfinite(m).any()), default=0.0), 1e-12)
    columns = min(3, len(shown))
    rows = math.ceil(len(shown) / columns)
    with matplotlib.rc_context({**plots.STYLE, "axes.grid": False}):
        size = (6.4, 3.6) if len(shown) == 1 else (1.2 + 2.9 * columns, 0.9 + 2.1 * rows)
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten().tolist()
        for empty in grid[len(shown) :]:
            empty.remove()
        image: Any = None
        for panel, setting in zip(grid, shown, strict=False):
            image = _draw_map(panel, dataset[STEP].values, means[setting], largest)
            panel.set_title(_setting_name(dataset, setting))
        for panel in grid[max(0, len(shown) - columns) : len(shown)]:
            panel.tick_params(labelbottom=True)
        plots._label(figure, grid[: len(shown)], dataset[STEP].attrs.get("long_name", STEP), "lag (time steps ago)")
        figure.colorbar(image, ax=grid[: len(shown)], label=f"lambda{_mean_in_words(dataset)}", pad=0.02)
        figure.suptitle(_title(dataset, _selection_in_words(dataset, len(shown))))
        return plots._write(figure, path)


def _draw_map(panel: Axes, steps: np.ndarray, values: np.ndarray, largest: float) -> Any:
    edges = np.concatenate([steps - np.diff(steps, prepend=0), steps[-1:]]).astype(float)
    lags = np.arange(values.shape[1] + 1) + 0.5
    image = panel.pcolormesh(edges, lags, values.T, cmap="viridis", norm=Normalize(0.0, largest), rasterized=True)
    used = np.flatnonzero(np.isfinite(values).any(axis=0))
    panel.set_ylim(0.5, max(panel.get_ylim()[1], (used[-1] if len(used) else 0) + 1.5))
    panel.xaxis.set_major_formatter(EngFormatter(sep=""))
    panel.locator_params(axis="x", nbins=5)
    panel.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    return image


# ---------------------------------------------------------------- approximation


def approximation(dataset: xarray.Dataset, path: str | Path) -> Path:
    """Draws the network's first output and the truth at five times, for the median member of the best settings.

    Lines for one input, contours for two, and predicted against true values beyond.

    Args:
        dataset: from a run of the regression program.
        path: the figure's file.

    Returns:
        The path.
    """
    steps = dataset[STEP].values
    times = sorted({round(place) for place in np.linspace(0, len(steps) - 1, NUM_TIMES)})
    shown = _best_settings(dataset, MOST_ROWS)
    predicted, truth = _by_setting(dataset, "prediction"), _by_setting(dataset, "truth")
    input_dim = int(dataset.attrs["config"]["input_dim"])
    draw = _drawing(input_dim)
    with matplotlib.rc_context(plots.STYLE):
        figure = Figure(figsize=(0.8 + 2.1 * len(times), 1.3 + 2.0 * len(shown)), layout="constrained")
        FigureCanvasAgg(figure)
        # Lines and contours share their scales, and points share them within a row: the seeds' functions differ.
        shared: Literal["row", "all"] = "row" if input_dim > 2 else "all"
        panels = figure.subplots(len(shown), len(times), squeeze=False, sharex=shared, sharey=shared)
        for row, setting in enumerate(shown):
            seed = _median_seed(dataset, setting)
            for column, time in enumerate(times):
                panel = panels[row, column]
                draw(panel, predicted[setting, seed, time], truth[setting, seed, time])
                error = np.mean((predicted[setting, seed, time] - truth[setting, seed, time]) ** 2)
                when = f"time {steps[time]}, " if row == 0 or len(shown) == 1 else ""
                panel.set_title(f"{when}MSE {error:.3g}")
            if len(shown) > 1:
                panels[row, 0].set_ylabel(_setting_name(dataset, setting))
        _label_approximation(figure, panels, input_dim)
        figure.suptitle(_title(dataset, _selection_in_words(dataset, len(shown), "median member")))
        return plots._write(figure, path)


def _drawing(input_dim: int) -> Callable[[Axes, np.ndarray, np.ndarray], None]:
    return {1: _draw_lines, 2: _draw_contours}.get(input_dim, _draw_points)


def _draw_lines(panel: Axes, predicted: np.ndarray, truth: np.ndarray) -> None:
    places = np.linspace(-GRID_LIMIT, GRID_LIMIT, len(truth))
    panel.plot(places, truth, color=TRUTH_COLOR)
    panel.plot(places, predicted, color=NETWORK_COLOR, linestyle=plots.DASHES[1])


def _draw_contours(panel: Axes, predicted: np.ndarray, truth: np.ndarray) -> None:
    points = GRID_POINTS[2]
    places = np.linspace(-GRID_LIMIT, GRID_LIMIT, points)
    levels = np.linspace(truth.min(), truth.max() + 1e-6, 7)
    panel.contour(
        places, places, truth.reshape(points, points), levels, colors=TRUTH_COLOR, linestyles="solid", linewidths=1.0
    )
    network = np.clip(predicted.reshape(points, points), levels[0] - 1.0, levels[-1] + 1.0)
    panel.contour(places, places, network, levels, colors=NETWORK_COLOR, linestyles="dashed", linewidths=1.0)


def _draw_points(panel: Axes, predicted: np.ndarray, truth: np.ndarray) -> None:
    panel.axline((float(truth.mean()), float(truth.mean())), slope=1.0, color=TRUTH_COLOR, linewidth=0.8, zorder=1)
    panel.plot(truth, predicted, ".", color=NETWORK_COLOR, markersize=3, alpha=0.6)


def _label_approximation(figure: Figure, panels: np.ndarray, input_dim: int) -> None:
    if input_dim > 2:
        figure.supxlabel("true first output (line: perfect prediction)", fontsize=9)
        figure.supylabel("predicted first output", fontsize=9)
        return
    words = ("input", "first output") if input_dim == 1 else ("first input", "second input")
    figure.supxlabel(words[0], fontsize=9)
    figure.supylabel(words[1], fontsize=9)
    heading = "" if input_dim == 1 else "contours of\nfirst output"
    legend: plots.Legend = [(heading, [("truth", TRUTH_COLOR, "-"), ("network", NETWORK_COLOR, "--")])]
    plots._legend(figure, [*panels.flat, panels[0, 0]], legend)


# ---------------------------------------------------------------- words and choices


def _by_setting(dataset: xarray.Dataset, name: str) -> np.ndarray:
    """`[settings, seeds, steps, k]`."""
    extra = next(dimension for dimension in dataset[name].dims[::-1] if dimension != STEP)
    kept = (*setting_dimensions(dataset), SEED, STEP, extra)
    values = dataset[name].transpose(*kept).values
    return values.reshape(-1, *values.shape[-3:])


def _mean(values: np.ndarray) -> np.ndarray:
    """Mean over the first axis without NaN; NaN where nothing is left."""
    present = np.isfinite(values)
    total = np.where(present, values, 0.0).sum(axis=0)
    return np.where(present.any(axis=0), total / np.maximum(present.sum(axis=0), 1), np.nan)


def _best_settings(dataset: xarray.Dataset, most: int) -> list[int]:
    """Up to `most` settings in their own order: all, or those with the lowest final loss."""
    final = [row.iqm for row in statistics.summary_table(dataset, dataset.attrs["headline"])]
    order = np.argsort(np.where(np.isfinite(final), final, np.inf), kind="stable")
    return sorted(order[:most].tolist())


def _median_seed(dataset: xarray.Dataset, setting: int) -> int:
    """The seed whose final loss is the median one."""
    scores = statistics.member_scores(dataset, dataset.attrs["headline"])[setting]
    order = np.argsort(np.where(np.isfinite(scores), scores, np.inf), kind="stable")
    return int(order[max(int(np.isfinite(scores).sum()) - 1, 0) // 2])


def _setting_name(dataset: xarray.Dataset, setting: int) -> str:
    return plots._words(setting_labels(dataset)[setting])


def _title(dataset: xarray.Dataset, note: str) -> str:
    config = dataset.attrs["config"]
    return f"{config['agent_type']}, {config['shift_type']} shift" + (f": {note}" if note else "")


def _seeds_in_words(dataset: xarray.Dataset) -> str:
    seeds, failed = dataset.sizes[SEED], int(statistics.failed_members(dataset).sum())
    left_out = f"; {counted(failed, 'diverged member')} left out" if failed else ""
    return (f"IQM over {seeds} seeds, 95 % interval" if seeds > 1 else "one seed") + left_out


def _mean_in_words(dataset: xarray.Dataset) -> str:
    return f", mean over {dataset.sizes[SEED]} seeds" if dataset.sizes[SEED] > 1 else ""


def _selection_in_words(dataset: xarray.Dataset, shown: int, what: str = "") -> str:
    count = math.prod(dataset.sizes[name] for name in setting_dimensions(dataset))
    several = what if dataset.sizes[SEED] > 1 else ""
    best = f"the best {shown} of {count} settings" if shown < count else ""
    return " of ".join(part for part in (several, best) if part) or several

"""Learning curves, made from a results dataset alone.

Every line is the interquartile mean over seeds, its band the 95 % bootstrap interval. Up to ten settings share one
panel. More are split into one panel per value of the first hyper-parameter, coloured by the second and dashed by the
third; a search over many settings shows the best in colour and the others in grey. The colours stay apart for
colour-blind readers.
"""

import dataclasses
import io
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import xarray
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.ticker import EngFormatter, FixedLocator, NullLocator

from purejax_bilevel.errors import UserError
from purejax_bilevel.members import counted, format_value
from purejax_bilevel.results import statistics
from purejax_bilevel.results.dataset import SEED, STEP, setting_dimensions, setting_labels, write_bytes

# Okabe and Ito's palette without yellow, which is faint on white.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))
GREY = "#B8B8B8"
ONE_PANEL = 10  # most settings in one panel
MANY_LINES = 8  # most in one of several panels; beyond, dashes are given up for rows of panels
MANY_PANELS = 36
MANY_COLUMNS = 6
MANY_BANDS = 6  # beyond, intervals would hide each other
HIGHLIGHTED = 6
STYLE: dict[Any, Any] = {
    "axes.grid": True,
    "axes.labelsize": 9,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 9,
    "figure.titlesize": 11,
    "font.size": 9,
    "grid.alpha": 0.3,
    "grid.linewidth": 0.6,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "lines.linewidth": 1.5,
    "savefig.dpi": 150,
}


# ---------------------------------------------------------------- learning curves


def learning_curves(
    dataset: xarray.Dataset,
    path: str | Path,
    variable: str = "evaluation_return",
    title: str | None = None,
) -> Path:
    """Draws the interquartile mean over seeds against the step, with its interval, one line per setting.

    Args:
        dataset: from `results.build_dataset`.
        path: the figure's file; its ending says the format (png, pdf, svg).
        variable: a series; extra dimensions (network layers) are averaged.
        title: by default program and environment.

    Returns:
        The path.

    Raises:
        UserError: no such variable, it has no steps, or the place is not writable.
    """
    curves = _curves(dataset, variable)
    with matplotlib.rc_context(STYLE):
        layout = _layout(dataset, curves)
        rows = math.ceil(len(layout.titles) / layout.columns)
        figure, panels = _panels(len(layout.titles), layout.columns, rows)
        if len(layout.lines) == 1:
            panels[0].plot(curves.steps, curves.scores[0].T, color=GREY, linewidth=0.6, zorder=1)
        for line in layout.lines:
            _draw_curve(panels[line.panel], curves, line)
        for panel, panel_title in zip(panels, layout.titles, strict=True):
            panel.set_title(panel_title)
            panel.set_xlim(curves.steps[0], max(curves.steps[-1], curves.steps[0] + 1))
            panel.xaxis.set_major_formatter(EngFormatter(sep=""))
            panel.locator_params(axis="x", nbins=6 if layout.columns == 1 else 4)
        step_label = dataset[STEP].attrs.get("long_name", STEP)
        score_label = f"{_name_with_units(dataset, variable)}\nIQM over {dataset.sizes[SEED]} seeds, 95 % interval"
        _label(
            figure, panels, step_label, score_label if dataset.sizes[SEED] > 1 else _name_with_units(dataset, variable)
        )
        _legend(figure, panels, layout.legend)
        _title(figure, panels, dataset, title, curves.failed)
        return _write(figure, path)


@dataclasses.dataclass(frozen=True)
class Curves:
    """One series and its statistics over seeds."""

    steps: np.ndarray  # [steps]
    scores: np.ndarray  # [settings, seeds, steps], NaN where failed
    interval: statistics.Estimate  # [settings, steps]
    failed: int
    lower_is_better: bool

    def ranking(self) -> list[int]:
        """Settings from the best last value to the worst; those without any value are left out."""
        ends = [row[np.isfinite(row)] for row in self.interval.estimate]
        last = {setting: float(end[-1]) for setting, end in enumerate(ends) if len(end)}
        return sorted(last, key=lambda setting: last[setting] if self.lower_is_better else -last[setting])


@dataclasses.dataclass(frozen=True)
class Line:
    """How and where one setting is drawn."""

    setting: int
    panel: int = 0
    color: Any = PALETTE[0]
    dash: Any = "-"
    band: bool = True
    order: int = 3


Entry = tuple[str, Any, Any]  # label, colour, dash
Legend = list[tuple[str, list[Entry]]]  # heading and entries


@dataclasses.dataclass(frozen=True)
class Arrangement:
    """Panels by title, the lines in them, and the legend of all."""

    lines: list[Line]
    legend: Legend
    titles: tuple[str, ...] = ("",)
    columns: int = 1


def _curves(dataset: xarray.Dataset, variable: str) -> Curves:
    array = statistics.require_variable(dataset, variable)
    if STEP not in array.dims:
        raise UserError(f"{variable!r} was measured once, not at every step: a learning curve needs a series")
    kept = (*setting_dimensions(dataset), SEED, STEP)
    array = array.mean([name for name in array.dims if name not in kept], skipna=False).transpose(*kept)
    scores = array.values.astype(np.float64).reshape(-1, *array.shape[-2:])
    failed = statistics.failed_members(dataset) | ~np.isfinite(scores).any(axis=-1)
    scores = np.where(failed[..., None], np.nan, scores)
    interval = statistics.stratified_bootstrap_interval(scores.swapaxes(1, 2)[..., None])
    lower = statistics.lower_is_better(dataset, variable)
    return Curves(dataset[STEP].values, scores, interval, int(failed.sum()), lower)


def _layout(dataset: xarray.Dataset, curves: Curves) -> Arrangement:
    dimensions = setting_dimensions(dataset)
    sizes = [dataset.sizes[name] for name in dimensions]
    if math.prod(sizes) <= ONE_PANEL:
        return _one_panel(dataset)
    dashed = len(sizes) > 2 and sizes[1] * sizes[2] <= MANY_LINES and sizes[2] <= len(DASHES)
    if len(sizes) > 1 and math.prod(sizes) <= MANY_PANELS * math.prod(sizes[1 : 2 + dashed]) and sizes[1] <= MANY_LINES:
        return _small_multiples(dataset, dimensions, dashed)
    if len(sizes) == 1 and _is_number(dataset, dimensions[0]) and len(dataset.attrs["axes"][dimensions[0]]) == 1:
        return _ordered_lines(dataset, dimensions[0])
    return _best_in_colour(dataset, curves)


def _one_panel(dataset: xarray.Dataset) -> Arrangement:
    labels = setting_labels(dataset)
    lines = [Line(i, 0, PALETTE[i % len(PALETTE)], DASHES[i // len(PALETTE)]) for i in range(len(labels))]
    if len(lines) == 1:
        return Arrangement(lines, [])
    entries = [(_words(label), line.color, line.dash) for label, line in zip(labels, lines, strict=True)]
    return Arrangement(lines, [("", entries)])


def _small_multiples(dataset: xarray.Dataset, dimensions: Sequence[str], dashed: bool) -> Arrangement:
    """Columns by the first axis, colour by the second, dashes by the third where few; rows by all others."""
    sizes = [dataset.sizes[name] for name in dimensions]
    panel_axes = [*range(2 + dashed, len(sizes)), 0]
    panels = list(itertools.product(*(range(sizes[axis]) for axis in panel_axes)))
    colors, band = _colors(dataset, dimensions[1]), math.prod(sizes[1 : 2 + dashed]) <= MANY_BANDS
    lines = []
    for setting, index in enumerate(np.ndindex(*sizes)):
        panel = panels.index(tuple(index[axis] for axis in panel_axes))
        dash = DASHES[index[2]] if dashed else "-"
        lines.append(Line(setting, panel, colors[index[1]], dash, band))
    names = [dimensions[axis] for axis in panel_axes]
    titles = [
        ", ".join(
            _point(dataset, name, point, named=True)
            for name, point in zip(reversed(names), reversed(panel), strict=True)
        )
        for panel in panels
    ]
    entries = [(_point(dataset, dimensions[1], point), colors[point], "-") for point in range(sizes[1])]
    legend: Legend = [(_heading(dataset, dimensions[1]), entries)]
    if dashed:
        entries = [(_point(dataset, dimensions[2], point), "#404040", DASHES[point]) for point in range(sizes[2])]
        legend.append((_heading(dataset, dimensions[2]), entries))
    wrapped = len(panel_axes) == 1 or sizes[0] > MANY_COLUMNS
    return Arrangement(lines, legend, tuple(titles), _columns(len(panels)) if wrapped else sizes[0])


def _ordered_lines(dataset: xarray.Dataset, dimension: str) -> Arrangement:
    """Many values of one number: the colour follows the value."""
    colors, count = _colors(dataset, dimension), dataset.sizes[dimension]
    named = sorted({round(position) for position in np.linspace(0, count - 1, min(count, 12))})
    entries = [(_point(dataset, dimension, point), colors[point], "-") for point in named]
    lines = [Line(point, color=colors[point], band=False) for point in range(count)]
    return Arrangement(lines, [(_heading(dataset, dimension), entries)])


def _best_in_colour(dataset: xarray.Dataset, curves: Curves) -> Arrangement:
    """The best settings in colour, all others in grey behind them."""
    labels, best = setting_labels(dataset), curves.ranking()[:HIGHLIGHTED]
    grey = [Line(i, color=GREY, band=False, order=2) for i in range(len(labels)) if i not in best]
    colored = [Line(setting, color=PALETTE[rank]) for rank, setting in enumerate(best)]
    entries = [(_words(labels[line.setting]), line.color, line.dash) for line in colored]
    heading = f"best {len(best)} of {len(labels)} settings"
    return Arrangement([*grey, *colored], [(heading, [*entries, (f"the other {len(grey)}", GREY, "-")])])


def _draw_curve(panel: Axes, curves: Curves, line: Line) -> None:
    estimate, low, high = (field[line.setting] for field in curves.interval[:3])
    marker = "o" if len(curves.steps) == 1 else None
    panel.plot(
        curves.steps,
        estimate,
        color=line.color,
        linestyle=line.dash,
        marker=marker,
        zorder=line.order,
        clip_on=bool(marker is None),
    )
    if line.band:
        panel.fill_between(curves.steps, low, high, color=line.color, alpha=0.18, linewidth=0, zorder=line.order - 1)


# ---------------------------------------------------------------- scores against values


def _value_scale(panel: Axes, values: np.ndarray) -> np.ndarray:
    """Positions of the values on the horizontal axis, which is made logarithmic, linear or a list of names."""
    if not np.issubdtype(values.dtype, np.number):
        panel.set_xticks(range(len(values)), [_text(value) for value in values], parse_math=False)
        panel.set_xlim(-0.5, len(values) - 0.5)
        return np.arange(len(values), dtype=float)
    if values.min() > 0 and values.max() >= 10 * values.min():
        panel.set_xscale("log")
    different = np.unique(values)
    if len(different) <= 12:
        panel.xaxis.set_major_locator(FixedLocator(different.tolist()))
        panel.xaxis.set_minor_locator(NullLocator())
        panel.xaxis.set_major_formatter(lambda value, _: _text(float(value)))
    return values.astype(float)


def _draw_points(panel: Axes, positions: np.ndarray, scores: np.ndarray, color: str = PALETTE[0]) -> None:
    """One mark with its interval per score: settings of a random search, or categories."""
    middle, low, high = scores.T
    errors = np.nan_to_num(np.stack([middle - low, high - middle])).clip(min=0)
    panel.errorbar(positions, middle, errors, fmt="o", color=color, markersize=4, elinewidth=1.0)


def _draw_line(panel: Axes, positions: np.ndarray, scores: np.ndarray, color: str) -> None:
    order = np.argsort(positions)
    middle, low, high = scores[order].T
    panel.plot(positions[order], middle, color=color, marker="o", markersize=4)
    panel.fill_between(positions[order], low, high, color=color, alpha=0.18, linewidth=0)


def draw_means(
    panel: Axes,
    dataset: xarray.Dataset,
    axis: str,
    scores: np.ndarray,
    color: str,
    label: str,
    *,
    dashed: bool = False,
    banded: bool = True,
) -> Line2D:
    """Draws means over seeds and their 95 % bootstrap intervals against a hyper-parameter.

    Args:
        panel: where.
        dataset: with that hyper-parameter.
        axis: its name.
        scores: `[values of the axis, seeds]`; NaN for members that failed.
        color: of line and band.
        label: for the legend.
        dashed: a dashed line without markers.
        banded: whether the intervals are drawn.

    Raises:
        UserError: other hyper-parameters vary too.
    """
    if setting_dimensions(dataset) != (axis,):
        found = ", ".join(setting_dimensions(dataset)) or "none"
        raise UserError(f"this figure needs {axis} to be the only axis of an agent, the axes are {found}.")
    values = dataset[axis].values
    interval = statistics.stratified_bootstrap_interval(scores[..., None], statistics.mean)
    style = {"linestyle": DASHES[1], "marker": ""} if dashed else {"linestyle": "-", "marker": "o"}
    (line,) = panel.plot(values, interval.estimate, color=color, label=label, markersize=3.5, **style)
    if banded:
        panel.fill_between(values, interval.low, interval.high, color=color, alpha=0.18, linewidth=0)
    return line


# ---------------------------------------------------------------- words, colours, paper


def _panels(count: int, columns: int, rows: int) -> tuple[Figure, list[Axes]]:
    """Figure with `count` panels that share their axes; unused cells stay empty."""
    single = count == 1
    size = (6.4, 4.0) if single else (1.2 + 2.3 * columns, 0.9 + 1.9 * rows)
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)  # no display, no global state of pyplot
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    panels = grid.flatten().tolist()
    for empty in panels[count:]:
        empty.remove()
    for panel in panels[max(0, count - columns) : count]:
        panel.tick_params(labelbottom=True)  # also above an empty cell
    return figure, panels[:count]


def _label(figure: Figure, panels: Sequence[Axes], horizontal: str, vertical: str) -> None:
    if len(panels) == 1:
        panels[0].set_xlabel(horizontal)
        panels[0].set_ylabel(vertical)
    else:
        figure.supxlabel(horizontal, fontsize=9)
        figure.supylabel(vertical, fontsize=9)


def _legend(figure: Figure, panels: Sequence[Axes], legend: Legend) -> None:
    """Inside the panel while it is short; else to the right of everything, groups under their headings."""
    handles: list[Line2D] = []
    for heading, entries in legend:
        handles.extend(
            Line2D([], [], linestyle="", label=text) for text in ([" "] if handles else []) + [heading] if text
        )
        handles.extend(Line2D([], [], color=color, linestyle=dash, label=label) for label, color, dash in entries)
    if not handles:
        return
    longest = max(len(str(handle.get_label())) for handle in handles)
    if len(panels) == 1 and len(handles) <= 5 and longest <= 30:
        drawn = panels[0].legend(handles=handles, loc="best", frameon=True, framealpha=0.8, edgecolor="none")
    else:
        width, height = figure.get_size_inches()
        figure.set_size_inches(width + 0.5 + 0.07 * longest, max(height, 0.4 + 0.16 * len(handles)))
        drawn = figure.legend(handles=handles, loc="outside right center", handlelength=2.4)
    for text in drawn.get_texts():
        if text.get_text() in [heading for heading, _ in legend]:
            text.set_fontweight("bold")


def _title(figure: Figure, panels: Sequence[Axes], dataset: xarray.Dataset, title: str | None, failed: int) -> None:
    about = [str(dataset.attrs[key]) for key in ("program", "environment") if dataset.attrs.get(key)]
    lines = [title if title is not None else " on ".join(about)]
    if failed:
        members = math.prod(dataset.sizes[name] for name in (*setting_dimensions(dataset), SEED))
        lines.append(f"{failed} of {counted(members, 'member')} failed and {'is' if failed == 1 else 'are'} left out")
    text = "\n".join(line for line in lines if line)
    if len(panels) == 1:
        panels[0].set_title(text, fontsize=11)
    else:
        figure.suptitle(text)


def _write(figure: Figure, path: str | Path) -> Path:
    """Draws into memory, then writes the file in one step."""
    path, content = Path(path), io.BytesIO()
    known = figure.canvas.get_supported_filetypes()
    ending = path.suffix.lower().lstrip(".")
    if ending not in known:
        raise UserError(f"cannot draw {path.name}: the ending has to be one of {', '.join(sorted(known))}")
    _show_as_written(figure)
    figure.savefig(content, format=ending)
    write_bytes(path, content.getvalue())
    return path


def _show_as_written(figure: Figure) -> None:
    """A dollar in a label or title is a dollar, no mathematics; numbers at the axes need theirs for powers of ten."""
    numbers = {
        text
        for panel in figure.axes
        for line in (panel.xaxis, panel.yaxis)
        for text in line.findobj(Text)
        if text is not line.label
    }
    for text in figure.findobj(Text):
        if text not in numbers:
            text.set_parse_math(False)


def _text(value: Any) -> str:
    """A value for a figure, where three digits are enough."""
    return f"{value:.3g}" if isinstance(value, float | np.floating) else format_value(value)


def _words(label: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={_text(value)}" for name, value in label.items())


def _point(dataset: xarray.Dataset, dimension: str, point: int, named: bool = False) -> str:
    """One point of an axis in words; a single name may be left to a heading."""
    label = setting_labels(dataset.isel({name: 0 for name in setting_dimensions(dataset) if name != dimension}))[point]
    return _text(next(iter(label.values()))) if len(label) == 1 and not named else _words(label)


def _heading(dataset: xarray.Dataset, name: str) -> str:
    return str(dataset[name].attrs.get("long_name", name.replace("_", " ")))


def _name_with_units(dataset: xarray.Dataset, variable: str) -> str:
    units = dataset[variable].attrs.get("units")
    return _heading(dataset, variable) + (f" ({units})" if units else "")


def _is_number(dataset: xarray.Dataset, dimension: str) -> bool:
    return bool(np.issubdtype(dataset[dimension].dtype, np.number))


def _colors(dataset: xarray.Dataset, dimension: str) -> list[Any]:
    """Dark to light in the order of the values for several numbers; else colours that are easy to tell apart."""
    count = dataset.sizes[dimension]
    if count > len(PALETTE) or (count > 3 and _is_number(dataset, dimension)):
        rank = np.argsort(np.argsort(dataset[dimension].values)) if _is_number(dataset, dimension) else np.arange(count)
        return list(matplotlib.colormaps["viridis"](0.92 * rank / max(count - 1, 1)))
    return list(PALETTE[:count])


def _columns(panels: int) -> int:
    """Columns of a grid with few empty cells, at most four."""
    return min((3, 4), key=lambda columns: (-panels % columns, -columns))

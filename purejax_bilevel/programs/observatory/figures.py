"""Figure and table of the observatory, from results datasets and the measured costs beside them.

One panel per agent of the sweep, one row per estimator: which way its hypergradient points. What an estimator costs
stands at its row's end, where `costs.json` is there.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import xarray
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from purejax_bilevel.members import bytes_in_words, format_value
from purejax_bilevel.programs.observatory import COSTS
from purejax_bilevel.results import outputs, plots, statistics
from purejax_bilevel.results.dataset import SEED, STEP, file_name, setting_dimensions
from purejax_bilevel.results.document import Table

Datasets = Mapping[str, xarray.Dataset]  # by agent

FIGURE = "observatory.png"
TIMES = ("early", "middle", "late")
COLORS = ("#9ECAE1", "#4292C6", "#08306B")  # of these times
SPREAD = (10, 90)  # percentiles over seeds and batches
COLUMNS = ("", "estimator", *(f"cosine, {time}" for time in TIMES))
MORE_COLUMNS = ("same batch", "bias", "variance", "residual", "time", "memory")


def write_figures(dataset: xarray.Dataset, folder: Path) -> None:
    """Writes the figure of a single run into its folder."""
    plots.learning_curves(dataset, folder / outputs.CURVES, dataset.attrs["headline"], title=dataset.attrs["title"])
    _draw({dataset.attrs["title"]: dataset}, {dataset.attrs["title"]: _read(folder / COSTS)}, folder / FIGURE)


def cosines(datasets: Datasets, path: str | Path) -> Path:
    """Draws the cosine of every estimator to the reference.

    Args:
        datasets: by agent; of several settings, the first.
        path: the figure's file, in a folder beside those of the agents.

    Returns:
        The path.
    """
    return _draw(datasets, _costs(datasets, path), path)


def table(datasets: Datasets, path: str | Path) -> Table:
    """What the figure shows, and bias, variance and costs, in numbers.

    Args:
        datasets: as for `cosines`, like the next.
        path: of the figure.

    Returns:
        Medians over seeds, batches and (but for the first three numbers) times; time in units of one gradient of the
        outer loss.
    """
    costs = _costs(datasets, path)
    rows = [row for label, dataset in datasets.items() for row in _rows(label, _one_setting(dataset), costs[label])]
    return Table((*COLUMNS, *MORE_COLUMNS), rows)


FIGURES: dict[str, Callable[[Datasets, str | Path], Path]] = {"cosines": cosines}
TABLES: dict[str, Callable[[Datasets, str | Path], Table]] = {"cosines": table}
AXES: dict[str, str | None] = {"cosines": None}


# ---------------------------------------------------------------- parts


def _costs(datasets: Datasets, path: str | Path) -> dict[str, dict[str, Any]]:
    folder = Path(path).parent.parent
    return {label: _read(folder / file_name(label) / COSTS) for label in datasets}


def _read(path: Path) -> dict[str, Any]:
    """Costs by estimator; none where they were not measured."""
    return json.loads(path.read_text())["estimators"] if path.is_file() else {}


def _one_setting(dataset: xarray.Dataset) -> xarray.Dataset:
    """The first setting, its seeds that did not fail."""
    chosen = dataset.isel(dict.fromkeys(setting_dimensions(dataset), 0))
    fine = ~statistics.failed_members(chosen).reshape(-1)
    return chosen.isel({SEED: fine}) if fine.any() else chosen


def _times(dataset: xarray.Dataset) -> dict[str, int]:
    """Evaluations that are shown: the first, the middle and the last one, where there are as many."""
    last = dataset.sizes[STEP] - 1
    rows = {"early": 0, "middle": last // 2, "late": last}
    shown = TIMES if last > 1 else ("early", "late")[-last - 1 :]
    return {time: rows[time] for time in shown}


def _draw(datasets: Datasets, costs: Mapping[str, dict[str, Any]], path: str | Path) -> Path:
    with matplotlib.rc_context(plots.STYLE):
        chosen = {label: _one_setting(dataset) for label, dataset in datasets.items()}
        most = max(dataset.sizes["estimator"] for dataset in chosen.values())
        figure = Figure(figsize=(1.2 + 3.6 * len(chosen), 1.6 + 0.42 * most), layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(1, len(chosen), squeeze=False).flatten().tolist()
        for panel, (label, dataset) in zip(panels, chosen.items(), strict=True):
            _panel(panel, dataset, costs[label])
            panel.set_title(label, fontweight="bold")
        known = {
            text: handle for panel in panels for handle, text in zip(*panel.get_legend_handles_labels(), strict=True)
        }
        shown = {time: known[time] for time in TIMES if time in known}
        words = f"median of seeds and batches, bar: {SPREAD[1] - SPREAD[0]} % of them"
        figure.legend(shown.values(), shown, loc="outside lower center", ncols=3, title=words)
        figure.suptitle("Does the hypergradient point the right way?  1: yes, 0: at a right angle, -1: the wrong way")
        return plots._write(figure, path)


def _panel(panel: Axes, dataset: xarray.Dataset, costs: Mapping[str, Any]) -> None:
    names = [str(name) for name in dataset["estimator"].values]
    times = _times(dataset)
    for number, (time, row) in enumerate(times.items()):
        values = (
            dataset["cosine"].isel({STEP: row}).transpose("estimator", SEED, "batch").values.reshape(len(names), -1)
        )
        places = np.arange(len(names)) + 0.22 * (number - (len(times) - 1) / 2)
        color = COLORS[TIMES.index(time)]
        for place, own in zip(places, values, strict=True):
            if (own := own[np.isfinite(own)]).size:
                panel.plot(np.percentile(own, SPREAD), [place, place], color=color, linewidth=1.6, zorder=2)
        middle = [np.median(own[np.isfinite(own)]) if np.isfinite(own).any() else np.nan for own in values]
        panel.plot(middle, places, "o", color=color, markersize=5, label=time, zorder=3)
    panel.axvline(0, color=plots.GREY, linewidth=1.0, zorder=1)
    for place in range(0, len(names), 2):
        panel.axhspan(place - 0.5, place + 0.5, color=plots.GREY, alpha=0.15, linewidth=0, zorder=0)
    panel.set_yticks(range(len(names)), names)
    panel.set(xlim=(-1.05, 1.05), xlabel="cosine to the reference", ylim=(len(names) - 0.5, -0.5))
    panel.grid(visible=False, axis="y")
    for place, name in enumerate(names):
        if name in costs:
            words = f"{_number(costs[name]['relative_time'])}x"
            panel.text(1.02, place, words, transform=panel.get_yaxis_transform(), va="center", fontsize=7)
    if costs:
        panel.text(1.02, -0.6, "time", transform=panel.get_yaxis_transform(), va="center", fontsize=7)


def _rows(label: str, dataset: xarray.Dataset, costs: Mapping[str, Any]) -> list[tuple[str, ...]]:
    times, rows = _times(dataset), []
    for name in dataset["estimator"].values:
        own = dataset.sel(estimator=name)
        points = [_median(own["cosine"].isel({STEP: times[time]})) if time in times else "-" for time in TIMES]
        rest = ("batch_cosine", "relative_bias", "relative_variance", "adjoint_residual")
        cost = costs.get(str(name))
        spent = (_number(cost["relative_time"]), bytes_in_words(cost["temporary_bytes"])) if cost else ("-", "-")
        rows.append((label, str(name), *points, *(_median(own[variable]) for variable in rest), *spent))
    return rows


def _number(value: float) -> str:
    """Two digits, or all before the point."""
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"


def _median(array: xarray.DataArray) -> str:
    values = array.values[np.isfinite(array.values)]
    if not values.size:
        return "-"
    middle = float(np.median(values))
    return f"{middle:.2f}" if abs(middle) <= 1 and abs(middle) >= 0.005 else format_value(float(f"{middle:.2g}"))

"""The landscape of a search: what every setting and seed had reached at every evaluation, as a table and as a figure.

The table has the columns of ARLBench's landscapes (Becktepe et al. 2024): `hp_config.<name>` of each hyper-parameter,
`budget` (steps), `seed` and `performance`, one row per setting, seed and evaluation.
"""

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import xarray
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from purejax_bilevel.errors import UserError
from purejax_bilevel.results import plots, statistics
from purejax_bilevel.results.dataset import SEED, STEP, setting_dimensions, setting_labels, write_text

MOST_PANELS = 3  # steps that are drawn
WIDE = 20.0  # ratio of largest to smallest value from which an axis is logarithmic


def series(dataset: xarray.Dataset, variable: str = "") -> np.ndarray:
    """What was measured at evaluations, `[settings, seeds, steps]`.

    Args:
        dataset: results of a run or of one agent of a sweep.
        variable: "" for the headline.

    Raises:
        UserError: it is no series of numbers, one at each evaluation.
    """
    variable = variable or str(dataset.attrs["headline"])
    found = statistics.require_variable(dataset, variable)
    kept = (*setting_dimensions(dataset), SEED, STEP)
    if set(found.dims) != set(kept):
        raise UserError(f"{variable} is not one number at each evaluation: it has {', '.join(map(str, found.dims))}.")
    values = found.transpose(*kept).values
    return values.reshape(-1, *values.shape[-2:])


def write_table(dataset: xarray.Dataset, path: Path, variable: str = "") -> Path:
    """Writes the table as a CSV file; what is not a number is an empty cell.

    Args:
        dataset: results of a run or of one agent of a sweep.
        path: file to write.
        variable: "" for the headline.

    Raises:
        UserError: see `series`; or the place is not writable.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows(_rows(dataset, series(dataset, variable)))
    write_text(path, text.getvalue())
    return path


def _rows(dataset: xarray.Dataset, values: np.ndarray) -> Iterator[Sequence[Any]]:
    settings, seeds, steps = setting_labels(dataset), dataset[SEED].values.tolist(), dataset[STEP].values.tolist()
    yield [*(f"hp_config.{name}" for name in settings[0]), "budget", "seed", "performance"]
    for setting, of_seeds in zip(settings, values.tolist(), strict=True):
        for seed, of_steps in zip(seeds, of_seeds, strict=True):
            for step, value in zip(steps, of_steps, strict=True):
                yield [*setting.values(), step, seed, value if np.isfinite(value) else ""]


def draw(dataset: xarray.Dataset, path: Path, axes: Sequence[str] = (), variable: str = "") -> Path:
    """Draws the interquartile mean over seeds against two hyper-parameters, early, midway and at the end.

    Where several settings share the two values, the best of them is shown.

    Args:
        dataset: results of a run or of one agent of a sweep.
        path: the figure's file; its ending says the format.
        axes: two hyper-parameters; none: the first two that are numbers.
        variable: "" for the headline.

    Raises:
        UserError: see `series`; there are no such hyper-parameters; or the place is not writable.
    """
    variable = variable or str(dataset.attrs["headline"])
    values = series(dataset, variable)
    names, points = _points(dataset, axes)
    sign = -1.0 if statistics.lower_is_better(dataset, variable) else 1.0
    scores = statistics.iqm(np.moveaxis(values, 2, 0)[..., None]).T  # [settings, steps]
    steps = dataset[STEP].values
    chosen = np.unique(np.ceil(np.arange(1, MOST_PANELS + 1) / MOST_PANELS * len(steps)).astype(int) - 1)
    known = scores[:, chosen][np.isfinite(scores[:, chosen])]
    norm = Normalize(*((known.min(), known.max()) if len(known) else (0.0, 1.0)))
    with matplotlib.rc_context(plots.STYLE):
        figure = Figure(figsize=(1.6 + 3.0 * len(chosen), 3.4), layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(1, len(chosen), sharex=True, sharey=True, squeeze=False)[0]
        for panel, number in zip(panels, chosen, strict=True):
            order = _best_last(sign * scores[:, number])
            reached = np.ma.masked_invalid(scores[order, number])
            shape = {"c": reached, "cmap": "viridis", "norm": norm, "s": 60, "edgecolors": "none"}
            panel.scatter(*points[:, order], **shape, plotnonfinite=True)
            panel.set_title(f"{int(steps[number]):,} {dataset.attrs.get('step_name', 'steps')}")
            panel.set_xlabel(names[0])
            panel.set_xscale(_scale(points[0]))
            panel.set_yscale(_scale(points[1]))
        panels[0].set_ylabel(names[1])
        colors = matplotlib.cm.ScalarMappable(norm, "viridis")
        figure.colorbar(colors, ax=list(panels), label=f"IQM of {variable.replace('_', ' ')}")
        return plots._write(figure, path)


def _points(dataset: xarray.Dataset, axes: Sequence[str]) -> tuple[Sequence[str], np.ndarray]:
    """Two hyper-parameters and their values `[2, settings]`."""
    settings = setting_labels(dataset)
    numbers = [name for name, value in settings[0].items() if isinstance(value, int | float)]
    names = tuple(axes) or tuple(numbers[:2])
    if len(names) != 2 or not set(names) <= set(numbers):
        known = ", ".join(numbers) or "none"
        raise UserError(f"a landscape is over two hyper-parameters with several numbers; these results have {known}.")
    return names, np.array([[float(setting[name]) for setting in settings] for name in names])


def _best_last(quality: np.ndarray) -> np.ndarray:
    """Settings in the order in which they are drawn, those that failed first."""
    return np.argsort(np.where(np.isfinite(quality), quality, -np.inf), kind="stable")


def _scale(values: np.ndarray) -> str:
    return "log" if values.min() > 0 and values.max() / values.min() >= WIDE else "linear"

"""Tables and figures of one run, from its dataset alone: the same at the end of the run and when they are asked for
again on a machine without jax."""

import contextlib
import importlib
from pathlib import Path
from types import ModuleType

import xarray
from rich.console import Console

from purejax_bilevel.results import dataset as datasets
from purejax_bilevel.results import plots, schedules, statistics
from purejax_bilevel.results.analysis import Reporting, reported_variable

CURVES = "learning_curves.png"


def own_figures(dataset: xarray.Dataset) -> ModuleType | None:
    """The module that draws the results of a program (`Program.figures`); None: it has none, or it is not here."""
    with contextlib.suppress(ImportError):
        return importlib.import_module(dataset.attrs["figures"]) if dataset.attrs.get("figures") else None
    return None


def write_figures(dataset: xarray.Dataset, folder: Path) -> None:
    """Writes the figures of a run's program into a folder.

    Raises:
        UserError: the folder is not writable.
    """
    own = getattr(own_figures(dataset), "write_figures", None)
    if own is not None:
        own(dataset, folder)
    else:
        plots.learning_curves(dataset, folder / CURVES, dataset.attrs["headline"], title=dataset.attrs["title"])
    if schedules.adapted_settings(dataset):
        schedules.draw(dataset, folder / schedules.FILE_NAME)
    for name in dataset.attrs.get("stages", ()):
        stage = datasets.stage_of(dataset, name)
        shown = next((variable for variable in stage.data_vars if datasets.STEP in stage[variable].dims), None)
        if shown is not None:
            plots.learning_curves(stage, folder / f"{name}.png", str(shown), title=f"{dataset.attrs['title']}: {name}")


def print_tables(dataset: xarray.Dataset, console: Console) -> None:
    """Prints the tables of a run's program, with one line per setting."""
    for variable in dataset.attrs.get("tables") or [reported_variable(dataset, Reporting())]:
        text = dataset[variable].attrs.get("long_name", variable)
        lower = statistics.lower_is_better(dataset, variable)
        statistics.render_table(statistics.summary_table(dataset, variable), console, text, lower)

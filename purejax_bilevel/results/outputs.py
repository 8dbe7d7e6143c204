"""Tables and figures of one run, from its dataset alone: the same at the end of the run and when they are asked for
again on a machine without jax."""

import importlib
from pathlib import Path

import xarray
from rich.console import Console

from purejax_bilevel.results import dataset as datasets
from purejax_bilevel.results import plots, schedules, statistics
from purejax_bilevel.results.analysis import Reporting, reported_variable

CURVES = "learning_curves.png"
# Modules with a `write_figures`, by program; the others get their learning curves. By name: programs know results, not
# the other way.
FIGURES = {
    **dict.fromkeys(
        ("ControlObservatory", "RegressionObservatory", "TabularObservatory"),
        "purejax_bilevel.programs.observatory.figures",
    ),
    "Ensemble": "purejax_bilevel.programs.offline.ensemble_figures",
    "Offline": "purejax_bilevel.programs.offline.figures",
    "Regression": "purejax_bilevel.programs.regression.figures",
}


def write_figures(dataset: xarray.Dataset, folder: Path) -> None:
    """Writes the figures of a run's program into a folder.

    Raises:
        UserError: the folder is not writable.
    """
    if own := FIGURES.get(dataset.attrs["program"]):
        importlib.import_module(own).write_figures(dataset, folder)
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

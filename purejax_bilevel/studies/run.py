"""One experiment: a configuration with axes, seeds, and a folder that tells everything about it afterwards."""

from pathlib import Path
from typing import Any

import xarray
from rich.console import Console

from purejax_bilevel.configuration import to_dict
from purejax_bilevel.members import batch_config, count_members, grid_of
from purejax_bilevel.programs.regression import figures as regression_figures
from purejax_bilevel.results import dataset as datasets
from purejax_bilevel.results import plots, statistics
from purejax_bilevel.runtime import processes, sizes
from purejax_bilevel.runtime.compiled import Part
from purejax_bilevel.runtime.loop import RunOptions, make_seeds, to_dataset, train
from purejax_bilevel.studies import video as videos

CURVES = "learning_curves.png"
VIDEO = "policy.gif"
FIGURES = {"Regression": regression_figures.write_figures}  # by program; the others get their learning curves


def run(
    config: Any,
    *,
    num_seeds: int = 1,
    seed: int = 0,
    folder: str | Path | None = None,
    video: bool = False,
    **options: Any,
) -> xarray.Dataset:
    """Trains every combination of the configuration's values with every seed, in one compiled program.

        results = run(RLConfig(agent_type="omd", lr=(1e-3, 3e-4)), num_seeds=8)
        results.final_return.mean("episode")

    Args:
        config: a configuration such as `RLConfig`; a traced field may hold a tuple of values, an axis each.
        num_seeds: members per setting; they have seeds `seed`, `seed` + 1, ...
        seed: first seed.
        folder: where to write results, figures and checkpoints, seen by all processes; None: nowhere.
        video: also write a GIF of the median member's policy to the folder.
        options: further fields of `RunOptions`: devices, member_batch, chunks, resume, wandb_mode, quiet...

    Returns:
        Labelled arrays: one dimension per axis, then `seed`, then `step` or `episode`. Several processes
        (`processes.join`) share the members; all return the whole, process 0 alone writes.

    Raises:
        UserError: bad input, in one sentence.
        Interrupted: Ctrl-C, after a checkpoint was written to the folder.
    """
    config = config.resolved()
    run_options = RunOptions(folder=None if folder is None else Path(folder), **options)
    part = make_part(config, num_seeds, seed)
    with sizes.explained():
        outcome = train([part], run_options, watcher=sizes.Limits())
    dataset = to_dataset(part, outcome, 0, config, {"command": datasets.command_line()})
    if run_options.folder is not None and processes.is_first():
        write_outputs(dataset, run_options.folder)
        if video:
            final = outcome.rows[0][next(iter(part.program.finals))][:, -1].mean(-1)
            member = videos.median_member(final)
            videos.write_video(part, outcome.state[0], member, outcome.steps, run_options.folder / VIDEO)
    return dataset


def make_part(config: Any, num_seeds: int, seed: int) -> Part:
    """The program and all members of a resolved configuration.

    Raises:
        UserError: more members than one run can have, or than the memory can hold.
    """
    count_members(config, num_seeds)
    grid = grid_of(config, make_seeds(seed, num_seeds))
    batched = batch_config(config, grid)
    part = Part(batched.program(), batched, grid)
    sizes.check([part])
    return part


def write_outputs(dataset: xarray.Dataset, folder: Path) -> None:
    """Writes results.nc and the figures."""
    datasets.save(dataset, folder)
    if write_figures := FIGURES.get(dataset.attrs["program"]):
        write_figures(dataset, folder)
    else:
        plots.learning_curves(dataset, folder / CURVES, dataset.attrs["headline"], title=dataset.attrs["title"])


def print_summary(dataset: xarray.Dataset, variable: str, console: Console) -> None:
    """Prints a table with one line per setting."""
    text = dataset[variable].attrs.get("long_name", variable)
    lower = statistics.lower_is_better(dataset, variable)
    statistics.render_table(statistics.summary_table(dataset, variable), console, text, lower)


def save_description(folder: Path, config: Any, run: dict[str, Any], resumed: bool) -> None:
    """Writes what is needed to repeat or resume the run."""
    datasets.write_config(folder, {"config": to_dict(config), "run": run}, resumed=resumed)


__all__ = ["make_part", "print_summary", "run", "save_description", "write_outputs"]

"""One experiment: a configuration with axes, seeds, and a folder that tells everything about it afterwards."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import xarray
from rich.console import Console

from purejax_bilevel.configuration import warn
from purejax_bilevel.members import batch_config, count_members, counted, grid_of
from purejax_bilevel.program import Configuration, Part
from purejax_bilevel.results import dataset as datasets
from purejax_bilevel.results import residuals, statistics
from purejax_bilevel.runtime import processes, sizes
from purejax_bilevel.runtime.compiled import mesh_of
from purejax_bilevel.runtime.loop import make_seeds
from purejax_bilevel.runtime.options import RunOptions
from purejax_bilevel.runtime.outcomes import to_dataset
from purejax_bilevel.studies import folder as folders
from purejax_bilevel.studies import forecast as forecasts
from purejax_bilevel.studies import training
from purejax_bilevel.studies import video as videos
from purejax_bilevel.studies.plan import SweptAgent, Template


def run(
    config: Configuration,
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
        folder: where to write results, figures, checkpoints and what `--resume` needs, seen by all processes; it must
            be new or empty, or hold the run that `resume` goes on with. None: nowhere.
        video: also write a GIF of the median member's policy to the folder.
        options: further fields of `RunOptions`: devices, member_batch, chunks, resume, wandb_mode, quiet...

    Returns:
        Labelled arrays: one dimension per axis, then `seed`, then `step` or `episode`. Several processes
        (`processes.join`) share the members; all return the whole, process 0 alone writes.

    Raises:
        UserError: bad input, in one sentence.
        Interrupted: Ctrl-C, after a checkpoint was written to the folder.
    """
    run_options = RunOptions(**options)
    if folder is None:
        resolved = config.resolved()
        return _train(make_part(resolved, num_seeds, seed), resolved, run_options)
    with folders.opened(lambda: Path(folder), run_options.resume) as place:
        return run_in(place, config, num_seeds=num_seeds, seed=seed, video=video, options=run_options)


def run_in(
    folder: Path, config: Configuration, *, num_seeds: int, seed: int, video: bool, options: RunOptions
) -> xarray.Dataset:
    """Trains as `run` does, in a folder that this run holds (`folder.opened`)."""
    resolved, seeds = config.resolved(), {"seed": seed, "num_seeds": num_seeds}
    part = make_part(resolved, num_seeds, seed)
    mesh_of([part], options.devices)  # bad input shows before anything is written
    if video:
        videos.check(part.program)
    if processes.is_first():
        if options.resume and (folder / folders.CONFIG).exists():
            folders.check_unchanged(folder, config, seeds)
        folders.describe(folder, folders.as_told(config, seeds), options, options.resume, video)
    return _train(part, resolved, dataclasses.replace(options, folder=folder), video)


def forecast(config: Configuration, num_seeds: int, seed: int, options: RunOptions, console: Console) -> None:
    """Compiles what `run` would train and tells its members, memory and time; nothing is written.

    Args:
        config: as for `run`, and so the next two.
        num_seeds: members per setting.
        seed: first seed.
        options: how it would run.
        console: where to print.
    """
    resolved = config.resolved()
    part = make_part(resolved, num_seeds, seed)
    mesh_of([part], options.devices)
    with forecasts.dry_run(console):
        training.train(
            [_as_agent(part, resolved)],
            forecasts.unlogged(options),
            console,
            forecasts.Forecast(resolved.title, console, only=True),
            [part],
        )


def _as_agent(part: Part, config: Configuration) -> SweptAgent:
    settings = np.arange(len(part.grid) // len(part.grid.seeds))
    return SweptAgent("", part.grid, (Template("", config, {}, ()),), (settings,))


def _train(part: Part, config: Configuration, options: RunOptions, video: bool = False) -> xarray.Dataset:
    """Trains the one agent of a run and writes results and figures to the options' folder, if there is one."""
    num_seeds = len(part.grid.seeds)
    trained = training.train([_as_agent(part, config)], options, watcher=sizes.Limits(), parts=[part])
    outcome = trained.outcome
    dataset = to_dataset(part, outcome, 0, config, {"command": datasets.command_line()})
    if processes.is_first():
        for sentence in residuals.warnings(dataset):
            warn(sentence)
    if options.folder is not None and processes.is_first():
        write_outputs(dataset, options.folder)
        trained.save_artefacts([options.folder])
        if video and outcome.state:
            final = outcome.rows[0][next(iter(part.program.finals))][:, -1].mean(-1)
            trained.write_video(0, *divmod(videos.median_member(final), num_seeds), options.folder)
    return dataset


def make_part(config: Configuration, num_seeds: int, seed: int) -> Part:
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
    from purejax_bilevel.results import outputs  # imports matplotlib: only when there is something to draw

    outputs.write_figures(dataset, folder)


def tell(dataset: xarray.Dataset, folder: Path, console: Console) -> None:
    """Prints the tables of a run, how long it took and where it is."""
    from purejax_bilevel.results import outputs

    outputs.print_tables(dataset, Console())
    failed = int(statistics.failed_members(dataset).sum())
    note = f"; {counted(failed, 'member')} diverged" if failed else ""
    seconds = f"compiled in {dataset.attrs['compile_seconds']:.1f} s, ran {dataset.attrs['run_seconds']:.1f} s"
    text = f"{seconds}{note}. Results, figures and checkpoint: {folder}"
    console.print(text, markup=False, highlight=False, soft_wrap=True)


__all__ = ["forecast", "make_part", "run", "run_in", "tell", "write_outputs"]

"""Sweeps: from a sweep file or a preset to one compiled call, a search where asked, one results file per agent and the
report.

    folder/config.yaml             the sweep file after all overrides: what --resume needs
    folder/<agent>/results.nc      labelled arrays of all settings and seeds of an agent
    folder/report.html, report.md  with figures/
    folder/checkpoint.npz          or rounds/ while a search runs; programs/*/ where agents have several programs

Before it starts, a sweep tells what it needs (`forecast.py`).
"""

import contextlib
import dataclasses
import functools
import importlib
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import xarray
from rich.console import Console

from purejax_bilevel.configuration import fields, warn
from purejax_bilevel.errors import UserError
from purejax_bilevel.members import check_count, counted
from purejax_bilevel.program import Part
from purejax_bilevel.results import analysis, report, residuals
from purejax_bilevel.results import dataset as datasets
from purejax_bilevel.results.analysis import AgentResult
from purejax_bilevel.results.checks import choice
from purejax_bilevel.results.statistics import (
    SettingRow,
    by_task,
    lower_is_better,
    render_table,
    stratified_bootstrap_interval,
)
from purejax_bilevel.runtime import checkpoint as checkpoints
from purejax_bilevel.runtime import devices, loop, outcomes, processes, sizes
from purejax_bilevel.runtime.loggers import LOGGED, Loggers
from purejax_bilevel.runtime.options import RunOptions
from purejax_bilevel.studies import folder as folders
from purejax_bilevel.studies import population_based, rounds, training
from purejax_bilevel.studies import search as searches
from purejax_bilevel.studies import video as videos
from purejax_bilevel.studies.arguments import Options
from purejax_bilevel.studies.command_line import how_to_run
from purejax_bilevel.studies.forecast import Forecast, Told, check_dry_run, dry_run, unlogged
from purejax_bilevel.studies.plan import SweptAgent, make_agents
from purejax_bilevel.studies.study import Study
from purejax_bilevel.studies.training import Trained

PROGRAMS_FOLDER = "programs"  # of a sweep of several programs: the checkpoint of each
OWN_NAMES = (
    *(folders.CONFIG, *datasets.ABOUT, checkpoints.FILE_NAME, folders.ROUNDS, PROGRAMS_FOLDER),
    *(report.HTML, report.MARKDOWN, report.FIGURES, report.HISTORY, *LOGGED),
)  # in the folder of a sweep, where each agent has a folder of its own

# ---------------------------------------------------------------- the sweep


def run(study: Study, options: Options, console: Console) -> list[xarray.Dataset]:
    """Runs a sweep to its end; returns the results of each agent. Of several processes, process 0 writes everything.

    Raises:
        UserError: bad input, or it does not fit the memory.
        Interrupted: on Ctrl-C, after a checkpoint was written.
    """
    devices.prepare()
    check_count(study.seeds.count, study.search.samples if study.search.method == "random" else 1)
    agents = make_agents(study)
    _check_names(agents)
    check_report(study, agents)
    if options.video:
        _check_video(study, agents)
    devices.make_mesh(1, options.devices)
    if options.dry_run:
        _forecast(study, agents, options, console)
        return []

    def chosen() -> Path:
        return folders.choose(options.output_dir, options.name, options.resume, datasets.file_name(study.name))

    with folders.opened(chosen, options.resume is not None) as folder:
        return _run_in(folder, study, agents, options, console)


def _forecast(study: Study, agents: Sequence[SweptAgent], options: Options, console: Console) -> None:
    """Tells what each program of a sweep will need; a search keeps its rounds, so it has a folder for this long."""
    check_dry_run(options)
    told = how_to_run(unlogged(options))
    forecast = Forecast(study.name, console, work=_work(study), only=True)
    with dry_run(console), tempfile.TemporaryDirectory() as place:
        if study.search.in_rounds:
            _in_rounds(study, agents, RunOptions(Path(place), **told), console, forecast)
        for family in study.by_program:
            with contextlib.suppress(Told):
                _train_family(study, family, agents, RunOptions(**told), console, forecast)


def _run_in(
    folder: Path, study: Study, agents: Sequence[SweptAgent], options: Options, console: Console
) -> list[xarray.Dataset]:
    resume = options.resume is not None
    if processes.is_first():
        folders.describe(folder, {"sweep": study.description}, options, resume, options.video)
    run_options = RunOptions(folder, resume, **how_to_run(options))
    forecast = Forecast(study.name, console, work=_work(study), quiet=options.quiet)
    files = [folder / datasets.file_name(agent.label) / datasets.FILE_NAME for agent in agents]
    finished = processes.from_first(lambda: all(file.exists() for file in files))
    trained = None
    if study.search.in_rounds and finished:  # a finished search: its report is made again
        found = [datasets.load(file) for file in files]
    elif study.search.in_rounds:
        found = _in_rounds(study, agents, run_options, console, forecast)
    else:
        trained = _at_once(study, agents, run_options, console, forecast)
        found = _datasets(study, agents, trained, forecast)
    if not processes.is_first():
        return found
    for file, dataset in zip(files, found, strict=True):
        datasets.save(dataset, file)
        for sentence in residuals.warnings(dataset):
            warn(sentence)
    searches.clean(folder)
    places = {agent.label: file.parent for agent, file in zip(agents, files, strict=True)}
    for together in trained or ():  # before the report, which shows some of it
        together.save_artefacts([places[agent.label] for agent in together.agents])
    written = report.write(folder, study.name, study.report, files)
    for together in trained or () if options.video else ():
        _write_videos(together, {result.label: result for result in written}, places)
    if not options.quiet:
        _print_summary(study, written, found, console, folder)
    return found


def check_report(study: Study, agents: Sequence[SweptAgent]) -> None:
    """Whether the report asks for what the sweep has; before hours of training, not after.

    Raises:
        UserError: no such variable, axis or agent.
    """
    labels = [agent.label for agent in agents]
    if study.report.baseline and study.report.baseline not in labels:
        raise UserError(
            f"report: baseline must be one of the agents, {', '.join(labels)}, got {study.report.baseline!r}."
        )
    _check_shown(study, agents)


def _check_shown(study: Study, agents: Sequence[SweptAgent]) -> None:
    """Variables and figures, program by program."""
    if study.families:
        for family in study.families:
            _check_shown(family, [agent for agent in agents if agent.label in family.agents])
        _check_one_score(study, agents)
        return
    program = agents[0].templates[0].program()
    measured = {measure.name for measure in program.measures}
    named = [study.report.variable, study.report.select_by]
    named += [figure["variable"] for figure in study.report.figures if figure["kind"] == "curves"]
    for name in named:
        if name and name not in measured:
            raise UserError(f"report: the program measures no {name!r}; it measures {', '.join(sorted(measured))}.")
    visible = {field.name for field in fields(study.config_class)}
    for figure in study.report.figures:
        if figure["kind"] not in ("curves", "sensitivity"):
            _check_own(figure, study.program, program.figures)
        if figure["kind"] == "sensitivity" and figure["axis"] not in visible:
            raise UserError(f"report: a figure names the axis {figure['axis']!r}, which is no setting of the program.")


def _check_own(figure: Mapping[str, str], name: str, module: str) -> None:
    """A figure that the program itself draws."""
    kinds = tuple(analysis.NEEDED)
    if figure["kind"] not in kinds and not name.startswith(figure["kind"]):
        choice(figure["kind"], kinds, "the kind of a figure")
    known = getattr(importlib.import_module(module), "FIGURES", {}) if module else {}
    if figure["figure"] not in known:
        has = f"draws {', '.join(known)}" if known else "draws none of its own"
        raise UserError(f"report: there is no figure {figure['figure']!r}: the program {name} {has}.")


def _check_one_score(study: Study, agents: Sequence[SweptAgent]) -> None:
    """Agents of several programs are compared by something that all of them measure."""
    found = {rounds.selecting(study, agent.templates[0].program())[0] for agent in agents}
    if len(found) > 1:
        raise UserError(
            f"report: the programs have other scores ({', '.join(sorted(found))}); name a variable that all measure."
        )


def _check_names(agents: Sequence[SweptAgent]) -> None:
    names = [datasets.file_name(agent.label) for agent in agents]
    for agent, name in zip(agents, names, strict=True):
        if not name or names.count(name) > 1 or name in OWN_NAMES or len(os.fsencode(name)) > folders.LONGEST_NAME:
            raise UserError(
                f"agents: {agent.label!r} cannot name a folder of its own ({name!r}); choose another label."
            )


def _at_once(
    study: Study, agents: Sequence[SweptAgent], options: RunOptions, console: Console, forecast: Forecast
) -> list[Trained]:
    """One compiled call for each program."""
    return [_train_family(study, family, agents, options, console, forecast) for family in study.by_program]


def _train_family(
    study: Study,
    family: Study,
    agents: Sequence[SweptAgent],
    options: RunOptions,
    console: Console,
    forecast: Forecast,
) -> Trained:
    own = [agent for agent in agents if agent.label in family.agents]
    return training.train(own, _in_own_folder(study, family, options), console, forecast)


def _work(study: Study) -> Callable[[int, int], int] | None:
    return functools.partial(searches.work, study) if study.search.in_rounds else None


def _in_own_folder(study: Study, family: Study, options: RunOptions) -> RunOptions:
    """Where there are several programs, each has its own checkpoint."""
    if not study.families or options.folder is None:
        return options
    return dataclasses.replace(options, folder=options.folder / PROGRAMS_FOLDER / datasets.file_name(family.program))


def _datasets(
    study: Study, agents: Sequence[SweptAgent], trained: Sequence[Trained], forecast: Forecast
) -> list[xarray.Dataset]:
    found, about = {}, _about(agents, forecast)
    for family, together in zip(study.by_program, trained, strict=True):
        for number, agent in enumerate(together.agents):
            found[agent.label] = _dataset(family, agent, *together.outcome_of(number), about, {})
    return [found[agent.label] for agent in agents]


def _check_video(study: Study, agents: Sequence[SweptAgent]) -> None:
    for agent in agents:
        videos.check(agent.templates[0].program())
    if study.search.in_rounds:
        raise UserError("--video does not go with es and halving, which keep no policy: train the setting they find.")


def _write_videos(trained: Trained, results: Mapping[str, AgentResult], places: Mapping[str, Path]) -> None:
    """The median member of each agent's best setting."""
    for number, agent in enumerate(trained.agents):
        result, shape = results[agent.label], (agent.num_settings, len(agent.grid.seeds))
        members = by_task(result.dataset, np.arange(len(agent.grid)).reshape(shape))[result.best].reshape(-1)
        setting, seed = divmod(int(members[videos.median_member(result.scores[result.best].reshape(-1))]), shape[1])
        trained.write_video(number, setting, seed, places[agent.label])


def _in_rounds(
    study: Study, agents: Sequence[SweptAgent], options: RunOptions, console: Console, forecast: Forecast
) -> list[xarray.Dataset]:
    """The finalists of a search."""
    with sizes.explained():
        found = searches.search(study, agents, options, console, forecast)
    datasets = []
    for agent, finding in zip(agents, found.findings, strict=True):
        template = agent.templates[0]
        part = Part(template.program(), template.config, finding.grid, agent.label)
        outcome = outcomes.Outcome(
            part.program.num_steps,
            [finding.outcome_rows],
            [finding.failed],
            [],
            found.compile_seconds,
            found.run_seconds,
            found.num_traces,
            [finding.bytes_per_member],
            finding.stage_of,
        )
        dataset = _dataset(
            study, agent, part, outcome, _about(agents, forecast), {analysis.SELECTION: finding.selection}
        )
        if processes.is_first():
            _log_finalists(dataset, part, outcome, options)
        datasets.append(dataset)
    return datasets


def _about(agents: Sequence[SweptAgent], forecast: Forecast) -> dict[str, int]:
    return {"sub_programs": sum(len(agent.templates) for agent in agents), "devices": forecast.num_devices}


def _dataset(
    study: Study,
    agent: SweptAgent,
    part: Part,
    outcome: outcomes.Outcome,
    about: Mapping[str, int],
    extra: Mapping[str, np.ndarray],
) -> xarray.Dataset:
    by, over = rounds.selecting(study, part.program)
    attrs = {
        "agent": agent.label,
        "selected_by": by,
        "selected_over": over,
        "sweep": study.name,
        "tasks": [field.name for field in fields(part.config) if field.metadata.get("task")],
        "selection_seeds": list(searches.split_seeds(study)[0]),
        **about,
        **population_based.about(part.program),
        "compilations": outcome.num_traces,
        "command": datasets.command_line(),
    }
    dataset = outcomes.to_dataset(part, outcome, 0, agent.templates[0].config, attrs)
    dimensions = (*(axis.dimension for axis in part.grid.axes), datasets.SEED)
    for name, array in extra.items():
        better = "lower" if rounds.better_when_lower(part.program, by) else "higher"
        dataset[name] = (
            dimensions,
            array.reshape(part.grid.shape),
            {"long_name": "score that chose", "better": better},
        )
    return dataset


def _log_finalists(dataset: xarray.Dataset, part: Part, outcome: outcomes.Outcome, options: RunOptions) -> None:
    """Copies the finalists' series to wandb and TensorBoard; the rounds before are in search.json."""
    assert options.folder is not None
    logged = [measure.name for measure in part.program.measures if loop.is_logged(measure)]
    rows = {name: array for name, array in outcome.rows[0].items() if name in logged}
    members, before = np.arange(len(part.grid)), 0
    with Loggers(
        part.grid,
        options.folder / datasets.file_name(part.label),
        options.folder.name,
        dataset.attrs["config"],
        wandb_mode=options.wandb_mode,
        runs=options.wandb_runs,
        label=part.label,
        tensorboard=options.tensorboard,
    ) as loggers:
        for stage in (*dataset.attrs["stages"], ""):  # steps are counted over all of them
            own = {name: array for name, array in rows.items() if outcome.stage_of.get(name, "") == stage}
            steps = dataset[datasets.step_dimension(stage)].values
            loggers.log_rows(members, {datasets.STEP: before + steps, **own})
            before += int(steps[-1])
        finals = {name: outcomes.last_values(outcome.rows[0][name]) for name in part.program.finals}
        loggers.log_finals(members, finals)


def _print_summary(
    study: Study,
    found: Sequence[AgentResult],
    datasets: Sequence[xarray.Dataset],
    console: Console,
    folder: Path,
) -> None:
    rows = []
    for agent in found:
        score, runs = stratified_bootstrap_interval(agent.best_runs), agent.best_runs
        named = {"agent": agent.label, "best setting": report.words(agent.settings[agent.best])}
        used = int(np.isfinite(runs).sum())
        rows.append(
            SettingRow(named, (), float(score.estimate), float(score.low), float(score.high), used, runs.size - used)
        )
    about = datasets[0].attrs
    variable = analysis.reported_variable(datasets[0], study.report)
    render_table(rows, Console(), variable.replace("_", " "), lower_is_better(datasets[0], variable))
    failed = sum(int(np.isnan(agent.scores).sum()) for agent in found)
    note = f"; {counted(failed, 'member')} failed" if failed else ""
    seconds = f"compiled in {about['compile_seconds']:.1f} s, ran {about['run_seconds']:.1f} s"
    console.print(f"{seconds}{note}. Report: {folder / report.HTML}", markup=False, highlight=False, soft_wrap=True)

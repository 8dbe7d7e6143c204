"""Sweeps: from a sweep file or a preset to one compiled call, a search where asked, one results file per agent and the
report.

    folder/config.yaml             the sweep file after all overrides: what --resume needs
    folder/<agent>/results.nc      labelled arrays of all settings and seeds of an agent
    folder/report.html, report.md  with figures/
    folder/checkpoint.npz          or rounds/ while a search runs

Before it starts, a sweep tells its members, sub-programs, memory and time; what does not fit is refused.
"""

import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro
import xarray
from rich.console import Console

from purejax_bilevel.configuration import fields
from purejax_bilevel.errors import UserError
from purejax_bilevel.members import check_count
from purejax_bilevel.program import Part
from purejax_bilevel.programs.tabular.figures import FIGURES
from purejax_bilevel.results import dataset as datasets
from purejax_bilevel.results import report
from purejax_bilevel.results.checks import load_yaml
from purejax_bilevel.results.statistics import SettingRow, lower_is_better, member_scores, render_table
from purejax_bilevel.runtime import devices, loop, processes, sizes
from purejax_bilevel.runtime.compiled import CompiledProgram
from purejax_bilevel.runtime.loggers import Loggers
from purejax_bilevel.runtime.progress import _duration as duration
from purejax_bilevel.runtime.schedule import num_rows
from purejax_bilevel.studies import command_line
from purejax_bilevel.studies import folder as folders
from purejax_bilevel.studies import search as searches
from purejax_bilevel.studies.presets import PRESETS, preset
from purejax_bilevel.studies.study import (
    PROGRAMS,
    Agent,
    Study,
    config_class,
    make_agents,
    override,
    parse,
    read,
)

ROUND_SETTINGS = {
    "search": "method",
    "halving": "halving",
    "samples": "samples",
    "population": "population",
    "generations": "generations",
}


@dataclasses.dataclass(frozen=True)
class Options(command_line.Run):
    """How and where to run; `field=value` or `--field value ...` overrides any setting of the sweep."""

    sweep: Annotated[tyro.conf.Positional[str], tyro.conf.arg(help=f"a sweep file or {', '.join(PRESETS)}")] = ""
    scale: Annotated[Literal["smoke", "paper"], tyro.conf.arg(help="size of a preset")] = "smoke"
    search: Annotated[Literal["grid", "random", "es"] | None, tyro.conf.arg(help="how settings are found")] = None
    halving: Annotated[int | None, tyro.conf.arg(help="how often the worse half of the settings is stopped early")] = (
        None
    )
    samples: Annotated[int | None, tyro.conf.arg(help="settings that --search random draws")] = None
    population: Annotated[int | None, tyro.conf.arg(help="settings per generation of --search es")] = None
    generations: Annotated[int | None, tyro.conf.arg(help="generations of --search es")] = None
    seed: Annotated[int | None, command_line.explained("first seed (default: the sweep's)")] = None  # type: ignore[assignment]
    num_seeds: Annotated[int | None, command_line.explained("number of seeds (default: the sweep's)")] = None  # type: ignore[assignment]
    video: tyro.conf.Suppress[bool] = False


# ---------------------------------------------------------------- command line


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a sweep; returns the exit status: 0 done, 1 every member diverged, 2 bad input, 130 interrupted."""
    devices.prepare()  # before anything imports gymnax, whose import makes jax choose its devices
    words = sys.argv[1:] if arguments is None else list(arguments)
    nothing = False

    def work(console: Console) -> None:
        nonlocal nothing
        options, study = read_arguments(words)
        nothing = _tell_if_all_diverged(study, run(study, options, console))

    return command_line.exit_status(work, words) or int(nothing)


def _tell_if_all_diverged(study: Study, found: Sequence[xarray.Dataset]) -> bool:
    scores = [member_scores(dataset, report.reported_variable(dataset, study.report)) for dataset in found]
    if any(np.isfinite(own).any() for own in scores):
        return False
    if processes.is_first():
        text = (
            f"error: all {sum(own.size for own in scores)} members diverged or have no finite score: try smaller "
            "learning rates; results and report are kept."
        )
        Console(stderr=True).print(text, style="bold red", markup=False, highlight=False, soft_wrap=True)
    return True


def read_arguments(arguments: Sequence[str]) -> tuple[Options, Study]:
    """Reads the command line, and the sweep file or, on resume, the folder's own.

    Raises:
        UserError: bad input, in one sentence.
    """
    words, changes = split_overrides(arguments)
    options = tyro.cli(
        Options,
        description=(
            "Run a study: all agents, settings and seeds in one compiled call. Any setting of its program can be given "
            "as field=value or --field value ...; agents=omd,mle chooses agents, search.x=, report.x= and seeds.x= "
            "change these sections. Sweep files are explained in purejax_bilevel/studies/study.py."
        ),
        args=words,
        use_underscores=True,
        config=command_line.MARKERS,
    )
    for name, entry in ROUND_SETTINGS.items():
        if (value := getattr(options, name)) is not None:
            changes[f"search.{entry}"] = value
    if options.seed is not None:
        changes["seeds.first"] = options.seed
    if options.num_seeds is not None:
        changes["seeds.count"] = options.num_seeds
    if isinstance(count := changes.get("seeds.count"), int):
        check_count(count)  # before the seeds are listed
    if options.resume is not None:
        return options, _resumed(options, changes)
    if not options.sweep:
        raise UserError(f"name a sweep file or a preset: {', '.join(PRESETS)}.")
    is_file = options.sweep not in PRESETS and (
        Path(options.sweep).suffix in (".yaml", ".yml") or Path(options.sweep).is_file()
    )
    description = read(options.sweep) if is_file else preset(options.sweep, options.scale)
    return options, parse(override(description, changes))


def split_overrides(arguments: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Separates the options of the script from `field=value`, `--field value ...` and `--field=value`.

    Raises:
        UserError: a value is missing.
    """
    known = {field.name for program in PROGRAMS for field in fields(config_class(program))} | {"agents"}
    own = {field.name for field in dataclasses.fields(Options)}
    words: list[str] = []
    changes: dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        flag = word.startswith("--")
        if equals and (not flag or name in known - own or "." in name):
            changes[name] = _value(value, name)
        elif flag and name in known - own:
            values = []
            while rest and not rest[0].startswith("--") and "=" not in rest[0]:
                values.append(rest.pop(0))
            if not values:
                raise UserError(f"--{name} needs a value.")
            changes[name] = _value(values[0], name) if len(values) == 1 else [_value(entry, name) for entry in values]
        else:
            words.append(word)
    return words, changes


def _value(text: str, name: str) -> Any:
    value = load_yaml(text, f"{name}={text}")
    if isinstance(value, str) and "," in value:
        return [load_yaml(entry, f"{name}={text}") for entry in value.split(",") if entry]
    return value


def _resumed(options: Options, changes: Mapping[str, Any]) -> Study:
    """The study of a folder; it goes on unchanged."""
    folder = options.resume
    assert folder is not None
    path = folder / "config.yaml"
    if not path.is_file():
        raise UserError(f"--resume {folder}: there is no sweep in that folder (no config.yaml).")
    try:
        description = load_yaml(path.read_text(), f"{path}")["sweep"]
    except (UserError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise UserError(f"--resume {folder}: its config.yaml is not of a sweep.") from error
    study = parse(description)
    if options.sweep and Path(options.sweep).stem != study.name:
        raise UserError(f"--resume {folder} goes on with {study.name}, not with {options.sweep}.")
    if changes and parse(override(description, changes)) != study:
        raise UserError(
            f"--resume goes on with the settings in {path}; start a new sweep for other values of {', '.join(changes)}."
        )
    return study


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
    devices.make_mesh(1, options.devices)

    def chosen() -> Path:
        return folders.choose(options.output_dir, options.name, options.resume, loop.file_name(study.name))

    with folders.opened(chosen, options.resume is not None) as folder:
        return _run_in(folder, study, agents, options, console)


def _run_in(
    folder: Path, study: Study, agents: Sequence[Agent], options: Options, console: Console
) -> list[xarray.Dataset]:
    if processes.is_first():
        datasets.write_config(folder, {"sweep": study.description}, resumed=options.resume is not None)
    run_options = loop.RunOptions(
        folder=folder,
        devices=options.devices,
        member_batch=options.member_batch,
        chunks=options.chunks,
        resume=options.resume is not None,
        wandb_mode=options.wandb_mode,
        wandb_runs=options.wandb_runs,
        tensorboard=options.tensorboard,
        quiet=options.quiet,
    )
    plan = Plan(study, agents, console, options.quiet)
    files = [folder / loop.file_name(agent.label) / datasets.FILE_NAME for agent in agents]
    finished = processes.from_first(lambda: all(file.exists() for file in files))
    if study.search.in_rounds and finished:  # a finished search: its report is made again
        found = [datasets.load(file) for file in files]
    elif study.search.in_rounds:
        found = _in_rounds(study, agents, run_options, console, plan)
    else:
        found = _at_once(study, agents, run_options, console, plan)
    if not processes.is_first():
        return found
    for file, dataset in zip(files, found, strict=True):
        datasets.save(dataset, file)
    searches.clean(folder)
    written = report.write(folder, study.name, study.report, files)
    if not options.quiet:
        _print_summary(study, written, found, console, folder)
    return found


def check_report(study: Study, agents: Sequence[Agent]) -> None:
    """Whether the report asks for what the sweep has; before hours of training, not after.

    Raises:
        UserError: no such variable or axis.
    """
    program = agents[0].templates[0].config.program()
    measured = {measure.name for measure in program.measures}
    named = [study.report.variable, study.report.select_by]
    named += [figure["variable"] for figure in study.report.figures if figure["kind"] == "curves"]
    for name in named:
        if name and name not in measured:
            raise UserError(f"report: the program measures no {name!r}; it measures {', '.join(sorted(measured))}.")
    visible = {field.name for field in fields(study.config_class)}
    for figure in study.report.figures:
        if figure["kind"] == "tabular" and (study.program != "tabular" or figure["figure"] not in FIGURES):
            raise UserError(
                f"report: the figure {figure['figure']!r} of kind tabular must be one of {', '.join(FIGURES)}, "
                "in a sweep of the program tabular."
            )
        if figure["kind"] == "sensitivity" and figure["axis"] not in visible:
            raise UserError(f"report: a figure names the axis {figure['axis']!r}, which is no setting of the program.")


def _check_names(agents: Sequence[Agent]) -> None:
    names = [loop.file_name(agent.label) for agent in agents]
    for agent, name in zip(agents, names, strict=True):
        if not name or names.count(name) > 1 or name in (report.FIGURES, searches.ROUNDS):
            raise UserError(
                f"agents: {agent.label!r} cannot name a folder of its own ({name!r}); choose another label."
            )


def _at_once(
    study: Study, agents: Sequence[Agent], options: loop.RunOptions, console: Console, plan: "Plan"
) -> list[xarray.Dataset]:
    """All members in one go."""
    parts = [agent.parts() for agent in agents]
    with sizes.explained():
        outcome = loop.train([part for own in parts for part in own], options, console, plan)
    datasets, first = [], 0
    for agent, own in zip(agents, parts, strict=True):
        span = slice(first, first + len(own))
        first += len(own)
        names = outcome.rows[span][0]
        merged = dataclasses.replace(
            outcome,
            rows=[{name: agent.gather([rows[name] for rows in outcome.rows[span]]) for name in names}],
            failed=[agent.gather(outcome.failed[span])],
            bytes_per_member=[max(outcome.bytes_per_member[span])],
        )
        datasets.append(_dataset(study, agent, dataclasses.replace(own[0], grid=agent.grid), merged, plan, {}))
    return datasets


def _in_rounds(
    study: Study, agents: Sequence[Agent], options: loop.RunOptions, console: Console, plan: "Plan"
) -> list[xarray.Dataset]:
    """The finalists of a search."""
    with sizes.explained():
        found = searches.search(study, agents, options, console, plan)
    datasets = []
    for agent, finding in zip(agents, found.findings, strict=True):
        template = agent.templates[0]
        part = Part(template.config.program(), template.config, finding.grid, agent.label)
        outcome = loop.Outcome(
            part.program.num_steps,
            [finding.outcome_rows],
            [finding.failed],
            [],
            found.compile_seconds,
            found.run_seconds,
            found.num_traces,
            [finding.bytes_per_member],
        )
        dataset = _dataset(study, agent, part, outcome, plan, {report.SELECTION: finding.selection})
        if processes.is_first():
            _log_finalists(dataset, part, outcome, options)
        datasets.append(dataset)
    return datasets


def _dataset(
    study: Study, agent: Agent, part: Part, outcome: loop.Outcome, plan: "Plan", extra: dict[str, np.ndarray]
) -> xarray.Dataset:
    by, over = searches.selecting(study, part.program)
    attrs = {
        "agent": agent.label,
        "selected_by": by,
        "selected_over": over,
        "sweep": study.name,
        "selection_seeds": list(searches.split_seeds(study)[0]),
        "sub_programs": plan.num_parts,
        "devices": plan.num_devices,
        "compilations": outcome.num_traces,
        "command": datasets.command_line(),
    }
    dataset = loop.to_dataset(part, outcome, 0, agent.templates[0].config, attrs)
    dimensions = (*(axis.dimension for axis in part.grid.axes), datasets.SEED)
    for name, array in extra.items():
        better = "lower" if searches.lower_is_better(part.program, by) else "higher"
        dataset[name] = (
            dimensions,
            array.reshape(part.grid.shape),
            {"long_name": "score that chose", "better": better},
        )
    return dataset


def _log_finalists(dataset: xarray.Dataset, part: Part, outcome: loop.Outcome, options: loop.RunOptions) -> None:
    """Copies the finalists' series to wandb and TensorBoard; the rounds before are in search.json."""
    assert options.folder is not None
    hidden = {measure.name for measure in part.program.measures if not loop.is_logged(measure)}
    rows = {name: array for name, array in outcome.rows[0].items() if name not in hidden}
    members = np.arange(len(part.grid))
    with Loggers(
        part.grid,
        options.folder / loop.file_name(part.label),
        options.folder.name,
        dataset.attrs["config"],
        wandb_mode=options.wandb_mode,
        runs=options.wandb_runs,
        label=part.label,
        tensorboard=options.tensorboard,
    ) as loggers:
        loggers.log_rows(members, {"step": dataset[datasets.STEP].values, **rows})
        loggers.log_finals(members, {name: outcome.rows[0][name][:, -1] for name in part.program.finals})


def _print_summary(
    study: Study,
    found: Sequence[report.AgentResult],
    datasets: Sequence[xarray.Dataset],
    console: Console,
    folder: Path,
) -> None:
    rows = []
    for agent in found:
        score, runs = report.score_of(agent.best_runs), agent.best_runs
        named = {"agent": agent.label, "best setting": report.words(agent.settings[agent.best])}
        used = int(np.isfinite(runs).sum())
        rows.append(SettingRow(named, (), score.iqm, score.low, score.high, used, len(runs) - used))
    about = datasets[0].attrs
    variable = report.reported_variable(datasets[0], study.report)
    render_table(rows, Console(), variable.replace("_", " "), lower_is_better(datasets[0], variable))
    failed = sum(int(np.isnan(agent.scores).sum()) for agent in found)
    note = f"; {failed} members failed" if failed else ""
    seconds = f"compiled in {about['compile_seconds']:.1f} s, ran {about['run_seconds']:.1f} s"
    console.print(f"{seconds}{note}. Report: {folder / report.HTML}", markup=False, highlight=False, soft_wrap=True)


# ---------------------------------------------------------------- before it starts


class Plan:
    """Tells members, sub-programs, memory and time before a sweep starts, and refuses what does not fit.

    Args:
        study: what is swept.
        agents: its agents.
        console: where to print.
        quiet: print nothing.
        free: bytes that may still be used on a device; for tests.
    """

    def __init__(
        self,
        study: Study,
        agents: Sequence[Agent],
        console: Console,
        quiet: bool = False,
        free: Callable[[Any], int | None] = devices.free_memory,
    ):
        self.study, self.agents, self.quiet, self._console, self._free = study, agents, quiet, console, free
        self.num_parts = sum(len(agent.templates) for agent in agents)
        self.num_devices = 0

    def planned(self, program: CompiledProgram) -> None:
        """Prints what will run; refuses states that do not fit."""
        self.num_devices = int(program.mesh.devices.size)
        parts = program.parts
        members = sum(len(part.grid) for part in parts)
        device = program.mesh.local_devices[0]
        names = ", ".join(f"{part.label} {len(part.grid)}" for part in parts)
        steps = f"{parts[0].program.num_steps:,} {parts[0].program.step_unit}"
        rounds = " at a time" if self.study.search.in_rounds else ""
        self._say(
            f"{self.study.name}: {members} members{rounds} in {report.count(len(parts), 'sub-program')} ({names}), "
            f"{steps} each, on {report.count(self.num_devices, f'{device.platform} device')}"
        )
        sizes.check_states(parts, program.bytes_per_member, program.mesh, self._free)

    def compiled(self, program: CompiledProgram, state: Any, steps: int, total: int) -> Any:
        """Prints memory and time of the compiled program; refuses what does not fit."""
        needed = program.device_bytes
        if needed is not None:
            what = "the compiled program"
            sizes.check_fits(program.parts, program.bytes_per_member, program.mesh, needed, what, self._free)
            free = self._free(program.mesh.local_devices[0])
            shared = " (all devices share it)" if self._shared(program) and self.num_devices > 1 else ""
            of = "" if free is None else f" of {report.bytes_in_words(free)} free{shared}"
            self._say(
                f"memory per device: {report.bytes_in_words(needed)}{of}; compiled in {program.compile_seconds:.1f} s"
            )
        if steps > 0 or self.quiet:
            return state
        state, per_step, per_evaluation = program.time_steps(state, total)
        frequency = program.schedule.eval_every[-1]
        work = searches.work(self.study, total, frequency) if self.study.search.in_rounds else total
        evaluations = num_rows(total, total, frequency) * work / total
        self._say(
            f"time: about {duration(per_step * work + per_evaluation * evaluations)}"
            + (", then the finalists" if self.study.search.in_rounds else "")
        )
        return state

    def _shared(self, program: CompiledProgram) -> bool:
        return program.mesh.devices.flat[0].platform == "cpu"

    def _say(self, text: str) -> None:
        if not self.quiet:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)

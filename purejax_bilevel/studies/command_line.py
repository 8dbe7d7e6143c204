"""Command line of the training scripts, made from the configuration's declaration.

Every traced field takes several values; groups and explanations come from the fields. What a run was told is kept in
its folder, so that `--resume` needs nothing else.
"""

import dataclasses
import datetime
import itertools
import re
import sys
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
import yaml
from rich.console import Console

from purejax_bilevel.configuration import RUN_LENGTH, fields, from_dict, to_dict, validate
from purejax_bilevel.errors import UserError
from purejax_bilevel.results import statistics
from purejax_bilevel.runtime import loop, processes
from purejax_bilevel.studies import run as runs

MARKERS = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff)

RUNNER_OPTIONS = ("devices", "member_batch", "chunks", "wandb_mode", "wandb_runs", "tensorboard", "quiet")


@dataclasses.dataclass(frozen=True)
class Run:
    """How and where to run; the same for all scripts."""

    output_dir: Annotated[Path, tyro.conf.arg(help="folder of all runs")] = Path("runs")
    name: Annotated[
        str, tyro.conf.arg(help="folder of this run inside output_dir (default: made from what runs and when)")
    ] = ""
    seed: Annotated[int, tyro.conf.arg(help="first seed")] = 0
    num_seeds: Annotated[int, tyro.conf.arg(help="members per setting, with seeds seed, seed + 1, ...")] = 1
    devices: Annotated[int | None, tyro.conf.arg(help="number of devices (default: all cores or accelerators)")] = None
    coordinator: Annotated[
        str | None,
        tyro.conf.arg(
            help="host:port of process 0, where several processes share the members (default: what Slurm or Open MPI "
            "say); all need the same output_dir, and --devices counts the devices of all"
        ),
    ] = None
    num_processes: Annotated[int | None, tyro.conf.arg(help="how many processes, with --coordinator")] = None
    process_id: Annotated[int | None, tyro.conf.arg(help="which one this is, from 0")] = None
    member_batch: Annotated[
        int | None,
        tyro.conf.arg(help="members trained at once on a device, 0: all (default: 1 on a CPU, all elsewhere)"),
    ] = None
    chunks: Annotated[
        int | None,
        tyro.conf.arg(help="calls of the compiled program (default: one every few seconds); changes no number"),
    ] = None
    resume: Annotated[Path | None, tyro.conf.arg(help="go on with the run in this folder")] = None
    wandb_mode: Annotated[Literal["disabled", "offline", "online"], tyro.conf.arg(help="Weights and Biases")] = (
        "disabled"
    )
    wandb_runs: Annotated[
        Literal["member", "setting"], tyro.conf.arg(help="one wandb run per member or per setting")
    ] = "member"
    tensorboard: Annotated[bool, tyro.conf.arg(help="write TensorBoard files (extra: tensorboard)")] = False
    video: Annotated[bool, tyro.conf.arg(help="write a GIF of the median member's policy")] = False
    quiet: Annotated[bool, tyro.conf.arg(help="no progress bar, no table")] = False


def main(configuration: type | Callable[[], type], description: str, arguments: Sequence[str] | None = None) -> int:
    """Runs a training script; returns its exit status: 0 done, 2 bad input, 130 interrupted.

    Args:
        configuration: its class, or a function that imports it: what it imports may make jax choose its devices, which
            must not happen before several processes have joined.
        description: for `--help`.
        arguments: of the command line; by default those of this process.
    """
    words = sys.argv[1:] if arguments is None else list(arguments)

    def work(console: Console) -> None:
        config_class = configuration if isinstance(configuration, type) else configuration()
        execute(*parse(config_class, description, words), console)

    return exit_status(work, words)


def exit_status(action: Callable[[Console], None], arguments: Sequence[str]) -> int:
    """Joins the other processes and runs a script's work; tells what stopped it and returns the exit status."""
    try:
        _join(arguments)
        with processes.together():
            action(processes.console())
    except UserError as error:
        if processes.should_tell(error):
            text = f"error: {error}"
            Console(stderr=True).print(text, style="bold red", markup=False, highlight=False, soft_wrap=True)
        return 2
    except loop.Interrupted as message:
        processes.console().print(str(message), markup=False, highlight=False, soft_wrap=True)
        return 130
    except KeyboardInterrupt:
        Console(stderr=True).print("stopped at once; the last checkpoint remains.")
        return 130
    return 0


def _join(arguments: Sequence[str]) -> None:
    """Before the command line is read: to know all its options takes imports that touch devices."""
    numbers = [_option(arguments, name) for name in ("num_processes", "process_id")]
    if all(re.fullmatch(r"(-?\d+)?", number) for number in numbers):  # else the reading of the command line says so
        num_processes, process_id = (int(number) if number else None for number in numbers)
        processes.join(_option(arguments, "coordinator") or None, num_processes, process_id)


def execute(run: Run, config: Any, console: Console) -> None:
    """Trains, writes the run's folder and prints the table."""
    from purejax_bilevel.runtime import devices

    devices.prepare()
    folder = Path(processes.from_first(lambda: str(_folder(run, config))))
    how = {name: getattr(run, name) for name in RUNNER_OPTIONS}
    loop.RunOptions(**how)  # bad input shows before anything is written
    part = runs.make_part(config, run.num_seeds, run.seed)
    devices.make_mesh(len(part.grid), run.devices)
    if run.video and not hasattr(part.program, "episode"):
        raise UserError(f"--video: {type(part.program).__name__} has no policy to show.")
    seeds = {"seed": run.seed, "num_seeds": run.num_seeds}
    if processes.is_first():
        loop.check_writable(folder)
        runs.save_description(folder, config, seeds, resumed=run.resume is not None)
    dataset = runs.run(config, **seeds, folder=folder, video=run.video, resume=run.resume is not None, **how)
    final = next(
        (str(name) for name in dataset.data_vars if "episode" in dataset[name].dims), dataset.attrs["headline"]
    )
    if not run.quiet and processes.is_first():
        for variable in dataset.attrs.get("tables") or [final]:
            runs.print_summary(dataset, variable, Console())
        failed = int(statistics.failed_members(dataset).sum())
        note = f"; {failed} members diverged" if failed else ""
        seconds = f"compiled in {dataset.attrs['compile_seconds']:.1f} s, ran {dataset.attrs['run_seconds']:.1f} s"
        console.print(f"{seconds}{note}. Results, figures and checkpoint: {folder}", markup=False, highlight=False)


def _folder(run: Run, config: Any) -> Path:
    if run.resume is not None:
        return run.resume
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    folder = run.output_dir / (run.name or f"{config.title}-{stamp}")
    if (folder / "config.yaml").exists():
        raise UserError(f"{folder} holds a run already: choose another --name, or go on with it by --resume {folder}.")
    return folder


# --- parsing ----------------------------------------------------------------------------------------------------------


def named_environment(arguments: Sequence[str] | None = None) -> str:
    """The value of `--env_name`; see `named_setting`."""
    return named_setting("env_name", arguments)


def named_setting(name: str, arguments: Sequence[str] | None = None) -> str:
    """The value of an option, or of the run that `--resume` names, by which a script chooses its configuration.

    Nothing is checked here: where nothing is found ("" then), the usual reading of the command line says what is wrong.
    """
    words = sys.argv[1:] if arguments is None else list(arguments)
    if value := _option(words, name):
        return value
    try:
        saved = yaml.safe_load((Path(_option(words, "resume")) / "config.yaml").read_text())
        return str(saved["config"][name])
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        return ""


def _option(words: Sequence[str], name: str) -> str:
    """The last value of an option, written `--name value` or `--name=value`."""
    value = ""
    for word, following in itertools.zip_longest(words, words[1:], fillvalue=""):
        option, equals, rest = word.partition("=")
        if option.startswith("--") and option[2:].replace("-", "_") == name:
            value = rest if equals else following
    return value


def parse(config_class: type, description: str, arguments: Sequence[str] | None = None) -> tuple[Run, Any]:
    """Reads the command line (and, on resume, the folder's own settings).

    Raises:
        UserError: a value that is not allowed, or a setting that differs from the run to be resumed.
    """
    words = _lower_agent_type(sys.argv[1:] if arguments is None else list(arguments))
    parser = _arguments_class(config_class)
    run, config = _split(
        tyro.cli(parser, description=description, args=words, use_underscores=True, config=MARKERS), config_class
    )
    if run.resume is None:
        return run, config.resolved()
    folder = run.resume
    saved_run, saved = load_description(folder, config_class)
    default = _defaults(parser, Run(**saved_run), saved)  # not `run`: a flag given twice is unknown to tyro
    again = tyro.cli(parser, description=description, args=words, use_underscores=True, config=MARKERS, default=default)
    run, config = _split(again, config_class)
    config = config.resolved()
    _check_unchanged(run, saved_run, to_dict(config), to_dict(saved))
    done = loop.steps_done(folder)
    name = next(name for name in RUN_LENGTH if hasattr(config, name))
    if getattr(config, name) < done:
        raise UserError(f"--{name} {getattr(config, name)} is less than the {done} steps that {run.resume} has done.")
    return run, config


def load_description(folder: Path, config_class: type) -> tuple[dict[str, Any], Any]:
    """What the run in a folder was told: `(seed and num_seeds, resolved configuration)`.

    Raises:
        UserError: there is no run, or it is one of another script.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        raise UserError(f"--resume {folder}: there is no run in that folder (no config.yaml).")
    try:
        saved = yaml.safe_load(path.read_text())
        return dict(saved["run"]), validate(from_dict(config_class, saved["config"]))
    except (yaml.YAMLError, KeyError, TypeError, AttributeError, UserError) as error:
        raise UserError(f"--resume {folder}: its config.yaml is not of this script ({error}).") from error


def _check_unchanged(run: Run, saved_run: dict[str, Any], config: dict[str, Any], saved: dict[str, Any]) -> None:
    now = {**config, **{name: getattr(run, name) for name in saved_run}}
    for name, before in {**saved, **saved_run}.items():
        if now[name] != before and name not in RUN_LENGTH:
            raise UserError(
                f"--resume goes on with --{name} {_words(before)}, got {_words(now[name])}; "
                "start a new run for another value."
            )


def _words(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _lower_agent_type(words: list[str]) -> list[str]:
    """The original code writes funcBO; case does not matter here."""
    lowered = list(words)
    for index, word in enumerate(words):
        if word in ("--agent_type", "--agent-type") and index + 1 < len(words):
            lowered[index + 1] = words[index + 1].lower()
        elif word.startswith(("--agent_type=", "--agent-type=")):
            lowered[index] = word.lower()
    return lowered


def _arguments_class(config_class: type) -> type:
    """A dataclass for tyro: `run` and one nested dataclass per group of the configuration's fields."""
    hints = typing.get_type_hints(config_class)
    groups: dict[str, list] = {}
    for field in fields(config_class):
        if field.metadata.get("hidden"):
            continue
        hint, default = hints[field.name], field.default
        metavar = None
        if field.metadata["traced"]:
            optional = isinstance(hint, types.UnionType)
            element: Any = typing.get_args(hint)[0] if optional else hint
            metavar = f"{element.__name__.upper()} [{element.__name__.upper()} ...]"
            hint, default = (tuple[element, ...] | None, None) if optional else (tuple[element, ...], (default,))
        argument: Any = Annotated[hint, tyro.conf.arg(help=field.metadata["help"], metavar=metavar)]
        entry = (field.name, argument, dataclasses.field(default=default))
        groups.setdefault(field.metadata["group"], []).append(entry)
    made: list[tuple[str, Any, Any]] = []
    for group, entries in groups.items():
        section = dataclasses.make_dataclass(group.replace(" ", "_"), entries, frozen=True)
        section.__doc__ = ""
        made.append((group.replace(" ", "_"), section, dataclasses.field(default_factory=_builder(section))))
    run_field = ("run", Run, dataclasses.field(default_factory=Run))
    return dataclasses.make_dataclass("Arguments", [*made, run_field], frozen=True)


def _builder(section: type) -> Callable[[], Any]:
    return lambda: section()


def _split(parsed: Any, config_class: type) -> tuple[Run, Any]:
    values: dict[str, Any] = {}
    for section in dataclasses.fields(parsed):
        if section.name != "run":
            group = getattr(parsed, section.name)
            values |= {field.name: getattr(group, field.name) for field in dataclasses.fields(group)}
    single = {
        name: value[0] if isinstance(value, tuple) and len(value) == 1 else value for name, value in values.items()
    }
    return parsed.run, config_class(**single)


def _defaults(parser: type, run: Run, config: Any) -> Any:
    """Parsed arguments that say what a saved configuration says."""
    sections: dict[str, Any] = {"run": run}
    is_traced = {field.name: field.metadata["traced"] for field in fields(config)}
    for section in dataclasses.fields(parser):
        if section.name == "run":
            continue
        values = {}
        for field in dataclasses.fields(section.type):  # type: ignore[arg-type]
            value = getattr(config, field.name)
            values[field.name] = value if not is_traced[field.name] or isinstance(value, tuple) else (value,)
        sections[section.name] = section.type(**values)  # type: ignore[operator]
    return parser(**sections)

"""Command line of the training scripts, made from the configuration's declaration.

Every traced field takes several values; groups and explanations come from the fields. What a run was told is kept in
its folder, so that `--resume` needs nothing else.
"""

import contextlib
import dataclasses
import itertools
import re
import signal
import sys
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
import yaml
from rich.console import Console

from purejax_bilevel import agents
from purejax_bilevel.configuration import fields
from purejax_bilevel.errors import UserError
from purejax_bilevel.results import statistics
from purejax_bilevel.runtime import loop, processes
from purejax_bilevel.studies import folder as folders
from purejax_bilevel.studies import run as runs

MARKERS = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff)

RUNNER_OPTIONS = ("devices", "member_batch", "chunks", "wandb_mode", "wandb_runs", "tensorboard", "quiet")


def explained(text: str, metavar: str | None = None) -> Any:
    """An option's line in `--help`; where the text says what happens by default, tyro's own words would repeat it."""
    return tyro.conf.arg(help=text, metavar=metavar, help_behavior_hint="" if "(default:" in text else None)


@dataclasses.dataclass(frozen=True)
class Run:
    """How and where to run; the same for all scripts."""

    output_dir: Annotated[Path, explained("folder of all runs")] = Path("runs")
    name: Annotated[str, explained("folder of this run inside output_dir (default: made from what runs and when)")] = ""
    seed: Annotated[int, explained("first seed")] = 0
    num_seeds: Annotated[int, explained("members per setting, with seeds seed, seed + 1, ...")] = 1
    devices: Annotated[int | None, explained("number of devices (default: all cores or accelerators)")] = None
    coordinator: Annotated[
        str | None,
        explained(
            "host:port of process 0, where several processes share the members (default: what Slurm or Open MPI "
            "say); all need the same output_dir, and --devices counts the devices of all"
        ),
    ] = None
    num_processes: Annotated[int | None, explained("how many processes, with --coordinator")] = None
    process_id: Annotated[int | None, explained("which one this is, from 0")] = None
    member_batch: Annotated[
        int | None,
        explained("members trained at once on a device, 0: all (default: 1 on a CPU, all elsewhere)"),
    ] = None
    chunks: Annotated[
        int | None,
        explained("calls of the compiled program (default: one every few seconds); changes no number"),
    ] = None
    resume: Annotated[Path | None, explained("go on with the run in this folder")] = None
    wandb_mode: Annotated[Literal["disabled", "offline", "online"], explained("Weights and Biases")] = "disabled"
    wandb_runs: Annotated[Literal["member", "setting"], explained("one wandb run per member or per setting")] = "member"
    tensorboard: Annotated[bool, explained("write TensorBoard files (extra: tensorboard)")] = False
    video: Annotated[bool, explained("write a GIF of the median member's policy")] = False
    quiet: Annotated[bool, explained("no progress bar, no table")] = False


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
        with _stopped_by_sigterm():
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
        Console(stderr=True).print("stopped before anything was written.")
        return 130
    return 0


@contextlib.contextmanager
def _stopped_by_sigterm() -> Iterator[None]:
    """What docker stop and scancel send is a Ctrl-C."""
    try:
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


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
    resume = run.resume is not None
    options = loop.RunOptions(resume=resume, **{name: getattr(run, name) for name in RUNNER_OPTIONS})
    with folders.opened(lambda: folders.choose(run.output_dir, run.name, run.resume, config.title), resume) as folder:
        seeds = {"seed": run.seed, "num_seeds": run.num_seeds}
        dataset = runs.run_in(folder, config, **seeds, video=run.video, options=options)
    if run.quiet or not processes.is_first():
        return
    final = next(
        (str(name) for name in dataset.data_vars if "episode" in dataset[name].dims), dataset.attrs["headline"]
    )
    for variable in dataset.attrs.get("tables") or [final]:
        runs.print_summary(dataset, variable, Console())
    failed = int(statistics.failed_members(dataset).sum())
    note = f"; {failed} {'member' if failed == 1 else 'members'} diverged" if failed else ""
    seconds = f"compiled in {dataset.attrs['compile_seconds']:.1f} s, ran {dataset.attrs['run_seconds']:.1f} s"
    text = f"{seconds}{note}. Results, figures and checkpoint: {folder}"
    console.print(text, markup=False, highlight=False, soft_wrap=True)


# --- parsing ----------------------------------------------------------------------------------------------------------


def named_environment(arguments: Sequence[str] | None = None) -> str:
    """The value of `--env_name`; see `named_setting`."""
    return named_setting("env_name", arguments)


def named_setting(name: str, arguments: Sequence[str] | None = None) -> str:
    """The value of an option, or of the run that `--resume` names, by which a script chooses its configuration.

    Nothing is checked here: where nothing is found ("" then), the usual reading of the command line says what is wrong.
    """
    words = sys.argv[1:] if arguments is None else list(arguments)
    folder = _option(words, "resume")
    if (value := _option(words, name)) or not folder:
        return value
    try:
        saved = yaml.safe_load((Path(folder) / folders.CONFIG).read_text(encoding="utf-8"))
        return str(saved["config"][name])
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError):
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
    words = _spell_agent_type(sys.argv[1:] if arguments is None else list(arguments))
    if ":" in (agent := _option(words, agents.FIELD)) and (known := agents.registry(config_class)) is not None:
        known.check(agent)  # loaded now, so that `--help` knows it
    parser = _arguments_class(config_class)
    _check_single(parser, words)
    words, flags = _take_flags(parser, words)

    def read(**default: Any) -> tuple[Run, Any]:
        read = tyro.cli(parser, description=description, args=words, use_underscores=True, config=MARKERS, **default)
        return _split(read, config_class, flags)

    run, config = read()
    if run.resume is not None:
        told = folders.read_description(run.resume, config_class)
        before: dict[str, Any] = {**told.run, **told.options}
        run, config = read(default=_defaults(parser, Run(**before), told.config))
    return run, config.resolved()


def _declared(parser: type) -> dict[str, Any]:
    """The type of every option."""
    declared: dict[str, Any] = typing.get_type_hints(Run)
    for section in dataclasses.fields(parser):
        if section.name != "run":
            declared |= typing.get_type_hints(section.type)
    return declared


def _check_single(parser: type, words: Sequence[str]) -> None:
    """What takes one value must not get several: tyro would call the second an unrecognized option.

    Raises:
        UserError: it does.
    """
    declared = _declared(parser)
    for place, word in enumerate(words):
        name = word.removeprefix("--").replace("-", "_")
        values = list(itertools.takewhile(lambda value: not value.startswith("--"), words[place + 1 :]))
        if not word.startswith("--") or name not in declared or declared[name] is bool or len(values) < 2:
            continue
        if name in {field.name for field in dataclasses.fields(Run)}:
            raise UserError(f"--{name} takes one value, got {' '.join(values)}.")
        if not any(typing.get_origin(hint) is tuple for hint in (declared[name], *typing.get_args(declared[name]))):
            raise UserError(
                f"--{name} takes one value, got {' '.join(values)}: it changes the compiled program, which all members "
                "share; start a run for each value, or a sweep."
            )


def _take_flags(parser: type, words: Sequence[str]) -> tuple[list[str], dict[str, bool]]:
    """Separates `--flag`, `--flag=True` and `--flag=False`: tyro knows the first alone, and only where it is news.

    Raises:
        UserError: another value.
    """
    declared, rest, flags = _declared(parser), [], {}
    for word in words:
        option, equals, value = word.partition("=")
        name = option.removeprefix("--").replace("-", "_")
        if not option.startswith("--") or declared.get(name) is not bool:
            rest.append(word)
        elif value.lower() in ("true", "false") or not equals:
            flags[name] = value.lower() != "false"
        else:
            raise UserError(f"--{name} must be True or False, got {value!r}.")
    return rest, flags


def _spell_agent_type(words: list[str]) -> list[str]:
    """The original code writes funcBO; case does not matter here."""
    flags, spelled = ("--agent_type", "--agent-type"), list(words)
    for index, word in enumerate(words):
        flag, equals, name = word.partition("=")
        if word in flags and index + 1 < len(words):
            spelled[index + 1] = agents.spelled(words[index + 1])
        elif flag in flags and equals:
            spelled[index] = f"{flag}={agents.spelled(name)}"
    return spelled


def _arguments_class(config_class: type) -> type:
    """A dataclass for tyro: `run` and one nested dataclass per group of the configuration's fields."""
    hints, lines = typing.get_type_hints(config_class), agents.explain(config_class)
    groups: dict[str, list] = {}
    for field in fields(config_class):
        if field.metadata.get("hidden"):
            continue
        hint, default = hints[field.name], field.default
        metavar = None
        if (choices := field.metadata.get("choices")) is not None:
            metavar = choices.notation
        if field.metadata["traced"]:
            optional = isinstance(hint, types.UnionType)
            element: Any = typing.get_args(hint)[0] if optional else hint
            metavar = f"{element.__name__.upper()} [{element.__name__.upper()} ...]"
            hint, default = (tuple[element, ...] | None, None) if optional else (tuple[element, ...], (default,))
        argument: Any = Annotated[hint, explained(lines[field.name], metavar)]
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


def _split(parsed: Any, config_class: type, flags: dict[str, bool]) -> tuple[Run, Any]:
    values: dict[str, Any] = {}
    for section in dataclasses.fields(parsed):
        if section.name != "run":
            group = getattr(parsed, section.name)
            values |= {field.name: getattr(group, field.name) for field in dataclasses.fields(group)}
    single = {
        name: value[0] if isinstance(value, tuple) and len(value) == 1 else value for name, value in values.items()
    }
    own = {name: value for name, value in flags.items() if name in single}
    rest = {name: value for name, value in flags.items() if name not in single}
    return dataclasses.replace(parsed.run, **rest), config_class(**{**single, **own})


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

"""The one reader of command lines: options of the run (`Options`) and settings of a configuration, as declared there.

Every traced setting takes several values; groups and explanations come from the fields.
"""

import dataclasses
import difflib
import itertools
import sys
import types
import typing
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Annotated, Any

import tyro

from purejax_bilevel import agents
from purejax_bilevel.configuration import fields
from purejax_bilevel.errors import UserError
from purejax_bilevel.results.checks import load_yaml
from purejax_bilevel.runtime.options import HowToRun, option

MARKERS = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff)
RUN = "run"  # the section of a parser that holds the options
LISTED = "listed"  # in a field's metadata: a text of names, given as words
NOT_IN_FILES = ("config", "resume", "dry_run", "coordinator", "num_processes", "process_id")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(HowToRun):
    """How and where to run; the same for all scripts."""

    output_dir: Path = option(Path("runs"), "folder of all runs")  # noqa: RUF009
    name: str = option("", "folder of this run inside output_dir (default: made from what runs and when)")
    resume: Path | None = option(None, "go on with the run in this folder")  # noqa: RUF009
    config: Path | None = option(  # noqa: RUF009
        None, "YAML file of options and settings, or the config.yaml of an earlier run; the command line comes first"
    )
    dry_run: bool = option(False, "compile, tell members, memory and time, and stop; nothing is written")
    seed: int = option(0, "first seed")
    num_seeds: int = option(1, "members per setting, with seeds seed, seed + 1, ...")
    video: bool = option(False, "write a GIF of the median member's policy")
    coordinator: str | None = option(
        None,
        "host:port of process 0, where several processes share the members (default: what Slurm or Open MPI say); all "
        "need the same output_dir, and --devices counts the devices of all",
    )
    num_processes: int | None = option(None, "how many processes, with --coordinator")
    process_id: int | None = option(None, "which one this is, from 0")


# --- single words, before everything is read --------------------------------------------------------------------------


def words_of(arguments: Sequence[str] | None) -> list[str]:
    """The given words, by default those of this process."""
    return sys.argv[1:] if arguments is None else list(arguments)


def option_name(word: str) -> str:
    """The name of the option that a word states, with or without `=value`; "" for any other word."""
    return word[2:].partition("=")[0].replace("-", "_") if word.startswith("--") else ""


def stated(words: Sequence[str], name: str) -> str:
    """The last value of an option, written `--name value` or `--name=value`; "" where there is none."""
    value = ""
    for word, following in itertools.zip_longest(words, words[1:], fillvalue=""):
        if option_name(word) == name:
            value = word.partition("=")[2] if "=" in word else following
    return value


# --- a file of settings -----------------------------------------------------------------------------------------------


def settings_file(words: Sequence[str]) -> dict[str, Any]:
    """Options and settings in the file that `--config` names; {} where none is named.

    Raises:
        UserError: the file cannot be read, or is none of settings.
    """
    path = stated(words, "config")
    if not path:
        return {}
    try:
        content = load_yaml(Path(path).read_text(encoding="utf-8"), f"--config {path}")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise UserError(f"--config {path} cannot be read ({reason}).") from error
    if isinstance(content, dict) and "sweep" in content:
        raise UserError(f"--config {path} is of a sweep: run it by sweep.py.")
    if isinstance(content, dict) and isinstance(content.get("config"), dict):  # an earlier run's
        content = {**(content.get("run") or {}), **(content.get("options") or {}), **content["config"]}
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise UserError(f"--config {path} must hold lines `name: value`, one per option or setting.")
    for name, value in content.items():
        if name in NOT_IN_FILES:
            raise UserError(f"--config {path}: {name} belongs on the command line.")
        if not all(isinstance(entry, (str, int, float, NoneType)) for entry in _listed(value)) or value == []:
            raise UserError(f"--config {path}: {name} must be a value or a list of values, got {value!r}.")
    return content


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def with_settings(
    words: Sequence[str], settings: Mapping[str, Any], parser: type, left_out: Container[str] = ()
) -> list[str]:
    """The words of a command line after those that say the same as a file of settings.

    Args:
        words: of the command line; what they state is not taken from the file.
        settings: in the file.
        parser: from `parser_of`.
        left_out: names in the file that are of no option.

    Raises:
        UserError: the file names what is no option.
    """
    known, given = declared_types(parser), {option_name(word) for word in words}
    file = f"--config {stated(words, 'config')}"
    said: list[str] = []
    for name, value in settings.items():
        if name in left_out or name in given or value is None:
            continue
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {close[0]}?" if close else "."
            raise UserError(f"{file}: there is no option {name}{hint}")
        values = [str(entry) for entry in _listed(value)]
        _check_numbers(f"{file}: {name}", known[name], values)
        said += [f"--{name}={value}"] if known[name] is bool else [f"--{name}", *values]
    return [*said, *words]


# --- the parser -------------------------------------------------------------------------------------------------------


def parser_of(options: type, config_class: type | None = None) -> type:
    """A dataclass for tyro: a nested one for the options, and one per group of the configuration's fields."""
    groups: dict[str, list] = {}
    lines = agents.explain(config_class) if config_class else {}
    for field in fields(config_class) if config_class else ():
        if not field.metadata.get("hidden"):
            hint = typing.get_type_hints(config_class)[field.name]
            entry = _entry(field, hint, lines[field.name])
            groups.setdefault(field.metadata["group"].replace(" ", "_"), []).append(entry)
    hints = typing.get_type_hints(options)
    declared = [field for field in dataclasses.fields(options) if not field.metadata.get("hidden")]
    declared.sort(key=lambda field: field.name in HowToRun.__dataclass_fields__)  # what most people look for first
    groups[RUN] = [_entry(field, hints[field.name], field.metadata["help"]) for field in declared]
    made: list[tuple[str, Any, Any]] = []
    for group, entries in groups.items():
        section = dataclasses.make_dataclass(group, entries, frozen=True)
        section.__doc__ = ""
        made.append((group, section, dataclasses.field(default_factory=_builder(section))))
    return dataclasses.make_dataclass("Arguments", made, frozen=True)


def _builder(section: type) -> Callable[[], Any]:
    return lambda: section()


def _entry(field: dataclasses.Field, hint: Any, text: str) -> tuple[str, Any, dataclasses.Field]:
    """One option of the parser, with its line in `--help`; a traced field takes several values."""
    default, metavar = field.default, None
    if (choices := field.metadata.get("choices")) is not None:
        metavar = choices.notation
    if field.metadata.get("traced"):
        optional = isinstance(hint, types.UnionType)
        element: Any = typing.get_args(hint)[0] if optional else hint
        metavar = f"{element.__name__.upper()} [{element.__name__.upper()} ...]"
        hint, default = (tuple[element, ...] | None, None) if optional else (tuple[element, ...], (default,))
    is_listed = bool(field.metadata.get(LISTED))
    if is_listed:
        metavar = "NAME [NAME ...]"
    if field.metadata.get("positional"):
        hint = Annotated[hint, tyro.conf.Positional]
    # Where the text says what happens by default, tyro's own words would repeat it.
    hint_of_default = "" if "(default:" in text else None
    argument = Annotated[hint, tyro.conf.arg(help=text, metavar=metavar, help_behavior_hint=hint_of_default)]
    return field.name, argument, dataclasses.field(default=default, metadata={LISTED: True} if is_listed else None)


def declared_types(parser: type) -> dict[str, Any]:
    """The type of every option of a parser."""
    declared: dict[str, Any] = {}
    for section in dataclasses.fields(parser):
        declared |= typing.get_type_hints(section.type)
    return declared


# --- reading ----------------------------------------------------------------------------------------------------------


def read(
    parser: type,
    description: str,
    words: Sequence[str],
    default: dict[str, Any] | None = None,
    is_positional: Callable[[str], bool] = lambda word: False,
) -> dict[str, Any]:
    """Reads a command line.

    Args:
        parser: from `parser_of`.
        description: for `--help`.
        words: of the command line.
        default: values by name that take the place of the declared ones; a tuple where an option takes several.
        is_positional: whether a word may stand alone, after the value of an option.

    Returns:
        Values by name; options that take several values hold tuples.

    Raises:
        UserError: an option with one value got several, a number is none, or a flag is not True or False.
    """
    words = _joined(parser, words)
    _check_values(parser, words, is_positional)
    rest, flags = _take_flags(parser, words)
    start = {} if default is None else {"default": _with_values(parser, default)}
    parsed = tyro.cli(parser, description=description, args=rest, use_underscores=True, config=MARKERS, **start)
    values: dict[str, Any] = {}
    for section in dataclasses.fields(parsed):
        values |= vars(getattr(parsed, section.name))
    return {**values, **flags}


def _with_values(parser: type, values: dict[str, Any]) -> Any:
    sections = {}
    for section in dataclasses.fields(parser):
        own = {field.name for field in dataclasses.fields(section.type)} & set(values)  # type: ignore[arg-type]
        sections[section.name] = section.type(**{name: values[name] for name in own})  # type: ignore[operator]
    return parser(**sections)


def _joined(parser: type, words: Sequence[str]) -> list[str]:
    """The words with those of each listed option in one: `--adapt=lr inner_lr`."""
    sections = [section.type for section in dataclasses.fields(parser)]
    listed = {field.name for section in sections for field in dataclasses.fields(section) if LISTED in field.metadata}  # type: ignore[arg-type]
    found: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if option_name(word) in listed:
            name, equals, value = word.partition("=")
            names = [value] if equals else []
            while rest and not rest[0].startswith("--"):
                names.append(rest.pop(0))
            if not names:
                raise UserError(f"{name} needs at least one name.")
            word = f"{name}={' '.join(names)}"
        found.append(word)
    return found


def _check_values(parser: type, words: Sequence[str], is_positional: Callable[[str], bool]) -> None:
    """What tyro would call an unrecognized option, or answer with the names of types, gets a sentence."""
    declared = declared_types(parser)
    options = {field.name for field in dataclasses.fields(_section(parser, RUN))}
    for place, word in enumerate(words):
        name = option_name(word)
        if name not in declared or declared[name] is bool:
            continue
        values = [word.partition("=")[2]] if "=" in word else _values_after(words[place + 1 :], is_positional)
        if len(values) > 1:
            _check_several(name, values, declared[name], name in options)
        _check_numbers(f"--{name}", declared[name], values)


def _values_after(words: Sequence[str], is_positional: Callable[[str], bool]) -> list[str]:
    """The values at the beginning of what follows an option."""
    first, rest = words[:1], words[1:]
    if not first or first[0].startswith("--"):
        return []
    return [*first, *itertools.takewhile(lambda value: not value.startswith("--") and not is_positional(value), rest)]


def _check_several(name: str, values: Sequence[str], hint: Any, is_of_the_run: bool) -> None:
    if is_of_the_run:
        raise UserError(f"--{name} takes one value, got {' '.join(values)}.")
    if not any(typing.get_origin(kind) is tuple for kind in (hint, *typing.get_args(hint))):
        raise UserError(
            f"--{name} takes one value, got {' '.join(values)}: it changes the compiled program, which all members "
            "share; start a run for each value, or a sweep."
        )


def _check_numbers(where: str, hint: Any, values: Iterable[str]) -> None:
    """Raises UserError for what is no number where one is declared; None is a value of what may be None."""
    kinds = {kind for part in (hint, *typing.get_args(hint)) for kind in (part, *typing.get_args(part))}
    number = next((kind for kind in (int, float) if kind in kinds), None)
    if number is None or str in kinds:
        return
    for value in values:
        try:
            number(value)
        except ValueError as error:
            if value != "None" or NoneType not in kinds:
                wanted = "a whole number" if number is int else "a number"
                raise UserError(f"{where} must be {wanted}, got {value!r}.") from error


def _section(parser: type, name: str) -> Any:
    return next(field.type for field in dataclasses.fields(parser) if field.name == name)


def _take_flags(parser: type, words: Sequence[str]) -> tuple[list[str], dict[str, bool]]:
    """Separates `--flag`, `--flag=True` and `--flag=False`: tyro knows the first alone, and only where it is news."""
    declared, rest, flags = declared_types(parser), [], {}
    for word in words:
        name, value = option_name(word), word.partition("=")[2]
        if declared.get(name) is not bool:
            rest.append(word)
        elif value.lower() in ("true", "false") or "=" not in word:
            flags[name] = value.lower() != "false"
        else:
            raise UserError(f"--{name} must be True or False, got {value!r}.")
    return rest, flags

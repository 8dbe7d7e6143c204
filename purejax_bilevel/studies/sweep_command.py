"""The command line of sweeps: a sweep file or a preset, options of the run, and changes of any setting."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console

from purejax_bilevel.configuration import fields
from purejax_bilevel.errors import UserError
from purejax_bilevel.members import check_count
from purejax_bilevel.results.checks import load_yaml
from purejax_bilevel.runtime.options import option
from purejax_bilevel.studies import arguments
from purejax_bilevel.studies.arguments import Options, words_of
from purejax_bilevel.studies.command_line import exit_status, status_of
from purejax_bilevel.studies.presets import PRESETS, preset

if TYPE_CHECKING:
    from purejax_bilevel.studies.study import Study

DESCRIPTION = (
    "Run a study: all agents, settings and seeds in one compiled call. Any setting of its program can be given as "
    "field=value or --field value ...; agents=omd,mle chooses agents, search.x=, report.x= and seeds.x= change these "
    "sections. Sweep files are explained in purejax_bilevel/studies/README.md."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepOptions(Options):
    """How and where to run a sweep."""

    sweep: str = option("", f"a sweep file or {', '.join(PRESETS)}", positional=True)
    scale: Literal["smoke", "paper"] = option("smoke", "size of a preset")
    search: Literal["grid", "random", "es", "pbt"] | None = option(
        None, "how settings are found (default: the sweep's)"
    )
    halving: int | None = option(None, "how often the worse half of the settings is stopped early")
    samples: int | None = option(None, "settings that --search random draws")
    population: int | None = option(None, "settings per generation of --search es, individuals of --search pbt")
    generations: int | None = option(None, "generations of --search es")
    interval: int | None = option(None, "steps between trials of --search pbt (default: eval_frequency)")
    seed: int | None = option(None, "first seed (default: the sweep's)")  # type: ignore[assignment]
    num_seeds: int | None = option(None, "number of seeds (default: the sweep's)")  # type: ignore[assignment]
    video: bool = option(False, "write a GIF of the median member's policy, for the best setting of each agent")


ENTRIES = {
    "search": "search.method",
    "halving": "search.halving",
    "samples": "search.samples",
    "population": "search.population",
    "generations": "search.generations",
    "interval": "search.interval",
    "seed": "seeds.first",
    "num_seeds": "seeds.count",
}  # options that change the sweep file


def main(given: Sequence[str] | None = None) -> int:
    """Runs a sweep; returns the exit status, as `command_line.main`."""
    words = words_of(given)
    if not {"-h", "--help"}.isdisjoint(words):  # needs no program
        arguments.read(arguments.parser_of(SweepOptions), DESCRIPTION, ["--help"])

    def work(console: Console) -> int:
        options, study = read_arguments(words)
        from purejax_bilevel.results.analysis import reported_variable
        from purejax_bilevel.studies import sweep

        found = sweep.run(study, options, console)
        if options.dry_run:
            return 0
        return status_of(found, [reported_variable(dataset, study.report) for dataset in found])

    return exit_status(work, words)


def read_arguments(given: Sequence[str]) -> tuple[SweepOptions, "Study"]:
    """Reads the command line, and the sweep file or, on resume, the folder's own.

    Raises:
        UserError: bad input, in one sentence.
    """
    words, changes = split_overrides(given)
    parser = arguments.parser_of(SweepOptions)
    values = arguments.read(parser, DESCRIPTION, words, is_positional=_is_sweep)
    if (file := values["config"]) is not None:
        if values["sweep"]:
            raise UserError(f"name one sweep, got {values['sweep']} and --config {file}.")
        values["sweep"] = str(file)
    changes |= {entry: values[name] for name, entry in ENTRIES.items() if values[name] is not None}
    _prepare_devices()
    if values["resume"] is None:
        return SweepOptions(**values), _study_of(values["sweep"], values["scale"], changes)
    study, kept = _resumed(values["resume"], values["sweep"], changes)
    return SweepOptions(**arguments.read(parser, DESCRIPTION, words, kept, _is_sweep)), study


def _study_of(sweep: str, scale: str, changes: Mapping[str, Any]) -> "Study":
    from purejax_bilevel.studies.overrides import override
    from purejax_bilevel.studies.study import parse, read

    if not sweep:
        raise UserError(f"name a sweep file or a preset: {', '.join(PRESETS)}.")
    if isinstance(count := changes.get("seeds.count"), int):
        check_count(count)  # before the seeds are listed
    is_file = sweep not in PRESETS and _is_sweep(sweep)
    return parse(override(read(sweep) if is_file else preset(sweep, scale), changes))


def _is_sweep(word: str) -> bool:
    return word in PRESETS or Path(word).suffix in (".yaml", ".yml") or Path(word).is_file()


def _prepare_devices() -> None:
    """Before anything imports gymnax, whose import makes jax choose its devices."""
    from purejax_bilevel.runtime import devices

    devices.prepare()


def split_overrides(given: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Separates the options of the script from `field=value`, `--field value ...` and `--field=value`.

    Raises:
        UserError: a value is missing.
    """
    own = {field.name for field in dataclasses.fields(SweepOptions)} | {"help"}
    words: list[str] = []
    changes: dict[str, Any] = {}
    rest = list(given)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        if not word.startswith("--"):
            if equals:
                changes[name] = _value(value, name)
            else:
                words.append(word)
        elif name in own or not ("." in name or name in _settings()):
            words.append(word)
        elif equals:
            changes[name] = _value(value, name)
        else:
            values = []
            while rest and not rest[0].startswith("--") and "=" not in rest[0]:
                values.append(_value(rest.pop(0), name))
            if not values:
                raise UserError(f"--{name} needs a value.")
            changes[name] = values[0] if len(values) == 1 else values
    return words, changes


def _settings() -> set[str]:
    """Names of all settings of all programs."""
    _prepare_devices()
    from purejax_bilevel.programs import REGISTRY
    from purejax_bilevel.studies.study import config_class

    return {field.name for program in REGISTRY for field in fields(config_class(program))} | {"agents"}


def _value(text: str, name: str) -> Any:
    value = load_yaml(text, f"{name}={text}")
    if isinstance(value, str) and "," in value:
        return [load_yaml(entry, f"{name}={text}") for entry in value.split(",") if entry]
    return value


def _resumed(folder: Path, sweep: str, changes: Mapping[str, Any]) -> tuple["Study", dict[str, Any]]:
    """The study of a folder, which goes on unchanged, and the options that it was given."""
    from purejax_bilevel.studies.folder import CONFIG, kept_options
    from purejax_bilevel.studies.overrides import override
    from purejax_bilevel.studies.study import parse

    path = folder / CONFIG
    if not path.is_file():
        raise UserError(f"--resume {folder}: there is no sweep in that folder (no {CONFIG}).")
    try:
        content = load_yaml(path.read_text(encoding="utf-8"), f"{path}")
        description, kept = content["sweep"], kept_options(content.get("options"))
    except OSError as error:
        raise UserError(f"--resume {folder}: its {CONFIG} cannot be read ({error.strerror}).") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"--resume {folder}: its {CONFIG} is not of a sweep.") from error
    study = parse(description)
    if sweep and Path(sweep).stem != study.name:
        raise UserError(f"--resume {folder} goes on with {study.name}, not with {sweep}.")
    if changes and parse(override(description, changes)) != study:
        raise UserError(
            f"--resume goes on with the settings in {path}; start a new sweep for other values of {', '.join(changes)}."
        )
    return study, kept

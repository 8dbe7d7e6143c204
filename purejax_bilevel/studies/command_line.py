"""The way of a script from its command line to its exit status, and the command line of the training scripts.

What a run was told is kept in its folder, so that `--resume` needs nothing else. What takes long to import is imported
when it is used: not for `--help`.
"""

import contextlib
import dataclasses
import re
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from purejax_bilevel import agents, configuration, interrupts
from purejax_bilevel.configuration import fields
from purejax_bilevel.errors import Interrupted, UserError
from purejax_bilevel.runtime.options import HowToRun
from purejax_bilevel.studies import arguments
from purejax_bilevel.studies.arguments import Options, stated, words_of

if TYPE_CHECKING:
    import xarray

    from purejax_bilevel.program import Configuration

FAILED, BAD_INPUT = 1, 2  # exit statuses
ADAPT = "adapt"  # an option that only some programs have, and that people will try with others


# --- what all scripts share -------------------------------------------------------------------------------------------


def exit_status(action: Callable[[Console], int | None], words: Sequence[str]) -> int:
    """Joins the other processes and does a script's work; tells what stopped it and returns the exit status."""
    from purejax_bilevel.runtime import processes

    interrupts.heard(signal.SIGINT)  # unless another signal comes
    try:
        with _stopped_by_sigterm():
            _join(words)
            with processes.together():
                return action(processes.console()) or 0
    except UserError as error:
        if processes.should_tell(error):
            tell_error(str(error))
        return BAD_INPUT
    except Interrupted as message:
        processes.console().print(str(message), markup=False, highlight=False, soft_wrap=True)
        return interrupts.status()
    except KeyboardInterrupt:
        Console(stderr=True).print("stopped before anything was written.")
        return interrupts.status()


def tell_error(sentence: str) -> None:
    """Prints on standard error what is wrong."""
    text = f"error: {sentence}"
    Console(stderr=True).print(text, style="bold red", markup=False, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def _stopped_by_sigterm() -> Iterator[None]:
    """What docker stop and scancel send is a Ctrl-C."""
    if signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:  # `interrupts` cares for it, or another program
        yield
        return
    try:
        signal.signal(signal.SIGTERM, interrupts.raise_interrupt)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _join(words: Sequence[str]) -> None:
    """Before the command line is read: to know all its options takes imports that touch devices."""
    from purejax_bilevel.runtime import processes

    numbers = [stated(words, name) for name in ("num_processes", "process_id")]
    if all(re.fullmatch(r"(-?\d+)?", number) for number in numbers):  # else the reading of the command line says so
        num_processes, process_id = (int(number) if number else None for number in numbers)
        processes.join(stated(words, "coordinator") or None, num_processes, process_id)
    if processes.count() > 1:  # the others have to be told
        interrupts.raise_from_now_on()
    configuration.is_quiet = not processes.is_first()


def how_to_run(options: Options) -> dict[str, Any]:
    """The options that `RunOptions` has as well."""
    return {field.name: getattr(options, field.name) for field in dataclasses.fields(HowToRun)}


def status_of(found: Sequence["xarray.Dataset"], variables: Sequence[str]) -> int:
    """0, or 1 with a sentence where no member has a finite score.

    Args:
        found: results, one or more datasets.
        variables: the score of each.
    """
    import numpy as np

    from purejax_bilevel.results.statistics import member_scores
    from purejax_bilevel.runtime import processes

    scores = [member_scores(dataset, variable) for dataset, variable in zip(found, variables, strict=True)]
    if any(np.isfinite(own).any() for own in scores):
        return 0
    if processes.is_first():
        members = sum(own.size for own in scores)
        who = f"all {members} members" if members > 1 else "the only member"
        tell_error(f"{who} diverged or ended without a finite score: try smaller learning rates; the results are kept.")
    return FAILED


# --- training scripts -------------------------------------------------------------------------------------------------


def main(config_class: type | Callable[[], type], description: str, given: Sequence[str] | None = None) -> int:
    """Runs a training script; returns its exit status.

    That is 0 done, 1 every member diverged, 2 bad input, 130 interrupted by Ctrl-C, 143 by SIGTERM.

    Args:
        config_class: of the options, or a function that imports it: what it imports may make jax choose its devices,
            which must not happen before several processes have joined.
        description: for `--help`.
        given: words of the command line; by default those of this process.
    """
    words = words_of(given)

    def work(console: Console) -> int:
        chosen = config_class if isinstance(config_class, type) else config_class()
        return execute(*parse(chosen, description, words), console)

    return exit_status(work, words)


def execute(options: Options, config: "Configuration", console: Console) -> int:
    """Trains, writes the run's folder and prints the table; returns the exit status."""
    from purejax_bilevel.results import analysis
    from purejax_bilevel.runtime import devices, processes
    from purejax_bilevel.runtime.options import RunOptions
    from purejax_bilevel.studies import folder as folders
    from purejax_bilevel.studies import run as runs

    devices.prepare()
    if options.dry_run:
        from purejax_bilevel.studies.forecast import check_dry_run

        check_dry_run(options)
        runs.forecast(config, options.num_seeds, options.seed, RunOptions(**how_to_run(options)), console)
        return 0
    resume = options.resume is not None
    title = config.resolved().title
    with folders.opened(
        lambda: folders.choose(options.output_dir, options.name, options.resume, title), resume
    ) as folder:
        dataset = runs.run_in(
            folder,
            config,
            num_seeds=options.num_seeds,
            seed=options.seed,
            video=options.video,
            options=RunOptions(resume=resume, **how_to_run(options)),
        )
    if not options.quiet and processes.is_first():
        runs.tell(dataset, folder, console)
    return status_of([dataset], [analysis.reported_variable(dataset, analysis.Reporting())])


def named_environment(given: Sequence[str] | None = None) -> str:
    """The value of `--env_name`; see `named_setting`."""
    return named_setting("env_name", given)


def named_setting(name: str, given: Sequence[str] | None = None) -> str:
    """The value of an option, or in the file or run named by `--config` or `--resume`: it chooses a configuration.

    Nothing is checked here: where nothing is found ("" then), the usual reading of the command line says what is wrong.
    """
    words = words_of(given)
    folder = stated(words, "resume")
    if value := stated(words, name):
        return value
    if not folder:
        with contextlib.suppress(UserError):
            return str(arguments.settings_file(words).get(name, ""))
        return ""
    import yaml

    from purejax_bilevel.studies.folder import CONFIG

    try:
        saved = yaml.safe_load((Path(folder) / CONFIG).read_text(encoding="utf-8"))
        return str(saved["config"][name])
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError):
        return ""


def parse(config_class: type, description: str, given: Sequence[str] | None = None) -> tuple[Options, Any]:
    """Reads the command line (and, on resume, the folder's own settings).

    Returns:
        The options, and the configuration as the user wrote it, checked.

    Raises:
        UserError: a value that is not allowed, or a setting that differs from the run to be resumed.
    """
    words = words_of(given)
    settings = arguments.settings_file(words)
    named = stated(words, agents.FIELD) or str(settings.get(agents.FIELD, ""))
    if ":" in named and (known := agents.registry(config_class)) is not None:
        known.check(named)  # loaded now, so that `--help` knows it
    parser = arguments.parser_of(Options, config_class)
    hidden = [field.name for field in fields(config_class) if field.metadata.get("hidden")]
    words = _spell_agent_type(arguments.with_settings(words, settings, parser, hidden))
    if stated(words, ADAPT) and ADAPT not in arguments.declared_types(parser):
        raise UserError(
            f"--{ADAPT} {stated(words, ADAPT)}: there are no hypergradients of the settings of this program; those of "
            "Q-learning and soft actor-critic (agents such as sql, omd, sac) can be adapted."
        )
    values = arguments.read(parser, description, words)
    if values["resume"] is not None:
        if values["config"] is not None:
            raise UserError(f"--config {values['config']} does not go with --resume, which goes on unchanged.")
        from purejax_bilevel.studies import folder as folders

        told = folders.read_description(values["resume"], config_class)
        default = {**told.run, **told.options, **_as_arguments(told.config)}
        values = arguments.read(parser, description, words, default)
    names = {field.name for field in dataclasses.fields(Options)}
    options = Options(**{name: value for name, value in values.items() if name in names})
    config = config_class(**{name: _unpacked(value) for name, value in values.items() if name not in names})
    config.resolved()
    return options, config


def _unpacked(value: Any) -> Any:
    """A single value of an option that takes several."""
    return value[0] if isinstance(value, tuple) and len(value) == 1 else value


def _as_arguments(config: configuration.Settings) -> dict[str, Any]:
    """Settings as the command line would give them."""
    values = {}
    for field in fields(config):
        value = getattr(config, field.name)
        several = field.metadata["traced"] and value is not None and not isinstance(value, tuple)
        values[field.name] = (value,) if several else value
    return values


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

"""The folder of a run or a sweep: its name, that one run alone has it, and what it says about how to go on.

Whoever writes to a folder holds a lock on a file in it, which the system takes back when the process ends in whatever
way. A new run needs a folder that is empty, so that no file of somebody else is ever overwritten or removed.
"""

import contextlib
import datetime
import errno
import fcntl
import itertools
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from purejax_bilevel import interrupts
from purejax_bilevel.configuration import RUN_LENGTH, fields, from_dict, to_dict, validate
from purejax_bilevel.errors import Interrupted, UserError
from purejax_bilevel.members import counted
from purejax_bilevel.program import Configuration
from purejax_bilevel.results import dataset as datasets
from purejax_bilevel.runtime import checkpoint as checkpoints
from purejax_bilevel.runtime import loop, processes
from purejax_bilevel.runtime.loggers import STATE_FILE
from purejax_bilevel.runtime.options import HowToRun

CONFIG = "config.yaml"
LOCK = ".lock"
BEFORE_TRAINING = (CONFIG, *datasets.ABOUT, STATE_FILE)  # what is written then
ROUNDS, SCORES = "rounds", "scores.json"  # of a search: their folder, and the file in the folder of each that is over
LONGEST_NAME = 200  # bytes; file systems allow 255, and temporary names are longer
KEPT_OPTIONS: dict[str, tuple] = {
    "video": (False, True),
    "tensorboard": (False, True),
    "wandb_mode": (None, "disabled", "offline", "online"),
    "wandb_runs": ("member", "setting"),
}  # what --resume does again without being told, and the values allowed
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class Description(NamedTuple):
    """What a run was told."""

    config: Configuration  # resolved, but for zeros (`as_told`)
    run: dict[str, int]  # seed and num_seeds
    options: dict[str, Any]  # some of KEPT_OPTIONS


# --- which folder -----------------------------------------------------------------------------------------------------


def choose(output_dir: Path, name: str, resume: Path | None, title: str) -> Path:
    """The folder that a command line asks for.

    Args:
        output_dir: folder of all runs.
        name: of this run; "": made from `title` and the time, and the folder made at once.
        resume: the folder of a run to go on with.
        title: what runs.

    Raises:
        UserError: the name cannot be that of a folder inside `output_dir`, or is given beside `resume`.
    """
    if resume is not None and name:
        raise UserError(f"--name {name!r} does not go with --resume {resume}, which goes on in that folder.")
    if resume is not None:
        return resume
    if not name:
        return _make_unused(output_dir, f"{title}-{datetime.datetime.now():%Y%m%d-%H%M%S}")
    parts = Path(name).parts
    if Path(name).is_absolute() or not name.strip() or not parts or ".." in parts or not name.isprintable():
        raise UserError(f"--name must be a folder inside --output_dir, without .. and line breaks, got {name!r}.")
    if max(len(os.fsencode(part)) for part in parts) > LONGEST_NAME:
        raise UserError(f"--name must have at most {LONGEST_NAME} bytes, got {len(os.fsencode(name))}.")
    return output_dir / name


def _make_unused(output_dir: Path, name: str) -> Path:
    """Runs that start in the same second get -2, -3, ..."""
    for suffix in itertools.chain([""], (f"-{number}" for number in itertools.count(2))):
        folder = output_dir / f"{name}{suffix}"
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue
        except OSError as error:
            raise UserError(f"cannot write {folder}: {error.strerror}.") from error
    raise AssertionError("unreachable: the numbers do not end")


# --- one run alone ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def opened(chosen: Callable[[], Path], resume: bool) -> Iterator[Path]:
    """Makes a folder and holds it for this run alone. All processes call it; process 0 chooses and locks.

    Args:
        chosen: says which folder.
        resume: whether there may be a run in it already.

    Raises:
        UserError: another run has it, it is not empty, it holds no run to go on with, or it cannot be written.
        Interrupted: instead of KeyboardInterrupt; says what is left in the folder.
    """
    interrupts.raise_from_now_on()  # there may be a folder to remove
    with contextlib.ExitStack() as stack:
        folder = Path(processes.from_first(lambda: str(stack.enter_context(_held(chosen(), resume)))))
        try:
            yield folder
        except KeyboardInterrupt as error:
            raise Interrupted(f"stopped at once; {_what_remains(folder)}") from error


@contextlib.contextmanager
def _held(folder: Path, resume: bool) -> Iterator[Path]:
    handle = _lock(folder)
    try:
        _check_content(folder, resume)
        datasets.delete_torn(folder)
        is_new = os.listdir(folder) == [LOCK]
        try:
            yield folder
        except UserError:  # refused before it began: the same name may be used again
            if is_new and {*os.listdir(folder)} <= {LOCK, *BEFORE_TRAINING}:
                for name in BEFORE_TRAINING:
                    (folder / name).unlink(missing_ok=True)
            raise
    finally:
        with contextlib.suppress(OSError):
            if os.listdir(folder) == [LOCK]:  # nothing came of it
                (folder / LOCK).unlink()
                folder.rmdir()
        os.close(handle)


def _lock(folder: Path) -> int:
    """An open file that carries the lock."""
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise UserError(f"cannot write {folder}: {error.strerror}.") from error
        try:
            _take(handle, folder)
            if _is_in_place(handle, folder / LOCK):
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # a run that came to nothing has just removed this file


def _take(handle: int, folder: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        who = os.pread(handle, 300, 0).decode(errors="replace").strip() or "unknown"
        raise UserError(f"another run ({who}) is writing to {folder}: choose another folder or wait for it.") from error
    except OSError as error:
        if error.errno not in NO_LOCKS:  # a file system without locks still serves one user at a time
            raise UserError(f"cannot lock {folder}: {error.strerror}.") from error
    with contextlib.suppress(OSError):  # for people only; a full disk shows at the next file
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)


def _is_in_place(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except OSError:
        return False


def _check_content(folder: Path, resume: bool) -> None:
    names = set(os.listdir(folder)) - {LOCK}
    holds_run = not names.isdisjoint((CONFIG, checkpoints.FILE_NAME))
    if names and resume and not holds_run:
        raise UserError(f"--resume {folder}: there is no run in that folder (no {CONFIG}).")
    if holds_run and not resume:
        raise UserError(
            f"{folder} holds a run already: choose another folder (--name), or go on with it by --resume {folder} "
            "(from Python: resume=True)."
        )
    if names and not resume:
        raise UserError(
            f"{folder} is not empty (it holds {min(names)}): a run needs a folder of its own; choose another --name."
        )


def _what_remains(folder: Path) -> str:
    if any(folder.rglob(checkpoints.FILE_NAME)):
        return f"the last checkpoint remains: go on with --resume {folder}"
    if any(folder.glob(f"{ROUNDS}/*/{SCORES}")):
        return f"the rounds that are over remain: go on with --resume {folder}"
    if (folder / CONFIG).exists():
        return f"there is no checkpoint yet: --resume {folder} starts from the first step"
    return "nothing was written."


# --- what it says -----------------------------------------------------------------------------------------------------


def describe(folder: Path, told: Mapping[str, Any], options: HowToRun, resumed: bool, video: bool) -> None:
    """Writes what is needed to repeat or resume a run or a sweep.

    Args:
        folder: of the run.
        told: what runs: `config` and `run` of a run (`as_told`), `sweep` of a sweep.
        options: how to run; KEPT_OPTIONS of them are written.
        resumed: whether it was begun before.
        video: the option of that name.

    Raises:
        UserError: the folder is not writable.
    """
    kept = {name: getattr(options, name) for name in KEPT_OPTIONS if name != "video"}
    datasets.write_config(folder, {**told, "options": {"video": video, **kept}}, resumed=resumed)


def as_told(config: Configuration, run: Mapping[str, int]) -> dict[str, Any]:
    """What `describe` writes of a run: its resolved settings, but 0 where 0 stands for what depends on others.

    Args:
        config: as the user wrote it.
        run: seed and num_seeds.
    """
    given = to_dict(config)
    zeros = {name: value for name, value in given.items() if value == 0 and not isinstance(value, bool)}
    return {"config": {**to_dict(config.resolved()), **zeros}, "run": dict(run)}


def read_description(folder: Path, config_class: type) -> Description:
    """What the run in a folder was told.

    Raises:
        UserError: there is no run, its file cannot be read, or it is one of another script.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise UserError(f"--resume {folder}: there is no run in that folder (no {CONFIG}).")
    saved = None
    try:
        saved = yaml.safe_load(path.read_text(encoding="utf-8"))
        config: Configuration = validate(from_dict(config_class, saved["config"]))
        run = {name: int(saved["run"][name]) for name in ("seed", "num_seeds")}
        return Description(config, run, kept_options(saved.get("options")))
    except OSError as error:
        raise UserError(f"--resume {folder}: its {CONFIG} cannot be read ({error.strerror}).") from error
    except (yaml.YAMLError, KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else " ".join(str(error).split()).rstrip(".")
        reason = _other_program(saved, config_class) or reason
        raise UserError(f"--resume {folder}: its {CONFIG} is not of this script ({reason}).") from error


def _other_program(saved: Any, config_class: type) -> str:
    """What a run was of, where its settings are not those of the program asked for; else ""."""
    config = saved.get("config") if isinstance(saved, dict) else None
    if not isinstance(config, dict) or config.keys() <= {field.name for field in fields(config_class)}:
        return ""
    named = [f"--{name} {config[name]}" for name in ("agent_type", "env_name") if config.get(name)]
    return f"it is of another program, {' '.join(named)}: --resume alone goes on with it" if named else ""


def kept_options(written: Any) -> dict[str, Any]:
    """The options that `describe` wrote.

    Raises:
        ValueError: others.
    """
    for name, value in (options := dict(written or {})).items():
        if name not in KEPT_OPTIONS or value not in KEPT_OPTIONS[name]:
            raise ValueError(f"options: {name} is {value!r}")
    return options


def check_unchanged(folder: Path, config: Configuration, run: Mapping[str, int]) -> None:
    """Whether a run may go on with these settings: those it began with, and no fewer steps than it has done.

    Args:
        folder: of the run.
        config: as the user wrote it.
        run: seed and num_seeds.

    Raises:
        UserError: a setting differs, or the run has done more steps.
    """
    saved = read_description(folder, type(config))
    now, done = {**to_dict(config.resolved()), **run}, loop.steps_done(folder)
    for name in RUN_LENGTH:
        if name in now and now[name] < done:
            raise UserError(f"--{name} {now[name]} is less than the {counted(done, 'step')} that {folder} has done.")
    for name, before in {**to_dict(saved.config.resolved()), **saved.run}.items():
        if now[name] == before or name in RUN_LENGTH:
            continue
        if getattr(saved.config, name, None) == getattr(config, name, None) == 0:
            raise UserError(
                f"--{name} 0 stood for {_words(before)} when {folder} was begun and would now stand for "
                f"{_words(now[name])}: go on with --{name} {_words(before)}, or start a new run."
            )
        raise UserError(
            f"--resume goes on with --{name} {_words(before)}, got {_words(now[name])}; "
            "start a new run for another value."
        )


def _words(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)

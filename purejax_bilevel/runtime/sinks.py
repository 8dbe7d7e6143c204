"""Where the rows of a run are copied to: wandb and TensorBoard, each imported only when it is asked for."""

import contextlib
import dataclasses
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from purejax_bilevel.errors import UserError

WANDB_FILES = ("run-*.wandb", "logs/debug*.log")  # that an offline run of ours consists of
EVENTS_SUFFIX = ".purejax_bilevel"  # of the names of our TensorBoard files


@dataclasses.dataclass(frozen=True)
class LoggedRun:
    """What a logger shows as one run: a member or a setting."""

    key: int
    name: str
    identifier: str
    config: dict[str, Any]


class Sink(Protocol):
    """A place that rows are copied to."""

    name: str

    def open(self, run: LoggedRun) -> Any:
        """Starts or continues a run."""

    def last_step(self, handle: Any) -> int:
        """Last step that the run holds already, -1 for none."""

    def write(self, handle: Any, steps: np.ndarray, columns: Mapping[str, np.ndarray]) -> None:
        """Appends rows: `[n]` steps and `[n]` per column."""

    def finals(self, handle: Any, step: int, values: Mapping[str, float]) -> None:
        """Adds values measured once."""

    def close(self, handle: Any, exit_code: int) -> None:
        """Ends the run's file or upload; `exit_code` as of a process, 0 for a run that came to its end."""


class WandbSink:
    """One wandb run per run, grouped by experiment.

    Each member being a run, everything that wandb collects about the process beside the rows is switched off: listing
    the installed packages alone took 0.08 s per run.
    """

    name = "wandb"

    def __init__(self, mode: str, project: str, group: str, folder: Path, identifier: str) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        self._wandb: Any = wandb
        self._mode, self._project, self._group = mode, project, group
        self._one_at_a_time = threading.Lock()  # inits side by side have mixed up run identifiers
        self._folder = folder
        for earlier in _offline_runs(folder, identifier) if mode == "offline" else ():
            _remove(earlier, WANDB_FILES)
        if mode == "online":
            self._check_key()
        self._settings = wandb.Settings(
            console="off",
            disable_code=True,
            disable_git=True,
            disable_job_creation=True,
            save_code=False,
            silent=True,
            x_disable_machine_info=True,
            x_disable_meta=True,
            x_disable_stats=True,
            x_save_requirements=False,
        )

    def _check_key(self) -> None:
        """Tells at the start, not after hours, that nothing can be uploaded."""
        try:
            known = self._wandb.login(prompt=False)
        except (self._wandb.Error, ValueError) as error:
            raise UserError(f"wandb_mode is 'online' but wandb refuses ({first_line(error)}); use offline") from error
        if not known:
            raise UserError(
                "wandb_mode is 'online' but there is no wandb key: set WANDB_API_KEY, run `wandb login`, or use offline"
            )

    def open(self, run: LoggedRun) -> Any:
        try:
            with self._one_at_a_time:
                return self._wandb.init(
                    mode=self._mode,
                    project=self._project,
                    group=self._group,
                    name=run.name,
                    id=run.identifier,
                    config=run.config,
                    dir=str(self._folder),
                    resume="allow" if self._mode == "online" else None,
                    reinit="create_new",
                    settings=self._settings,
                )
        except self._wandb.Error as error:
            raise UserError(f"wandb cannot start a run ({first_line(error)}); use offline") from error

    def last_step(self, handle: Any) -> int:
        return handle.step - 1  # a run continued online knows what the server has

    def write(self, handle: Any, steps: np.ndarray, columns: Mapping[str, np.ndarray]) -> None:
        lists = {name: column.tolist() for name, column in columns.items()}
        for row, step in enumerate(steps.tolist()):
            handle.log({name: values[row] for name, values in lists.items()}, step=step)

    def finals(self, handle: Any, step: int, values: Mapping[str, float]) -> None:
        handle.summary.update(dict(values))

    def close(self, handle: Any, exit_code: int) -> None:
        handle.finish(exit_code=exit_code)


class TensorBoardSink:
    """One folder of TensorBoard events per run, written anew by every process."""

    name = "tensorboard"

    def __init__(self, folder: Path) -> None:
        try:
            from tensorboardX.proto.summary_pb2 import Summary
            from tensorboardX.writer import FileWriter
        except ImportError as error:
            raise UserError(
                "tensorboard needs the package tensorboardX: install the extra with `pip install -e .[tensorboard]`"
            ) from error
        self._folder, self._writer, self._summary = folder, FileWriter, Summary
        for earlier in folder.glob("[0-9]*_*"):
            _remove(earlier, (f"events.out.tfevents.*{EVENTS_SUFFIX}",))

    def open(self, run: LoggedRun) -> Any:
        name = f"{run.key:04d}_{run.name}".replace(", ", ",").replace("/", "-")
        return self._writer(str(self._folder / name[:200]), filename_suffix=EVENTS_SUFFIX)

    def last_step(self, handle: Any) -> int:
        return -1

    def write(self, handle: Any, steps: np.ndarray, columns: Mapping[str, np.ndarray]) -> None:
        lists = {name: column.tolist() for name, column in columns.items()}
        for row, step in enumerate(steps.tolist()):
            values = [self._summary.Value(tag=name, simple_value=values[row]) for name, values in lists.items()]
            handle.add_summary(self._summary(value=values), global_step=step)

    def finals(self, handle: Any, step: int, values: Mapping[str, float]) -> None:
        entries = [self._summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        handle.add_summary(self._summary(value=entries), global_step=step)

    def close(self, handle: Any, exit_code: int) -> None:
        handle.close()


def first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _offline_runs(folder: Path, identifier: str) -> list[Path]:
    """wandb's folders of an earlier process of this experiment."""
    return list(folder.glob(f"wandb/offline-run-*-{identifier}-*"))


def _remove(folder: Path, names: Sequence[str]) -> None:
    """Removes files that a logger wrote, and the folders that are empty then.

    Args:
        folder: of one run.
        names: patterns of the files below it.
    """
    for name in names:
        for path in folder.glob(name):
            path.unlink()
    below = [path for path in folder.rglob("*") if path.is_dir() and not path.is_symlink()]
    for path in [*sorted(below, reverse=True), folder]:
        with contextlib.suppress(OSError):  # it holds what others put there
            path.rmdir()


def is_synced(folder: Path, identifier: str) -> bool:
    """Whether some of these runs are on a server already, where files written anew would double their rows."""
    return any(list(run.glob("*.wandb.synced")) for run in _offline_runs(folder, identifier))

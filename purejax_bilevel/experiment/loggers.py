"""Optional loggers, wandb and TensorBoard: the series of every member, not only averages.

The results file is the record; loggers are copies for watching. Neither package is imported unless asked for. With few
runs every chunk is written as it comes. With many, opening a run costs more than its rows: they are kept and written
run by run at the end, a few runs at a time.

A logger that fails does not stop an experiment: if the very first run cannot be opened, the user is told at once;
later failures switch the logger off with one line.

Rows carry their step, and `logged.jsonl` in the run's folder remembers the last step of each run. A resumed experiment
may hand in all rows again: those already logged are dropped. The mark is set before the rows are written, so a kill in
between can lose a row in the copy but never doubles one.
"""

import contextlib
import dataclasses
import functools
import json
import os
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np

from purejax_bilevel.errors import UserError
from purejax_bilevel.experiment.members import Grid
from purejax_bilevel.experiment.results import SEED, STEP, as_plain
from purejax_bilevel.experiment.statistics import iqm

WANDB_MODES = ("disabled", "offline", "online")
WANDB_RUNS = ("member", "setting")
STATE_FILE = "logged.jsonl"
LIVE_RUNS = 32  # with more runs than this, rows are written at the end
OPEN_RUNS = 4  # runs open at once when written at the end


class Loggers:
    """Context manager that copies rows to wandb and TensorBoard.

    Leaving it because of an error writes nothing more: the resumed experiment hands the rows in again.

    Args:
        grid: all members of the experiment.
        folder: the experiment's folder; logs go below it.
        name: the experiment's name, wandb's group.
        config: the experiment's configuration; each run's own hyper-parameters replace the swept ones.
        wandb_mode: `disabled`, `offline` or `online`.
        wandb_project: wandb's project.
        runs: one run per `member`, or one per `setting` with a series per seed and their interquartile mean.
        label: what these members have in common and others of the experiment do not, the start of every run's name.
        tensorboard: also write TensorBoard files (needs the extra `tensorboard`).
        resume: continue the logs found in the folder; otherwise they are forgotten.
        note: tells the user one line; to standard error by default.

    Raises:
        UserError: an unknown mode, no wandb key, wandb unreachable, or tensorboardX is missing.
    """

    def __init__(
        self,
        grid: Grid,
        folder: str | Path,
        name: str,
        config: Any = None,
        *,
        wandb_mode: str = "disabled",
        wandb_project: str = "purejax_bilevel",
        runs: str = "member",
        label: str = "",
        tensorboard: bool = False,
        resume: bool = False,
        note: Callable[[str], None] | None = None,
    ) -> None:
        _check("wandb_mode", wandb_mode, WANDB_MODES)
        _check("wandb_runs", runs, WANDB_RUNS)
        self._grid, self._folder, self._name, self._label = grid, Path(folder), name, label
        self._note = note or functools.partial(print, file=sys.stderr)
        self._config = as_plain(config) if config is not None else {}
        self._per_setting = runs == "setting"
        self._resume = resume
        self._rows: list[tuple[np.ndarray, dict[str, np.ndarray]]] = []
        self._finals: list[tuple[np.ndarray, dict[str, np.ndarray]]] = []
        self._sinks: list[Sink] = []
        self._make: list[Callable[[], Sink]] = []
        if wandb_mode != "disabled":
            self._make.append(lambda: WandbSink(wandb_mode, wandb_project, name, self._folder))
        if tensorboard:
            self._make.append(lambda: TensorBoardSink(self._folder / "tensorboard"))
        self._memory: Memory | None = None
        self._open: dict[tuple[str, int], Any] = {}
        self._worked = False

    @property
    def active(self) -> bool:
        """Whether anything is logged at all."""
        return bool(self._make)

    @property
    def _live(self) -> bool:
        settings = len(self._grid) // len(self._grid.seeds)
        return (settings if self._per_setting else len(self._grid)) <= LIVE_RUNS

    def __enter__(self) -> "Loggers":
        if self.active:
            self._sinks = [make() for make in self._make]
            self._memory = Memory(self._folder / STATE_FILE, self._resume)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and self._sinks:
            self._worked = (
                True  # the training is done: whatever happens now, its results are worth more than their copies
            )
            self._write_all(last=True)
        for sink in self._sinks:
            with self._guarded(sink):
                for handle in [handle for (name, _), handle in self._open.items() if name == sink.name]:
                    sink.close(handle)
        self._open.clear()
        self._rows.clear()
        self._sinks.clear()

    def log_rows(self, members: Sequence[int] | np.ndarray, rows: Mapping[str, np.ndarray]) -> None:
        """Takes the rows of one chunk; may be called again with rows that were logged before.

        Args:
            members: `[m]`, which members the arrays' first axis holds.
            rows: `step` `[n]`, steps done at each row, and per name `[m, n]` or `[m, n, k]`.
        """
        if not self._sinks:
            return
        series = {name: np.asarray(array) for name, array in rows.items()}
        for name, array in series.items():
            if name != STEP and array.shape[:2] != (len(members), len(series[STEP])):
                raise ValueError(f"{name} has shape {array.shape}; expected {(len(members), len(series[STEP]))} first")
        self._rows.append((np.asarray(members), series))
        if self._live:
            self._write_all(last=False)
            self._rows.clear()

    def log_finals(self, members: Sequence[int] | np.ndarray, finals: Mapping[str, np.ndarray]) -> None:
        """Takes what was measured once at the end; written when the context ends.

        Args:
            members: `[m]`.
            finals: per name `[m]` or `[m, episodes]`, of which the mean is logged.
        """
        if self._sinks:
            self._finals.append((np.asarray(members), {name: np.asarray(array) for name, array in finals.items()}))

    # ------------------------------------------------------------ writing

    def _write_all(self, last: bool) -> None:
        keys = sorted({self._key(int(member)) for members, _ in [*self._rows, *self._finals] for member in members})
        if self._live:
            for key in keys:
                self._write(key, last)
        else:
            with ThreadPoolExecutor(OPEN_RUNS) as pool:
                list(pool.map(lambda key: self._write(key, last), keys))

    def _write(self, key: int, last: bool) -> None:
        """Writes one run's rows that its sinks have not seen; the last time also its final values."""
        steps, columns = self._columns(key)
        finals = self._final_columns(key) if last else {}
        for sink in tuple(self._sinks):
            with self._guarded(sink):
                self._write_to(sink, key, steps, columns, finals)

    def _write_to(
        self, sink: "Sink", key: int, steps: np.ndarray, columns: dict[str, np.ndarray], finals: dict[str, float]
    ) -> None:
        assert self._memory is not None
        seen = self._memory.step(sink.name, key)
        fresh = steps > seen
        end = int(steps[-1]) if fresh.any() else seen
        if end <= self._memory.step(f"{sink.name} final", key):
            finals = {}
        if not (fresh.any() or finals):
            return
        handle = self._open.get((sink.name, key)) or sink.open(self._run(key))
        self._worked = True
        if self._live:
            self._open[sink.name, key] = handle
        try:
            if fresh.any():
                self._memory.mark(sink.name, key, end)
                sink.write(handle, steps[fresh], {name: column[fresh] for name, column in columns.items()})
            if finals:
                self._memory.mark(f"{sink.name} final", key, end)
                sink.finals(handle, end, finals)
        finally:
            if not self._live:
                sink.close(handle)

    @contextlib.contextmanager
    def _guarded(self, sink: "Sink") -> Iterator[None]:
        """Lets an experiment go on without a logger that fails, unless it has not worked even once."""
        try:
            yield
        except Exception as error:
            if not self._worked:
                raise
            if sink in self._sinks:
                self._sinks.remove(sink)
                self._note(
                    f"{sink.name} failed and is switched off ({_first_line(error)}); the results file is complete"
                )

    def _key(self, member: int) -> int:
        return member // len(self._grid.seeds) if self._per_setting else member

    def _run(self, key: int) -> "Run":
        assert self._memory is not None
        member = key * len(self._grid.seeds) if self._per_setting else key
        settings = self._grid.settings(member)
        if self._per_setting:
            del settings[SEED]
        words = self._grid.describe(member)
        label = words.rpartition(f"{SEED}=")[0].rstrip(", ") if self._per_setting else words
        name = ", ".join(part for part in (self._label, label) if part) or self._name
        return Run(key, name, f"{self._memory.identifier}-{key}", {**self._config, **as_plain(settings)})

    def _columns(self, key: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """All rows kept for one run: `[n]` increasing steps, and `[n]` per column."""
        blocks = [(rows[STEP], self._block(key, members, rows)) for members, rows in self._rows]
        blocks = [(steps, block) for steps, block in blocks if block]
        if not blocks:
            return np.zeros(0, int), {}
        steps, first = np.unique(np.concatenate([steps for steps, _ in blocks]), return_index=True)
        names = dict.fromkeys(name for _, block in blocks for name in block)
        missing = [np.full(len(step), np.nan) for step, _ in blocks]
        columns = {
            name: np.concatenate([block.get(name, gap) for (_, block), gap in zip(blocks, missing, strict=True)])[first]
            for name in names
        }
        return steps, columns

    def _block(self, key: int, members: np.ndarray, rows: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """One call's columns for one run; empty if the run is not in it."""
        seeds = len(self._grid.seeds)
        positions = np.flatnonzero(members // seeds == key if self._per_setting else members == key)
        columns: dict[str, np.ndarray] = {}
        for name, array in rows.items() if len(positions) else ():
            if name == STEP:
                continue
            parts = {name: array} if array.ndim == 2 else {f"{name}/{i}": array[..., i] for i in range(array.shape[2])}
            for part, values in parts.items():
                if not self._per_setting:
                    columns[part] = values[positions[0]]
                    continue
                for position in positions:
                    columns[f"{part}/seed={self._grid.seeds[members[position] % seeds]}"] = values[position]
                columns[f"{part}/iqm"] = iqm(values[positions].T[..., None])
        return columns

    def _final_columns(self, key: int) -> dict[str, float]:
        found: dict[str, float] = {}
        for members, finals in self._finals:
            means = {name: np.mean(array.reshape(len(members), 1, -1), axis=-1) for name, array in finals.items()}
            block = self._block(key, members, means)
            found.update({name: float(column[0]) for name, column in block.items()})
        return found


def _check(field: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise UserError(f"{field} is {value!r}; allowed: {', '.join(allowed)}")


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


@dataclasses.dataclass(frozen=True)
class Run:
    """What a logger shows as one run: a member or a setting."""

    key: int
    name: str
    identifier: str
    config: dict[str, Any]


class Memory:
    """The last logged step of each run, one line per mark, so that a kill costs at most the last line.

    Args:
        path: the file.
        resume: read what is there; otherwise start anew with a new identifier.
    """

    def __init__(self, path: Path, resume: bool) -> None:
        self._path = path
        self._steps: dict[tuple[str, int], int] = {}
        self.identifier = ""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            for entry in _lines(path) if resume else ():
                if "identifier" in entry:
                    self.identifier = entry["identifier"]
                else:
                    self._steps[entry["sink"], entry["run"]] = entry["step"]
            if not self.identifier:
                self.identifier = secrets.token_hex(4)
                path.write_text(json.dumps({"identifier": self.identifier}) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from error

    def step(self, sink: str, run: int) -> int:
        """Last step logged, -1 before the first."""
        return self._steps.get((sink, run), -1)

    def mark(self, sink: str, run: int, step: int) -> None:
        """Remembers, also after a kill, that everything up to `step` has been logged."""
        self._steps[sink, run] = step
        with self._path.open("a") as file:  # one short write: lines of several threads do not mix
            file.write(json.dumps({"sink": sink, "run": run, "step": step}) + "\n")


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """Entries of a file of JSON lines; a torn last line is skipped."""
    if path.is_file():
        for line in path.read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                yield json.loads(line)


# ---------------------------------------------------------------- sinks


class Sink(Protocol):
    """A place that rows are copied to."""

    name: str

    def open(self, run: Run) -> Any:
        """Starts or continues a run."""

    def write(self, handle: Any, steps: np.ndarray, columns: Mapping[str, np.ndarray]) -> None:
        """Appends rows: `[n]` steps and `[n]` per column."""

    def finals(self, handle: Any, step: int, values: Mapping[str, float]) -> None:
        """Adds values measured once."""

    def close(self, handle: Any) -> None:
        """Ends the run's file or upload."""


class WandbSink:
    """One wandb run per run, grouped by experiment.

    Each member being a run, everything that wandb collects about the process beside the rows is switched off: listing
    the installed packages alone took 0.08 s per run.
    """

    name = "wandb"

    def __init__(self, mode: str, project: str, group: str, folder: Path) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        self._wandb: Any = wandb
        self._mode, self._project, self._group = mode, project, group
        self._one_at_a_time = threading.Lock()  # two inits at once mix up their run identifiers
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
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
            raise UserError(f"wandb_mode is 'online' but wandb refuses ({_first_line(error)}); use offline") from error
        if not known:
            raise UserError(
                "wandb_mode is 'online' but there is no wandb key: set WANDB_API_KEY, run `wandb login`, or use offline"
            )

    def open(self, run: Run) -> Any:
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
            raise UserError(f"wandb cannot start a run ({_first_line(error)}); use offline") from error

    def write(self, handle: Any, steps: np.ndarray, columns: Mapping[str, np.ndarray]) -> None:
        lists = {name: column.tolist() for name, column in columns.items()}
        for row, step in enumerate(steps.tolist()):
            handle.log({name: values[row] for name, values in lists.items()}, step=step)

    def finals(self, handle: Any, step: int, values: Mapping[str, float]) -> None:
        handle.summary.update(dict(values))

    def close(self, handle: Any) -> None:
        handle.finish()


class TensorBoardSink:
    """One folder of TensorBoard events per run; a resumed run adds a file to it."""

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

    def open(self, run: Run) -> Any:
        name = f"{run.key:04d}_{run.name}".replace(", ", ",").replace("/", "-")
        # The file name has the time in seconds only: without a suffix a quick restart would replace the earlier file.
        return self._writer(str(self._folder / name[:200]), filename_suffix=f".{time.time_ns()}")

    def write(self, handle: Any, steps: np.ndarray, columns: Mapping[str, np.ndarray]) -> None:
        lists = {name: column.tolist() for name, column in columns.items()}
        for row, step in enumerate(steps.tolist()):
            values = [self._summary.Value(tag=name, simple_value=values[row]) for name, values in lists.items()]
            handle.add_summary(self._summary(value=values), global_step=step)

    def finals(self, handle: Any, step: int, values: Mapping[str, float]) -> None:
        entries = [self._summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        handle.add_summary(self._summary(value=entries), global_step=step)

    def close(self, handle: Any) -> None:
        handle.close()

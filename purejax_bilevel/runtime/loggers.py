"""Optional loggers, wandb and TensorBoard: the series of every member, not only averages.

The results file is the record; loggers are copies for watching. Neither package is imported unless asked for. With few
runs every chunk is written as it comes. With many, opening a run costs more than its rows: they are kept and written
run by run at the end, a few runs at a time. To watch many members while they train, there is then one more run per
setting, with the interquartile mean over its seeds, written as it comes (if the settings are not too many as well).

A logger that fails does not stop an experiment: if the very first run cannot be opened, the user is told at once;
later failures switch the logger off with one line.

Rows carry their step. A resumed experiment hands in all its rows again, from the first: a kill loses what wandb and
TensorBoard hold in memory (up to 15 s and 2 min), so that files are written anew and only a server is asked what it
has. No row is doubled and none is missing.
"""

import contextlib
import functools
import json
import os
import secrets
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from purejax_bilevel.errors import Interrupted, UserError
from purejax_bilevel.members import Grid, counted
from purejax_bilevel.results.dataset import SEED, STEP, as_plain, write_text
from purejax_bilevel.results.statistics import iqm
from purejax_bilevel.runtime.sinks import LoggedRun, Sink, TensorBoardSink, WandbSink, first_line, is_synced

WANDB_MODES = ("disabled", "offline", "online")
WANDB_RUNS = ("member", "setting")
# wandb's own older words for its modes; it reads them from WANDB_MODE.
WANDB_MODE_WORDS = {"dryrun": "offline", "run": "online", **{mode: mode for mode in WANDB_MODES}}
DEFAULT_PROJECT = "purejax_bilevel"
STATE_FILE = "logged.json"
LOGGED = (STATE_FILE, "tensorboard", "wandb")  # what is written to a folder
LIVE_RUNS = 32  # with more runs than this, rows are written at the end
OPEN_RUNS = 4  # runs open at once when written at the end

Rows = tuple[np.ndarray, dict[str, np.ndarray]]  # members, and an array per name


def wandb_target(
    mode: str | None = None, project: str | None = None, environment: Mapping[str, str] = os.environ
) -> tuple[str, str]:
    """Where wandb's runs go. What is asked for comes first, then the environment, then the default.

    Args:
        mode: `disabled`, `offline` or `online`; None: what WANDB_MODE says, else `disabled`.
        project: wandb's project; None: what WANDB_PROJECT says, else `purejax_bilevel`.
        environment: variables; one that is empty counts as not set.

    Returns:
        Mode and project.

    Raises:
        UserError: a mode that does not exist.
    """
    if mode is None:
        word = environment.get("WANDB_MODE") or "disabled"
        _check("WANDB_MODE", word, tuple(WANDB_MODE_WORDS))
        mode = WANDB_MODE_WORDS[word]
    _check("wandb_mode", mode, WANDB_MODES)
    return mode, project or environment.get("WANDB_PROJECT") or DEFAULT_PROJECT


class Loggers:
    """Context manager that copies rows to wandb and TensorBoard.

    Leaving it because of an error writes nothing more and marks wandb's runs as failed. A resumed experiment starts
    with `log_rows` of all earlier rows.

    Args:
        grid: all members of the experiment.
        folder: the experiment's folder; logs go below it.
        name: the experiment's name, wandb's group.
        config: the experiment's configuration; each run's own hyper-parameters replace the swept ones.
        wandb_mode: `disabled`, `offline` or `online`; None: see `wandb_target`.
        wandb_project: wandb's project; None: see `wandb_target`.
        runs: one run per `member`, or one per `setting` with a series per seed and their interquartile mean.
        label: what these members have in common and others of the experiment do not, the start of every run's name.
        tensorboard: also write TensorBoard files (needs the extra `tensorboard`).
        resume: the experiment continues the one logged in this folder.
        note: tells the user one line; to standard error by default.

    Raises:
        UserError: an unknown mode, no wandb key, wandb unreachable, several runs under `wandb agent`, or tensorboardX
            is missing.
    """

    def __init__(
        self,
        grid: Grid,
        folder: str | Path,
        name: str,
        config: Mapping[str, Any] | None = None,
        *,
        wandb_mode: str | None = None,
        wandb_project: str | None = None,
        runs: str = "member",
        label: str = "",
        tensorboard: bool = False,
        resume: bool = False,
        note: Callable[[str], None] | None = None,
    ) -> None:
        mode, project = wandb_target(wandb_mode, wandb_project)
        _check("wandb_runs", runs, WANDB_RUNS)
        self._grid, self._folder, self._name, self._label = grid, Path(folder), name, label
        self._note = note or functools.partial(print, file=sys.stderr)
        self._config = as_plain(config) if config is not None else {}
        self._per_setting = runs == "setting"
        self._resume = resume
        self._rows: list[Rows] = []
        self._finals: list[Rows] = []
        self._sinks: list[Sink] = []
        self._make: list[Callable[[str], Sink]] = []
        if mode != "disabled":
            _check_agent(self._num_runs)
            self._make.append(lambda identifier: WandbSink(mode, project, name, self._folder, identifier))
        if tensorboard:
            self._make.append(lambda _: TensorBoardSink(self._folder / "tensorboard"))
        self._identifier = ""
        self._first_step: int | None = None
        self._open: dict[tuple[str, int], Any] = {}
        self._seen: dict[tuple[str, int], int] = {}  # last step per logger and run
        self._worked = False

    @property
    def active(self) -> bool:
        """Whether anything is logged at all."""
        return bool(self._make)

    @property
    def _num_runs(self) -> int:
        return self._num_settings if self._per_setting else len(self._grid)

    @property
    def _num_settings(self) -> int:
        return len(self._grid) // len(self._grid.seeds)

    @property
    def _live(self) -> bool:
        return self._num_runs <= LIVE_RUNS

    @property
    def _overviews(self) -> range:
        """Keys of the runs of settings that are live where those of members are not: they follow the members'."""
        count = 0 if self._live or self._per_setting or self._num_settings > LIVE_RUNS else self._num_settings
        return range(len(self._grid), len(self._grid) + count)

    def __enter__(self) -> "Loggers":
        if self.active:
            state = _read_state(self._folder / STATE_FILE) if self._resume else {}
            self._identifier, self._first_step = state.get("identifier", ""), state.get("first_step")
            if not self._identifier or is_synced(self._folder, self._identifier):
                self._identifier = secrets.token_hex(4)
            self._save_state()
            self._sinks = [make(self._identifier) for make in self._make]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and self._sinks:
            # The training is done: whatever happens now, its results are worth more than their copies.
            self._worked = True
            self._write_all(last=True)
        for sink in self._sinks:
            with self._guarded(sink):
                for handle in [handle for (name, _), handle in self._open.items() if name == sink.name]:
                    sink.close(handle, _exit_code(kind))
        self._open.clear()
        self._rows.clear()
        self._sinks.clear()

    def log_rows(self, members: Sequence[int] | np.ndarray, rows: Mapping[str, np.ndarray]) -> None:
        """Takes the rows of one chunk; rows that were logged before are dropped.

        Args:
            members: `[m]`, which members the arrays' first axis holds.
            rows: `step` `[n]`, steps done at each row, and per name `[m, n, ...]`.

        Raises:
            ValueError: wrong shapes, or a resumed experiment does not begin with its first row.
            UserError: the first run cannot be opened.
        """
        if not self._sinks or not len(rows[STEP]):
            return
        series = {name: np.asarray(array) for name, array in rows.items()}
        for name, array in series.items():
            if name != STEP and array.shape[:2] != (len(members), len(series[STEP])):
                raise ValueError(f"{name} has shape {array.shape}; expected {(len(members), len(series[STEP]))} first")
        self._check_beginning(series[STEP])
        self._rows.append((np.asarray(members), series))
        for key in self._overviews:
            self._write(key, self._rows[-1:], last=False)
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

    def _check_beginning(self, steps: np.ndarray) -> None:
        """Files are written anew by a resumed experiment, so it must not begin in the middle."""
        if self._first_step is None:
            self._first_step = int(steps[0])
            self._save_state()
        if not self._rows and not self._seen and steps[0] > self._first_step:
            raise ValueError(f"a resumed experiment has to log again from step {self._first_step}, not from {steps[0]}")

    def _save_state(self) -> None:
        state = {"identifier": self._identifier, "first_step": self._first_step}
        write_text(self._folder / STATE_FILE, json.dumps(state) + "\n")

    # ------------------------------------------------------------ writing

    def _write_all(self, last: bool) -> None:
        keys = sorted({self._key(int(member)) for members, _ in [*self._rows, *self._finals] for member in members})
        if self._live:
            for key in keys:
                self._write(key, self._rows, last)
            return
        for key in self._overviews if last else ():
            self._write(key, [], last)
        with ThreadPoolExecutor(OPEN_RUNS) as pool:
            list(pool.map(lambda key: self._write(key, self._rows, last), keys))

    def _write(self, key: int, rows: Sequence[Rows], last: bool) -> None:
        """Writes one run's part of rows that its sinks have not seen; the last time also its final values."""
        steps, columns = self._columns(key, rows)
        finals = self._final_columns(key) if last else {}
        for sink in tuple(self._sinks):
            with self._guarded(sink):
                self._write_to(sink, key, steps, columns, finals)

    def _write_to(
        self, sink: Sink, key: int, steps: np.ndarray, columns: dict[str, np.ndarray], finals: dict[str, float]
    ) -> None:
        place = (sink.name, key)
        if place in self._seen and not ((steps > self._seen[place]).any() or finals):
            return
        handle = self._open.get(place) or sink.open(self._run(key))
        self._worked = True
        stays_open = self._live or key in self._overviews
        if stays_open:
            self._open[place] = handle
        fresh = steps > self._seen.setdefault(place, sink.last_step(handle))
        try:
            if fresh.any():
                sink.write(handle, steps[fresh], {name: column[fresh] for name, column in columns.items()})
                self._seen[place] = int(steps[-1])
            if finals:
                sink.finals(handle, self._seen[place], finals)
        finally:
            if not stays_open:
                sink.close(handle, 0)

    @contextlib.contextmanager
    def _guarded(self, sink: Sink) -> Iterator[None]:
        """Lets an experiment go on without a logger that fails, unless it has not worked even once."""
        try:
            yield
        except Exception as error:
            if not self._worked:
                raise
            if sink in self._sinks:
                self._sinks.remove(sink)
                self._note(
                    f"{sink.name} failed and is switched off ({first_line(error)}); the results file is complete"
                )

    def _key(self, member: int) -> int:
        return member // len(self._grid.seeds) if self._per_setting else member

    def _setting(self, key: int) -> int | None:
        """The setting that a run shows, None where it shows one member."""
        if key >= len(self._grid):
            return key - len(self._grid)
        return key if self._per_setting else None

    def _run(self, key: int) -> LoggedRun:
        setting = self._setting(key)
        member = key if setting is None else setting * len(self._grid.seeds)
        settings, words = self._grid.settings(member), self._grid.describe(member)
        if setting is not None:
            del settings[SEED]
            words = words.rpartition(f"{SEED}=")[0].rstrip(", ")
        if key in self._overviews:
            words = f"{words}, IQM of {counted(len(self._grid.seeds), 'seed')}".removeprefix(", ")
        name = ", ".join(part for part in (self._label, words) if part) or self._name
        return LoggedRun(key, name, f"{self._identifier}-{key}", {**self._config, **as_plain(settings)})

    def _columns(self, key: int, kept: Sequence[Rows]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """One run's part of the rows: `[n]` increasing steps, and `[n]` per column."""
        blocks = [(rows[STEP], self._block(key, members, rows)) for members, rows in kept]
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
        seeds, setting = len(self._grid.seeds), self._setting(key)
        positions = np.flatnonzero(members == key if setting is None else members // seeds == setting)
        columns: dict[str, np.ndarray] = {}
        for name, array in rows.items() if len(positions) else ():
            if name == STEP:
                continue
            flat = array.reshape(*array.shape[:2], -1)
            parts = {name: array} if array.ndim == 2 else {f"{name}/{i}": flat[..., i] for i in range(flat.shape[2])}
            for part, values in parts.items():
                if setting is None:
                    columns[part] = values[positions[0]]
                    continue
                for position in positions if self._per_setting else ():
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


def _check_agent(num_runs: int) -> None:
    """A process that `wandb agent` started is one run for wandb: rows of others would end in the same one."""
    if os.environ.get("WANDB_SWEEP_ID") and num_runs > 1:
        raise UserError(
            f"under `wandb agent` a process is one wandb run, but this experiment has {num_runs}: give every option "
            "one value and --num_seeds 1 (or, with several seeds, --wandb_runs setting), or let sweep.py run the study."
        )


def _exit_code(kind: type[BaseException] | None) -> int:
    """wandb's code for how a run ended: 0 finished, 255 stopped by the user, 1 failed."""
    if kind is None:
        return 0
    return 255 if issubclass(kind, KeyboardInterrupt | Interrupted) else 1


def _read_state(path: Path) -> dict[str, Any]:
    """What an earlier process wrote about its logs; empty if there is nothing."""
    with contextlib.suppress(OSError, json.JSONDecodeError):
        return json.loads(path.read_text())
    return {}

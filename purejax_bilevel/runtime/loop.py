"""The loop on the host: from a configuration to labelled results, with progress, checkpoints and resume.

    results = run(Config(agent_type="omd", lr=(1e-3, 3e-4)), num_seeds=8)

It calls the compiled program in chunks; between two calls the host shows progress, logs, saves a checkpoint and looks
for members that diverged. Chunk boundaries change nothing in the numbers, bit for bit.

Several processes (`processes.py`) run this loop together: process 0's clock sets the chunks and the checkpoints, a
Ctrl-C in any of them stops all, each saves its own members, and process 0 alone logs and prints.
"""

import contextlib
import dataclasses
import functools
import hashlib
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import jax
import numpy as np
import xarray
from rich.console import Console

from purejax_bilevel import garbage, interrupts
from purejax_bilevel.configuration import RUN_LENGTH, to_dict
from purejax_bilevel.errors import Interrupted, UserError
from purejax_bilevel.members import counted
from purejax_bilevel.program import POPULATION, Configuration, Measure, Part
from purejax_bilevel.results import dataset as datasets
from purejax_bilevel.results import statistics
from purejax_bilevel.runtime import checkpoint as checkpoints
from purejax_bilevel.runtime import devices, processes
from purejax_bilevel.runtime.compiled import CompiledProgram, mesh_of, precision
from purejax_bilevel.runtime.devices import AXIS
from purejax_bilevel.runtime.loggers import Loggers
from purejax_bilevel.runtime.options import RunOptions
from purejax_bilevel.runtime.progress import Progress
from purejax_bilevel.runtime.schedule import StageSchedule
from purejax_bilevel.runtime.steps import ROWS

CHUNK_SECONDS = 3.0  # between two looks of the host, unless --chunks says how many
CHECKPOINT_SECONDS = 60.0
BLOCK_STEPS = 32  # most steps in a block of an accelerator
PLACEMENT = "placement"  # what a checkpoint calls the batches of members and their devices
PLATFORM = "platform"
STOPPED_COMPILING = "stopped while compiling; no step is lost: go on with --resume and the run's folder."


@dataclasses.dataclass
class Outcome:
    """What came out of a run, per part: host arrays of all members, in every process.

    `state` is the exception: of several processes only process 0 has it, and only if there is a folder; else it is [].
    """

    steps: int
    rows: list[dict[str, np.ndarray]]
    failed: list[np.ndarray]
    state: list[Any]
    compile_seconds: float
    run_seconds: float
    num_traces: int
    bytes_per_member: list[int]
    stage_of: dict[str, str] = dataclasses.field(default_factory=dict)  # of what is not measured in the last stage


@dataclasses.dataclass(frozen=True)
class Stretch:
    """Some steps of a run of one stage: `start` .. `stop` - 1 (None: to the end), from the host state after `start`."""

    start: int = 0
    stop: int | None = None
    state: list[Any] | None = None


class Watcher(Protocol):
    """Is told about a program before it runs, and may refuse it with a UserError."""

    def planned(self, program: CompiledProgram) -> None:
        """Nothing is compiled or allocated yet."""

    def traced(self, program: CompiledProgram, largest: int) -> None:
        """A stage is about to be compiled; the largest array inside its steps has so many bytes, on each device."""

    def compiled(self, program: CompiledProgram, state: Any, steps: int, total: int) -> Any:
        """The program is compiled; `steps` of `total` are done. Returns the state, used up where none are done."""


def train(
    parts: Sequence[Part], options: RunOptions, console: Console | None = None, watcher: Watcher | None = None
) -> Outcome:
    """Runs all members of all parts to the end in one compiled program.

    Raises:
        UserError: the options cannot be met.
        Interrupted: on Ctrl-C, after the checkpoint was written.
    """
    console = console or processes.console()
    return Run(parts, options, console, watcher=watcher).to_the_end()


class Run:
    """One run in progress: the compiled program, what it has produced and where that is kept.

    Args:
        parts: sub-programs and members.
        options: how to run.
        console: where messages go.
        program: compiled for other members of the same sub-programs, to be used again.
        stretch: some of the steps only.
        watcher: told before it runs.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        options: RunOptions,
        console: Console,
        *,
        program: CompiledProgram | None = None,
        stretch: Stretch | None = None,
        watcher: Watcher | None = None,
    ):
        devices.prepare()
        self.parts, self.options, self.console = tuple(parts), options, console
        if not processes.is_first():
            self.options = dataclasses.replace(options, quiet=True, wandb_mode="disabled", tensorboard=False)
        self.num_members = sum(len(part.grid) for part in parts)
        mesh = mesh_of(parts, options.devices)
        member_batch = self._member_batch(mesh)
        self._fingerprint = fingerprint(parts) | {PLACEMENT: _placement(parts, mesh, member_batch)}
        if program is None:
            block_steps = None if mesh.devices.flat[0].platform == "cpu" else BLOCK_STEPS
            program = CompiledProgram(parts, mesh, member_batch, block_steps)
        else:
            program.swap(parts)
        self.program, self.watcher = program, watcher
        self.schedule, self.total = program.schedule, program.schedule.total
        self.stretch = stretch or Stretch()
        self.stop = self.total if self.stretch.stop is None else self.stretch.stop
        self.rows: list[dict[str, np.ndarray]] = [{} for _ in parts]  # by `<number of the stage>/<name>`
        self.failed = [np.zeros(len(part.grid), bool) for part in parts]
        self.steps, self.earlier_seconds = 0, (0.0, 0.0)
        self.run_seconds = 0.0
        self._state: Any = None
        self._saved_at = -float("inf")
        self._unsaved = ""  # why the latest checkpoint was not written

    def _member_batch(self, mesh: Any) -> int | None:
        given = self.options.member_batch
        path = self._resumed_from()
        if given is None and path is not None:
            given = checkpoints.load_fingerprint(path).get(PLACEMENT, {}).get("member_batch")
        return _default_member_batch(self.parts, mesh) if given is None else given or None

    def _resumed_from(self) -> Path | None:
        path = self._path
        return path if self.options.resume and path is not None and processes.from_first(path.exists) else None

    # --- the loop ---

    def to_the_end(self) -> Outcome:
        if self.watcher is not None:
            self.watcher.planned(self.program)
            self.program.check = functools.partial(self.watcher.traced, self.program)
        self._restore()
        unit = self.parts[0].program.step_unit
        progress = Progress(
            self.stop, self.num_members, unit, completed=self.steps, quiet=self.options.quiet, console=self.console
        )
        with contextlib.ExitStack() as stack:
            loggers = [stack.enter_context(self._logger(number, progress)) for number in range(len(self.parts))]
            for number, rows in enumerate(self.rows):  # a resumed run: logs are written anew from the first row
                for stage in self.schedule.stages:
                    first = self.schedule.rows(stage, self.stretch.start)
                    self._log(number, stage, _of_stage(rows, stage), first, loggers[number])
            stack.enter_context(progress)
            stopped = stack.enter_context(_stop_on_interrupt(progress))
            if self.steps < self.stop and not self.program.is_compiled:
                alone = processes.count() == 1
                sentence = STOPPED_COMPILING if self.options.folder else "stopped while compiling."
                with progress.compiling(), interrupts.while_compiling(sentence, alone):
                    self.program.compile(self.schedule.stage_at(self.steps))
                    if self.watcher is not None:
                        self._state = self.watcher.compiled(self.program, self._state, self.steps, self.total)
            garbage.collect_from_now_on()
            self._saved_at = time.monotonic()
            chunk = self._first_chunk()
            while self.steps < self.stop:
                end = min(self.stop, self.schedule.end(self.schedule.stage_at(self.steps)))
                seconds = self._advance(min(chunk, end - self.steps), loggers, progress)
                stopping = processes.any_of(stopped())
                self._save_if_due(progress, force=stopping or self.steps == self.stop)
                if stopping and self.steps < self.stop:
                    raise Interrupted(self._how_to_resume())
                chunk = self._next_chunk(chunk, seconds)
            measured = [_without_stages(rows) for rows in self.rows]
            for number, part in enumerate(self.parts):
                finals = {name: last_values(measured[number][name]) for name in part.program.finals}
                loggers[number].log_finals(np.arange(len(part.grid)), finals)
        return Outcome(
            self.steps,
            measured,
            self.failed,
            self._final_state(),
            self.program.compile_seconds + self.earlier_seconds[0],
            self.run_seconds + self.earlier_seconds[1],
            self.program.num_traces,
            self.program.bytes_per_member,
            self._earlier_stages(),
        )

    def _earlier_stages(self) -> dict[str, str]:
        *earlier, _ = enumerate(self.schedule.names)
        return {name: of for stage, of in earlier for rows in self.rows for name in _of_stage(rows, stage)}

    def _advance(self, count: int, loggers: list[Loggers], progress: Progress) -> float:
        begin, start = time.perf_counter(), self.steps
        stage = self.schedule.stage_at(start)
        before, length = self.schedule.start(stage), self.schedule.lengths[stage]
        self.steps += count
        self._state, rows, finite = self.program(self._state, start - before, self.steps - before, length, stage)
        seconds = time.perf_counter() - begin
        self.run_seconds += seconds
        for number, part in enumerate(self.parts):
            self._note_failures(number, part, ~finite[number], progress)
            first = self.schedule.rows(stage, start)
            own = rows[number] | self._totals(number, stage, rows[number], first)
            self._append(number, stage, own)
            self._log(number, stage, own, first, loggers[number])
        if self.program.all_done(self._state, stage):
            self._skip_rest(stage)
        progress.update(self.steps, self._headline(stage))
        return seconds

    def _totals(self, number: int, stage: int, rows: dict[str, np.ndarray], first: int) -> dict[str, np.ndarray]:
        """Sums over all steps so far, at rows of a stage the first of which has number `first`."""
        totals = {}
        for measure in self.parts[number].program.measures:
            if measure.total_of not in rows:
                continue
            means = rows[measure.total_of].astype(np.float64)
            known = self.rows[number].get(f"{stage}/{measure.name}", np.zeros((len(means), 1)))
            steps = np.diff(self.schedule.row_steps(stage), prepend=0)[first : first + means.shape[1]]
            before = known[:, -1:] if known.shape[1] else np.zeros((len(means), 1))
            totals[measure.name] = np.cumsum(np.concatenate([before, means * steps], axis=1), axis=1)[:, 1:]
        return totals

    def _append(self, number: int, stage: int, rows: dict[str, np.ndarray]) -> None:
        known = self.rows[number]
        for name, array in rows.items():
            key = f"{stage}/{name}"
            known[key] = np.concatenate([known[key], array], axis=1) if key in known else array

    def _skip_rest(self, stage: int) -> None:
        """Goes to the end of a stage that all members are done with; the evaluations left out are not numbers."""
        self.steps = self.schedule.end(stage)
        count = self.schedule.rows(stage, self.steps)
        for number, rows in enumerate(self.rows):
            missing = {}
            for name, array in _of_stage(rows, stage).items():
                empty = np.nan if array.dtype.kind == "f" else 0
                missing[name] = np.full((len(array), count - array.shape[1], *array.shape[2:]), empty, array.dtype)
            self._append(number, stage, missing)

    def _log(self, number: int, stage: int, rows: dict[str, np.ndarray], first: int, logger: Loggers) -> None:
        """Logs rows of a stage, the first of which has number `first`; steps are counted over all stages."""
        count = next(iter(rows.values())).shape[1] if rows else 0
        if not count:
            return
        steps = self.schedule.start(stage) + self.schedule.row_steps(stage)[first : first + count]
        left_out = {measure.name for measure in self.parts[number].program.measures if not is_logged(measure)}
        series = {name: array for name, array in rows.items() if name not in left_out}
        logger.log_rows(np.arange(len(self.parts[number].grid)), {"step": steps, **series})

    def _note_failures(self, number: int, part: Part, failed: np.ndarray, progress: Progress) -> None:
        new = np.flatnonzero(failed & ~self.failed[number])
        self.failed[number] = self.failed[number] | failed
        for member in new[:10]:
            name = f"{part.label}: " if part.label else ""
            progress.note(f"diverged (not a number) by step {self.steps}: {name}{part.grid.describe(int(member))}")
        if len(new) > 10:
            progress.note(f"... and {counted(len(new) - 10, 'more member')}.")

    def _headline(self, stage: int) -> str:
        """The latest value of the headline, or, in an earlier stage than its own, of that stage's first measure."""
        program = self.parts[0].program
        several = f"{self.schedule.names[stage]}: " if len(self.schedule.stages) > 1 else ""
        regular = [m.name for m in program.measures if m.when == "regular" and not m.dims]
        for name in (program.headline, *regular):
            found = [rows.get(f"{stage}/{name}", np.empty((0, 0))) for rows in self.rows]
            if all(array.shape[1] and array.ndim == 2 for array in found):
                latest = float(statistics.iqm(np.concatenate([array[:, -1] for array in found])))
                return f"{several}IQM {name.replace('_', ' ')} {latest:.4g}"
        return several.removesuffix(": ")

    def _logger(self, number: int, progress: Progress) -> Loggers:
        folder, options = self.options.folder, self.options
        if folder is None:
            if options.wandb_mode not in (None, "disabled") or options.tensorboard:
                raise UserError("wandb_mode and tensorboard need an output folder.")
            folder, options = Path(), dataclasses.replace(options, wandb_mode="disabled")
        several = len(self.parts) > 1
        return Loggers(
            self.parts[number].grid,
            folder / (datasets.file_name(self.parts[number].label) or f"part-{number}") if several else folder,
            folder.name or "run",
            self._own_fingerprint(number),
            wandb_mode=options.wandb_mode,
            runs=options.wandb_runs,
            label=self.parts[number].label if several else "",
            tensorboard=options.tensorboard,
            resume=options.resume,
            note=progress.note,
        )

    def _own_fingerprint(self, number: int) -> dict[str, Any]:
        """The fingerprint of one part alone, without reading its shared inputs again."""
        prefix = f"part {number} " if len(self.parts) > 1 else ""
        return {
            name.removeprefix(prefix): value
            for name, value in self._fingerprint.items()
            if name.startswith(prefix) and name != PLACEMENT
        }

    # --- chunks ---

    def _most_steps(self, stage: int) -> int:
        frequency = self.schedule.eval_every[stage]
        return (ROWS - 1) * frequency if frequency else self.total

    def _first_chunk(self) -> int:
        """One block, or what `--chunks` says: nothing is known of the speed."""
        stage = self.schedule.stage_at(self.steps)
        if self.options.chunks is not None:
            return min(-(-self.total // self.options.chunks), self._most_steps(stage))
        return self.program.block_steps[stage]

    def _next_chunk(self, chunk: int, seconds: float) -> int:
        """As many steps as fit the time between two looks, in whole blocks; from one block on where learning starts."""
        stage = self.schedule.stage_at(self.steps)
        if self.options.chunks is not None:
            return min(-(-self.total // self.options.chunks), self._most_steps(stage))
        block = self.program.block_steps[stage]
        if self.steps in self._learning_starts:
            return block
        wanted = chunk * CHUNK_SECONDS / max(processes.from_first(lambda: seconds), 1e-3)
        wanted = min(wanted, 4 * chunk, self._most_steps(stage))
        nearest = min((start - self.steps for start in self._learning_starts if start > self.steps), default=self.total)
        return min(max(int(wanted) // block, 1) * block, nearest)

    @property
    def _learning_starts(self) -> set[int]:
        """Moments after which a step may take another time than before."""
        return {
            self.schedule.start(number) + steps
            for part in self.parts
            for number, stage in enumerate(part.program.stages)
            for steps in (0, stage.warm_up)
        }

    # --- checkpoints ---

    @property
    def _path(self) -> Path | None:
        return None if self.options.folder is None else self.options.folder / checkpoints.FILE_NAME

    def _restore(self) -> None:
        if self._path is not None:
            checkpoints.begin(self._path)
        path = self._resumed_from()
        if path is None:
            self.steps, state = self.stretch.start, self.stretch.state
            self._state = self.program.initial() if state is None else self.program.scatter(state)
            return
        placement = _check_placement(path, self._fingerprint[PLACEMENT])
        saved = checkpoints.load(path, self.program.structure, self._fingerprint | placement)
        if saved.steps > self.total:
            raise UserError(f"{path} has done {counted(saved.steps, 'step')}, more than the {self.total} asked for.")
        self.steps, self.failed, self.earlier_seconds = saved.steps, saved.failed, saved.seconds
        # A shorter run may have ended between two regular evaluations: a longer one does without that last row.
        kept = [
            self.schedule.rows(stage, saved.steps) - self.schedule.rows(stage, self.stretch.start)
            for stage in self.schedule.stages
        ]
        self.rows = [
            {
                f"{stage}/{name}": array[:, :count]
                for stage, count in enumerate(kept)
                for name, array in _of_stage(rows, stage).items()
            }
            for rows in saved.rows
        ]
        self._state = self.program.scatter(saved.state)

    def _save_if_due(self, progress: Progress, force: bool) -> None:
        if self._path is None:
            return
        if not force and not processes.from_first(lambda: time.monotonic() - self._saved_at >= CHECKPOINT_SECONDS):
            return
        seconds = (
            self.earlier_seconds[0] + self.program.compile_seconds,
            self.earlier_seconds[1] + self.run_seconds,
        )
        here = [self.program.members_here(number) for number in range(len(self.parts))]
        rows = [{name: array[own] for name, array in rows.items()} for rows, own in zip(self.rows, here, strict=True)]
        failed = [failed[own] for failed, own in zip(self.failed, here, strict=True)]
        saved = checkpoints.Checkpoint(self.steps, self.program.gather(self._state), rows, failed, seconds)
        try:
            checkpoints.save(self._path, saved, self._fingerprint)
            self._unsaved = ""
        except UserError as error:  # hours of training are worth more than a checkpoint: tried again when next due
            self._unsaved = str(error).rstrip(".")
            progress.note(f"no checkpoint after {counted(self.steps, 'step')}: {self._unsaved}")
        self._saved_at = time.monotonic()

    def _final_state(self) -> list[Any]:
        if processes.count() == 1:
            return self.program.gather(self._state)
        if self._path is None or self._unsaved or not processes.is_first():
            return []
        return checkpoints.load(self._path, self.program.structure, self._fingerprint).state

    def _how_to_resume(self) -> str:
        done = f"stopped after {self.steps} of {counted(self.total, 'step')}"
        if self.options.folder is None:
            return f"{done}; nothing was written because no output folder was given."
        if not self._unsaved:
            return f"{done}; go on with --resume {self.options.folder}"
        earlier = checkpoints.load_steps(self._path) if self._path is not None and self._path.exists() else 0
        return f"{done}, of which {earlier} are kept ({self._unsaved}); go on with --resume {self.options.folder}"


def _of_stage(rows: dict[str, np.ndarray], stage: int) -> dict[str, np.ndarray]:
    prefix = f"{stage}/"
    return {key.removeprefix(prefix): array for key, array in rows.items() if key.startswith(prefix)}


def _without_stages(rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {key.partition("/")[2]: array for key, array in rows.items()}


def last_values(array: np.ndarray) -> np.ndarray:
    """The last row `[members, ...]` of `[members, evaluations, ...]` that holds numbers: a member may be done early."""
    members, rows = array.shape[:2]
    there = ~np.isnan(array.reshape(members, rows, -1)).all(-1)
    last = np.where(there.any(1), rows - 1 - there[:, ::-1].argmax(1), rows - 1)
    return array[np.arange(members), last]


def is_logged(measure: Measure) -> bool:
    """Whether wandb and TensorBoard get a measure while the run goes on."""
    return measure.logged and measure.when == "regular"


def fingerprint(parts: Sequence[Part]) -> dict[str, Any]:
    """What two runs must share for one to go on where the other stopped: everything but the number of steps."""
    described: dict[str, Any] = {}
    digests: dict[tuple[int, ...], str] = {}  # parts that share a dataset return the same object
    shared = [jax.tree.leaves(part.program.shared()) for part in parts]
    for number, (part, leaves) in enumerate(zip(parts, shared, strict=True)):
        prefix = f"part {number} " if len(parts) > 1 else ""
        described[f"{prefix}seeds"] = list(part.grid.seeds)
        for name, value in to_dict(part.config).items():
            if name not in (*RUN_LENGTH, *part.program.adapts):
                described[f"{prefix}{name}"] = _distinct(value)
        described[f"{prefix}precision"] = str(np.asarray(1.0, _float_type(parts)).dtype)
        if leaves:
            same = tuple(map(id, leaves))
            digests[same] = described[f"{prefix}shared inputs"] = digests.get(same) or _digest(leaves)
    return described


def _digest(leaves: Sequence[Any]) -> str:
    found = hashlib.sha256()
    for array in map(np.asarray, leaves):
        found.update(f"{array.shape} {array.dtype}".encode())
        found.update(np.ascontiguousarray(array).data)
    return found.hexdigest()


def _distinct(value: Any) -> Any:
    """A single value where all members agree; rates in the digits that single precision holds."""
    if not isinstance(value, list):
        return value
    rounded = [float(f"{element:.7g}") if isinstance(element, float) else element for element in value]
    return rounded if len(set(rounded)) > 1 else rounded[0]


def _float_type(parts: Sequence[Part]) -> Any:
    import jax.numpy as jnp

    with precision(parts):
        return jnp.result_type(float)


def _placement(parts: Sequence[Part], mesh: Any, member_batch: int | None) -> dict[str, Any]:
    """What a member's bits depend on beside its own settings.

    That is the size of the batch that it is computed in, and whether there is one device: for several the compiler
    takes other ways, the same for any number of them. All members of a device at once are a batch of their number. A
    population is summed up in an order that depends on the number of devices that share it. Each kind of device rounds
    in its own way, and accelerators keep networks in other arrays than CPUs.
    """
    batches = None if member_batch else [-(-len(part.grid) // mesh.shape[AXIS]) for part in parts]
    several = "one" if mesh.devices.size == 1 else "several"
    return {
        "member_batch": member_batch or 0,
        "devices": several,
        "all": batches,
        POPULATION: int(mesh.shape[POPULATION]),
        PLATFORM: mesh.devices.flat[0].platform,
    }


def _check_placement(path: Path, ours: dict[str, Any]) -> dict[str, Any]:
    """Refuses to go on where the numbers would not be those of one run; returns what is stored."""
    stored = checkpoints.load_fingerprint(path).get(PLACEMENT, ours)
    words_of = {"all": "members at once on each device", POPULATION: "devices for each member's population"}
    option_of = {"member_batch": "--member_batch", PLATFORM: "JAX_PLATFORMS"}
    for name, own in ours.items():
        if stored.get(name, own) != own:
            words, option = words_of.get(name, name.replace("_", " ")), option_of.get(name, "--devices")
            raise UserError(
                f"the run in {path.parent} was begun with {words} {stored[name]}, got {own}: other bits would "
                f"come out; go on with the same {option}."
            )
    return {PLACEMENT: stored}


def _default_member_batch(parts: Sequence[Part], mesh: Any) -> int | None:
    """All at once if the configurations say `vectorized`: arrays of a few numbers cost less than the call."""
    if all(getattr(part.config, "vectorized", False) for part in parts):
        return None
    return devices.default_member_batch(mesh)


@contextlib.contextmanager
def _stop_on_interrupt(progress: Progress) -> Iterator[Callable[[], bool]]:
    """Ctrl-C or SIGTERM asks to stop after the chunk in progress; a second Ctrl-C stops at once."""
    asked = False

    def handler(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked and number == signal.SIGINT:
            interrupts.raise_interrupt(number, frame)
        interrupts.heard(number)
        asked = True
        progress.note("stopping after this chunk; press Ctrl-C again to stop at once and lose it")

    try:
        earlier = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread
        yield lambda: False
        return
    try:
        yield lambda: asked
    finally:
        for number, before in earlier.items():
            signal.signal(number, before)


def to_dataset(
    part: Part, outcome: Outcome, number: int, config: Configuration, attrs: dict[str, Any]
) -> xarray.Dataset:
    """The labelled results of one part.

    Args:
        part: the sub-program and its members.
        outcome: from `train`.
        number: of the part.
        config: the configuration as the user wrote it.
        attrs: further attributes.
    """
    rows = outcome.rows[number]
    final_names = part.program.finals
    series = {name: array for name, array in rows.items() if name not in final_names}
    finals = {name: last_values(rows[name]) for name in final_names} | {"failed": outcome.failed[number]}
    about = {
        "program": part.program.name,
        "title": config.title,
        "environment": getattr(config, "env_name", ""),
        "config": {name: value for name, value in to_dict(config).items() if name not in part.program.adapts},
        "versions": datasets.collect_versions(),
        "headline": part.program.headline,
        "tables": [measure.name for measure in part.program.measures if measure.tabled],
        "compile_seconds": outcome.compile_seconds,
        "run_seconds": outcome.run_seconds,
        "step_name": part.program.step_unit,
        "ends_early": part.program.stages[-1].done is not None,
        "bytes_per_member": outcome.bytes_per_member[number],
        **attrs,
    }
    schedule = StageSchedule.of(part.program)
    *earlier, steps = (schedule.row_steps(stage) for stage in schedule.stages)
    described = _described(part.program.measures, outcome.stage_of)
    named = dict(zip(schedule.names, earlier, strict=False))
    dataset = datasets.build_dataset(part.grid, steps, series, finals, about, described, named)
    return dataset.assign_coords({name: list(labels) for name, labels in part.program.labels.items()})


def _described(measures: Sequence[Measure], stage_of: dict[str, str]) -> dict[str, dict[str, Any]]:
    """What the results say of each variable."""
    return {
        measure.name: {
            "long_name": measure.text,
            "dims": measure.dims,
            "stage": stage_of.get(measure.name, ""),
            **{key: value for key in ("units", "better") if (value := getattr(measure, key))},
        }
        for measure in measures
    }


def make_seeds(seed: int, num_seeds: int) -> tuple[int, ...]:
    """Consecutive seeds.

    Raises:
        UserError: fewer than one, or a seed that does not fit 32 bits.
    """
    if num_seeds < 1:
        raise UserError(f"--num_seeds must be at least 1, got {num_seeds}.")
    if not 0 <= seed <= 2**32 - num_seeds:
        raise UserError(f"--seed must be from 0 to 2^32 - num_seeds, got {seed}.")
    return tuple(range(seed, seed + num_seeds))


def steps_done(folder: Path) -> int:
    """Steps that a folder's checkpoint has done; 0 without one."""
    path = folder / checkpoints.FILE_NAME
    return checkpoints.load_steps(path) if path.exists() else 0

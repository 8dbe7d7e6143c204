"""What a run or a sweep will need, told before its first step: members, sub-programs, memory and time.

What does not fit the memory is refused. A dry run ends here.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from rich.console import Console

from purejax_bilevel.errors import UserError
from purejax_bilevel.members import bytes_in_words, counted
from purejax_bilevel.runtime import devices, sizes
from purejax_bilevel.runtime.compiled import CompiledProgram
from purejax_bilevel.runtime.options import HowToRun
from purejax_bilevel.runtime.progress import duration
from purejax_bilevel.runtime.schedule import num_rows
from purejax_bilevel.studies.arguments import Options

H = TypeVar("H", bound=HowToRun)


class Told(Exception):
    """A dry run has told what it can."""


class Forecast(sizes.Limits):
    """Watches a run (`loop.Watcher`): tells what it needs and refuses what does not fit.

    Args:
        title: what runs.
        console: where to print.
        work: steps that are done in a stage, from its length and its evaluation interval, where a search goes through
            the stage again and again; by default its length.
        only: end with `Told` before the first step.
        quiet: print nothing.
        free: bytes that may still be used on a device; for tests.
    """

    def __init__(
        self,
        title: str,
        console: Console,
        *,
        work: Callable[[int, int], int] | None = None,
        only: bool = False,
        quiet: bool = False,
        free: Callable[[Any], int | None] = devices.free_memory,
    ):
        super().__init__(free)
        self.title, self.only, self.quiet = title, only, quiet
        self.num_devices = 0
        self._console, self._work = console, work

    def planned(self, program: CompiledProgram) -> None:
        """Prints what will run; refuses states that do not fit."""
        self.num_devices = int(program.mesh.devices.size)
        parts = program.parts
        device = program.mesh.local_devices[0]
        at_once = counted(sum(len(part.grid) for part in parts), "member") + (" at a time" if self._work else "")
        if populations := sorted({part.program.population for part in parts} - {0}):
            at_once += f" of {' or '.join(map(str, populations))} individuals each"
        names = ", ".join(f"{part.label} {len(part.grid)}" for part in parts if part.label)
        steps = f"{parts[0].program.num_steps:,} {parts[0].program.step_unit}"
        self._say(
            f"{self.title}: {at_once} in {counted(len(parts), 'sub-program')}{f' ({names})' if names else ''}, "
            f"{steps} each, on {counted(self.num_devices, f'{device.platform} device')}"
        )
        super().planned(program)
        if self.only:
            self._say("compiling...")  # a dry run has no progress bar, which would end as stopped

    def compiled(self, program: CompiledProgram, state: Any, steps: int, total: int) -> Any:
        """Prints memory and time of the compiled program; refuses what does not fit."""
        state = super().compiled(program, state, steps, total)
        if (needed := program.device_bytes) is not None:
            self._tell_memory(program, needed)
        if steps == 0 and not self.quiet:
            state = self._tell_time(program, state)
        if self.only:
            raise Told
        return state

    def _tell_memory(self, program: CompiledProgram, needed: int) -> None:
        device = program.mesh.local_devices[0]
        free = self._free(device)
        shared = " (all devices share it)" if device.platform == "cpu" and self.num_devices > 1 else ""
        of = "" if free is None else f" of {bytes_in_words(free)} free{shared}"
        self._say(f"memory per device: {bytes_in_words(needed)}{of}; compiled in {program.compile_seconds:.1f} s")

    def _tell_time(self, program: CompiledProgram, state: Any) -> Any:
        """Times some steps of every stage; returns the state, which they leave as it was."""
        seconds = 0.0
        for stage, length in enumerate(program.schedule.lengths):
            state, per_step, per_evaluation = program.time_steps(state, length, stage)
            frequency = program.schedule.eval_every[stage]
            work = self._work(length, frequency) if self._work else length
            seconds += per_step * work + per_evaluation * num_rows(length, length, frequency) * work / length
        self._say(f"time: about {duration(seconds)}" + (", then the finalists" if self._work else ""))
        return state

    def _say(self, text: str) -> None:
        if not self.quiet:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def check_dry_run(options: Options) -> None:
    """Whether a dry run may begin.

    Raises:
        UserError: it would go on with a run.
    """
    if options.resume is not None:
        raise UserError(f"--dry_run does not go with --resume {options.resume}, whose run has begun.")


def unlogged(options: H) -> H:
    """The options of a run that leaves nothing and shows no progress."""
    return dataclasses.replace(options, wandb_mode="disabled", tensorboard=False, quiet=True)


@contextlib.contextmanager
def dry_run(console: Console) -> Iterator[None]:
    """A run in this context ends where its forecast is told."""
    with contextlib.suppress(Told):
        yield
    console.print("dry run: nothing was written.", markup=False, highlight=False, soft_wrap=True)

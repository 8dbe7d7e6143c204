"""Progress of the chunk loop: steps per second of all members, time left and the headline metric so far.

On a terminal one live line, which keeps what matters most where the terminal is narrow; elsewhere (a log file, a batch
job) a plain line now and then. Nothing when quiet. The clock of the speed starts when compilation has ended, and steps
done before a resume do not count.

    with Progress(50_000, members=64) as progress:
        with progress.compiling():
            program = ...
        for chunk in ...:
            progress.update(steps_done, "IQM return 412")
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, SpinnerColumn, TextColumn
from rich.progress import Progress as Bar
from rich.table import Column

LINE_EVERY_SECONDS = 30.0
BAR_WIDTH = 10
AROUND_STATUS = BAR_WIDTH + 8  # columns of a live line beside its text: spinner, bar, percentage and the gaps between
FIRST_TO_GO = ("steps", "speed", "headline", "left", "phase")  # parts of the text, the first to be left out first


class Progress:
    """Context manager around the chunk loop.

    Args:
        total_steps_per_member: steps each member does in all.
        members: how many members run.
        unit: what a step is.
        completed: steps per member done before this process (resume).
        quiet: print nothing.
        console: where to print; standard error by default.
        clock: seconds, monotone.
    """

    def __init__(
        self,
        total_steps_per_member: int,
        members: int,
        unit: str = "environment steps",
        *,
        completed: int = 0,
        quiet: bool = False,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total = total_steps_per_member
        self.members = members
        self.unit = unit
        self.quiet = quiet
        self.compile_seconds = 0.0
        self._console = console or Console(stderr=True)
        self._clock = clock
        self._first = self._done = completed
        self._headline = ""
        self._phase = "starting"
        self._started: float | None = None
        self._updated = 0.0
        self._printed = -float("inf")
        self._bar: Bar | None = None

    def __enter__(self) -> "Progress":
        self._started = self._updated = self._clock()
        if not self.quiet and self._console.is_terminal:
            self._bar = Bar(
                SpinnerColumn(),
                BarColumn(bar_width=BAR_WIDTH),
                TextColumn("{task.percentage:>3.0f}%"),
                TextColumn("{task.fields[status]}", markup=False, table_column=Column(no_wrap=True)),
                console=self._console,
            )
            self._bar.add_task("", total=max(self.total, 1), completed=self._done, status=self._line())
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._phase = "finished"
        elif self._phase != "finished":
            self._phase = "stopped"
        self._show(force=True)
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    @contextlib.contextmanager
    def compiling(self, text: str = "compiling...") -> Iterator[None]:
        """Shows that the program is being compiled; the clock of the speed starts anew afterwards."""
        begin, before = self._clock(), self._phase
        self._phase = text
        self._show(force=True)
        try:
            yield
        finally:
            self._phase = "running" if before == "starting" else before
            self._started = self._updated = self._clock()
            self._first = self._done
            self.compile_seconds += self._started - begin
            self._show()

    def update(self, steps_done: int, headline: str = "") -> None:
        """Tells how many steps each member has done, and the metric to show, for example `IQM return 412`."""
        self._phase = "running"
        self._done, self._headline = steps_done, headline
        self._updated = self._clock()
        self._show()

    def note(self, text: str) -> None:
        """Prints a line above the bar (a member that failed, a checkpoint written)."""
        if not self.quiet:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    @property
    def steps_per_second(self) -> float:
        """Steps of all members per second since compilation ended (0 before the first update)."""
        seconds = self._updated - (self._started or 0.0)
        return (self._done - self._first) * self.members / seconds if seconds > 0 else 0.0

    def status(self, width: int | None = None) -> str:
        """The text beside the bar.

        Args:
            width: characters that it may take; what matters least is left out first. None: no limit.
        """
        if self._phase not in ("running", "finished", "stopped"):
            return self._phase[:width]
        parts = self._parts()
        while width is not None and len(", ".join(parts.values())) > width and len(parts) > 1:
            del parts[min(parts, key=FIRST_TO_GO.index)]
        return ", ".join(parts.values())[:width]

    def _parts(self) -> dict[str, str]:
        """What there is to tell, in the order of reading."""
        seconds, speed = self._updated - (self._started or 0.0), self.steps_per_second
        is_running = self._phase == "running"
        members = f" x {self.members} members" if self.members > 1 else ""
        left = (self.total - self._done) * self.members / speed if speed > 0 else 0.0
        parts = {
            "headline": self._headline,
            "phase": "" if is_running else f"{self._phase} after {duration(seconds)}",
            "speed": f"{_short(speed)} steps/s" if speed > 0 else "",
            "left": f"{duration(left)} left" if is_running and left > 0 else "",
            "steps": f"{_short(self._done)} of {_short(self.total)} {self.unit}{members}",
        }
        return {name: text for name, text in parts.items() if text}

    def _line(self) -> str:
        """The text of a live line, as wide as the terminal has room for."""
        return self.status(max(self._console.width - AROUND_STATUS, 1))

    def _show(self, force: bool = False) -> None:
        if self.quiet:
            return
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self._done, status=self._line(), refresh=True)
        elif force or self._clock() - self._printed >= LINE_EVERY_SECONDS:
            self._printed = self._clock()
            percent = f"{100 * self._done / self.total:.0f} %: " if self._phase == "running" and self.total else ""
            self._console.print(percent + self.status(), markup=False, highlight=False, soft_wrap=True)


def _short(number: float) -> str:
    """Three figures with a unit prefix, thousands spelled out up to 100 000."""
    if abs(number) < 100_000:
        return f"{number:,.0f}"
    for size, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.3g}{prefix}"
    return f"{number:,.0f}"


def duration(seconds: float) -> str:
    """`42 s`, `3 min 05 s` or `2 h 07 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"

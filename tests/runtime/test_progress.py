"""Progress: the numbers shown are right by a clock we set, compilation and resumed steps apart; quiet means silent."""

import io
import re

import pytest
from rich.console import Console

from purejax_bilevel.runtime.progress import LINE_EVERY_SECONDS, Progress


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def make(terminal: bool = False, width: int = 200, members: int = 8, **options) -> tuple[Progress, Clock, io.StringIO]:
    clock, file = Clock(), io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=width)
    return Progress(10_000, members, console=console, clock=clock, **options), clock, file


def test_speed_counts_all_members_and_not_the_compilation():
    progress, clock, file = make()
    with progress:
        clock.now += 3
        with progress.compiling():
            clock.now += 20
        clock.now += 4
        progress.update(1000, "IQM return 412")
        assert progress.steps_per_second == pytest.approx(1000 * 8 / 4)
        assert progress.compile_seconds == 20
        assert progress.status() == (
            "IQM return 412, 2,000 steps/s, 36 s left, 1,000 of 10,000 environment steps x 8 members"
        )
    assert file.getvalue().splitlines()[0] == "compiling..."


def test_steps_done_before_a_resume_do_not_count():
    progress, clock, _ = make(completed=9000)
    with progress:
        clock.now += 2
        progress.update(9500)
        assert progress.steps_per_second == pytest.approx(500 * 8 / 2)
        assert "2 s left" in progress.status()


def test_compiling_again_starts_the_speed_anew():
    progress, clock, _ = make()
    with progress:
        clock.now += 1
        progress.update(8000)
        with progress.compiling():
            clock.now += 30
        clock.now += 2
        progress.update(9000)
        assert progress.steps_per_second == pytest.approx(1000 * 8 / 2)


def test_plain_lines_are_rare_and_the_last_one_tells_the_end():
    progress, clock, file = make()
    with progress:
        for chunk in range(1, 101):
            clock.now += 1
            progress.update(100 * chunk, f"IQM return {chunk}")
    lines = file.getvalue().splitlines()
    assert 100 / LINE_EVERY_SECONDS <= len(lines) <= 100 / LINE_EVERY_SECONDS + 2
    assert lines[0].startswith("1 %: IQM return 1, 800 steps/s, 1 min 39 s left")
    assert lines[-1].startswith("IQM return 100, finished after 1 min 40 s, 800 steps/s, 10,000 of 10,000")
    assert "\x1b" not in file.getvalue()


def test_an_interrupted_run_says_so():
    progress, clock, file = make()

    def run():
        with progress:
            clock.now += 1
            progress.update(100)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    assert "stopped after 1 s" in file.getvalue().splitlines()[-1]


def test_terminal_shows_one_live_line():
    progress, clock, file = make(terminal=True)
    with progress:
        with progress.compiling("compiling 64 members..."):
            clock.now += 1
        clock.now += 1
        progress.update(5000, "IQM return 7 [of 9]")
        progress.note("lr=1, seed=2 failed")
    text = file.getvalue()
    for part in ("compiling 64 members...", " 50%", "IQM return 7 [of 9]", "lr=1, seed=2 failed", "finished"):
        assert part in text


def last_line(width: int) -> str:
    """What a terminal of this width shows after a half of the steps."""
    progress, clock, file = make(terminal=True, width=width)
    with progress:
        clock.now += 3599
        progress.update(5000, "IQM evaluation return 412.5")
        shown = file.getvalue()
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown).split("\r")[-1].rstrip("\n")


def test_80_columns_have_room_for_bar_percentage_headline_speed_and_time_left():
    line = last_line(80)
    assert len(line) <= 80
    assert "━" * 5 in line  # half of the bar is full
    assert " 50%" in line
    assert line.endswith("50% IQM evaluation return 412.5, 11 steps/s, 59 min 59 s left")


@pytest.mark.parametrize(
    ("width", "end"),
    [
        (
            120,
            "IQM evaluation return 412.5, 11 steps/s, 59 min 59 s left",
        ),
        (
            140,
            "IQM evaluation return 412.5, 11 steps/s, 59 min 59 s left, 5,000 of 10,000 environment steps x 8 members",
        ),
        (70, "IQM evaluation return 412.5, 59 min 59 s left"),
        (60, "59 min 59 s left"),
        (32, "59 min 59 s le"),
    ],
)
def test_what_matters_least_goes_first_on_a_narrow_terminal(width, end):
    line = last_line(width)
    assert len(line) <= width
    assert line.endswith(f" 50% {end}")
    assert "━" * 5 in line


def test_one_member_is_not_counted():
    progress, clock, _ = make(members=1)
    with progress:
        clock.now += 1
        progress.update(5000)
        assert progress.status().endswith("5,000 of 10,000 environment steps")


@pytest.mark.parametrize("terminal", [False, True])
def test_quiet_prints_nothing(terminal):
    progress, clock, file = make(terminal, quiet=True)
    with progress:
        with progress.compiling():
            clock.now += 60
        clock.now += 60
        progress.update(5000, "IQM return 7")
        progress.note("something")
    assert file.getvalue() == ""


def test_no_update_at_all_is_no_error():
    progress, _, file = make()
    with progress:
        pass
    assert file.getvalue().startswith("finished after 0 s, 0 of 10,000")

"""Ctrl-C and SIGTERM: what ends a script at once, and the exit status that says which of the two it was.

While packages are imported a KeyboardInterrupt is a traceback at best; some packages swallow it. Nothing has been
written by then, so that the process may simply end. The scripts import this file before any other. It may also end
while the compiler works: nothing has been computed by then that is not on disk.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)  # docker stop and scancel send the second
SHOW_CURSOR = b"\x1b[?25h\n"

_in_script = False  # else the process is not ours to end
_number = signal.SIGINT


def status() -> int:
    """Exit status of a process that was interrupted: 130 by Ctrl-C, 143 by SIGTERM."""
    return 128 + _number


def heard(number: int) -> None:
    """Keeps which signal it was, for `status`."""
    global _number
    _number = signal.Signals(number)


def end_at_once() -> None:
    """From now on an interrupt ends the process. To be called by scripts."""
    global _in_script
    _in_script = True
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup and shells without job control
            signal.signal(number, _end)


def raise_from_now_on() -> None:
    """There is something to clean up: an interrupt is a KeyboardInterrupt, if `end_at_once` was called before."""
    for number in SIGNALS:
        if signal.getsignal(number) is _end:
            signal.signal(number, raise_interrupt)


def raise_interrupt(number: int, frame: FrameType | None) -> None:
    """The handler that raises KeyboardInterrupt, for any of the signals."""
    heard(number)
    raise KeyboardInterrupt


@contextlib.contextmanager
def while_compiling(sentence: str, alone: bool) -> Iterator[None]:
    """Around a compilation in a script: an interrupt ends the process, since an exception may not leave the compiler.

    jaxlib looks for signals while it compiles, but goes on in a thread of its own: a process that then ends in the
    usual way waits for that thread, or crashes.

    Args:
        sentence: told when it ends.
        alone: whether the first signal does that; else other processes have to be told, and only a second one does.
    """
    if not _in_script or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    asked = alone

    def handler(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            os.write(2, (SHOW_CURSOR if os.isatty(2) else b"") + f"{sentence}\n".encode())
            os._exit(128 + number)
        asked = True
        os.write(2, b"stopping when the compiler is done; once more stops at once.\n")
        if callable(earlier := before[signal.Signals(number)]):
            earlier(number, frame)

    for number, earlier in before.items():
        if earlier != signal.SIG_IGN:  # nohup and shells without job control
            signal.signal(number, handler)
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def _end(number: int, frame: FrameType | None) -> None:
    os.write(2, b"stopped before anything was written.\n")
    os._exit(128 + number)

"""Ctrl-C and SIGTERM before a script's work begins: one line and exit status 130, at once.

While packages are imported a KeyboardInterrupt is a traceback at best; some packages swallow it. Nothing has been
written by then, so that the process may simply end. The scripts import this file before any other.
"""

import os
import signal
from types import FrameType

STATUS = 130  # of a process that was interrupted
SIGNALS = (signal.SIGINT, signal.SIGTERM)  # docker stop and scancel send the second


def end_at_once() -> None:
    """From now on an interrupt ends the process."""
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup and shells without job control
            signal.signal(number, _end)


def raise_from_now_on() -> None:
    """There is something to clean up: an interrupt is a KeyboardInterrupt, if `end_at_once` was called before."""
    for number in SIGNALS:
        if signal.getsignal(number) is _end:
            signal.signal(number, signal.default_int_handler)


def _end(number: int, frame: FrameType | None) -> None:
    os.write(2, b"stopped before anything was written.\n")
    os._exit(STATUS)

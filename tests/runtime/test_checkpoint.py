"""Checkpoints that cannot be written do not stop a run; files that were changed by hand are refused."""

import contextlib
import json
import os
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from purejax_bilevel.errors import UserError
from purejax_bilevel.runtime import checkpoint, compiled, loop, outcomes
from purejax_bilevel.studies import run as runs
from tests import toy


def run(folder: Path, **options: Any) -> outcomes.Outcome:
    part = runs.make_part(toy.Config(num_train_steps=20).resolved(), 2, 0)
    return loop.train([part], loop.RunOptions(folder=folder, **options))


def fail(*arguments: Any, **named: Any) -> None:
    raise OSError(28, "No space left on device")


def test_a_checkpoint_that_cannot_be_written_does_not_stop_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
    write, calls = np.savez, []

    def sometimes(*arguments: Any, **named: Any) -> None:
        calls.append(1)
        (fail if len(calls) == 2 else write)(*arguments, **named)

    monkeypatch.setattr(checkpoint.np, "savez", sometimes)
    assert run(tmp_path, chunks=4).steps == 20
    assert "no checkpoint after 10 steps: cannot write" in capsys.readouterr().err
    assert len(calls) == 4
    assert loop.steps_done(tmp_path) == 20


def test_a_stopped_run_without_its_checkpoint_says_what_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    stop_after(monkeypatch, 10, signal.SIGINT)
    monkeypatch.setattr(checkpoint.np, "savez", fail)
    with pytest.raises(loop.Interrupted, match=r"stopped after 15 of 20 steps, of which 0 are kept .*No space left"):
        run(tmp_path, chunks=4)


def test_sigterm_stops_like_an_interrupt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    before = signal.getsignal(signal.SIGTERM)
    stop_after(monkeypatch, 10, signal.SIGTERM)
    with pytest.raises(loop.Interrupted, match="stopped after 15 of 20 steps; go on with --resume"):
        run(tmp_path, chunks=4)
    assert loop.steps_done(tmp_path) == 15
    assert signal.getsignal(signal.SIGTERM) is before


def stop_after(monkeypatch: pytest.MonkeyPatch, steps: int, number: int) -> None:
    original = compiled.CompiledProgram.__call__

    def stopping(self: Any, state: Any, start: int, *others: int) -> Any:
        if start == steps:
            os.kill(os.getpid(), number)
        return original(self, state, start, *others)

    monkeypatch.setattr(compiled.CompiledProgram, "__call__", stopping)


def negative(arrays: dict[str, np.ndarray], about: dict[str, Any]) -> None:
    about["steps"] = -3


def untimed(arrays: dict[str, np.ndarray], about: dict[str, Any]) -> None:
    about["seconds"] = None


def without_rows(arrays: dict[str, np.ndarray], about: dict[str, Any]) -> None:
    del arrays["0/rows/0/score"]


def cut_rows(arrays: dict[str, np.ndarray], about: dict[str, Any]) -> None:
    arrays["0/rows/0/score"] = arrays["0/rows/0/score"][:, 1:]


def fewer_members(arrays: dict[str, np.ndarray], about: dict[str, Any]) -> None:
    arrays["0/failed"] = arrays["0/failed"][1:]


def test_a_checkpoint_with_other_bytes_is_read_or_refused(tmp_path: Path):
    run(tmp_path, quiet=True)
    path = tmp_path / checkpoint.FILE_NAME
    whole = path.read_bytes()
    entry = whole.index(b"PK\x01\x02")  # the first of the archive's list of files
    for place in range(entry, entry + 46):
        other = bytearray(whole)
        for bit in (1, 8, 128):  # the lowest bit of the flags says that a file is encrypted
            other[place] ^= bit
            path.write_bytes(other)
            with contextlib.suppress(UserError), warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # of zipfile, about what it then refuses
                checkpoint.load_steps(path)
                checkpoint._read(path)


@pytest.mark.parametrize("change", [negative, untimed, without_rows, cut_rows, fewer_members])
def test_a_checkpoint_changed_by_hand_is_refused(change: Callable, tmp_path: Path):
    run(tmp_path, quiet=True)
    path = tmp_path / checkpoint.FILE_NAME
    with np.load(path) as archive:
        arrays = dict(archive)
    about = json.loads(arrays.pop("about").tobytes())
    change(arrays, about)
    np.savez(path, **arrays, about=np.frombuffer(json.dumps(about).encode(), np.uint8))
    with pytest.raises(UserError, match="is not a whole checkpoint") as caught:
        run(tmp_path, resume=True, quiet=True)
    assert "\n" not in str(caught.value)

"""Files of finite MDPs: whatever is damaged, the file is read or refused in one sentence."""

import io
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from purejax_bilevel.environments import finite
from purejax_bilevel.errors import UserError

MDP = finite.two_state()
ARRAYS = {"P": MDP.transition, "R": MDP.reward, "gamma": MDP.discount, "start": MDP.start}


def content(compressed: bool = False, **changes) -> bytes:
    file = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(file, **{**ARRAYS, **changes})
    return file.getvalue()


def damaged() -> Iterator[bytes]:
    """Truncated files, and files with bytes that are other ones."""
    random = np.random.default_rng(0)
    for whole in (content(), content(compressed=True)):
        yield from (whole[:length] for length in range(0, len(whole), 17))
        for place in range(0, len(whole), 2):
            other = bytearray(whole)
            other[place] ^= int(random.integers(1, 256))
            yield bytes(other)


def outcome(path: Path, written: bytes) -> str:
    """What the user is told; "" where the file is accepted."""
    path.write_bytes(written)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of zipfile and numpy, about what they then refuse
            finite.load(str(path))
    except UserError as error:
        return str(error)
    return ""


def test_damaged_files_are_read_or_refused(tmp_path):
    told = [outcome(tmp_path / "damaged.npz", written) for written in damaged()]
    refused = [sentence for sentence in told if sentence]
    assert 0.3 * len(told) < len(refused) < len(told)
    for sentence in refused:
        assert sentence.startswith(f"--mdp_file {tmp_path / 'damaged.npz'}: ")
        assert "\n" not in sentence


@pytest.mark.parametrize("name", list(ARRAYS))
@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.astype(complex),
        lambda x: x.astype(str),
        lambda x: x.astype(object),
        lambda x: x.astype("M8[s]"),
        lambda x: np.full(x.shape, b"x"),
        lambda x: np.zeros(x.shape, [("a", float)]),
        lambda x: x * np.nan,
        lambda x: x * np.inf,
        lambda x: x.astype(np.longdouble) * np.longdouble("1e4000"),
        lambda x: np.full(x.shape, 1e308),
        lambda x: np.full((*x.shape, 3), 1.0),
        lambda x: np.zeros((0, *x.shape)),
    ],
)
def test_arrays_of_other_things_are_refused(name, change, tmp_path):
    told = outcome(tmp_path / "wrong.npz", content(**{name: change(np.asarray(ARRAYS[name]))}))
    assert told.startswith("--mdp_file ") or (name == "R" and told == "")
    assert "\n" not in told


def test_whole_numbers_are_accepted(tmp_path):
    sure = np.stack([np.eye(2, dtype=int), 1 - np.eye(2, dtype=int)])
    assert outcome(tmp_path / "whole.npz", content(P=sure, R=np.ones((2, 2), np.uint8), start=np.array([1, 0]))) == ""

"""Checkpoints: the whole state of all members and the results so far, in one file that is either whole or not there.

A checkpoint is a plain numpy archive (`.npz`): readable anywhere, one file instead of orbax's folder of dozens, with a
checksum per array that makes a torn file show. Arrays are stored without padding, so that a run resumes on any number
of devices.
"""

import json
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from purejax_bilevel.errors import UserError
from purejax_bilevel.experiment.results import replacing

FORMAT = "purejax_bilevel checkpoint 1"
FILE_NAME = "checkpoint.npz"
Tree = Any


class Checkpoint(NamedTuple):
    """What a run needs to go on, per part."""

    steps: int  # done by each member
    state: list[Tree]  # leaves [members, ...]
    rows: list[dict[str, np.ndarray]]  # [members, evaluations, ...]
    failed: list[np.ndarray]  # [members]
    seconds: tuple[float, float]  # spent compiling and running so far


def save(path: Path, checkpoint: Checkpoint, fingerprint: dict[str, Any]) -> None:
    """Writes a checkpoint in one step: a reader sees the old file or the new one.

    Args:
        path: file to write.
        checkpoint: what to store.
        fingerprint: what the run must have in common with the one that loads it; JSON values.

    Raises:
        UserError: the place is not writable.
    """
    arrays: dict[str, np.ndarray] = {}
    for part, (state, rows, failed) in enumerate(
        zip(checkpoint.state, checkpoint.rows, checkpoint.failed, strict=True)
    ):
        arrays |= {f"{part}/state/{name}": leaf for name, leaf in _named(state).items()}
        arrays |= {f"{part}/rows/{name}": array for name, array in rows.items()}
        arrays[f"{part}/failed"] = failed
    about = {"format": FORMAT, "steps": checkpoint.steps, "seconds": checkpoint.seconds, "fingerprint": fingerprint}
    arrays["about"] = np.frombuffer(json.dumps(about).encode(), np.uint8)
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def load(path: Path, structure: list[Tree], fingerprint: dict[str, Any]) -> Checkpoint:
    """Reads a checkpoint that fits the program about to run.

    Args:
        path: file to read.
        structure: per part the expected state, leaves with `shape` and `dtype`.
        fingerprint: as for `save`.

    Raises:
        UserError: the file is torn, no checkpoint, or of another experiment.
    """
    arrays, about = _read(path)
    _same_experiment(path, about["fingerprint"], fingerprint)
    state, rows, failed = [], [], []
    for part, shapes in enumerate(structure):
        expected = _named(shapes)
        prefix = f"{part}/state/"
        stored = {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
        for name in sorted(expected.keys() | stored.keys()):
            _same_array(path, name, stored.get(name), expected.get(name))
        leaves = [stored[name] for name in expected]
        state.append(jax.tree.unflatten(jax.tree.structure(shapes), leaves))
        prefix = f"{part}/rows/"
        rows.append({name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)})
        failed.append(arrays[f"{part}/failed"])
    return Checkpoint(about["steps"], state, rows, failed, tuple(about["seconds"]))


def load_steps(path: Path) -> int:
    """Steps done by each member of a checkpoint; raises as `load` does for a torn file."""
    return _read(path)[1]["steps"]


def _read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        about = json.loads(arrays.pop("about").tobytes())
        if about["format"] != FORMAT:
            raise ValueError(f"format {about['format']!r}")
    except (OSError, ValueError, KeyError, EOFError, AttributeError, zipfile.BadZipFile, NotImplementedError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path} is not a whole checkpoint ({reason}); delete it to start again.") from error
    return arrays, about


def _named(tree: Tree) -> dict[str, Any]:
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _same_experiment(path: Path, stored: dict[str, Any], expected: dict[str, Any]) -> None:
    for name in [*expected, *(stored.keys() - expected.keys())]:
        if stored.get(name) != expected.get(name):
            its, ours = _short(stored.get(name)), _short(expected.get(name))
            raise UserError(f"{path} belongs to another experiment: its {name} is {its}, this one's {ours}.")


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _same_array(path: Path, name: str, stored: Any, expected: Any) -> None:
    found = None if stored is None else (stored.shape, stored.dtype)
    needed = None if expected is None else (expected.shape, expected.dtype)
    if found != needed:
        raise UserError(f"{path} does not fit this version of the program: {name} is {found}, expected {needed}.")

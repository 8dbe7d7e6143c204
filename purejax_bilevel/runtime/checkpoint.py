"""Checkpoints: the whole state of all members and the results so far, in one file that is either whole or not there.

A checkpoint is a plain numpy archive (`.npz`): readable anywhere, one file instead of orbax's folder of dozens, with a
checksum per array that makes a torn file show. Arrays are stored without padding, so that a run resumes on any number
of devices and processes.

Of several processes each writes its own members to `checkpoint.<steps>.<process>.npz`; once all have done so, process 0
puts these shards together. The folder must be one that all of them see. Whenever anything is killed, `checkpoint.npz`
is whole; shards left behind are of no use and deleted at the next start.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from purejax_bilevel.errors import UserError
from purejax_bilevel.results.dataset import replacing, write_bytes
from purejax_bilevel.runtime import processes

FORMAT = "purejax_bilevel checkpoint 2"
FILE_NAME = "checkpoint.npz"
Tree = Any


class Checkpoint(NamedTuple):
    """What a run needs to go on, per part; to `save`: of the members of this process."""

    steps: int  # done by each member
    state: list[Tree]  # leaves [members, ...]
    rows: list[dict[str, np.ndarray]]  # [members, evaluations, ...]
    failed: list[np.ndarray]  # [members]
    seconds: tuple[float, float]  # spent compiling and running so far


def save(path: Path, checkpoint: Checkpoint, fingerprint: dict[str, Any]) -> None:
    """Writes a checkpoint in one step: a reader sees the old file or the new one. All processes call it.

    Args:
        path: file to write.
        checkpoint: what to store.
        fingerprint: what the run must have in common with the one that loads it; JSON values.

    Raises:
        UserError: the place is not writable; in all processes, if it is not for one.
    """
    if processes.count() == 1:
        _write_members(path, checkpoint, fingerprint)
        return
    shard = _shard(path, checkpoint.steps, processes.index())
    try:
        problem = _attempt(lambda: _write_members(shard, checkpoint, fingerprint))
        if processes.any_of(bool(problem)):
            raise UserError(problem or f"cannot write {path}: another process could not write its members")
        if problem := processes.from_first(lambda: _attempt(lambda: _merge(path, checkpoint.steps))):
            raise UserError(problem)
    finally:
        shard.unlink(missing_ok=True)


def _attempt(write: Callable[[], None]) -> str:
    """What went wrong, or ""; all processes must agree on it before one of them leaves."""
    try:
        write()
    except UserError as error:
        return str(error)
    return ""


def _write_members(path: Path, checkpoint: Checkpoint, fingerprint: dict[str, Any]) -> None:
    arrays: dict[str, np.ndarray] = {}
    for part, (state, rows, failed) in enumerate(
        zip(checkpoint.state, checkpoint.rows, checkpoint.failed, strict=True)
    ):
        arrays |= {f"{part}/state/{name}": leaf for name, leaf in _named(state).items()}
        arrays |= {f"{part}/rows/{name}": array for name, array in rows.items()}
        arrays[f"{part}/failed"] = failed
    about = {
        "format": FORMAT,
        "steps": checkpoint.steps,
        "seconds": checkpoint.seconds,
        "fingerprint": fingerprint,
        "arrays": sorted(arrays),
    }
    _write(path, arrays, about)


def _write(path: Path, arrays: dict[str, np.ndarray], about: dict[str, Any]) -> None:
    described = np.frombuffer(json.dumps(about).encode(), np.uint8)
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays, about=described)  # type: ignore[arg-type]


def _shard(path: Path, steps: int, process: int) -> Path:
    return path.with_suffix(f".{steps}.{process}{path.suffix}")


def _merge(path: Path, steps: int) -> None:
    """Puts the shards of all processes together."""
    shards = [_shard(path, steps, process) for process in range(processes.count())]
    read = [_read(shard) for shard in shards]
    arrays = {name: np.concatenate([own[name] for own, _ in read]) for name in read[0][0]}
    _write(path, arrays, read[0][1])


def begin(path: Path) -> None:
    """Deletes the shards that a killed run left, and makes sure that all processes see the same folder.

    Raises:
        UserError: they do not, or it is not writable.
    """
    processes.from_first(lambda: _delete_shards(path))
    if processes.count() > 1:
        write_bytes(_shard(path, 0, processes.index()), b"")
        processes.from_first(lambda: _check_shared(path))


def _check_shared(path: Path) -> None:
    unseen = [process for process in range(processes.count()) if not _shard(path, 0, process).exists()]
    if unseen:
        raise UserError(
            f"what process {unseen[0]} writes to {path.parent} is not there for process 0: the folder must be one "
            "that all processes share."
        )
    _delete_shards(path)


def _delete_shards(path: Path) -> None:
    for pattern in (f"{path.stem}.*.*{path.suffix}", f".{path.stem}.*.part"):  # whole ones, and torn ones
        for left in path.parent.glob(pattern):
            left.unlink(missing_ok=True)


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
        _check_members(path, len(leaves[0]), {**rows[-1], "failed": failed[-1]})
    return Checkpoint(about["steps"], state, rows, failed, tuple(about["seconds"]))


def load_steps(path: Path) -> int:
    """Steps done by each member of a checkpoint; raises as `load` does for a torn file, without reading its arrays."""
    return _read(path, whole=False)[1]["steps"]


def load_fingerprint(path: Path) -> dict[str, Any]:
    """What a checkpoint was saved with (see `save`); raises as `load_steps` does."""
    return _read(path, whole=False)[1]["fingerprint"]


def _read(path: Path, whole: bool = True) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays, none unless `whole`, and what the file says about itself."""
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            about = json.loads(archive["about"].tobytes())
            names = set(archive.files) - {"about"}
            arrays = {name: archive[name] for name in names} if whole else {}
        if about["format"] != FORMAT:
            raise ValueError(f"format {about['format']!r}")
        _check(names, about)
    except Exception as error:  # a damaged archive fails in a dozen ways, in zipfile, zlib, ast and numpy
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path} is not a whole checkpoint ({reason}); delete it to start again.") from error
    return arrays, about


def _check(names: set[str], about: dict[str, Any]) -> None:
    """Whether what the file says about itself can be true."""
    if type(about["steps"]) is not int or about["steps"] < 0:
        raise ValueError(f"it says that it has done {about['steps']!r} steps")
    if missing := set(about["arrays"]) - names:
        raise ValueError(f"{min(missing)} is missing")
    compiling, running = map(float, about["seconds"])
    if min(compiling, running) < 0 or not isinstance(about["fingerprint"], dict):
        raise ValueError("its description is damaged")


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


def _check_members(path: Path, members: int, arrays: dict[str, np.ndarray]) -> None:
    """Whether there are results of all members, and as many of one metric of a stage as of another."""
    lengths = {(name.partition("/")[0], array.shape[1]) for name, array in arrays.items() if name != "failed"}
    wrong = [name for name, array in arrays.items() if len(array) != members]
    if wrong or len(lengths) > len({stage for stage, _ in lengths}):
        raise UserError(f"{path} is not a whole checkpoint (results are missing{': ' + wrong[0] if wrong else ''}).")


def _same_array(path: Path, name: str, stored: Any, expected: Any) -> None:
    found = None if stored is None else (stored.shape, stored.dtype)
    needed = None if expected is None else (expected.shape, expected.dtype)
    if found != needed:
        raise UserError(f"{path} does not fit this version of the program: {name} is {found}, expected {needed}.")

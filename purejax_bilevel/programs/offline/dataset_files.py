"""Files of datasets: npz of this project, D4RL's flat HDF5, Minari's HDF5 with a group per episode.

The arrays of npz and D4RL have the same names: observations, actions, rewards, next_observations, terminals, timeouts.
Sources: D4RL, Fu et al. 2020 (arXiv 2004.07219); Minari's documentation (minari.farama.org, dataset standards).
"""

import contextlib
import functools
import json
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from purejax_bilevel.configuration import warn
from purejax_bilevel.errors import UserError
from purejax_bilevel.programs.offline.datasets import COLUMNS, Dataset, Scores, checked, d4rl_scores

FORMAT = "purejax_bilevel dataset 1"
SCORES = ("ref_min_score", "ref_max_score", "ref_min_score_error", "ref_max_score_error")
MINARI = "main_data.hdf5"
NEEDED = ("observations", "actions", "rewards", "terminals")
EPISODE = re.compile(r"episode_(\d+)")


def load(place: str, action_bound: float = 1.0) -> Dataset:
    """Reads and checks a dataset.

    Args:
        place: a file `.npz` or `.hdf5`, or the folder of a dataset of Minari.
        action_bound: what actions are divided by to be in [-1, 1].

    Raises:
        UserError: it is not there, not whole, of no known layout, or what is in it cannot be.
    """
    path = _file_of(Path(place))
    about = path.stat()
    return _load(path, (about.st_mtime_ns, about.st_size), action_bound)


@functools.cache  # programs that share a dataset must return the same object
def _load(path: Path, version: tuple[int, int], action_bound: float) -> Dataset:
    del version  # of the file: another one is read again
    with _told(path):
        arrays, about = (_read_npz if path.suffix == ".npz" else _read_hdf5)(path)
    return checked(arrays, str(path), action_bound, **about)


def _file_of(path: Path) -> Path:
    if path.is_dir():
        found = next(
            (path / name for name in ("data/main_data.hdf5", "main_data.hdf5") if (path / name).is_file()), None
        )
        if found is None:
            names = ", ".join(sorted(entry.name for entry in path.iterdir() if entry.suffix in (".npz", ".hdf5")))
            raise UserError(f"--dataset {path} is a folder: give one of its files ({names or 'it has none'}).")
        return found
    if not path.is_file():
        raise UserError(f"--dataset {path}: there is no such file.")
    if path.suffix not in (".npz", ".hdf5", ".h5"):
        raise UserError(f"--dataset {path} must end in .npz or .hdf5.")
    return path


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # a damaged file fails in a dozen ways, in zipfile, zlib, ast, numpy, json and HDF5
        reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
        raise UserError(f"{path} is not a whole dataset ({reason}): it may be truncated.") from error


# --- npz of this project ----------------------------------------------------------------------------------------------


def save(dataset: Dataset, path: Path) -> Path:
    """Writes a dataset as `.npz`, or in D4RL's layout where the path ends in `.hdf5`; the same bytes each time.

    Raises:
        UserError: the place is not writable.
    """
    arrays = dict(zip(COLUMNS, _columns(dataset), strict=True))
    scores = dataset.scores and (
        dataset.scores.minimum,
        dataset.scores.maximum,
        dataset.scores.minimum_error,
        dataset.scores.maximum_error,
    )
    about = {"environment": dataset.environment, "about": json.dumps(dict(dataset.about), sort_keys=True)}
    try:
        if path.suffix == ".npz":
            _write_npz(path, {**arrays, **dict(zip(SCORES, scores or (), strict=False)), **about, "format": FORMAT})
        else:
            with h5py.File(path, "w") as file:
                for name, array in arrays.items():
                    file.create_dataset(name, data=array, compression="gzip", track_times=False)
                file.attrs.update({**about, **dict(zip(SCORES, scores or (), strict=False))})
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror or error}).") from error
    return path


def _columns(dataset: Dataset) -> tuple[np.ndarray, ...]:
    return dataset.obs, dataset.action, dataset.reward, dataset.next_obs, dataset.terminated, dataset.timeout


def _write_npz(path: Path, arrays: Mapping[str, Any]) -> None:
    """As `numpy.savez_compressed`, whose files hold the time of writing from the second release that has it on."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in arrays.items():
            entry = zipfile.ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0))
            entry.compress_type = zipfile.ZIP_DEFLATED
            with archive.open(entry, "w", force_zip64=True) as file:
                np.lib.format.write_array(file, np.asarray(array), allow_pickle=False)


def _read_npz(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:  # numpy leaves a broken one open
        entries = {name: archive[name] for name in archive.files}
    attributes = {name: entries[name].item() for name in ("environment", "about", *SCORES) if name in entries}
    return _complete(entries, path), _about(attributes, path)


# --- HDF5 -------------------------------------------------------------------------------------------------------------


def _read_hdf5(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    with h5py.File(path, "r") as file:
        numbers = sorted(int(match[1]) for name in file if (match := EPISODE.fullmatch(name)))
        if numbers:
            return _episodes(file, numbers, path), _about(_minari_attributes(file, path), path)
        entries = {name: file[name][()] for name in COLUMNS if name in file}
        return _complete(entries, path), _about(dict(file.attrs), path)


def _complete(entries: dict[str, np.ndarray], path: Path) -> dict[str, np.ndarray]:
    """With the arrays that a file may leave out."""
    missing = [name for name in NEEDED if name not in entries]
    if missing:
        raise UserError(f"{path} has no {', '.join(missing)}: a dataset has {', '.join(COLUMNS)}.")
    if "timeouts" not in entries and "next_observations" not in entries:
        raise UserError(f"{path} has neither timeouts nor next_observations: where its episodes end is not known.")
    entries = {"timeouts": np.zeros_like(entries["terminals"]), **entries}
    if "next_observations" in entries:
        return {name: entries[name] for name in COLUMNS}
    return _without_ends(entries, path)


def _without_ends(entries: dict[str, np.ndarray], path: Path) -> dict[str, np.ndarray]:
    """Next observations are those of the next row; at the end of an episode that would be the next one's first."""
    observations = entries["observations"]
    inner = ~(entries["terminals"].astype(bool) | entries["timeouts"].astype(bool)).reshape(len(observations), -1)[:, 0]
    inner[-1] = False
    lost = int(entries["terminals"].astype(bool).sum())
    if lost:
        warn(f"{path} has no next_observations: its {lost} terminal rows are left out, a model cannot learn from them.")
    kept = np.flatnonzero(inner)
    found = {name: entries[name][kept] for name in COLUMNS if name in entries}
    return {**found, "next_observations": observations[kept + 1]}


def _episodes(file: h5py.File, numbers: list[int], path: Path) -> dict[str, np.ndarray]:
    """Minari: T + 1 observations and T of everything else in each episode."""
    parts: dict[str, list[np.ndarray]] = {name: [] for name in COLUMNS}
    for number in numbers:
        group = file[f"episode_{number}"]
        for name in ("observations", "actions", "rewards", "terminations", "truncations"):
            if not isinstance(group.get(name), h5py.Dataset):
                raise UserError(f"{path}: {name} of episode {number} must be one array of numbers.")
        observations, length = group["observations"][()], len(group["rewards"])
        if len(observations) != length + 1 or len(group["actions"]) != length:
            raise UserError(
                f"{path}: episode {number} has {len(observations)} observations and {len(group['actions'])} actions "
                f"for {length} rewards; needed are one more, and as many."
            )
        if not length:
            continue
        cut = group["truncations"][()].astype(bool)
        cut[-1] |= not group["terminations"][-1]  # the recording stopped there
        columns = (
            observations[:-1], group["actions"][()], group["rewards"][()], observations[1:],
            group["terminations"][()], cut,
        )  # fmt: skip
        for name, column in zip(COLUMNS, columns, strict=True):
            parts[name].append(column)
    return {name: np.concatenate(columns) for name, columns in parts.items()}


def _minari_attributes(file: h5py.File, path: Path) -> dict[str, Any]:
    """Of the file's root, and of metadata.json beside it in newer releases."""
    attributes = dict(file.attrs)
    beside = path.with_name("metadata.json")
    if beside.is_file():
        attributes |= json.loads(beside.read_text(encoding="utf-8"))
    specification = attributes.get("env_spec")
    if isinstance(specification, str | bytes) and "environment" not in attributes:
        attributes["environment"] = json.loads(specification).get("id", "")
    return attributes


def _about(attributes: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Arguments of `Dataset`. A file of D4RL says its environment by its name alone."""
    scores = d4rl_scores(path.stem)
    environment = str(attributes.get("environment", "")) or (path.stem if scores else "")
    if all(name in attributes for name in SCORES[:2]):
        scores = Scores(*(float(attributes[name]) for name in SCORES if name in attributes))
    return {"environment": environment, "scores": scores, "about": json.loads(str(attributes.get("about", "{}")))}

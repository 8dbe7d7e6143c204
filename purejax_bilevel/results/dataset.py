"""Results: one labelled array file per experiment.

Every hyper-parameter axis, the seed, the step and the evaluation episode is a named dimension of one `xarray.Dataset`,
written as netCDF. Statistics and figures read only that file, so they can be made again, elsewhere and later, without
the run.
"""

import contextlib
import dataclasses
import datetime
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import xarray
import yaml

from purejax_bilevel.errors import UserError
from purejax_bilevel.members import Axis, Grid

FORMAT = "purejax_bilevel results 1"
FILE_NAME = "results.nc"
COMMAND, VERSIONS = ABOUT = "command.txt", "versions.json"  # beside a run's settings
SEED, STEP, EPISODE = "seed", "step", "episode"
INDIVIDUAL = "individual"  # dimension of what is measured of all individuals of a population
PARENT, BEST = "parent", "best_individual"  # what is measured where members are populations that train themselves,
POPULATIONS = "population_based"  # and the attribute that says how
PACKAGES = ("jax", "jaxlib", "flax", "optax", "gymnax", "distrax", "evosax", "numpy", "scipy", "xarray")


# ---------------------------------------------------------------- building


def build_dataset(
    grid: Grid,
    steps: Sequence[int] | np.ndarray,
    series: Mapping[str, np.ndarray],
    finals: Mapping[str, np.ndarray],
    attrs: Mapping[str, Any],
    variables: Mapping[str, Mapping[str, Any]] | None = None,
    earlier: Mapping[str, np.ndarray] | None = None,
) -> xarray.Dataset:
    """Labels the arrays of all members.

    Args:
        grid: the members, in the order of the arrays' first axis.
        steps: `[steps]`, number of environment (or outer) steps done at each row of `series`.
        series: per name `[members, steps, ...]`.
        finals: per name `[members, ...]`, measured once at the end, by default of episodes. A boolean `failed`
            `[members]` marks members that diverged; statistics leave them out and count them.
        attrs: about the whole experiment: `program`, `environment`, `config`, `command`, `versions`, `device`,
            `headline` (the variable to report), `compile_seconds`, `run_seconds`, `step_name`. Dictionaries, booleans
            and None are stored as JSON.
        variables: per name its `long_name`, `units`, `better` (`higher` or `lower`), `dims`, the names of further
            dimensions, and `stage`, the earlier stage that it is of, if it is not of the last one.
        earlier: per earlier stage the number of its steps done at each of its rows.

    Returns:
        Dataset with one dimension per axis, then `seed`, then `step` (`step_<stage>` for an earlier stage) and further
        ones.

    Raises:
        ValueError: an array does not have the members' or steps' length, or two dimensions share a name.
    """
    dimensions = _grid_dimensions(grid)
    described, earlier = variables or {}, earlier or {}
    data = {}
    for name, array in series.items():
        stage = described.get(name, {}).get("stage", "")
        expected = (len(grid), len(earlier[stage] if stage else steps))
        extra = described.get(name, {}).get("dims") or (f"{name}_component",)
        data[name] = _variable(name, array, grid, dimensions, expected, (step_dimension(stage), *extra), described)
    for name, array in finals.items():
        extra = described.get(name, {}).get("dims") or (EPISODE,)
        data[name] = _variable(name, array, grid, dimensions, (len(grid),), extra, described)
    step_name = str(attrs.get("step_name", "environment steps"))
    coordinates: dict[str, Any] = {SEED: (SEED, np.asarray(grid.seeds), {"long_name": "seed"})}
    coordinates[STEP] = (STEP, np.asarray(steps), {"long_name": step_name})
    for stage, its_steps in earlier.items():
        dimension = step_dimension(stage)
        coordinates[dimension] = (dimension, np.asarray(its_steps), {"long_name": f"{step_name} of {stage}"})
    for axis in grid.axes:
        coordinates.update(_axis_coordinates(axis))
    if clash := sorted(set(coordinates) & set(data)):
        raise ValueError(f"{clash[0]!r} is both a hyper-parameter and a measured variable; rename the variable")
    axes = {axis.dimension: list(axis.names) for axis in grid.axes}
    about = {"format": FORMAT, "axes": axes, "stages": list(earlier), "created": _now(), **attrs}
    return xarray.Dataset(data, coordinates, about)


def of_population(name: str) -> str:
    """What a measure or a setting is called where it is that of all individuals."""
    return f"population_{name}"


def file_name(label: str) -> str:
    """A label as the name of a folder or file."""
    return re.sub(r"[^\w.=+-]+", "_", label).strip("._")


def step_dimension(stage: str) -> str:
    """Name of the dimension of the steps of an earlier stage; of the last one for ""."""
    return f"{STEP}_{stage}" if stage else STEP


def stage_of(dataset: xarray.Dataset, stage: str) -> xarray.Dataset:
    """What an earlier stage measured, as if it were a run of its own: statistics and figures take it."""
    dimension = step_dimension(stage)
    own = [name for name in dataset.data_vars if dimension in dataset[name].dims or name == "failed"]
    return dataset[own].rename({dimension: STEP})


def setting_dimensions(dataset: xarray.Dataset) -> tuple[str, ...]:
    """Dimensions that hold hyper-parameter settings (not seeds, steps, episodes), slowest first."""
    return tuple(name for name in dataset.attrs["axes"] if name in dataset.dims)


def setting_labels(dataset: xarray.Dataset) -> list[dict[str, Any]]:
    """Hyper-parameters of every setting by name, in C order of `setting_dimensions`."""
    axes = {name: dataset.attrs["axes"][name] for name in setting_dimensions(dataset)}
    return [
        {
            name: _scalar(dataset, name, point)
            for names, point in zip(axes.values(), index, strict=True)
            for name in names
        }
        for index in np.ndindex(*(dataset.sizes[dimension] for dimension in axes))
    ]


def _scalar(dataset: xarray.Dataset, name: str, point: int) -> Any:
    value = dataset.coords[name].values[point]
    return value.item() if isinstance(value, np.generic) else value


def _grid_dimensions(grid: Grid) -> tuple[str, ...]:
    dimensions = (*(axis.dimension for axis in grid.axes), SEED)
    names = [name for axis in grid.axes for name in axis.names]
    for name in (*dimensions[:-1], *names):
        if name in (SEED, STEP, EPISODE):
            raise ValueError(f"an axis cannot be called {name!r}: the results use that name")
    if len(set(dimensions)) < len(dimensions) or len(set(names)) < len(names):
        raise ValueError(f"two axes share a name: {', '.join(dimensions[:-1])} with {', '.join(names)}")
    return dimensions


def _variable(
    name: str,
    array: np.ndarray,
    grid: Grid,
    dimensions: tuple[str, ...],
    expected: tuple[int, ...],
    trailing: tuple[str, ...],
    described: Mapping[str, Mapping[str, Any]],
) -> tuple[tuple[str, ...], np.ndarray, dict[str, str]]:
    array = np.asarray(array)
    most = 1 + len(trailing)
    if array.shape[: len(expected)] != expected or array.ndim > most:
        raise ValueError(f"{name} has shape {array.shape}; expected {expected} and at most {most} dimensions")
    folded = array.reshape(*grid.shape, *array.shape[1:])
    attributes = {"long_name": name.replace("_", " "), **described.get(name, {})}
    for key in ("dims", "stage"):
        attributes.pop(key, None)
    return (*dimensions, *trailing[: array.ndim - 1]), folded, attributes


def _axis_coordinates(axis: Axis) -> dict[str, Any]:
    columns = list(zip(*axis.values, strict=True))
    coordinates = {
        name: (axis.dimension, _coordinate_values(column), {"long_name": name.replace("_", " ")})
        for name, column in zip(axis.names, columns, strict=True)
    }
    if len(axis.names) > 1:
        coordinates[axis.dimension] = (axis.dimension, np.arange(len(axis.values)), {"long_name": "setting"})
    return coordinates


def _coordinate_values(column: Iterable[Any]) -> np.ndarray:
    """Numbers stay numbers, booleans stay booleans; anything else (None, tuples, mixed) becomes text."""
    column = list(column)
    kinds = {bool if isinstance(value, bool | np.bool_) else type(value) for value in column}
    if kinds == {bool} or all(issubclass(kind, int | float | np.number) and kind is not bool for kind in kinds):
        return np.asarray(column)
    return np.asarray([str(value) for value in column])


# ---------------------------------------------------------------- file


def save(dataset: xarray.Dataset, path: str | Path) -> Path:
    """Writes netCDF; a reader sees the whole old file or the whole new one, never a part.

    Args:
        dataset: from `build_dataset`.
        path: file, or a folder that gets `results.nc`.

    Returns:
        The file's path.

    Raises:
        UserError: the place is not writable.
    """
    path = _file(path)
    encoded = dataset.copy()
    encoded.attrs = _encode_attributes(dataset.attrs)
    for variable in encoded.variables.values():
        variable.encoding = {}
        variable.attrs = {key: value for key, value in variable.attrs.items() if value is not None}
    compressed = {str(name): {"zlib": True, "complevel": 1} for name, array in encoded.data_vars.items() if array.ndim}
    # In memory first: HDF5 crashes the process when the disk is full.
    write_bytes(path, encoded.to_netcdf(engine="h5netcdf", encoding=compressed))
    return path


def load(path: str | Path) -> xarray.Dataset:
    """Reads a file written by `save` into memory.

    Args:
        path: file, or the folder of a run.

    Raises:
        UserError: there is no such file, it is cut off or no netCDF, or another program wrote it.
    """
    path = _file(path)
    if not path.is_file():
        raise UserError(f"no results at {path}: give the folder of a finished run or its {FILE_NAME}")
    try:
        dataset = xarray.load_dataset(path, engine="h5netcdf")
    except Exception as error:  # h5py raises OSError, KeyError or RuntimeError, depending on where the file is cut
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path} is not a complete netCDF file ({reason}): run again or use a backup") from error
    if dataset.attrs.get("format") != FORMAT:
        found = dataset.attrs.get("format", "no format mark")
        raise UserError(f"{path} was not written by this version of purejax_bilevel ({found}; expected {FORMAT!r})")
    dataset.attrs = _decode_attributes(dataset.attrs)
    return dataset


def _file(path: str | Path) -> Path:
    path = Path(path)
    return path / FILE_NAME if path.is_dir() or path.suffix == "" else path


def _encode_attributes(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """netCDF attributes hold text and numbers only: the rest is JSON, listed in `json_attributes`."""
    plain = {key: value for key, value in attributes.items() if _is_plain(value)}
    rest = {key: json.dumps(as_plain(value)) for key, value in attributes.items() if key not in plain}
    return {**plain, **rest, "json_attributes": " ".join(sorted(rest))}


def _decode_attributes(attributes: Mapping[str, Any]) -> dict[str, Any]:
    coded = str(attributes.get("json_attributes", "")).split()
    return {
        key: json.loads(value) if key in coded else value.item() if isinstance(value, np.generic) else value
        for key, value in attributes.items()
        if key != "json_attributes"
    }


def _is_plain(value: Any) -> bool:
    return isinstance(value, str | int | float | np.number) and not isinstance(value, bool | np.bool_)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[str]:
    """Temporary name beside `path` that takes its place once the block has ended well and the bytes are on the disk.

    Raises:
        UserError: the place is not writable.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        os.close(handle)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
    try:
        yield temporary
        with open(temporary, "rb+") as written:
            os.fsync(written.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def delete_torn(folder: Path) -> None:
    """Deletes what `replacing` left in a folder and the folders in it when its process was killed.

    Args:
        folder: where nobody writes now.
    """
    for left in [*folder.glob(".*.part"), *folder.glob("*/.*.part")]:
        if re.fullmatch(r"\..+\.\w{8}\.part", left.name):
            left.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


# ---------------------------------------------------------------- provenance


def write_config(
    folder: Path, config: Mapping[str, Any], command: Sequence[str] | None = None, resumed: bool = False
) -> None:
    """Writes what is needed to repeat a run: `config.yaml`, `command.txt` and `versions.json`.

    Args:
        folder: the run's folder.
        config: what was told.
        command: argument list; by default the running command. Folders before the interpreter and the script are
            dropped.
        resumed: append the command to those already there instead of starting the file anew.

    Raises:
        UserError: the folder is not writable.
    """
    command_file = folder / COMMAND
    earlier = command_file.read_text() if resumed and command_file.is_file() else ""
    write_text(folder / "config.yaml", yaml.safe_dump(as_plain(config), sort_keys=False))
    write_text(command_file, f"{earlier}{command_line(command)}\n")
    write_text(folder / VERSIONS, json.dumps(collect_versions(), indent=2) + "\n")


def write_text(path: str | Path, text: str) -> None:
    """Writes a text file in one step: whole or not at all."""
    write_bytes(path, text.encode())


def write_bytes(path: str | Path, content: bytes | memoryview) -> None:
    """Writes a file in one step: whole or not at all.

    Raises:
        UserError: the place is not writable.
    """
    with replacing(Path(path)) as temporary:
        Path(temporary).write_bytes(content)


def command_line(arguments: Sequence[str] | None = None) -> str:
    """Command as one line of shell, with `python` and the script named without their folders.

    Args:
        arguments: interpreter options, script and its arguments; by default those of this process.
    """
    words = list(sys.orig_argv if arguments is None else arguments)
    if words and Path(words[0]).name.startswith("python"):
        words[0] = "python"
    script = sys.argv[0]
    first = [Path(word).name if Path(word).is_absolute() else word for word in words[:2]]
    line = shlex.join([*first, *(Path(word).name if word == script else word for word in words[2:])])
    return line.encode(errors="backslashreplace").decode()  # the name of a file may be no text


def collect_versions() -> dict[str, Any]:
    """Versions of Python, packages, platform, device and, in a git checkout of this package, the commit."""
    import jax

    devices = jax.devices()
    found = {"python": platform.python_version()}
    for package in ("purejax_bilevel", *PACKAGES):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    found["platform"] = f"{platform.system()} {platform.machine()}"
    found["device"] = f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform})"
    if commit := _git_commit():
        found["git_commit"] = commit
    return found


def _git_commit() -> str | None:
    """Commit of the checkout that holds this file, marked when files differ from it; None outside a checkout."""
    here = Path(__file__).resolve()

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)  # an environment inside a foreign repository is not our checkout
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + (" with changes" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


def as_plain(value: Any) -> Any:
    """Value in terms of dictionaries, lists, text, numbers, booleans and None, as YAML and JSON know them."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: as_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): as_plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [as_plain(entry) for entry in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if hasattr(value, "tolist"):  # numpy and jax arrays and scalars
        return value.tolist()
    if callable(value):
        return getattr(value, "__name__", repr(value))
    return str(value)

"""Results: every number is found again under its setting, seed and step, also after a trip through the file."""

import itertools
import json
import multiprocessing
import os
import resource
import sys
from pathlib import Path

import numpy as np
import pytest
import xarray
import yaml

from purejax_bilevel.errors import UserError
from purejax_bilevel.members import Axis, Grid
from purejax_bilevel.results import dataset as datasets

GRID = Grid(
    axes=(Axis(("lr",), ((1e-3,), (3e-4,))), Axis(("model_hidden_dim",), ((2,), (3,), (16,)))),
    seeds=(0, 1, 7, 8),
)
STEPS = [1000, 2000, 3000, 4000, 5000]
VARIABLES = {
    "evaluation_return": {"long_name": "evaluation return", "units": "reward per episode", "better": "higher"},
    "gradient_norm": {"dims": ("layer",)},
}


def make_dataset(grid: Grid = GRID, **attrs) -> xarray.Dataset:
    members = len(grid)
    returns = np.arange(members * 5, dtype=np.float32).reshape(members, 5)
    return datasets.build_dataset(
        grid,
        STEPS,
        {"evaluation_return": returns, "gradient_norm": np.repeat(returns[..., None], 3, -1)},
        {"final_return": returns[:, :2], "failed": np.arange(members) == 5},
        {
            "program": "omd",
            "headline": "final_return",
            "versions": {"jax": "0.10.2"},
            "cached": True,
            "note": None,
            **attrs,
        },
        VARIABLES,
    )


def test_members_are_found_by_name():
    dataset = make_dataset()
    assert dataset["evaluation_return"].dims == ("lr", "model_hidden_dim", "seed", "step")
    assert dataset["gradient_norm"].dims[-1] == "layer"
    assert dataset["final_return"].dims == ("lr", "model_hidden_dim", "seed", "episode")
    for member in range(len(GRID)):
        labels = GRID.settings(member)
        row = dataset["evaluation_return"].sel(labels)
        np.testing.assert_array_equal(row, np.arange(5) + 5 * member)
        assert bool(dataset["failed"].sel(labels)) == (member == 5)
    assert dataset["evaluation_return"].attrs["units"] == "reward per episode"
    assert dataset["step"].attrs["long_name"] == "environment steps"


def test_description_of_a_member():
    assert GRID.describe(0) == "lr=0.001, model_hidden_dim=2, seed=0"
    assert GRID.describe(len(GRID) - 1) == "lr=0.0003, model_hidden_dim=16, seed=8"
    described = [GRID.describe(member) for member in range(len(GRID))]
    assert len(set(described)) == len(GRID)


def test_settings_are_listed_in_the_order_of_the_members():
    labels = datasets.setting_labels(make_dataset())
    assert labels == [
        {"lr": lr, "model_hidden_dim": width} for lr, width in itertools.product((1e-3, 3e-4), (2, 3, 16))
    ]


def test_zipped_axis_is_one_dimension_with_a_coordinate_per_name():
    grid = Grid((Axis(("lr", "tau"), ((0.1, 0.5), (0.2, 0.6), (0.3, 0.7))),), (0, 1))
    dataset = make_dataset(grid)
    assert dataset["final_return"].dims == ("setting", "seed", "episode")
    assert dataset["lr"].dims == dataset["tau"].dims == ("setting",)
    assert [list(label.items()) for label in datasets.setting_labels(dataset)][1] == [("lr", 0.2), ("tau", 0.6)]
    np.testing.assert_array_equal(dataset["setting"], [0, 1, 2])


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (("none", "window"), ["none", "window"]),
        ((True, False), [True, False]),
        ((1, 2.5), [1.0, 2.5]),
        ((None, 3), ["None", "3"]),
        (((1, 2), (3, 4)), ["(1, 2)", "(3, 4)"]),
    ],
)
def test_axis_of_any_values_survives_the_file(tmp_path, values, expected):
    grid = Grid((Axis(("option",), tuple((value,) for value in values)),), (0, 1, 2))
    path = datasets.save(make_dataset(grid), tmp_path / "results.nc")
    found = [label["option"] for label in datasets.setting_labels(datasets.load(path))]
    assert found == expected
    assert [type(value) for value in found] == [type(value) for value in expected]


def test_file_gives_back_the_same_dataset(tmp_path):
    dataset = make_dataset(Grid((), (3, 4)))
    path = datasets.save(dataset, tmp_path / "new" / "run")
    assert path == tmp_path / "new" / "run" / "results.nc"
    for place in (path, path.parent):
        loaded = datasets.load(place)
        xarray.testing.assert_identical(loaded, dataset)
        assert loaded.attrs == dataset.attrs
        assert loaded["failed"].dtype == bool
        assert loaded["evaluation_return"].dtype == np.float32
    assert [entry.name for entry in path.parent.iterdir()] == ["results.nc"]


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = datasets.save(make_dataset(program="old"), tmp_path / "results.nc")

    def full_disk(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(UserError, match="No space left on device"):
        datasets.save(make_dataset(program="new"), path)
    assert datasets.load(path).attrs["program"] == "old"
    assert len(list(tmp_path.iterdir())) == 1


def save_with_a_full_disk(path: Path) -> None:
    """In another process: files may not grow beyond a few bytes, as on a disk that fills up."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
    try:
        datasets.save(make_dataset(program="new"), path)
    except UserError as error:
        sys.exit(7 if "cannot write" in str(error) else 8)


def test_a_disk_that_fills_up_is_one_sentence_and_no_crash(tmp_path):
    path = datasets.save(make_dataset(program="old"), tmp_path / "results.nc")
    child = multiprocessing.get_context("spawn").Process(target=save_with_a_full_disk, args=(path,))
    child.start()
    child.join()
    assert child.exitcode == 7
    assert datasets.load(path).attrs["program"] == "old"
    assert len(list(tmp_path.iterdir())) == 1


def test_only_torn_files_of_ours_are_deleted(tmp_path):
    (tmp_path / "omd").mkdir()
    for name in (".results.nc.ab_12xyz.part", "omd/.results.nc.ab_12xyz.part", "book.part", ".film.part", "results.nc"):
        (tmp_path / name).write_text("")
    datasets.delete_torn(tmp_path)
    assert {entry.name for entry in tmp_path.iterdir()} == {"omd", "book.part", ".film.part", "results.nc"}
    assert not list((tmp_path / "omd").iterdir())


def test_missing_torn_and_foreign_files_are_refused(tmp_path):
    with pytest.raises(UserError, match="no results at"):
        datasets.load(tmp_path)
    path = datasets.save(make_dataset(), tmp_path / "results.nc")
    whole = path.read_bytes()
    for length in (0, 100, len(whole) // 2, len(whole) - 50):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match="not a complete netCDF file"):
            datasets.load(path)
    xarray.Dataset({"a": ("b", [1.0])}).to_netcdf(path, engine="h5netcdf")
    with pytest.raises(UserError, match="not written by this version"):
        datasets.load(path)


def test_unwritable_place_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        datasets.save(make_dataset(), tmp_path / "file" / "results.nc")


def test_arrays_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"loss has shape \(24, 4\)"):
        datasets.build_dataset(GRID, STEPS, {"loss": np.zeros((24, 4))}, {}, {})
    with pytest.raises(ValueError, match="both a hyper-parameter and a measured variable"):
        datasets.build_dataset(GRID, STEPS, {"lr": np.zeros((24, 5))}, {}, {})
    with pytest.raises(ValueError, match="'seed'"):
        datasets.build_dataset(Grid((Axis(("seed",), ((1,),)),), (0,)), [], {}, {}, {})
    twice = Axis(("a", "b"), ((1, 2),)), Axis(("c", "d"), ((1, 2),))
    with pytest.raises(ValueError, match="share a name"):
        datasets.build_dataset(Grid(twice, (0,)), [], {}, {}, {})


CONFIG = {"lr": (1e-3, 3e-4), "width": np.asarray([3, 4]), "agent_type": "omd", "clip": None}


def test_config_command_and_versions_are_written(tmp_path):
    datasets.write_config(tmp_path, CONFIG, ["/somewhere/bin/python3.11", "/somewhere/train_rl.py", "--name", "a b"])
    config = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert config == {"lr": [1e-3, 3e-4], "width": [3, 4], "agent_type": "omd", "clip": None}
    first = (tmp_path / "command.txt").read_text()
    assert first == "python train_rl.py --name 'a b'\n"
    versions = json.loads((tmp_path / "versions.json").read_text())
    assert versions["python"] == ".".join(map(str, sys.version_info[:3]))
    assert {"jax", "jaxlib", "numpy", "device", "platform"} <= set(versions)
    datasets.write_config(tmp_path, CONFIG, ["python", "train_rl.py", "--resume", "x"], resumed=True)
    assert (tmp_path / "command.txt").read_text() == first + "python train_rl.py --resume x\n"


def test_a_name_that_is_no_text_is_written_down(tmp_path):
    datasets.write_config(tmp_path, CONFIG, ["python", "train_rl.py", "--output_dir", os.fsdecode(b"runs/\xff")])
    assert (tmp_path / "command.txt").read_text() == r"python train_rl.py --output_dir 'runs/\udcff'" + "\n"


def test_no_folder_of_this_machine_is_written(tmp_path):
    datasets.write_config(tmp_path, CONFIG)
    text = "".join(path.read_text() for path in tmp_path.iterdir())
    assert sys.prefix not in text
    assert sys.executable not in text

"""Datasets: the three layouts, what is checked, scores, and the generator."""

import json
import os
import warnings
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from purejax_bilevel.errors import UserError
from purejax_bilevel.programs.offline import dataset_files
from purejax_bilevel.programs.offline.datasets import COLUMNS, Dataset, Scores, check_environment, d4rl_scores

OWN = Path(__file__).parents[2] / "data" / "offline"
GIVEN = os.environ.get("PUREJAX_BILEVEL_REFERENCE_DATA")


def score_files() -> list[Path]:
    return [*OWN.glob("offline_d4rl_scores*.npz"), *(Path(GIVEN).rglob("offline_d4rl_scores*.npz") if GIVEN else ())]


def arrays(rows: int = 12, length: int = 5, **changes: Any) -> dict[str, Any]:
    """Episodes of `length` rows, every second of which terminates."""
    random = np.random.default_rng(0)
    number = np.arange(rows)
    ends = (number + 1) % length == 0
    observations = random.standard_normal((rows + 1, 3)).astype(np.float32)
    following = observations[1:].copy()
    following[ends] += 1.0  # the observation before the reset
    terminal = ends & (number // length % 2 == 0)
    values = {
        "observations": observations[:-1],
        "actions": random.uniform(-1, 1, (rows, 2)).astype(np.float32),
        "rewards": np.arange(rows, dtype=np.float32),
        "next_observations": following,
        "terminals": terminal,
        "timeouts": ends & ~terminal,
    }
    return {**values, **changes}


def write_hdf5(path: Path, entries: dict[str, Any]) -> Path:
    with h5py.File(path, "w") as file:
        for name, value in entries.items():
            file[name] = value
    return path


def write_npz(path: Path, entries: dict[str, Any]) -> Path:
    np.savez(path, **entries)
    return path


def write_minari(path: Path, entries: dict[str, Any], scale: float = 1.0) -> Path:
    """One group per episode, in the folders that Minari makes."""
    (path / "data").mkdir(parents=True)
    ends = np.flatnonzero(entries["terminals"] | entries["timeouts"])
    starts = [0, *(ends + 1)]
    with h5py.File(path / "data" / "main_data.hdf5", "w") as file:
        for number, (begin, end) in enumerate(zip(starts, [*(ends + 1), len(entries["rewards"])], strict=True)):
            if begin == end:
                continue
            group, own = file.create_group(f"episode_{number}"), slice(begin, end)
            group["observations"] = np.concatenate(
                [entries["observations"][own], entries["next_observations"][end - 1 : end]]
            )
            group["actions"] = scale * entries["actions"][own]
            group["rewards"] = entries["rewards"][own]
            group["terminations"], group["truncations"] = entries["terminals"][own], entries["timeouts"][own]
    metadata = {"env_spec": json.dumps({"id": "Task-v3"}), "ref_min_score": -5.0, "ref_max_score": 20.0}
    (path / "data" / "metadata.json").write_text(json.dumps(metadata))
    return path


def same(found: Dataset, expected: dict[str, Any]) -> None:
    names = ("obs", "action", "reward", "next_obs", "terminated", "timeout")
    for name, column in zip(names, COLUMNS, strict=True):
        np.testing.assert_array_equal(getattr(found, name), expected[column], err_msg=name)


# --- layouts ----------------------------------------------------------------------------------------------------------


def test_all_layouts_give_the_same_rows(tmp_path: Path) -> None:
    entries = arrays(rows=60)  # more than ten episodes: their numbers are no text
    flat = dataset_files.load(str(write_hdf5(tmp_path / "flat.hdf5", entries)))
    minari = dataset_files.load(str(write_minari(tmp_path / "minari", entries, scale=2.0)), action_bound=2.0)
    own = dataset_files.load(str(write_npz(tmp_path / "own.npz", entries)))
    for dataset in (flat, minari, own):
        same(dataset, entries)
    assert (flat.environment, minari.environment) == ("", "Task-v3")
    assert minari.score(7.5) == 50.0
    np.testing.assert_array_equal(own.lengths(), [5] * 12)
    np.testing.assert_array_equal(own.returns(), np.arange(60).reshape(12, 5).sum(1))
    assert own.rows.shape == (60, 2 * 3 + 2 + 2)
    np.testing.assert_array_equal(own.rows[:, 3:6], own.next_obs)
    assert own.rows is dataset_files.load(str(tmp_path / "own.npz")).rows


@pytest.mark.parametrize("name", ["saved.npz", "saved.hdf5"])
def test_a_saved_dataset_is_the_same_when_loaded_and_the_same_bytes_when_saved_again(tmp_path: Path, name: str) -> None:
    about = {"environment": "Task-v3", "scores": Scores(-5.0, 20.0, 0.5, 0.25), "about": {"policy": "medium"}}
    loaded = dataset_files.load(str(write_npz(tmp_path / "first.npz", arrays())))
    dataset = Dataset(**{**vars(loaded), **about})  # type: ignore[arg-type]
    path = dataset_files.save(dataset, tmp_path / name)
    found = dataset_files.load(str(path))
    same(found, arrays())
    assert {key: getattr(found, key) for key in about} == about
    assert dataset_files.save(found, tmp_path / f"again_{name}").read_bytes() == path.read_bytes()


def test_without_next_observations_rows_at_ends_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    entries = arrays(rows=13)
    del entries["next_observations"]
    dataset = dataset_files.load(str(write_hdf5(tmp_path / "old.hdf5", entries)))
    kept = [0, 1, 2, 3, 5, 6, 7, 8, 10, 11]
    np.testing.assert_array_equal(dataset.reward, kept)
    np.testing.assert_array_equal(dataset.next_obs, entries["observations"][[row + 1 for row in kept]])
    assert "1 terminal rows are left out" in capsys.readouterr().err
    np.testing.assert_array_equal(dataset.lengths(), [4, 4, 2])


def test_a_subset_keeps_the_order_and_is_drawn_without_replacement(tmp_path: Path) -> None:
    dataset = dataset_files.load(str(write_npz(tmp_path / "own.npz", arrays(rows=50))))
    few = dataset.subset(20, seed=3)
    assert len(few) == 20
    assert (np.diff(few.reward) > 0).all()
    assert not np.array_equal(few.reward, dataset.subset(20, seed=4).reward)
    assert dataset.subset(50) is dataset


# --- scores -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", score_files(), ids=lambda path: path.stem)
def test_scores_of_d4rl(path: Path) -> None:
    reference = np.load(path)
    for index, name in enumerate(reference["names"]):
        expected = reference["scores"][index]
        low, high = float(reference["ref_min"][index]), float(reference["ref_max"][index])
        np.testing.assert_allclose(Scores(low, high).normalised(reference["returns"]), expected, rtol=1e-12)
        assert d4rl_scores(str(name)) == Scores(low, high) or not str(name).startswith(
            ("hopper", "half", "walker", "ant-")
        )


def test_scores_that_anyone_can_check() -> None:
    for name, value, score in (("hopper", 3000, 92.80), ("halfcheetah", 5000, 42.53), ("walker2d", 1000, 21.75)):
        scores = d4rl_scores(f"{name}-medium-v2")
        assert scores is not None
        assert abs(scores.normalised(value) - score) < 0.01
    assert d4rl_scores("hopper") is None
    assert d4rl_scores("hopper-large-v2") is None


def test_a_file_named_after_a_dataset_of_d4rl_has_its_scores(tmp_path: Path) -> None:
    entries = arrays(observations=np.zeros((12, 17)), next_observations=np.zeros((12, 17)), terminals=np.zeros(12))
    dataset = dataset_files.load(str(write_hdf5(tmp_path / "halfcheetah-medium-v2.hdf5", entries)))
    assert dataset.environment == "halfcheetah-medium-v2"
    assert abs(dataset.score(5000.0) - 42.53) < 0.01
    with pytest.raises(UserError, match=r"has no reference scores"):
        dataset_files.load(str(write_npz(tmp_path / "x.npz", arrays()))).score(1.0)


# --- refusals ---------------------------------------------------------------------------------------------------------


NAN = arrays()["rewards"].copy()
NAN[[7, 9]] = np.nan


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"rewards": np.zeros(1)}, "rewards has 1 row, observations has 12"),
        ({"rewards": np.zeros(11)}, "rewards has 11 rows, observations has 12"),
        ({"rewards": NAN}, "rewards has numbers that are not finite in 2 rows, first in row 7"),
        ({"rewards": np.full(12, 1e39)}, "rewards has numbers that are not finite in 12 rows"),
        ({"rewards": np.zeros(12, complex)}, r"rewards must be an array of real numbers, got complex128\[12\]"),
        ({"actions": np.full((12, 2), "0.5")}, "actions must be an array of real numbers, got <U3"),
        ({"terminals": np.float32(1)}, r"terminals must be an array of real numbers, got float32\[\]"),
        ({"about": "[1"}, "is not a whole dataset"),
        ({"ref_min_score": "x", "ref_max_score": 1.0}, "is not a whole dataset"),
        ({"rewards": np.zeros((12, 2))}, "rewards must be one number per row, got 2"),
        ({"next_observations": np.zeros((12, 4))}, "observations have 3 numbers, next_observations 4"),
        ({"observations": np.zeros((12, 2, 2))}, r"observations must be \[rows, numbers\], got \[12, 2, 2\]"),
        ({"actions": np.full((12, 2), 1.5)}, r"actions reach 1.5 in size and must be in \[-1, 1\].*--action_bound"),
        ({"terminals": np.full(12, 2)}, "terminals must be 0 or 1, got 2 among them"),
        (
            {"environment": "Pendulum-v1"},
            "terminals differ from what Pendulum-v1 says .* in 1 of 12 rows, first in row 4",
        ),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    place = write_npz(tmp_path / "bad.npz", arrays(**changes))
    with pytest.raises(UserError, match=sentence):
        dataset_files.load(str(place))


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    whole = write_hdf5(tmp_path / "whole.hdf5", arrays()).read_bytes()
    (tmp_path / "cut.hdf5").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "cut.npz").write_bytes(write_npz(tmp_path / "whole.npz", arrays()).read_bytes()[:1000])
    (tmp_path / "notes.txt").write_text("")
    write_npz(tmp_path / "few.npz", {"observations": np.zeros((3, 2))})
    write_npz(
        tmp_path / "endless.npz", {name: arrays()[name] for name in ("observations", "actions", "rewards", "terminals")}
    )
    for name, sentence in {
        "cut.hdf5": "is not a whole dataset",
        "cut.npz": "is not a whole dataset",
        "notes.txt": "must end in .npz or .hdf5",
        "none.npz": "there is no such file",
        "few.npz": "has no actions, rewards, terminals",
        "endless.npz": "neither timeouts nor next_observations",
        ".": "is a folder: give one of its files .*whole.hdf5",
    }.items():
        with pytest.raises(UserError, match=sentence):
            dataset_files.load(str(tmp_path / name))


@pytest.mark.parametrize("write", [write_npz, write_hdf5])
def test_damaged_files_are_read_or_refused(write: Any, tmp_path: Path) -> None:
    entries = {name: np.asarray(array) for name, array in arrays().items()}
    whole = write(tmp_path / ("whole.npz" if write is write_npz else "whole.hdf5"), entries)
    content, random, told = whole.read_bytes(), np.random.default_rng(0), []
    for place in random.integers(0, len(content), 200):
        damaged = bytearray(content)
        damaged[place] ^= int(random.integers(1, 256))
        whole.write_bytes(bytes(damaged) if place % 5 else content[:place])
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # of zipfile and numpy, about what they then refuse
                dataset_files.load(str(whole))
        except UserError as error:
            told.append(str(error))
    assert 40 < len(told) < 200
    assert not any("\n" in sentence for sentence in told)


def test_minari_episodes_of_wrong_lengths_are_refused(tmp_path: Path) -> None:
    place = write_minari(tmp_path / "minari", arrays())
    with h5py.File(place / "data" / "main_data.hdf5", "a") as file:
        del file["episode_1/actions"]
        file["episode_1/actions"] = np.zeros((3, 2))
    with pytest.raises(UserError, match="episode 1 has 6 observations and 3 actions for 5 rewards"):
        dataset_files.load(str(place))


def test_a_dataset_of_another_environment_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    dataset = dataset_files.load(str(write_npz(tmp_path / "own.npz", arrays(environment="ant-medium-v2"))))
    check_environment(dataset, "ant", 3, 2, 1000)
    assert "the physics may be another" in capsys.readouterr().err
    for arguments, sentence in (
        (("Pendulum-v1", 3, 2), "is a dataset of ant-medium-v2, not of --env_name Pendulum-v1"),
        (("ant", 4, 2), "observations have 3 numbers, those of --env_name ant have 4"),
        (("ant", 3, 1), "actions have 2 numbers, those of --env_name ant have 1"),
        (("ant", 3, 2, 4), "an episode has 5 rows, and the time limit of ant is 4 steps"),
    ):
        with pytest.raises(UserError, match=sentence):
            check_environment(dataset, *arguments)

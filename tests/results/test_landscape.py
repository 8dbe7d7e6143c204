"""The landscape of a search: its table, cell by cell, and its figure."""

import csv
from pathlib import Path

import matplotlib
import numpy as np
import pandas
import pytest
from matplotlib.image import imread

from purejax_bilevel.errors import UserError
from purejax_bilevel.members import Axis
from purejax_bilevel.results import dataset as datasets
from purejax_bilevel.results import landscape
from purejax_bilevel.results.__main__ import main
from tests.results.test_report import LR, SEEDS, STEPS, make

TAU = Axis(("tau",), ((0.01,), (0.02,), (0.5,)))
LEVELS = np.arange(2 * 3 * len(SEEDS), dtype=float).reshape(6, -1)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    datasets.save(make(LEVELS, (LR, TAU)), tmp_path / datasets.FILE_NAME)
    return tmp_path


def test_the_table_has_every_setting_seed_and_evaluation(place: Path) -> None:
    dataset = datasets.load(place)
    dataset["evaluation_return"][0, 0, 0, -1] = np.nan
    path = landscape.write_table(dataset, place / "new" / "table.csv")
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["hp_config.lr", "hp_config.tau", "budget", "seed", "performance"]
    assert len(rows) == 6 * len(SEEDS) * len(STEPS)
    assert rows[len(STEPS) - 1]["performance"] == ""
    table = pandas.read_csv(path)
    for number in (1, 4):
        lr, tau = LR.values[number // 3][0], TAU.values[number % 3][0]
        own = table[(table["hp_config.lr"] == lr) & (table["hp_config.tau"] == tau) & (table.seed == SEEDS[1])]
        assert own.budget.tolist() == list(STEPS)
        np.testing.assert_allclose(own.performance, LEVELS[number, 1] * np.array(STEPS) / STEPS[-1])


def test_the_best_setting_lies_on_top(place: Path) -> None:
    """Six settings at two values of tau alone would hide each other: those drawn last are the best."""
    names, points = landscape._points(datasets.load(place), ("tau", "lr"))
    assert names == ("tau", "lr")
    np.testing.assert_array_equal(points[0], [0.01, 0.02, 0.5] * 2)
    assert [landscape._scale(values) for values in points] == ["log", "linear"]
    assert landscape._best_last(np.array([3.0, np.nan, 9.0, -1.0])).tolist() == [1, 3, 0, 2]


def test_of_settings_at_one_place_the_best_is_seen(tmp_path: Path) -> None:
    """Higher or lower as the measure has it: the colour in the middle is that of the best."""
    levels = np.repeat([[1.0], [9.0], [5.0], [2.0]], len(SEEDS), axis=1)
    same = make(levels, (LR, Axis(("tau",), ((0.01,), (0.02,)))))
    same = same.assign_coords(lr=("lr", [1e-3, 1e-3]), tau=("tau", [0.02, 0.02]))
    pictures = [
        imread(landscape.draw(same, tmp_path / f"{name}.png", (), name)) for name in ("evaluation_return", "error")
    ]
    high, low = matplotlib.colormaps["viridis"]([1.0, 0.0])[:, :3]
    for picture, shown, hidden in zip(pictures, (high, low), (low, high), strict=True):
        panels = picture[:, : int(0.8 * picture.shape[1]), :3].reshape(-1, 3)  # without the bar of colours
        assert (np.abs(panels - shown).max(1) < 0.02).sum() > 50
        assert not (np.abs(panels - hidden).max(1) < 0.02).any()


def test_the_command_writes_both(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    table, figure = tmp_path / "a.csv", tmp_path / "a.png"
    words = ["landscape", str(place), "--table", str(table), "--figure", str(figure), "--variable", "error"]
    assert main(words) == 0
    assert capsys.readouterr().out.split() == [str(table), str(figure)]
    assert -pandas.read_csv(table).performance.min() == LEVELS.max()
    assert imread(figure).std() > 0.05


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--axes", "lr", "alpha"], "over two hyper-parameters with several numbers; these results have lr, tau."),
        (["--variable", "final_return"], "final_return is not one number at each evaluation"),
        (["--variable", "nothing"], "nothing"),
    ],
)
def test_what_is_no_landscape_is_refused(
    words: list[str], sentence: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    rest = ["--table", str(tmp_path / "a.csv"), "--figure", str(tmp_path / "a.png")]
    assert main(["landscape", str(place), *rest, *words]) == 2
    assert sentence in capsys.readouterr().err


def test_a_single_setting_is_no_landscape(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="these results have lr"):
        landscape.draw(make(LEVELS[:2]), tmp_path / "a.png")

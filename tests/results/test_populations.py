"""Populations in results: who descends from whom, which values the best one ended with, and which members are drawn."""

from pathlib import Path

import numpy as np
import pytest
import xarray

from purejax_bilevel.members import Axis, Grid
from purejax_bilevel.results import dataset as datasets
from purejax_bilevel.results import populations
from purejax_bilevel.results.analysis import Reporting, analyse
from purejax_bilevel.results.document import Paragraph, Picture, Table

# Row by row whom each of four individuals went on from: 3 is copied over 0, then 0 over 1 and 2, then 1 over 0.
PARENTS = np.array([[0, 1, 2, 3], [3, 1, 2, 3], [0, 0, 0, 3], [1, 1, 2, 3]])
RATES = np.array([[1, 2, 3, 4], [5, 2, 3, 4], [5, 6, 7, 4], [8, 6, 7, 4]]) / 10
LEVELS = (7, 8)  # two tasks


@pytest.fixture
def dataset() -> xarray.Dataset:
    """Two levels x two seeds; the rates of a member are as many times as large as its number and one."""
    grid = Grid((Axis(("level",), tuple((level,) for level in LEVELS)),), (0, 1))
    factor = np.arange(1, 5)[:, None, None]
    score = factor * np.array([[1.0, 2, np.nan, 4], [5, 2, 3, 4], [5, 6, 7, 4], [8, 6, 7, 4]])
    series = {
        "score": score[..., 0],
        "population_score": score,
        "population_lr": factor * RATES,
        "parent": np.tile(PARENTS, (4, 1, 1)),
        "best_individual": np.tile([0, 0, 1, 2], (4, 1)),
    }
    about = {"population": 4, "interval": 10, "fraction": 0.2}
    space = [{"name": "lr", "low": 0.1, "high": 4.0, "scale": "log"}]
    attrs = {"headline": "score", "selected_by": "score", "selected_over": 0.0, "program": "Toy", "tasks": ["level"]}
    described = {name: {"dims": ("individual",)} for name in ("population_score", "population_lr", "parent")}
    attrs |= {datasets.POPULATIONS: {**about, "space": space}}
    finals = {"failed": np.zeros(4, bool)}
    return datasets.build_dataset(grid, [10, 20, 30, 40], series, finals, attrs, described)


def test_the_lineage_of_the_best_one_is_followed_to_the_start(dataset: xarray.Dataset) -> None:
    found = populations.history(dataset, 2)
    np.testing.assert_allclose(found.settings["lr"], 3 * RATES)
    assert populations.lineage(found).tolist() == [3, 0, 2, 2]
    assert populations.final_settings(found) == {"lr": pytest.approx(3 * 0.7)}
    assert populations.lineage(found._replace(best=np.array([0, 0, 0, 0]))).tolist() == [3, 0, 1, 0]
    assert populations.lineage(found._replace(best=np.array([0, 0, 0, 3]))).tolist() == [3, 3, 3, 3]


def test_a_report_shows_members_by_their_own_names(dataset: xarray.Dataset, tmp_path: Path) -> None:
    agent = analyse("mine", dataset, [], Reporting(variable="score"))
    blocks = populations.blocks([agent], False, lambda name: tmp_path / name)
    (picture,) = (block for block in blocks if isinstance(block, Picture))
    assert picture.path.read_bytes().startswith(b"\x89PNG")
    (table,) = (block for block in blocks if isinstance(block, Table))
    names = ["level=7, seed 0", "level=8, seed 0", "level=7, seed 1", "level=8, seed 1"]
    assert [row[0] for row in table.rows] == names
    assert [row[1] for row in table.rows] == ["8", "24", "16", "32"]  # members 0, 2, 1, 3
    assert [row[2] for row in table.rows] == ["0.7", "2.1", "1.4", "2.8"]
    (paragraph,) = (block for block in blocks if isinstance(block, Paragraph))
    assert "4 individuals, which take 4 times the steps" in paragraph.text
    del dataset.attrs[datasets.POPULATIONS]
    assert populations.blocks([agent], False, lambda name: tmp_path / name) == []


def test_best_median_and_worst_are_drawn() -> None:
    scores = np.array([3.0, np.nan, 1.0, 5.0, 4.0, 2.0])
    assert populations.shown(scores, False) == [(3, "best"), (0, "median"), (2, "worst")]
    assert populations.shown(scores, True) == [(2, "best"), (0, "median"), (3, "worst")]
    assert populations.shown(scores[:1], False) == [(0, "")]
    assert populations.shown(np.array([1.0, 2.0]), False) == [(1, "best"), (0, "worst")]
    assert populations.shown(np.full(3, np.nan), False) == [(0, "")]


def test_lines_have_the_values_and_copies_lead_to_their_parents(dataset: xarray.Dataset, monkeypatch) -> None:
    drawn = []
    monkeypatch.setattr(populations.plots, "_write", lambda figure, path: drawn.append(figure) or path)
    populations.schedules(dataset, [0], ["one"], "unwritten.png")
    setting, headline, _ = drawn[0].axes
    stays, copies = (lines.get_segments() for lines in setting.collections)
    np.testing.assert_allclose([segment[:, 1] for segment in stays], np.repeat(RATES.ravel(), 2).reshape(-1, 2))
    assert {tuple(np.unique(segment[:, 0])) for segment in stays} == {(0, 10), (10, 20), (20, 30), (30, 40)}
    np.testing.assert_allclose(
        copies, [[(10, 0.4), (10, 0.5)], [(20, 0.5), (20, 0.6)], [(20, 0.5), (20, 0.7)], [(30, 0.6), (30, 0.8)]]
    )
    np.testing.assert_allclose(setting.lines[0].get_ydata(), [0.4, 0.4, 0.5, 0.7, 0.7])
    np.testing.assert_allclose(headline.lines[0].get_ydata(), [4, 5, 7, 7])
    (joined,) = headline.collections
    assert joined.get_segments()[0].tolist() == [[10, 4], [20, 5]]  # 0 went on from 3

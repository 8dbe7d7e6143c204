"""Scores over a baseline's, task by task: the numbers, and what a report shows of them."""

from pathlib import Path

import numpy as np
import pytest

from purejax_bilevel.members import Axis
from purejax_bilevel.results import plots, relative, statistics
from purejax_bilevel.results.analysis import AgentResult, Reporting, analyse
from purejax_bilevel.results.document import Block, Paragraph, Table
from tests.results.test_report import make

LEVEL = Axis(("level",), ((0,), (1,), (2,)))
MODE = Axis(("env_name",), (("small",), ("dense",)))
BASE = np.array([[1.0, 3.0, 2.0, 2.0, 1.0, 3.0], [10.0] * 6, [-1.0, 1.0, 0.0, 0.0, -2.0, 2.0]])  # means 2, 10, 0


@pytest.fixture(autouse=True)
def coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small pictures, for speed."""
    monkeypatch.setitem(plots.STYLE, "savefig.dpi", 40)


def agent(label: str, levels: np.ndarray, axes: tuple[Axis, ...] = (LEVEL,)) -> AgentResult:
    return analyse(label, make(levels, axes), [], Reporting())


def tables(blocks: list[Block]) -> list[Table]:
    return [block for block in blocks if isinstance(block, Table)]


def test_scores_are_multiples_of_the_baselines_mean_on_their_task():
    runs = np.array([[1.0, 20.0, 5.0], [4.0, np.nan, 5.0]])
    found = relative.normalised(runs, BASE.T, lower=False)
    np.testing.assert_allclose(found, [[0.5, 2.0, np.nan], [2.0, np.nan, np.nan]])
    found = relative.normalised(runs, BASE.T, lower=True)
    np.testing.assert_allclose(found, [[2.0, 0.5, np.nan], [0.5, np.nan, np.nan]])


def test_a_report_has_all_tasks_together_and_each(tmp_path: Path):
    base, other = agent("a2c", BASE), agent("lpg", np.stack([BASE[0] * 1.5, BASE[1] / 2, BASE[2]]))
    blocks = relative.blocks([base, other], base, False, "final return", tmp_path / "x.png")
    together, each = tables(blocks)
    own = np.stack([BASE[0] * 0.75, np.full(6, 0.5)], axis=1)
    assert together.rows[1][:3] == ("lpg", statistics.stratified_bootstrap_interval(own).in_words(), "1")
    assert together.rows[1][3] == "50 %"  # all six runs of the first task, none of the second
    assert [row[0] for row in each.rows] == ["level=0", "level=1", "level=2"]
    assert each.rows[1][2] == "0.5 (0.5 to 0.5)"
    assert each.rows[2][1:] == ("all failed", "all failed")
    (text,) = (block.text for block in blocks if isinstance(block, Paragraph))
    assert text.endswith("Without 1 task of 3, on which that mean is not above 0.")
    assert (tmp_path / "x.png").stat().st_size > 0


def test_levels_of_several_environments_are_one_row_for_each(tmp_path: Path):
    levels = np.concatenate([np.tile(BASE[:1], (3, 1)), np.tile(BASE[1:2], (3, 1))])
    base = agent("a2c", levels, (MODE, LEVEL))
    _, each = tables(relative.blocks([base], base, False, "final return", tmp_path / "x.png"))
    assert [row[0] for row in each.rows] == ["env_name=small", "env_name=dense"]


def test_without_anything_to_divide_by_it_says_so(tmp_path: Path):
    base = agent("a2c", -np.abs(BASE))
    _, text = relative.blocks([base], base, False, "final return", tmp_path / "x.png")
    assert text == Paragraph("a2c is not above 0 on any task: there is nothing to divide by.")

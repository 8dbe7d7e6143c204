"""Several finished runs side by side: their list, and one table and one figure of some."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from purejax_bilevel.results import dataset as datasets
from purejax_bilevel.results import runs, statistics
from purejax_bilevel.results.__main__ import main
from tests.results.test_report import SEEDS, make

LOW, HIGH = np.arange(6.0), np.arange(6.0) + 3


def saved(folder: Path, *levels: np.ndarray, agent: str = "", **changes: Any) -> Path:
    """A finished run with two settings, or an agent of a sweep."""
    place = folder / agent if agent else folder
    place.mkdir(parents=True)
    (folder / "config.yaml").write_text("{}")
    about = {"title": f"omd-{folder.name}", **({"agent": agent} if agent else {})}
    datasets.save(make(np.stack(levels), **about, **changes), place / datasets.FILE_NAME)
    return folder


def shown(capsys: pytest.CaptureFixture) -> list[list[str]]:
    """Cells of the printed table's rows."""
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


def test_runs_are_compared_setting_by_setting(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folders = [saved(tmp_path / "a", LOW, HIGH), saved(tmp_path / "b", HIGH, LOW - 9)]
    figure = tmp_path / "both.png"
    assert main(["compare", *map(str, folders), "--figure", str(figure)]) == 0
    rows = shown(capsys)
    assert [row[:2] for row in rows] == [["a", "lr=0.01"], ["a", "lr=0.001"], ["b", "lr=0.001"], ["b", "lr=0.01"]]
    assert rows[0][2].startswith(f"{statistics.iqm(HIGH):.4g} (")
    better = statistics.probability_of_improvement(LOW, HIGH)
    assert rows[0][5] == ""
    assert rows[1][5] == f"{better.estimate:.2f} ({better.low:.2f} to {better.high:.2f})"
    assert rows[2][5].startswith("0.50 (")
    assert imread(figure).std() > 0.01


def test_a_variable_of_which_less_is_better(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = saved(tmp_path / "a", LOW, HIGH)  # the error is the negative of the return
    words = ["compare", str(folder), "--variable", "error", "--over", "1", "--figure", str(tmp_path / "x.png")]
    assert main(words) == 0
    first, second = shown(capsys)
    assert first[1] == "lr=0.01"
    assert second[5].startswith("0.1")


def test_agents_of_a_sweep_and_failed_members(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = saved(tmp_path / "s", LOW, HIGH, agent="omd", failed=(0,))
    saved_again = make(np.stack([HIGH, LOW]), agent="mle")
    (folder / "mle").mkdir()
    datasets.save(saved_again, folder / "mle" / datasets.FILE_NAME)
    assert main(["compare", str(folder), "--figure", str(tmp_path / "x.png")]) == 0
    rows = shown(capsys)
    assert {row[0] for row in rows} == {"s: mle", "s: omd"}
    assert [row[4] for row in rows if row[:2] == ["s: omd", "lr=0.001"]] == ["1"]


def test_names_that_are_taken_twice_are_paths(tmp_path: Path) -> None:
    folders = [saved(tmp_path / place / "run", LOW, HIGH) for place in ("x", "y")]
    table = runs.compare(folders, tmp_path / "x.png")
    names = list(table.columns[0].cells)
    assert names == [str(folders[0])] * 2 + [str(folders[1])] * 2


def test_runs_are_listed_and_unfinished_ones_told(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    saved(tmp_path / "a", LOW, HIGH)
    (tmp_path / "stopped").mkdir()
    (tmp_path / "stopped" / "config.yaml").write_text("{}")
    assert main(["list", str(tmp_path)]) == 0
    rows = {row[0]: row for row in shown(capsys)}
    assert rows["a"][1:4] == ["omd-a", str(2 * len(SEEDS)), "40"]
    assert rows["a"][4].startswith(f"final return {statistics.iqm(HIGH):.4g} (")
    assert rows["stopped"][1] == "not finished: go on with --resume"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["list", "nowhere"], "nowhere holds no runs: name the folder"),
        (["compare", "nowhere"], "nowhere holds no results: name the folder of a finished run or sweep."),
        (["compare", "a", "--variable", "loss"], "the results hold no variable 'loss'; there is "),
        (["compare", "a", "--figure", "x.docx"], "cannot draw x.docx: the ending has to be one of"),
    ],
)
def test_bad_input_is_one_sentence(
    words: list[str],
    sentence: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    saved(tmp_path / "a", LOW, HIGH)
    assert main(words) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1

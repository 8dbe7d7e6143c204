"""What is made of the results of offline agents, from datasets alone: figures, the bandit's command, columns."""

import json
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray
from matplotlib.axes import Axes

from purejax_bilevel.errors import UserError
from purejax_bilevel.members import Axis, Grid
from purejax_bilevel.programs.offline import __main__ as commands
from purejax_bilevel.programs.offline import columns, figures
from purejax_bilevel.results import dataset as datasets

LAMBDAS, SEEDS, STEPS = (0.0, 0.5, 2.0), (0, 1), (10, 20, 30)


def results(program: str = "Offline", **config: Any) -> xarray.Dataset:
    """Scores of 3 lambdas x 2 seeds that are best at the second of three rows: 10 lambda + seed + (0, 5, 2)."""
    member = np.array([10.0 * value + seed for value in LAMBDAS for seed in SEEDS])
    rows = member[:, None] + np.array([0.0, 5.0, 2.0])
    names = ("score", "evaluation_return", "value_gap", "return_gap", "model_loss", "entropy", "policy_loss", "q_loss")
    series = {name: number * 100.0 + rows for number, name in enumerate(names)}
    episodes = member[:, None] + np.array([-1.0, 0.0, 1.0, np.nan])
    finals = {"final_score": episodes, "failed": np.zeros(len(member), bool)}
    attributes = {
        "program": program,
        "title": "mopo",
        "headline": "evaluation_return",
        "config": {"units": "relative", **config},
    }
    grid = Grid((Axis(("pessimism",), tuple((value,) for value in LAMBDAS)),), SEEDS)
    return datasets.build_dataset(grid, STEPS, series, finals, attributes, {"score": {"long_name": "normalised score"}})


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """Heights of all lines by their labels."""
    found: dict[str, np.ndarray] = {}
    original = Axes.plot

    def plot(self: Axes, *arguments: Any, **options: Any) -> Any:
        lines = original(self, *arguments, **options)
        found.setdefault(str(options.get("label")), np.asarray(lines[0].get_ydata()))
        return lines

    monkeypatch.setattr(Axes, "plot", plot)
    return found


def test_scores_and_gaps_against_lambda(drawn: dict[str, np.ndarray], tmp_path: Path):
    """Means over seeds, of the last row and of the best one."""
    path = figures.FIGURES["pessimism"]({"mopo": results()}, tmp_path / "pessimism.png")
    assert path.stat().st_size > 10_000
    expected = 10 * np.array(LAMBDAS) + 0.5 + 2
    np.testing.assert_allclose(drawn["mopo"], expected)
    np.testing.assert_allclose(drawn["mopo, best snapshot"], expected + 3)


def test_a_run_draws_what_varies_in_it(tmp_path: Path):
    figures.write_figures(results(), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"learning_curves.png", "pessimism.png"}


def test_the_bandit_has_a_command(tmp_path: Path, capsys: pytest.CaptureFixture):
    """Of a sweep's agents, each a run; the best of 6 policies is found, 20 + 1 on average."""
    for name in ("mopo", "morel"):
        datasets.save(results(), tmp_path / "sweep" / name)
    words = [
        "bandit",
        str(tmp_path / "sweep"),
        "--episodes",
        "60",
        "--repeats",
        "20",
        "--output",
        str(tmp_path / "b.png"),
    ]
    assert commands.main(words) == 0
    assert (tmp_path / "b.png").stat().st_size > 10_000
    curve = commands.protocol.bandit(commands.protocol.returns_of(results(), "final_score"), 60, repeats=20)
    assert curve.mean[-1] == 21.0
    assert "morel" in capsys.readouterr().out
    assert commands.main(["bandit", str(tmp_path / "nowhere")]) == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("program", "epochs", "steps"), [("Online", [1, 2, 3], STEPS), ("Offline", [-2, -1, 0], [-20, -10, 0])]
)
def test_columns_of_the_original(program: str, epochs: list[int], steps: list[int], tmp_path: Path):
    written = columns.write(results(program), tmp_path)
    assert len(written) == 6
    path = tmp_path / "mopo-2" / "mopo-2-s1" / "progress.txt"
    assert path in written
    header, *rows = (line.split("\t") for line in path.read_text().splitlines())
    assert header == [
        "Epoch",
        "AverageTestEpRet",
        "TotalEnvInteracts",
        "AverageLossEnvModel",
        "AverageLogPi",
        "LossPi",
        "LossQ",
    ]
    table = np.array(rows, float)
    np.testing.assert_array_equal(table[:, 0], epochs)
    np.testing.assert_array_equal(table[:, 2], steps)
    np.testing.assert_array_equal(table[:, 1], [121, 126, 123])
    np.testing.assert_array_equal(table[:, 4], [-521, -526, -523])
    about = json.loads(path.with_name("config.json").read_text())
    assert (about["pessimism"], about["seed"], about["exp_name"]) == (2.0, 1, "mopo-2")
    with pytest.raises(UserError, match="has no returns of evaluations"):
        columns.write(results().drop_vars("evaluation_return"), tmp_path)


def test_first_steps_at_a_level():
    """Returns are 100 + 10 lambda + seed + (0, 5, 2)."""
    place = Path(__file__).parents[2] / "benchmarks" / "online_steps.py"
    first_steps = runpy.run_path(str(place))["first_steps"]
    np.testing.assert_array_equal(first_steps(results(), 124.0), [[np.inf, np.inf], [np.inf, np.inf], [20, 20]])
    np.testing.assert_array_equal(first_steps(results(), 105.0)[1], [10, 10])

"""Reports: settings are chosen on seeds that are not reported, the numbers are rliable's, nothing failed is hidden."""

import base64
import html.parser
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray
import yaml
from matplotlib.image import imread
from matplotlib.text import Text

from purejax_bilevel.members import Axis, Grid
from purejax_bilevel.results import analysis, comparison, outputs, plots, report, statistics
from purejax_bilevel.results import dataset as datasets
from purejax_bilevel.results.__main__ import main
from purejax_bilevel.results.analysis import Reporting, Sensitivity, reporting
from purejax_bilevel.results.statistics import Estimate

STEPS = np.array([10, 20, 30, 40])
SEEDS = (0, 1, 2, 3, 4, 5)
LR = Axis(("lr",), ((1e-3,), (1e-2,)))
TAU = Axis(("tau",), ((0.1,), (0.5,), (0.9,)))


@pytest.fixture(autouse=True)
def coarse(monkeypatch) -> None:
    """Small pictures, for speed."""
    monkeypatch.setitem(plots.STYLE, "savefig.dpi", 40)


def make(levels: np.ndarray, axes: tuple[Axis, ...] = (LR,), failed: tuple = (), **attrs: Any):
    """A dataset whose members end at the given scores `[settings, seeds]`."""
    grid = Grid(axes, SEEDS)
    ends = np.asarray(levels, float).reshape(len(grid))
    curves = ends[:, None] * STEPS / STEPS[-1]
    flags = np.zeros(len(grid), bool)
    flags[list(failed)] = True
    about = {
        "program": "Toy",
        "environment": "CartPole-v1",
        "headline": "evaluation_return",
        "step_name": "environment steps",
        "compile_seconds": 1.5,
        "run_seconds": 20.0,
        "bytes_per_member": 1000,
        "versions": {"jax": "0.10.2", "device": "2 x cpu (cpu)"},
        "selection_seeds": [0, 1, 2],
        "selected_by": "final_return",
        "selected_over": 0.0,
        "sub_programs": 2,
        "devices": 2,
        **attrs,
    }
    series = {"evaluation_return": curves, "error": -curves}
    finals = {"final_return": ends[:, None] + [-1.0, 1.0], "failed": flags}
    described = {"error": {"better": "lower"}, "final_return": {"long_name": "return at the end"}}
    return datasets.build_dataset(grid, STEPS, series, finals, about, described)


def analyse(dataset, **changes: Any) -> analysis.AgentResult:
    return analysis.analyse("omd", dataset, [0, 1, 2], Reporting(**changes))


# The second setting wins on the choosing seeds, the first on the others.
CROSSED = np.array([[10, 20, 30, 90, 80, 70], [40, 50, 60, 1, 2, 3]])


def test_the_best_setting_is_chosen_on_seeds_that_are_not_reported():
    agent = analyse(make(CROSSED))
    assert agent.settings[agent.best] == {"lr": 1e-2}
    np.testing.assert_array_equal(agent.best_runs[:, 0], [1, 2, 3])
    np.testing.assert_array_equal(agent.quality, [20, 50])


def test_what_is_measured_at_the_end_is_reported_whatever_its_dimensions():
    dataset = make(CROSSED)
    assert analysis.reported_variable(dataset, Reporting()) == "final_return"
    levels = dataset.rename(episode="level")
    levels[analysis.SELECTION] = levels["final_return"].isel(level=0)
    assert analysis.reported_variable(levels, Reporting()) == "final_return"
    assert analysis.reported_variable(dataset.drop_vars("final_return"), Reporting()) == "evaluation_return"


def test_one_setting_is_reported_on_all_seeds():
    agent = analyse(make(CROSSED[:1], ()))
    np.testing.assert_array_equal(agent.best_runs[:, 0], CROSSED[0])
    assert len(agent.chosen_on) == 0


def test_another_variable_may_choose_and_lower_may_be_better():
    agent = analyse(make(CROSSED, selected_by="error"))
    assert agent.best == 1  # error is minus the return
    agent = analyse(make(-CROSSED, selected_by="error"), variable="error")
    assert agent.best == 0
    np.testing.assert_array_equal(agent.best_runs[:, 0], [90, 80, 70])


def test_series_are_averaged_over_the_last_part():
    agent = analyse(make(CROSSED), variable="evaluation_return", over=0.5)
    np.testing.assert_allclose(agent.scores[..., 0], CROSSED * (0.75 + 1.0) / 2)


def test_a_setting_that_failed_while_choosing_loses():
    agent = analyse(make(CROSSED, failed=(6,)))
    assert agent.best == 0
    assert np.isnan(agent.scores[1, 0, 0])
    assert np.isnan(agent.quality[1])
    everywhere = analyse(make(CROSSED, failed=(0, 1, 6)))
    assert everywhere.best == 1  # fewer failures


def test_a_search_has_chosen_already():
    dataset = make(CROSSED)
    dataset[analysis.SELECTION] = (("lr", "seed"), np.repeat([[3.0], [1.0]], 6, 1), {"better": "lower"})
    agent = analyse(dataset)
    assert agent.best == 1
    np.testing.assert_array_equal(agent.best_runs[:, 0], CROSSED[1])


def test_a_task_is_never_a_best_setting(tmp_path):
    """The second environment pays more whatever the setting: it must not decide."""
    levels = np.stack([CROSSED, CROSSED[::-1] * 0 + np.array([[2000], [1000]])], axis=1)
    names = Axis(("env_name",), (("Acrobot-v1",), ("CartPole-v1",)))
    dataset = make(levels, (LR, names), failed=(11,))
    agent = analyse(dataset)
    assert agent.settings == [{"lr": 1e-3}, {"lr": 1e-2}]
    assert agent.best == 0
    np.testing.assert_array_equal(agent.best_runs, np.stack([CROSSED[0, 3:], [2000, 2000, np.nan]], axis=1))
    text, _ = write(tmp_path, {"omd": dataset, "mle": make(levels + 1, (LR, names))})
    assert "on Acrobot-v1, CartPole-v1, 40 environment steps" in text
    assert "omd: env_name=CartPole-v1, lr=0.001, seed=5" in text
    before, _, rest = text.partition("## By task")
    by_task, _, after = rest.partition("\n## ")
    assert "| env_name=" not in before + after
    assert "| env_name=Acrobot-v1 | 80 (70 to 90) | 81 (71 to 91) |" in by_task


def test_sensitivity_takes_the_best_of_the_others():
    levels = np.zeros((2, 3, 6))
    levels[0, :, :3], levels[0, :, 3:] = np.array([[1], [9], [2]]), np.array([[5], [6], [7]])
    levels[1, :, :3], levels[1, :, 3:] = np.array([[3], [2], [8]]), np.array([[1], [2], [3]])
    agent = analyse(make(levels, (LR, TAU)))
    line = analysis.along(agent, "lr")
    assert line.values == (1e-3, 1e-2)
    assert [score.estimate for score in line.scores] == [6.0, 3.0]
    assert [score.estimate for score in analysis.along(agent, "tau").scores] == [1.0, 6.0, 3.0]
    assert analysis.along(agent, "beta").values == ()
    # As in the table: the seeds that did not choose.
    alone = analysis.along(analyse(make(CROSSED)), "lr")
    assert [score.estimate for score in alone.scores] == [float(statistics.iqm(row[3:])) for row in CROSSED]


def test_settings_of_a_random_search_are_all_shown():
    axis = Axis(("lr", "tau"), ((0.1, 0.5), (0.2, 0.5)))
    line = analysis.along(analyse(make(CROSSED, (axis,))), "lr")
    assert (line.values, line.joined) == ((0.1, 0.2), False)


# ---------------------------------------------------------------- documents


def test_solvers_that_did_not_solve_have_a_section(tmp_path):
    config = {"with_inv_jac": "cg", "damping": 1e-5, "solver_steps": 5}
    dataset = make(CROSSED, config=config)
    assert "did not solve" not in write(tmp_path, {"omd": dataset})[0]
    residual = np.full((2, len(SEEDS), len(STEPS)), 0.01)
    residual[1] = 0.8
    dataset["solver_residual"] = ("lr", "seed", "step"), residual
    _, page = write(tmp_path, {"omd": dataset})
    assert "Linear solvers that did not solve" in page
    assert re.findall(r"omd, lr.*?left a relative residual of 0\.8", page) == [
        "omd, lr=0.01: the solver cg left a relative residual of 0.8"
    ]


def write(folder: Path, agents: dict[str, Any], **changes: Any) -> tuple[str, str]:
    files = []
    for number, (label, dataset) in enumerate(agents.items()):
        files.append(datasets.save(dataset.assign_attrs(agent=label), folder / f"agent_{number}"))
    (folder / "command.txt").write_text("python sweep.py <b>&\n")
    sweep = {"name": "my_study", "agents": list(agents), **changes}
    datasets.write_text(folder / "config.yaml", yaml.safe_dump({"sweep": sweep}))
    report.write(folder, "my_study", reporting(changes.get("report")), files)
    return (folder / report.MARKDOWN).read_text(), (folder / report.HTML).read_text()


class Reader(html.parser.HTMLParser):
    """Collects text and images, and checks that tags are balanced."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images: list[str] = []
        self.links: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.images += [value for name, value in attrs if name == "src"]
        self.links += [value for name, value in attrs if name == "href"]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def two(tmp_path) -> tuple[Path, str, str]:
    agents = {"omd": make(CROSSED, failed=(11,)), "mle <&|>": make(CROSSED + 100)}
    figures = [{"kind": "sensitivity", "axis": "lr", "title": "My figure"}, {"kind": "curves", "variable": "error"}]
    return tmp_path, *write(tmp_path, agents, report={"figures": figures})


def test_numbers_of_the_report(two):
    _, text, _ = two
    assert "24 members (2 agents, 4 settings, 6 seeds) of the program Toy on CartPole-v1, 40 environment steps" in text
    assert "on the seeds 0 to 2, reported on the others, 3 to 5" in text
    # omd: seeds 3 and 4 of the second setting, 1 and 2; the failed fifth is left out.
    assert "| omd | lr=0.01 | 1.5 (1 to 2) | 498.5 | 2 | 1 of 12 |" in text
    assert "| **mle &lt;&amp;\\|&gt;** | **lr=0.01** | **102 (101 to 103)** | **398** | **3** | **0 of 12** |" in text
    assert "| omd | mle &lt;&amp;\\|&gt; | 0.00 (0.00 to 0.00) |" in text
    assert "1 of 24 members diverged" in text
    assert "omd: lr=0.01, seed=5" in text
    for fact in (
        "0.10.2",
        "2 x cpu (cpu), 2 used",
        "2 sub-programs in one call, 1.5 s",
        "20.0 s",
        "python sweep.py <b>&",
    ):
        assert fact in text


def test_figures_of_the_report_exist_and_are_shown(two):
    folder, text, _ = two
    linked = re.findall(r"!\[[^\]]*\]\(([^)]*)\)", text)
    assert linked[:2] == ["figures/study-0.png", "figures/study-1.png"]
    assert set(linked) == {f"figures/{path.name}" for path in (folder / report.FIGURES).iterdir()}
    assert {"figures/curves.png", "figures/profiles.png", "figures/improvement.png"} <= set(linked)
    for name in linked:
        assert imread(folder / name).std() > 0.02, name


def test_the_page_is_complete_in_one_file(two):
    _, text, page = two
    reader = Reader()
    reader.feed(page)
    assert reader.open == []
    assert not reader.links
    assert len(reader.images) == text.count("![")
    for image in reader.images:
        assert image.startswith("data:image/png;base64,")
        assert base64.b64decode(image.split(",")[1])[:4] == b"\x89PNG"
    assert "mle <&|>" in reader.text
    assert "python sweep.py <b>&" in reader.text
    assert "my study" in reader.text


HOSTILE = r"omd $\nothing$ [/x] `<script>alert(1)</script>"


def test_labels_and_titles_are_shown_as_written(tmp_path, monkeypatch):
    """A dollar is no mathematics, a tag no HTML, a bracket no link: also where the label is a tick of an axis."""
    figures = drawn(monkeypatch)
    shown = [
        {"kind": "sensitivity", "axis": "lr", "title": HOSTILE},
        {"kind": "curves", "variable": "error", "title": HOSTILE},
    ]
    name = Axis(("smoothing",), ((HOSTILE,), ("none",)))
    agents = {HOSTILE: make(CROSSED, (name,)), "mle": make(CROSSED)}
    text, page = write(tmp_path, agents, report={"figures": shown})
    assert "<script>" not in text.replace("```", "").split("## Failed")[0]
    assert "\\[/x\\] \\`&lt;script&gt;" in text
    assert "<script>" not in page
    assert len(figures) >= 5
    for figure in figures:
        texts = [found for found in figure.findobj(Text) if "$" in found.get_text() and "omd" in found.get_text()]
        assert not any(found.get_parse_math() for found in texts)


def test_powers_of_ten_are_still_drawn_as_such(monkeypatch, tmp_path):
    figures = drawn(monkeypatch)
    wide = np.array([[1.0, 10.0, 1e5]] * 3)
    series = [(label, STEPS[:3], wide[..., None]) for label in ("omd", "mle")]
    comparison.curves(series, "steps", "regret", tmp_path / "a.png")
    (panel,) = figures[0].axes
    ticks = [label for label in panel.get_yticklabels() if "$" in label.get_text()]
    assert ticks
    assert all(label.get_parse_math() for label in ticks)


def test_figures_of_an_earlier_report_are_removed(two):
    folder, _, _ = two
    figures = folder / report.FIGURES
    (figures / "own.png").write_bytes(b"")  # of somebody else
    before = {path.name for path in figures.iterdir()}
    text, _ = write(folder, {"omd": make(CROSSED)})
    after = {path.name for path in figures.iterdir()}
    assert before - after
    assert "own.png" in after
    assert all(name in text for name in after - {"own.png"})


def test_an_agent_that_failed_altogether_is_named(tmp_path):
    text, _ = write(tmp_path, {"omd": make(CROSSED), "mle": make(CROSSED, failed=range(12))})
    assert "| mle | lr=0.001 | all failed | - | 0 | 12 of 12 |" in text
    assert text.count("mle: lr=") == 12
    assert "Probability of improvement" not in text
    nothing, _ = write(tmp_path, {"omd": make(CROSSED, failed=range(12))})
    assert "all failed" in nothing


def test_only_one_seed_is_admitted(tmp_path):
    dataset = make(CROSSED, selection_seeds=[0]).isel(seed=[0])
    text, _ = write(tmp_path, {"omd": dataset})
    assert "There is one seed, which chooses and is reported" in text


def test_lower_is_better_throughout(tmp_path):
    agents = {"omd": make(-CROSSED, selected_by="error"), "mle": make(-CROSSED - 100, selected_by="error")}
    text, _ = write(tmp_path, agents, report={"variable": "error", "solved": 0.5})
    assert "| **omd** | **lr=0.001** | **80 (70 to 90)** | **79.5** |" in text
    assert "| omd | mle | 1.00 (1.00 to 1.00) |" in text


def test_many_settings_are_cut_with_a_note(tmp_path):
    axis = Axis(("lr",), tuple((10.0**-i,) for i in range(60)))
    text, _ = write(tmp_path, {"omd": make(np.arange(360).reshape(60, 6), (axis,))})
    assert "The best 40 of 60" in text
    assert text.count("| omd | lr=") == 40
    assert "of 60" not in write(tmp_path, {"omd": make(CROSSED)})[0]


# ---------------------------------------------------------------- figures


def drawn(monkeypatch) -> list:
    figures: list = []
    write = plots._write
    monkeypatch.setattr(plots, "_write", lambda figure, path: (figures.append(figure), write(figure, path))[1])
    return figures


def test_sensitivity_shows_every_kind_of_line(monkeypatch, tmp_path):
    figures = drawn(monkeypatch)
    good, bad, high = (Estimate(*np.array([*ends, 1, 0])) for ends in ((3.0, 2.0, 4.0), [np.nan] * 3, (5.0, 4.0, 6.0)))
    lines = [
        Sensitivity("omd", (0.001, 0.1, 0.01), (good, bad, high)),
        Sensitivity("level", (), (good,)),
        Sensitivity("mle", (0.1, 0.001), (good, good)),
    ]
    comparison.sensitivity(lines, "lr", "return", tmp_path / "a.png", "My title")
    (panel,) = figures[0].axes
    assert panel.get_xscale() == "log"
    assert panel.get_title().startswith("My title")
    assert "failed" in panel.get_title()
    crosses = [line for line in panel.lines if line.get_marker() == "x" and len(line.get_xdata())]
    assert [line.get_xdata().tolist() for line in crosses] == [[0.1]]
    labels = [text.get_text() for text in panel.get_legend().get_texts()]
    assert labels == ["omd", "level (does not vary)", "mle"]
    comparison.sensitivity(
        [Sensitivity("omd", ("none", "window"), (good, good))], "smoothing", "return", tmp_path / "b.png"
    )
    assert [tick.get_text() for tick in figures[1].axes[0].get_xticklabels()] == ["none", "window"]


def test_curves_over_decades_are_logarithmic(monkeypatch, tmp_path):
    figures = drawn(monkeypatch)
    narrow, wide = np.array([[1.0, 2.0, np.nan]] * 3), np.array([[1.0, 10.0, 1e5]] * 3)
    for values in (narrow, wide, -wide):
        series = [(label, STEPS[:3], values[..., None]) for label in ("omd", "mle")]
        comparison.curves(series, "steps", "regret", tmp_path / "a.png")
    assert [figure.axes[0].get_yscale() for figure in figures] == ["linear", "log", "linear"]
    assert len(figures[0].axes[0].lines) == 2


def test_profiles_fall_from_one_to_zero(monkeypatch, tmp_path):
    figures = drawn(monkeypatch)
    scores = [("omd", np.array([1.0, 2.0, np.nan, 4.0])), ("mle", np.array([3.0, 3.0, 3.0, 3.0]))]
    comparison.profiles(scores, "return", tmp_path / "up.png")
    comparison.profiles(scores, "error", tmp_path / "down.png", lower=True)
    for figure, ends in zip(figures, ([1, 0], [0, 1]), strict=True):
        for line in figure.axes[0].lines:
            assert line.get_ydata()[[0, -1]].tolist() == ends
    thresholds, fraction = figures[0].axes[0].lines[0].get_data()
    assert fraction[np.argmin(abs(thresholds - 2.5))] == pytest.approx(1 / 3)


# ---------------------------------------------------------------- again, without jax

WITHOUT_JAX = """
import runpy, sys
sys.modules["jax"] = sys.modules["jaxlib"] = None
sys.argv = ["results", "report", sys.argv[1]]
runpy.run_module("purejax_bilevel.results", run_name="__main__", alter_sys=True)
"""


def again_without_jax(folder: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", WITHOUT_JAX, str(folder)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_the_report_of_a_sweep_is_made_again_without_jax(tmp_path):
    bound = Axis(("norm_bound",), ((1.0,), (2.0,)))
    series = {"optimality_gap": np.zeros((12, 4))}
    tabular = make(CROSSED, (bound,))
    tabular["optimality_gap"] = (tabular["evaluation_return"].dims, series["optimality_gap"].reshape(2, 6, 4))
    shown = [{"kind": "tabular", "figure": "norm_bound"}, {"kind": "sensitivity", "axis": "norm_bound"}]
    text, page = write(tmp_path, {"omd": tabular, "mle": tabular}, report={"figures": shown, "over": "5e-1"})
    (tmp_path / report.MARKDOWN).unlink()
    found = again_without_jax(tmp_path)
    assert found.returncode == 0, found.stderr
    assert (tmp_path / report.MARKDOWN).read_text() == text
    assert len((tmp_path / report.HTML).read_text()) > 0.5 * len(page)


def test_declarations_are_read_without_jax():
    families = ("control", "learned_optimizers", "meta_objectives", "offline", "regression", "tabular")
    code = (
        "import importlib, sys; sys.modules['jax'] = sys.modules['jaxlib'] = None\n"
        "from purejax_bilevel.configuration import fields\n"
        f"for family in {families}:\n"
        "    settings = vars(importlib.import_module(f'purejax_bilevel.programs.{family}.settings'))\n"
        "    groups = [x for x in settings.values() if hasattr(x, '__dataclass_fields__')]\n"
        "    print(sum(field.metadata['traced'] for group in groups for field in fields(group)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert all(int(count) > 5 for count in found.stdout.split())
    assert len(found.stdout.split()) == len(families)


def test_table_and_curves_of_a_run_are_made_again_without_jax(tmp_path):
    datasets.save(make(CROSSED, title="omd-toy"), tmp_path)
    found = again_without_jax(tmp_path)
    assert found.returncode == 0, found.stderr
    assert "return at the end" in found.stdout
    assert imread(tmp_path / "learning_curves.png").std() > 0.02


LOSSES = ("evaluation_mse", "outer_loss", "local_regret", "static_regret")


def regression(steps: int) -> xarray.Dataset:
    """Results as of the regression program: two settings, three seeds."""
    grid = Grid((Axis(("grad_buffer_size",), ((1,), (10,))),), (0, 1, 2))
    rng = np.random.default_rng(0)
    series = {name: rng.random((6, steps)) for name in LOSSES}
    series |= {name: rng.random((6, steps, 64)) for name in ("lambda", "prediction", "truth")}
    about = {
        "program": "Regression",
        "title": "funcbo",
        "headline": "evaluation_mse",
        "figures": "purejax_bilevel.programs.regression.figures",
        "config": {"input_dim": 1, "agent_type": "funcbo", "shift_type": "linear"},
    }
    return datasets.build_dataset(grid, np.arange(1, steps + 1), series, {"failed": np.zeros(6, bool)}, about)


@pytest.mark.parametrize("steps", [1, 4])
def test_the_figures_of_a_regression_are_made_again_without_jax(tmp_path, steps):
    datasets.save(regression(steps), tmp_path)
    found = again_without_jax(tmp_path)
    assert found.returncode == 0, found.stderr
    for name in ("curves.png", "lambda.png", "approximation.png"):
        assert imread(tmp_path / name).std() > 0.02
    assert not (tmp_path / "learning_curves.png").exists()


def test_figures_of_a_regression_whose_members_all_diverged(tmp_path):
    dataset = regression(4)
    dataset["failed"] = dataset["failed"] | True
    for name in (*LOSSES, "lambda", "prediction"):
        dataset[name] = dataset[name] * np.nan
    outputs.write_figures(dataset, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"curves.png", "lambda.png", "approximation.png"}


def test_a_program_draws_its_own_results_and_without_its_module_there_are_curves(tmp_path, monkeypatch):
    drawing = types.ModuleType("drawing")
    drawing.write_figures = lambda dataset, folder: (folder / "mine.txt").write_text(dataset.attrs["title"])
    dataset = regression(4)
    monkeypatch.setitem(sys.modules, "drawing", drawing)
    for module, figures in (("drawing", {"mine.txt"}), ("gone", {outputs.CURVES}), ("", {outputs.CURVES})):
        folder = tmp_path / f"of-{module}"
        folder.mkdir()
        outputs.write_figures(dataset.assign_attrs(figures=module), folder)
        assert {path.name for path in folder.iterdir()} == figures


@pytest.mark.parametrize(
    ("config", "sentence"),
    [(None, "neither a run nor a sweep"), ("run: {}", "is not of a sweep"), ("sweep: {}", "no results yet")],
)
def test_a_folder_without_results_is_refused(tmp_path, capsys, config, sentence):
    if config is not None:
        (tmp_path / "config.yaml").write_text(config)
    assert main(["report", str(tmp_path)]) == 2
    assert sentence in capsys.readouterr().err

"""Searches: they find the toy's optimum with one compilation, survivors are undisturbed, seeds are held out, and a
stopped search goes on."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from purejax_bilevel.errors import UserError
from purejax_bilevel.results import dataset as datasets
from purejax_bilevel.results.report import HISTORY
from purejax_bilevel.runtime import compiled, loop
from purejax_bilevel.runtime.loggers import Loggers
from purejax_bilevel.studies import run as runs
from purejax_bilevel.studies import sweep_command
from purejax_bilevel.studies.evolving import SettingStrategy
from purejax_bilevel.studies.folder import ROUNDS
from purejax_bilevel.studies.halving import rung_ends
from purejax_bilevel.studies.intervals import Interval
from purejax_bilevel.studies.plan import make_agents
from purejax_bilevel.studies.study import Search, parse
from tests.programs.programs import killed_after

BEST = 1e-2
TOY: dict[str, Any] = {
    "program": "toy",
    "agents": ["left", "right"],
    "settings": {"num_train_steps": 16},
    "axes": [{"grid": {"lr": [1e-4, 10.0]}}],
    "seeds": 4,
}


def run(folder: Path, description: dict[str, Any], *arguments: str, name: str = "sweep") -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(description))
    status = sweep_command.main(
        [str(path), "--output_dir", str(folder), "--name", name, "--quiet", "--devices", "2", *arguments]
    )
    assert status == 0
    return folder / name


def history(folder: Path) -> list[dict[str, Any]]:
    return [{**entry, "seconds": 0} for entry in json.loads((folder / HISTORY).read_text())]


@pytest.mark.parametrize("algorithm", ["cma_es", "open_es"])
def test_an_evolution_strategy_finds_the_best_setting(toy, tmp_path, algorithm):
    changes = {"search": {"method": "es", "algorithm": algorithm, "population": 8, "generations": 8}}
    folder = run(tmp_path, {**TOY, **changes})
    for label in ("left", "right"):
        dataset = datasets.load(folder / label)
        assert dataset.attrs["compilations"] == 1
        assert abs(np.log10(dataset.lr.values[0] / BEST)) < 0.15
        np.testing.assert_array_equal(dataset.seed, [2, 3])  # 0 and 1 chose
    rounds = history(folder)
    assert [entry["name"] for entry in rounds] == [f"generation-{i}" for i in range(1, 9)]
    assert {member["seed"] for entry in rounds for part in entry["parts"] for member in part["members"]} == {0, 1}
    asked = [[member["lr"] for member in entry["parts"][0]["members"]] for entry in rounds]
    assert np.std(np.log(asked[-1])) < np.std(np.log(asked[0]))
    assert not (folder / ROUNDS).exists()


def test_sub_programs_have_searches_of_their_own(toy, tmp_path):
    changes = {
        "agents": ["left"],
        "axes": [{"grid": {"lr": [1e-3, 0.1], "repeats": [1, 3]}}],
        "search": {"method": "es", "population": 4, "generations": 2, "finalists": 2},
    }
    folder = run(tmp_path, {**TOY, **changes})
    dataset = datasets.load(folder / "left")
    assert dataset.attrs["compilations"] == 1
    assert dataset.repeats.values.tolist() == [1, 1, 3, 3]
    first, second = history(folder)[0]["parts"]
    assert first["members"] != second["members"]


def test_finalists_are_trained_as_any_other_run(toy, tmp_path):
    folder = run(tmp_path, {**TOY, "search": {"method": "es", "population": 4, "generations": 2, "finalists": 3}})
    dataset = datasets.load(folder / "left")
    assert dataset.sizes["lr"] == 3
    alone = runs.run(toy(lr=tuple(dataset.lr.values.tolist())), num_seeds=2, seed=2, quiet=True)
    np.testing.assert_array_equal(dataset.score, alone.score)
    order = dataset.selection_score.values[:, 0]
    assert (np.diff(order) <= 0).all()


HALVING = {"axes": [{"grid": {"lr": [1e-4, 1e-3, 5e-3, 1e-2, 0.1, 0.5, 0.9, 10.0]}}], "search": {"halving": 2}}


def test_halving_keeps_the_better_half_and_the_same_numbers(toy, tmp_path):
    folder = run(tmp_path, {**TOY, **HALVING})
    rounds = history(folder)
    assert [(entry["name"], entry["steps"]) for entry in rounds] == [
        *((f"rung-1-batch-{i}", 4) for i in (1, 2, 3, 4)),
        *((f"rung-2-batch-{i}", 8) for i in (1, 2)),
        ("rung-3-batch-1", 16),
    ]
    rates = [[m["lr"] for e in rounds if e["steps"] == s for m in e["parts"][0]["members"][::2]] for s in (4, 8, 16)]
    assert rates == [[1e-4, 1e-3, 5e-3, 1e-2, 0.1, 0.5, 0.9, 10.0], [1e-3, 5e-3, 1e-2, 0.1], [5e-3, 1e-2]]
    dataset = datasets.load(folder / "left")
    assert dataset.attrs["compilations"] == 1
    assert dataset.lr.values[0] == BEST
    # A survivor has gone through the steps of an uninterrupted run, bit for bit.
    alone = runs.run(toy(lr=tuple(rates[0])), num_seeds=2, quiet=True)
    for entry in rounds:
        for member, score in zip(entry["parts"][0]["members"], entry["parts"][0]["scores"], strict=True):
            if member["lr"] == 10.0:
                assert score is None
            else:
                assert score == alone.score.sel(step=entry["steps"], **member).item()
    assert "lr=10, seed=0" in (folder / "report.md").read_text().split("## Failed members")[1]


def test_halving_with_sub_programs_of_different_sizes(toy, tmp_path):
    changes = {
        "agents": {"left": {"lr": [1e-3, 2e-3, 5e-3, 1e-2, 0.1, 0.2, 0.3]}, "right": {"lr": 0.2}},
        "axes": [],
        "search": {"halving": 1},
    }
    folder = run(tmp_path, {**TOY, **changes})
    assert datasets.load(folder / "left").lr.values[0] == BEST
    assert datasets.load(folder / "right").sizes["seed"] == 2
    tried = [m["lr"] for e in history(folder) if e["steps"] == 8 for m in e["parts"][0]["members"]]
    assert sorted(set(tried)) == [1e-3, 2e-3, 5e-3, 1e-2, 0.1, 0.2, 0.3]
    assert datasets.load(folder / "left").attrs["compilations"] == 1


def test_random_search_then_halving(toy, tmp_path):
    folder = run(tmp_path, {**TOY, "search": {"method": "random", "samples": 16, "halving": 1, "seed": 3}})
    tried = {member["lr"] for entry in history(folder) for member in entry["parts"][0]["members"]}
    best = min(tried, key=lambda lr: abs(np.log10(lr / BEST)))
    assert len(tried) == 16
    assert datasets.load(folder / "left").lr.values[0] == best


def test_random_search_without_rounds(toy, tmp_path):
    folder = run(tmp_path, {**TOY, "search": {"method": "random", "samples": 12}})
    dataset = datasets.load(folder / "left")
    assert dataset.sizes["lr"] == 12
    assert dataset.sizes["seed"] == 4
    assert dataset.lr.values.min() >= 1e-4


@pytest.mark.parametrize(
    ("changes", "calls"),
    [
        (HALVING, (0, 11, 15)),
        pytest.param({"search": {"method": "es", "population": 4, "generations": 2}}, (6, 17), marks=pytest.mark.slow),
    ],
    ids=["halving", "es"],
)
def test_a_killed_search_goes_on(toy, tmp_path, monkeypatch, changes, calls):
    whole = run(tmp_path, {**TOY, **changes}, "--chunks", "16", name="whole")
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
    folder, arguments = tmp_path / "killed", None
    path = tmp_path / "killed.yaml"
    path.write_text(yaml.safe_dump({**TOY, **changes}))
    for count in calls:
        words = arguments or [str(path), "--output_dir", str(tmp_path), "--name", "killed"]
        with killed_after(count):
            sweep_command.main([*words, "--quiet", "--chunks", "16", "--devices", str(2 + count % 3)])
        arguments = ["--resume", str(folder)]
    assert sweep_command.main(["--resume", str(folder), "--quiet", "--devices", "8"]) == 0
    assert history(folder) == history(whole)
    for label in ("left", "right"):
        found, expected = datasets.load(folder / label), datasets.load(whole / label)
        np.testing.assert_array_equal(found.score, expected.score)
        np.testing.assert_array_equal(found.lr, expected.lr)


def test_a_finished_search_is_not_run_again(toy, tmp_path, monkeypatch):
    folder = run(tmp_path, {**TOY, "search": {"method": "es", "population": 4, "generations": 1}})
    before = (folder / "report.md").read_text()
    (folder / "report.md").unlink()
    monkeypatch.setattr(compiled.CompiledProgram, "__call__", None)
    assert sweep_command.main(["--resume", str(folder), "--quiet"]) == 0
    assert (folder / "report.md").read_text().split("## How")[0] == before.split("## How")[0]


STAGES: dict[str, Any] = {
    "program": "tests.programs.examples.stages:Config",
    "agents": ["mine"],
    "settings": {"rows": 1000, "ensemble_steps": 60, "num_train_steps": 40},
    "seeds": 2,
}


def test_a_program_of_several_stages_is_searched(tmp_path, monkeypatch):
    logged = []
    monkeypatch.setattr(Loggers, "log_rows", lambda self, members, rows: logged.append(dict(rows)))
    es = {"method": "es", "population": 4, "generations": 1, "space": {"lr": [0.01, 0.2]}}
    folder = run(tmp_path, {**STAGES, "search": es}, "--tensorboard")
    dataset = datasets.load(folder / "mine")
    assert dataset.held_out.dims == ("lr", "seed", "step_ensemble")
    assert dataset.value.dims == ("lr", "seed", "step")
    first, second = logged[-2:]
    assert list(first) == ["step", "held_out"]
    assert first["step"].tolist() == [20, 40, 60]
    assert list(second) == ["step", "value"]
    assert second["step"].tolist() == [80, 100]


def test_halving_of_several_stages_is_refused():
    halving = {"axes": [{"grid": {"lr": [0.1, 0.2]}}], "search": {"halving": 1}}
    with pytest.raises(UserError, match="within one stage, and this program has ensemble and policy: use es or random"):
        make_agents(parse({**STAGES, **halving}))


def test_what_a_search_cannot_do_is_said(toy):
    def check(changes: dict[str, Any]) -> None:
        checked = parse({**TOY, **changes})
        make_agents(checked)
        rung_ends(16, 2, checked.search.halving)

    def problem(**changes: Any) -> str:
        with pytest.raises(UserError) as caught:
            check(changes)
        return str(caught.value)

    es = {"method": "es"}
    assert "nothing to search for left" in problem(axes=[], search=es)
    assert "needs one value of width" in problem(
        axes=[{"grid": {"width": [2, 4]}}], search={**es, "space": {"lr": [1, 2]}}
    )
    assert "varies together" in problem(
        axes=[{"zip": {"lr": [1, 2], "noise": [1, 2]}}], search={**es, "space": {"lr": [1, 2]}}
    )
    assert "--halving 4 would compare after 1 of 16 steps" in problem(search={"halving": 4})
    with pytest.raises(UserError, match="eval_frequency must not be 0"):
        rung_ends(16, 0, 1)


def test_rungs_end_at_evaluations():
    assert rung_ends(100, 10, 2) == [20, 50, 100]
    assert rung_ends(100, 10, 0) == [100]


@pytest.mark.parametrize("algorithm", ["cma_es", "open_es"])
def test_failed_settings_do_not_break_an_evolution_strategy(algorithm):
    space = (Interval("lr", 1e-4, 1.0), Interval("width", 1, 9, "linear", whole=True))
    search = Search(method="es", algorithm=algorithm, population=6)
    strategy = SettingStrategy(search, space, {"lr": 1e-2, "width": 3}, 0)
    for failed in ([0], range(6), [1, 2]):
        settings = strategy.ask()
        assert all(1e-4 <= s["lr"] <= 1.0 and s["width"] in range(1, 10) for s in settings)
        quality = np.arange(6.0)
        quality[list(failed)] = np.nan
        strategy.tell(quality)
    assert all(np.isfinite(setting["lr"]) for setting in strategy.ask())


def test_equal_searches_ask_the_same():
    def asked(seed: int, number: int) -> list:
        return SettingStrategy(Search(method="es", seed=seed), (Interval("lr", 1e-4, 1.0),), {"lr": 1e-2}, number).ask()

    assert asked(0, 0) == asked(0, 0)
    assert asked(0, 0) != asked(1, 0)
    assert asked(0, 0) != asked(0, 1)

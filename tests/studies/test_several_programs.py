"""A sweep whose agents have several programs: each program is one compiled call, and one report compares them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from purejax_bilevel.configuration import POSITIVE, at_least, configuration, static, traced
from purejax_bilevel.errors import UserError
from purejax_bilevel.program import Configuration
from purejax_bilevel.results import dataset as datasets
from purejax_bilevel.runtime import artefacts, compiled
from purejax_bilevel.studies import study, sweep_command
from tests import toy as toys

pytestmark = pytest.mark.usefixtures("compiled_once")


@configuration
class Longer:
    """A program of its own: other fields, other steps."""

    lr: float = traced(0.1, "learning rate", POSITIVE)
    bias: float = traced(0.5, "what it scores less", POSITIVE)
    episodes: int = static(30, "episodes", at_least(1))

    def program(self) -> "LongerToy":
        return LongerToy(self)


class LongerToy(toys.Toy):
    step_unit = "episodes"

    def __init__(self, config: Configuration):
        super().__init__(toys.Config(num_train_steps=config.episodes, eval_frequency=10))

    def init(self, key: Any, config: Longer, shared: tuple = ()) -> Any:
        return super().init(key, toys.Config(max_width=2))

    def update(self, state: Any, config: Longer, t: Any, shared: tuple = ()) -> Any:
        return super().update(state, toys.Config(lr=config.lr), t)

    def evaluate(self, state: Any, config: Longer, t: Any, is_last: Any, shared: tuple = ()) -> Any:
        found = super().evaluate(state, toys.Config(lr=config.lr), t, is_last)
        return {**found, "score": found["score"] - config.bias}


HERE = f"{__name__}:Longer"


def described(**changes: Any) -> dict[str, Any]:
    return {
        "name": "mixed",
        "program": "toy",
        "settings": {"noise": 0.05, "bias": 0.25},
        "agents": {"left": {}, "mine": {"program": HERE}, "right": {}},
        "axes": [{"grid": {"lr": [1e-2, 1e-1], "width": [1, 2]}}],
        "seeds": {"count": 2, "select": 1},
        **changes,
    }


def run(folder: Path, description: dict[str, Any], *words: str) -> int:
    path = folder / "mixed.yaml"
    path.write_text(yaml.safe_dump(description))
    return sweep_command.main([str(path), "--output_dir", str(folder), "--name", "out", "--quiet", *words])


def test_each_program_is_one_compiled_call_and_the_report_has_all(
    toy: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    compilations, original = [], compiled.CompiledProgram.compile

    def counting(self: Any, *arguments: Any) -> None:
        compilations.append([part.label for part in self.parts])
        original(self, *arguments)

    monkeypatch.setattr(compiled.CompiledProgram, "compile", counting)
    assert run(tmp_path, described()) == 0
    assert compilations == [["left", "right"], ["mine"]]
    left, mine = (datasets.load(tmp_path / "out" / label) for label in ("left", "mine"))
    assert dict(left.sizes) == {"lr": 2, "width": 2, "seed": 2, "step": 8, "episode": 1}
    assert dict(mine.sizes) == {"lr": 2, "seed": 2, "step": 3, "episode": 1}
    assert (left.attrs["step_name"], mine.attrs["step_name"]) == ("steps", "episodes")
    assert mine.attrs["config"]["bias"] == 0.25
    text = (tmp_path / "out" / "report.md").read_text()
    assert "16 steps or 30 episodes each" in text
    assert "programs Toy, LongerToy" in text
    assert len(list((tmp_path / "out" / "figures").glob("*curves*"))) == 2


def test_it_goes_on_where_it_stopped(toy: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    whole.mkdir()
    torn.mkdir()
    run(whole, described())
    original = compiled.CompiledProgram.__call__

    def interrupted(self: Any, *arguments: Any) -> Any:
        if self.parts[0].label == "mine" and arguments[1] > 0:
            raise KeyboardInterrupt
        return original(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(compiled.CompiledProgram, "__call__", interrupted)
        assert run(torn, described(), "--chunks", "4") == 130
    assert sweep_command.main(["--resume", str(torn / "out"), "--quiet"]) == 0
    for label in ("left", "mine", "right"):
        first, second = (datasets.load(folder / "out" / label) for folder in (whole, torn))
        for name in first.data_vars:
            np.testing.assert_array_equal(first[name], second[name])


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"settings": {"depth": 2}}, "none of the programs toy, .*Longer has it"),
        (
            {"agents": {"left": {}, "mine": {"program": "nobody"}}},
            "mine: program must be one of .*module:Config",
        ),
        ({"agents": {"left": {}, "mine": {"program": "no.such:Config"}}}, "module no.such cannot be imported"),
        ({"agents": {"left": {}, "mine": {"program": f"{__name__}:run"}}}, "is no configuration"),
        ({"agents": {"left": {}, "mine": {"program": HERE, "width": 2}}}, "mine has no entry 'width'"),
        ({"search": {"method": "random", "halving": 1}}, "give agents of one"),
    ],
)
def test_what_does_not_fit_together_is_refused(toy: type, changes: dict[str, Any], sentence: str):
    with pytest.raises(UserError, match=sentence):
        study.parse(described(**changes))


def test_programs_without_a_common_score_need_a_variable(toy: type, tmp_path: Path, capsys: pytest.CaptureFixture):
    other = "tests.programs.examples.population:Config"
    agents = {"left": {}, "meta": {"program": other}}
    assert run(tmp_path, described(agents=agents, settings={})) == 2
    assert "name a variable that all measure" in capsys.readouterr().err


def test_a_program_of_ones_own_alone(tmp_path: Path):
    given = {"name": "own", "program": HERE, "axes": [{"grid": {"lr": [0.01, 0.1]}}], "seeds": 2}
    assert run(tmp_path, given) == 0
    assert datasets.load(tmp_path / "out" / "agent").sizes["lr"] == 2


def test_each_agent_leaves_its_artefact(tmp_path: Path):
    agents = {"one": {"ensemble_steps": 40}, "two": {"ensemble_steps": [40, 60]}}
    settings = {"rows": 500, "num_train_steps": 20}
    given = {"name": "own", "program": "tests.programs.examples.stages:Config", "agents": agents, "settings": settings}
    given["axes"] = [{"grid": {"lr": [0.05, 0.1]}}]
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump({**given, "seeds": 2}))
    refused = sweep_command.main([str(path), "--output_dir", str(tmp_path), "--name", "out", "--quiet"])
    assert refused == 2  # stages of other lengths
    given["agents"] = {"one": {"ensemble_steps": 40}, "two": {"ensemble_steps": 40, "rows": [500, 600]}}
    path.write_text(yaml.safe_dump({**given, "seeds": 2}))
    assert sweep_command.main([str(path), "--output_dir", str(tmp_path), "--name", "out", "--quiet"]) == 0
    found = artefacts.load(tmp_path / "out" / "one", "linear ensemble")
    assert [member["seed"] for member in found.about["members"]] == [0, 1, 0, 1]
    for rows in (500, 600):
        assert artefacts.load(tmp_path / "out" / "two" / f"two_rows={rows}", "linear ensemble").about["members"]


def test_only_one_axis_varies_several_fields_together(toy: type, tmp_path: Path, capsys: pytest.CaptureFixture):
    axes = [{"zip": {"lr": [0.01, 0.1], "width": [1, 2]}}, {"zip": {"noise": [0.1, 0.2], "repeats": [1, 2]}}]
    given = {"name": "two", "program": "toy", "agents": ["left"], "axes": axes, "seeds": 2}
    assert run(tmp_path, given) == 2
    assert "only one axis may vary several fields together" in capsys.readouterr().err


def test_a_program_of_several_stages_is_timed_and_searched_but_not_halved(
    tmp_path: Path, capsys: pytest.CaptureFixture
):
    given = {
        "name": "stages",
        "program": "tests.programs.examples.stages:Config",
        "settings": {"rows": 500, "num_train_steps": 20, "ensemble_steps": 60},
        "axes": [{"grid": {"lr": [0.01, 0.05, 0.1, 0.2]}}],
        "seeds": 2,
    }
    path = tmp_path / "stages.yaml"
    path.write_text(yaml.safe_dump(given))
    words = [str(path), "--output_dir", str(tmp_path)]
    assert sweep_command.main([*words, "--name", "grid"]) == 0
    assert "time: about" in capsys.readouterr().err
    assert sweep_command.main([*words, "--name", "halved", "--halving", "1", "--quiet"]) == 2
    assert "this program has ensemble and policy" in capsys.readouterr().err
    evolved = [*words, "--name", "evolved", "--search", "es", "--generations", "2", "--population", "4", "--quiet"]
    assert sweep_command.main(evolved) == 0
    assert datasets.load(tmp_path / "evolved" / "agent").sizes["seed"] == 1

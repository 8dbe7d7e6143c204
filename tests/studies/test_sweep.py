"""Sweeps: files are checked, every member gets its own settings, one compilation, and a stopped sweep goes on."""

from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import pytest
import yaml
from rich.console import Console

from purejax_bilevel import programs
from purejax_bilevel.configuration import configuration, fields, static
from purejax_bilevel.errors import UserError
from purejax_bilevel.results import analysis, statistics
from purejax_bilevel.results import dataset as datasets
from purejax_bilevel.results.statistics import TASKS
from purejax_bilevel.runtime import compiled, loop
from purejax_bilevel.studies import forecast, presets, study, sweep, sweep_command
from purejax_bilevel.studies import run as runs
from purejax_bilevel.studies.intervals import Interval
from purejax_bilevel.studies.overrides import override
from purejax_bilevel.studies.plan import make_agents
from purejax_bilevel.studies.study import parse
from tests import toy as toys
from tests.programs.programs import killed_after

TOY: dict[str, Any] = {
    "program": "toy",
    "agents": ["left", "right"],
    "axes": [{"grid": {"lr": ["1e-3", 0.01, 0.1]}}],
    "seeds": 4,
}


def described(**changes: Any) -> dict[str, Any]:
    return {**TOY, **changes}


def run(folder: Path, description: dict[str, Any], *arguments: str, name: str = "sweep") -> int:
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(description))
    words = [str(path), "--output_dir", str(folder), "--name", name, "--quiet", *arguments]
    return sweep_command.main(words)


def scores(folder: Path) -> dict[str, np.ndarray]:
    return {path.parent.name: datasets.load(path).final_score.values for path in sorted(folder.glob("*/results.nc"))}


def report_numbers(folder: Path) -> str:
    """The report without what changes from run to run."""
    return (folder / "report.md").read_text().split("## How it was run")[0]


# ---------------------------------------------------------------- files and command lines

WRONG = [
    ({"agent": ["left"]}, "no entry 'agent'"),
    ({"program": "rll"}, "program must be one of rl, continuous"),
    ({"program": ["rl"]}, "program must be one of rl, continuous"),
    ({"agents": {"left": {"program": {"rl": 1}}}}, "agents: left: program must be one of rl, continuous"),
    ({"settings": {"lrr": 1}}, "no entry 'lrr'"),
    ({"settings": {"max_width": 3}}, "no entry 'max_width'"),
    ({"settings": {"lr": 0.1}}, "both in settings and in axes"),
    ({"settings": {"agent_type": ["left", "right"]}}, "agent_type belongs in agents"),
    ({"agents": {}}, "at least one agent"),
    ({"agents": ["middle"]}, "--agent_type must be one of left, right"),
    ({"agents": {"left": {"lr": -1}}}, "--lr must be a finite number above 0, got -1"),
    ({"agents": {"left": {"lr": "fast"}}}, "--lr must be a finite number above 0, got 'fast'"),
    ({"agents": {"left": 3}}, "agents: left must be a mapping"),
    ({"axes": {"lr": [1, 2]}}, "axes must be a list"),
    ({"axes": [{"gird": {}}]}, "no entry 'gird'"),
    ({"axes": [{"grid": {"lr": []}}]}, "lr needs at least one value"),
    ({"axes": [{"grid": {"lr": [0.1, 0.1]}}]}, "lr was given the same value twice"),
    ({"axes": [{"grid": {"lr": [0.1, -0.1]}}]}, "--lr must be a finite number above 0, got -0.1"),
    ({"axes": [{"grid": {"lr": [0.1]}}, {"grid": {"lr": [0.2]}}]}, "lr is in two axes"),
    ({"axes": [{"zip": {"lr": [0.1, 0.2], "noise": [1]}}]}, "lists of one length, got lr 2, noise 1"),
    ({"axes": [{"random": {"lr": [0.1, 1]}}]}, "count must be a whole number"),
    ({"axes": [{"random": {"count": 3}}]}, "at least one name"),
    ({"axes": [{"random": {"count": 3, "lr": [0, 1]}}]}, "0 < low < high, got \\[0, 1\\]"),
    ({"axes": [{"random": {"count": 3, "lr": [0.1, 1], "repeats": [1, 2]}}]}, "no entry 'repeats'"),
    ({"axes": [{"random": {"count": 3, "lr": {"low": 1, "hihg": 2}}}]}, "no entry 'hihg'"),
    ({"axes": [{"grid": {"num_train_steps": [8, 16]}}]}, "need the same number of steps, got 8, 16"),
    ({"seeds": 0}, "seeds: count must be a whole number of at least 1, got 0"),
    ({"seeds": {"count": 2, "select": 2}}, "must leave a seed to report"),
    ({"seeds": {"number": 2}}, "no entry 'number'"),
    ({"seeds": 10**15}, "seeds: count must be at most 1000000, got 1000000000000000"),
    ({"seeds": {"count": 10**15, "select": 3}}, "seeds: count must be at most 1000000"),
    ({"seeds": 10**6, "axes": [{"grid": {"lr": [0.1, 0.2]}}]}, "2,000,000 members .* are more than the 1,000,000"),
    ({"search": {"method": "bayes"}}, "search: method must be one of grid, random, es, pbt, got 'bayes'"),
    ({"search": {"method": "es", "halving": 1}}, "not with es"),
    ({"search": {"algorithm": "open_es", "population": 7}}, "must be even"),
    ({"search": {"space": {"lr": [1, 0.1]}}}, "0 < low < high"),
    ({"report": {"variable": "points"}}, "measures no 'points'"),
    ({"report": {"baseline": "adam"}}, "report: baseline must be one of the agents, left, right, got 'adam'."),
    ({"report": {"over": 2}}, "share of the run from 0 to 1, got 2"),
    ({"report": {"figures": [{"kind": "pie"}]}}, "kind of a figure must be one of"),
    ({"report": {"figures": [{"kind": "sensitivity"}]}}, "needs axis"),
    ({"report": {"figures": [{"kind": "sensitivity", "axis": "depth"}]}}, "the axis 'depth'"),
    ({"report": {"figures": [{"kind": "own"}]}}, "needs figure"),
    ({"report": {"figures": [{"kind": "own", "figure": "ift_noise"}]}}, "no figure 'ift_noise': .* draws none of its"),
    ({"report": {"figures": [{"kind": "pie", "figure": "own"}]}}, "kind of a figure must be one of"),
]


@pytest.mark.parametrize(("changes", "sentence"), WRONG, ids=[sentence[:40] for _, sentence in WRONG])
def test_wrong_files_are_told_in_one_sentence(toy, changes, sentence):
    def check() -> None:
        checked = parse(described(**changes))
        sweep.check_report(checked, make_agents(checked))

    with pytest.raises(UserError, match=sentence) as caught:
        check()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "arguments",
    [
        ["nothing_such"],
        ["missing.yaml"],
        [],
        ["{file}", "lr=-1"],
        ["{file}", "depth=3"],
        ["{file}", "--lr"],
        ["{file}", "--devices", "99"],
        ["{file}", "--num_seeds", "0"],
        ["--resume", "{folder}"],
        ["{file}", "--name", "taken"],
        ["{file}", "--search", "es", "--population", "2"],
        ["{file}", "report.variable=points"],
        ["{file}", "--quiet=maybe"],
        ["{file}", "--video"],
    ],
)
def test_bad_input_ends_with_status_2_and_a_sentence(toy, tmp_path, capsys, arguments):
    (tmp_path / "file.yaml").write_text(yaml.safe_dump(TOY))
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "config.yaml").write_text("")
    words = [word.format(file=tmp_path / "file.yaml", folder=tmp_path) for word in arguments]
    assert sweep_command.main([*words, "--output_dir", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: ")


TWO = ["CartPole-v1", "Acrobot-v1"]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"axes": [{"zip": {"env_name": TWO, "lr": [0.1, 0.2]}}]}, "give it in grid, not in zip"),
        ({"axes": [{"grid": {"env_name": TWO, "lr": [0.1, 0.2]}}], "search": {"halving": 1}}, "one env_name"),
        ({"agents": {"omd": {"env_name": TWO}, "mle": {"env_name": TWO[::-1]}}}, "the same ones, in the same order"),
    ],
)
def test_tasks_are_compared_one_by_one(changes, sentence):
    with pytest.raises(UserError, match=sentence):
        make_agents(parse({"program": "rl", "agents": ["omd"], **changes}))


@pytest.mark.parametrize("program", programs.REGISTRY)
def test_no_task_of_a_program_can_be_a_best_setting(program):
    declared = {field.name for field in fields(study.config_class(program)) if field.metadata.get("task")}
    assert declared <= set(TASKS)


def test_every_task_is_declared_by_a_program():
    classes = [study.config_class(program) for program in programs.REGISTRY]
    assert set(TASKS) == {field.name for cls in classes for field in fields(cls) if field.metadata.get("task")}


@configuration
class Levels(toys.Config):
    """A program with a task of its own, in which the second level is the easier one."""

    level: Literal["hard", "easy"] = static("hard", "what is solved", task=True)

    def program(self) -> "LevelsToy":
        return LevelsToy(self)


class LevelsToy(toys.Toy):
    def evaluate(self, state: Any, config: Levels, *rest: Any) -> dict[str, Any]:
        found = super().evaluate(state, config, *rest)
        return {**found, "final_score": found["final_score"] + (100.0 if config.level == "easy" else 0.0)}


def test_a_task_of_an_own_program_is_no_setting(tmp_path):
    axes = [{"grid": {"lr": [1e-3, 0.01], "level": ["hard", "easy"]}}]
    own = described(program=f"{__name__}:Levels", agents=["left"], axes=axes)
    assert run(tmp_path, own) == 0
    dataset = datasets.load(tmp_path / "sweep" / "left")
    assert statistics.settings_without_tasks(dataset) == [{"lr": 1e-3}, {"lr": 0.01}]
    assert statistics.tasks_of(dataset) == [{"level": "hard"}, {"level": "easy"}]
    found = analysis.analyse("left", dataset, [0, 1], analysis.Reporting())
    assert found.settings[found.best] == {"lr": 0.01}
    with pytest.raises(UserError, match="give it in grid, not in zip"):
        make_agents(parse({**own, "axes": [{"zip": {"level": ["hard", "easy"], "lr": [0.1, 0.2]}}]}))


def test_numbers_are_read_as_the_fields_need_them(toy):
    agent = make_agents(parse(described(settings={"noise": 1, "width": "4", "repeats": 2.0})))[0]
    config = agent.templates[0].config
    assert (config.noise, config.width, config.repeats) == (1.0, 4, 2)
    assert [type(x) for x in (config.noise, config.width, config.repeats)] == [float, int, int]
    assert [agent.grid.settings(i)["lr"] for i in (0, 4, 8)] == [0.001, 0.01, 0.1]


def test_overrides_replace_what_the_file_states(toy):
    base = described(agents={"left": {}, "right": {"noise": 0.3, "lr": 0.5}}, settings={"width": 3})
    single = parse(override(base, {"lr": 0.2}))
    assert (single.settings, single.axes, single.agents["right"]["lr"]) == ({"width": 3, "lr": 0.2}, (), 0.2)
    several = parse(override(base, {"lr": [0.2, 0.3]}))
    assert [axis.values for axis in several.axes] == [((0.2,), (0.3,))]
    own = parse(override(base, {"noise": 0.7}))
    assert own.agents["right"]["noise"] == 0.7
    assert "noise" not in own.settings
    assert parse(override(base, {"width": 5})).settings == {"width": 5}
    assert parse(override(base, {"repeats": 2})).settings == {"width": 3, "repeats": 2}
    assert list(parse(override(base, {"agents": "right"})).agents) == ["right"]
    assert parse(override(base, {"agents": "right"})).agents["right"]["noise"] == 0.3
    assert parse(override(base, {"search.halving": 1, "seeds.count": 6})).seeds.count == 6
    assert base["axes"] == [{"grid": {"lr": ["1e-3", 0.01, 0.1]}}]  # what was given stays as it was
    with pytest.raises(UserError, match="varies together"):
        override(described(axes=[{"zip": {"lr": [1, 2], "noise": [1, 2]}}]), {"lr": 0.1})


def test_command_line_overrides():
    line = "omd_capacity --scale paper --lr 1e-3 3e-4 tau=0.1,0.2 --num-T-steps=3 --devices 2 hard=true agents=omd,mle"
    words, changes = sweep_command.split_overrides([*line.split(), "--beta", "-1", "report.over=0.5"])
    assert words == ["omd_capacity", "--scale", "paper", "--devices", "2"]
    assert changes == {
        "lr": ["1e-3", "3e-4"],
        "tau": [0.1, 0.2],
        "num_T_steps": 3,
        "hard": True,
        "agents": ["omd", "mle"],
        "beta": -1,
        "report.over": 0.5,
    }


# ---------------------------------------------------------------- agents, sub-programs, members


def test_static_values_become_sub_programs_and_traced_ones_members(toy):
    axes = [{"grid": {"lr": [0.1, 0.2], "repeats": [1, 2]}}, {"zip": {"width": [2, 5], "noise": [0.1, 0.2]}}]
    agent = make_agents(parse(described(agents=["left"], axes=axes, seeds=2)))[0]
    assert agent.grid.shape == (2, 2, 2, 2)
    assert [template.label for template in agent.templates] == ["left, repeats=1", "left, repeats=2"]
    assert [template.config.repeats for template in agent.templates] == [1, 2]
    for template, numbers, part in zip(agent.templates, agent.settings_of, agent.parts(), strict=True):
        assert len(part.grid) == 8
        assert part.config.max_width == 5
        for place, number in enumerate(numbers):
            wanted = agent.grid.settings(int(number) * 2)
            found = {**template.static, **part.grid.settings(place * 2)}
            assert found == wanted
    marked = [10.0 * agent.settings_of[part].repeat(2) + np.tile([0, 1], 4) for part in range(2)]
    merged = agent.gather([array[:, None] for array in marked])
    np.testing.assert_array_equal(merged[:, 0], 10.0 * (np.arange(16) // 2) + np.arange(16) % 2)


def test_arrays_of_different_lengths_are_filled(toy):
    agent = make_agents(parse(described(axes=[{"grid": {"repeats": [1, 2]}}], seeds=1)))[0]
    merged = agent.gather([np.ones((1, 2)), np.ones((1, 3))])
    np.testing.assert_array_equal(merged, [[1, 1, np.nan], [1, 1, 1]])


def test_own_settings_of_an_agent_win(toy):
    agents = {"left": {"lr": 0.5, "noise": [0.1, 0.2]}, "right": {}}
    left, right = make_agents(parse(described(agents=agents)))
    assert [axis.names for axis in left.grid.axes] == [("noise",)]
    assert left.templates[0].config.lr == 0.5
    assert [axis.names for axis in right.grid.axes] == [("lr",)]
    zipped = described(agents={"left": {"lr": 0.5}}, axes=[{"zip": {"lr": [1, 2], "noise": [1, 2]}}])
    with pytest.raises(UserError, match="varies together"):
        make_agents(parse(zipped))


def test_random_settings_are_log_uniform_and_seeded(toy):
    def drawn(seed: int) -> np.ndarray:
        random = {"count": 2000, "seed": seed, "lr": [1e-4, 1.0], "width": {"low": 1, "high": 3, "scale": "linear"}}
        return np.array(parse(described(axes=[{"random": random}])).axes[0].values)

    values = drawn(0)
    np.testing.assert_array_equal(values, drawn(0))
    assert not np.array_equal(values, drawn(1))
    assert values[:, 0].min() >= 1e-4
    assert values[:, 0].max() <= 1.0
    np.testing.assert_allclose(np.histogram(np.log10(values[:, 0]), 4, (-4, 0))[0] / 2000, 0.25, atol=0.04)
    assert set(values[:, 1]) == {1.0, 2.0, 3.0}


@pytest.mark.parametrize("interval", [Interval("lr", 1e-4, 1e-1), Interval("tau", -1.0, 3.0, "linear")])
def test_intervals(interval):
    assert interval.at(0.0) == interval.low
    assert interval.at(2.0) == interval.high
    for position in (0.1, 0.5, 0.9):
        assert interval.position(interval.at(position)) == pytest.approx(position)
    assert interval.position(interval.high * 10) == 0.5


PAPER_STEPS = {  # of the originals, by program or preset
    "rl": 200_000,
    "continuous": 1_000_000,
    "regression": 5000,
    "observatory": 48_000,  # there is no original
    "omd_narrow_model": 25_000,  # fifty seeds instead
    "omd_model_widths": 25_000,
    "omd_solvers": 15_000,
    "smoothfbo_drift": 20_000,
    "pendulum_agents": 30_000,
    "regression_shifts": 3000,
    "tabular": 10_000,
    "ppo": 1220,
    "open_ablation": 24,
    "open_gridworld_transfer": 1464,
    "open_training": 504,
    "meta_objectives": 5000,
    "ta_lpg_horizons": 2500,
    "meta_test": 2500,
    "ensemble": 200,
    "offline": 500_000,
}


@pytest.mark.parametrize("scale", presets.SCALES)
@pytest.mark.parametrize("name", presets.PRESETS)
def test_presets_are_complete(name, scale, files_of_presets):
    content = presets.preset(name, scale)
    assert "paper" not in content
    if content.get("settings", {}).get("env_name") == "halfcheetah":  # comes with an extra
        content["settings"]["env_name"] = "Pendulum-v1"
    checked = parse(content)
    agents = make_agents(checked)
    sweep.check_report(checked, agents)
    members = sum(len(agent.grid) for agent in agents)
    steps = agents[0].templates[0].config.program().num_steps
    if scale == "smoke" and checked.program in ("rl", "continuous"):
        # Minutes on two cores at 5500 and, on average over the agents, 1500 steps/s.
        assert members * steps <= {"rl": 1.6e6, "continuous": 4.5e5}[checked.program]
    if scale == "paper":
        assert steps == PAPER_STEPS.get(name, PAPER_STEPS.get(str(checked.program)))
        assert checked.seeds.count >= (3 if checked.program == "open_training" else 10)
    for axis in [figure["axis"] for figure in checked.report.figures if figure["kind"] == "sensitivity"]:
        assert any(axis in agent.grid.settings(0) for agent in agents), axis


# ---------------------------------------------------------------- running


def test_every_member_gets_its_own_settings_in_one_compilation(toy, tmp_path):
    axes = [{"grid": {"lr": [0.001, 0.1], "repeats": [1, 2]}}]
    assert run(tmp_path, described(axes=axes, seeds={"first": 3, "count": 2})) == 0
    for label in ("left", "right"):
        dataset = datasets.load(tmp_path / "sweep" / label)
        assert dataset.attrs["compilations"] == 1
        assert dataset.attrs["sub_programs"] == 4
        assert dataset.score.dims == ("lr", "repeats", "seed", "step")
        for repeats in (1, 2):
            config = toy(agent_type=label, lr=(0.001, 0.1), repeats=repeats)
            alone = runs.run(config, num_seeds=2, seed=3, quiet=True)
            found = dataset.sel(repeats=repeats)
            np.testing.assert_array_equal(found.score, alone.score)
            np.testing.assert_array_equal(found.final_score, alone.final_score)


@pytest.mark.parametrize(("first", "second"), [("8", "2"), pytest.param("3", "8", marks=pytest.mark.slow)])
def test_a_killed_sweep_goes_on_with_other_devices(toy, tmp_path, monkeypatch, first, second):
    assert len(jax.devices()) >= 8
    assert run(tmp_path, TOY, "--devices", "3", name="whole") == 0
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
    with killed_after(3):
        run(tmp_path, TOY, "--devices", first, "--chunks", "8", name="killed")
    assert loop.steps_done(tmp_path / "killed") == 6
    assert sweep_command.main(["--resume", str(tmp_path / "killed"), "--devices", second, "--quiet"]) == 0
    expected, found = scores(tmp_path / "whole"), scores(tmp_path / "killed")
    assert list(found) == ["left", "right"]
    for label, array in expected.items():
        np.testing.assert_array_equal(found[label], array)
    assert report_numbers(tmp_path / "killed").replace("killed", "whole") == report_numbers(tmp_path / "whole")
    assert len((tmp_path / "killed" / "command.txt").read_text().splitlines()) == 2


def test_resume_keeps_the_sweep(toy, tmp_path, capsys):
    assert run(tmp_path, TOY, "lr=0.1", "--num_seeds", "3") == 0
    folder = str(tmp_path / "sweep")
    before = scores(tmp_path / "sweep")
    assert sweep_command.main([str(tmp_path / "sweep.yaml"), "--resume", folder, "--quiet", "--num_seeds", "3"]) == 0
    assert scores(tmp_path / "sweep").keys() == before.keys()
    again = ["--output_dir", str(tmp_path), "--name", "again", "--quiet"]
    assert sweep_command.main([f"{folder}/config.yaml", *again]) == 0  # the report calls it the sweep file
    assert report_numbers(tmp_path / "again") == report_numbers(tmp_path / "sweep")
    assert sweep_command.main(["--resume", folder, "--quiet", "lr=0.2"]) == 2
    assert "start a new sweep" in capsys.readouterr().err
    assert sweep_command.main(["omd_capacity", "--resume", folder, "--quiet"]) == 2
    assert "goes on with sweep" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("{file} --seed 1 2", "--seed takes one value, got 1 2."),
        ("--resume {folder} --seed 1 2", "--seed takes one value, got 1 2."),
        ("--scale smoke {file} --num_seeds 1 2", "--num_seeds takes one value, got 1 2."),
        ("{file} --tensorboard=yes", "--tensorboard must be True or False, got 'yes'."),
    ],
)
def test_options_with_a_wrong_number_of_values_get_one_sentence(toy, tmp_path, capsys, words, sentence):
    names = {"file": "no_such.yml", "folder": str(tmp_path)}
    assert sweep_command.main(words.format(**names).split()) == 2
    assert capsys.readouterr().err == f"error: {sentence.format(**names)}\n"


def test_flags_may_be_given_a_value_and_the_sweep_its_place(toy, tmp_path):
    (tmp_path / "file.yaml").write_text(yaml.safe_dump(TOY))
    words = ["--quiet=True", "--tensorboard=false", "--num_seeds", "2", str(tmp_path / "file.yaml"), "--scale", "paper"]
    options, checked = sweep_command.read_arguments(words)
    assert (options.quiet, options.tensorboard, options.scale, checked.seeds.count) == (True, False, "paper", 2)


def test_a_resumed_sweep_does_again_what_it_was_told_unless_told_anew(toy, tmp_path):
    assert run(tmp_path, TOY, "--tensorboard", "--wandb_mode", "disabled", "--wandb_runs", "setting") == 0
    folder = tmp_path / "sweep"
    options, _ = sweep_command.read_arguments(["--resume", str(folder)])
    assert (options.tensorboard, options.wandb_mode, options.wandb_runs) == (True, "disabled", "setting")
    options, _ = sweep_command.read_arguments(
        ["--resume", str(folder), "--tensorboard=False", "--wandb_mode", "offline"]
    )
    assert (options.tensorboard, options.wandb_mode, options.wandb_runs) == (False, "offline", "setting")
    (folder / "config.yaml").write_text("sweep: {program: toy}\noptions: {wandb_mode: cloud}\n")
    with pytest.raises(UserError, match="not of a sweep"):
        sweep_command.read_arguments(["--resume", str(folder)])


def test_one_member_is_no_members(toy, tmp_path, capsys):
    one = described(agents=["left"], axes=[], seeds=1)
    assert run(tmp_path, one, "--quiet=False") == 0
    assert "sweep: 1 member in 1 sub-program" in capsys.readouterr().err
    assert "1 member (1 agent, 1 setting, 1 seed)" in (tmp_path / "sweep" / "report.md").read_text()
    assert run(tmp_path, {**one, "settings": {"lr": 10.0}}, "--quiet=False", name="lost") == 1
    told = capsys.readouterr().err
    assert "the only member diverged" in told
    assert "1 member failed" in told
    assert "1 of 1 member diverged or has no finite score" in (tmp_path / "lost" / "report.md").read_text()


def test_a_sweep_whose_members_all_diverged_says_so(toy, tmp_path, capsys):
    assert run(tmp_path, described(axes=[], settings={"lr": 10.0})) == 1
    told = capsys.readouterr().err
    assert told.startswith("error: all 8 members diverged")
    assert told.count("\n") == 1
    assert datasets.load(tmp_path / "sweep" / "left").failed.values.all()
    assert "8 of 8 members diverged" in (tmp_path / "sweep" / "report.md").read_text()


def test_a_run_is_no_sweep(tmp_path):
    (tmp_path / "config.yaml").write_text("config: {lr: 0.1}\nrun: {seed: 0}\n")
    with pytest.raises(UserError, match="describes a run, not a sweep"):
        study.read(tmp_path / "config.yaml")


def test_the_plan_is_told_and_memory_is_checked(toy, tmp_path, capsys, monkeypatch):
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(TOY))
    words = [str(path), "--output_dir", str(tmp_path), "--devices", "2"]
    assert sweep_command.main([*words, "--name", "fits"]) == 0
    told = capsys.readouterr().err
    assert "plan: 24 members in 2 sub-programs (left 12, right 12), 16 steps each, on 2 cpu devices" in told
    assert "memory per device: " in told
    assert "time: about " in told
    monkeypatch.setitem(forecast.Forecast.__init__.__kwdefaults__, "free", lambda device: 300)
    assert sweep_command.main([*words, "--name", "too_large"]) == 2
    refused = capsys.readouterr().err
    assert "24 members do not fit" in refused
    assert "--num_seeds" in refused
    assert not list((tmp_path / "too_large").glob("*/results.nc"))


@pytest.mark.parametrize("changes", [{}, {"search": {"halving": 1}}])
def test_a_dry_run_tells_the_plan_and_writes_nothing(toy, tmp_path, capsys, monkeypatch, changes):
    monkeypatch.setattr(loop.Run, "_advance", None)  # nor does it train
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(TOY | changes))
    words = ["--config", str(path), "--output_dir", str(tmp_path / "runs"), "--dry_run", "--tensorboard"]
    assert sweep_command.main(words) == 0
    told = capsys.readouterr().err
    assert "plan: " in told
    assert "time: about " in told
    assert told.endswith("dry run: nothing was written.\n")
    assert list(tmp_path.iterdir()) == [path]
    assert sweep_command.main([str(path), *words]) == 2
    assert "name one sweep" in capsys.readouterr().err


def test_memory_of_the_compiled_program_counts(toy):
    checked = parse(described(seeds=2))
    agents = make_agents(checked)
    parts = [part for agent in agents for part in agent.parts()]
    program = compiled.CompiledProgram(parts, loop.devices.make_mesh(4, 2), 1)
    program.compile()
    assert program.device_bytes >= sum(3 * size for size in program.bytes_per_member)
    watcher = forecast.Forecast("", Console(quiet=True), free=lambda device: program.device_bytes)
    with pytest.raises(UserError, match="the compiled program would need"):
        watcher.compiled(program, program.initial(), 0, 16)


def test_timing_leaves_no_trace_in_the_numbers(toy, tmp_path):
    """A quiet sweep measures no time, a talking one does."""
    assert run(tmp_path, TOY, name="quiet") == 0
    path = tmp_path / "quiet.yaml"
    assert sweep_command.main([str(path), "--output_dir", str(tmp_path), "--name", "talking"]) == 0
    for label, array in scores(tmp_path / "quiet").items():
        np.testing.assert_array_equal(scores(tmp_path / "talking")[label], array)


def test_members_are_only_swapped_for_the_same_sub_program(toy):
    def parts(**changes: Any) -> list[compiled.Part]:
        return [part for agent in make_agents(parse(described(**changes))) for part in agent.parts()]

    program = compiled.CompiledProgram(parts(), loop.devices.make_mesh(4, 1), 1)
    program.swap(parts(axes=[{"grid": {"lr": [0.5, 0.6, 0.7]}}]))
    for other in ({"seeds": 5}, {"settings": {"repeats": 2}}, {"settings": {"width": 9}}):
        with pytest.raises(ValueError, match="swapped"):
            program.swap(parts(**other))


@pytest.mark.parametrize(
    "labels", [["a b", "a_b"], ["config.yaml"], ["report.html"], ["checkpoint.npz"], ["tensorboard"], ["x" * 300]]
)
def test_labels_that_cannot_be_folders_are_refused(toy, tmp_path, capsys, labels):
    assert run(tmp_path, described(agents={label: {"agent_type": "left"} for label in labels})) == 2
    assert "choose another label" in capsys.readouterr().err
    assert not (tmp_path / "sweep").exists()


@pytest.mark.slow  # one of the regression: test_outside_agents.py
def test_a_real_program_end_to_end(tmp_path):
    settings = {
        "num_train_steps": 40,
        "init_steps": 16,
        "batch_size": 16,
        "eval_frequency": 20,
        "eval_episodes": 1,
        "final_eval_episodes": 2,
        "hidden_dim": 4,
        "capacity": 32,
    }
    description = {
        "program": "rl",
        "settings": settings,
        "agents": ["mle", "sql"],
        "axes": [{"grid": {"model_hidden_dim": [2, 4]}}],
        "seeds": 2,
        "report": {"figures": [{"kind": "sensitivity", "axis": "model_hidden_dim"}]},
    }
    assert run(tmp_path, description, "--devices", "2") == 0
    dataset = datasets.load(tmp_path / "sweep" / "mle")
    assert dataset.attrs["compilations"] == 1
    assert dataset.final_return.shape == (2, 2, 2)
    assert not dataset.failed.values.any()
    assert "optimality gap to 500" in (tmp_path / "sweep" / "report.md").read_text()


@pytest.mark.parametrize("words", [["lr=0.1"], ["lr=0.1", "agents=left"], ["lr=0.1", "seeds.count=1"], ["lr=10"]])
def test_figures_of_an_axis_that_was_overridden_are_left_out(toy, tmp_path, words):
    shown = [{"kind": "sensitivity", "axis": name} for name in ("lr", "width")]
    assert run(tmp_path, described(report={"figures": shown}), *words) == int(words == ["lr=10"])
    assert not list((tmp_path / "sweep" / "figures").glob("study-*"))
    assert (tmp_path / "sweep" / "report.html").exists()


def test_the_video_shows_the_median_member_of_the_best_setting(toy, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(toy.program(toy()).__class__, "episode", None, raising=False)
    monkeypatch.setattr(sweep.videos, "write_video", lambda *given: shown.append(given[:3]))
    axes = [{"grid": {"lr": [0.001, 0.01, 0.1], "repeats": [1, 2]}}]
    assert run(tmp_path, described(axes=axes, seeds={"count": 5, "select": 2}), "--video") == 0
    for label, (part, state, member) in zip(("left", "right"), shown, strict=True):
        settings = part.grid.settings(member)
        assert (part.label, settings["lr"]) == (f"{label}, repeats=1", 0.01)
        dataset = datasets.load(tmp_path / "sweep" / label).sel(lr=0.01, repeats=1)
        assert settings["seed"] == dataset.seed.values[np.argsort(dataset.final_score.values[:, 0])[2]]
        assert len(state[0].walk) == len(part.grid)


def test_a_search_keeps_no_policy_to_show(toy, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(toy.program(toy()).__class__, "episode", None, raising=False)
    assert run(tmp_path, TOY, "--halving", "1", "--video") == 2
    assert "--video does not go with es and halving" in capsys.readouterr().err


def test_the_toy_is_not_left_registered():
    assert "toy" not in programs.REGISTRY

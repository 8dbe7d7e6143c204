"""Agents from outside the package (`tests/outside.py`): all that the package's own agents have comes with them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import yaml

from purejax_bilevel import ContinuousConfig, RegressionConfig, RLConfig, TabularConfig, networks, scripts
from purejax_bilevel.agents import registry
from purejax_bilevel.configuration import replace
from purejax_bilevel.errors import UserError
from purejax_bilevel.program import Configuration
from purejax_bilevel.programs.control import agents
from purejax_bilevel.results import dataset as datasets
from purejax_bilevel.studies import command_line, plan, study, sweep_command
from purejax_bilevel.studies import run as runs
from tests import outside
from tests.programs.control import test_probes
from tests.programs.programs import check_resume_is_bitwise, initial_learners, moved, train

pytestmark = pytest.mark.usefixtures("compiled_once")

MINE = "tests.outside:SLOW"
SMALL = RLConfig(
    agent_type=MINE,
    num_train_steps=60,
    init_steps=16,
    batch_size=16,
    capacity=40,
    hidden_dim=5,
    eval_frequency=20,
    eval_episodes=1,
    final_eval_episodes=1,
)
TINY = (
    "--init_steps 16 --batch_size 16 --capacity 40 --hidden_dim 4 --model_hidden_dim 2 --eval_frequency 20 "
    "--eval_episodes 1 --final_eval_episodes 1"
)


@pytest.fixture(scope="module", autouse=True)
def _restored() -> Iterator[None]:
    """What this file adds to the registries goes with it."""
    with pytest.MonkeyPatch.context() as patch:
        _forget(patch)
        yield


@pytest.fixture(autouse=True)
def _forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test starts with the package's own agents."""
    _forget(monkeypatch)


def _forget(patch: pytest.MonkeyPatch) -> None:
    for config_class in (RLConfig, ContinuousConfig, RegressionConfig, TabularConfig):
        known: Any = registry(config_class)
        patch.setattr(known, "_agents", {name: known[name] for name in known if name in known._reserved})
        patch.setattr(known, "_names", [name for name in known._names if name in known._reserved])


def parse(words: str) -> RLConfig:
    return command_line.parse(RLConfig, "", words.split())[1].resolved()


def shown(config_class: type, words: str, capsys: pytest.CaptureFixture) -> str:
    with pytest.raises(SystemExit):
        command_line.parse(config_class, "", [*words.split(), "--help"])
    return " ".join(capsys.readouterr().out.replace("│", " ").split())


# --- command line -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [f"--agent_type {MINE}", f"--agent_type={MINE}", f"--agent-type {MINE}"])
def test_the_command_line_loads_it_with_its_tuned_values(words: str):
    config = parse(f"{words} --lr 0.5")
    assert (config.agent_type, config.lr, config.inner_lr, config.tau) == (MINE, 0.5, 3e-3, 0.04)
    assert config.title == "slow-CartPole-v1"


def test_help_tells_of_it_and_of_its_settings(capsys: pytest.CaptureFixture):
    before = shown(RLConfig, "", capsys)
    assert "slowly" not in before
    assert "environment step; for mle, vep (default: 1)" in before
    after = shown(RLConfig, f"--agent_type {MINE}", capsys)
    assert f"{MINE}: {outside.SLOW.text}" in after
    assert f"environment step; for mle, vep, {MINE} (default: 1)" in after


def test_it_chooses_the_options():
    for words, chosen in (
        (f"--agent_type {MINE}", RLConfig),
        (f"--agent_type {MINE} --env_name Pendulum-v1", RLConfig),  # it says that the actions are continuous
        ("--agent_type tests.outside:CONTINUOUS", ContinuousConfig),
        ("--agent_type tests.outside:CONTINUOUS --env_name Pendulum-v1", ContinuousConfig),
        ("--agent_type tests.outside:NOTHING --env_name Pendulum-v1", ContinuousConfig),
    ):
        assert scripts.rl_configuration(words.split()) is chosen, words


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (f"{MINE} --with_inv_jac cg", f"--with_inv_jac cg is for --agent_type omd, not {MINE}."),
        (f"{MINE} --num_dual_Q_steps 2", f"for --agent_type funcbo, funcbo_reward_only, not {MINE}."),
        ("mle --smoothing ema", "--smoothing ema is for --agent_type omd, funcbo, funcbo_reward_only, not mle."),
        (f"{MINE} --lr -1", "--lr must be a finite number above 0, got -1.0"),
        ("tests.outside:NOTHING", "the module 'tests.outside' has no agent 'NOTHING'"),
        ("tests.outside:step", "--agent_type tests.outside:step must be a purejax_bilevel.programs.control.agents.Dis"),
        ("tests.outside:CONTINUOUS", "must be a purejax_bilevel.programs.control.agents.DiscreteAgent."),
        ("tests.nowhere:SLOW", "the module tests.nowhere cannot be imported (No module named 'tests.nowhere')"),
        ("tests.outside:NO_RATE", "--lr must be given: the agent tests.outside:NO_RATE has no default for it."),
        ("tests.outside:FIXED_DEFAULT", "FIXED_DEFAULT: defaults must be among lr, inner_lr, tau, got 'num_Q_steps'."),
        ("tests.outside:UNKNOWN_SETTING", "UNKNOWN_SETTING: settings must be among agent_type, env_name"),
        ("slow", "--agent_type must be one of omd, funcbo, funcbo_reward_only, smoothfbo, mle, vep, sql, or module:ag"),
    ],
)
def test_refusals_are_one_sentence(words: str, sentence: str):
    with pytest.raises(UserError, match=r"^[^\n]*$") as refused:
        parse(f"--agent_type {words}")
    assert sentence in str(refused.value)


def test_the_settings_it_names_are_its_own():
    assert parse(f"--agent_type {MINE} --smoothing ema").smoothing == "ema"
    assert parse("--agent_type tests.outside:NO_RATE --lr 0.1").tau == 0.1


def test_a_module_that_fails_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "broken_agent.py").write_text("1 / 0\n")
    (tmp_path / "misnamed_agent.py").write_text(
        "from purejax_bilevel.programs.control.agents import *\nA = DiscreteAgent('Two words', '', model_free_agent)\n"
    )
    with pytest.raises(UserError, match=r"the module broken_agent fails \(ZeroDivisionError: division by zero\)\.$"):
        parse("--agent_type broken_agent:A")
    with pytest.raises(UserError, match="lower-case letters, digits and underscores alone, got 'Two words'"):
        parse("--agent_type misnamed_agent:A")


def test_a_run_can_be_resumed_by_its_folder_alone(tmp_path: Path):
    place = tmp_path / "run"
    options = f"--quiet --devices 1 --output_dir {tmp_path} --name run"
    words = f"--agent_type {MINE} {TINY} --num_train_steps 20 {options}".split()
    assert command_line.main(lambda: scripts.rl_configuration(words), "", words) == 0
    first = datasets.load(place)
    saved = yaml.safe_load((place / "config.yaml").read_text())["config"]
    assert (saved["agent_type"], saved["lr"]) == (MINE, 2e-3)
    longer = f"--resume {place} --num_train_steps 40 --quiet --devices 1".split()
    assert command_line.main(lambda: scripts.rl_configuration(longer), "", longer) == 0
    both = datasets.load(place)
    assert both.step.values.tolist() == [20, 40]
    np.testing.assert_array_equal(both.model_loss[..., :1], first.model_loss)


# --- from Python ------------------------------------------------------------------------------------------------------


def test_a_registered_agent_goes_by_its_name(capsys: pytest.CaptureFixture):
    agents.AGENTS.register(outside.SLOW)
    assert parse("--agent_type SLOW").lr == 2e-3
    assert "vep,sql,slow, MODULE:AGENT}" in shown(RLConfig, "", capsys)
    with pytest.raises(UserError, match=r"must be one of .*, sql, slow, or module:agent, got 'dqn'"):
        RLConfig(agent_type="dqn").resolved()
    agents.AGENTS.register(outside.SLOW)  # once more, as where a notebook's cell is run again


@pytest.mark.parametrize("name", [None, 3, ["omd"], {"omd": {}}])
def test_what_is_no_name_is_refused(name: Any):
    with pytest.raises(UserError, match=r"--agent_type must be one of omd, .*, or module:agent, got"):
        RLConfig(agent_type=name).resolved()


@pytest.mark.parametrize("name", ["omd", "smoothfbo"])
def test_the_packages_own_names_are_taken(name: str):
    with pytest.raises(UserError, match=f"agents.register: {name} is an agent already"):
        agents.AGENTS.register(agents.DiscreteAgent(name, "", agents.model_free_agent))


def test_an_agent_of_another_program_cannot_be_registered():
    with pytest.raises(UserError, match=r"must be a purejax_bilevel\.programs\.control\.agents\.DiscreteAgent\.$"):
        agents.AGENTS.register(outside.CONTINUOUS)  # type: ignore[arg-type]


# --- members ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained() -> tuple[RLConfig, Any, Any]:
    """Two widths, two rates, two seeds on eight devices."""
    config = replace(SMALL, model_hidden_dim=(2, 4), lr=(1e-3, 3e-3))
    return config, *train(config, chunks=2, devices=8)


def test_seeds_and_hyper_parameters_are_members_on_eight_devices(trained: tuple):
    _, part, outcome = trained
    assert (outcome.num_traces, len(part.grid), len(jax.devices())) == (1, 8, 8)
    assert not outcome.failed[0].any()
    start, end = initial_learners(part), outcome.state[0][0].learner
    assert isinstance(end, outside.Learner)
    assert moved(start.slow, end.slow)
    assert moved(end.model, end.slow)
    slow = np.concatenate([leaf.reshape(8, -1) for leaf in jax.tree.leaves(end.slow)], axis=1)
    assert len(np.unique(slow, axis=0)) == 8


@pytest.mark.slow  # as for every agent of the program; by its folder: above
def test_resume_is_bitwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    check_resume_is_bitwise(replace(SMALL, lr=(1e-3, 3e-3)), tmp_path, monkeypatch)


@pytest.mark.slow
def test_it_finds_the_optimal_values_of_the_probes():
    """As the package's own agents do."""
    learner = test_probes.train(replace(test_probes.DISCRETE, agent_type=MINE, lr=3e-3, inner_lr=3e-3))
    values = jax.vmap(lambda q: networks.apply_heads(q, test_probes.SITUATIONS.T).mean(0).T)(learner.q)
    test_probes.test_discrete_values_are_optimal((np.asarray(values), 0.02))
    test_probes.test_discrete_policy_is_optimal((np.asarray(values), 0.02))


# --- sweeps and the other programs ------------------------------------------------------------------------------------


def test_a_sweep_file_names_it():
    given = {"program": "rl", "agents": {"mle": {}, MINE: {}, "mine": {"agent_type": MINE, "lr": 0.1}}}
    made = plan.make_agents(study.parse(given))
    configs = {agent.label: agent.templates[0].config for agent in made}
    assert {label: (config.agent_type, config.lr) for label, config in configs.items()} == {
        "mle": ("mle", 1e-3),
        MINE: (MINE, 2e-3),
        "mine": (MINE, 0.1),
    }
    with pytest.raises(UserError, match="has no agent 'NOTHING'"):
        plan.make_agents(study.parse({**given, "agents": ["tests.outside:NOTHING"]}))
    with pytest.raises(UserError, match="--with_inv_jac cg is for --agent_type omd, not"):
        plan.make_agents(study.parse({**given, "agents": {MINE: {"with_inv_jac": "cg"}}}))


TINY_REGRESSION: dict[str, Any] = {"T_max": 20, "eval_frequency": 10, "n_samples": 12, "batch_size": 5, "hidden_dim": 4}


def test_a_sweep_runs_it(tmp_path: Path):
    given = {
        "program": "regression",
        "settings": {**TINY_REGRESSION, "regret_frequency": 0, "window_size": 4},
        "agents": ["exact", "tests.outside:REGRESSION"],
        "seeds": 2,
    }
    path = tmp_path / "signs.yaml"
    path.write_text(yaml.safe_dump(given))
    assert sweep_command.main([str(path), "--output_dir", str(tmp_path), "--name", "run", "--quiet"]) == 0
    found = {
        datasets.load(file).attrs["agent"]: datasets.load(file) for file in (tmp_path / "run").glob("*/results.nc")
    }
    assert set(found) == {"exact", "tests.outside:REGRESSION"}
    final = [dataset.evaluation_mse.values for dataset in found.values()]
    assert np.isfinite(final).all()
    assert not np.array_equal(*final)


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(
            ContinuousConfig(
                agent_type="tests.outside:CONTINUOUS",
                num_train_steps=20,
                init_steps=10,
                batch_size=8,
                hidden_dim=3,
                model_hidden_dim=3,
                eval_frequency=10,
                eval_episodes=1,
                final_eval_episodes=1,
            ),
            marks=pytest.mark.slow,  # the same for discrete actions: above
        ),
        TabularConfig(agent_type="tests.outside:TABULAR", num_train_steps=20, eval_frequency=10),
    ],
    ids=["continuous", "tabular"],
)
def test_the_other_programs_train_it(config: Configuration):
    found = runs.run(config, num_seeds=2, quiet=True, devices=1)
    assert not found.failed.values.any()
    assert (found.model_gradient_norm.values > 0).any()

"""The three commands: which class of options they choose, and that an installation finds them."""

import importlib
import tomllib
from pathlib import Path

import pytest

from purejax_bilevel import ContinuousConfig, RLConfig, TabularConfig, scripts

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("words", "chosen"),
    [
        ("", RLConfig),
        ("--agent_type funcBO", RLConfig),
        ("--agent_type sac", ContinuousConfig),  # it says that the actions are discrete
        ("--agent_type nobody", RLConfig),
        ("--env_name nowhere", RLConfig),
        ("--env_name=Pendulum-v1", ContinuousConfig),
        ("--env_name Pendulum-v1 --agent_type nobody", ContinuousConfig),
        ("--env_name Pendulum-v1 --agent_type funcbo", ContinuousConfig),
        ("--env_name Pendulum-v1 --agent_type sql", RLConfig),  # it says that the actions are continuous
        ("--env_name Pendulum-v1 --agent_type funcbo_reward_only", RLConfig),
        ("--env_name tabular --agent_type omd", TabularConfig),
    ],
)
def test_environment_and_agent_choose_the_options(words: str, chosen: type) -> None:
    assert scripts.rl_configuration(words.split()) is chosen


def entry_points() -> dict[str, str]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]


@pytest.mark.parametrize("name", ["train-rl", "train-regression", "sweep"])
def test_installed_commands_explain_themselves(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    module, function = entry_points()[f"purejax-bilevel-{name}"].split(":")
    monkeypatch.setattr("sys.argv", [name, "--help"])
    with pytest.raises(SystemExit) as exit:
        getattr(importlib.import_module(module), function)()
    assert exit.value.code == 0
    assert {"train-rl": "--env_name", "train-regression": "--shift_type", "sweep": "--scale"}[name] in (
        capsys.readouterr().out
    )

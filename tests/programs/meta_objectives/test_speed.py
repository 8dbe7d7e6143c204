"""The benchmark of LPG's cost: what it compares is the same computation, and it runs."""

from types import ModuleType

import jax
import numpy as np
import pytest

from purejax_bilevel.programs.meta_objectives.program import Config
from tests.test_benchmarks import load

SIZES = {"env_name": "GridWorld-small-0", "num_agents": 2, "env_workers": 3, "train_rollout_len": 4, "lpg_gru_width": 4}


@pytest.fixture
def speed(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load("lpg_speed", monkeypatch)


@pytest.mark.slow
def test_one_hot_products_give_the_same(speed: ModuleType, float64: None) -> None:
    """Steps as told, of A2C and under an objective, and a whole meta-step: all parameters and weights."""
    made = speed.versions(Config(eval_agents=0, **SIZES).resolved(), updates=3, steps=2)
    assert len(made) == 4
    for part, both in made.items():
        rows, products = (loop(start) for loop, start, _ in both.values())
        if part == "a meta-step":
            rows, products = ((state.learning.weights, state.learning.lives.judged) for state in (rows, products))
        else:
            start = both["rows"][1]
            assert np.abs(rows.agent.actor.network[0].kernel - start.agent.actor.network[0].kernel).max() > 1e-4
            assert both["one-hot"][1].rollout.observations.shape == (3, 5, 289)
            rows, products = rows.agent, products.agent
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), rows, products)


@pytest.mark.slow
def test_it_runs(speed: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = [word for name, value in SIZES.items() for word in (f"--{name}", str(value))]
    speed.main([*sizes, "--members", "1", "3", "--steps", "1", "--updates", "1", "--repeats", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:3]] == ["1", "3"]
    assert "GFLOP/s; per agent" in lines[1]
    assert [line.split(":")[0] for line in lines[3:]] == [
        "an agent's step as told",
        "a step of A2C",
        "rollout, objective and step",
        "a meta-step",
    ]
    assert all(line.endswith("times") for line in lines[3:])

"""The benchmarks of LPG: the table of learning; the one of cost compares the same computation, and runs."""

from pathlib import Path
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
def test_one_hot_products_give_the_same(speed: ModuleType) -> None:
    """Steps as told, of A2C and under an objective: all parameters; meta-steps: the mean meta-gradient too."""
    made = speed.versions(Config(eval_agents=0, **SIZES).resolved(), updates=3, steps=2)
    assert len(made) == 4
    for part, both in made.items():
        rows, products = (loop(start) for loop, start, _ in both.values())
        if part == "a meta-step":
            rows, products = (
                (state.learning.optimizer[0].mu, state.learning.lives.judged) for state in (rows, products)
            )
        else:
            start = both["rows"][1]
            assert np.abs(rows.agent.actor.network[0].kernel - start.agent.actor.network[0].kernel).max() > 1e-4
            assert both["one-hot"][1].rollout.observations.shape == (3, 5, 289)
            rows, products = rows.agent, products.agent
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), rows, products)


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


def test_the_table_of_learning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two meta-seeds on four levels; intervals are of meta-seeds, so that one has none."""
    learning = load("objective_learning", monkeypatch)
    a2c, scores = np.array([1.0, 1.0, 2.0, 4.0]), np.array([[1.0, 0.7, 1.5, 3.2], [0.8, 0.9, 1.4, 2.9]])
    label, mean, share, iqm, near = learning.row("LPG, all", scores, a2c).strip("| ").split(" | ")
    assert (label, mean, share, near) == ("LPG, all", "1.55", "78%", "5 of 8")
    low, high = (float(word) for word in iqm.removeprefix("1.20 (").removesuffix(")").split(" to "))
    assert 1.0 < low < 1.2 < high < 1.4
    assert learning.row("LPG, meta-seed 0", scores[:1], a2c).endswith("| 1.25 | 3 of 4 |")
    learning.draw(a2c, {"LPG": scores, "one": scores[:1]}, tmp_path / "profiles.png")
    assert (tmp_path / "profiles.png").stat().st_size > 5000

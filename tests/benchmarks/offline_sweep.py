"""A pessimism sweep of 5 seeds x 8 lambdas in one call, against its members one after another: the same numbers?

./setup/run python -m pytest -s tests/benchmarks/offline_sweep.py      prints times too; minutes on two cores
"""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from purejax_bilevel.configuration import replace
from purejax_bilevel.programs.offline.program import Config
from purejax_bilevel.runtime import loop
from purejax_bilevel.studies import run as runs
from tests.programs.offline import pendulum

LAMBDAS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0)
ALONE = ((0.0, 0), (0.5, 3), (1.0, 4))  # members that are run again by themselves
UPDATES = 100


def test_sweep(tmp_path: Path):
    dataset = pendulum.saved(tmp_path)
    model = pendulum.saved_model(tmp_path / "model", dataset)
    small: dict[str, Any] = {**pendulum.SMALL, "hidden_dim": 64, "num_train_steps": UPDATES, "eval_frequency": 0}
    config = Config(agent_type="mopo", dataset=dataset, model=model, pessimism=LAMBDAS, **small)
    part = runs.make_part(config.resolved(), 5, 0)
    options = loop.RunOptions(quiet=True)
    together = loop.train([part], options)
    seconds = []
    for pessimism, seed in ALONE:
        alone = loop.train([runs.make_part(replace(config, pessimism=pessimism).resolved(), 1, seed)], options)
        wanted = {"pessimism": pessimism, "seed": seed}
        member = next(i for i in range(len(part.grid)) if part.grid.settings(i) == wanted)
        mine, others = (
            jax.tree.leaves((outcome.state[0][0].learner.policy, outcome.state[0][0].learner.q))
            for outcome in (alone, together)
        )
        largest = max(np.abs(np.asarray(a)[0] - np.asarray(b)[member]).max() for a, b in zip(mine, others, strict=True))
        print(f"\nlambda {pessimism:g}, seed {seed}: parameters differ by {largest:.2g} after {UPDATES} updates")
        assert largest < 1e-4
        seconds.append(alone.run_seconds)
    one_by_one = 40 * float(np.mean(seconds))
    print(
        f"40 members in one call: {together.run_seconds:.1f} s; one after another: {one_by_one:.1f} s (from 3 of them)"
    )
    assert together.run_seconds < 2 * one_by_one

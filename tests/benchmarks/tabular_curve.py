"""The whole published curve of the finite MDP: return of omd and mle at 20 norm bounds, ten seeds, 10 000 steps.

./setup/run python -m pytest -s tests/benchmarks/tabular_curve.py      prints the table too; half a minute on two cores
"""

from pathlib import Path

import numpy as np

from purejax_bilevel.programs.tabular.program import Config
from purejax_bilevel.runtime import loop
from purejax_bilevel.studies import run as runs

GOLDEN = Path(__file__).parents[1] / "data" / "tabular_curve.npz"


def test_curve():
    golden = np.load(GOLDEN)
    bounds = golden["bounds"]
    configs = [
        Config(agent_type=agent, norm_bound=tuple(bounds.tolist()), eval_frequency=0) for agent in ("omd", "mle")
    ]
    parts = [runs.make_part(config.resolved(), num_seeds=10, seed=1) for config in configs]
    outcome = loop.train(parts, loop.RunOptions(quiet=True, devices=2))
    omd, mle = (rows["evaluation_return"][:, -1].reshape(len(bounds), 10).mean(1) for rows in outcome.rows)
    expected = {"omd": golden["omd_return"].mean(1), "mle": golden["mle"].mean(1)}
    print(f"\ncompiled in {outcome.compile_seconds:.1f} s, ran {outcome.run_seconds:.1f} s")
    print("bound    omd  golden     mle  golden")
    for row in zip(bounds, omd, expected["omd"], mle, expected["mle"], strict=True):
        print("{:5.2f} {:6.3f}  {:6.3f}  {:6.3f}  {:6.3f}".format(*row))
    for name, computed in (("omd", omd), ("mle", mle)):
        error = np.abs(computed - expected[name])
        assert (error <= 0.05).all(), f"{name}: {error.max():.3f} at bound {bounds[error.argmax()]:.2f}"
    misspecified = (bounds > 0.6) & (bounds < 4.2)
    assert (omd > mle)[misspecified].all()

"""Whether the agents still learn what README says, with their default rates on seeds that played no part in tuning.

    ./setup/run python tests/benchmarks/learning.py                        # a quarter of an hour on two cores
    ./setup/run python tests/benchmarks/learning.py --only cartpole-sql

Prints the interquartile mean of the last evaluation with its interval beside what is expected; exit status 1 where one
falls short.
"""

import dataclasses
import sys
from typing import Any

import tyro

from purejax_bilevel import ContinuousConfig, RLConfig, run
from purejax_bilevel.results import statistics

PENDULUM: dict[str, Any] = {"env_name": "Pendulum-v1", "hidden_dim": 64, "model_hidden_dim": 64}
EXPECTED = {
    "cartpole-sql": (RLConfig(agent_type="sql"), 400),
    "cartpole-mle": (RLConfig(agent_type="mle"), 400),
    "cartpole-omd": (RLConfig(agent_type="omd"), 440),
    "cartpole-funcbo": (RLConfig(agent_type="funcbo"), 300),
    "pendulum-sac": (ContinuousConfig(agent_type="sac", **PENDULUM), -250),
    "pendulum-omd": (ContinuousConfig(agent_type="omd", **PENDULUM), -250),
}


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What to run."""

    only: tuple[str, ...] = tuple(EXPECTED)
    num_seeds: int = 8
    seed: int = 100


def main(arguments: Arguments) -> int:
    """Trains and compares; returns the number of agents that fall short."""
    short = 0
    for name in arguments.only:
        config, least = EXPECTED[name]
        results = run(config, num_seeds=arguments.num_seeds, seed=arguments.seed)
        (row,) = statistics.summary_table(results, "final_return")
        falls_short = not row.iqm >= least
        short += falls_short
        verdict = "FALLS SHORT OF" if falls_short else "at least"
        print(f"{name}: {row.iqm:.0f} ({row.low:.0f} to {row.high:.0f}), {verdict} {least}", flush=True)
    return short


if __name__ == "__main__":
    sys.exit(min(main(tyro.cli(Arguments, use_underscores=True)), 1))

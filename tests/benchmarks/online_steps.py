"""Environment steps until an evaluation on Pendulum has the mean return -200: MBPO against soft actor-critic.

    ./setup/run python tests/benchmarks/online_steps.py                              # trains both, many minutes
    ./setup/run python tests/benchmarks/online_steps.py --runs runs/mbpo runs/sac    # of runs that are there

Prints the first step of each seed; when it trains, the exit status is 1 where fewer than four of five seeds get there
within 5000 steps (MBPO) and 20 000 (soft actor-critic).
"""

import dataclasses
import math
import sys
from typing import Any

import numpy as np
import tyro
import xarray

from purejax_bilevel import ContinuousConfig, run
from purejax_bilevel.programs.offline.online import Config
from purejax_bilevel.results import dataset as datasets

LEVEL = -200.0
SHARED: dict[str, Any] = {
    "env_name": "Pendulum-v1",
    "hidden_dim": 64,
    "batch_size": 128,
    "policy_lr": 1e-3,
    "tau": 0.01,
    "init_steps": 250,
    "eval_frequency": 250,
}
MODEL: dict[str, Any] = {
    "model_networks": 5,
    "model_hidden_dim": 64,
    "model_layers": 2,
    "num_rollouts": 20,
    "capacity": 50_000,
}
TRAINED = {
    "mbpo": Config(agent_type="mbpo", q_lr=1e-3, num_train_steps=5000, **SHARED, **MODEL),
    "sac": ContinuousConfig(agent_type="sac", inner_lr=1e-3, num_train_steps=20_000, **SHARED),
}


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What to look at."""

    runs: tuple[str, ...] = ()  # folders; none: train
    only: tuple[str, ...] = tuple(TRAINED)
    num_seeds: int = 5
    seed: int = 100


def first_steps(dataset: xarray.Dataset, level: float = LEVEL) -> np.ndarray:
    """The first step whose evaluation reaches a level, infinity where none does: `[..., seeds]`."""
    reached = dataset["evaluation_return"] >= level
    first = np.where(reached.any("step"), dataset["step"].values[reached.argmax("step").values], math.inf)
    return np.asarray(first)


def main(arguments: Arguments) -> int:
    """Prints the steps; returns the number of agents that fall short."""
    for place in arguments.runs:
        print(f"{place}: {first_steps(datasets.load(place)).tolist()}")
    short = 0
    for name in () if arguments.runs else arguments.only:
        config = TRAINED[name]
        steps = first_steps(run(config, num_seeds=arguments.num_seeds, seed=arguments.seed))
        falls_short = np.isfinite(steps).sum() < 0.8 * arguments.num_seeds
        short += falls_short
        print(f"{name}: {steps.tolist()} {'FALLS SHORT' if falls_short else ''}", flush=True)
    return int(short)


if __name__ == "__main__":
    sys.exit(min(main(tyro.cli(Arguments, use_underscores=True)), 1))

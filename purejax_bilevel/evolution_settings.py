"""Settings of an evolution strategy (`evolution.py`); reading them takes no jax."""

from typing import Literal

from purejax_bilevel.configuration import FRACTION, NONNEGATIVE, POSITIVE, Check, configuration, static, traced

MOST = 1_000_000  # candidates: more are told here, not by a compiler that takes minutes to find out
EVEN = Check(f"an even whole number from 2 to {MOST}", lambda x: x == int(x) and 2 <= x <= MOST and x % 2 == 0)
DECAY = Check("a number above 0, at most 1", lambda x: 0 < x <= 1)
MOMENTUM = Check("a number from 0 to below 1", lambda x: 0 <= x < 1)
GROUP = "evolution strategy"


@configuration
class Evolution:
    """An evolution strategy; defaults are those of OPEN on MinAtar (Goldie et al. 2024, table 9)."""

    strategy: Literal["open_es", "pgpe"] = static(
        "open_es", "one sigma with a schedule (OpenAI-ES), or a learned one per parameter (PGPE)", group=GROUP
    )
    population: int = static(64, "candidates of a generation, in mirrored pairs", EVEN, GROUP)
    fitness_shaping: Literal["ranks", "pairs"] = static(
        "ranks", "a candidate's rank in the population, or which one of each mirrored pair is better", group=GROUP
    )
    ties: Literal["shared", "by_order"] = static(
        "shared", "equal fitness: equal shares (default), or decided by the order as in evosax 0.1", group=GROUP
    )
    es_optimizer: Literal["adam", "sgd"] = static("adam", "steps of the mean", group=GROUP)
    sigma: float = traced(0.03, "standard deviation of the candidates, at first", POSITIVE, GROUP)
    sigma_decay: float = traced(0.999, "open_es: factor of sigma per generation", DECAY, GROUP)
    sigma_lr: float = traced(0.1, "pgpe: rate of sigma", NONNEGATIVE, GROUP)
    sigma_floor: float = traced(0.0, "sigma does not go below", NONNEGATIVE, GROUP)
    es_lr: float = traced(0.03, "rate of the mean, at first", POSITIVE, GROUP)
    es_lr_decay: float = traced(0.999, "factor of that rate per generation", DECAY, GROUP)
    es_lr_floor: float = traced(0.0, "that rate does not go below", NONNEGATIVE, GROUP)
    es_beta_1: float = traced(0.99, "Adam's decay of the mean gradient", MOMENTUM, GROUP)
    es_beta_2: float = traced(0.999, "Adam's decay of the squared gradient", MOMENTUM, GROUP)
    mean_decay: float = traced(0.0, "share of the mean that is taken off per generation", FRACTION, GROUP)

"""Rates of optimisers, for all environments and for those on which they were tuned: tables only.

Source: Goldie et al. 2024 (OPEN), tables 4 to 6, for two hidden layers of 64 units (Grid-World 16) and the gradients of
actor and critic clipped to 0.5 each.
"""

from typing import NamedTuple


class Rates(NamedTuple):
    """Of one optimiser; None for those that it does not have."""

    lr: float | None = None
    beta1: float | None = None
    beta2: float | None = None
    epsilon: float | None = None
    anneal: float | None = None


GENERAL = {
    "adam": Rates(2.5e-4, 0.9, 0.999, 1e-5, 1.0),
    "rmsprop": Rates(1e-3, None, 0.99, 1e-8, 1.0),
    "lion": Rates(3e-4, 0.9, 0.99, None, 1.0),
    "sgd": Rates(1e-2, 0.0, None, None, 1.0),
    "open": Rates(),
    "no_features": Rates(),
}

GAMES = {"Asterix-MinAtar": "asterix", "Freeway-MinAtar": "freeway", "Breakout-MinAtar": "breakout"}
GAMES |= {"SpaceInvaders-MinAtar": "spaceinvaders"}

_ADAM = {
    "asterix": (0.003, 0.9, 0.999),
    "freeway": (0.001, 0.9, 0.99),
    "breakout": (0.01, 0.9, 0.99),
    "spaceinvaders": (0.007, 0.9, 0.99),
    "ant": (0.0003, 0.99, 0.99),
    "gridworld": (0.0001, 0.99, 0.99),
}
_RMSPROP = {
    "asterix": (0.002, 0.99, 1.0),
    "freeway": (0.001, 0.999, 1.0),
    "breakout": (0.002, 0.99, 0.0),
    "spaceinvaders": (0.009, 0.99, 1.0),
    "ant": (0.0008, 0.99, 0.0),
}
_LION = {
    "asterix": (0.0003, 0.99, 0.9, 1.0),
    "freeway": (0.0003, 0.9, 0.9, 1.0),
    "breakout": (0.0008, 0.9, 0.9, 0.0),
    "spaceinvaders": (0.0008, 0.9, 0.99, 1.0),
    "ant": (0.00015, 0.9, 0.9, 1.0),
}

TUNED = {
    "adam": {name: Rates(*rates, 1e-5, 1.0) for name, rates in _ADAM.items()},
    "rmsprop": {name: Rates(lr, None, decay, 1e-8, anneal) for name, (lr, decay, anneal) in _RMSPROP.items()},
    "lion": {name: Rates(lr, beta1, beta2, None, anneal) for name, (lr, beta1, beta2, anneal) in _LION.items()},
}


def family(env_name: str) -> str:
    """The name under which an environment is in the tables above; of published weights too."""
    base = env_name.partition(":")[0]
    return GAMES.get(env_name, "gridworld" if env_name.startswith("GridWorld-") else base)


def rates(optimizer: str, env_name: str) -> Rates:
    """Those of an optimiser on an environment."""
    return TUNED.get(optimizer, {}).get(family(env_name), GENERAL.get(optimizer, Rates()))

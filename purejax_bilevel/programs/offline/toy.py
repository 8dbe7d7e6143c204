"""A dataset to look at: a sine with noise of changing size, and a gap in the middle.

Inputs are one observation x and an action that is always 0; the next observation and the reward are both
y = sin x + noise with the standard deviation 0.225 |sin(1.5 x + pi / 8)|. Source: Mr-Pepe's toy dataset, after Chua et
al. 2018 (PETS), figure 2.
"""

import functools
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from purejax_bilevel.programs.offline.datasets import Dataset

NAME, GRID = "sine", "sine-grid"  # for --dataset: the data, and a grid without noise that goes over the gap and beyond
POINTS = 1000  # on each side
GRID_POINTS = 600


def noise_std(x: np.ndarray) -> np.ndarray:
    """Standard deviation of the noise at x."""
    return 0.225 * np.abs(np.sin(1.5 * x + np.pi / 8))


def grid(points: int) -> np.ndarray:
    """Inputs from -3 pi to 3 pi: data lies from pi to 2 pi on both sides."""
    return np.linspace(-3 * np.pi, 3 * np.pi, points)


@functools.cache
def make(name: str) -> "Dataset":
    """The dataset of a name."""
    if name == GRID:
        x = grid(GRID_POINTS)
        return _dataset(x, np.sin(x), name)
    random = np.random.default_rng(0)
    x = np.concatenate([random.uniform(-2 * np.pi, -np.pi, POINTS), random.uniform(np.pi, 2 * np.pi, POINTS)])
    return _dataset(x, np.sin(x) + noise_std(x) * random.standard_normal(len(x)), name)


def _dataset(x: np.ndarray, y: np.ndarray, name: str) -> "Dataset":
    from purejax_bilevel.programs.offline.datasets import Dataset  # here alone: figures need no jax

    obs, following = (column[:, None].astype(np.float32) for column in (x, y))
    never = np.zeros(len(x), bool)
    action = np.zeros((len(x), 1), np.float32)
    return Dataset(obs, action, following[:, 0], following, never, ~never, environment=NAME, source=name)

"""A small dataset of Pendulum, made by its equations: what the tests of offline agents learn from."""

from pathlib import Path

import numpy as np

from purejax_bilevel.programs.offline import dataset_files
from purejax_bilevel.programs.offline.datasets import Dataset, Scores

LIMIT = 200


def dataset(rows: int = 600, seed: int = 0, environment: str = "Pendulum-v1") -> Dataset:
    """Episodes of uniform actions."""
    random = np.random.default_rng(seed)
    angle, speed = random.uniform(-np.pi, np.pi), random.uniform(-1, 1)
    kept = []
    for row in range(rows):
        action = random.uniform(-1, 1)
        cost = angle**2 + 0.1 * speed**2 + 0.001 * (2 * action) ** 2
        before = (np.cos(angle), np.sin(angle), speed)
        speed = np.clip(speed + (15.0 * np.sin(angle) + 3.0 * 2 * action) * 0.05, -8, 8)
        angle += speed * 0.05
        kept.append((*before, np.cos(angle), np.sin(angle), speed, action, -cost))
        angle = (angle + np.pi) % (2 * np.pi) - np.pi
        if row % LIMIT == LIMIT - 1:
            angle, speed = random.uniform(-np.pi, np.pi), random.uniform(-1, 1)
    columns = np.array(kept, np.float32)
    timeout = np.arange(rows) % LIMIT == LIMIT - 1
    return Dataset(
        obs=columns[:, :3],
        next_obs=columns[:, 3:6],
        action=columns[:, 6:7],
        reward=columns[:, 7],
        terminated=np.zeros(rows, bool),
        timeout=timeout,
        environment=environment,
        scores=Scores(-1200.0, -150.0),
    )


def saved(folder: Path, name: str = "tiny.npz", **changes: object) -> str:
    """The file of such a dataset."""
    return str(dataset_files.save(dataset(**changes), folder / name))  # type: ignore[arg-type]

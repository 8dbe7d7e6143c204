"""A small dataset of Pendulum, made by its equations: what the tests of offline agents learn from."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from purejax_bilevel.configuration import replace, to_dict
from purejax_bilevel.networks import Layer
from purejax_bilevel.programs.offline import (
    dataset_files,
    ensemble,
    ensemble_program,
    fitting,
    online,
    saved_policies,
)
from purejax_bilevel.programs.offline.datasets import Dataset, Scores
from purejax_bilevel.programs.offline.ensemble import Normaliser
from purejax_bilevel.programs.offline.fitting import Model
from purejax_bilevel.programs.offline.saved_policies import SavedPolicy
from purejax_bilevel.runtime import artefacts

LIMIT = 200
HIDDEN = 7  # units of the policy that nobody has trained
SMALL: dict[str, Any] = {
    "num_train_steps": 60,
    "eval_frequency": 20,
    "eval_episodes": 1,
    "final_eval_episodes": 2,
    "hidden_dim": 5,
    "batch_size": 16,
    "num_rollouts": 4,
    "capacity": 40,
    "num_elites": 2,
    "model_networks": 3,
    "model_hidden_dim": 6,
    "model_layers": 1,
    "model_batch_size": 32,
    "model_epochs": 4,
    "model_epoch_steps": 3,
}


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


def saved_model(folder: Path, dataset: str, **changes: Any) -> str:
    """The folder of a run that left two ensembles, which nobody has fitted."""
    own = {name: value for name, value in SMALL.items() if name.startswith("model")}
    config = ensemble_program.Config(dataset=dataset, **own | changes)
    data = ensemble_program.dataset_of(config)
    architecture = fitting.architecture_of(config, data.obs_dim, data.action_dim)
    rows = fitting.shared_rows(data, False)
    normaliser = Normaliser(jnp.asarray(rows["mean"]), jnp.asarray(rows["std"]))
    errors, ranking = jnp.ones(config.model_networks), jnp.arange(config.model_networks, dtype=jnp.int32)
    members = [Model(ensemble.init(architecture, jax.random.key(i)), normaliser, ranking, errors) for i in range(2)]
    folder.mkdir(parents=True)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)
    artefacts.save(folder, ensemble_program.KIND, stacked, [{"seed": 0}, {"seed": 1}], to_dict(config))
    return str(folder)


def saved_policy(folder: Path, obs_dim: int = 3) -> str:
    """The folder of a run that left two policies with random networks, of three critics with a hidden layer each."""
    config = replace(online.Config(), hidden_dim=HIDDEN, num_layers=1, num_critics=3, layer_norm=True)
    folder.mkdir(parents=True)
    artefacts.save(folder, saved_policies.KIND, policies(obs_dim), [{"seed": 0}, {"seed": 1}], to_dict(config))
    return str(folder)


def policies(obs_dim: int = 3, action_dim: int = 1) -> SavedPolicy:
    """What is in it: numpy arrays `[members, ...]`."""
    random = np.random.default_rng(obs_dim)
    normal = lambda *shape: random.standard_normal((2, *shape)).astype(np.float32)  # noqa: E731

    def network(inputs: int, outputs: int) -> Any:
        return tuple(Layer(normal(i, o), normal(o)) for i, o in ((inputs, HIDDEN), (HIDDEN, outputs)))

    critics = [tuple(network(obs_dim + action_dim, 1) for _ in range(3)) for _ in range(2)]
    return SavedPolicy(network(obs_dim, 2 * action_dim), *critics, normal(), normal(obs_dim), np.abs(normal(obs_dim)))


def files_of_presets(folder: Path) -> None:
    """What presets and pages expect in a folder: datasets in runs/pendulum, ensembles and a policy beside it."""
    saved_policy(folder / "runs" / "mopo")
    place = folder / "runs" / "pendulum"
    place.mkdir(parents=True, exist_ok=True)
    for kind in ("random", "medium", "medium-replay", "medium-expert"):
        saved_model(folder / "runs" / f"ensemble-{kind}", saved(place, f"{kind}.npz"), model_networks=5)

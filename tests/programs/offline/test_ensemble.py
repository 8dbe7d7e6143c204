"""The ensemble against the numbers of the reference, its facts, and its training.

Files are those of `tests/data/offline`, and of the folder named by PUREJAX_BILEVEL_REFERENCE_DATA where it has some.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from purejax_bilevel.programs.offline import termination
from purejax_bilevel.programs.offline.ensemble import (
    Architecture,
    Bounds,
    Layer,
    Networks,
    Normaliser,
    Transitions,
    chosen,
    fit_normaliser,
    losses,
    no_normaliser,
    optimizer,
    predict,
    sampled,
    softly_bounded,
    train_step,
    validation_errors,
    with_reference_noise,
)
from purejax_bilevel.programs.offline.uncertainty import uncertainty

OWN = Path(__file__).parents[2] / "data" / "offline"
GIVEN = os.environ.get("PUREJAX_BILEVEL_REFERENCE_DATA")
Arrays = Mapping[str, np.ndarray]


def files(pattern: str) -> list[Any]:
    given = sorted(Path(GIVEN).rglob(pattern)) if GIVEN else []
    found = [*sorted(OWN.glob(pattern)), *given]
    assert found, pattern
    return [pytest.param(path, id=f"{path.parent.name}-{path.stem}") for path in found]


def beside(path: Path, part: str) -> Arrays:
    """The file of the same series with another part: weights lie in one only."""
    own = path.with_name(path.name.replace("train", part).replace("predictions", part))
    return np.load(own if own.exists() else path.with_name(f"offline_{part}.npz"))


def architecture_of(arrays: Arrays, **changes: Any) -> Architecture:
    sizes = [int(arrays[f"config/{name}"]) for name in ("obs_dim", "act_dim", "n_networks")]
    return Architecture(*sizes, hidden=tuple(int(units) for units in arrays["config/hidden"]), **changes)


def networks_of(arrays: Arrays, prefix: str = "weights") -> Networks:
    """The reference's arrays as this project's; missing ones (a file may have a part of them) are left out."""

    def trunk(name: str) -> tuple[Layer, ...]:
        entries = [f"{prefix}/{name}/{number}" for number in range(20)]
        return tuple(Layer(doubled(arrays[f"{e}/w"]), doubled(arrays[f"{e}/b"])) for e in entries if f"{e}/w" in arrays)

    bounds = Bounds(*(doubled(arrays[f"{prefix}/bounds/{name}"]) for name in ("max_obs", "max_reward", "min")))
    return Networks({"obs": trunk("obs"), "reward": trunk("reward")}, bounds)


def doubled(array: np.ndarray) -> jax.Array:
    return jnp.asarray(array, jnp.float64)


def normaliser_of(arrays: Arrays, architecture: Architecture, tag: str) -> Normaliser:
    if tag == "plain":
        return no_normaliser(architecture)
    return Normaliser(doubled(arrays["normaliser/mean"]), doubled(arrays["normaliser/std"]))


def close(found: Any, expected: Any, rtol: float = 1e-9, atol: float = 1e-12) -> None:
    np.testing.assert_allclose(np.asarray(found), np.asarray(expected), rtol=rtol, atol=atol)


# --- forward ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tag", ["plain", "norm"])
@pytest.mark.parametrize("path", files("offline_ensemble*.npz"))
def test_forward_pass_of_the_reference(path: Path, tag: str, float64: None) -> None:
    arrays = np.load(path)
    architecture = architecture_of(arrays)
    normaliser, networks = normaliser_of(arrays, architecture, tag), networks_of(arrays)
    obs, action = jnp.split(doubled(arrays["in/obs_act"]), [architecture.obs_dim], -1)
    prediction = predict(architecture, networks, normaliser, obs, action)
    close(prediction.mean, arrays[f"out/{tag}/mean"])
    close(prediction.log_var, arrays[f"out/{tag}/logvar"], rtol=5e-9)
    close(sampled(with_reference_noise(prediction), arrays["in/eps"]), arrays[f"out/{tag}/sample"])
    deterministic = predict(architecture_of(arrays, probabilistic=False), networks, normaliser, obs, action)
    close(sampled(deterministic, arrays["in/eps"]), arrays[f"out/{tag}/deterministic"])
    assert not deterministic.log_var.any()


@pytest.mark.parametrize("path", files("offline_ensemble*.npz"))
def test_normaliser_and_soft_bounds_of_the_reference(path: Path, float64: None) -> None:
    arrays = np.load(path)
    split = int(arrays["config/obs_dim"])
    found = fit_normaliser(*np.split(arrays["normaliser/data"], [split], 1))
    close(found.mean, arrays["normaliser/mean"])
    close(found.std, arrays["normaliser/std"])
    low, high = float(arrays["clamp/min"]), float(arrays["clamp/max"])
    value, gradient = jax.vmap(jax.value_and_grad(lambda raw: softly_bounded(raw, low, high)))(arrays["clamp/raw"])
    close(value, arrays["clamp/out"], rtol=5e-9)
    close(gradient, arrays["clamp/grad_raw"], rtol=5e-9)
    close(softly_bounded(5.0, low, 1.0), arrays["clamp/out_reward_raw5_max1"])


def test_a_column_that_does_not_vary_is_left_as_it_is() -> None:
    normaliser = fit_normaliser(np.array([[1.0, 2.0], [3.0, 2.0]]), np.array([[0.5], [0.5]]))
    np.testing.assert_allclose(normaliser(jnp.array([1.0, 2.5, 0.5])), [-(0.5**0.5), 0.5, 0.0], rtol=1e-6)


@pytest.mark.parametrize("tag", ["plain", "norm"])
@pytest.mark.parametrize("path", files("offline_predictions*.npz"))
def test_uncertainty_of_the_reference(path: Path, tag: str, float64: None) -> None:
    arrays = np.load(path)
    architecture, networks = architecture_of(arrays), networks_of(beside(path, "ensemble"))
    normaliser = normaliser_of(arrays, architecture, tag)
    obs, action = jnp.split(doubled(arrays["in/obs_act"]), [architecture.obs_dim], -1)
    prediction = predict(architecture, networks, normaliser, obs, action)
    close(uncertainty("max_distance", prediction, normaliser), arrays[f"{tag}/u_ep"])
    close(uncertainty("max_variance", prediction, normaliser), arrays[f"{tag}/u_al"], rtol=5e-9)
    rule = termination.of(str(arrays["config/termination"]))
    assert rule is not None
    rows = with_reference_noise(prediction)
    for number in range(architecture.networks):
        own = chosen(rows, jnp.full(len(obs), number))
        found = sampled(own, arrays["in/eps"][number])
        close(found, arrays[f"{tag}/mode_none"][number, :, :-1])
        close(rule(found[:, :-1]), arrays[f"{tag}/mode_none"][number, :, -1])


@pytest.mark.parametrize("path", files("offline_termination*.npz"))
def test_terminations_of_the_reference(path: Path, float64: None) -> None:
    arrays = np.load(path)
    for name in sorted({key.partition("/")[0] for key in arrays}):
        rule = termination.of(name)
        assert rule is not None
        np.testing.assert_array_equal(rule(jnp.asarray(arrays[f"{name}/obs"])), arrays[f"{name}/done"])
        single = jnp.asarray(arrays[f"{name}/obs"], jnp.float32)
        np.testing.assert_array_equal(rule(single), arrays[f"{name}/done_float32"])


# --- learning ---------------------------------------------------------------------------------------------------------


CASES = {
    "prob_plain": (True, "plain"),
    "prob_norm": (True, "norm"),
    "det_plain": (False, "plain"),
    "det_norm": (False, "norm"),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("path", files("offline_train.npz"))
def test_a_training_step_of_the_reference(path: Path, case: str, float64: None) -> None:
    arrays, (probabilistic, tag) = np.load(path), CASES[case]
    architecture = architecture_of(arrays, probabilistic=probabilistic, normalise_targets=probabilistic)
    networks, normaliser = networks_of(beside(path, "ensemble")), normaliser_of(arrays, architecture, tag)
    obs, action, reward, next_obs = (doubled(arrays[f"batch/{name}"]) for name in ("obs", "act", "rew", "next_obs"))
    batch = Transitions(obs, action, reward, next_obs, jnp.zeros_like(reward))
    lr, decay = float(arrays["config/lr"]), float(arrays["config/weight_decay"])

    @jax.jit
    def measured(networks: Networks) -> tuple[Any, ...]:
        gradient = jax.grad(lambda networks: losses(architecture, networks, normaliser, batch).loss)(networks)
        state = optimizer(lr, decay).init(networks)
        stepped, _, found = train_step(architecture, networks, normaliser, state, batch, lr, decay)
        errors = validation_errors(architecture, networks, normaliser, batch)
        return gradient, stepped, found, errors, losses(architecture, stepped, normaliser, batch)

    gradient, stepped, found, errors, after = measured(networks)
    close(found.loss, arrays[f"{case}/loss"])
    close(found.per_network, arrays[f"{case}/loss_per_network"])
    close(errors, arrays[f"{case}/validation_mse_per_network"])
    close(after.loss, arrays[f"{case}/loss_after_step"], rtol=1e-7)
    delta = jax.tree.map(jnp.subtract, stepped, networks)
    for name, tree in (("grad", gradient), ("delta", delta)):
        squares = jax.tree.map(lambda leaf: jnp.square(leaf).sum(), tree)
        close(jnp.sqrt(sum(jax.tree.leaves(squares))), arrays[f"{case}/{name}_l2"], rtol=1e-7)
        _compare(tree, dict(arrays), f"{case}/{name}")
        for other in path.parent.glob(f"{path.stem}_{case}_{'grad' if name == 'grad' else 'step'}.npz"):
            _compare(tree, dict(np.load(other)), name)


def _compare(tree: Networks, arrays: Arrays, prefix: str) -> None:
    named = {f"{prefix}/bounds/{name}": leaf for name, leaf in tree.bounds._asdict().items()}
    for trunk, layers in tree.trunks.items():
        for number, layer in enumerate(layers):
            named |= {f"{prefix}/{trunk}/{number}/w": layer.kernel, f"{prefix}/{trunk}/{number}/b": layer.bias}
    compared = [name for name in named if name in arrays]
    assert {name for name in arrays if name.startswith(f"{prefix}/")} <= set(named)
    for name in compared:
        loose = arrays[name].dtype == np.float32
        # Where a gradient is 1e-11 of the others, Adam's step is a quotient of rounding errors.
        close(named[name], arrays[name], rtol=1e-6, atol=1e-9 if loose else 1e-10)

"""OPEN against the numbers of the original code: weight vectors, single steps, and the optimiser's part of PPO runs.

Files are those of `tests/data/open`, and of the folder named by PUREJAX_BILEVEL_REFERENCE_DATA where it has some.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from purejax_bilevel.programs.learned_optimizers import Switches, load_weights, open_optimizer
from purejax_bilevel.programs.learned_optimizers import layout as layout_module
from purejax_bilevel.programs.learned_optimizers.layout import layout_of
from purejax_bilevel.programs.learned_optimizers.optimizer import _Seen, features
from purejax_bilevel.programs.learned_optimizers.update_rules import PUBLISHED

OWN = Path(__file__).parents[2] / "data" / "open"
GIVEN = os.environ.get("PUREJAX_BILEVEL_REFERENCE_DATA")
QUIET = Switches(noise=False)
# L2 of the published vectors.
LENGTHS = {
    "ant": 22.31665,
    "asterix": 20.65594,
    "breakout": 19.62708,
    "freeway": 24.19941,
    "gridworld": 3.45818,
    "spaceinvaders": 15.46498,
    "multi": 28.44744,
}


def files(pattern: str) -> list[Path]:
    given = sorted(Path(GIVEN).rglob(pattern)) if GIVEN else []
    found = {path.name: path for path in [*sorted(OWN.glob(pattern)), *given]}
    assert found, pattern
    return list(found.values())


def weights_of(name: str) -> np.ndarray:
    return load_weights(PUBLISHED / f"{name}_OPEN.npy")


def tree_of(entries: Any) -> Any:
    """Nested dictionaries whose lists are arrays."""
    if isinstance(entries, dict):
        return {name: tree_of(entry) for name, entry in entries.items()}
    return jnp.asarray(entries)


# --- weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LENGTHS)
def test_published_weights(name: str) -> None:
    path = PUBLISHED / f"{name}_OPEN.npy"
    sums = dict(reversed(line.split()) for line in (PUBLISHED / "SHA256SUMS").read_text().splitlines())
    assert hashlib.sha256(path.read_bytes()).hexdigest() == sums[path.name]
    weights = load_weights(path)
    assert weights.shape == ((3571,) if name == "multi" else (1211,))
    np.testing.assert_allclose(np.linalg.norm(weights.astype(float)), LENGTHS[name], atol=1e-4)


# --- single steps -----------------------------------------------------------------------------------------------------


def single_steps() -> list[Any]:
    cases = [(path, case) for path in files("open_optimizer*.json") for case in json.loads(path.read_text())["cases"]]
    return [pytest.param(case, id=f"{path.stem}-{case['weights']}-{i}") for i, (path, case) in enumerate(cases)]


def activations_of(case: dict[str, Any]) -> dict[str, Any]:
    """Those of the file lie in a tuple for each network, kernel and bias apart."""
    return {
        net: {"params": dict(zip(layers["params"], tree_of_items(case["activations"][net]), strict=True))}
        for net, layers in case["params0"].items()
    }


def tree_of_items(layers: list[Any]) -> list[jax.Array]:
    return [jnp.asarray(layer["kernel"] if isinstance(layer, dict) else layer) for layer in layers]


@pytest.mark.parametrize("case", single_steps())
def test_three_steps(case: dict[str, Any]) -> None:
    params = tree_of(case["params0"])
    optimiser = open_optimizer(weights_of(case["weights"]), QUIET)
    state, activations = optimiser.init(params), activations_of(case)
    update = jax.jit(optimiser.update)
    for step in case["steps"]:
        updates, state = update(
            tree_of(step["grads"]),
            state,
            params,
            activations=activations,
            training_clock=step["training_prop"],
            batch_clock=step["batch_prop"],
        )
        params = optax.apply_updates(params, updates)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), params, tree_of(step["new_params"])
        )
        np.testing.assert_allclose(optax.tree.norm(updates), step["delta_l2"], rtol=0, atol=5e-8)
        # The actor's first bias comes first.
        np.testing.assert_allclose(state.carry[:, :4].T, step["carry_actor_Dense_0_bias"], atol=2e-6)
        np.testing.assert_allclose(state.momenta[:, :4].T, step["mom_actor_Dense_0_bias"], rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("case", single_steps())
def test_features_of_a_worked_tensor(case: dict[str, Any]) -> None:
    worked, step = case["worked_tensor"], case["steps"][0]
    assert worked["tensor"] == "actor/Dense_0/bias"
    assert worked["step"] == 1
    params, layout = tree_of(case["params0"]), layout_of(tree_of(case["params0"]))
    gradient = layout.join(jax.tree.leaves(tree_of(step["grads"])), jnp.float32)
    momenta = jnp.asarray([0.9, 0.5, 0.1, 0.01, 0.001, 0.0001])[:, None] * gradient
    seen = _Seen(activations_of(case), step["training_prop"], step["batch_prop"], None, None)
    found = features(layout, QUIET, params, gradient, momenta, seen).rows()
    assert found.shape == (19, layout.size)
    np.testing.assert_allclose(found[:, :4].T, worked["features_4x19"], rtol=1e-5, atol=1e-5)


# --- the optimiser within PPO -----------------------------------------------------------------------------------------


def trained() -> list[Any]:
    """Files of PPO runs whose optimiser is OPEN."""
    paths = [path for path in files("open_ppo_*_open*.npz") if str(np.load(path)["config/optimizer"]) == "open"]
    return [pytest.param(path, id=path.stem) for path in paths]


def subtree(golden: dict[str, np.ndarray], prefix: str) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, value in golden.items():
        if name.startswith(prefix):
            *parents, last = name.removeprefix(prefix).split("/")
            place = tree
            for parent in parents:
                place = place.setdefault(parent, {})
            place[last] = value
    return tree


@pytest.mark.parametrize("path", trained())
def test_first_epoch_of_a_run(path: Path, float64: Any, strict_promotion: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given the recorded gradients, activations and noise, to 1e-13.

    The original holds the places of layers, such as 1/3, in float32; so does this test. Without, parameters are off by
    4e-11.
    """
    exact = layout_module._proportions
    monkeypatch.setattr(layout_module, "_proportions", lambda *given: np.float32(exact(*given)).tolist())
    golden = dict(np.load(path))
    params = jax.tree.map(jnp.asarray, subtree(golden, "init/"))
    optimiser = open_optimizer(weights_of(str(golden["config/weights"])), Switches(noise=bool(golden["config/noise"])))
    state, update = optimiser.init(params), jax.jit(optimiser.update)
    num_steps = sum(name.endswith("/after/critic/Dense_0/bias") for name in golden)
    assert num_steps == golden["config/minibatches"]
    for step in range(num_steps):
        updates, state = update(
            subtree(golden, f"step{step}/grad_clipped/"),
            state,
            params,
            activations=layers_of(params, subtree(golden, f"step{step}/activation/")),
            training_clock=golden["steps/training_prop"][step],
            batch_clock=golden["steps/batch_prop"][step],
            noise=noise_of(golden, params, step),
        )
        params = optax.apply_updates(params, updates)
        check(params, subtree(golden, f"step{step}/after/"))
    layout = layout_of(params)
    for name, rows in (("momenta", state.momenta), ("carry", state.carry)):
        leaves = [jnp.stack(leaf, -1) for leaf in zip(*map(layout.leaves, rows), strict=True)]
        check(jax.tree.unflatten(jax.tree.structure(params), leaves), subtree(golden, f"step{num_steps - 1}/{name}/"))


def layers_of(params: Any, activations: dict[str, Any]) -> dict[str, Any]:
    return {net: {layer: activations[net][str(index)] for index, layer in enumerate(params[net])} for net in params}


def noise_of(golden: dict[str, np.ndarray], params: Any, step: int) -> Any:
    if not golden["config/noise"]:
        return None
    drawn = jax.tree.map(lambda leaf: leaf[step], subtree(golden, "noise/"))
    return {"critic": jax.tree.map(jnp.ones_like, params["critic"]), **drawn}  # the critic's are not used


def check(found: Any, expected: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert one.dtype == np.float64
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-13)

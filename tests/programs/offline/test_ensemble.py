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

from purejax_bilevel.programs.offline import KINDS, termination
from purejax_bilevel.programs.offline.ensemble import (
    Architecture,
    Bounds,
    Layer,
    Networks,
    Normaliser,
    Prediction,
    Transitions,
    bootstrapped,
    chosen,
    elite_mask,
    elites,
    fit_normaliser,
    init,
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
from purejax_bilevel.programs.offline.uncertainty import UNCERTAINTIES, uncertainty

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


def doubled(array: np.ndarray) -> Any:
    return np.asarray(array, np.float64)


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
    obs, action = np.split(doubled(arrays["in/obs_act"]), [architecture.obs_dim], -1)
    other = architecture_of(arrays, probabilistic=False)

    @jax.jit
    def predicted(noise: jax.Array) -> tuple[Any, ...]:
        prediction = predict(architecture, networks, normaliser, obs, action)
        deterministic = predict(other, networks, normaliser, obs, action)
        return (
            prediction,
            sampled(with_reference_noise(prediction), noise),
            sampled(deterministic, noise),
            deterministic,
        )

    prediction, noisy, certain, deterministic = predicted(arrays["in/eps"])
    close(prediction.mean, arrays[f"out/{tag}/mean"])
    close(prediction.log_var, arrays[f"out/{tag}/logvar"], rtol=5e-9)
    close(noisy, arrays[f"out/{tag}/sample"])
    close(certain, arrays[f"out/{tag}/deterministic"])
    assert not np.asarray(deterministic.log_var).any()


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
    obs, action = np.split(doubled(arrays["in/obs_act"]), [architecture.obs_dim], -1)
    rule = termination.of(str(arrays["config/termination"]))
    assert rule is not None

    @jax.jit
    def predicted(number: jax.Array, noise: jax.Array) -> tuple[jax.Array, ...]:
        prediction = predict(architecture, networks, normaliser, obs, action)
        kinds = [uncertainty(kind, prediction, normaliser) for kind in ("max_distance", "max_variance")]
        found = sampled(chosen(with_reference_noise(prediction), jnp.full(len(obs), number)), noise)
        return *kinds, found, rule(found[:, :-1])

    for number, expected in enumerate(arrays[f"{tag}/mode_none"]):
        distance, variance, found, ended = predicted(number, arrays["in/eps"][number])
        close(distance, arrays[f"{tag}/u_ep"])
        close(variance, arrays[f"{tag}/u_al"], rtol=5e-9)
        close(found, expected[:, :-1])
        close(ended, expected[:, -1])


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
    delta = jax.tree.map(lambda new, old: np.asarray(new) - np.asarray(old), stepped, networks)
    for name, tree in (("grad", gradient), ("delta", delta)):
        squares = [np.square(leaf).sum() for leaf in jax.tree.leaves(tree)]
        close(np.sqrt(sum(squares)), arrays[f"{case}/{name}_l2"], rtol=1e-7)
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


# --- construction -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", files("offline_counts_init*.npz"))
def test_parameters_and_their_first_values_are_those_of_the_reference(path: Path) -> None:
    arrays = np.load(path)
    for obs_dim, action_dim, count, parameters in arrays["parameter_counts/obs_act_E_count"]:
        architecture = Architecture(int(obs_dim), int(action_dim), int(count))
        shapes = jax.eval_shape(lambda architecture=architecture: init(architecture, jax.random.key(0)))
        assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == parameters
    networks = jax.jit(lambda key: init(Architecture(11, 3, networks=40), key))(jax.random.key(1))
    for name in (key for key in arrays.files if key.startswith("init_std/")):
        _, trunk, layer, _ = name.split("/")
        own = networks.trunks[trunk][int(layer)]
        std, fan_in, fan_out = arrays[name]
        assert own.kernel.shape == (40, fan_in, fan_out)
        np.testing.assert_allclose(np.std(own.kernel), std, rtol=0.02 if own.kernel.size > 30_000 else 0.04)
        assert not np.asarray(own.bias).any()


def small(**changes: Any) -> Architecture:
    return Architecture(3, 1, **{"networks": 3, "hidden": (8, 8), "reward_hidden": (4,), **changes})


def made(architecture: Architecture) -> tuple[Networks, Normaliser, Transitions]:
    """Networks, a normaliser and rows, some of them terminal."""
    random = np.random.default_rng(0)
    obs, noise = random.standard_normal((2, 20, architecture.obs_dim)).astype(np.float32)
    action = random.uniform(-1, 1, (20, architecture.action_dim)).astype(np.float32)
    normaliser = fit_normaliser(3 * obs + 1, action)
    terminated = (obs[:, 0] > 0.5).astype(np.float32)
    rows = Transitions(*map(jnp.asarray, (3 * obs + 1, action, noise[:, 0], 3 * obs + 1 + noise, terminated)))
    return jax.jit(lambda key: init(architecture, key))(jax.random.key(2)), normaliser, rows


ARCHITECTURES = [
    {"reward_hidden": (), "layer_norm": True, "activation": "swish"},
    {"terminal_hidden": (4,), "activation": "relu", "probabilistic": False},
    {"trainable_bounds": False, "normalise_targets": False},
]


@pytest.mark.parametrize("changes", ARCHITECTURES, ids=str)
def test_every_architecture_learns(changes: dict[str, Any]) -> None:
    architecture = small(**changes)
    networks, normaliser, rows = made(architecture)
    rates = jnp.float32(1e-2), jnp.float32(1e-4)

    @jax.jit
    def learned(networks: Networks) -> tuple[Networks, jax.Array]:
        def step(carry: Any, _: Any) -> Any:
            *carry, found = train_step(architecture, carry[0], normaliser, carry[1], rows, *rates)
            return tuple(carry), found.loss

        (networks, _), found = jax.lax.scan(step, (networks, optimizer(*rates).init(networks)), None, 60)
        return networks, found

    after, found = learned(networks)
    assert found[-1] < found[0] - 0.2
    assert jax.tree.map(lambda leaf: leaf.dtype, after) == jax.tree.map(lambda leaf: leaf.dtype, networks)
    moves = architecture.probabilistic and architecture.trainable_bounds
    for old, new in zip(map(np.asarray, networks.bounds), map(np.asarray, after.bounds), strict=True):
        assert (old != new).all() if moves else (old == new).all()
    prediction = jax.jit(lambda: predict(architecture, after, normaliser, rows.obs, rows.action))()
    assert prediction.mean.shape == prediction.log_var.shape == (3, 20, 4)
    assert set(after.trunks) == set(architecture.trunks)
    if prediction.terminal_logit is not None:
        assert ((prediction.terminal_logit > 0) == (rows.terminated > 0)).mean() > 0.7


def test_soft_bounds_that_anyone_can_check() -> None:
    found = softly_bounded(jnp.array([-100.0, -10.0, 0.0, 5.0, 100.0]), -10.0, 0.5)
    np.testing.assert_allclose(found, [-10.0, -9.3069, -0.4740, 0.4890, 0.5000], atol=1e-4)
    assert jax.grad(lambda raw: softly_bounded(raw, -10.0, 0.5))(5.0) > 1e-3


def test_noise_is_in_the_units_of_the_data() -> None:
    """Networks that predict no change, and a variance of e^-1 in units of the data's deviation."""
    architecture = small()
    networks, normaliser, rows = made(architecture)
    log_var = {"obs": 3, "reward": 1}
    trunks = {}
    for name, layers in networks.trunks.items():
        *hidden, last = (layer._replace(kernel=jnp.zeros_like(layer.kernel)) for layer in layers)
        trunks[name] = (*hidden, last._replace(bias=last.bias.at[..., log_var[name] :].set(-1.0)))
    fixed = Networks(trunks, networks.bounds)
    prediction = jax.jit(lambda: predict(architecture, fixed, normaliser, rows.obs, rows.action))()
    size = np.exp(0.5 * softly_bounded(-1.0, -10.0, jnp.array([0.5, 0.5, 0.5, 1.0])))
    expected = size * np.append(normaliser.std[:3], 1.0)
    np.testing.assert_allclose(prediction.std[0, 0], expected, rtol=1e-5)
    moved = sampled(prediction, jnp.ones((3, 20, 4)))[..., :3] - rows.obs
    np.testing.assert_allclose(moved, np.broadcast_to(expected[:3], moved.shape), rtol=1e-4)
    np.testing.assert_allclose(with_reference_noise(prediction).std[0, 0], size, rtol=1e-5)
    assert (normaliser.std[:3] > 2).all()


# --- uncertainty ------------------------------------------------------------------------------------------------------


def prediction_of(count: int, key: int = 0) -> tuple[Prediction, Normaliser]:
    random = np.random.default_rng(key)
    mean, log_var = random.standard_normal((2, count, 6, 4)).astype(np.float32)
    normaliser = Normaliser(jnp.ones(4), jnp.array([0.5, 2.0, 3.0, 1.0]))
    return Prediction(jnp.asarray(mean), jnp.asarray(log_var), jnp.array([0.5, 2.0, 3.0, 1.0]), None), normaliser


@pytest.mark.parametrize("count", [2, 4, 7])
def test_uncertainties_are_what_their_names_say(count: int) -> None:
    prediction, normaliser = prediction_of(count)
    used = np.arange(count) != 1 if count > 2 else np.ones(count, bool)
    mean, log_var, std = (np.asarray(array) for array in (prediction.mean, prediction.log_var, normaliser.std))
    means, stds = mean[used, :, :3] / std[:3], np.exp(log_var[used] / 2)
    pairs = np.linalg.norm(means[:, None] - means[None], axis=-1)
    expected = {
        "max_distance": pairs.max((0, 1)),
        "mean_spread": np.sqrt(means.var(0).sum(-1)),
        "max_variance": (stds[..., :3] ** 2).max((0, 2)),
        "max_std_norm": np.linalg.norm(stds, axis=-1).max(0),
        "ensemble_std": np.sqrt(((stds[..., :3] ** 2).mean(0) + means.var(0)).sum(-1)),
    }
    assert expected.keys() == UNCERTAINTIES.keys() == set(KINDS)
    found = jax.jit(lambda: {kind: uncertainty(kind, prediction, normaliser, jnp.asarray(used)) for kind in KINDS})()
    for kind, numbers in expected.items():
        np.testing.assert_allclose(found[kind], numbers, rtol=1e-5, err_msg=kind)


def test_networks_that_agree_are_certain() -> None:
    prediction, normaliser = prediction_of(1)
    assert not uncertainty("max_distance", prediction, normaliser).any()
    same = jax.tree.map(lambda leaf: jnp.repeat(leaf, 4, 0) if leaf.ndim == 3 else leaf, prediction)
    assert not uncertainty("max_distance", same, normaliser).any()
    apart = same._replace(mean=same.mean.at[2, :, :3].add(jnp.array([0.5, 0.0, 6.0])))
    np.testing.assert_allclose(uncertainty("max_distance", apart, normaliser), 5**0.5, rtol=1e-5)
    other_reward = same._replace(log_var=same.log_var.at[..., 3].set(9.0), mean=same.mean.at[0, :, 3].add(7.0))
    for kind in ("max_distance", "max_variance"):
        found, expected = (uncertainty(kind, one, normaliser) for one in (other_reward, same))
        np.testing.assert_array_equal(found, expected)


# --- which network, which rows ----------------------------------------------------------------------------------------


def test_each_row_is_predicted_by_an_elite_of_its_own() -> None:
    ranking = jnp.array([4, 0, 2, 1, 3])
    drawn = jax.jit(lambda count: elites(jax.random.key(0), ranking, count, 4000))(2)
    assert set(np.asarray(drawn).tolist()) == {4, 0}
    assert 0.45 < (drawn == 4).mean() < 0.55
    np.testing.assert_array_equal(elite_mask(ranking, jnp.int32(3)), [True, False, True, False, True])
    prediction, _ = prediction_of(5)
    own = chosen(prediction._replace(terminal_logit=prediction.mean[..., 0]), jnp.array([0, 4, 2, 2, 1, 3]))
    for row, network in enumerate([0, 4, 2, 2, 1, 3]):
        np.testing.assert_array_equal(own.mean[row], prediction.mean[network, row])
        np.testing.assert_array_equal(own.log_var[row], prediction.log_var[network, row])
        assert own.terminal_logit is not None
        assert own.terminal_logit[row] == prediction.mean[network, row, 0]


def test_every_network_has_a_resample_of_its_own() -> None:
    draw = lambda key: np.asarray(bootstrapped(jax.random.key(key), 3, 20_000, 500, jax.random.key(9)))  # noqa: E731
    first, second = draw(0), draw(1)
    assert first.shape == (3, 20_000)
    assert (first != second).mean() > 0.9
    for own, again in zip(first, second, strict=True):
        assert set(own.tolist()) == set(again.tolist())  # all of a resample, seen in both draws
        assert 0.57 < len(set(own.tolist())) / 500 < 0.69  # 1 - 1 / e of the rows
    assert len({frozenset(own.tolist()) for own in first}) == 3
    assert first.min() >= 0
    assert first.max() < 500

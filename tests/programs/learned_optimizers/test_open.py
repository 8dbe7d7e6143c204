"""OPEN by itself: features, clocks, noise, switches, layouts of other agents, transformations of jax, refusals.

Weight vectors here are made by hand or drawn; those of the original are in `test_open_reference.py`.
"""

import collections
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from purejax_bilevel import networks
from purejax_bilevel.errors import UserError
from purejax_bilevel.programs import learned_optimizers
from purejax_bilevel.programs.learned_optimizers import (
    ARTEFACT_KIND,
    NO_FEATURES,
    Scales,
    Switches,
    batch_clock,
    columns,
    load_weights,
    open_optimizer,
    training_clock,
)
from purejax_bilevel.programs.learned_optimizers.layout import layout_of
from purejax_bilevel.programs.learned_optimizers.optimizer import _Seen, dormancy, features
from purejax_bilevel.programs.learned_optimizers.update_rules import PUBLISHED
from purejax_bilevel.programs.learned_optimizers.weights import shapes, unflatten
from purejax_bilevel.runtime import artefacts
from tests.programs.programs import mostly
from tests.test_benchmarks import load

TESTS = Path(__file__).parents[2]
PAGE = Path(learned_optimizers.__file__).parent / "README.md"
SMALL, LARGER = 1211, 3571
OUTPUT_BIAS = 1160  # of the small network, where the table of the published layout has it
CLOCKS = {"training_clock": 0.25, "batch_clock": 1.0}
QUIET = Switches(noise=False)


def drawn_weights(seed: int = 0, size: int = SMALL) -> jax.Array:
    return 0.3 * jax.random.normal(jax.random.key(seed), (size,))


def bias_only(output: int, value: float) -> jax.Array:
    """Weights that are 0 but for the bias of one output (0 the update, 1 its exponent, 2 the noise)."""
    return jnp.zeros(SMALL).at[OUTPUT_BIAS + output].set(value)


def network(rng: np.random.Generator, sizes: tuple[int, ...]) -> dict[str, Any]:
    return {
        f"Dense_{i}": {"kernel": rng.normal(size=sizes[i : i + 2]), "bias": rng.normal(size=sizes[i + 1])}
        for i in range(len(sizes) - 1)
    }


def make_agent(seed: int = 0, width: int = 5, dtype: Any = np.float32) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    actor = {**network(rng, (3, width, width, 2)), "log_std": rng.normal(size=2)}
    agent = {"actor": {"params": actor}, "critic": {"params": network(rng, (3, width, width, 1))}}
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), agent)


def activations_of(agent: Any, seed: int = 1) -> Any:
    """For each layer that has a bias the size of its outputs, else None."""
    rng = np.random.default_rng(seed)
    return {
        net: {
            "params": {
                name: rng.uniform(size=layer["bias"].shape).astype(np.float32) if isinstance(layer, dict) else None
                for name, layer in parts["params"].items()
            }
        }
        for net, parts in agent.items()
    }


def gradients(agent: Any, seed: int = 2) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), agent)


def step(optimiser: Any, agent: Any, state: Any = None, **given: Any) -> tuple[Any, Any]:
    """One update with everything that OPEN may ask for."""
    extra = {"activations": activations_of(agent), "key": jax.random.key(3), **CLOCKS, **given}
    state = optimiser.init(agent) if state is None else state
    # Not compiled: most tests share the shapes of `make_agent`, and so its single operations.
    return optimiser.update(gradients(agent), state, agent, **extra)


def joined(tree: Any) -> np.ndarray:
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


# --- weights ----------------------------------------------------------------------------------------------------------


def test_offsets_of_the_published_layout() -> None:
    """The table of the layout, written down by hand; kernels and biases of one layer follow each other."""
    small = [0, 8, 72, 136, 200, 208, 360, 368, 520, 528]
    small += [680, 696, 824, 840, 856, 872, 1128, 1144, 1160, 1163, 1211]
    larger = [0, 16, 272, 528, 784, 800, 1104, 1120, 1424, 1440]
    larger += [1744, 1776, 2288, 2320, 2352, 2384, 3408, 3440, 3472, 3475, 3571]
    for sizes, offsets in (((8, 16), small), ((16, 32), larger)):
        found = np.cumsum([0, *(math.prod(shape) for shape in shapes(*sizes))])
        assert found.tolist() == offsets


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (np.zeros(1210, np.float32), "1211 .small. or 3571 .larger. numbers, got 1210"),
        (np.zeros((1, 1211), np.float32), "got 1x1211"),
        (np.float32(1.0), "got a single number"),
        (np.zeros(1211, int), "real numbers, got int"),
        ({"actor": np.zeros(1211, np.float32), "critic": np.zeros(3571, np.float32)}, "must have one length"),
    ],
)
def test_wrong_weights_are_refused_when_the_optimiser_is_made(weights: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_optimizer(weights)


def test_files_of_weights(tmp_path: Path) -> None:
    good = np.asarray(drawn_weights(size=LARGER))
    np.save(tmp_path / "good.npy", good)
    np.testing.assert_array_equal(load_weights(tmp_path / "good.npy"), good)
    np.save(tmp_path / "short.npy", good[:-1])
    np.save(tmp_path / "nan.npy", np.where(good == good[7], np.nan, good))
    np.save(tmp_path / "object.npy", np.array([{}], object), allow_pickle=True)
    (tmp_path / "text.npy").write_text("weights")
    content = (tmp_path / "good.npy").read_bytes()
    (tmp_path / "header.npy").write_bytes(content.replace(b"(3571,)", b"(3571,(", 1))
    (tmp_path / "huge.npy").write_bytes(content.replace(b"(3571,), }" + b" " * 9, b"(3571" + b"0" * 9 + b",), }", 1))
    (tmp_path / "cut.npy").write_bytes((tmp_path / "good.npy").read_bytes()[:-8])
    for name, message in {
        "none.npy": "No such file",
        "short.npy": "got 3570",
        "nan.npy": "not finite",
        "object.npy": "not a whole .npy file",
        "text.npy": "not a whole .npy file",
        "header.npy": "not a whole .npy file",
        "huge.npy": "not a whole .npy file",
        "cut.npy": "not a whole .npy file",
    }.items():
        with pytest.raises(UserError, match=message):
            load_weights(tmp_path / name)


def test_weights_from_an_artefact(tmp_path: Path) -> None:
    """What meta-training leaves is read by the runtime; the optimiser takes the array."""
    vectors = jnp.stack([drawn_weights(0), drawn_weights(1)])
    artefacts.save(tmp_path, ARTEFACT_KIND, {"weights": vectors}, [{"seed": 0}, {"seed": 1}], {})
    weights = artefacts.load(tmp_path, ARTEFACT_KIND).member(1)["weights"]
    agent = make_agent()
    found, _ = step(open_optimizer(weights), agent)
    expected, _ = step(open_optimizer(drawn_weights(1)), agent)
    np.testing.assert_array_equal(joined(found), joined(expected))


# --- features ---------------------------------------------------------------------------------------------------------


def features_of(agent: Any, gradient: jax.Array, momenta: jax.Array) -> np.ndarray:
    seen = _Seen(activations_of(agent), 0.25, 1.0, None, None)
    return np.asarray(features(layout_of(agent), QUIET, agent, gradient, momenta, seen).rows())


@pytest.mark.parametrize("sizes", [(5, 14, 7, 17), (14, 7)], ids=["with rests", "whole blocks"])
def test_blocks_of_columns_on_a_cpu(sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Large arrays in blocks of their own scales: what comes out is that of all columns at once."""
    rng, number = np.random.default_rng(0), sum(sizes)
    own, scales, context, carry = (
        jnp.asarray(rng.normal(size=shape), jnp.float32)
        for shape in ((15, number), (15, len(sizes)), (4, number), (8, number))
    )
    seen, network = columns.Features(sizes, own, scales, context), unflatten(drawn_weights())

    def traced() -> jax.stages.Traced:
        return jax.jit(lambda carry: columns.run(network, seen, carry)).trace(carry)  # anew each time

    whole = traced()
    monkeypatch.setattr(columns, "BLOCK", 7)
    blocks = traced()
    monkeypatch.setattr(networks, "together", lambda: True)
    assert ["scan" in str(each.jaxpr) for each in (whole, blocks, traced())] == [False, True, False]
    found, expected = (each.lower().compile()(carry) for each in (blocks, whole))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, expected)


def test_momenta_after_the_first_step() -> None:
    agent = make_agent()
    _, state = step(open_optimizer(drawn_weights()), agent)
    expected = np.array([0.9, 0.5, 0.1, 0.01, 0.001, 0.0001])[:, None] * joined(gradients(agent))
    np.testing.assert_allclose(state.momenta, expected, rtol=2e-4)


def test_order_and_size_of_features() -> None:
    """Columns 0 to 14 of each array have the root mean square sqrt(q / (q + 1e-5)); an array of zeros stays 0."""
    agent = make_agent()
    agent["critic"]["params"]["Dense_0"]["bias"] *= 0.0
    layout = layout_of(agent)
    gradient = 1e-3 * joined(gradients(agent))
    momenta = np.outer([0.9, -0.5, 0.1, 0.01, -0.001, 0.0001], gradient)
    found = features_of(agent, jnp.asarray(gradient), jnp.asarray(momenta))
    seven = np.concatenate([momenta, gradient[None]])
    signs, logarithms = np.sign(seven), np.log(np.abs(seven) + 1e-13)
    raw = np.concatenate([joined(agent)[None], signs[:6], logarithms[:6], signs[6:], logarithms[6:]])
    assert found.shape == (19, len(gradient))
    for place, own, normalised in zip(
        layout.places,
        layout.pieces(jnp.asarray(raw)),
        layout.pieces(jnp.asarray(found[:15])),
        strict=True,
    ):
        square = np.mean(np.square(own), 1)
        size = np.sqrt(np.mean(np.square(normalised), 1))
        np.testing.assert_allclose(size, np.sqrt(square / (square + 1e-5)), rtol=1e-5)
        np.testing.assert_allclose(normalised * np.sqrt(square + 1e-5)[:, None], own, rtol=1e-5, atol=1e-6)
        assert (size[0] == 0.0) == (place.name == "critic/params/Dense_0/bias")
    np.testing.assert_array_equal(found[15], np.float32(0.25))
    np.testing.assert_array_equal(found[17], np.float32(1.0))
    proportions = {"actor": (0, 1 / 3, 2 / 3, 1), "critic": (0, 0.5, 1)}
    for place, row in zip(layout.places, layout.pieces(jnp.asarray(found[16])), strict=True):
        layer = place.name.split("/")[2]
        index = 3 if layer == "log_std" else int(layer[-1])
        np.testing.assert_array_equal(row, np.float32(proportions[place.network][index]))


def test_dormancy() -> None:
    agent = make_agent()
    activations = activations_of(agent)
    activations["actor"]["params"]["Dense_1"][2] = 0.0
    layout = layout_of(agent)
    rows = layout.leaves(dormancy(layout, activations, agent, jnp.float32))
    found = jax.tree.unflatten(jax.tree.structure(agent), rows)
    for net, parts in found.items():
        for name, layer in parts["params"].items():
            if name == "log_std" or (net == "critic" and name == "Dense_2"):
                np.testing.assert_array_equal(joined(layer), 1.0)
                continue
            mean = activations[net]["params"][name].mean()
            np.testing.assert_allclose(layer["bias"].mean(), 1.0, atol=1e-5)
            np.testing.assert_allclose(layer["bias"], activations[net]["params"][name] / mean, rtol=1e-5, atol=1e-9)
            np.testing.assert_array_equal(layer["kernel"], np.broadcast_to(layer["bias"], layer["kernel"].shape))
    dormant = found["actor"]["params"]["Dense_1"]["bias"]
    assert 0.0 < dormant[2] <= 1e-10 * 5 / activations["actor"]["params"]["Dense_1"].sum()


def test_activations_of_whole_minibatches_and_of_images() -> None:
    agent = {"Conv_0": {"kernel": jnp.ones((2, 2, 3, 4)), "bias": jnp.ones(4)}, "Dense_1": {"kernel": jnp.ones((4, 6))}}
    images, outputs = np.random.default_rng(0).normal(size=(8, 5, 5, 4)), np.random.default_rng(1).normal(size=(8, 6))
    layout = layout_of(agent)
    whole = dormancy(layout, {"Conv_0": images, "Dense_1": outputs}, agent, jnp.float32)
    means = {"Conv_0": np.abs(images).mean((0, 1, 2)), "Dense_1": np.abs(outputs).mean(0)}
    np.testing.assert_allclose(whole, dormancy(layout, means, agent, jnp.float32), rtol=1e-5)


@pytest.mark.parametrize(
    ("at", "training", "batch"),
    [(0, 0, 0), (7, 0, 0), (8, 0, 1 / 3), (31, 0, 1), (32, 1 / 1219, 0), (39_039, 1, 1)],
)
def test_clocks_of_minatar(at: int, training: float, batch: float) -> None:
    """1220 updates of 4 epochs of 8 minibatches, 39 040 steps of the optimiser."""
    clocks = jax.jit(lambda step: (training_clock(step, 1220, 4, 8), batch_clock(step, 4, 8)))
    np.testing.assert_allclose(clocks(at), (training, batch), rtol=1e-6)


def test_clocks_that_would_divide_by_zero_are_refused() -> None:
    with pytest.raises(UserError, match="batch_clock needs at least 2 epochs, got 1"):
        batch_clock(0, 1, 8)
    with pytest.raises(UserError, match="training_clock needs at least 2 updates, got 1"):
        training_clock(0, 1, 4, 8)


# --- updates ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [SMALL, LARGER])
def test_weights_of_zero_change_nothing(size: int) -> None:
    agent = make_agent()
    updates, state = step(open_optimizer(jnp.zeros(size)), agent)
    moved = optax.apply_updates(agent, updates)
    assert joined(moved).tobytes() == joined(agent).tobytes()
    np.testing.assert_array_equal(state.carry, 0.0)


@pytest.mark.parametrize("noise", [True, False])
def test_updates_sum_to_zero(noise: bool) -> None:
    agent = make_agent()
    updates, _ = step(open_optimizer(drawn_weights(), Switches(noise=noise)), agent)
    assert np.abs(joined(updates)).max() > 1e-5
    assert abs(joined(updates).sum(dtype=float)) < 1e-6
    unmoved, _ = step(open_optimizer(bias_only(0, 2.0), Switches(noise=noise)), agent)
    np.testing.assert_allclose(joined(unmoved), 0.0, atol=1e-8)


def test_noise_moves_the_actor_alone_but_for_the_shared_mean() -> None:
    agent = make_agent(width=110)
    optimiser = open_optimizer(bias_only(2, 2.0))
    optimiser = optimiser._replace(update=jax.jit(optimiser.update))
    updates, _ = step(optimiser, agent)
    actor, critic = joined(updates["actor"]), joined(updates["critic"])
    assert len(actor) > 1e4
    np.testing.assert_allclose(np.std(actor), 0.002, rtol=0.03)
    assert np.ptp(critic) == 0.0
    assert 0.0 < abs(critic[0]) < 1e-3
    again, _ = step(optimiser, agent)
    np.testing.assert_array_equal(joined(again["actor"]), actor)
    other, _ = step(optimiser, agent, key=jax.random.key(4))
    assert np.abs(joined(other["actor"]) - actor).min() > 0.0
    assert abs(np.corrcoef(joined(other["actor"]), actor)[0, 1]) < 0.05


def test_scale_of_the_noise() -> None:
    agent = make_agent()
    updates, _ = step(open_optimizer(bias_only(2, 2.0)), agent)
    scaled, _ = step(open_optimizer(bias_only(2, 2.0), scales=Scales(noise=5e-3)), agent)
    np.testing.assert_allclose(joined(scaled), 5.0 * joined(updates), rtol=1e-4, atol=1e-8)


def test_noise_that_is_given() -> None:
    agent = make_agent()
    given = gradients(agent, seed=9)
    updates, _ = step(open_optimizer(bias_only(2, 2.0)), agent, key=None, noise=given)
    change = np.concatenate([0.002 * joined(given["actor"]), np.zeros_like(joined(given["critic"]))])
    np.testing.assert_allclose(joined(updates), change.mean() - change, atol=1e-8)


def test_noise_of_some_arrays() -> None:
    """Noisy and quiet arrays in turn; no two entries get the same number."""
    agent = {name: jnp.ones(50) for name in "abcd"}
    noisy = {"a": False, "b": True, "c": False, "d": True}
    optimiser = open_optimizer(bias_only(2, 2.0), Switches(zero_mean="none"), noisy=noisy)
    updates = step_plain(optimiser, agent, activations=1.0, key=jax.random.key(0))
    loud = joined([updates["b"], updates["d"]])
    assert len(set(loud.tolist())) == 100
    np.testing.assert_allclose(np.std(loud), 0.002, rtol=0.3)
    np.testing.assert_array_equal(joined([updates["a"], updates["c"]]), 0.0)


def test_exponent() -> None:
    """m exp(e), with the scales of both: one output fixed, the other read from its bias."""
    weights = bias_only(0, 2.0).at[OUTPUT_BIAS + 1].set(3.0)
    updates, _ = step(open_optimizer(weights, Switches(noise=False, zero_mean="none"), Scales(0.1, 0.2)), make_agent())
    np.testing.assert_allclose(joined(updates), -0.1 * 2.0 * np.exp(0.2 * 3.0), rtol=1e-5)


# --- switches ---------------------------------------------------------------------------------------------------------

# What each switch makes the optimiser blind to: another value of it changes nothing.
BLIND: dict[str, Callable[[Any], dict[str, Any]]] = {
    "training_clock": lambda agent: {"training_clock": 0.9},
    "batch_clock": lambda agent: {"batch_clock": 0.1},
    "dormancy": lambda agent: {"activations": activations_of(agent, seed=7)},
    "noise": lambda agent: {"key": jax.random.key(8)},
}
NEEDED = {"training_clock": "training_clock", "batch_clock": "batch_clock", "dormancy": "activations", "noise": "key"}


@pytest.mark.parametrize("name", BLIND)
def test_a_feature_that_is_off_has_no_influence_and_need_not_be_given(name: str) -> None:
    agent = make_agent()
    changed = BLIND[name](agent)
    seeing, blind = open_optimizer(drawn_weights()), open_optimizer(drawn_weights(), Switches(**{name: False}))
    assert np.abs(joined(step(seeing, agent)[0]) - joined(step(seeing, agent, **changed)[0])).max() > 1e-7
    expected = joined(step(blind, agent)[0])
    np.testing.assert_array_equal(joined(step(blind, agent, **changed)[0]), expected)
    np.testing.assert_array_equal(joined(step(blind, agent, **{NEEDED[name]: None})[0]), expected)
    with pytest.raises(UserError, match=f"needs .*{NEEDED[name]}"):
        step(seeing, agent, **{NEEDED[name]: None})


def test_layer_and_parameter_switches() -> None:
    agent = make_agent()
    layers = jax.tree.map(lambda leaf: leaf.ndim, agent)  # another order
    for sees in (True, False):
        switches = Switches(layer=sees, noise=False)
        own = step(open_optimizer(drawn_weights(), switches), agent)[0]
        other = step(open_optimizer(drawn_weights(), switches, layers=layers), agent)[0]
        assert (np.abs(joined(own) - joined(other)).max() > 1e-7) == sees
        switches = Switches(parameter=sees, noise=False)
        optimiser = open_optimizer(drawn_weights(), switches)
        extra = {"activations": activations_of(agent), **CLOCKS}
        own = optimiser.update(gradients(agent), optimiser.init(agent), agent, **extra)[0]
        other = optimiser.update(gradients(agent), optimiser.init(agent), make_agent(5), **extra)[0]
        assert (np.abs(joined(own) - joined(other)).max() > 1e-7) == sees


def test_no_features_needs_the_gradient_alone() -> None:
    agent = make_agent()
    optimiser = open_optimizer(drawn_weights(), NO_FEATURES)
    updates, _ = optimiser.update(gradients(agent), optimiser.init(agent), agent)
    everything, _ = step(optimiser, make_agent(5))
    np.testing.assert_allclose(joined(updates), joined(everything), atol=1e-8)
    assert np.abs(joined(updates)).max() > 1e-5


def test_mean_of_each_network_or_none() -> None:
    agent = make_agent()
    raw, apart, together = (
        step(open_optimizer(drawn_weights(), Switches(zero_mean=what)), agent)[0]
        for what in ("none", "network", "agent")
    )
    np.testing.assert_allclose(joined(together), joined(raw) - joined(raw).mean(), atol=1e-7)
    for net in agent:
        np.testing.assert_allclose(joined(apart[net]), joined(raw[net]) - joined(raw[net]).mean(), atol=1e-7)
        assert abs(joined(raw[net]).mean()) > 1e-6
    with pytest.raises(UserError, match="zero_mean is 'all', it must be one of agent, network, none"):
        open_optimizer(drawn_weights(), Switches(zero_mean="all"))


def test_weights_of_their_own_for_actor_and_critic() -> None:
    agent = make_agent()
    switches = Switches(zero_mean="network")
    separate, state = step(open_optimizer({"critic": drawn_weights(1), "actor": drawn_weights(0)}, switches), agent)
    for net, seed in (("actor", 0), ("critic", 1)):
        shared, shared_state = step(open_optimizer(drawn_weights(seed), switches), agent)
        np.testing.assert_allclose(joined(separate[net]), joined(shared[net]), atol=1e-7)
        assert state.carry.shape == shared_state.carry.shape
    with pytest.raises(UserError, match="networks actor, critic, weights are given for actor, judge"):
        open_optimizer({"actor": drawn_weights(), "judge": drawn_weights()}).init(agent)


# --- other agents -----------------------------------------------------------------------------------------------------


class Linear(NamedTuple):
    kernel: jax.Array
    bias: jax.Array


def linear(size: int = 2) -> Linear:
    return Linear(jnp.ones((size, size)), jnp.ones(size))


def proportions(agent: Any, **given: Any) -> dict[str, float]:
    return {place.name: place.proportion for place in layout_of(agent, **given).places}


def test_layers_follow_each_other_by_number() -> None:
    """The original mistakes Dense_10 for the second of eleven layers."""
    agent = {"critic": {f"Dense_{i}": {"bias": jnp.ones(2)} for i in range(11)}}
    assert proportions(agent) == {f"critic/Dense_{i}/bias": i / 10 for i in range(11)}


def test_layers_of_tuples_fields_and_nested_modules() -> None:
    tuples = proportions({"policy": [linear() for _ in range(12)], "value": (linear(),)})
    assert [tuples[f"policy/{i}/kernel"] for i in range(12)] == [i / 11 for i in range(12)]
    assert tuples["value/0/bias"] == 0.0
    agent = collections.namedtuple("Agent", ["torso", "head"])(linear(), linear())
    assert proportions(agent) == {
        f"{place}/{part}": float(place == "head") for place in agent._fields for part in linear()._fields
    }
    nested = {
        "params": {"actor": {"conv": {"Conv_0": linear()}, "head": {"Dense_0": linear()}, "a_scale": jnp.ones(2)}}
    }
    assert proportions(nested) == {
        "params/actor/conv/Conv_0/kernel": 0.0,
        "params/actor/conv/Conv_0/bias": 0.0,
        "params/actor/head/Dense_0/kernel": 0.5,
        "params/actor/head/Dense_0/bias": 0.5,
        "params/actor/a_scale": 1.0,
    }


def test_networks_and_noise_are_told_from_names() -> None:
    agent = {"params": {"ActorCritic_0": {"critic_0": linear(), "actor_0": linear(), "shared": linear()}}}
    found = {place.name.split("/")[2]: (place.network, place.noisy) for place in layout_of(agent).places}
    assert found == {"critic_0": ("critic", False), "actor_0": ("actor", True), "shared": ("network", False)}
    given = layout_of(
        {"a": linear(), "b": linear()}, {"a": "left", "b": "right"}, {"a": 4, "b": 2}, {"a": False, "b": True}
    )
    assert {place.name[0]: (place.network, place.noisy) for place in given.places} == {
        "a": ("left", False),
        "b": ("right", True),
    }
    assert proportions([linear(), linear()], layers=[7, 3])["0/kernel"] == 1.0


def test_networks_that_alternate_in_the_tree() -> None:
    """Joined network by network, put back leaf by leaf: as if the same agent were named in order."""
    parts = make_agent()
    order = [(net, layer) for layer in ("Dense_0", "Dense_1", "Dense_2") for net in ("critic", "actor")]
    mixed = {f"{i}_{net}": parts[net]["params"][layer] for i, (net, layer) in enumerate(order)}
    apart = {net: {name: layer for name, layer in mixed.items() if name.endswith(net)} for net in ("critic", "actor")}
    weights = {"actor": drawn_weights(0), "critic": drawn_weights(1)}
    found = step_plain(open_optimizer(weights, Switches(dormancy=False, noise=False)), mixed)
    expected = step_plain(open_optimizer(weights, Switches(dormancy=False, noise=False)), apart)
    for name, layer in mixed.items():
        for part in layer:
            np.testing.assert_allclose(found[name][part], expected[name.split("_")[1]][name][part], atol=1e-7)


def step_plain(optimiser: Any, agent: Any, **given: Any) -> Any:
    """An update on gradients that are the parameters themselves."""
    return jax.jit(optimiser.update)(agent, optimiser.init(agent), agent, **{**CLOCKS, **given})[0]


def test_plain_trees() -> None:
    optimiser = open_optimizer(drawn_weights())
    for tree in (jnp.arange(3.0), [jnp.float32(2.0), {"a": jnp.ones((2, 3)), "none": None}]):
        updates = step_plain(optimiser, tree, activations=1.0)
        assert jax.tree.structure(updates) == jax.tree.structure(tree)
        assert all(new.shape == np.shape(old) for new, old in zip(*map(jax.tree.leaves, (updates, tree)), strict=True))


@pytest.mark.parametrize(
    ("agent", "given", "message"),
    [
        ({"w": jnp.arange(3)}, {}, "parameter w is int32, only real numbers"),
        ({}, {}, "no parameters"),
        ({"w": jnp.ones(3)}, {"layers": {"v": 1}}, "layers must have the tree of the parameters"),
        ({"w": jnp.ones(3)}, {"noisy": [True]}, "noisy must have the tree of the parameters"),
    ],
)
def test_agents_that_are_refused(agent: Any, given: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_optimizer(drawn_weights(), **given).init(agent)


def test_activations_and_noise_that_do_not_fit() -> None:
    optimiser, agent = open_optimizer(drawn_weights()), {"layer": {"bias": jnp.ones(3)}}
    with pytest.raises(UserError, match=r"parameter layer/bias is of \[3\] neurons, its activations are \[4\]"):
        step_plain(optimiser, agent, activations={"layer": np.ones(4)})
    with pytest.raises(UserError, match="activations must have the tree"):
        step_plain(optimiser, agent, activations={"other": np.ones(3)})
    with pytest.raises(ValueError, match="params"):
        optimiser.update(agent, optimiser.init(agent), activations=1.0, **CLOCKS)


# --- jax --------------------------------------------------------------------------------------------------------------


def test_members_and_candidates_at_once() -> None:
    """Weights, agents, clocks and keys traced: as one by one."""
    agents = [make_agent(seed) for seed in range(2)]
    vectors = [drawn_weights(seed) for seed in range(3)]
    seeds, clocks = jnp.arange(2), jnp.array([0.2, 0.7])

    def one(weights: jax.Array, agent: Any, clock: jax.Array, seed: jax.Array) -> Any:
        return step(open_optimizer(weights), agent, training_clock=clock, key=jax.random.key(seed))

    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *agents)
    members = jax.vmap(one, (None, 0, 0, 0))
    found = jax.jit(jax.vmap(members, (0, None, None, None)))(jnp.stack(vectors), stacked, clocks, seeds)
    for i, weights in enumerate(vectors):
        for j, agent in enumerate(agents):
            expected = one(weights, agent, clocks[j], seeds[j])
            own = jax.tree.map(lambda leaf, i=i, j=j: leaf[i, j], found)
            np.testing.assert_allclose(joined(own), joined(expected), rtol=1e-4, atol=1e-6)


def test_products_have_all_bits_of_float32_on_every_device() -> None:
    optimiser, agent = open_optimizer(drawn_weights(), QUIET), {"w": jnp.ones(3)}
    run = jax.make_jaxpr(lambda agent: optimiser.update(agent, optimiser.init(agent), agent, activations=1.0, **CLOCKS))
    products = [equation for equation in run(agent).eqns if equation.primitive.name == "dot_general"]
    assert len(products) == 7
    assert {equation.params["precision"] for equation in products} == {(jax.lax.Precision.HIGHEST,) * 2}


@pytest.mark.slow
def test_scan_in_a_chain_compiles_once(strict_promotion: Any) -> None:
    agent = make_agent()
    optimiser = optax.chain(optax.clip_by_global_norm(0.5), open_optimizer(drawn_weights()))
    traces = []

    def run(agent: Any, key: jax.Array, num_updates: jax.Array) -> Any:
        traces.append(None)

        def body(carry: Any, at: Any) -> tuple[Any, None]:
            agent, state = carry
            clocks = {"training_clock": training_clock(at, 4, 2, 2), "batch_clock": batch_clock(at, 2, 2)}
            extra = {"activations": activations_of(agent), "key": jax.random.fold_in(key, at), **clocks}
            updates, state = optimiser.update(gradients(agent), state, agent, **extra)
            return (optax.apply_updates(agent, updates), state), None

        return jax.lax.scan(body, (agent, optimiser.init(agent)), jnp.arange(6) + num_updates)[0]

    compiled = jax.jit(run)
    final, _ = compiled(agent, jax.random.key(0), 0)
    compiled(agent, jax.random.key(1), 3)
    assert len(traces) == 1
    state = optimiser.init(agent)
    for at in range(6):
        clocks = {"training_clock": training_clock(at, 4, 2, 2), "batch_clock": batch_clock(at, 2, 2)}
        updates, state = step(optimiser, agent, state, key=jax.random.fold_in(jax.random.key(0), at), **clocks)
        agent = optax.apply_updates(agent, updates)
    np.testing.assert_allclose(joined(final), joined(agent), atol=1e-5)


def test_types_of_parameters_and_state(float64: Any, strict_promotion: Any) -> None:
    for types, computed in (((jnp.bfloat16, jnp.float32), jnp.float32), ((jnp.float32, jnp.float64), jnp.float64)):
        agent = {"a": jnp.ones(3, types[0]), "b": jnp.ones((2, 2), types[1])}
        optimiser = open_optimizer(np.asarray(drawn_weights(), np.float32))
        state = optimiser.init(agent)
        updates, after = jax.eval_shape(optimiser.update, agent, state, agent, activations=1.0, **CLOCKS)
        assert (updates["a"].dtype, updates["b"].dtype) == types
        assert {leaf.dtype for leaf in (*state, *after)} == {jnp.dtype(computed)}


# --- the page ---------------------------------------------------------------------------------------------------------


def test_python_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On an agent of this file, published weights beside the script, and an artefact in a folder of runs."""
    agent = make_agent()
    given = {"params": agent, "gradients": gradients(agent), "activations": activations_of(agent)}
    monkeypatch.chdir(tmp_path)
    shutil.copy(PUBLISHED / "breakout_OPEN.npy", tmp_path)
    vectors = {"weights": drawn_weights()[None]}
    artefacts.save(tmp_path / "runs" / "mine", ARTEFACT_KIND, vectors, [{"seed": 0}], {})
    _, training, reading = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    names = {**given, "step": 7, "key": jax.random.key(0)}
    exec(training, names)
    assert np.abs(joined(names["params"]) - joined(agent)).max() > 1e-5
    exec(reading, names)
    np.testing.assert_array_equal(names["weights"], drawn_weights())


# --- the benchmark ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", mostly([SMALL, LARGER], [SMALL, LARGER]))
def test_the_benchmark_times_the_same_computation_array_by_array(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the noise, of which each draws its own: its output is silent here."""
    speed = load("open_speed", monkeypatch)
    weights = drawn_weights(size=size)
    hidden = {SMALL: 16, LARGER: 32}[size]
    outputs = weights[-3 * hidden :].reshape(hidden, 3).at[:, 2].set(0.0)
    weights = weights.at[-3 * hidden :].set(outputs.ravel()).at[-3 * hidden - 1].set(0.0)
    agent = speed.make_agent(jax.random.key(0), 7, 6)
    inputs = jax.random.normal(jax.random.key(1), (5, 7))
    variants = speed.make_variants(weights, agent, inputs, 2)
    fused, state = variants["OPEN"]()
    apart, states = variants["OPEN, array by array"]()
    assert jax.tree.structure(fused) == jax.tree.structure(apart)
    assert np.abs(joined(fused) - joined(agent)).max() > 1e-4
    np.testing.assert_allclose(joined(fused), joined(apart), rtol=0, atol=4e-6)
    first = states["actor"]["Dense_0"]["bias"]
    for rows, own in zip((state.momenta, state.carry), first, strict=True):
        np.testing.assert_allclose(rows[:, : len(own)].T, own, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_the_benchmark_works_small(monkeypatch: pytest.MonkeyPatch) -> None:
    number, medians = load("open_speed", monkeypatch).measure(4, 3, 5, 2, SMALL)
    assert number == 3 * 4 + 4 + 4 * 4 + 4 + 4 * 3 + 3 + 3 * 4 + 4 + 4 * 4 + 4 + 4 + 1
    assert set(medians) >= {name for pair in load("open_speed", monkeypatch).RATIOS for name in pair}
    assert all(clock > 0.0 for clock, _ in medians.values())

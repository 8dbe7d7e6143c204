"""Networks of traced width: the same function, gradients and law of initialisation as a small network."""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from purejax_bilevel import networks
from purejax_bilevel.bilevel import implicit

SEED = 3
LARGEST = 16


def embedded(network: networks.Network, size: int = LARGEST) -> networks.Network:
    """A small network in arrays of width `size`, the rest being zero."""
    last = len(network) - 1
    return tuple(
        networks.Layer(
            jnp.pad(
                layer.kernel,
                (
                    (0, 0 if i == 0 else size - layer.kernel.shape[0]),
                    (0, 0 if i == last else size - layer.kernel.shape[1]),
                ),
            ),
            jnp.pad(layer.bias, (0, 0 if i == last else size - layer.bias.shape[0])),
        )
        for i, layer in enumerate(network)
    )


@pytest.mark.parametrize("width", [2, 8])
def test_traced_width_initialises_as_the_small_network(width: int):
    small = networks.init_network(jax.random.key(SEED), (4, width, width, 2))
    large = jax.jit(lambda width: networks.init_network(jax.random.key(SEED), (4, LARGEST, LARGEST, 2), width))(width)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), large, embedded(small))


def test_all_widths_are_one_program():
    def init(width: jax.Array) -> networks.Network:
        return networks.init_network(jax.random.key(SEED), (4, LARGEST, LARGEST, 2), width)

    compiled = jax.jit(chex.assert_max_traces(init, n=1))
    used = [int((jnp.abs(compiled(jnp.int32(width))[0].kernel) > 0).any(0).sum()) for width in (2, 3, 8)]
    assert used == [2, 3, 8]


@pytest.mark.parametrize("shape", [(12, 4), (4,), (4, 12, 1)])
def test_inputs_that_are_not_features_first_are_refused(shape: tuple[int, ...]):
    network = networks.init_network(jax.random.key(SEED), (4, 4, 2))
    with pytest.raises(AssertionError):
        networks.apply_network(network, jnp.zeros(shape))


@pytest.mark.parametrize("width", [2, pytest.param(8, marks=pytest.mark.slow)])
def test_traced_width_trains_as_the_small_network(width: int, float64: None):
    """Outputs, gradients and hypergradients agree, and dead units stay dead through Adam-like steps."""
    inputs, targets = jax.random.normal(jax.random.key(1), (4, 12)), jax.random.normal(jax.random.key(2), (2, 12))

    def loss(outer: networks.Network, inner: networks.Network) -> jax.Array:
        return ((networks.apply_network(inner, networks.apply_network(outer, inputs)) - targets) ** 2).mean()

    def train(outer: networks.Network, inner: networks.Network) -> tuple:
        for _ in range(5):
            gradient = jax.grad(loss, argnums=1)(outer, inner)
            hypergradient = implicit.minimum_hypergradient(loss, outer, inner, gradient, implicit.neumann(3, 0.1))
            # Signs, as Adam's first step: a gradient that is not exactly 0 would move a dead unit by the full step.
            inner = jax.tree.map(lambda p, g: p - 0.01 * jnp.sign(g), inner, gradient)
            outer = jax.tree.map(lambda p, g: p - 0.01 * jnp.sign(g), outer, hypergradient)
        return outer, inner

    train = jax.jit(train)
    small = tuple(
        networks.init_network(jax.random.key(i), (4, width, width, n), output_gain=1.0) for i, n in ((5, 4), (6, 2))
    )
    large = tuple(map(embedded, small))
    np.testing.assert_allclose(loss(*large), loss(*small), rtol=1e-12)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), train(*large), tuple(map(embedded, train(*small)))
    )


@pytest.mark.parametrize(("fan_in", "fan_out"), [(4, 32), (32, 32), (32, 2), (1, 8), (64, 64)])
def test_kernels_are_orthogonal(fan_in: int, fan_out: int):
    kernel = networks.orthogonal(jax.random.key(SEED), fan_in, fan_out, 3.0)
    tall = kernel if fan_in >= fan_out else kernel.T
    np.testing.assert_allclose(tall.T @ tall, 9.0 * np.eye(min(fan_in, fan_out)), atol=1e-4)


def test_kernels_are_uniform_over_rotations():
    """First and second moments of the uniform law: mean 0, E[q_ij^2] = 1/n, E[det] = 0 for 3 x 3."""
    kernels = np.asarray(
        jax.vmap(lambda key: networks.orthogonal(key, 3, 3, 1.0))(jax.random.split(jax.random.key(SEED), 4000))
    )
    np.testing.assert_allclose(kernels.mean(0), 0, atol=0.04)
    np.testing.assert_allclose((kernels**2).mean(0), 1 / 3, atol=0.03)
    assert abs(np.linalg.det(kernels).mean()) < 0.06


def test_heads_are_different_networks():
    heads = networks.init_heads(jax.random.key(SEED), 2, (4, 8, 8, 2))
    inputs = jax.random.normal(jax.random.key(1), (4, 5))
    outputs = networks.apply_heads(heads, inputs)
    assert outputs.shape == (2, 2, 5)
    assert not np.allclose(outputs[0], outputs[1])
    np.testing.assert_allclose(outputs[1], networks.apply_network(heads[1], inputs))


def stored(on_accelerator: bool, make: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    """What `make` returns on an accelerator or on a CPU."""
    with monkeypatch.context() as patch:
        patch.setattr(networks, "together", lambda: on_accelerator)
        return make()


def pair() -> Any:
    """Two networks that differ in their outputs, and none."""
    keys = jax.random.split(jax.random.key(SEED))
    made = [networks.init_network(key, (4, 8, 8, size), 6, 1.0) for key, size in zip(keys, (3, 1), strict=True)]
    return networks.joined((*made, None))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("make", "apply"),
    [
        (lambda: networks.init_network(jax.random.key(SEED), (4, 8, 3), 5, 1.0), networks.apply_network),
        (lambda: networks.init_heads(jax.random.key(SEED), 2, (4, 8, 8, 2), 6, 1.0), networks.apply_heads),
        (pair, lambda networks_, inputs: jnp.concatenate(list(networks.apply_each(networks_, inputs)))),
    ],
    ids=["network", "heads", "pair"],
)
def test_joined_networks_are_the_same_functions(make: Callable, apply: Callable, monkeypatch: pytest.MonkeyPatch):
    """Outputs, and what they are after two steps down the gradient of their squares."""
    inputs = jax.random.normal(jax.random.key(1), (4, 12))

    @jax.jit
    def trained(given: Any) -> list[jax.Array]:
        outputs = [apply(given, inputs)]
        for _ in range(2):
            gradient = jax.grad(lambda x: (apply(x, inputs) ** 2).mean())(given)
            given = jax.tree.map(lambda p, g: p - 0.1 * g, given, gradient)
            outputs.append(apply(given, inputs))
        return outputs

    apart, together = (stored(on_accelerator, make, monkeypatch) for on_accelerator in (False, True))
    assert isinstance(together, networks.Joined)
    assert len(jax.tree.leaves(together)) == 1
    for one, other in zip(trained(apart), trained(together), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-10, atol=1e-14)
    chex.assert_trees_all_equal(jax.tree.leaves(together.apart()), jax.tree.leaves(apart))


def test_joined_networks_refuse_inputs_that_are_not_features_first(monkeypatch: pytest.MonkeyPatch):
    network = stored(True, lambda: networks.init_network(jax.random.key(SEED), (4, 4, 2)), monkeypatch)
    with pytest.raises(AssertionError):
        networks.apply_network(network, jnp.zeros((12, 4)))


@pytest.mark.usefixtures("float64")
def test_gelu_and_its_derivatives_are_those_of_jax():
    x = jnp.linspace(-6.0, 6.0, 101)
    ours, usual = networks.gelu, jax.nn.gelu
    for _ in range(3):
        np.testing.assert_allclose(jax.vmap(ours)(x), jax.vmap(usual)(x), rtol=1e-9, atol=1e-12)
        ours, usual = jax.grad(ours), jax.grad(usual)
    assert float(networks.gelu(jnp.zeros(()))) == 0.0  # what a traced width rests on

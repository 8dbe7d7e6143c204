"""Regrets against their definitions in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from purejax_bilevel import bilevel

pytestmark = pytest.mark.usefixtures("float64")

STEPS, WINDOWS = 25, (1, 4, 10)


@pytest.fixture
def hypergradients():
    rng = np.random.default_rng(0)
    return {"a": jnp.asarray(rng.normal(size=(STEPS, 2, 3))), "b": jnp.asarray(rng.normal(size=STEPS))}


def running_regret(regret, hypergradients, steps=None):
    def update(state, inputs):
        hypergradient, step = inputs
        value, state = regret.update(hypergradient, state, **({} if steps is None else {"step": step}))
        return state, value

    start = regret.init(jax.tree.map(lambda g: g[0], hypergradients))
    state, values = lax.scan(update, start, (hypergradients, jnp.arange(STEPS) if steps is None else steps))
    return state, values


def in_numpy(hypergradients, window):
    flat = np.concatenate([np.asarray(g).reshape(STEPS, -1) for g in hypergradients.values()], axis=1)
    means = [flat[max(0, t + 1 - window) : t + 1].mean(axis=0) for t in range(STEPS)]
    return np.cumsum(np.sum(np.square(means), axis=1))


def test_local_regret_for_traced_and_vmapped_windows(hypergradients):
    run = lambda window: running_regret(bilevel.local_regret(window, max_window=12), hypergradients)  # noqa: E731
    expected = np.array([in_numpy(hypergradients, window) for window in WINDOWS])
    together, values = jax.jit(jax.vmap(run))(jnp.asarray(WINDOWS))
    np.testing.assert_allclose(values, expected, rtol=1e-12)
    np.testing.assert_allclose(together.cumulative, expected[:, -1], rtol=1e-12)
    np.testing.assert_allclose(jax.jit(run)(4)[1], expected[1], rtol=1e-12)


def test_local_regret_with_a_shared_step(hypergradients):
    values = jax.jit(lambda s: running_regret(bilevel.local_regret(4), hypergradients, s)[1])(7 + jnp.arange(STEPS))
    np.testing.assert_allclose(values, in_numpy(hypergradients, 4), rtol=1e-12)


def test_alternating_hypergradients_cost_nothing_over_an_even_window():
    """|g| = 1 at every step, but the mean over two steps vanishes: the reason to smooth."""
    alternating = {"a": jnp.asarray([1.0, -1.0] * 13)[:STEPS]}
    np.testing.assert_allclose(running_regret(bilevel.local_regret(1), alternating)[1], np.arange(1, STEPS + 1))
    np.testing.assert_allclose(running_regret(bilevel.local_regret(2), alternating)[1], np.ones(STEPS))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_small_increments_after_a_large_one_are_not_lost(dtype):
    """In 32 bits the neighbours of 1e12 are 65536 apart: increments of 1e4 alone would leave the sum as it is."""
    with jax.enable_x64(dtype == np.float64):
        regret = bilevel.local_regret(1)
        sizes = jnp.asarray(np.array([1e6] + [1e2] * 200, dtype))

        def update(state, size):
            value, state = regret.update({"a": size}, state)
            return state, (value, state.increment)

        _, (values, increments) = jax.jit(lambda s: lax.scan(update, regret.init({"a": s[0]}), s))(sizes)
    assert values.dtype == increments.dtype == dtype
    np.testing.assert_allclose(increments, np.square(sizes), rtol=1e-6)
    exact = np.cumsum(increments, dtype=np.float64)
    np.testing.assert_array_equal(values, exact.astype(dtype))  # at every step as close as the type allows
    assert exact[-1] - exact[0] == pytest.approx(2e6)


def test_an_infinite_regret_stays_infinite():
    regret = bilevel.local_regret(1)
    state, values = regret.init({"a": jnp.zeros(())}), []
    for size in (1.0, 1e200, 1.0):  # its square is too large for 64 bits
        value, state = regret.update({"a": jnp.asarray(size)}, state)
        values.append(float(value))
    assert values[:2] == [1.0, np.inf]
    assert np.isinf(values[2])


def test_static_regret_compares_with_the_best_choice_so_far():
    losses = np.array([3.0, 1.0, 1.0])
    comparators = np.array([[1.0, 2.0], [5.0, 2.0], [0.0, 2.0]])  # the first is best after step 1, the second after 2
    expected = [3 - 1, 4 - 4, 5 - 6]
    np.testing.assert_allclose(bilevel.static_regret(losses, comparators), expected)
    np.testing.assert_allclose(jax.jit(bilevel.static_regret)(losses, comparators), expected)
    members = jax.vmap(bilevel.static_regret)(
        jnp.stack([losses, 2 * losses]), jnp.stack([comparators, 2 * comparators])
    )
    np.testing.assert_allclose(members, [expected, 2 * np.array(expected)])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bilevel.local_regret(0), "window is 0, it must be at least 1"),
        (lambda: bilevel.local_regret(5, max_window=4), "max_window is 4, it must be at least window"),
        (lambda: bilevel.static_regret(np.ones(3), np.ones((2, 3))), r"losses has shape \(3,\) and .* \(2, 3\)"),
        (lambda: bilevel.static_regret(np.ones(3), np.ones(3)), r"they must be \[steps\] and \[steps, comparators\]"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()

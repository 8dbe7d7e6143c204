"""Smoothing against plain numpy windows and weighted means; the ring's rounding, memory traffic and transformations."""

import re
from collections import deque

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

from purejax_bilevel import bilevel

STEPS, WINDOWS, BETAS = 37, (1, 3, 10), (0.0, 0.3, 1.0)
MAX_WINDOW = 12  # more than the largest window, so that reading and writing places differ
KINDS = {
    "window": lambda window, beta: bilevel.window_average(window, beta, max_window=MAX_WINDOW),
    "exponential": bilevel.exponential_average,
}


@pytest.fixture
def gradients():
    """[steps, ...] of a pytree with a scalar, a matrix and a tuple."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=(STEPS, *shape)))  # noqa: E731
    return {"scalar": normal(), "pair": (normal(2, 3), normal(4))}


def first(gradients):
    return jax.tree.map(lambda g: g[0], gradients)


def smooth(transformation, gradients, steps=None):
    """Outputs [steps, ...] of a transformation applied in a scan."""

    def update(state, gradient_and_step):
        gradient, step = gradient_and_step
        output, state = transformation.update(gradient, state, **({} if steps is None else {"step": step}))
        return state, output

    count = jax.tree.leaves(gradients)[0].shape[0]
    scanned = gradients, jnp.arange(count) if steps is None else steps
    return lax.scan(update, transformation.init(first(gradients)), scanned)[1]


def windowed_in_numpy(gradients, window, beta):
    def leaf(g):
        seen, outputs = deque(maxlen=int(window)), []
        for newest in np.asarray(g):
            seen.append(newest)
            outputs.append(beta * newest + (1 - beta) * np.mean(seen, axis=0))
        return np.array(outputs)

    return jax.tree.map(leaf, gradients)


def exponential_in_numpy(gradients, window, beta):
    decay = 1 - 2 / (window + 1)

    def leaf(g):
        g = np.asarray(g)
        weights = [decay ** np.arange(t, -1.0, -1.0) for t in range(len(g))]
        means = [np.average(g[: t + 1], axis=0, weights=weights[t]) for t in range(len(g))]
        return beta * g + (1 - beta) * np.array(means)

    return jax.tree.map(leaf, gradients)


REFERENCES = {"window": windowed_in_numpy, "exponential": exponential_in_numpy}


# ------------------------------------------------------------------------------------------------------------- values


@pytest.mark.usefixtures("float64", "strict_promotion")
@pytest.mark.parametrize("kind", KINDS)
def test_traced_windows_and_betas_equal_numpy(gradients, assert_close, kind):
    run = jax.jit(lambda window, beta: smooth(KINDS[kind](window, beta), gradients))
    for window in WINDOWS:
        for beta in BETAS:
            assert_close(run(window, beta), REFERENCES[kind](gradients, window, beta), atol=1e-13)


@pytest.mark.usefixtures("float64", "strict_promotion")
@pytest.mark.parametrize("dtype", [jnp.int32, jnp.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_vmapped_windows_and_betas_equal_numpy(gradients, assert_close, kind, dtype):
    windows, betas = (x.ravel() for x in np.meshgrid(WINDOWS, BETAS))
    run = jax.jit(jax.vmap(lambda window, beta: smooth(KINDS[kind](window, beta), gradients)))
    together = run(jnp.asarray(windows, dtype), jnp.asarray(betas))
    for i, (window, beta) in enumerate(zip(windows, betas, strict=True)):
        expected = REFERENCES[kind](gradients, window, beta)
        assert_close(jax.tree.map(lambda x: x[i], together), expected, atol=1e-13)  # noqa: B023


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("max_window", [None, 3, 20])
def test_concrete_window_without_a_scan(gradients, assert_close, max_window):
    transformation = bilevel.window_average(3, 0.3, max_window)
    state, update = transformation.init(first(gradients)), jax.jit(transformation.update)
    expected = windowed_in_numpy(gradients, 3, 0.3)
    for t in range(8):
        output, state = update(jax.tree.map(lambda g: g[t], gradients), state)  # noqa: B023
        assert_close(output, jax.tree.map(lambda e: e[t], expected), atol=1e-14)  # noqa: B023


@pytest.mark.usefixtures("float64")
def test_shared_step_gives_the_same_numbers(gradients, assert_close):
    """`step` only chooses where the ring is written: any start, one index for all members."""
    run = jax.jit(
        jax.vmap(lambda w, s: smooth(bilevel.window_average(w, 0.3, max_window=MAX_WINDOW), gradients, s), (0, None))
    )
    together = run(jnp.asarray(WINDOWS), 1000 + jnp.arange(STEPS))
    for i, window in enumerate(WINDOWS):
        assert_close(jax.tree.map(lambda x: x[i], together), windowed_in_numpy(gradients, window, 0.3), atol=1e-13)  # noqa: B023


@pytest.mark.usefixtures("float64")
def test_traced_windows_are_clipped_to_what_is_stored(gradients, assert_close):
    run = jax.jit(lambda window: smooth(bilevel.window_average(window, max_window=5), gradients))
    assert_close(run(50), windowed_in_numpy(gradients, 5, 0.0), atol=1e-13)
    assert_close(run(0), windowed_in_numpy(gradients, 1, 0.0), atol=1e-13)
    assert_close(run(2.6), windowed_in_numpy(gradients, 3, 0.0), atol=1e-13)


@pytest.mark.usefixtures("float64")
def test_constant_gradients_stay_what_they_are(assert_close):
    constant = {"a": jnp.full((50, 2), 0.1)}
    for make in KINDS.values():
        assert_close(smooth(make(7, 0.3), constant), constant, atol=1e-15)


@pytest.mark.usefixtures("float64")
def test_exponential_weights_have_the_mean_age_of_the_window():
    """Impulse response: weights (1 - d) d^k, whose mean age (window - 1) / 2 is that of the window."""
    window, steps = 9, 400
    impulse = jnp.zeros(2 * steps).at[steps].set(1.0)  # after the bias correction has faded
    weights = np.asarray(smooth(bilevel.exponential_average(window), impulse))[steps:]
    np.testing.assert_allclose(weights[:5], 0.2 * 0.8 ** np.arange(5), rtol=1e-12)
    np.testing.assert_allclose(weights.sum(), 1.0, rtol=1e-12)
    np.testing.assert_allclose(weights @ np.arange(steps), (window - 1) / 2, rtol=1e-12)


def test_output_keeps_the_type_of_the_gradients():
    gradients = {"half": jnp.ones((5, 3), jnp.bfloat16), "single": jnp.ones((5,), jnp.float32)}
    for make in KINDS.values():
        output = smooth(make(3, 0.3), gradients)
        assert jax.tree.map(lambda x: x.dtype, output) == jax.tree.map(lambda x: x.dtype, gradients)


def test_half_precision_gradients_are_summed_in_single_precision():
    """256 + 1 = 256 in bfloat16: a sum in that type would stop growing."""
    output = smooth(bilevel.window_average(1000), jnp.ones(1000, jnp.bfloat16))
    np.testing.assert_array_equal(output.astype(jnp.float32), 1.0)


# ------------------------------------------------------------------------------------------------ rounding and memory


@pytest.mark.parametrize("window", [7, 100, 1000])
def test_rounding_does_not_drift_in_float32(window):
    """100 000 steps of gradients whose mean is far from zero: the error stays what it is after the first windows."""
    steps = 100_000
    stream = np.random.default_rng(0).normal(loc=(0.0, 3.0, -30.0), size=(steps, 3)).astype(np.float32)
    output = jax.jit(lambda g: smooth(bilevel.window_average(window), g))(jnp.asarray(stream))
    sums = np.cumsum(np.vstack([np.zeros(3), stream.astype(np.float64)]), axis=0)
    exact = (sums[window:] - sums[:-window]) / window
    error = np.abs(np.asarray(output)[window - 1 :] - exact) / np.abs(stream).max(axis=0)
    assert error[-window:].max() < 3 * error[: 2 * window].max()
    assert error.max() < 40 * np.finfo(np.float32).eps


@pytest.mark.parametrize("window", [1, 5])
def test_not_a_number_leaves_the_window_average_again(window):
    stream = np.random.default_rng(0).normal(size=(40, 2)).astype(np.float32)
    broken = stream.copy()
    broken[11] = [np.nan, np.inf]
    output, expected = (
        np.asarray(smooth(bilevel.window_average(window, 0.3), jnp.asarray(x))) for x in (broken, stream)
    )
    assert not np.isfinite(output[11]).any()
    np.testing.assert_allclose(output[:11], expected[:11], atol=1e-6)
    np.testing.assert_allclose(output[11 + 2 * window :], expected[11 + 2 * window :], atol=1e-6)


@pytest.mark.parametrize("members", [None, 4])
def test_ring_is_written_in_place(members):
    """One slice and no copy of the ring in the compiled loop, for one member and for several that share the step."""
    window, size = 50, 7
    shape = (size,) if members is None else (members, size)

    def update(gradient, state, step):
        return bilevel.window_average(window, 0.3).update(gradient, state, step=step)

    init = bilevel.window_average(window, 0.3).init
    if members is not None:
        update, init = jax.vmap(update, (0, 0, None)), jax.vmap(init)

    def body(carry, step):
        gradient, state = carry
        output, state = update(gradient, state, step)
        return (gradient + output, state), None

    @jax.jit
    def run(gradient):
        return lax.scan(body, (gradient, init(gradient)), jnp.arange(200))[0][0]

    program = run.lower(jnp.ones(shape)).compile().as_text()
    ring = rf"f32\[{'' if members is None else f'{members},'}{window + 1},{size}\]"
    assert re.search(rf"{ring}\S* dynamic-update-slice\(", program), "the ring is not written as one slice"
    assert not re.findall(rf"= {ring}\S* copy\(", program)


# ------------------------------------------------------------------------------------------------------- as optimiser


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("kind", KINDS)
def test_chained_before_adam(gradients, assert_close, kind):
    """chain(smoothing, adam) = adam on the smoothed gradients; clip by norm before it, extra arguments through it."""
    smoothed = jax.tree.map(jnp.asarray, REFERENCES[kind](gradients, 3, 0.3))
    chain = optax.chain(KINDS[kind](3, 0.3), optax.adam(1e-2))
    chain = optax.with_extra_args_support(chain)
    run = jax.jit(lambda: (smooth(chain, gradients, jnp.arange(STEPS)), smooth(optax.adam(1e-2), smoothed)))
    assert_close(*run(), atol=1e-12)


@pytest.mark.usefixtures("float64")
def test_vmapped_members_with_their_own_learning_rate_and_window(gradients, assert_close):
    def train(window, beta, learning_rate):
        return smooth(optax.chain(KINDS["window"](window, beta), optax.adam(learning_rate)), gradients)

    members = jnp.asarray([1, 10]), jnp.asarray([0.3, 0.0]), jnp.asarray([1e-3, 1e-1])
    together = jax.jit(jax.vmap(train))(*members)
    alone = [jax.jit(train)(1, 0.3, 1e-3), jax.jit(train)(10, 0.0, 1e-1)]
    assert_close(together, jax.tree.map(lambda *leaves: jnp.stack(leaves), *alone), atol=1e-12)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_through_the_smoothing(gradients, kind):
    """vmap(grad): d output_t / d gradient_k are the weights of the average."""
    stream = gradients["scalar"]
    last = jax.jit(jax.vmap(jax.grad(lambda beta, g: smooth(KINDS[kind](3, beta), g)[-1], argnums=1), (0, None)))
    impulses = np.eye(STEPS)
    for beta, weights in zip(BETAS, last(jnp.asarray(BETAS), stream), strict=True):
        expected = [REFERENCES[kind](impulse, 3, beta)[-1] for impulse in impulses]
        np.testing.assert_allclose(weights, expected, atol=1e-14)


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bilevel.window_average(0), "window is 0, it must be at least 1"),
        (lambda: bilevel.window_average(-3, max_window=5), "window is -3, it must be at least 1"),
        (lambda: bilevel.window_average(6, max_window=5), "max_window is 5, it must be at least window, which is 6"),
        (lambda: bilevel.window_average(jnp.asarray(6), max_window=5), "max_window is 5, it must be at least window"),
        (lambda: bilevel.window_average(1, max_window=0), "max_window is 0, it must be at least 1"),
        (lambda: bilevel.window_average(1, max_window=2.5), "max_window is 2.5, it must be a whole number"),
        (lambda: bilevel.window_average(3, beta=1.2), "beta is 1.2, it must be between 0 and 1"),
        (
            lambda: bilevel.window_average(jnp.asarray([1, 3]), max_window=5),
            r"window has shape \(2,\), it must be a single",
        ),
        (lambda: jax.jit(lambda w: bilevel.window_average(w).init(w))(3), "max_window is missing, it must be given"),
        (lambda: bilevel.exponential_average(0.5), "window is 0.5, it must be at least 1"),
        (lambda: bilevel.exponential_average(float("nan")), "window is nan, it must be at least 1"),
        (lambda: bilevel.exponential_average(5, beta=-0.1), "beta is -0.1, it must be between 0 and 1"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()

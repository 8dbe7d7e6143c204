"""The tanh-transformed Gaussian against quadrature, finite differences and its worst inputs."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from purejax_bilevel.programs.control import policies

log_prob = jax.jit(policies.log_prob)
sample_and_log_prob = jax.jit(policies.sample_and_log_prob)


def outputs_of(mean: Any, log_std: Any) -> np.ndarray:
    """Outputs `[2, n]` of a policy with one action dimension."""
    return np.stack(np.broadcast_arrays(mean, log_std)).astype(jnp.result_type(float))


def test_density_integrates_to_one(float64: Any):
    """The substitution a = tanh(u) makes the integrand smooth and keeps the quadrature's points off the bounds."""
    for mean, log_std in ((0.0, 0.0), (0.7, -1.0), (-1.0, 0.2), (1.5, -3.0)):
        points = np.linspace(mean - 10 * np.exp(log_std), mean + 10 * np.exp(log_std), 2001)
        actions = np.tanh(points)
        inside = np.abs(actions) < policies.LARGEST_ACTION
        density = np.exp(log_prob(outputs_of(mean, np.full(2001, log_std)), actions[None])) * (1.0 - actions**2)
        np.testing.assert_allclose(np.trapezoid(np.where(inside, density, 0.0), points), 1.0, rtol=1e-5)


def test_density_is_the_derivative_of_the_distribution(float64: Any):
    mean, log_std, step = 0.3, -0.4, 1e-5
    actions = np.linspace(-0.95, 0.95, 39)

    def cumulative(actions: np.ndarray) -> np.ndarray:
        return jax.scipy.stats.norm.cdf((np.arctanh(actions) - mean) / np.exp(log_std))

    slopes = (cumulative(actions + step) - cumulative(actions - step)) / (2 * step)
    density = np.exp(log_prob(outputs_of(mean, np.full(39, log_std)), actions[None]))
    np.testing.assert_allclose(density, slopes, rtol=1e-6)


def test_sampled_log_prob_is_that_of_the_action(float64: Any):
    random = np.random.default_rng(0)
    outputs, noise = 0.3 * random.standard_normal((6, 50)), random.standard_normal((3, 50))
    action, sampled = sample_and_log_prob(outputs, noise)
    assert (action.shape, sampled.shape) == ((3, 50), (50,))
    np.testing.assert_allclose(action, np.tanh(outputs[:3] + np.exp(outputs[3:]) * noise), rtol=1e-12)
    np.testing.assert_allclose(sampled, log_prob(outputs, action), rtol=1e-7)
    np.testing.assert_allclose(sample_and_log_prob(outputs, 0 * noise)[0], policies.mean_action(outputs))


def test_gradients_agree_with_finite_differences(float64: Any):
    random = np.random.default_rng(1)
    outputs, noise, direction = (random.standard_normal(shape) for shape in ((4, 3), (2, 3), (4, 3)))

    @jax.jit
    def loss(outputs: jax.Array) -> jax.Array:
        action, sampled = policies.sample_and_log_prob(outputs, noise)
        return sampled.sum() + (action * jnp.array([[0.3], [-1.1]])).sum()

    slope = (loss(outputs + 1e-6 * direction) - loss(outputs - 1e-6 * direction)) / 2e-6
    np.testing.assert_allclose((jax.jit(jax.grad(loss))(outputs) * direction).sum(), slope, rtol=1e-7)


def test_stored_actions_at_the_bounds_are_finite():
    cases = list(itertools.product((-50.0, 0.0, 50.0), (-1.0, 1.0)))
    means, actions = np.array(cases, np.float32).T
    outputs = outputs_of(means, -1.0)
    assert np.isfinite(log_prob(outputs, actions[None])).all()
    gradient = jax.jit(jax.grad(lambda outputs: policies.log_prob(outputs, actions[None]).sum()))(outputs)
    assert np.isfinite(gradient).all()


def test_saturated_samples_are_finite():
    """Where tanh is 1 to the last bit and the standard deviation at its bounds, or far beyond them."""
    cases = itertools.product((-1e3, -12.0, 12.0, 1e3), (-1e3, -10.0, 2.0, 1e3), (0.5, -2.0))
    means, log_stds, noise = np.array(list(cases), np.float32).T
    outputs = outputs_of(means, log_stds)
    assert np.isfinite(sample_and_log_prob(outputs, noise[None])[1]).all()
    loss = lambda outputs: policies.sample_and_log_prob(outputs, noise[None])[1].sum()  # noqa: E731
    assert np.isfinite(jax.jit(jax.grad(loss))(outputs)).all()


def test_log_std_is_clipped():
    noise = np.ones((1, 2), np.float32)
    beyond, bounds = (sample_and_log_prob(outputs_of(0.1, x), noise)[1] for x in ([-30.0, 7.0], [-10.0, 2.0]))
    np.testing.assert_array_equal(beyond, bounds)

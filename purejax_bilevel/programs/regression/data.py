"""Data of non-stationary regression: a fixed function of fixed inputs whose values are shifted in the course of time.

    Y_time(x) = f(x) + shift(time) u + noise,    u a fixed unit vector

The inner problem at `time` uses the same inputs with the targets of the last w times, with fresh noise. Nothing is
stored for that, since f, u and the shift are known, and of the noise N_s `[outputs x batch]`, s = 1..w, only that part
is drawn that can be seen. A step looks at the noise in three ways: through the sum weighted by lambda, through the
plain sum (regret), and, for the hypergradient, through the inner products <N_s, v> with one direction v that depends on
those sums alone. With U an orthonormal basis of span(lambda, 1), M = U^T N `[2, outputs x batch]` and r `[w]`
independent normals,

    sums in the span:  exact functions of M,       <N_s, v> = (U M v)_s + |v| (r - U U^T r)_s,

in distribution exactly as if all w x outputs x batch numbers had been drawn: what is left of N after U U^T is
independent of M. So the cost of a step does not depend on the length of the window.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from purejax_bilevel import networks
from purejax_bilevel.networks import Layer, Network
from purejax_bilevel.programs.regression import GRID_LIMIT, GRID_POINTS, settings
from purejax_bilevel.programs.regression.agents import Summary
from purejax_bilevel.programs.regression.settings import Inner, Samples, Shift

TRUTH_MEAN = 0.1
PARALLEL = 1e-3  # lambda counts as parallel to 1 when the rest is relatively smaller


class Problem(NamedTuple):
    """The fixed part of a member's data."""

    truth: Network  # f
    direction: jax.Array  # u, [outputs]
    x_inner: jax.Array  # [inputs, pool], inputs of the inner problem
    x_outer: jax.Array  # [inputs, pool], inputs of the outer problem
    f_inner: jax.Array  # [outputs, pool], f(x_inner)
    f_outer: jax.Array  # [outputs, pool], f(x_outer)


def init_problem(config: Samples, key: jax.Array) -> Problem:
    """Draws inputs, function and direction; the key is consumed."""
    normal_key, truth_key = jax.random.split(key)
    outer_size, sizes = config.n_samples // 2, (config.input_dim, config.truth_hidden_dim, config.output_dim)
    # One call for all numbers of a kind: each call takes half a second to compile.
    normals = jax.random.normal(normal_key, (config.input_dim * config.n_samples + config.output_dim,))
    inputs = normals[: -config.output_dim].reshape(config.input_dim, config.n_samples)
    direction = normals[-config.output_dim :]
    kernels = TRUTH_MEAN + jax.random.truncated_normal(truth_key, -2.0, 2.0, (sizes[0] + sizes[2], sizes[1]))
    truth = (
        Layer(kernels[: sizes[0]], jnp.zeros(sizes[1])),
        Layer(kernels[sizes[0] :].T, jnp.zeros(sizes[2])),
    )
    outer, inner = inputs[:, :outer_size], inputs[:, outer_size:]
    f_inner, f_outer = (networks.apply_network(truth, x, networks.gelu) for x in (inner, outer))
    return Problem(truth, direction / jnp.linalg.norm(direction), inner, outer, f_inner, f_outer)


def shift(config: Shift, time: jax.Array) -> jax.Array:
    """Size of the shift along u at the given times (whole numbers from 1), same shape."""
    if config.shift_type == "linear":
        return config.alpha * time
    if config.shift_type == "sinusoidal":
        return config.beta * jnp.sin(config.omega * time)
    if config.shift_type == "abrupt":
        return config.beta * (1.0 - 2.0 * (jnp.floor_divide(time - 1, config.abrupt_steps) % 2))
    return jnp.zeros(jnp.shape(time))


def targets_without_noise(config: Shift, problem: Problem, values: jax.Array, time: jax.Array) -> jax.Array:
    """f + shift(time) u for values f `[outputs, batch]`."""
    return values + shift(config, time) * problem.direction[:, None]


def plot_inputs(config: Samples, problem: Problem) -> jax.Array:
    """Where approximations are drawn, `[inputs, points]`: a grid for one or two inputs, else the outer inputs."""
    points = GRID_POINTS.get(config.input_dim)
    if points is None:
        return problem.x_outer
    axis = jnp.linspace(-GRID_LIMIT, GRID_LIMIT, points)
    return jnp.stack([x.ravel() for x in jnp.meshgrid(*[axis] * config.input_dim)])


# --- the window -------------------------------------------------------------------------------------------------------


class WindowData(NamedTuple):
    """The targets of the last w times on one batch, as far as a step can tell."""

    values: jax.Array  # [outputs, batch], f
    direction: jax.Array  # [outputs], u
    shifts: jax.Array  # [lags], shift at time - s
    present: jax.Array  # [lags], 1.0 for lags s that are in the window and not before time 1
    basis: jax.Array  # [lags, 2], U
    components: jax.Array  # [2, outputs, batch], M
    rest: jax.Array  # [lags], (I - U U^T) r
    noise_level: float | jax.Array  # []


def noise_size(config: Inner) -> int:
    """Standard normals that `make_window` takes."""
    return 2 * config.output_dim * config.batch_size + config.max_window_size


def make_window(
    config: settings.Window, problem: Problem, values: jax.Array, weights: jax.Array, time: jax.Array, noise: jax.Array
) -> WindowData:
    """The window before `time` on a batch with f = `values` `[outputs, batch]`.

    Args:
        config: its `window_size` may be traced.
        problem: fixed data.
        values: f on the batch, `[outputs, batch]`.
        weights: lambda, `[lags]`, with which the inner problem will be posed.
        time: a whole number from 1.
        noise: `[noise_size]`, independent standard normals.
    """
    lags = jnp.arange(1, weights.shape[0] + 1)
    present = ((lags <= config.window_size) & (lags < time)).astype(values.dtype)
    basis = _basis(weights * present, present)
    noise = config.noise_level * noise
    components = noise[: 2 * values.size].reshape(2, *values.shape)
    rest = present * noise[2 * values.size :]
    rest = rest - basis @ (basis.T @ rest)
    shifts = shift(config, (time - lags).astype(values.dtype))
    return WindowData(values, problem.direction, shifts, present, basis, components, rest, config.noise_level)


def _basis(first: jax.Array, second: jax.Array) -> jax.Array:
    """Orthonormal basis `[lags, 2]` of the span; a column is zero where the vectors span less."""
    first = first / _or_one(jnp.linalg.norm(first))
    remainder = second - first * (first @ second)
    length = jnp.linalg.norm(remainder)
    new = length > PARALLEL * jnp.linalg.norm(second)
    return jnp.stack([first, jnp.where(new, remainder / _or_one(length), 0.0)], axis=1)


def _or_one(x: jax.Array) -> jax.Array:
    return jnp.where(x > 0, x, 1.0)


def summarise(window: WindowData, weights: jax.Array) -> Summary:
    """Total weight and weighted sum of the targets, for the weights the window was drawn for or equal ones `[lags]`."""
    weights = weights * window.present
    noise = jnp.tensordot(window.basis.T @ weights, window.components, 1)
    clean = weights.sum() * window.values + (weights @ window.shifts) * window.direction[:, None]
    return Summary(weights.sum(), clean + noise)


def pull_back(window: WindowData, gradient: Summary) -> jax.Array:
    """Gradient with respect to each weight `[lags]`, from that with respect to the summary: dW + <dY, Y_s>."""
    along = gradient.target
    clean = jnp.vdot(along, window.values) + window.shifts * jnp.vdot(along.sum(1), window.direction)
    seen = window.basis @ jnp.tensordot(window.components, along, 2)
    return window.present * (gradient.weight + clean + seen + jnp.linalg.norm(along) * window.rest)


def mean_square(window: WindowData, weights: jax.Array) -> jax.Array:
    """sum_s lambda_s mean_i |Y_(s,i)|^2, the part of the inner loss that does not depend on the network.

    Where it takes noise that no other quantity sees, the expectation is given.
    """
    values, components, basis = window.values, window.components, window.basis
    batch_size = values.shape[-1]
    along = values.sum(1) @ window.direction
    clean = jnp.vdot(values, values) + 2.0 * window.shifts * along + batch_size * window.shifts**2
    in_values = jnp.tensordot(components, values, 2)
    in_direction = components.sum(2) @ window.direction
    cross = basis @ in_values + window.shifts * (basis @ in_direction)
    gram = jnp.einsum("aoi,boi->ab", components, components)
    seen = jnp.einsum("sa,ab,sb->s", basis, gram, basis)
    unseen = values.size * window.noise_level**2 * (1.0 - (basis**2).sum(1))
    return jnp.sum(weights * window.present * (clean + 2.0 * cross + seen + unseen)) / batch_size

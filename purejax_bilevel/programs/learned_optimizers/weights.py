"""The network of OPEN: a recurrent cell and two hidden layers, applied to every parameter of an agent alike.

Its weights are one flat vector, in the layout of the published files. Activations are *features first*,
`[features, N]` with one column per parameter of the agent: N is large and the features are few.
"""

import itertools
import math
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from purejax_bilevel.errors import UserError

ARTEFACT_KIND = "learned optimiser"
NUM_INPUTS, NUM_OUTPUTS = 19, 3
EPSILON = 1e-6  # of the layer norms


class Weights(NamedTuple):
    """Kernels `[in, out]`, biases and scales `[out]`, in the order of the flat vector."""

    new_carry_bias: jax.Array
    new_carry_kernel: jax.Array
    reset_carry_kernel: jax.Array
    update_carry_kernel: jax.Array
    new_bias: jax.Array
    new_kernel: jax.Array
    reset_bias: jax.Array
    reset_kernel: jax.Array
    update_bias: jax.Array
    update_kernel: jax.Array
    first_bias: jax.Array
    first_kernel: jax.Array
    first_norm_bias: jax.Array
    first_norm_scale: jax.Array
    second_bias: jax.Array
    second_kernel: jax.Array
    second_norm_bias: jax.Array
    second_norm_scale: jax.Array
    output_bias: jax.Array
    output_kernel: jax.Array


def shapes(carry: int, hidden: int) -> tuple[tuple[int, ...], ...]:
    """Shape of each array of `Weights`.

    Args:
        carry: size of the recurrent state.
        hidden: size of the two hidden layers.
    """
    recurrent, inputs = (carry, carry), (NUM_INPUTS, carry)
    cell = ((carry,), recurrent, recurrent, recurrent, *((carry,), inputs) * 3)
    first, second = ((hidden,), (carry, hidden)), ((hidden,), (hidden, hidden))
    norm = ((hidden,), (hidden,))
    return (*cell, *first, *norm, *second, *norm, (NUM_OUTPUTS,), (hidden, NUM_OUTPUTS))


def _length(carry: int, hidden: int) -> int:
    return sum(math.prod(shape) for shape in shapes(carry, hidden))


SIZES = {_length(carry, hidden): (carry, hidden) for carry, hidden in ((8, 16), (16, 32))}


def check_weights(weights: Any) -> None:
    """Refuses what is not one vector of a known length.

    Raises:
        UserError: naming the shape and the lengths allowed.
    """
    if np.ndim(weights) != 1 or np.shape(weights)[0] not in SIZES:
        small, larger = SIZES
        found = "x".join(map(str, np.shape(weights))) or "a single number"
        raise UserError(f"weights of OPEN are one vector of {small} (small) or {larger} (larger) numbers, got {found}.")
    if not jnp.issubdtype(jnp.result_type(weights), jnp.floating):
        raise UserError(f"weights of OPEN are real numbers, got {jnp.result_type(weights)}.")


def carry_size(weights: Any) -> int:
    """Numbers that the recurrent cell keeps for each parameter of the agent."""
    return SIZES[np.shape(weights)[0]][0]


def unflatten(vector: jax.Array) -> Weights:
    """The arrays of a checked vector."""
    wanted = shapes(*SIZES[vector.shape[0]])
    ends = itertools.accumulate(math.prod(shape) for shape in wanted)
    pieces = (vector[end - math.prod(shape) : end] for end, shape in zip(ends, wanted, strict=True))
    return Weights(*(piece.reshape(shape) for piece, shape in zip(pieces, wanted, strict=True)))


def load_weights(path: str | Path) -> np.ndarray:
    """Reads a published vector (`.npy`), or a checkpoint of the original code, which has the same layout.

    Returns:
        `[1211]` or `[3571]`.

    Raises:
        UserError: there is no such file, or it holds something else.
    """
    try:
        with open(path, "rb") as file:
            weights = np.lib.format.read_array(file, allow_pickle=False)
    except OSError as error:
        raise UserError(f"no weights of OPEN at {path}: {error.strerror or error}.") from error
    except Exception as error:  # a damaged header fails in several ways
        raise UserError(f"{path} is not a whole .npy file of numbers.") from error
    check_weights(weights)
    if not np.isfinite(weights).all():
        raise UserError(f"{path} holds numbers that are not finite.")
    return weights


def apply_network(weights: Weights, inputs: jax.Array, carry: jax.Array) -> tuple[jax.Array, jax.Array]:
    """One step of the network for all parameters of an agent.

    Args:
        weights: of the network.
        inputs: features `[19, N]`.
        carry: state of the recurrent cell `[carry, N]`.

    Returns:
        Outputs `[3, N]`, and the new state. Source: Goldie et al. 2024 (OPEN); the cell is flax's `GRUCell`.
    """
    carry = _recurrent_cell(weights, inputs, carry)
    hidden = _normed(weights.first_kernel, weights.first_bias, carry)
    hidden = jax.nn.relu(_scaled(hidden, weights.first_norm_scale, weights.first_norm_bias))
    hidden = _normed(weights.second_kernel, weights.second_bias, hidden)
    hidden = jax.nn.relu(_scaled(hidden, weights.second_norm_scale, weights.second_norm_bias))
    return weights.output_kernel.T @ hidden + weights.output_bias[:, None], carry


def _recurrent_cell(weights: Weights, inputs: jax.Array, carry: jax.Array) -> jax.Array:
    kernel = jnp.concatenate([weights.reset_kernel, weights.update_kernel, weights.new_kernel], 1)
    bias = jnp.concatenate([weights.reset_bias, weights.update_bias, weights.new_bias])
    carry_kernels = weights.reset_carry_kernel, weights.update_carry_kernel, weights.new_carry_kernel
    own = kernel.T @ inputs + bias[:, None]
    kept = jnp.concatenate(carry_kernels, 1).T @ carry
    reset_own, update_own, new_own = jnp.split(own, 3)
    reset_kept, update_kept, new_kept = jnp.split(kept, 3)
    reset, update = jax.nn.sigmoid(reset_own + reset_kept), jax.nn.sigmoid(update_own + update_kept)
    new = jnp.tanh(new_own + reset * (new_kept + weights.new_carry_bias[:, None]))
    return (1.0 - update) * new + update * carry


def _normed(kernel: jax.Array, bias: jax.Array, inputs: jax.Array) -> jax.Array:
    """A dense layer whose outputs have mean 0 and variance 1 over the features.

    The mean is taken off the kernel and the bias, and the variance is a matrix product: sums over the few rows of an
    `[features, N]` array take a CPU five times the rest of the network.
    """
    centred = (kernel - kernel.mean(1, keepdims=True)).T @ inputs + (bias - bias.mean())[:, None]
    share = jnp.full((1, len(bias)), 1.0 / len(bias), centred.dtype)
    return centred * jax.lax.rsqrt(share @ (centred * centred) + EPSILON)


def _scaled(normed: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    return normed * scale[:, None] + bias[:, None]

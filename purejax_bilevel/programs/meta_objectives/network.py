"""The learned objective: a recurrent network that reads an agent's rollout backwards and says what the agent should do.

For every step it gives pi_hat, a push on the log-probability of the action (minus an advantage, in signs), and y_hat, a
target for the agent's prediction.
Source: Oh et al. 2020, "Discovering reinforcement learning algorithms" (LPG), in the form of GROOVE's released code: a
GRU instead of an LSTM, and no discount factor among the inputs.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from purejax_bilevel.networks import orthogonal

ARTEFACT_KIND = "learned objective"
NUM_INPUTS, NUM_CLOCKS = 5, 2  # r, d, pi, phi(y), phi(y'), and two of the lifetime

_NORMAL = jax.nn.initializers.lecun_normal()


class Weights(NamedTuple):
    """Kernels `[in, out]`, biases `[out]`; those of the cell for its gates r, z, n side by side."""

    embed_kernel: jax.Array  # [m, E]
    embed_bias: jax.Array
    embed_out_kernel: jax.Array  # [E, 1]
    embed_out_bias: jax.Array
    input_kernel: jax.Array  # [5 or 7, 3 H]
    input_bias: jax.Array
    recurrent_kernel: jax.Array  # [H, 3 H]
    recurrent_bias: jax.Array  # [H], of n alone
    policy_kernel: jax.Array  # [H, 1]
    policy_bias: jax.Array
    target_kernel: jax.Array  # [H, m]
    target_bias: jax.Array


class Inputs(NamedTuple):
    """What the network reads of one agent's rollout."""

    reward: jax.Array  # [workers, steps]
    done: jax.Array  # [workers, steps], whether the episode ended with the step
    probability: jax.Array  # [workers, steps], of the action
    prediction: jax.Array  # [workers, steps, m], y of the observation
    next_prediction: jax.Array  # [workers, steps, m], y of the next one; not read where done


def shapes(target: int, embedding: int, cell: int, has_clocks: bool) -> Weights:
    """Shapes of the weights.

    Args:
        target: m, categories of the prediction.
        embedding: E, hidden units of phi.
        cell: H, units of the recurrent cell.
        has_clocks: whether the lifetime is an input.
    """
    inputs = NUM_INPUTS + NUM_CLOCKS * has_clocks
    embed = ((target, embedding), (embedding,), (embedding, 1), (1,))
    recurrent = ((inputs, 3 * cell), (3 * cell,), (cell, 3 * cell), (cell,))
    return Weights(*embed, *recurrent, (cell, 1), (1,), (cell, target), (target,))  # type: ignore[arg-type]


def init(key: jax.Array, wanted: Weights) -> Weights:
    """Random weights: normal kernels of variance 1 / in, orthogonal recurrent ones, no biases.

    Args:
        key: consumed.
        wanted: of `shapes`.
    """
    keys = jax.random.split(key, len(wanted))
    made = {}
    for own, (name, shape) in zip(keys, wanted._asdict().items(), strict=True):
        made[name] = jnp.zeros(shape) if len(shape) == 1 else _kernel(own, name, shape)
    return Weights(**made)


def _kernel(key: jax.Array, name: str, shape: tuple[int, int]) -> jax.Array:
    if name != "recurrent_kernel":
        return _NORMAL(key, shape)
    parts = [orthogonal(own, shape[0], shape[0], 1.0) for own in jax.random.split(key, 3)]
    return jnp.concatenate(parts, 1)


def apply(weights: Weights, inputs: Inputs, clocks: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """What the objective says about one agent's rollout.

    Args:
        weights: of the network.
        inputs: of one agent.
        clocks: `[2]`, features of the lifetime, where the network has inputs for them.

    Returns:
        pi_hat `[workers, steps]` and y_hat `[workers, steps, m]`, probabilities.
    """
    done = inputs.done.astype(inputs.reward.dtype)
    now, then = _embed(weights, inputs.prediction), _embed(weights, inputs.next_prediction)
    columns = [inputs.reward, done, inputs.probability, now, jnp.where(inputs.done, 0.0, then)]
    if clocks is not None:
        columns += [jnp.broadcast_to(clock.astype(done.dtype), done.shape) for clock in clocks]
    hidden = jax.nn.relu(_backwards(weights, jnp.stack(columns, -1), inputs.done))
    pi_hat = (hidden @ weights.policy_kernel + weights.policy_bias)[..., 0]
    return pi_hat, jax.nn.softmax(hidden @ weights.target_kernel + weights.target_bias)


def _embed(weights: Weights, prediction: jax.Array) -> jax.Array:
    hidden = jax.nn.relu(prediction @ weights.embed_kernel + weights.embed_bias)
    return (hidden @ weights.embed_out_kernel + weights.embed_out_bias)[..., 0]


def _backwards(weights: Weights, columns: jax.Array, done: jax.Array) -> jax.Array:
    """States `[workers, steps, H]` of the cell that comes from the last step; none passes the end of an episode."""
    projected = jnp.moveaxis(columns @ weights.input_kernel + weights.input_bias, 1, 0)
    first = jnp.zeros((done.shape[0], weights.recurrent_bias.shape[0]), columns.dtype)

    def step(carry: jax.Array, inputs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        own, ends = inputs
        carry = _cell(weights, own, jnp.where(ends[:, None], 0.0, carry))
        return carry, carry

    states = jax.lax.scan(step, first, (projected, done.T), reverse=True)[1]
    return jnp.moveaxis(states, 0, 1)


def _cell(weights: Weights, own: jax.Array, carry: jax.Array) -> jax.Array:
    """One step of a gated recurrent unit: `own` `[workers, 3 H]` comes from the inputs."""
    reset_own, update_own, new_own = jnp.split(own, 3, -1)
    reset_kept, update_kept, new_kept = jnp.split(carry @ weights.recurrent_kernel, 3, -1)
    reset, update = jax.nn.sigmoid(reset_own + reset_kept), jax.nn.sigmoid(update_own + update_kept)
    new = jnp.tanh(new_own + reset * (new_kept + weights.recurrent_bias))
    return (1.0 - update) * new + update * carry

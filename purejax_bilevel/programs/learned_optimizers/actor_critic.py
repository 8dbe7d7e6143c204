"""Actor and critic as trees that optimisers know how to read: `{"actor": {"Dense_0": {"kernel", "bias"}, ...}, ...}`.

Arrays are batch first. Every forward pass also gives the mean size of each neuron's activation, from which OPEN knows
which neurons are dormant.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from purejax_bilevel import networks
from purejax_bilevel.environments import Continuous, Discrete
from purejax_bilevel.programs.learned_optimizers.settings import ActorCritic

Tree = Any
Task = Discrete | Continuous
ACTIVATIONS = {"relu": jax.nn.relu, "tanh": jnp.tanh}
DORMANT = 1e-7  # below this share of its layer's mean activation
FLOOR = 1e-11
LOG_TWO_PI = float(np.log(2.0 * np.pi))


class Policy(NamedTuple):
    """Distributions over actions: categorical (logits `[..., actions]`), or a diagonal Gaussian (means)."""

    outputs: jax.Array
    log_std: jax.Array | None


def init(key: jax.Array, config: ActorCritic, task: Task) -> Tree:
    """Parameters of both networks: orthogonal kernels of gain sqrt 2, last layers 0.01 and 1; biases and log_std 0."""
    hidden = [config.hidden_dim] * config.num_layers
    outputs = task.num_actions if isinstance(task, Discrete) else task.action_dim
    actor_key, critic_key = jax.random.split(key)
    actor = _layers(actor_key, [task.obs_dim, *hidden, outputs], 0.01)
    if isinstance(task, Continuous):
        actor["log_std"] = jnp.zeros(outputs)
    return {"actor": actor, "critic": _layers(critic_key, [task.obs_dim, *hidden, 1], 1.0)}


def _layers(key: jax.Array, sizes: list[int], output_gain: float) -> dict[str, Any]:
    layers = networks.init_layers(key, sizes, None, output_gain)
    return {f"Dense_{i}": {"kernel": layer.kernel, "bias": layer.bias} for i, layer in enumerate(layers)}


def apply(network: Tree, inputs: jax.Array, activation: str) -> tuple[jax.Array, Tree]:
    """Outputs `[batch, out]` for inputs `[batch, in]`, and each layer's mean activation size `[out]` by its name."""
    sizes = dict.fromkeys(network)
    names = sorted((name for name in network if name.startswith("Dense_")), key=lambda name: int(name[6:]))
    for name in names:
        inputs = inputs @ network[name]["kernel"] + network[name]["bias"]
        inputs = inputs if name == names[-1] else ACTIVATIONS[activation](inputs)
        sizes[name] = jnp.abs(inputs).mean(0)
    return inputs, sizes


def policy(params: Tree, obs: jax.Array, activation: str) -> Policy:
    """The policy at observations `[batch, obs]`."""
    return Policy(apply(params["actor"], obs, activation)[0], params["actor"].get("log_std"))


def value(params: Tree, obs: jax.Array, activation: str) -> jax.Array:
    """Values `[batch]` of observations `[batch, obs]`."""
    return apply(params["critic"], obs, activation)[0][:, 0]


# --- distributions ----------------------------------------------------------------------------------------------------


def sample(policy: Policy, key: jax.Array) -> jax.Array:
    """Actions `[batch]`, or `[batch, action]`."""
    if policy.log_std is None:
        return jax.random.categorical(key, policy.outputs)
    noise = jax.random.normal(key, policy.outputs.shape, policy.outputs.dtype)
    return policy.outputs + jnp.exp(policy.log_std) * noise


def mode(policy: Policy) -> jax.Array:
    """The most likely actions `[batch]`, or `[batch, action]`."""
    return jnp.argmax(policy.outputs, -1) if policy.log_std is None else policy.outputs


def log_prob(policy: Policy, action: jax.Array) -> jax.Array:
    """Log-probabilities or densities `[batch]` of actions `[batch]` or `[batch, action]`."""
    if policy.log_std is None:
        logits = jax.nn.log_softmax(policy.outputs)
        return jnp.take_along_axis(logits, action[..., None], -1)[..., 0]
    scaled = (action - policy.outputs) * jnp.exp(-policy.log_std)
    return (-0.5 * scaled * scaled - policy.log_std - 0.5 * LOG_TWO_PI).sum(-1)


def entropy(policy: Policy) -> jax.Array:
    """Entropies `[batch]`; of a Gaussian one `[]`."""
    if policy.log_std is None:
        logits = jax.nn.log_softmax(policy.outputs)
        return -(jnp.exp(logits) * logits).sum(-1)
    return (policy.log_std + 0.5 * (1.0 + LOG_TWO_PI)).sum(-1)


def dormant_share(activations: Tree) -> jax.Array:
    """Share of all neurons, of both networks, whose activation is below 1e-7 of their layer's mean."""
    layers = [leaf + FLOOR for leaf in jax.tree.leaves(activations)]
    return jnp.concatenate([layer / layer.mean() < DORMANT for layer in layers]).mean(dtype=layers[0].dtype)

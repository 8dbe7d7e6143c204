"""What an update with OPEN takes, beside Adam's and beside OPEN applied to one array after the other.

    python tests/benchmarks/open_speed.py [--width 64] [--observations 400] [--repeats 15]

An actor-critic of two hidden layers, as in the paper; with 400 observations and 3 actions, Breakout's of MinAtar. Each
is a compiled loop of steps, and they are timed in turn, in one process; printed are medians. `with gradient` is a
whole step of training: gradient of a squared error on a minibatch, and update.
"""

import argparse
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from purejax_bilevel.programs.learned_optimizers import open_optimizer
from purejax_bilevel.programs.learned_optimizers.optimizer import DECAYS
from purejax_bilevel.programs.learned_optimizers.weights import SIZES, Weights, unflatten

Tree = Any
Update = Callable[..., tuple[Tree, Any]]  # of key, gradient, activations, state and parameters
STEPS = 16  # in one call, as in training: a call alone pays for its memory again
CONTEXT = {"training_clock": 0.5, "batch_clock": 0.5}
RATIOS = (("OPEN", "Adam"), ("OPEN with gradient", "Adam with gradient"), ("OPEN, array by array", "OPEN"))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--observations", type=int, default=400)
    parser.add_argument("--minibatch", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    for length in SIZES:
        number, medians = measure(options.width, options.observations, options.minibatch, options.repeats, length)
        print(f"{jax.default_backend()}, {number} parameters, {length} weights: ms by the clock, and of CPU time")
        for name, (clock, process) in medians.items():
            print(f"    {name:<22} {clock:8.2f} {process:8.2f}")
        for name, over in RATIOS:
            clock, process = (one / other for one, other in zip(medians[name], medians[over], strict=True))
            print(f"    {name} over {over}: {clock:.2f} by the clock, {process:.2f} of CPU time")


def measure(
    width: int, observations: int, minibatch: int, repeats: int, length: int
) -> tuple[int, dict[str, tuple[float, float]]]:
    """Number of parameters; median milliseconds of a step of each, by the clock and of the process's CPU time.

    Args:
        width: of hidden layers.
        observations: inputs of the agent.
        minibatch: samples of one gradient.
        repeats: of each.
        length: of OPEN's weights.
    """
    keys = jax.random.split(jax.random.key(0), 3)
    weights = 0.3 * jax.random.normal(keys[0], (length,))
    params = make_agent(keys[1], observations, width)
    inputs = jax.random.normal(keys[2], (minibatch, observations))
    variants = make_variants(weights, params, inputs, STEPS)
    times: dict[str, list[np.ndarray]] = {name: [] for name in variants}
    for _ in range(repeats + 1):  # the first compiles
        for name, function in variants.items():
            begin = np.array([time.perf_counter(), time.process_time()])
            jax.block_until_ready(function())
            times[name].append(1e3 / STEPS * (np.array([time.perf_counter(), time.process_time()]) - begin))
    medians = {name: np.median(own[1:], axis=0) for name, own in times.items()}
    number = sum(leaf.size for leaf in jax.tree.leaves(params))
    return number, {name: (float(clock), float(process)) for name, (clock, process) in medians.items()}


def make_agent(key: jax.Array, observations: int, width: int) -> Tree:
    def network(key: jax.Array, outputs: int) -> Tree:
        sizes = (observations, width, width, outputs)
        keys = jax.random.split(key, len(sizes) - 1)
        return {
            f"Dense_{i}": {
                "kernel": 0.1 * jax.random.normal(keys[i], sizes[i : i + 2]),
                "bias": jnp.zeros(sizes[i + 1]),
            }
            for i in range(len(sizes) - 1)
        }

    actor, critic = jax.random.split(key)
    return {"actor": network(actor, 3), "critic": network(critic, 1)}


def loss(params: Tree, inputs: jax.Array) -> tuple[jax.Array, Tree]:
    """Mean squared outputs, and mean sizes of activations."""

    def run(network: Tree) -> tuple[jax.Array, Tree]:
        hidden, sizes = inputs, {}
        for name, layer in network.items():
            hidden = hidden @ layer["kernel"] + layer["bias"]
            hidden = hidden if name == "Dense_2" else jax.nn.relu(hidden)
            sizes[name] = jnp.abs(hidden).mean(0)
        return (hidden**2).mean(), sizes

    found = {name: run(network) for name, network in params.items()}
    return found["actor"][0] + found["critic"][0], {name: sizes for name, (_, sizes) in found.items()}


def make_variants(weights: jax.Array, params: Tree, inputs: jax.Array, steps: int) -> dict[str, Callable[[], Any]]:
    """What is timed, `steps` steps in one compiled loop; each returns parameters and state."""
    fused, adam = open_optimizer(weights), optax.with_extra_args_support(optax.adam(1e-3))
    state, adam_state = fused.init(params), adam.init(params)
    apart = jax.tree.map(lambda leaf: start_apart(leaf, state.carry.shape[0]), params)
    found = jax.jit(jax.grad(loss, has_aux=True))(params, inputs)

    def by(optimiser: optax.GradientTransformationExtraArgs) -> Update:
        def update(key: jax.Array, gradient: Tree, activations: Tree, state: Any, params: Tree) -> Any:
            return optimiser.update(gradient, state, params, activations=activations, key=key, **CONTEXT)

        return update

    def loop(update: Update, state: Any, with_gradient: bool) -> Callable[[], Any]:
        def run(params: Tree, state: Any, inputs: jax.Array, found: Any) -> Any:
            def step(carry: Any, at: jax.Array) -> Any:
                params, state = carry
                gradient, activations = jax.grad(loss, has_aux=True)(params, inputs) if with_gradient else found
                updates, state = update(jax.random.fold_in(jax.random.key(1), at), gradient, activations, state, params)
                return (optax.apply_updates(params, updates), state), None

            return jax.lax.scan(step, (params, state), jnp.arange(steps))[0]

        whole = jax.jit(run)
        return lambda: whole(params, state, inputs, found)

    return {
        "Adam": loop(by(adam), adam_state, False),
        "OPEN": loop(by(fused), state, False),
        "OPEN, array by array": loop(functools.partial(update_apart, unflatten(weights)), apart, False),
        "Adam with gradient": loop(by(adam), adam_state, True),
        "OPEN with gradient": loop(by(fused), state, True),
    }


# --- array by array, as the original does it: features last, the network applied to each array ------------------------


def start_apart(leaf: jax.Array, carry: int) -> tuple[jax.Array, jax.Array]:
    """Momenta and carry of one array."""
    return jnp.zeros((*leaf.shape, len(DECAYS))), jnp.zeros((*leaf.shape, carry))


def update_apart(
    weights: Weights, key: jax.Array, gradient: Tree, activations: Tree, states: Tree, params: Tree
) -> Any:
    """Updates and states of all arrays; they differ from those of `open_optimizer` in the drawn noise alone."""
    leaves, structure = jax.tree.flatten_with_path(params)
    names = [tuple(entry.key for entry in path) for path, _ in leaves]
    changes, new = [], []
    for (net, layer, name), own in zip(names, jax.random.split(key, len(names)), strict=True):
        active = activations[net][layer] + 1e-11
        place = int(layer[-1]) / (len(params[net]) - 1)
        inputs = (params[net][layer][name], gradient[net][layer][name], active / active.mean(), place)
        outputs, state = apply_apart(weights, inputs, states[net][layer][name])
        change = 1e-3 * outputs[..., 0] * jnp.exp(1e-3 * outputs[..., 1])
        if net == "actor":
            change += 1e-3 * outputs[..., 2] * jax.random.normal(own, change.shape)
        changes.append(change)
        new.append(state)
    mean = sum(change.sum() for change in changes) / sum(change.size for change in changes)
    return jax.tree.unflatten(structure, [mean - change for change in changes]), jax.tree.unflatten(structure, new)


def apply_apart(weights: Weights, inputs: Any, state: Any) -> Any:
    """Outputs `[..., 3]` and new state of one array."""
    leaf, gradient, activity, place = inputs
    decays = jnp.asarray(DECAYS)
    momenta = decays * state[0] + (1.0 - decays) * gradient[..., None]

    def signs(x: jax.Array) -> list[jax.Array]:
        return [jnp.sign(x), jnp.log(jnp.abs(x) + 1e-13)]

    own = jnp.concatenate([leaf[..., None], *signs(momenta), *signs(gradient[..., None])], -1)
    own = own * jax.lax.rsqrt(1e-5 + jnp.mean(own**2, range(own.ndim - 1), keepdims=True))
    context = [CONTEXT["training_clock"], place, CONTEXT["batch_clock"], activity]
    rows = [jnp.broadcast_to(jnp.asarray(entry), leaf.shape)[..., None] for entry in context]
    outputs, carry = network_apart(weights, jnp.concatenate([own, *rows], -1), state[1])
    return outputs, (momenta, carry)


def network_apart(weights: Weights, x: jax.Array, carry: jax.Array) -> tuple[jax.Array, jax.Array]:
    def norm(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
        mean = x.mean(-1, keepdims=True)
        return (x - mean) * jax.lax.rsqrt(((x - mean) ** 2).mean(-1, keepdims=True) + 1e-6) * scale + bias

    w = weights
    reset = jax.nn.sigmoid(x @ w.reset_kernel + w.reset_bias + carry @ w.reset_carry_kernel)
    update = jax.nn.sigmoid(x @ w.update_kernel + w.update_bias + carry @ w.update_carry_kernel)
    kept = reset * (carry @ w.new_carry_kernel + w.new_carry_bias)
    carry = (1.0 - update) * jnp.tanh(x @ w.new_kernel + w.new_bias + kept) + update * carry
    hidden = carry @ w.first_kernel + w.first_bias
    hidden = jax.nn.relu(norm(hidden, w.first_norm_scale, w.first_norm_bias)) @ w.second_kernel + w.second_bias
    hidden = jax.nn.relu(norm(hidden, w.second_norm_scale, w.second_norm_bias))
    return hidden @ w.output_kernel + w.output_bias, carry


if __name__ == "__main__":
    main()

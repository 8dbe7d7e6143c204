"""OPEN, an optimiser that was itself trained, as an optax transformation.

A small recurrent network, the same for every parameter, turns 19 features of the parameter, its gradient, the training
and its layer into an update. There is no learning rate. All arrays of the agent are joined to one `[19, N]` matrix.

    optimiser = open_optimizer(load_weights("breakout_OPEN.npy"))
    updates, state = optimiser.update(
        gradients, state, params, activations=..., training_clock=..., batch_clock=..., key=...)

Source: Goldie et al. 2024, "Can learned optimization make reinforcement learning less difficult?" (OPEN).
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from purejax_bilevel.errors import UserError
from purejax_bilevel.programs.learned_optimizers import columns
from purejax_bilevel.programs.learned_optimizers.columns import Features, Results
from purejax_bilevel.programs.learned_optimizers.layout import Layout, Place, Tree, layout_of, spread
from purejax_bilevel.programs.learned_optimizers.weights import carry_size, check_weights, unflatten

DECAYS = (0.1, 0.5, 0.9, 0.99, 0.999, 0.9999)
SMALLEST = 1e-13  # added below logarithms
RMS_FLOOR = 1e-5
DORMANCY_FLOOR = 1e-11
Scalar = float | jax.Array
Vector = np.ndarray | jax.Array


class Switches(NamedTuple):
    """What the network sees and may do; a feature that is off is 0. All on but the last: OPEN."""

    parameter: bool = True
    training_clock: bool = True
    batch_clock: bool = True
    layer: bool = True
    dormancy: bool = True
    noise: bool = True
    zero_mean: str = "agent"  # of the updates: over the agent, over each "network", or "none"


ALL_ON = Switches()
NO_FEATURES = Switches(False, False, False, False, False, False)
"""The paper's No Features: signs and logarithms of gradient and momenta alone, and no noise."""

ZERO_MEANS = ("agent", "network", "none")


class Scales(NamedTuple):
    """Factors of the outputs (α1, α2, α3 of the paper); may be traced."""

    update: Scalar = 1e-3
    exponent: Scalar = 1e-3
    noise: Scalar = 1e-3


PUBLISHED_SCALES = Scales()


class OpenState(NamedTuple):
    """State of `open_optimizer`; N parameters, network after network."""

    momenta: jax.Array  # [6, N]
    carry: jax.Array  # [carry, N], of the recurrent cell


def training_clock(step: jax.Array | int, num_updates: int, num_epochs: int, num_minibatches: int) -> jax.Array:
    """How much of the training is over, from 0 to 1, constant during an update of PPO.

    Args:
        step: of the optimiser, from 0; may be traced.
        num_updates: rollouts of the whole training.
        num_epochs: passes over a rollout.
        num_minibatches: optimiser's steps of a pass.

    Raises:
        UserError: there is one update only.
    """
    _check_clock("training_clock", "updates", num_updates)
    return (jnp.asarray(step) // (num_minibatches * num_epochs)).astype(float) / (num_updates - 1)


def batch_clock(step: jax.Array | int, num_epochs: int, num_minibatches: int) -> jax.Array:
    """How many of the epochs over one rollout are over, from 0 to 1; arguments as for `training_clock`.

    Raises:
        UserError: there is one epoch only.
    """
    _check_clock("batch_clock", "epochs", num_epochs)
    return (jnp.asarray(step) // num_minibatches % num_epochs).astype(float) / (num_epochs - 1)


def _check_clock(name: str, what: str, number: int) -> None:
    if number < 2:
        raise UserError(f"{name} needs at least 2 {what}, got {number}; an optimiser with {name} off needs no clock.")


def open_optimizer(
    weights: Vector | Mapping[str, Vector],
    switches: Switches = ALL_ON,
    scales: Scales = PUBLISHED_SCALES,
    networks: Tree = None,
    layers: Tree = None,
    noisy: Tree = None,
) -> optax.GradientTransformationExtraArgs:
    """OPEN with the given weights.

    `update` needs `params` and, by keyword, what is switched on:

    * `activations`: outputs of the layers `[..., out]` on the data of the gradient, after the activation function, of
      which the mean size over the leading axes is taken. A prefix of the parameters' tree: one entry for each layer.
      None, or an array of one number, for what has no neurons: its dormancy is 1.
    * `training_clock`, `batch_clock`: numbers in [0, 1].
    * `key` of the noise, or `noise`: a tree of normal numbers to be used instead.

    Args:
        weights: `[1211]` or `[3571]`, may be traced; or a vector for each network, such as `actor` and `critic`.
        switches: ablations.
        scales: of the network's outputs.
        networks: see `layout_of`, like the next two.
        layers: see there.
        noisy: see there.

    Raises:
        UserError: weights of another length; later, while a program is traced, arguments that do not fit the agent.
    """
    vectors = dict(weights) if isinstance(weights, Mapping) else {"": weights}
    for vector in vectors.values():
        check_weights(vector)
    if len({np.shape(vector) for vector in vectors.values()}) != 1:
        raise UserError("the weights of all networks must have one length.")
    if switches.zero_mean not in ZERO_MEANS:
        raise UserError(f"zero_mean is {switches.zero_mean!r}, it must be one of {', '.join(ZERO_MEANS)}.")

    def layout_for(params: Tree) -> Layout:
        layout = layout_of(params, networks, layers, noisy)
        if isinstance(weights, Mapping) and set(vectors) != set(layout.networks):
            found, given = (", ".join(sorted(names)) for names in (layout.networks, vectors))
            raise UserError(f"the agent has the networks {found}, weights are given for {given}.")
        return layout

    def init(params: Tree) -> OpenState:
        size, dtype = layout_for(params).size, _dtype(params)
        number = carry_size(next(iter(vectors.values())))
        return OpenState(jnp.zeros((len(DECAYS), size), dtype), jnp.zeros((number, size), dtype))

    def update(
        updates: Tree,
        state: OpenState,
        params: Tree = None,
        *,
        activations: Tree = None,
        training_clock: Scalar | None = None,
        batch_clock: Scalar | None = None,
        key: jax.Array | None = None,
        noise: Tree = None,
        **others: Any,  # those of transformations chained with this one
    ) -> tuple[Tree, OpenState]:
        if params is None:
            raise UserError("OPEN needs the parameters at each update: update(gradients, state, params, ...).")
        layout = layout_for(params)
        seen = _Seen(activations, training_clock, batch_clock, key, noise)
        _check_seen(switches, layout, seen)
        gradient = layout.join(jax.tree.leaves(updates), state.momenta.dtype)
        momenta = _new_momenta(state.momenta, gradient)
        # The reference numbers have all bits of float32; the products are too small for fewer to be faster.
        with jax.default_matmul_precision("highest"):
            inputs = features(layout, switches, params, gradient, momenta, seen)
            outputs, carry = _run(vectors, layout, inputs, state.carry)
        change = _change(layout, switches, scales, outputs, params, seen)
        leaves = layout.leaves(_without_mean(layout, change, switches.zero_mean))
        new = [-leaf.astype(jnp.result_type(own)) for leaf, own in zip(leaves, jax.tree.leaves(params), strict=True)]
        return jax.tree.unflatten(jax.tree.structure(params), new), OpenState(momenta, carry)

    return optax.GradientTransformationExtraArgs(init, update)


class _Seen(NamedTuple):
    """The further arguments of one update."""

    activations: Tree
    training_clock: Scalar | None
    batch_clock: Scalar | None
    key: jax.Array | None
    noise: Tree


def _check_seen(switches: Switches, layout: Layout, seen: _Seen) -> None:
    for name, wanted, switch in (
        ("activations", switches.dormancy, "dormancy"),
        ("training_clock", switches.training_clock, "training_clock"),
        ("batch_clock", switches.batch_clock, "batch_clock"),
    ):
        if wanted and getattr(seen, name) is None:
            raise UserError(f"OPEN needs {name} at each update, or its switch {switch} off.")
    if _noisy(switches, layout) and seen.key is None and seen.noise is None:
        raise UserError("OPEN needs a key (or noise) at each update, or its switch noise off.")


def _noisy(switches: Switches, layout: Layout) -> bool:
    return switches.noise and any(place.noisy for place in layout.places)


def _dtype(params: Tree) -> Any:
    """What is computed in: float64 where the agent has it, else float32."""
    double = any(jnp.result_type(leaf) == jnp.float64 for leaf in jax.tree.leaves(params))
    return jnp.float64 if double else jnp.float32


def _new_momenta(momenta: jax.Array, gradient: jax.Array) -> jax.Array:
    decays = jnp.asarray(DECAYS, momenta.dtype)[:, None]
    return decays * momenta + (1.0 - decays) * gradient


def features(
    layout: Layout, switches: Switches, params: Tree, gradient: jax.Array, momenta: jax.Array, seen: _Seen
) -> Features:
    """What the network sees of each parameter, 19 rows.

    In order: the parameter; signs, then logarithms, of the six momenta; sign and logarithm of the gradient - each
    divided by its root mean square over the parameter's array -; training clock, place of the layer, batch clock,
    dormancy.

    Args:
        layout: of the agent.
        switches: what is seen; the rest is 0.
        params: the agent.
        gradient: `[N]`.
        momenta: `[6, N]`, of this gradient already.
        seen: further arguments of the update.
    """
    dtype = gradient.dtype
    values = layout.join(jax.tree.leaves(params), dtype)
    gradient = gradient[None]
    own = [values[None] if switches.parameter else jnp.zeros_like(gradient)]
    own += [jnp.sign(momenta), _logarithm(momenta), jnp.sign(gradient), _logarithm(gradient)]
    joined = jax.lax.optimization_barrier(jnp.concatenate(own))  # else XLA computes it again for each array
    scales = jnp.stack([_one_over_rms(piece) for piece in layout.pieces(joined)], 1)
    layers = layout.row([place.proportion for place in layout.places], dtype)
    context = [
        _clock(seen.training_clock, dtype) if switches.training_clock else None,
        layers if switches.layer else None,
        _clock(seen.batch_clock, dtype) if switches.batch_clock else None,
        dormancy(layout, seen.activations, params, dtype) if switches.dormancy else None,
    ]
    rows = [jnp.zeros((), dtype) if row is None else row for row in context]
    context_rows = jnp.concatenate([jnp.broadcast_to(row, gradient.shape) for row in rows])
    return Features(tuple(place.size for place in layout.places), joined, scales, context_rows)


def _logarithm(x: jax.Array) -> jax.Array:
    return jnp.log(jnp.abs(x) + SMALLEST)


def _one_over_rms(piece: jax.Array) -> jax.Array:
    return jax.lax.rsqrt(jnp.mean(piece * piece, 1) + RMS_FLOOR)


def _clock(clock: Scalar | None, dtype: Any) -> jax.Array:
    return jnp.asarray(clock).astype(dtype)


def dormancy(layout: Layout, activations: Tree, params: Tree, dtype: Any) -> jax.Array:
    """How active the neuron is that each parameter feeds, over the mean of its layer, `[N]`.

    Args:
        layout: of the agent.
        activations: as for `open_optimizer`.
        params: the agent.
        dtype: of the result.

    Raises:
        UserError: a layer has another number of neurons than its activations.
    """
    entries = spread("activations", activations, params)
    return jnp.concatenate(
        [_dormancy_of(place, entries[index], dtype) for place, index in zip(layout.places, layout.order, strict=True)]
    )


def _dormancy_of(place: Place, activations: Any, dtype: Any) -> jax.Array:
    if activations is None or np.size(activations) == 1:
        return jnp.ones(place.size, dtype)
    if not place.shape or np.shape(activations)[-1:] != place.shape[-1:]:
        found, wanted = list(np.shape(activations)), list(place.shape[-1:])
        raise UserError(f"parameter {place.name} is of {wanted} neurons, its activations are {found}.")
    sizes = jnp.abs(jnp.asarray(activations).astype(dtype))
    sizes = jnp.mean(sizes, range(sizes.ndim - 1)) + DORMANCY_FLOOR
    return jnp.broadcast_to(sizes / jnp.mean(sizes), place.shape).ravel()


def _run(vectors: Mapping[str, Vector], layout: Layout, inputs: Features, carry: jax.Array) -> Results:
    """Outputs `[3, N]` and the new state: one product for all networks that share their weights."""
    unflattened = {name: unflatten(jnp.asarray(vector).astype(carry.dtype)) for name, vector in vectors.items()}
    if len(unflattened) == 1:
        return columns.run(next(iter(unflattened.values())), inputs, carry)
    found = []
    for name in layout.networks:
        own = [piece for piece in inputs.pieces() if layout.places[piece.array].network == name]
        found.append(columns.run(unflattened[name], inputs.only(own), columns.cut(carry, own)))
    outputs, carries = zip(*found, strict=True)
    return jnp.concatenate(outputs, 1), jnp.concatenate(carries, 1)


def _change(
    layout: Layout, switches: Switches, scales: Scales, outputs: jax.Array, params: Tree, seen: _Seen
) -> jax.Array:
    """What is to be subtracted from each parameter `[N]`, before the mean is taken off."""
    update, exponent, noise = (jnp.asarray(scale).astype(outputs.dtype) for scale in scales)
    change = update * outputs[0] * jnp.exp(exponent * outputs[1])
    if not _noisy(switches, layout):
        return change
    return change + noise * outputs[2] * _normal(layout, params, seen, outputs.dtype)


def _normal(layout: Layout, params: Tree, seen: _Seen, dtype: Any) -> jax.Array:
    """Normal numbers `[N]`, 0 where an array has no noise."""
    if seen.noise is not None:
        normal = layout.join(spread("noise", seen.noise, params), dtype)
        return normal * layout.row([float(place.noisy) for place in layout.places], dtype)
    assert seen.key is not None, "checked before"
    drawn = jax.random.normal(seen.key, (sum(place.size for place in layout.places if place.noisy),), dtype)
    pieces, begin = [], 0
    for place in layout.places:
        pieces.append(drawn[begin : begin + place.size] if place.noisy else jnp.zeros(place.size, dtype))
        begin += place.size if place.noisy else 0
    return jnp.concatenate(pieces)


def _without_mean(layout: Layout, change: jax.Array, zero_mean: str) -> jax.Array:
    if zero_mean == "none":
        return change
    ends = np.cumsum(list(layout.networks.values()))[:-1].tolist()
    parts = jnp.split(change, ends) if zero_mean == "network" else [change]
    return jnp.concatenate([part - part.mean() for part in parts])

"""What runs on a device: the members one after another, and of each the steps of a stage in blocks.

Steps come in blocks without a branch: whether a stage still warms up, and whether it is time to evaluate, is asked
between two blocks only. On a CPU a block goes on to the next such moment. On an accelerator it has a fixed number of
steps, so that the compiler knows the loop's length and nothing goes back to the host in between.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.flatten_util
import jax.numpy as jnp

from purejax_bilevel.program import Configuration, Metrics, Program, Stage, Tree

Cycle = Sequence[tuple[int, Callable]]  # as `Stage.cycle`
ROWS = 32  # most evaluations in one call: the size of the arrays that take them


class Stored(NamedTuple):
    """What is carried of a member from call to call."""

    state: Tree  # keys as plain numbers
    sums: tuple[dict[str, Any], ...]  # per stage, the metrics since the last evaluation
    done: Any  # [], whether the stage is over for the member; () where no stage asks


class Functions:
    """A program's functions, traced once for every use with the same arguments."""

    def __init__(self, program: Program):
        def traced(function: Any) -> Any:
            return None if function is None else jax.jit(function, inline=True)

        self.program, self.init = program, traced(program.init)
        self.stages = tuple(
            dataclasses.replace(
                stage,
                update=traced(stage.update),
                collect=traced(stage.collect),
                evaluate=traced(stage.evaluate),
                begin=traced(stage.begin),
                cycle=tuple((count, traced(function)) for count, function in stage.cycle),
            )
            for stage in program.stages
        )
        self.may_end_early = any(stage.done is not None for stage in self.stages)


def map_members(
    run: Callable, members: Sequence[Tree], same: Sequence[Tree], member_batch: int | None, batches: jax.Array
) -> Tree:
    """`run(stored, config, seed, *same) -> stored, rows, finite` of all members of a device.

    The number of batches is an argument: the compiler cannot treat one batch in another way than many. States are
    replaced where they lie.
    """
    several = jax.vmap(run, in_axes=(*(0 for _ in members), *(None for _ in same)))
    if member_batch is None:
        return several(*members, *same)
    one = member_batch == 1  # without the dimension of a batch

    def part_of(tree: Tree, i: jax.Array) -> Tree:
        def cut(x: jax.Array) -> jax.Array:
            if one:
                return jax.lax.dynamic_index_in_dim(x, i, keepdims=False)
            return jax.lax.dynamic_slice_in_dim(x, i * member_batch, member_batch)

        return jax.tree.map(cut, tree)

    def put(whole: Tree, part: Tree, i: jax.Array) -> Tree:
        pieces = jax.tree.map(lambda x: x[None], part) if one else part
        return jax.tree.map(
            lambda x, piece: jax.lax.dynamic_update_slice_in_dim(x, piece, i * member_batch, 0), whole, pieces
        )

    run = run if one else several

    def batch(i: jax.Array, carry: tuple) -> tuple:
        state, *measured = carry
        new_state, *new = run(*part_of((state, *members[1:]), i), *same)
        return put(state, new_state, i), *put(measured, new, i)

    count = jax.tree.leaves(members[0])[0].shape[0]
    measured = jax.eval_shape(lambda i: run(*part_of(members, i), *same), jnp.int32(0))[1:]
    empty = jax.tree.map(lambda x: jnp.zeros((count, *x.shape[not one :]), x.dtype), measured)
    return jax.lax.fori_loop(0, batches, batch, (members[0], *empty))


def fresh_state(functions: Functions, config: Configuration, seed: jax.Array, shared: Tree) -> Tree:
    """A member's state before its first step, keys as plain numbers."""
    return plain_keys(_made(functions, config, seed, shared))


def _made(functions: Functions, config: Configuration, seed: jax.Array, shared: Tree) -> Tree:
    return functions.init(jax.random.key(seed), config, shared)


def fresh_member(
    functions: Functions, state: Tree, config: Configuration, seed: jax.Array, shared: Tree, t: jax.Array
) -> Stored:
    """A member with this state, before its first step `t`."""
    keyed = typed_keys(state, jax.eval_shape(functools.partial(_made, functions), config, seed, shared))
    metrics = [
        {} if stage.around else jax.eval_shape(stage.update, keyed, config, t, shared)[1] for stage in functions.stages
    ]
    sums = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), tuple(metrics))
    return Stored(state, sums, jnp.bool_(False) if functions.may_end_early else ())


def run_member(
    functions: Functions,
    number: int,
    block_steps: int,
    stored: Stored,
    config: Configuration,
    seed: jax.Array,
    shared: Tree,
    start: jax.Array,
    stop: jax.Array,
    total: jax.Array,
) -> tuple[Stored, dict[str, jax.Array], jax.Array]:
    """Steps start..stop-1 of stage `number`, of `total` steps, of one member."""
    stage = functions.stages[number]
    keyed = jax.eval_shape(functools.partial(_made, functions), config, seed, shared)
    stored = _begun(functions, number, block_steps, stored, keyed, config, seed, shared, start)
    state, sums = typed_keys(stored.state, keyed), stored.sums[number]
    frequency, evaluate = stage.eval_every, functools.partial(_evaluated, stage, config, shared, total)
    shapes, _ = jax.eval_shape(evaluate, state, sums, stored.done, start)
    rows = jax.tree.map(lambda leaf: jnp.zeros((ROWS, *leaf.shape), leaf.dtype), shapes)

    def block(carry: tuple) -> tuple:
        t, state, sums, done, rows = carry
        end = t + block_steps if block_steps else _block_end(stage, t, stop)
        steps = functools.partial(_steps, stage, config, shared, block_steps, t, end)
        state, sums = steps((state, sums)) if stage.done is None else _unless(done, steps, (state, sums))

        def record() -> tuple:
            number = (end - 1) // frequency - start // frequency if frequency else 0
            row, over = evaluate(state, sums, done, end)
            # A run that ends in between may be made longer: its next regular row is of all steps since the last one.
            kept = jax.tree.map(lambda x: jnp.where(regular, 0, x).astype(x.dtype), sums)
            return kept, over, jax.tree.map(lambda r, x: r.at[number].set(x), rows, row)

        regular = end % frequency == 0 if frequency else jnp.bool_(False)
        due = (end == total) | regular
        sums, done, rows = jax.lax.cond(due, record, lambda: (sums, done, rows))
        return end, state, sums, done, rows

    carry = (start, state, sums, stored.done, rows)
    _, state, sums, done, rows = jax.lax.while_loop(lambda carry: carry[0] < stop, block, carry)
    all_sums = (*stored.sums[:number], sums, *stored.sums[number + 1 :])
    return Stored(plain_keys(state), all_sums, done), rows, functions.program.is_finite(state)


def _begun(
    functions: Functions,
    number: int,
    block_steps: int,
    stored: Stored,
    keyed: Tree,
    config: Configuration,
    seed: jax.Array,
    shared: Tree,
    start: jax.Array,
) -> Stored:
    """A member at the beginning of a call: at the first step of all it is made, at that of a stage it begins it."""
    stage = functions.stages[number]
    if number and stage.begin is None and not functions.may_end_early:
        return stored

    def first() -> Stored:
        made = number == 0
        state = _made(functions, config, seed, shared) if made else typed_keys(stored.state, keyed)
        if stage.begin is not None:
            state = stage.begin(state, config, shared)
        sums = jax.tree.map(jnp.zeros_like, stored.sums) if made else stored.sums
        return Stored(plain_keys(state), sums, jax.tree.map(jnp.zeros_like, stored.done))

    if block_steps:
        return _if(start == 0, lambda _: first(), stored)
    return jax.lax.cond(start == 0, first, lambda: stored)


def _evaluated(
    stage: Stage,
    config: Configuration,
    shared: Tree,
    total: jax.Array,
    state: Tree,
    sums: dict[str, Any],
    done: Any,
    end: jax.Array,
) -> tuple[dict[str, jax.Array], Any]:
    """What is measured after `end` of `total` steps, and whether the member is done with the stage then."""
    over, is_last = done, end == total
    if stage.done is not None:
        over = done | stage.done(state)
        is_last |= over
    row = means(sums) | stage.evaluate(state, config, end - 1, is_last, shared)
    if stage.done is not None:  # the host may go on to the next stage before such rows are made
        row = jax.tree.map(lambda value: _or_nothing(done, value), row)
    return row, over


def means(sums: Metrics) -> dict[str, jax.Array]:
    """What was measured since the last evaluation; NaN where that is nothing."""
    return {name: jnp.where(n > 0, sum_ / jnp.maximum(n, 1), jnp.nan) for name, (sum_, n) in sums.items()}


def _unless(done: jax.Array, function: Callable, carry: Tree) -> Tree:
    return jax.lax.cond(done, lambda carry: carry, function, carry)


def _or_nothing(done: jax.Array, value: jax.Array) -> jax.Array:
    """NaN (0 for whole numbers) in place of what was not measured because the member was done."""
    return jnp.where(done, jnp.nan if jnp.issubdtype(value.dtype, jnp.inexact) else 0, value).astype(value.dtype)


def _block_end(stage: Stage, t: jax.Array, stop: jax.Array) -> jax.Array:
    """The next moment at which something is decided."""
    frequency, first = stage.eval_every, stage.warm_up
    end = jnp.minimum(stop, (t // frequency + 1) * frequency) if frequency else stop
    return jnp.where(t < first, jnp.minimum(end, first), end) if first else end


def _steps(
    stage: Stage,
    config: Configuration,
    shared: Tree,
    block_steps: int,
    t: jax.Array,
    end: jax.Array,
    carry: tuple[Tree, Tree],
) -> tuple[Tree, Tree]:
    """The steps t..end-1, all before or all after the end of the warm-up; `carry` is the state and what is measured."""
    if stage.around is None:
        return _in_a_row(stage, config, shared, block_steps, t, end, carry)

    def steps(one: Tree, own: Configuration, sums: Tree) -> tuple[Tree, Tree]:
        return _in_a_row(stage, own, shared, block_steps, t, end, (one, sums))

    return stage.around(steps, carry[0], config, t, end, shared), carry[1]


def _in_a_row(
    stage: Stage,
    config: Configuration,
    shared: Tree,
    block_steps: int,
    t: jax.Array,
    end: jax.Array,
    carry: tuple[Tree, Tree],
) -> tuple[Tree, Tree]:
    """The steps of `_steps`, one after another."""

    def advance(function: Callable, state: Tree, i: jax.Array) -> tuple[Tree, Tree]:
        return function(state, config, t + i, shared)

    def loop(function: Callable, carry: tuple[Tree, Tree], cycle: Cycle = ()) -> tuple[Tree, Tree]:
        if not block_steps:
            return _one_by_one(functools.partial(advance, function), end - t, carry)
        pieces = [(count, functools.partial(advance, each)) for count, each in cycle or ((block_steps, function),)]
        return _in_few_arrays(pieces, block_steps, carry)

    whole_cycles = block_steps % stage.cycle_steps == 0
    learn = functools.partial(loop, stage.update, cycle=stage.cycle if whole_cycles else ())
    if not stage.warm_up:
        return learn(carry)
    assert stage.collect is not None, "a stage with a warm-up collects"
    collect = functools.partial(loop, stage.collect)
    if not block_steps:
        return jax.lax.cond(t < stage.warm_up, collect, learn, carry)
    return _if(t >= stage.warm_up, learn, _if(t < stage.warm_up, collect, carry))


def _one_by_one(advance: Callable, count: jax.Array, carry: tuple[Tree, Tree]) -> tuple[Tree, Tree]:
    """`count` steps `advance(state, i) -> state, metrics`; `carry` is the state and the sums of metrics."""

    def step(i: jax.Array, carry: tuple) -> tuple:
        state, sums = carry
        state, metrics = advance(state, i)
        return state, sums | {name: jax.tree.map(jnp.add, sums[name], new) for name, new in metrics.items()}

    return jax.lax.fori_loop(0, count, step, carry)


def _in_few_arrays(cycle: Cycle, count: int, carry: tuple[Tree, Tree]) -> tuple[Tree, Tree]:
    """As `_one_by_one`, for accelerators, where each array costs an operation: all metrics lie in one, and so do the
    state's scalars of each type. `count` steps are whole cycles of so many `advance` each."""
    state, sums = carry
    zeros = jax.tree.map(jnp.zeros_like, sums)
    total, apart = jax.flatten_util.ravel_pytree(sums)
    join, separate = _scalars_joined(state)

    def step(advance: Callable, i: jax.Array | int, carry: tuple) -> tuple:
        joined, total = carry
        state, metrics = advance(separate(joined), i)
        return join(state), total + jax.flatten_util.ravel_pytree(zeros | metrics)[0]

    def turn(first: jax.Array | int, carry: tuple) -> tuple:
        for steps, advance in cycle:
            carry = _repeated(functools.partial(step, advance), first, steps, carry)
            first += steps
        return carry

    length = sum(steps for steps, _ in cycle)
    joined, total = _repeated(lambda i, carry: turn(i * length, carry), 0, count // length, (join(state), total))
    return separate(joined), apart(total)


def _repeated(function: Callable, first: jax.Array | int, count: int, carry: Tree) -> Tree:
    """`function(i, carry)` for `count` numbers from the first on."""
    if count == 1:
        return function(first, carry)
    return jax.lax.fori_loop(0, count, lambda i, carry: function(first + i, carry), carry)


def _scalars_joined(like: Tree) -> tuple[Callable[[Tree], Any], Callable[[Any], Tree]]:
    """Functions from a tree to a vector of scalars per type beside its other leaves, and back."""
    leaves, structure = jax.tree.flatten(like)
    places: dict[Any, list[int]] = {}
    for place, leaf in enumerate(leaves):
        if leaf.ndim == 0 and not _is_key(leaf):
            places.setdefault(leaf.dtype, []).append(place)
    scalars = {place for own in places.values() for place in own}

    def join(tree: Tree) -> tuple[list, list]:
        leaves = jax.tree.leaves(tree)
        vectors = [jnp.stack([leaves[place] for place in own]) for own in places.values()]
        return vectors, [leaf for place, leaf in enumerate(leaves) if place not in scalars]

    def separate(joined: tuple[list, list]) -> Tree:
        vectors, rest = joined
        found: dict[int, jax.Array] = {}
        for vector, own in zip(vectors, places.values(), strict=True):
            found |= {place: vector[i] for i, place in enumerate(own)}
        others = iter(rest)
        whole = [found[place] if place in found else next(others) for place in range(len(leaves))]
        return jax.tree.unflatten(structure, whole)

    return join, separate


def _if(wanted: jax.Array, function: Callable, carry: Tree) -> Tree:
    """`function(carry)` where wanted, else `carry`: a loop of one turn or none, which writes in place where a branch
    would copy what it may change."""

    def turn(turns: tuple) -> tuple:
        return jnp.bool_(False), function(turns[1])

    return jax.lax.while_loop(lambda turns: turns[0], turn, (wanted, carry))[1]


# --- keys -------------------------------------------------------------------------------------------------------------


def plain_keys(tree: Tree) -> Tree:
    return jax.tree.map(lambda x: jax.random.key_data(x) if _is_key(x) else x, tree)


def typed_keys(tree: Tree, like: Tree) -> Tree:
    return jax.tree.map(lambda x, shape: jax.random.wrap_key_data(x) if _is_key(shape) else x, tree, like)


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)

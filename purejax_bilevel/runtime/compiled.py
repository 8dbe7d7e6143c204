"""The one compiled program of an experiment: any stretch of steps, of all members, on all devices.

    chunk(state, start, stop, total) -> state, rows, finite

Step bounds are arguments, so a single compilation serves every chunk, a resumed run and a longer run. An experiment
may have several *parts*, sub-programs that differ in static settings (the agent, say); they share the compiled call.

Steps come in blocks without a branch: whether the program still warms up, and whether it is time to evaluate, is asked
between two blocks only. On a CPU a block goes on to the next such moment. On an accelerator it has a fixed number of
steps, so that the compiler knows the loop's length and nothing goes back to the host in between.

Nothing is exchanged between members. Each process places its own members on its own devices; what is measured goes to
all processes between two calls. Each device goes through its members in batches: one after another (`member_batch` 1),
in batches of a fixed size, or all at once (None, vmap). What is compiled for a batch does not depend on how many
batches there are, so a member's bits are the same on any number of devices from two up; for a single device the
compiler takes other ways, and all at once is a batch of another size (`loop.py` stores which it was).
"""

import contextlib
import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from purejax_bilevel.program import Part, Program, Tree, warm_up
from purejax_bilevel.runtime import processes
from purejax_bilevel.runtime.devices import AXIS

TIMED_SECONDS = 1.0  # of steps, to tell the time that a run will take
ROWS = 32  # most evaluations in one chunk: the size of the arrays that take them


def precision(parts: Sequence[Part]) -> contextlib.AbstractContextManager:
    """What everything of these parts must run in: 64-bit numbers if their configuration says `float64`, else as set."""
    wanted = {getattr(part.config, "float64", False) for part in parts}
    if len(wanted) > 1:
        raise ValueError("the parts of one program must agree on float64")
    return jax.enable_x64(True) if wanted == {True} else contextlib.nullcontext()


def _in_precision(method: Callable) -> Callable:
    @functools.wraps(method)
    def wrapped(self: "CompiledProgram", *args: Any) -> Any:
        with precision(self.parts):
            return method(self, *args)

    return wrapped


class CompiledProgram:
    """All parts, compiled together once.

    Args:
        parts: sub-programs, with the same number of steps.
        mesh: devices that share the members.
        member_batch: members trained at once on a device; None: all.
        most_block_steps: largest number of steps in a block of fixed length; None: blocks end where they must.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        mesh: Mesh,
        member_batch: int | None = None,
        most_block_steps: int | None = None,
    ):
        self.parts, self.mesh, self.member_batch = tuple(parts), mesh, member_batch
        self.block_steps = 1 if most_block_steps is None else block_length(parts, most_block_steps)
        self._sharding = NamedSharding(mesh, P(AXIS))
        self.num_traces = 0
        batch = member_batch or 1
        self._each = [batch * -(-len(part.grid) // (mesh.devices.size * batch)) for part in self.parts]
        # Room for two batches even where there is one: the compiler treats arrays of one entry in another way.
        self._padded = [
            _padded_indices(len(part.grid), mesh.devices.size, each, max(each, 2 * (member_batch or 0)))
            for part, each in zip(self.parts, self._each, strict=True)
        ]
        self._compiled: dict[int, Any] = {}  # by the number of steps in a block; 0: as many as there are
        self.compile_seconds = 0.0
        self._prepare()

    @_in_precision
    def _prepare(self) -> None:
        self._configs = tuple(
            self._place(part.config, index) for part, index in zip(self.parts, self._padded, strict=True)
        )
        seeds = [
            np.array([part.grid.settings(i)["seed"] for i in range(len(part.grid))], np.uint32) for part in self.parts
        ]
        self._seeds = tuple(self._place(seed, index) for seed, index in zip(seeds, self._padded, strict=True))
        if not hasattr(self, "_structure"):  # what is swapped in has the same
            self._structure = tuple(map(_member_arrays, self.parts, self._configs, self._seeds))

    def compile(self) -> None:
        """Traces and compiles, once; the time it took is in `compile_seconds`."""
        self._compile(self.block_steps if self.block_steps > 1 else 0)

    @_in_precision
    def _compile(self, block_steps: int) -> Any:
        if block_steps not in self._compiled:
            begin = time.perf_counter()
            self._compiled[block_steps] = self.lower(block_steps).compile()
            self.compile_seconds += time.perf_counter() - begin
        return self._compiled[block_steps]

    @_in_precision
    def lower(self, block_steps: int = 0) -> jax.stages.Lowered:
        """The program before the compiler has seen it.

        Args:
            block_steps: in a block, known to the compiler; 0: as many as there are.
        """
        with jax.default_matmul_precision("highest"):
            bounds = (*(jax.ShapeDtypeStruct((), jnp.int32),) * 3, jax.ShapeDtypeStruct((len(self.parts),), jnp.int32))
            arguments = (self._structure, self._configs, self._seeds, *bounds)
            return jax.jit(functools.partial(self._chunk, block_steps), donate_argnums=0).lower(*arguments)

    @_in_precision
    def initial(self) -> Tree:
        """Storage for all members; the compiled program fills it in when it starts from step 0."""
        empty = lambda: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), self._structure)  # noqa: E731
        return jax.jit(empty, out_shardings=self._sharding)()

    @_in_precision
    def __call__(
        self, state: Tree, start: int, stop: int, total: int
    ) -> tuple[Tree, list[dict[str, np.ndarray]], list[np.ndarray]]:
        """Runs steps start..stop-1 of a run of `total` steps; `state` is consumed.

        Returns:
            The new state; per part the rows `{name: [members, evaluations, ...]}` and `[members]` whether it is
            finite.
        """
        pieces = []
        for first, last, block_steps in self._stretches(start, stop):
            state, *measured = self._run(state, first, last, total, block_steps)
            pieces.append(measured)
        rows = [
            {name: np.concatenate([piece[0][number][name] for piece in pieces], axis=1) for name in names}
            for number, names in enumerate(pieces[0][0])
        ]
        return state, *processes.everywhere((rows, pieces[-1][1]))

    def _stretches(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """Where whole blocks begin and end, and what is left before and after: `(start, stop, steps in a block)`."""
        size = self.block_steps
        if size == 1:
            return [(start, stop, 0)]
        first, last = -(-start // size) * size, stop // size * size
        if first >= last:
            return [(start, stop, 0)]
        return [(a, b, n) for a, b, n in ((start, first, 0), (first, last, size), (last, stop, 0)) if a < b]

    def _run(self, state: Tree, start: int, stop: int, total: int, block_steps: int) -> tuple:
        bounds = (np.int32(bound) for bound in (start, stop, total))
        batches = np.array([each // (self.member_batch or each) for each in self._each], np.int32)
        state, rows, finite = self._compile(block_steps)(state, self._configs, self._seeds, *bounds, batches)
        jax.block_until_ready(finite)
        host_rows, host_finite = [], []
        for number, part in enumerate(self.parts):
            frequency = part.program.eval_frequency
            done = num_rows(stop, total, frequency) - num_rows(start, total, frequency)
            host_rows.append({name: self.local(number, array)[:, :done] for name, array in rows[number].items()})
            host_finite.append(self.local(number, finite[number]))
        return state, host_rows, host_finite

    def swap(self, parts: Sequence[Part]) -> None:
        """Puts other members in the places of the present ones; what is compiled stays.

        Args:
            parts: the same sub-programs with as many members; only values of configurations and seeds differ.

        Raises:
            ValueError: something differs that was compiled in.
        """
        for old, new in zip(self.parts, parts, strict=True):
            if _shapes(old.config) != _shapes(new.config) or len(old.grid) != len(new.grid):
                raise ValueError("members can only be swapped for as many of the same sub-program")
        self.parts = tuple(parts)
        self._prepare()

    @property
    def is_compiled(self) -> bool:
        """Whether it can run at once."""
        return bool(self._compiled)

    @property
    def device_bytes(self) -> int | None:
        """Memory that the compiled program needs on each device; None where the compiler does not tell."""
        analysis = next(iter(self._compiled.values())).memory_analysis() if self._compiled else None
        if analysis is None:
            return None
        kept = analysis.argument_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes
        return kept + analysis.temp_size_in_bytes

    def time_steps(self, state: Tree, total: int) -> tuple[Tree, float, float]:
        """Measures the speed on late steps of a run that has just begun, for a second or a few.

        A call has a cost of its own, with large states that of hundreds of steps, and a run makes few calls: what is
        measured is the difference of a long call and one of a single step.

        Returns:
            State that a run may start from step 0 with (it is filled in then), seconds per step of all members, seconds
            per evaluation.
        """
        frequency = self.parts[0].program.eval_frequency or total
        first = max(total - frequency, 0) // frequency * frequency

        def seconds(start: int, stop: int) -> float:
            nonlocal state
            begin = time.perf_counter()
            state, _, _ = self(state, start, stop, total)
            elapsed = time.perf_counter() - begin
            return processes.from_first(lambda: elapsed)

        seconds(0, 1)
        most = max(1, min(first + frequency, total) - 1 - first)  # the steps before an evaluation
        seconds(first, first + 1)  # touches what only learning does
        single = seconds(first, first + 1)
        count = 1
        longer = single
        while count < most and longer - single < TIMED_SECONDS:
            count = min(4 * count, most)
            longer = seconds(first, first + count)
        per_step = single if count == 1 else max(longer - single, 0.0) / (count - 1)
        evaluation = min(first + frequency, total) - 1
        per_evaluation = max(seconds(evaluation, evaluation + 1) - single, 0.0)
        return state, per_step, per_evaluation

    def gather(self, state: Tree) -> list[Tree]:
        """Host copy of each part's state, leaves `[members, ...]` without padding; of this process's members."""
        return [jax.tree.map(lambda leaf, i=i: self.local(i, leaf), part) for i, part in enumerate(state)]

    @_in_precision
    def scatter(self, host_state: Sequence[Tree]) -> Tree:
        """The inverse of `gather` from all members, on whatever number of devices and processes."""
        return tuple(self._place(part, index) for part, index in zip(host_state, self._padded, strict=True))

    @property
    def structure(self) -> list[Tree]:
        """Shapes and types of what `scatter` takes: the state of all members."""
        return [
            jax.tree.map(functools.partial(_with_length, len(part.grid)), shapes)
            for part, shapes in zip(self.parts, self._structure, strict=True)
        ]

    @property
    def bytes_per_member(self) -> list[int]:
        """Size of one member's state, per part."""
        return [
            sum(leaf.size // leaf.shape[0] * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
            for shapes in self._structure
        ]

    def local(self, part: int, array: jax.Array) -> np.ndarray:
        """The members of this process, `[members, ...]`, padding dropped."""
        shards = sorted(array.addressable_shards, key=lambda shard: shard.index[0].start or 0)
        number, each = len(self.parts[part].grid), self._each[part]
        pieces = []
        for shard in shards:
            device = (shard.index[0].start or 0) // shard.data.shape[0]
            pieces.append(np.asarray(shard.data)[: min(each, max(0, number - device * each))])
        return np.concatenate(pieces)

    def members_here(self, part: int) -> slice:
        """The members of a part that live in this process."""
        number, devices = len(self.parts[part].grid), self.mesh.devices.flat
        here = [place for place, device in enumerate(devices) if device.process_index == processes.index()]
        each = self._each[part]
        return slice(min(here[0] * each, number), min((here[-1] + 1) * each, number))

    def _place(self, tree: Tree, index: np.ndarray) -> Tree:
        def place(leaf: Any) -> jax.Array:
            whole = _as_default_type(np.asarray(leaf)[index])
            if processes.count() == 1:
                return jax.device_put(whole, self._sharding)
            return jax.make_array_from_callback(whole.shape, self._sharding, lambda own: whole[own])

        return jax.tree.map(place, tree)

    def _chunk(
        self, block_steps: int, state: Tree, configs: Tree, seeds: Tree, *bounds: jax.Array
    ) -> tuple[Tree, Tree, Tree]:
        self.num_traces += 1

        def on_device(state: Tree, configs: Tree, seeds: Tree, *bounds: jax.Array) -> Tree:
            *steps, batches = bounds
            results = []
            for part, count, *members in zip(self.parts, batches, state, configs, seeds, strict=True):
                run = functools.partial(_run_member, part.program, block_steps, bounds=steps)
                results.append(_map_members(run, members, self.member_batch, count))
            return tuple(zip(*results, strict=True))

        members = P(AXIS)
        mapped = jax.shard_map(
            on_device,
            mesh=self.mesh,
            in_specs=(members, members, members, *(P() for _ in bounds)),
            out_specs=members,
            check_vma=False,  # gymnax's scans mix constants and members
        )
        return mapped(state, configs, seeds, *bounds)


def block_length(parts: Sequence[Part], most: int) -> int:
    """Steps in a block: the most, up to `most`, that divide warm-up and evaluation intervals of all parts."""
    moments = (moment for part in parts for moment in (warm_up(part.program), part.program.eval_frequency))
    common = math.gcd(*moments)
    return next(steps for steps in range(most, 0, -1) if common % steps == 0)


def num_rows(steps: int, total: int, frequency: int) -> int:
    """Evaluations made in the first `steps` of `total` steps: every `frequency` (0: none) and after the last."""
    regular = steps // frequency if frequency else 0
    extra = steps >= total and (frequency == 0 or total % frequency != 0)
    return regular + int(extra)


def row_steps(total: int, frequency: int) -> np.ndarray:
    """Number of steps done at each evaluation of a run."""
    regular = np.arange(frequency, total + 1, frequency) if frequency else np.array([], int)
    return regular if len(regular) and regular[-1] == total else np.append(regular, total)


# --- members ----------------------------------------------------------------------------------------------------------


def _map_members(run: Callable, members: Sequence[Tree], member_batch: int | None, batches: jax.Array) -> Tree:
    """`run(state, config, seed) -> state, rows, finite` of all members of a device.

    The number of batches is an argument: the compiler cannot treat one batch in another way than many. States are
    replaced where they lie.
    """
    if member_batch is None:
        return jax.vmap(run)(*members)
    one = member_batch == 1  # without the dimension of a batch

    def part_of(tree: Tree, i: jax.Array) -> Tree:
        def cut(x: jax.Array) -> jax.Array:
            return x[i] if one else jax.lax.dynamic_slice_in_dim(x, i * member_batch, member_batch)

        return jax.tree.map(cut, tree)

    def put(whole: Tree, part: Tree, i: jax.Array) -> Tree:
        pieces = jax.tree.map(lambda x: x[None], part) if one else part
        return jax.tree.map(
            lambda x, piece: jax.lax.dynamic_update_slice_in_dim(x, piece, i * member_batch, 0), whole, pieces
        )

    run = run if one else jax.vmap(run)

    def batch(i: jax.Array, carry: tuple) -> tuple:
        state, *measured = carry
        new_state, *new = run(*part_of((state, *members[1:]), i))
        return put(state, new_state, i), *put(measured, new, i)

    count = jax.tree.leaves(members[0])[0].shape[0]
    measured = jax.eval_shape(run, *part_of(members, jnp.int32(0)))[1:]
    empty = jax.tree.map(lambda x: jnp.zeros((count, *x.shape[not one :]), x.dtype), measured)
    return jax.lax.fori_loop(0, batches, batch, (members[0], *empty))


def _member_arrays(part: Part, config: Any, seeds: Any) -> Tree:
    """Shapes and types of what the members of a part carry."""
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), (config, seeds))
    shapes = jax.eval_shape(functools.partial(_fresh, part.program), *one)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((seeds.shape[0], *leaf.shape), leaf.dtype), shapes)


def _fresh(program: Program, config: Any, seed: jax.Array) -> Tree:
    """A member before its first step: its state, keys as plain numbers, and the metrics since the last evaluation."""
    state = program.init(jax.random.key(seed), config)
    _, metrics = jax.eval_shape(program.update, state, config, jnp.int32(0))
    return _plain_keys(state), jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), metrics)


def _run_member(
    program: Program, block_steps: int, stored: Tree, config: Any, seed: jax.Array, bounds: Sequence[jax.Array]
) -> tuple[Tree, dict[str, jax.Array], jax.Array]:
    """Steps start..stop-1 of a run of `total` steps of one member; `bounds` are these three."""
    start, stop, total = bounds
    keyed = jax.eval_shape(program.init, jax.random.key(0), config)

    def fresh() -> Tree:  # as `_fresh`, without tracing a step to find out what it measures
        state = program.init(jax.random.key(seed), config)
        return _plain_keys(state), jax.tree.map(jnp.zeros_like, stored[1])

    stored = jax.lax.cond(start == 0, fresh, lambda: stored)
    state, sums = _typed_keys(stored[0], keyed), stored[1]
    frequency = program.eval_frequency

    def evaluate(state: Tree, sums: Tree, t: jax.Array) -> dict[str, jax.Array]:
        means = {name: jnp.where(n > 0, total / jnp.maximum(n, 1), jnp.nan) for name, (total, n) in sums.items()}
        return means | program.evaluate(state, config, t, t + 1 == total)

    shapes = jax.eval_shape(evaluate, state, sums, start)
    rows = jax.tree.map(lambda leaf: jnp.zeros((ROWS, *leaf.shape), leaf.dtype), shapes)

    def block(carry: tuple) -> tuple:
        t, state, sums, rows = carry
        end = t + block_steps if block_steps else _block_end(program, t, stop)
        state, sums = _steps(program, config, block_steps, t, end, (state, sums))

        def record() -> tuple:
            number = (end - 1) // frequency - start // frequency if frequency else 0
            row = evaluate(state, sums, end - 1)
            # A run that ends in between may be made longer: its next regular row is of all steps since the last one.
            kept = jax.tree.map(lambda x: jnp.where(regular, 0, x).astype(x.dtype), sums)
            return kept, jax.tree.map(lambda r, x: r.at[number].set(x), rows, row)

        regular = end % frequency == 0 if frequency else jnp.bool_(False)
        due = (end == total) | regular
        sums, rows = jax.lax.cond(due, record, lambda: (sums, rows))
        return end, state, sums, rows

    _, state, sums, rows = jax.lax.while_loop(lambda carry: carry[0] < stop, block, (start, state, sums, rows))
    return (_plain_keys(state), sums), rows, program.is_finite(state)


def _block_end(program: Program, t: jax.Array, stop: jax.Array) -> jax.Array:
    """The next moment at which something is decided."""
    frequency, first = program.eval_frequency, warm_up(program)
    end = jnp.minimum(stop, (t // frequency + 1) * frequency) if frequency else stop
    return jnp.where(t < first, jnp.minimum(end, first), end) if first else end


def _steps(
    program: Program, config: Any, block_steps: int, t: jax.Array, end: jax.Array, carry: tuple[Tree, Tree]
) -> tuple[Tree, Tree]:
    """The steps t..end-1, all before or all after the end of the warm-up; `carry` is the state and what is measured."""

    def loop(function: Callable, carry: tuple) -> tuple:
        def step(i: jax.Array, carry: tuple) -> tuple:
            state, sums = carry
            state, metrics = function(state, config, t + i)
            return state, sums | {name: jax.tree.map(jnp.add, sums[name], new) for name, new in metrics.items()}

        return jax.lax.fori_loop(0, block_steps or end - t, step, carry)

    learn = functools.partial(loop, program.update)
    if not warm_up(program):
        return learn(carry)
    return jax.lax.cond(t < warm_up(program), functools.partial(loop, program.collect), learn, carry)  # type: ignore[attr-defined]


# --- arrays -----------------------------------------------------------------------------------------------------------


def _plain_keys(tree: Tree) -> Tree:
    return jax.tree.map(lambda x: jax.random.key_data(x) if _is_key(x) else x, tree)


def _typed_keys(tree: Tree, like: Tree) -> Tree:
    return jax.tree.map(lambda x, shape: jax.random.wrap_key_data(x) if _is_key(shape) else x, tree, like)


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _shapes(tree: Tree) -> Any:
    return jax.tree.structure(tree), [(np.shape(leaf), np.asarray(leaf).dtype) for leaf in jax.tree.leaves(tree)]


def _with_length(length: int, leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((length, *leaf.shape[1:]), leaf.dtype)


def typed_state(part: Part, plain: Tree) -> Tree:
    """A member's state as the algorithm's functions take it, from the plain numbers that the host keeps."""
    own = jax.tree.map(lambda leaf: jnp.asarray(leaf)[0], part.config)
    return _typed_keys(plain, jax.eval_shape(part.program.init, jax.random.key(0), own))


def _padded_indices(num_members: int, num_devices: int, each: int, room: int) -> np.ndarray:
    """Which member lies where: on each device `each` that are computed (the first ones again where there are no more)
    in arrays with room for `room`."""
    own = np.arange(num_devices)[:, None] * each + np.minimum(np.arange(room), each - 1)
    return own.ravel() % num_members


def _as_default_type(array: np.ndarray) -> np.ndarray:
    """Floats in the precision that jax is set to."""
    return array.astype(jnp.result_type(float)) if array.dtype.kind == "f" and array.dtype != np.float16 else array

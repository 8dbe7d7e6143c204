"""The one compiled program of an experiment: any stretch of steps, of all members, on all devices.

    chunk(state, start, stop, total) -> state, rows, finite

Step bounds are arguments, so a single compilation serves every chunk, a resumed run and a longer run. An experiment
may have several *parts*, sub-programs that differ in static settings (the agent, say); they share the compiled call.

Nothing is exchanged between members. Each process places its own members on its own devices; what is measured goes to
all processes between two calls. Each device maps over its members one after another (`member_batch` 1), all at
once (None, vmap) or in batches.
"""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from purejax_bilevel.members import Grid
from purejax_bilevel.runtime import processes
from purejax_bilevel.runtime.devices import AXIS

TIMED_SECONDS = 1.0  # of steps, to tell the time that a run will take
ROWS = 32  # most evaluations in one chunk: the size of the arrays that take them
Tree = Any


class Program(Protocol):
    """What an algorithm offers (see `programs/`): pure functions of one member.

    It may also have `attributes` (per measured variable: `better`, `units`, `dimension`, as in
    `results.build_dataset`), `tables` (variables to print at the end) and `not_logged` (variables kept out of wandb
    and TensorBoard).
    """

    headline: str
    step_unit: str
    long_names: dict[str, str]
    finals: dict[str, str]
    num_steps: int
    eval_frequency: int

    def init(self, key: jax.Array, config: Any) -> Tree:
        """State before the first step."""

    def update(self, state: Tree, config: Any, t: jax.Array) -> tuple[Tree, dict[str, tuple[jax.Array, jax.Array]]]:
        """One step; metrics as (sum, count)."""

    def evaluate(self, state: Tree, config: Any, t: jax.Array, is_last: jax.Array) -> dict[str, jax.Array]:
        """Measures the current state, without changing it."""

    def is_finite(self, state: Tree) -> jax.Array:
        """Whether the member has not diverged."""


@dataclasses.dataclass(frozen=True)
class Part:
    """A sub-program and its members; `config` has leaves `[members]`; `label` tells it from other parts."""

    program: Program
    config: Any
    grid: Grid
    label: str = ""


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
    """

    def __init__(self, parts: Sequence[Part], mesh: Mesh, member_batch: int | None = None):
        self.parts, self.mesh, self.member_batch = tuple(parts), mesh, member_batch
        self._sharding = NamedSharding(mesh, P(AXIS))
        self.num_traces = 0
        self._padded = [_padded_indices(len(part.grid), mesh.devices.size) for part in self.parts]
        self._compiled: Any = None
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
        self._structure = jax.eval_shape(self._empty)

    @_in_precision
    def compile(self) -> None:
        """Traces and compiles, once; the time it took is in `compile_seconds`."""
        if self._compiled is not None:
            return
        begin = time.perf_counter()
        with jax.default_matmul_precision("highest"):
            bounds = (jax.ShapeDtypeStruct((), jnp.int32),) * 3
            arguments = (self._structure, self._configs, self._seeds, *bounds)
            self._compiled = jax.jit(self._chunk, donate_argnums=0).lower(*arguments).compile()
        self.compile_seconds = time.perf_counter() - begin

    @_in_precision
    def initial(self) -> Tree:
        """Storage for all members; the compiled program fills it in when it starts from step 0."""
        return jax.jit(self._empty, out_shardings=self._sharding)()

    @_in_precision
    def __call__(
        self, state: Tree, start: int, stop: int, total: int
    ) -> tuple[Tree, list[dict[str, np.ndarray]], list[np.ndarray]]:
        """Runs steps start..stop-1 of a run of `total` steps; `state` is consumed.

        Returns:
            The new state; per part the rows `{name: [members, evaluations, ...]}` and `[members]` whether it is
            finite.
        """
        bounds = (np.int32(bound) for bound in (start, stop, total))
        state, rows, finite = self._compiled(state, self._configs, self._seeds, *bounds)
        jax.block_until_ready(finite)
        host_rows, host_finite = [], []
        for number, part in enumerate(self.parts):
            done = num_rows(stop, total, part.program.eval_frequency) - num_rows(
                start, total, part.program.eval_frequency
            )
            host_rows.append({name: self.local(number, array)[:, :done] for name, array in rows[number].items()})
            host_finite.append(self.local(number, finite[number]))
        return state, *processes.everywhere((host_rows, host_finite))

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
        return self._compiled is not None

    @property
    def device_bytes(self) -> int | None:
        """Memory that the compiled program needs on each device; None where the compiler does not tell."""
        analysis = None if self._compiled is None else self._compiled.memory_analysis()
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
        pieces = []
        for shard in shards:
            start = shard.index[0].start or 0
            pieces.append(np.asarray(shard.data)[: max(0, len(self.parts[part].grid) - start)])
        return np.concatenate(pieces)

    def members_here(self, part: int) -> slice:
        """The members of a part that live in this process."""
        number, devices = len(self.parts[part].grid), self.mesh.devices.flat
        here = [place for place, device in enumerate(devices) if device.process_index == processes.index()]
        each = len(self._padded[part]) // len(devices)
        return slice(min(here[0] * each, number), min((here[-1] + 1) * each, number))

    def _place(self, tree: Tree, index: np.ndarray) -> Tree:
        def place(leaf: Any) -> jax.Array:
            whole = _as_default_type(np.asarray(leaf)[index])
            if processes.count() == 1:
                return jax.device_put(whole, self._sharding)
            return jax.make_array_from_callback(whole.shape, self._sharding, lambda own: whole[own])

        return jax.tree.map(place, tree)

    def _empty(self) -> Tree:
        def part_of(part: Part, config: Any, seeds: Any) -> Tree:
            one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), (config, seeds))
            shapes = jax.eval_shape(lambda config, seed: _fresh(part.program, config, seed), *one)
            return jax.tree.map(lambda leaf: jnp.zeros((seeds.shape[0], *leaf.shape), leaf.dtype), shapes)

        return tuple(map(part_of, self.parts, self._configs, self._seeds))

    def _chunk(
        self, state: Tree, configs: Tree, seeds: Tree, start: jax.Array, stop: jax.Array, total: jax.Array
    ) -> Tree:
        self.num_traces += 1

        def on_device(
            state: Tree, configs: Tree, seeds: Tree, start: jax.Array, stop: jax.Array, total: jax.Array
        ) -> Tree:
            results = []
            for part, *members in zip(self.parts, state, configs, seeds, strict=True):
                run = functools.partial(_run_member, part.program, start=start, stop=stop, total=total)
                results.append(_map_members(lambda member, run=run: run(*member), tuple(members), self.member_batch))
            return tuple(zip(*results, strict=True))

        members, shared = P(AXIS), P()
        mapped = jax.shard_map(
            on_device,
            mesh=self.mesh,
            in_specs=(members, members, members, shared, shared, shared),
            out_specs=members,
            check_vma=False,  # gymnax's scans mix constants and members
        )
        return mapped(state, configs, seeds, start, stop, total)


def num_rows(steps: int, total: int, frequency: int) -> int:
    """Evaluations made in the first `steps` of `total` steps: every `frequency` (0: none) and after the last."""
    regular = steps // frequency if frequency else 0
    extra = steps >= total and (frequency == 0 or total % frequency != 0)
    return regular + int(extra)


def row_steps(total: int, frequency: int) -> np.ndarray:
    """Number of steps done at each evaluation of a run."""
    regular = np.arange(frequency, total + 1, frequency) if frequency else np.array([], int)
    return regular if len(regular) and regular[-1] == total else np.append(regular, total)


def _map_members(run: Callable, members: Tree, member_batch: int | None) -> Tree:
    if member_batch is None:
        return jax.vmap(run)(members)
    return jax.lax.map(run, members, batch_size=None if member_batch == 1 else member_batch)


def _fresh(program: Program, config: Any, seed: jax.Array) -> Tree:
    """A member before its first step: its state, keys as plain numbers, and the metrics since the last evaluation."""
    state = program.init(jax.random.key(seed), config)
    _, metrics = jax.eval_shape(lambda: program.update(state, config, jnp.int32(0)))
    return _plain_keys(state), jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), metrics)


def _run_member(
    program: Program, stored: Tree, config: Any, seed: jax.Array, start: jax.Array, stop: jax.Array, total: jax.Array
) -> tuple[Tree, dict[str, jax.Array], jax.Array]:
    """Steps start..stop-1 of one member."""
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

    def step(t: jax.Array, carry: tuple) -> tuple:
        state, sums, rows = carry
        state, metrics = program.update(state, config, t)
        sums = jax.tree.map(jnp.add, sums, metrics)

        def record() -> tuple:
            number = t // frequency - start // frequency if frequency else 0
            row = evaluate(state, sums, t)
            return jax.tree.map(jnp.zeros_like, sums), jax.tree.map(lambda r, x: r.at[number].set(x), rows, row)

        due = (t + 1 == total) | ((t + 1) % frequency == 0 if frequency else False)
        sums, rows = jax.lax.cond(due, record, lambda: (sums, rows))
        return state, sums, rows

    state, sums, rows = jax.lax.fori_loop(start, stop, step, (state, sums, rows))
    return (_plain_keys(state), sums), rows, program.is_finite(state)


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


def _padded_indices(num_members: int, num_devices: int) -> np.ndarray:
    """Member numbers, the first ones repeated until every device has the same number of members."""
    return np.arange(-(-num_members // num_devices) * num_devices) % num_members


def _as_default_type(array: np.ndarray) -> np.ndarray:
    """Floats in the precision that jax is set to."""
    return array.astype(jnp.result_type(float)) if array.dtype.kind == "f" and array.dtype != np.float16 else array

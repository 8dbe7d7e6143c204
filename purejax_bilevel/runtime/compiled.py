"""The one compiled program of an experiment: any stretch of steps, of all members, on all devices.

    chunk(state, start, stop, total) -> state, rows, finite

Step bounds are arguments, so a single compilation of a stage serves every chunk, a resumed run and a longer run. An
experiment may have several *parts*, sub-programs that differ in static settings (the agent, say); they share the
compiled call.

Nothing is exchanged between members. Where there are more devices than members, several hold one member together if
its program has a population: each has some of the individuals, and all the rest of the member's state. Each process
places its own members on its own devices; what is measured goes to all processes between two calls. Each device goes
through its members in batches: one after another (`member_batch` 1), in batches of a fixed size, or all at once (None,
vmap). What is compiled for a batch does not depend on how many batches there are, so a member's bits are the same on
any number of devices from two up; for a single device the compiler takes other ways, and all at once is a batch of
another size (`fingerprints.py` stores which it was).
"""

import contextlib
import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from purejax_bilevel.program import Part, Tree
from purejax_bilevel.runtime import devices, processes
from purejax_bilevel.runtime.arrays import (
    as_default_type,
    largest_array,
    member_arrays,
    padded_indices,
    shapes_of,
    specs_of,
    with_length,
    zeros,
)
from purejax_bilevel.runtime.devices import AXIS
from purejax_bilevel.runtime.schedule import common_schedule, num_rows
from purejax_bilevel.runtime.steps import Functions, map_members, run_member

TIMED_SECONDS = 1.0  # of steps, to tell the time that a run will take
TIMED_BATCHES = 64  # of members on each device, about as many as are timed for that


def precision(parts: Sequence[Part]) -> contextlib.AbstractContextManager:
    """What everything of these parts must run in: 64-bit numbers if their configuration says `float64`, else as set."""
    wanted = {getattr(part.config, "float64", False) for part in parts}
    if len(wanted) > 1:
        raise ValueError("the parts of one program must agree on float64")
    return jax.enable_x64(True) if wanted == {True} else contextlib.nullcontext()


def as_compiled() -> contextlib.AbstractContextManager:
    """What the program is traced in: jax takes up an earlier trace of a function only where all this is the same."""
    return jax.default_matmul_precision("highest")


def _in_precision(method: Callable) -> Callable:
    @functools.wraps(method)
    def wrapped(self: "CompiledProgram", *args: Any) -> Any:
        with precision(self.parts):
            return method(self, *args)

    return wrapped


class CompiledProgram:
    """All parts, compiled together, once for each of their stages.

    Args:
        parts: sub-programs, with the same stages.
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
        self.schedule = common_schedule(parts)
        self.block_steps = [block_length(parts, stage, most_block_steps or 1) for stage in self.schedule.stages]
        self._functions = [Functions(part.program) for part in parts]
        self.num_traces = 0
        batch, self._places = member_batch or 1, mesh.shape[AXIS]
        self._each = [batch * -(-len(part.grid) // (self._places * batch)) for part in self.parts]
        # Room for two batches even where there is one: the compiler treats arrays of one entry in another way.
        self._padded = [
            padded_indices(len(part.grid), self._places, each, max(each, 2 * (member_batch or 0)))
            for part, each in zip(self.parts, self._each, strict=True)
        ]
        self._compiled: dict[tuple[int, int], Any] = {}  # by stage and number of steps in a block; 0: as many as can be
        self.compile_seconds = 0.0
        self.check: Callable[[int], None] | None = None  # told the bytes of a step's largest array before compiling
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
            self._shared = self._place_shared()
            arguments = (self._functions, self._configs, self._seeds, self._shared)
            with as_compiled():
                self._structure = tuple(map(functools.partial(member_arrays, self.mesh), *arguments))
            self._shardings = tuple(
                jax.tree.map(functools.partial(NamedSharding, self.mesh), specs_of(part.program, shapes))
                for part, shapes in zip(self.parts, self._structure, strict=True)
            )

    def _place_shared(self) -> tuple[Tree, ...]:
        """What all members read, on every device; what several parts share is there once."""
        placed: dict[int, jax.Array] = {}
        whole = NamedSharding(self.mesh, P())
        trees = [part.program.shared() for part in self.parts]
        for leaf in jax.tree.leaves(trees):
            if id(leaf) not in placed:
                array = as_default_type(np.asarray(leaf))
                placed[id(leaf)] = jax.make_array_from_callback(array.shape, whole, array.__getitem__)
        return tuple(jax.tree.map(lambda leaf: placed[id(leaf)], tree) for tree in trees)

    def compile(self, first_stage: int = 0) -> None:
        """Traces and compiles the stages from one on, once; the time it took is in `compile_seconds`."""
        for stage in self.schedule.stages[first_stage:]:
            self._compile(stage, self.block_steps[stage] if self.block_steps[stage] > 1 else 0)

    @_in_precision
    def _compile(self, stage: int, block_steps: int) -> Any:
        if (stage, block_steps) not in self._compiled:
            begin = time.perf_counter()
            traced = self._trace(stage, block_steps)
            if self.check is not None:
                self.check(largest_array(traced.jaxpr))
            with as_compiled():
                self._compiled[stage, block_steps] = traced.lower().compile()
            self.compile_seconds += time.perf_counter() - begin
        return self._compiled[stage, block_steps]

    @_in_precision
    def lower(self, stage: int = 0, block_steps: int = 0) -> jax.stages.Lowered:
        """The program of a stage before the compiler has seen it.

        Args:
            stage: its number.
            block_steps: in a block, known to the compiler; 0: as many as there are.
        """
        traced = self._trace(stage, block_steps)
        with as_compiled():
            return traced.lower()

    def _trace(self, stage: int, block_steps: int) -> jax.stages.Traced:
        with as_compiled():
            bounds = (*(jax.ShapeDtypeStruct((), jnp.int32),) * 3, jax.ShapeDtypeStruct((len(self.parts),), jnp.int32))
            arguments = (self._structure, self._configs, self._seeds, self._shared, *bounds)
            chunk = functools.partial(self._chunk, stage, block_steps)
            return jax.jit(chunk, donate_argnums=0).trace(*arguments)

    @_in_precision
    def initial(self) -> Tree:
        """Storage for all members; the compiled program fills it in when it starts from step 0."""
        if self.mesh.devices.flat[0].platform == "cpu":  # takes less time than a program of zeros to compile
            return jax.tree.map(zeros, self._structure, self._shardings)
        empty = lambda: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), self._structure)  # noqa: E731
        return jax.jit(empty, out_shardings=self._shardings)()

    @_in_precision
    def __call__(
        self, state: Tree, start: int, stop: int, total: int, stage: int = 0, one_of: int = 1
    ) -> tuple[Tree, list[dict[str, np.ndarray]], list[np.ndarray]]:
        """Runs steps start..stop-1 of a stage of `total` steps; `state` is consumed.

        With `one_of` above 1 only the first members on each device: one of so many batches.

        Returns:
            The new state; per part the rows `{name: [members, evaluations, ...]}` and `[members]` whether it is
            finite.
        """
        pieces = []
        for first, last, block_steps in self._stretches(start, stop, self.block_steps[stage]):
            state, *measured = self._run(state, first, last, (total, stage, block_steps), one_of)
            pieces.append(measured)
        rows = [
            {name: np.concatenate([piece[0][number][name] for piece in pieces], axis=1) for name in names}
            for number, names in enumerate(pieces[0][0])
        ]
        return state, *processes.everywhere((rows, pieces[-1][1]))

    def all_done(self, state: Tree, stage: int) -> bool:
        """Whether a stage is over before its last step, because every member is done."""
        if any(functions.stages[stage].done is None for functions in self._functions):
            return False
        here = [self.local(number, stored.done).all() for number, stored in enumerate(state)]
        return not processes.any_of(not all(here))

    @staticmethod
    def _stretches(start: int, stop: int, size: int) -> list[tuple[int, int, int]]:
        """Where whole blocks begin and end, and what is left before and after: `(start, stop, steps in a block)`."""
        if size == 1:
            return [(start, stop, 0)]
        first, last = -(-start // size) * size, stop // size * size
        if first >= last:
            return [(start, stop, 0)]
        return [(a, b, n) for a, b, n in ((start, first, 0), (first, last, size), (last, stop, 0)) if a < b]

    def _run(self, state: Tree, start: int, stop: int, of: tuple[int, int, int], one_of: int) -> tuple:
        total, stage, block_steps = of
        bounds = (np.int32(bound) for bound in (start, stop, total))
        batches = np.array([-(-count // one_of) for count in self._batches], np.int32)
        arguments = (self._configs, self._seeds, self._shared, *bounds, batches)
        state, rows, finite = self._compile(stage, block_steps)(state, *arguments)
        jax.block_until_ready(finite)
        host_rows, host_finite = [], []
        frequency = self.schedule.eval_every[stage]
        done = num_rows(stop, total, frequency) - num_rows(start, total, frequency)
        for number in range(len(self.parts)):
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
            if shapes_of(old.config) != shapes_of(new.config) or len(old.grid) != len(new.grid):
                raise ValueError("members can only be swapped for as many of the same sub-program")
        self.parts = tuple(parts)
        self._prepare()

    @property
    def _batches(self) -> list[int]:
        """How many batches of members a device has, per part."""
        return [each // (self.member_batch or each) for each in self._each]

    @property
    def is_compiled(self) -> bool:
        """Whether it can run at once."""
        return bool(self._compiled)

    @property
    def device_bytes(self) -> int | None:
        """Memory that the compiled program needs on each device; None where the compiler does not tell."""
        analyses = [compiled.memory_analysis() for compiled in self._compiled.values()]
        if not analyses or None in analyses:
            return None
        return max(
            sizes.argument_size_in_bytes
            + sizes.output_size_in_bytes
            - sizes.alias_size_in_bytes
            + sizes.temp_size_in_bytes
            for sizes in analyses
        )

    def time_steps(self, state: Tree, total: int, stage: int = 0) -> tuple[Tree, float, float]:
        """Measures the speed on late steps of a stage of a run that has just begun, for a second or a few.

        A call has a cost of its own, with large states that of hundreds of steps, and a run makes few calls: what is
        measured is the difference of a long call and one of a single step. Of very many members some are timed: one
        step of all may take minutes.

        Returns:
            State that a run may start from step 0 with (it is filled in then), seconds per step of all members, seconds
            per evaluation.
        """
        frequency = self.schedule.eval_every[stage] or total
        first = max(total - frequency, 0) // frequency * frequency
        one_of = max(1, max(self._batches) // TIMED_BATCHES)
        share = sum(self._batches) / sum(-(-count // one_of) for count in self._batches)

        def seconds(start: int, stop: int) -> float:
            nonlocal state
            begin = time.perf_counter()
            state, _, _ = self(state, start, stop, total, stage, one_of)
            elapsed = time.perf_counter() - begin
            return processes.from_first(lambda: elapsed)

        seconds(0, 1)
        most = max(1, min(first + frequency, total) - 1 - first)  # the steps before an evaluation
        seconds(first, first + 1)  # touches what only learning does
        single = seconds(first, first + 1)
        count, factor = 1, 4 if single < TIMED_SECONDS else 2
        longer = single
        while count < most and longer - single < (TIMED_SECONDS if one_of == 1 else max(TIMED_SECONDS, single)):
            count = min(factor * count, most)
            longer = seconds(first, first + count)
        per_step = single if count == 1 else max(longer - single, 0.0) / (count - 1)
        evaluation = min(first + frequency, total) - 1
        per_evaluation = max(seconds(evaluation, evaluation + 1) - single, 0.0)
        return state, share * per_step, share * per_evaluation

    def gather(self, state: Tree) -> list[Tree]:
        """Host copy of each part's state, leaves `[members, ...]` without padding; of this process's members."""
        return [jax.tree.map(lambda leaf, i=i: self.local(i, leaf), part) for i, part in enumerate(state)]

    @_in_precision
    def scatter(self, host_state: Sequence[Tree]) -> Tree:
        """The inverse of `gather` from all members, on whatever number of devices and processes."""
        return tuple(map(self._place, host_state, self._padded, self._shardings))

    @property
    def structure(self) -> list[Tree]:
        """Shapes and types of what `scatter` takes: the state of all members."""
        return [
            jax.tree.map(functools.partial(with_length, len(part.grid)), shapes)
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
        """The members of this process, `[members, ...]`, padding dropped; all individuals of a population."""
        number, each = len(self.parts[part].grid), self._each[part]
        pieces: dict[int, dict[int, np.ndarray]] = {}
        for shard in array.addressable_shards:
            first, *others = (index.start or 0 for index in shard.index)
            place = first // shard.data.shape[0]
            kept = min(each, max(0, number - place * each))
            pieces.setdefault(first, {})[others[0] if others else 0] = np.asarray(shard.data)[:kept]
        return np.concatenate(
            [
                own[0] if len(own) == 1 else np.concatenate([own[at] for at in sorted(own)], axis=1)
                for own in (pieces[first] for first in sorted(pieces))
            ]
        )

    def members_here(self, part: int) -> slice:
        """The members of a part that live in this process."""
        number = len(self.parts[part].grid)
        here = [i for i, row in enumerate(self.mesh.devices) if row[0].process_index == processes.index()]
        each = self._each[part]
        return slice(min(here[0] * each, number), min((here[-1] + 1) * each, number))

    def _place(self, tree: Tree, index: np.ndarray, shardings: Tree = None) -> Tree:
        def place(leaf: Any, sharding: NamedSharding) -> jax.Array:
            whole = as_default_type(np.asarray(leaf)[index])
            if processes.count() == 1:
                return jax.device_put(whole, sharding)
            return jax.make_array_from_callback(whole.shape, sharding, lambda own: whole[own])

        if shardings is None:
            shardings = jax.tree.map(lambda leaf: NamedSharding(self.mesh, P(AXIS)), tree)
        return jax.tree.map(place, tree, shardings)

    def _chunk(
        self, stage: int, block_steps: int, state: Tree, configs: Tree, seeds: Tree, shared: Tree, *bounds: jax.Array
    ) -> tuple[Tree, Tree, Tree]:
        self.num_traces += 1

        def on_device(state: Tree, configs: Tree, seeds: Tree, shared: Tree, *bounds: jax.Array) -> Tree:
            *steps, batches = bounds
            results = []
            for functions, inputs, count, *members in zip(
                self._functions, shared, batches, state, configs, seeds, strict=True
            ):
                run = jax.jit(functools.partial(run_member, functions, stage, block_steps), inline=True)
                results.append(map_members(run, members, (inputs, *steps), self.member_batch, count))
            return tuple(zip(*results, strict=True))

        members, states = P(AXIS), jax.tree.map(lambda sharding: sharding.spec, self._shardings)
        mapped = jax.shard_map(
            on_device,
            mesh=self.mesh,
            in_specs=(states, members, members, P(), *(P() for _ in bounds)),
            out_specs=(states, members, members),
            check_vma=False,  # gymnax's scans mix constants and members
        )
        return mapped(state, configs, seeds, shared, *bounds)


def block_length(parts: Sequence[Part], number: int, most: int) -> int:
    """Steps in a block of a stage: the most, up to `most`, that divide warm-up and evaluation intervals of all.

    Of whole cycles where the stage has one and there is such a number.
    """
    stages = [part.program.stages[number] for part in parts]
    common = math.gcd(*(moment for stage in stages for moment in (stage.warm_up, stage.eval_every)))
    most = min(most, *(stage.most_block_steps for stage in stages))
    lengths = [steps for steps in range(most, 0, -1) if common % steps == 0]
    cycle = math.lcm(*(stage.cycle_steps for stage in stages))
    return next((steps for steps in lengths if steps % cycle == 0), lengths[0])


def mesh_of(parts: Sequence[Part], num_devices: int | None = None) -> Mesh:
    """The devices that share the members of these parts; see `devices.make_mesh`."""
    population = math.gcd(*(part.program.population for part in parts))
    return devices.make_mesh(max(len(part.grid) for part in parts), num_devices, population)

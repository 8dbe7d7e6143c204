"""Sizes: whether an experiment fits the memory, asked before anything is built and again once it is compiled.

The estimate before is of what every member keeps, from the shapes of one member's state, and of its results. What a
step needs on top of that, batches and derivatives, is asked twice: no array of the traced program may be larger than
the memory, and the compiler tells what all need together. What neither foresees ends the run with one sentence.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from purejax_bilevel.errors import UserError
from purejax_bilevel.members import bytes_in_words
from purejax_bilevel.program import Part
from purejax_bilevel.runtime import devices
from purejax_bilevel.runtime.arrays import state_shapes
from purejax_bilevel.runtime.compiled import CompiledProgram, mesh_of, precision
from purejax_bilevel.runtime.devices import AXIS
from purejax_bilevel.runtime.schedule import StageSchedule

SAFE_SHARE = 0.9  # of the free memory that a run may plan with
BYTES_PER_RESULT = 8  # 32 bits, and a copy while a chunk's rows are appended
STATES = "the state alone"


def state_bytes(part: Part) -> int:
    """Size of one member's state, from shapes alone.

    Raises:
        UserError: an array is larger than can be counted.
    """
    own = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), part.config)
    try:
        with precision([part]):
            state = state_shapes(part.program, own)
    except (OverflowError, MemoryError) as error:
        raise UserError(
            f"one member does not fit any memory ({str(error).splitlines()[0]}): lower its capacity, widths or windows."
        ) from error
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def check(parts: Sequence[Part], free: Callable[[Any], int | None] = devices.free_memory) -> None:
    """Whether states and results of all members fit, before anything is built.

    Args:
        parts: what is to run.
        free: bytes that may still be used on a device; for tests.

    Raises:
        UserError: with the estimate, the memory there is, and what to lower.
    """
    devices.prepare()
    sizes = [state_bytes(part) for part in parts]
    mesh = mesh_of(parts)
    check_states(parts, sizes, mesh, free)
    results = sum(len(part.grid) * _results_of(part) for part in parts)
    available = devices.free_host_memory()
    if available is not None and results > SAFE_SHARE * available:
        raise UserError(
            f"the results would need about {bytes_in_words(results)}, this machine has {bytes_in_words(available)} "
            "free: evaluate more rarely (--eval_frequency), or take fewer seeds (--num_seeds), settings or steps."
        )


def _results_of(part: Part) -> int:
    schedule = StageSchedule.of(part.program)
    rows = sum(schedule.rows(stage, schedule.total) for stage in schedule.stages)
    return rows * len(part.program.measures) * BYTES_PER_RESULT


def _shared_leaves(parts: Sequence[Part]) -> list[Any]:
    return jax.tree.leaves([part.program.shared() for part in parts])


def check_states(
    parts: Sequence[Part], sizes: Sequence[int], mesh: Mesh, free: Callable[[Any], int | None] = devices.free_memory
) -> None:
    """Whether the states of all members fit.

    Args:
        parts: what runs.
        sizes: bytes of one member's state, per part.
        mesh: devices that share the members.
        free: bytes that may still be used on a device.

    Raises:
        UserError: they do not.
    """
    needed = sum(-(-len(part.grid) // mesh.shape[AXIS]) * size for part, size in zip(parts, sizes, strict=True))
    needed += sum(leaf.nbytes for leaf in {id(leaf): leaf for leaf in _shared_leaves(parts)}.values())
    check_fits(parts, sizes, mesh, needed, STATES, free)


def check_fits(
    parts: Sequence[Part],
    sizes: Sequence[int],
    mesh: Mesh,
    needed: int,
    what: str,
    free: Callable[[Any], int | None] = devices.free_memory,
) -> None:
    """Refuses what needs more memory than there is.

    Args:
        parts: what runs.
        sizes: bytes of one member's state, per part.
        mesh: devices that share the members.
        needed: bytes on each device; CPU devices share the machine's memory.
        what: needs it.
        free: bytes that may still be used on a device.

    Raises:
        UserError: with the estimate, the memory there is, and what to lower.
    """
    if (lack := _lack(mesh, needed, free)) is None:
        return
    wanted, available, told = lack
    members = sum(len(part.grid) for part in parts)
    fitting = int(members * SAFE_SHARE * available / wanted)
    size, label = max(zip(sizes, (part.label for part in parts), strict=True))
    smaller = f"its capacity, widths and windows ({bytes_in_words(size)} per member{f' of {label}' if label else ''})"
    lower = (
        f"About {fitting} members fit: take fewer seeds (--num_seeds) or settings, lower"
        if fitting
        else "Not even one fits: lower"
    )
    raise UserError(
        f"{members} member{'s do' if members > 1 else ' does'} not fit: {what} would need {told}. "
        f"{lower} {smaller}, or use more memory."
    )


def check_array(mesh: Mesh, largest: int, free: Callable[[Any], int | None] = devices.free_memory) -> None:
    """Refuses a step that makes an array which does not fit, before it is compiled.

    Args:
        mesh: devices that share the members.
        largest: bytes of the array, on each device; CPU devices share the machine's memory.
        free: bytes that may still be used on a device.

    Raises:
        UserError: with the size, the memory there is, and what to lower.
    """
    if (lack := _lack(mesh, largest, free)) is not None:
        raise UserError(
            f"a single array of a step would need {lack.told}: lower widths, batches, rollouts or copies of the "
            "environment, or --member_batch, or use more memory."
        )


class _Lack(NamedTuple):
    wanted: int  # bytes
    available: int
    told: str  # both in words


def _lack(mesh: Mesh, needed: int, free: Callable[[Any], int | None]) -> _Lack | None:
    """What is wanted and what there is, where so many bytes on each device are too many; None where they fit."""
    device = mesh.local_devices[0]
    shared = device.platform == "cpu"
    available, wanted = free(device), needed * len(mesh.local_devices) if shared else needed
    if available is None or wanted <= SAFE_SHARE * available:
        return None
    who = "this machine has" if shared else f"each {device.platform} device has"
    return _Lack(wanted, available, f"{bytes_in_words(wanted)}, {who} {bytes_in_words(available)} free")


class Limits:
    """Watches a run before it starts (`loop.Watcher`) and refuses what does not fit the memory.

    Args:
        free: bytes that may still be used on a device; for tests.
    """

    def __init__(self, free: Callable[[Any], int | None] = devices.free_memory):
        self._free = free

    def planned(self, program: CompiledProgram) -> None:
        """Refuses states that do not fit the devices chosen."""
        check_states(program.parts, program.bytes_per_member, program.mesh, self._free)

    def traced(self, program: CompiledProgram, largest: int) -> None:
        """Refuses arrays that do not fit."""
        check_array(program.mesh, largest, self._free)

    def compiled(self, program: CompiledProgram, state: Any, steps: int, total: int) -> Any:
        """Refuses a compiled program that does not fit; `state`, `steps` and `total` do not matter."""
        del steps, total
        if (needed := program.device_bytes) is not None:
            what = "the compiled program"
            check_fits(program.parts, program.bytes_per_member, program.mesh, needed, what, self._free)
        return state


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Turns running out of memory into one sentence.

    Raises:
        UserError: instead of MemoryError, or of jax's RESOURCE_EXHAUSTED.
    """
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = (str(error) or "no more memory").splitlines()[0].rstrip(".")
        raise UserError(
            f"the memory is used up ({reason}): take fewer seeds (--num_seeds) or settings, a smaller --member_batch "
            "or smaller members (capacity, batches, widths, windows)."
        ) from error

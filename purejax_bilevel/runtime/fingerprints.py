"""What makes two runs the same, so that one may go on where the other stopped and ends with its bits.

The fingerprint is of what runs: seeds, settings, shared inputs. The placement is of where: how many members at a time,
how many devices of which kind.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from purejax_bilevel.configuration import RUN_LENGTH, to_dict
from purejax_bilevel.errors import UserError
from purejax_bilevel.program import POPULATION, Part
from purejax_bilevel.runtime import checkpoint as checkpoints
from purejax_bilevel.runtime.compiled import precision
from purejax_bilevel.runtime.devices import AXIS

PLACEMENT = "placement"  # what a checkpoint calls the batches of members and their devices
PLATFORM = "platform"


def fingerprint(parts: Sequence[Part]) -> dict[str, Any]:
    """What two runs must share for one to go on where the other stopped: everything but the number of steps."""
    described: dict[str, Any] = {}
    digests: dict[tuple[int, ...], str] = {}  # parts that share a dataset return the same object
    shared = [jax.tree.leaves(part.program.shared()) for part in parts]
    for number, (part, leaves) in enumerate(zip(parts, shared, strict=True)):
        prefix = f"part {number} " if len(parts) > 1 else ""
        described[f"{prefix}seeds"] = list(part.grid.seeds)
        for name, value in to_dict(part.config).items():
            if name not in (*RUN_LENGTH, *part.program.adapts):
                described[f"{prefix}{name}"] = _distinct(value)
        described[f"{prefix}precision"] = str(np.asarray(1.0, _float_type(parts)).dtype)
        if leaves:
            same = tuple(map(id, leaves))
            digests[same] = described[f"{prefix}shared inputs"] = digests.get(same) or _digest(leaves)
    return described


def _digest(leaves: Sequence[Any]) -> str:
    found = hashlib.sha256()
    for array in map(np.asarray, leaves):
        found.update(f"{array.shape} {array.dtype}".encode())
        found.update(np.ascontiguousarray(array).data)
    return found.hexdigest()


def _distinct(value: Any) -> Any:
    """A single value where all members agree; rates in the digits that single precision holds."""
    if not isinstance(value, list):
        return value
    rounded = [float(f"{element:.7g}") if isinstance(element, float) else element for element in value]
    return rounded if len(set(rounded)) > 1 else rounded[0]


def _float_type(parts: Sequence[Part]) -> Any:
    with precision(parts):
        return jnp.result_type(float)


def placement(parts: Sequence[Part], mesh: Any, member_batch: int | None) -> dict[str, Any]:
    """What a member's bits depend on beside its own settings.

    That is the size of the batch that it is computed in, and whether there is one device: for several the compiler
    takes other ways, the same for any number of them. All members of a device at once are a batch of their number. A
    population is summed up in an order that depends on the number of devices that share it. Each kind of device rounds
    in its own way, and accelerators keep networks in other arrays than CPUs.
    """
    batches = None if member_batch else [-(-len(part.grid) // mesh.shape[AXIS]) for part in parts]
    several = "one" if mesh.devices.size == 1 else "several"
    return {
        "member_batch": member_batch or 0,
        "devices": several,
        "all": batches,
        POPULATION: int(mesh.shape[POPULATION]),
        PLATFORM: mesh.devices.flat[0].platform,
    }


def check_placement(path: Path, ours: dict[str, Any]) -> dict[str, Any]:
    """Refuses to go on where the numbers would not be those of one run; returns what is stored."""
    stored = checkpoints.load_fingerprint(path).get(PLACEMENT, ours)
    words_of = {"all": "members at once on each device", POPULATION: "devices for each member's population"}
    option_of = {"member_batch": "--member_batch", PLATFORM: "JAX_PLATFORMS"}
    for name, own in ours.items():
        if stored.get(name, own) != own:
            words, option = words_of.get(name, name.replace("_", " ")), option_of.get(name, "--devices")
            raise UserError(
                f"the run in {path.parent} was begun with {words} {stored[name]}, got {own}: other bits would "
                f"come out; go on with the same {option}."
            )
    return {PLACEMENT: stored}

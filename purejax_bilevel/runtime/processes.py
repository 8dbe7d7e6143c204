"""Several processes, on one host or many, as one run: who joins, who am I, and what all agree on.

Every process runs the same script, compiles the same program and trains its own members. What depends on a clock, a
signal or a file is decided by process 0 and told to all, so that all make the same calls in the same order. This goes
through the key-value store of jax.distributed and not through collective operations of the devices: a process that
stops can then tell the others why, and they stop with that sentence.

    python train_rl.py --coordinator node1:1234 --num_processes 2 --process_id 0      on node1
    python train_rl.py --coordinator node1:1234 --num_processes 2 --process_id 1      on another host
    srun python train_rl.py                                                           under Slurm; Open MPI: mpirun

With a single process everything here returns what it was given.
"""

import contextlib
import io
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np
from jax._src.distributed import global_state  # the key-value store has no public name
from rich.console import Console

from purejax_bilevel.errors import UserError
from purejax_bilevel.runtime import devices
from purejax_bilevel.runtime.meeting import JOIN_SECONDS, bind_address, meet
from purejax_bilevel.runtime.schedulers import ProcessPlace, started_by

HEARTBEAT_SECONDS = (
    30  # without a sign of life after which jax.distributed takes a process for dead and ends the others
)
POLL_MILLISECONDS = 500  # between two looks whether another process has stopped
STORE = "purejax_bilevel"

T = TypeVar("T")
Tree = Any


class Stopped(UserError):
    """Another process has stopped, which says why itself."""


# ---------------------------------------------------------------- joining


def join(coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None) -> None:
    """Makes this process one of several, if it was told so or Slurm or Open MPI started it as one.

    The scripts call it first. From Python, call it before anything that asks jax for a device:

        from purejax_bilevel.runtime import processes
        processes.join()
        with processes.together():
            from purejax_bilevel import RLConfig, run
            results = run(RLConfig(), folder="runs/shared")

    Args:
        coordinator: `host:port`, a host that all reach and a free port there; process 0 runs on that host.
        num_processes: number of processes.
        process_id: 0 to num_processes - 1, each once.

    Raises:
        UserError: wrong or missing values, or not all processes came within JOIN_SECONDS.
    """
    if jax.distributed.is_initialized():
        return
    place = _given(coordinator, num_processes, process_id) or started_by(os.environ)
    devices.prepare()
    if place is None or place.num_processes == 1:
        devices.check_platforms()
        return
    meet(place)
    # Slurm's job variables must not fill in what was found here, a proxy must not stand between the processes, and
    # the warning about proxies is then out of place.
    os.environ["no_grpc_proxy"] = place.coordinator.rpartition(":")[0]  # noqa: SIM112
    jax.config.update("jax_check_proxy_envs", False)
    try:
        jax.distributed.initialize(
            place.coordinator,
            place.num_processes,
            place.process_id,
            place.accelerators,
            cluster_detection_method="deactivate",
            initialization_timeout=JOIN_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            coordinator_bind_address=bind_address(place) if place.process_id == 0 else None,
        )
    except RuntimeError as error:
        raise UserError(f"this process cannot join the others: {str(error).splitlines()[0]}") from error
    devices.available()  # here, where all processes are: jax asks all of them for their devices and waits for answers


def _given(coordinator: str | None, num_processes: int | None, process_id: int | None) -> ProcessPlace | None:
    if coordinator is None and num_processes is None and process_id is None:
        return None
    if coordinator is None or num_processes is None or process_id is None:
        raise UserError("--coordinator host:port, --num_processes and --process_id belong together: give all or none.")
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UserError(f"--coordinator must be host:port with a port from 1 to {2**16 - 1}, got {coordinator}.")
    if num_processes < 1:
        raise UserError(f"--num_processes must be at least 1, got {num_processes}.")
    if not 0 <= process_id < num_processes:
        raise UserError(f"--process_id must be from 0 to {num_processes - 1} (num_processes - 1), got {process_id}.")
    return ProcessPlace(coordinator, num_processes, process_id)


# ---------------------------------------------------------------- who am I


def count() -> int:
    """Number of processes."""
    return global_state.num_processes if jax.distributed.is_initialized() else 1


def index() -> int:
    """Which one this is."""
    return global_state.process_id if jax.distributed.is_initialized() else 0


def is_first() -> bool:
    """Whether this is the process that writes and prints."""
    return index() == 0


def console() -> Console:
    """Standard error for process 0, nothing for the others."""
    return Console(stderr=True, quiet=not is_first())


# ---------------------------------------------------------------- agreeing; all processes must make the same calls


def from_first(function: Callable[[], T]) -> T:
    """What `function` returns in process 0, which alone calls it, once all processes have come here.

    Args:
        function: returns what JSON can hold.

    Raises:
        Stopped: another process has stopped.
    """
    if count() == 1:
        return function()
    return json.loads(_exchange(b"", lambda _: json.dumps(function()).encode()))


def any_of(flag: bool) -> bool:
    """Whether the flag is set in any process."""
    if count() == 1:
        return flag
    return _exchange(b"1" if flag else b"0", lambda told: b"1" if b"1" in told else b"0") == b"1"


def everywhere(tree: Tree) -> Tree:
    """The members of all processes, in every process.

    Args:
        tree: arrays `[own members, ...]`.

    Returns:
        The same arrays, `[members, ...]`, in the order of the processes.
    """
    if count() == 1:
        return tree
    leaves, structure = jax.tree.flatten(tree)
    whole = _exchange(
        _packed(leaves), lambda told: _packed([np.concatenate(x) for x in zip(*map(_unpacked, told), strict=True)])
    )
    return jax.tree.unflatten(structure, _unpacked(whole))


def _packed(arrays: list[np.ndarray]) -> bytes:
    with io.BytesIO() as file:
        np.savez(file, *arrays)
        return file.getvalue()


def _unpacked(content: bytes) -> list[np.ndarray]:
    with np.load(io.BytesIO(content), allow_pickle=False) as archive:
        return [archive[name] for name in archive.files]


_numbers = itertools.count(1)


def _store() -> Any:
    """The key-value store, which process 0 holds."""
    return global_state.client


def _exchange(mine: bytes, answer: Callable[[list[bytes]], bytes]) -> bytes:
    """Every process tells process 0 something; its answer to all that was told goes to every process."""
    number, store = next(_numbers), _store()
    name = f"{STORE}/{number}"
    if not is_first():
        store.key_value_set_bytes(f"{name}/{index()}", mine)
        return _wait_for(f"{name}/0")
    content = answer([mine, *(_wait_for(f"{name}/{other}") for other in range(1, count()))])
    store.key_value_set_bytes(f"{name}/0", content)
    store.key_value_delete(f"{STORE}/{number - 1}")  # all have read it: they have come to this one
    return content


def _wait_for(key: str) -> bytes:
    while True:
        try:
            return _store().blocking_key_value_get_bytes(key, POLL_MILLISECONDS)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise Stopped(f"process {index()} has lost the connection to process 0.") from error
        for number, reason in _stopped().items():
            raise Stopped(f"process {number} has stopped: {reason}")


# ---------------------------------------------------------------- ending


@contextlib.contextmanager
def together() -> Iterator[None]:
    """If one process leaves the block by an error, the others are told and leave it too; else all leave it at once."""
    try:
        yield
        from_first(lambda: None)  # jax.distributed would not wait long for a process 0 that still draws figures
    except BaseException as error:
        if count() > 1 and not isinstance(error, Stopped):
            reason = str(error) if isinstance(error, UserError) else type(error).__name__
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                _store().key_value_set(f"{STORE}/stopped/{index()}", reason)
        raise


def should_tell(error: UserError) -> bool:
    """Whether this process prints what stopped it: process 0 does, and the others what process 0 does not say."""
    if is_first() or isinstance(error, Stopped):
        return is_first()
    for _ in range(6):  # the same bad input stops all processes, this one perhaps a little earlier
        reason = _stopped().get(0)
        if reason is not None:
            return reason != str(error)
        time.sleep(0.5)
    return True


def _stopped() -> dict[int, str]:
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        told = _store().key_value_dir_get(f"{STORE}/stopped")
        return {int(key.rpartition("/")[2]): reason for key, reason in told}
    return {}

"""Devices: use every core or accelerator without being asked, and keep compiled programs between runs."""

import contextlib
import math
import os
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from purejax_bilevel.errors import UserError
from purejax_bilevel.program import POPULATION

AXIS = "member"
GROUPS, OWN_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
HOST_FLAG = "--xla_cpu_multi_thread_eigen=false"


def prepare() -> None:
    """One host device per usable core and a persistent compilation cache. Call before jax touches a device.

    On a CPU the members of an experiment run one at a time on each core; threads inside a small matrix product would
    only get in the way. XLA_FLAGS and a cache folder that the user has set are kept.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_cpu_multi_thread_eigen" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {HOST_FLAG}".strip()
    if "xla_force_host_platform_device_count" not in flags:
        with contextlib.suppress(RuntimeError):  # the backend is already in use, as in a notebook: it stays as it is
            jax.config.update("jax_num_cpu_devices", usable_cores())
    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        with contextlib.suppress(OSError, RuntimeError):  # not writable; no HOME and a user without a name
            cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
            folder = cache / "purejax_bilevel" / "compilations"
            folder.mkdir(parents=True, exist_ok=True)
            jax.config.update("jax_compilation_cache_dir", str(folder))


def usable_cores() -> int:
    """Cores that this process may use, by its affinity and by the quota of its control groups, at least 1."""
    cores = len(os.sched_getaffinity(0))
    quotas = [quota for folder in _group_folders("cpu") if (quota := _quota(folder)) is not None]
    return max(1, min([cores, *(math.ceil(quota) for quota in quotas)]))


def _quota(folder: Path) -> float | None:
    """Cores that a control group allows, of either version; None: all."""
    for files in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        with contextlib.suppress(OSError, ValueError, ZeroDivisionError):  # no such file, or "max"
            allowed, period = (int(number) for file in files for number in (folder / file).read_text().split())
            if allowed > 0:  # -1: no limit
                return allowed / period
    return None


def _group_folders(controller: str) -> list[Path]:
    """The control groups of this process, of both versions, each with all those above it."""
    folders = [GROUPS, GROUPS / controller]
    with contextlib.suppress(OSError, ValueError):
        for line in OWN_GROUPS.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "" or controller in controllers.split(","):
                top = GROUPS / controller if controllers else GROUPS
                own = top / path.strip("/")
                folders += [folder for folder in (own, *own.parents) if folder.is_relative_to(top)]
    return list(dict.fromkeys(folders))


def available() -> list[jax.Device]:
    """All devices.

    Raises:
        UserError: JAX_PLATFORMS asks for what is not here.
    """
    try:
        return jax.devices()
    except (RuntimeError, AssertionError) as error:  # the second where no plug-in for the platform is installed
        asked = jax.config.jax_platforms  # type: ignore[attr-defined]
        reason = (str(error) or "nothing for it is installed").splitlines()[0].rstrip(".")
        raise UserError(
            f"jax finds no device for JAX_PLATFORMS={asked or ''} ({reason}): unset it, or set JAX_PLATFORMS=cpu."
        ) from error


def check_platforms() -> None:
    """Looks for the devices that JAX_PLATFORMS asks for, if it asks for others than the CPU.

    Raises:
        UserError: they are not here.
    """
    if jax.config.jax_platforms not in (None, "", "cpu"):  # type: ignore[attr-defined]
        available()


def make_mesh(num_members: int, num_devices: int | None = None, population: int = 0) -> Mesh:
    """A mesh (members, population) over the devices in use, those of a process side by side.

    Where a process has more devices than members, its members' populations are spread over the devices that are left.

    Args:
        num_members: no more devices than members are used, but at least one of every process.
        num_devices: how many to use, over all processes, the same number of each; None: all.
        population: individuals in each member; 0: none. The devices of a member have the same number of them.

    Raises:
        UserError: fewer devices exist than asked for, or the processes cannot share them evenly.
    """
    available_devices = available()
    if num_devices is not None and not 1 <= num_devices <= len(available_devices):
        raise UserError(
            f"--devices must be from 1 to {len(available_devices)}, the number of {available_devices[0].platform} "
            f"devices here, got {num_devices}."
        )
    own = [[device for device in available_devices if device.process_index == i] for i in range(jax.process_count())]
    most = len(available_devices) if num_devices is None else num_devices // len(own)
    if num_devices is not None and (num_devices % len(own) or most > min(map(len, own))):
        raise UserError(
            f"--devices counts the devices of all {len(own)} processes, which use the same number each, at most "
            f"{min(map(len, own))} here; got {num_devices}."
        )
    places = max(1, min(most, -(-num_members // len(own))))
    spread = next(n for n in range(max(1, most // places), 0, -1) if n == 1 or (population and population % n == 0))
    chosen = [devices[: places * spread] for devices in own]
    # Mesh, unlike make_mesh, has Auto axes, which vmap inside shard_map needs.
    return Mesh(np.array(chosen).reshape(-1, spread), (AXIS, POPULATION))


def default_member_batch(mesh: Mesh) -> int | None:
    """Members trained at once on a device: one on a CPU (measured faster than vmap), all (None) elsewhere."""
    return 1 if mesh.devices.flat[0].platform == "cpu" else None


def free_memory(device: jax.Device) -> int | None:
    """Bytes that programs may still use on a device: of its own memory, or of this machine's for a CPU device.

    All CPU devices share the machine's memory. None where nothing is known.
    """
    if device.platform != "cpu":
        statistics = device.memory_stats() or {}
        limit = statistics.get("bytes_limit")
        return None if limit is None else limit - statistics.get("bytes_in_use", 0)
    return free_host_memory()


def free_host_memory() -> int | None:
    """Bytes that this process may still use: what the machine has available, within the limit of its control group."""
    found = [_meminfo(), _control_group()]
    return min((value for value in found if value is not None), default=None)


def _meminfo() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, ValueError, IndexError, StopIteration):
        return None


def _control_group() -> int | None:
    left = [_unused(folder) for folder in _group_folders("memory")]
    return min((value for value in left if value is not None), default=None)


def _unused(folder: Path) -> int | None:
    for limit, used in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
        with contextlib.suppress(OSError, ValueError):  # no such version of control groups, or "max"
            return int((folder / limit).read_text()) - int((folder / used).read_text())
    return None

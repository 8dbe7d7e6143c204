"""What Slurm and Open MPI say about a process that they started: its place among all.

jax.distributed could find out by itself. It takes the number of tasks of Slurm's allocation, which a shell in it sees
too, for that of a step, and for Open MPI the host of mpirun for that of the first process.
"""

import dataclasses
import re
import zlib
from collections.abc import Mapping

from purejax_bilevel.errors import UserError

FIRST_PORT, PORTS = 61440, 4096  # above those that Linux gives to outgoing connections


@dataclasses.dataclass(frozen=True)
class ProcessPlace:
    """One process among all.

    Args:
        coordinator: `host:port` where process 0 listens.
        num_processes: how many there are.
        process_id: which one this is.
        accelerators: numbers of the host's accelerators that it takes; None: all that it sees.
    """

    coordinator: str
    num_processes: int
    process_id: int
    accelerators: tuple[int, ...] | None = None


def started_by(environment: Mapping[str, str]) -> ProcessPlace | None:
    """What Open MPI or Slurm's srun say about this process; None where it is alone.

    A batch script, an interactive shell in an allocation and a step of one task are alone, whatever the allocation's
    size. JAX_COORDINATOR_ADDRESS replaces the coordinator found.

    Raises:
        UserError: there are several processes, but nothing says where the first is, or a variable is no number.
    """
    # Open MPI first: within a Slurm job its processes inherit the variables of the step that launched it.
    if _number(environment, "OMPI_COMM_WORLD_SIZE", 1, 1) > 1:
        return _open_mpi(environment)
    # Not SLURM_NTASKS, which is the allocation's: an interactive step has it too.
    if _number(environment, "SLURM_STEP_NUM_TASKS", 1, 1) > 1:
        return _slurm(environment)
    return None


def _slurm(environment: Mapping[str, str]) -> ProcessPlace:
    step = f"{environment.get('SLURM_JOB_ID')}.{environment.get('SLURM_STEP_ID')}"
    first = re.match(r"([^,\[]+)(?:\[(\d+)[^\]]*\]([^,]*))?", environment.get("SLURM_STEP_NODELIST", ""))
    coordinator = environment.get("JAX_COORDINATOR_ADDRESS")
    if coordinator is None:
        if first is None:
            raise UserError("Slurm does not say on which hosts it started (no SLURM_STEP_NODELIST).")
        coordinator = f"{''.join(filter(None, first.groups()))}:{_port(step)}"
    count = _number(environment, "SLURM_STEP_NUM_TASKS", 1)
    local_id, alone = _number(environment, "SLURM_LOCALID"), environment.get("SLURM_STEP_NUM_NODES") == str(count)
    own = _own_accelerators(environment, local_id, alone)
    return ProcessPlace(coordinator, count, _number(environment, "SLURM_PROCID", most=count - 1), own)


def _open_mpi(environment: Mapping[str, str]) -> ProcessPlace:
    count, local_count = (_number(environment, f"OMPI_COMM_WORLD_{name}", 1) for name in ("SIZE", "LOCAL_SIZE"))
    launcher = environment.get("OMPI_MCA_orte_hnp_uri", "")  # 3674406912.0;tcp://10.0.0.1,10.1.0.1:36789
    address = re.search(r"tcp://([^,:]+)", launcher)
    coordinator = environment.get("JAX_COORDINATOR_ADDRESS")
    if coordinator is None:
        if count != local_count and address is None:
            raise UserError(
                f"Open MPI started {count} processes on several hosts, but does not say where the first one is: set "
                "JAX_COORDINATOR_ADDRESS=host:port, with the first host and a free port there (mpirun -x)."
            )
        host = "localhost" if address is None or count == local_count else address.group(1)
        coordinator = f"{host}:{_port(launcher or environment.get('PMIX_NAMESPACE', ''))}"
    local_id, alone = _number(environment, "OMPI_COMM_WORLD_LOCAL_RANK"), local_count == 1
    own = _own_accelerators(environment, local_id, alone)
    return ProcessPlace(coordinator, count, _number(environment, "OMPI_COMM_WORLD_RANK", most=count - 1), own)


def _number(
    environment: Mapping[str, str], name: str, least: int = 0, default: int | None = None, most: int | None = None
) -> int:
    """A whole number that a scheduler has set."""
    text = environment.get(name, "" if default is None else str(default))
    if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) < least or (most is not None and int(text) > most):
        allowed = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise UserError(f"the scheduler's {name} must be a whole number {allowed}, got {text!r}.")
    return int(text)


def _port(job: str) -> int:
    """Without asking anybody, the same for all processes of a job and probably another one for another job."""
    return FIRST_PORT + zlib.crc32(job.encode()) % PORTS


def _own_accelerators(environment: Mapping[str, str], local_id: int, alone: bool) -> tuple[int, ...] | None:
    """Process i of a host takes its accelerator i, unless it is alone there or sees only one."""
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    one = visible is not None and "," not in visible
    return None if alone or one or "JAX_LOCAL_DEVICE_IDS" in environment else (local_id,)

"""What a GPU would be asked to do, counted without one: the compiled program of an agent for an H200.

    ./setup/run python tests/benchmarks/gpu_structure.py tests/data/h200.txtpb --programs omd sac-omd --members 64
    ./setup/run python tests/benchmarks/gpu_structure.py tests/data/h200.txtpb --programs rl:agent_type=vep,hard=true

Takes a description of the target (`xla.GpuTargetConfigProto` as text; it must name driver_version, else XLA leaves most
kinds of command buffers out) and needs jax's CUDA plug-in and nvcc's package, but no GPU and no driver:

    pip install --no-deps jax-cuda12-plugin jax-cuda12-pjrt nvidia-cuda-nvcc-cu12      # of the installed jax

Counts are per learning step of all members, in a block of fixed length of the program's last stage: device operations
(kernels, library calls, copies), copies among them, how many of them lie in CUDA graphs; launches by the host (a graph
is one), and its round trips: loops and branches that wait for an answer of the device. What is in a loop of known
length counts as often as the loop turns; such a loop costs no round trip. Of a branch, all sides count as if taken, and
of a loop of unknown length, one turn. Temporary memory and compile time are of the whole program. Networks are stored
as an accelerator would have them (`networks.together`).
"""

import argparse
import dataclasses
import functools
import importlib
import os
import re
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

LISTING = "*.thunk_sequence_after_thunk_passes.txt"  # what XLA calls the list of device operations
ROWS = 100_000
DATASET = "{dataset}"  # in settings: a file of random transitions of Pendulum
CONFIGURATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "omd": ("rl", {"agent_type": "omd"}),
    "funcbo": ("rl", {"agent_type": "funcbo"}),
    "smoothfbo": ("rl", {"agent_type": "smoothfbo", "smoothing_window": 100}),
    "mle": ("rl", {"agent_type": "mle"}),
    "vep": ("rl", {"agent_type": "vep"}),
    "sql": ("rl", {"agent_type": "sql"}),
    "sac-omd": ("continuous", {"agent_type": "omd"}),
    "sac": ("continuous", {"agent_type": "sac"}),
    "regression": ("regression", {}),
    "tabular": ("tabular", {}),
    "ppo-adam": ("ppo", {"optimizer": "adam"}),
    "ppo-open": ("ppo", {"optimizer": "open"}),
    "open-training": ("open_training", {}),
    "offline-sac": ("offline", {"agent_type": "offline_sac", "dataset": DATASET}),
    "mopo": ("offline", {"agent_type": "mopo", "dataset": DATASET}),
    "lpg": ("meta_objectives", {}),
}


# --- the list of device operations ------------------------------------------------------------------------------------


@dataclasses.dataclass
class Operation:
    """An entry of XLA's list, with what it contains; the condition of a loop is not kept."""

    number: int  # XLA's
    kind: str
    contents: "list[Operation]"

    def all(self) -> "Iterator[Operation]":
        """This one and everything inside, at any depth."""
        yield self
        for inner in self.contents:
            yield from inner.all()


CONTAINERS = ("kWhile", "kConditional", "kCommandBuffer", "kDynamicSliceFusion")
COPIES = ("kCopy", "kMemcpy")


def parse(listing: str) -> Operation:
    """The listing as a tree, by its indentation."""
    root = Operation(0, "", [])
    open_operations = [(-1, root)]
    in_condition = False
    for line in listing.splitlines():
        if line.endswith(("condition:", "body:")):  # "No thunks. body:" where there is nothing to ask
            in_condition = line.endswith("condition:")
        found = re.match(r"( *)(\d+): (k\w+)", line)
        if found is None or in_condition:
            continue
        indent, operation = len(found[1]), Operation(int(found[2]), found[3], [])
        while open_operations[-1][0] >= indent:
            open_operations.pop()
        open_operations[-1][1].contents.append(operation)
        open_operations.append((indent, operation))
    return root


def trip_counts(program: str, names: str) -> dict[int, int]:
    """How often loops turn that the compiler knows the length of, by their numbers.

    Args:
        program: text of the optimised program.
        names: XLA's list of what the operations of its other list are called in the program.
    """
    loops = dict(re.findall(r'%(while[\w.]*) = .*"known_trip_count":\{"n":"(\d+)"\}', program))
    numbers = re.findall(r'profile_annotation: "(while[\w.]*)"\s+thunk_id: (\d+)', names)
    return {int(number): int(loops[name]) for name, number in numbers if name in loops}


def _size(operation: Operation) -> int:
    return sum(1 for _ in operation.all())


def steps_of(root: Operation, trips: Mapping[int, int], turns: int) -> Operation:
    """The loop over learning steps.

    Args:
        root: of everything.
        trips: see `trip_counts`.
        turns: how often it turns in a block, and of such loops it is the one with most to do; 0: blocks have no fixed
            length, and it is the loop with most to do right inside the loop over blocks.
    """
    if turns:
        found = [loop for loop in root.all() if loop.kind == "kWhile" and trips.get(loop.number) == turns]
    else:
        blocks = max((loop for loop in root.contents if loop.kind == "kWhile"), key=_size)
        found = [loop for loop in blocks.contents if loop.kind == "kWhile" and loop.number not in trips]
    return max(found, key=_size)


@dataclasses.dataclass
class Counts:
    """What the device and the host do."""

    operations: int = 0
    copies: int = 0
    in_graphs: int = 0
    launches: int = 0
    round_trips: int = 0


def count(loop: Operation, trips: Mapping[int, int]) -> Counts:
    """What is done in one turn of a loop; `trips`: see `trip_counts`."""
    counts = Counts(round_trips=int(loop.number not in trips))

    def add(operations: list[Operation], times: int, in_graph: bool) -> None:
        for inner in operations:
            turns, captured = times, in_graph or inner.kind == "kCommandBuffer"
            if inner.kind == "kWhile" and inner.number in trips:
                turns *= trips[inner.number]
            elif inner.kind in ("kWhile", "kConditional"):
                counts.round_trips += 0 if in_graph else times
            elif inner.kind not in CONTAINERS:
                counts.operations += times
                counts.copies += times if inner.kind in COPIES else 0
                counts.in_graphs += times if in_graph else 0
            if not in_graph and (captured or inner.kind not in CONTAINERS):
                counts.launches += times
            add(inner.contents, turns, captured)

    add(loop.contents, 1, False)
    return counts


# --- the program ------------------------------------------------------------------------------------------------------


def configuration(name: str, folder: Path) -> Any:
    """A resolved configuration; `name` is one of `CONFIGURATIONS`, or a registered program with settings after a colon:
    `rl:agent_type=vep,hard=true`."""
    import yaml

    from purejax_bilevel.programs import REGISTRY

    program, _, text = name.partition(":")
    program, settings = CONFIGURATIONS.get(name, (program, yaml.safe_load(f"{{{text.replace('=', ': ')}}}")))
    if settings.get("dataset") == DATASET:
        settings = settings | {"dataset": random_dataset(folder)}
    return importlib.import_module(REGISTRY[program]).Config(**settings).resolved()


def random_dataset(folder: Path) -> str:
    """A file of as many transitions as an offline benchmark has, of no meaning."""
    import numpy as np

    from purejax_bilevel.programs.offline import dataset_files, datasets

    random, rows = np.random.default_rng(0), ROWS
    arrays = {
        "observations": random.uniform(-1, 1, (rows, 3)),
        "next_observations": random.uniform(-1, 1, (rows, 3)),
        "actions": random.uniform(-1, 1, (rows, 1)),
        "rewards": random.uniform(-1, 0, rows),
        "terminals": np.zeros(rows, bool),
        "timeouts": np.arange(rows) % 200 == 199,
    }
    dataset = datasets.checked(arrays, "random", environment="Pendulum-v1")
    return str(dataset_files.save(dataset, folder / "random.npz"))


def lowered(config: Any, members: int, target: str, most_block_steps: int) -> tuple[Any, int, int]:
    """The last stage of a program of `members` seeds for one device of the target, steps in a block (0: any number),
    and turns of the loop over them."""
    import jax
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding
    from jax.sharding import PartitionSpec as P

    from purejax_bilevel import networks
    from purejax_bilevel.program import POPULATION
    from purejax_bilevel.runtime.compiled import CompiledProgram, precision
    from purejax_bilevel.runtime.devices import AXIS, make_mesh
    from purejax_bilevel.studies.run import make_part

    networks.together = lambda: True
    topology = topologies.get_topology_desc(platform="cuda", topology="1x1x1", target_config=target)
    part = make_part(config, members, 0)
    program = CompiledProgram([part], make_mesh(1, 1), None, most_block_steps)
    mesh = Mesh(np.array(topology.devices).reshape(1, 1), (AXIS, POPULATION))
    program.mesh = mesh
    program._shardings = jax.tree.map(lambda own: NamedSharding(mesh, own.spec), program._shardings)

    def abstract(tree: Any, spec: Any) -> Any:
        sharding = NamedSharding(mesh, spec)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)

    bounds = [jax.ShapeDtypeStruct((), jax.numpy.int32)] * 3 + [jax.ShapeDtypeStruct((1,), jax.numpy.int32)]
    arguments = (program._structure, program._configs, program._seeds)
    stage = program.schedule.stages[-1]
    steps = program.block_steps[stage] if program.block_steps[stage] > 1 else 0
    cycle = part.program.stages[stage].cycle_steps
    with precision([part]), jax.default_matmul_precision("highest"):
        chunk = jax.jit(functools.partial(program._chunk, stage, steps), donate_argnums=0)
        given = (*abstract(arguments, P(AXIS)), *abstract((program._shared, *bounds), P()))
        return chunk.lower(*given), steps, steps // cycle if steps % cycle == 0 else steps


def measured(folder: Path, name: str, members: int, given: argparse.Namespace) -> tuple:
    """The cells of a row; `folder` is where XLA writes."""
    earlier = set(folder.glob(LISTING))
    config = configuration(name, folder)
    program, steps, turns = lowered(config, members, given.target.read_text(), given.block_steps)
    begin = time.perf_counter()
    compiled = program.compile()
    seconds = time.perf_counter() - begin
    (listing,) = set(folder.glob(LISTING)) - earlier
    stem = listing.name.removesuffix(LISTING.removeprefix("*"))
    (text,) = folder.glob(f"{stem}.sm_*_gpu_after_optimizations.txt")
    trips = trip_counts(text.read_text(), listing.with_name(f"{stem}.thunk_metadata.txt").read_text())
    counts = count(steps_of(parse(listing.read_text()), trips, turns), trips)
    each = [round(number * turns / steps, 1) if steps else number for number in dataclasses.astuple(counts)]
    megabytes = compiled.memory_analysis().temp_size_in_bytes / 1e6
    return name, members, steps or "any", *(f"{number:g}" for number in each), f"{megabytes:.0f} MB", f"{seconds:.0f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path)
    parser.add_argument("--programs", nargs="+", default=["omd"], help=", ".join(CONFIGURATIONS))
    parser.add_argument("--members", nargs="+", type=int, default=[64])
    parser.add_argument("--block_steps", type=int, default=32)
    parser.add_argument("--dump", type=Path, help="keep what XLA writes")
    given = parser.parse_args()
    folder = given.dump or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # what comes from a cache is not written down
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    os.environ["XLA_FLAGS"] = f"--xla_dump_to={folder} --xla_gpu_autotune_level=0"
    columns = ("program", "members", "steps in a block", "operations", "copies", "in graphs", "launches", "round trips")
    print("|", " | ".join((*columns, "temporary memory", "compile time")), "|\n|", "--- | " * (len(columns) + 2))
    for name in given.programs:
        for members in given.members:
            print("|", " | ".join(map(str, measured(folder, name, members, given))), "|", flush=True)


if __name__ == "__main__":
    main()

"""What a GPU would be asked to do, counted without one: the compiled program of an agent for an H200.

    ./setup/run python tests/benchmarks/gpu_structure.py tests/data/h200.txtpb --members 64

Takes a description of the target (`xla.GpuTargetConfigProto` as text; it must name driver_version, else XLA leaves most
kinds of command buffers out) and needs jax's CUDA plug-in and nvcc's package, but no GPU and no driver:

    pip install --no-deps jax-cuda12-plugin jax-cuda12-pjrt nvidia-cuda-nvcc-cu12      # of the installed jax

Counts are per learning step of all members, in a block of fixed length: device operations (kernels, library calls,
copies), copies among them, how many of them lie in CUDA graphs, and round trips to the host (loops and branches that
the host decides). Temporary memory and compile time are of the whole program. Networks are stored as an accelerator
would have them (`networks.together`).
"""

import argparse
import dataclasses
import functools
import os
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LISTING = "*.thunk_sequence_after_thunk_passes.txt"  # what XLA calls the list of device operations
CONFIGURATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "omd": ("RLConfig", {"agent_type": "omd"}),
    "funcbo": ("RLConfig", {"agent_type": "funcbo"}),
    "smoothfbo": ("RLConfig", {"agent_type": "smoothfbo", "smoothing_window": 100}),
    "mle": ("RLConfig", {"agent_type": "mle"}),
    "sql": ("RLConfig", {"agent_type": "sql"}),
    "sac-omd": ("ContinuousConfig", {"agent_type": "omd", "env_name": "Pendulum-v1"}),
    "regression": ("RegressionConfig", {}),
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


CONTROL = ("kWhile", "kConditional", "kCommandBuffer")  # they contain operations
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


def loops_of_length(steps: int, program: str, names: str) -> set[int]:
    """Numbers of the loops that turn `steps` times, known to the compiler.

    Args:
        steps: how often.
        program: text of the optimised program.
        names: XLA's list of what the operations of its other list are called in the program.
    """
    loops = re.findall(rf'%(while[\w.]*) = .*"known_trip_count":\{{"n":"{steps}"\}}', program)
    numbers = re.findall(r'profile_annotation: "(while[\w.]*)"\s+thunk_id: (\d+)', names)
    return {int(number) for name, number in numbers if name in loops}


def steps_of(root: Operation, loops: set[int]) -> Operation:
    """Of the loops with these numbers, the one with most to do: the one over learning steps."""
    found = [loop for loop in root.all() if loop.kind == "kWhile" and loop.number in loops]
    return max(found, key=lambda loop: sum(1 for _ in loop.all()))


def count(step: Operation) -> dict[str, int]:
    """Operations, copies, operations in CUDA graphs and round trips to the host in the body of a loop.

    Each loop or branch outside of a graph is one round trip, however often it turns.
    """
    graphs = [inner for graph in step.all() if graph.kind == "kCommandBuffer" for inner in graph.all()]
    body = [inner for inner in step.all() if inner is not step]
    work = [inner for inner in body if inner.kind not in CONTROL]
    captured = set(map(id, graphs))
    return {
        "operations": len(work),
        "copies": sum(inner.kind in COPIES for inner in work),
        "in graphs": sum(id(inner) in captured for inner in work),
        "round trips": sum(inner.kind in CONTROL[:2] and id(inner) not in captured for inner in body),
    }


# --- the program ------------------------------------------------------------------------------------------------------


def lowered(name: str, members: int, target: str, block_steps: int) -> Any:
    """The program of `members` seeds for one device of the target."""
    import jax
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding
    from jax.sharding import PartitionSpec as P

    import purejax_bilevel
    from purejax_bilevel import networks
    from purejax_bilevel.program import POPULATION
    from purejax_bilevel.runtime.compiled import CompiledProgram
    from purejax_bilevel.runtime.devices import AXIS, make_mesh
    from purejax_bilevel.studies.run import make_part

    networks.together = lambda: True
    topology = topologies.get_topology_desc(platform="cuda", topology="1x1x1", target_config=target)
    kind, settings = CONFIGURATIONS[name]
    part = make_part(getattr(purejax_bilevel, kind)(**settings).resolved(), members, 0)
    program = CompiledProgram([part], make_mesh(1, 1), None, block_steps)
    mesh = Mesh(np.array(topology.devices).reshape(1, 1), (AXIS, POPULATION))
    program.mesh = mesh

    def abstract(tree: Any, spec: Any) -> Any:
        sharding = NamedSharding(mesh, spec)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)

    bounds = [jax.ShapeDtypeStruct((), jax.numpy.int32)] * 3 + [jax.ShapeDtypeStruct((1,), jax.numpy.int32)]
    arguments = (program._structure, program._configs, program._seeds)
    (steps,) = program.block_steps
    with jax.default_matmul_precision("highest"):
        chunk = jax.jit(functools.partial(program._chunk, 0, steps), donate_argnums=0)
        given = (*abstract(arguments, P(AXIS)), *abstract((program._shared, *bounds), P()))
        return chunk.lower(*given), steps


def measured(folder: Path, name: str, members: int, given: argparse.Namespace) -> tuple:
    """The cells of a row; `folder` is where XLA writes."""
    earlier = set(folder.glob(LISTING))
    program, steps = lowered(name, members, given.target.read_text(), given.block_steps)
    begin = time.perf_counter()
    compiled = program.compile()
    seconds = time.perf_counter() - begin
    (listing,) = set(folder.glob(LISTING)) - earlier
    stem = listing.name.removesuffix(LISTING.removeprefix("*"))
    (text,) = folder.glob(f"{stem}.sm_*_gpu_after_optimizations.txt")
    loops = loops_of_length(steps, text.read_text(), listing.with_name(f"{stem}.thunk_metadata.txt").read_text())
    counts = count(steps_of(parse(listing.read_text()), loops)).values()
    megabytes = compiled.memory_analysis().temp_size_in_bytes / 1e6
    return name, members, steps, *counts, f"{megabytes:.0f} MB", f"{seconds:.0f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path)
    parser.add_argument("--programs", nargs="+", default=["omd"], choices=list(CONFIGURATIONS))
    parser.add_argument("--members", nargs="+", type=int, default=[64])
    parser.add_argument("--block_steps", type=int, default=32)
    parser.add_argument("--dump", type=Path, help="keep what XLA writes")
    given = parser.parse_args()
    folder = given.dump or Path(tempfile.mkdtemp())
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # what comes from a cache is not written down
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    os.environ["XLA_FLAGS"] = f"--xla_dump_to={folder} --xla_gpu_autotune_level=0"
    columns = ("program", "members", "steps in a block", "operations", "copies", "in graphs", "round trips")
    print("|", " | ".join((*columns, "temporary memory", "compile time")), "|\n|", "--- | " * (len(columns) + 2))
    for name in given.programs:
        for members in given.members:
            print("|", " | ".join(map(str, measured(folder, name, members, given))), "|", flush=True)


if __name__ == "__main__":
    main()

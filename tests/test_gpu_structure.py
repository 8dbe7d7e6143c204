"""What a GPU would be asked to do in a learning step, compiled for an H200 that is not there."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parents[1]
TOOL = ROOT / "tests" / "benchmarks" / "gpu_structure.py"
TARGET = ROOT / "tests" / "data" / "h200.txtpb"
COUNTED = "0.10.2"  # the limits are of this release: each one fuses in its own way
MOST_OPERATIONS, MOST_COPIES, MOST_MEGABYTES = 113, 2, 65
SECONDS = 900  # on a busy machine; 30 on an idle one


@pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda12_plugin") is None, reason="jax's CUDA plug-in is not installed (.ci/run does)"
)
@pytest.mark.skipif(jax.__version__ != COUNTED, reason=f"the limits are those of jax {COUNTED}")
def test_a_step_is_one_graph_of_few_operations() -> None:
    command = [sys.executable, str(TOOL), str(TARGET), "--programs", "omd", "--members", "64"]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr[-2000:]
    row = [cell.strip() for cell in done.stdout.splitlines()[-1].strip("|").split("|")]
    assert row[:2] == ["omd", "64"]
    operations, copies, in_graphs, launches, round_trips = map(float, row[3:8])
    assert in_graphs == operations
    assert (launches, round_trips) == (1, 0)
    assert 0 < operations <= MOST_OPERATIONS
    assert copies <= MOST_COPIES
    assert float(row[8].removesuffix(" MB")) <= MOST_MEGABYTES

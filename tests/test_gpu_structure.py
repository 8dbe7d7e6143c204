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
SECONDS = 900  # on a busy machine; 30 on an idle one


@pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda12_plugin") is None, reason="jax's CUDA plug-in is not installed (.ci/run does)"
)
@pytest.mark.skipif(jax.__version__ != COUNTED, reason=f"the limits are those of jax {COUNTED}")
@pytest.mark.parametrize(
    ("program", "operations", "copies", "launches", "megabytes"),
    [
        pytest.param("omd", 113, 2, 1, 65, id="omd"),
        pytest.param("regression", 450, 4, 20, 130, id="regression", marks=pytest.mark.slow),
        pytest.param("sac-omd", 200, 2, 1, 530, id="sac-omd", marks=pytest.mark.slow),
    ],
)
def test_a_step_has_few_operations_all_in_graphs_and_never_waits(
    program: str, operations: float, copies: float, launches: float, megabytes: float
) -> None:
    """Of 64 members."""
    command = [sys.executable, str(TOOL), str(TARGET), "--programs", program, "--members", "64"]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr[-2000:]
    row = [cell.strip() for cell in done.stdout.splitlines()[-1].strip("|").split("|")]
    assert row[:2] == [program, "64"]
    counted = dict(
        zip(("operations", "copies", "in graphs", "launches", "round trips"), map(float, row[3:8]), strict=True)
    )
    assert counted["in graphs"] == counted["operations"] > 0
    assert counted["round trips"] == 0
    assert counted["operations"] <= operations
    assert counted["copies"] <= copies
    assert counted["launches"] <= launches
    assert float(row[8].removesuffix(" MB")) <= megabytes

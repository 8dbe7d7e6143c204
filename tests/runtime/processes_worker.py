"""One process of several that run a toy sweep, started by test_processes.py.

    processes_worker.py <JSON of settings> <words>

Settings: constants of `processes` and `loop`, and `python`, a file for what `run` returns when called from Python.
"""

import json
import sys
import types
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from purejax_bilevel import programs
from purejax_bilevel.runtime import loop, processes
from purejax_bilevel.studies import run as runs
from purejax_bilevel.studies import sweep_command
from tests import toy


def main() -> int:
    settings = json.loads(sys.argv[1])
    results_file = settings.pop("python", None)
    for name, value in settings.items():
        setattr(processes if hasattr(processes, name) else loop, name, value)
    sys.modules["toy_program"] = types.ModuleType("toy_program")
    sys.modules["toy_program"].Config = toy.Config  # type: ignore[attr-defined]
    programs.REGISTRY["toy"] = "toy_program"
    status = sweep_command.main(sys.argv[2:])
    if results_file:
        with processes.together():
            dataset = runs.run(toy.Config(lr=(0.1, 0.01)), num_seeds=3, quiet=True)
        np.save(f"{results_file}.{processes.index()}.npy", dataset.score.values)
    return status


if __name__ == "__main__":
    sys.exit(main())

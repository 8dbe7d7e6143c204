"""One process of several that run a toy sweep, started by test_hosts.py: `hosts_worker.py <JSON of settings> <words>`.

Settings: constants of `hosts` and `runner`, and `python`, a file for what `run` returns when called from Python.
"""

import json
import sys
import types
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

import conftest  # noqa: E402

from purejax_bilevel.experiment import experiment, hosts, runner, study, sweep  # noqa: E402


def main() -> int:
    settings = json.loads(sys.argv[1])
    results_file = settings.pop("python", None)
    for name, value in settings.items():
        setattr(hosts if hasattr(hosts, name) else runner, name, value)
    sys.modules["toy_program"] = types.ModuleType("toy_program")
    sys.modules["toy_program"].Config = conftest.Config  # type: ignore[attr-defined]
    study.PROGRAMS["toy"] = "toy_program"
    status = sweep.main(sys.argv[2:])
    if results_file:
        with hosts.together():
            dataset = experiment.run(conftest.Config(lr=(0.1, 0.01)), num_seeds=3, quiet=True)
        np.save(f"{results_file}.{hosts.index()}.npy", dataset.score.values)
    return status


if __name__ == "__main__":
    sys.exit(main())

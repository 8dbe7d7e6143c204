"""The benchmarks' own logic: what they say when a machine is too busy, and the tables of the one for GPUs."""

import importlib.util
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parent / "benchmarks"


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A benchmark as a module; they are scripts outside of any package."""
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("long", "short", "text"),
    [
        ([10.0, 10.1, 10.05], [9.0, 9.05, 9.1], "at most 10.0% of a run (equal runs differ by 1.0%)"),
        ([10.0, 10.5], [9.8, 9.9], "cannot be told, equal runs differ by 5.0% and those with evaluation by +2.0%"),
        ([10.0, 10.1], [12.0, 12.1], "cannot be told, equal runs differ by 1.0% and those with evaluation by -20.0%"),
        ([10.0], [5.0], "cannot be told from one run of each"),
    ],
)
def test_the_share_of_evaluation_is_told_only_where_it_can_be(
    long: list[float], short: list[float], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load("speed", monkeypatch).share_in_words(long, short).startswith(f"evaluation: {text}")


def test_gpu_measurements_are_processes_that_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = load("gpu", monkeypatch)
    deadline = time.monotonic() + 300
    assert gpu.measured(deadline, "device", gpu.GRAPHS)["platform"] == "cpu"
    found = gpu.measured(deadline, "learning", small=True)
    assert found["passed"]
    assert found["text"].startswith("sql, 40 steps, 2 seeds: ")
    with pytest.raises(gpu.Failed, match="unexpected keyword argument 'nothing'"):
        gpu.measured(deadline, "device", nothing=1)
    with pytest.raises(gpu.Failed, match="no time left"):
        gpu.measured(time.monotonic(), "device")


def test_gpu_prints_a_row_of_every_measurement(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    gpu = load("gpu", monkeypatch)
    flags = []

    def measured(deadline: float, name: str, flag: str = "", **settings) -> dict:
        if name != "speed":
            return {"platform": "gpu", "kind": "some GPU", "jax": "1", "passed": name == "resume", "text": name}
        flags.append(flag)
        if settings["members"] == 64:
            raise gpu.Failed("out of memory")
        return {"rate": 1e6 * settings["members"], "compile": 2.0, "bytes": 3e9}

    monkeypatch.setattr(gpu, "measured", measured)
    assert gpu.main(gpu.Arguments()) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "| 1024 | 256 | whole loop | 1,024,000,000 | 2.0 s | 3.00 GB |" in lines
    assert "| 64 | all | default | out of memory | | |" in lines
    assert lines[-2:] == ["* learning: FAILED; learning", "* resume: passed; resume"]
    assert len([line for line in lines if line.startswith("|")]) == 2 + len(flags) == 16
    assert flags.count(gpu.GRAPHS) == 7


def test_gpu_without_a_gpu_is_one_sentence(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    gpu = load("gpu", monkeypatch)
    monkeypatch.setattr(gpu, "measured", lambda *_: {"platform": "cpu"})
    assert gpu.main(gpu.Arguments()) == 2
    assert capsys.readouterr().err == "error: jax sees no GPU here; --small tries the command out on a CPU.\n"


LISTING = """\
001: kCopy          [source       | next=002 (1)] kCopy
002: kWhile         [prev=001 (1) | next=003 (1)]
condition:
    003: kCustomKernel [source | sink] compare
  body:
    004: kConditional  [source | sink]
      true_branch:
        005: kWhile        [source | sink]
condition:
            006: kCustomKernel [source | sink] compare
          body:
            000: kCommandBuffer [source | sink]
                007: kCustomKernel [source | sink] add
                008: kCopy         [source | sink] kCopy
            009: kCustomKernel [source | sink] multiply
            010: kConditional  [source | sink]
              false_branch:
                011: kMemcpy       [source | sink] copy
      false_branch:
        012: kWhile        [source | sink]
condition:
            013: kCustomKernel [source | sink] compare
          body:
            014: kCustomKernel [source | sink] add
    015: kCustomKernel [source | sink] add
016: kWhile         [prev=001 (1) | next=003 (1)]
condition:
    017: kCustomKernel [source | sink] compare
  body:
    018: kCustomKernel [source | sink] one
    019: kCustomKernel [source | sink] two
    020: kCustomKernel [source | sink] three
    021: kCustomKernel [source | sink] four
    022: kCustomKernel [source | sink] five
    023: kCustomKernel [source | sink] six
    024: kCustomKernel [source | sink] seven
"""


def test_operations_of_a_step_are_counted_in_the_loop_over_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the loop over learning steps in the loop over blocks: no condition, no other loop, however long."""
    structure = load("gpu_structure", monkeypatch)
    step = structure.steps_of(structure.parse(LISTING))
    assert structure.count(step) == {"operations": 4, "copies": 2, "in graphs": 2, "round trips": 1}

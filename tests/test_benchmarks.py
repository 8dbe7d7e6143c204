"""The benchmarks' own logic: what they say when a machine is too busy, and the tables of the one for GPUs."""

import importlib.util
import os
import sys
import time
import types
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import xarray

from purejax_bilevel.studies import presets

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


def test_gpu_works_small_on_a_cpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Every measurement in its own process, with XLA's flag for whole loops as graphs, which a CPU has no use for."""
    gpu = load("gpu", monkeypatch)
    for name in ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR"):  # `main` sets them for the processes that it starts
        monkeypatch.setenv(name, os.environ.get(name, ""))
    assert gpu.main(gpu.Arguments(small=True)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("omd on CartPole-v1, cpu, jax ")
    (row,) = (line for line in lines if line.startswith("| 4 | 2 | whole loop | "))
    assert int(row.split("|")[4].replace(",", "")) > 0
    assert lines[-2].startswith("* learning: passed; sql, 40 steps, 2 seeds: ")
    assert lines[-1].startswith("* resume: passed; sql, 2 members, stopped after 20 of 40 steps: 0 of ")


def test_gpu_says_what_did_not_work(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = load("gpu", monkeypatch)
    with pytest.raises(gpu.Failed, match="unexpected keyword argument 'nothing'"):
        gpu.measured(time.monotonic() + 300, "device", nothing=1)
    with pytest.raises(gpu.Failed, match="no time left"):
        gpu.measured(time.monotonic(), "device")


def test_gpu_names_the_exception_and_not_what_is_printed_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = load("gpu", monkeypatch)
    errors = (
        "Traceback ...\njax.errors.JaxRuntimeError: RESOURCE_EXHAUSTED: Out of memory\n-----\nFor simplicity, ...\n"
    )
    assert gpu.reason(errors) == "jax.errors.JaxRuntimeError: RESOURCE_EXHAUSTED: Out of memory"
    assert gpu.reason("") == ""


def test_gpu_goes_on_where_the_time_was_over(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    """In parts: what is recorded is not measured again, errors neither, other devices' numbers do not count."""
    gpu = load("gpu", monkeypatch)
    kind, counted = "one GPU", []

    def measured(deadline: float, name: str, flag: str = "", **settings) -> dict:
        if name == "device":
            return {"platform": "gpu", "kind": kind, "jax": "1"}
        if len(counted) % 10 == 9:
            counted.append("late")
            raise gpu.OutOfTime("no time left")
        counted.append(name)
        if settings.get("members") == 1:
            raise gpu.Failed("out of memory")
        return {"rate": 1e6, "compile": 2.0, "bytes": 3e9, "passed": True, "text": name}

    monkeypatch.setattr(gpu, "measured", measured)
    arguments = gpu.Arguments(record=str(tmp_path / "folder" / "gpu.jsonl"))
    outputs = []
    for _ in range(3):
        assert gpu.main(arguments) == 1  # two rows are errors
        outputs.append(capsys.readouterr().out)
    assert [output.count("no time left") for output in outputs] == [1, 0, 0]
    assert [output.count("out of memory") for output in outputs] == [2, 2, 2]
    assert counted == ["speed"] * 9 + ["late"] + ["speed"] * 4 + ["learning", "resume"] + ["speed"]
    kind = "another GPU"
    gpu.main(arguments)
    assert len(counted) == 17 + 16


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
            No thunks.      body:
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


PROGRAM = """\
  %while.2 = (s32[], f32[64]{0}) while(%tuple.1), backend_config={"known_trip_count":{"n":"25"},"known_init_step":{}}
  %while.1 = (s32[], f32[64]{0}) while(%tuple.2), backend_config={"known_trip_count":{"n":"25"}}
  %while.3 = (s32[], f32[64]{0}) while(%tuple.3), backend_config={"known_trip_count":{"n":"40"}}
  %while = (s32[], f32[64]{0}) while(%tuple.4)
"""
NAMES = """\
thunk_metadata {
  thunk_info {
    profile_annotation: "while"
    thunk_id: 2
  }
  thunk_kind: "kWhile"
}
""" + "".join(
    f'  thunk_info {{\n    profile_annotation: "while.{name}"\n    thunk_id: {number}\n  }}\n'
    for name, number in ((1, 5), (2, 12), (3, 16))
)


def test_operations_of_a_step_are_counted_in_the_loop_over_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the loops of a block's length the one with most to do: no condition, no other loop, however long."""
    structure = load("gpu_structure", monkeypatch)
    trips = structure.trip_counts(PROGRAM, NAMES)
    assert trips == {5: 25, 12: 25, 16: 40}
    step = structure.steps_of(structure.parse(LISTING), trips, 25)
    expected = structure.Counts(operations=4, copies=2, in_graphs=2, launches=3, round_trips=1)
    assert structure.count(step, trips) == expected


def test_what_a_loop_of_known_length_does_counts_as_often_as_it_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    structure = load("gpu_structure", monkeypatch)
    root = structure.parse(LISTING)
    whole = structure.Operation(99, "kWhile", root.contents)
    counts = structure.count(whole, {5: 25, 12: 25, 16: 40, 99: 2})
    # outside 2, in the branch 25 x 4 and 25, in the last loop 40 x 7; the first loop and two branches wait
    assert counts == structure.Counts(2 + 100 + 25 + 280, 1 + 50, 50, 2 + 75 + 25 + 280, 1 + 1 + 25)


def test_steps_without_a_block_are_the_loop_inside_the_loop_over_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    structure = load("gpu_structure", monkeypatch)
    loop = structure.Operation(7, "kWhile", [structure.Operation(8, "kCustomKernel", [])] * 3)
    known = structure.Operation(5, "kWhile", [structure.Operation(8, "kCustomKernel", [])] * 9)
    root = structure.Operation(0, "", [structure.Operation(1, "kWhile", [known, loop]), known])
    assert structure.steps_of(root, {5: 40}, 0) is loop
    assert structure.count(loop, {5: 40}) == structure.Counts(operations=3, launches=3, round_trips=1)


def test_studies_are_compared_with_the_tables_of_their_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    studies = load("studies", monkeypatch)
    rows = "| agent | IQM |\n| --- | --- |\n| `omd` | 247 (119 to 423) | 50 |\n| `sac 2` | -9 (-20.5 to -3) |\n"
    told = studies.table_of("one", f"x\n<!-- studies.py: one -->\n\n{rows}\n| `sql` | 1 (0 to 2) |")
    assert told == {"omd": (119.0, 423.0), "sac 2": (-20.5, -3.0)}
    assert studies.differing({"omd": 120.0, "sac 2": -3.0}, told) == []
    assert studies.differing({"omd": 118.0, "mle": 1.0}, told) == [
        "mle is not in the table",
        "sac 2 was not run",
        "omd: 118 is outside of 119 to 423",
    ]
    for study, path in studies.PAGES.items():
        agents = set(presets.preset(study, "paper")["agents"])
        assert {label.partition(",")[0] for label in studies.table_of(study, path.read_text())} == agents, study


def test_studies_compare_agents_of_one_task_or_of_one_last_word(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    studies = load("studies", monkeypatch)

    def result(label: str, runs: list, **tasks: list) -> Any:
        dataset = xarray.Dataset(coords=tasks, attrs={"axes": {name: [name] for name in tasks}, "tasks": list(tasks)})
        return types.SimpleNamespace(label=label, dataset=dataset, best_runs=np.array(runs, float))

    widths = [result(label, [[k], [k + 0.5]]) for k, label in enumerate(("omd 2", "mle 2", "omd 8", "mle 8"))]
    assert studies.print_table(widths, lower=True) == {"omd 2": 0.25, "mle 2": 1.25, "omd 8": 2.25, "mle 8": 3.25}
    omd, mle = (line.split("|")[4:6] for line in capsys.readouterr().out.splitlines()[4:6])
    assert omd[0].isspace()
    assert omd[1].startswith(" 1.00 (")  # lower is better
    assert mle[0].startswith(" 0.00 (")
    tasks = [result(label, [[k, 9], [k, 5]], speed=[10, 20]) for k, label in enumerate(("funcbo", "omd 1"))]
    names = ["funcbo, speed=10", "omd 1, speed=10", "funcbo, speed=20", "omd 1, speed=20"]
    assert studies.print_table(tasks, lower=False) == dict(zip(names, (0.0, 1.0, 7.0, 7.0), strict=True))
    assert capsys.readouterr().out.count("| 1.00 (") == 1

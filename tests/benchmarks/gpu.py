"""What a GPU does with this project, in one command of at most half an hour; prints tables in Markdown.

    ./setup/run python tests/benchmarks/gpu.py             # on a machine with a GPU
    ./setup/run python tests/benchmarks/gpu.py --minutes 9 --record runs/gpu.jsonl   # in parts: again to go on
    ./setup/run python tests/benchmarks/gpu.py --small     # on any machine, a minute: whether the command itself works

Speed of omd on CartPole: environment steps per second of all members while they learn (evaluation off), seconds to
compile with an empty cache, the most memory in use; all members at once (vmap) or in batches (--member_batch); with
and without whole loops as CUDA graphs. Then two checks: sql learns, and a run that is stopped and resumed ends with
the same bits. Exit status 1 where a measurement or a check fails, or had no time left.

Every measurement is a process of its own, because XLA's flags and the largest use of memory belong to a process; this
one never touches the GPU.
"""

import dataclasses
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import tyro

GRAPHS = "--xla_gpu_enable_command_buffer=+WHILE,+CONDITIONAL"
QUICK = "--xla_backend_optimization_level=0"  # small runs take as long as it takes to compile them
SMALL_SIZES: dict[str, Any] = {"init_steps": 16, "batch_size": 16, "eval_frequency": 10}  # one program for both checks
MOST_SECONDS = 600.0  # of one measurement
CHECKS_SHARE = 0.25  # of the time, kept for the checks, which come last


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What to run."""

    small: bool = False
    minutes: float = 28.0  # in which all is done; what does not fit is left out and named
    record: str = ""  # a file for what was measured: what it holds is not measured again on the same device
    measure: str = ""  # used by the script itself, in fresh processes: one measurement as JSON


@dataclasses.dataclass(frozen=True)
class Speed:
    """One row of the table of speeds."""

    members: int
    at_once: int  # members trained at once, 0: all
    graphs: bool
    steps: int
    repeats: int

    @property
    def flags(self) -> str:
        return GRAPHS if self.graphs else ""


def speeds(small: bool) -> Iterator[Speed]:
    """The rows of the table."""
    if small:
        yield Speed(4, 2, graphs=True, steps=20, repeats=1)
        return
    for members in (1, 64, 256, 1024, 4096):
        for graphs in (False, True):
            yield Speed(members, 0, graphs, steps=1000, repeats=2)
    for members, at_once in ((1024, 256), (4096, 1024)):
        for graphs in (False, True):
            yield Speed(members, at_once, graphs, steps=500, repeats=2)


# --- one measurement, in a process of its own -------------------------------------------------------------------------
# What touches a device is imported here and not above: it would take the GPU's memory from the other processes.


def measure_device() -> dict[str, Any]:
    """What this machine is; members are spread over all its GPUs."""
    import jax

    device, count = jax.devices()[0], jax.device_count()
    several = f"{count} x " if count > 1 and device.platform != "cpu" else ""
    return {"platform": device.platform, "kind": several + device.device_kind, "jax": jax.__version__}


def measure_speed(members: int, at_once: int, steps: int, repeats: int) -> dict[str, float]:
    """Steps per second of all members while they learn, seconds to compile, bytes."""
    import jax
    import speed

    arguments = speed.Arguments()
    jax.config.update("jax_enable_compilation_cache", False)
    program = speed.compiled(arguments, members, member_batch=at_once or None)
    start = speed.settings(arguments).init_steps
    seconds = min(speed.seconds_per_run(program, steps, start) for _ in range(repeats))
    statistics = jax.devices()[0].memory_stats() or {}
    largest = statistics.get("peak_bytes_in_use", 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    return {"rate": members * steps / seconds, "compile": program.compile_seconds, "bytes": largest}


def measure_learning(small: bool) -> dict[str, Any]:
    """What sql returns in the last evaluation, and the least that is sensible: a random policy has 22."""
    from purejax_bilevel import RLConfig, run
    from purejax_bilevel.results import statistics

    seeds, steps, least = (2, 40, 5) if small else (64, 50_000, 400)
    config = RLConfig(agent_type="sql", num_train_steps=steps, **(SMALL_SIZES if small else {}))
    results = run(config, num_seeds=seeds, seed=100, quiet=True)
    (row,) = statistics.summary_table(results, "final_return")
    text = f"sql, {steps} steps, {seeds} seeds: {row.iqm:.0f} ({row.low:.0f} to {row.high:.0f}), expected {least}"
    return {"passed": bool(row.iqm >= least), "text": text}


def measure_resume(small: bool) -> dict[str, Any]:
    """Whether a run that was stopped half-way and resumed ends with the bits of one that was not."""
    import jax
    import numpy as np
    from rich.console import Console

    from purejax_bilevel import RLConfig
    from purejax_bilevel.runtime import loop
    from purejax_bilevel.studies import run as runs

    agent, members, steps = ("sql", 2, 40) if small else ("omd", 64, 4000)
    sizes = SMALL_SIZES if small else {"eval_frequency": steps // 4}
    config = RLConfig(agent_type=agent, num_train_steps=steps, **sizes).resolved()
    part = runs.make_part(config, members, 0)
    with tempfile.TemporaryDirectory() as folder:
        whole = loop.train([part], loop.RunOptions(Path(folder) / "whole", quiet=True))
        options = loop.RunOptions(Path(folder) / "stopped", quiet=True)
        loop.Run([part], options, Console(), stretch=loop.Stretch(stop=steps // 2)).to_the_end()
        resumed = loop.train([part], dataclasses.replace(options, resume=True))
    ours, theirs = (jax.tree.leaves((outcome.rows, outcome.state)) for outcome in (whole, resumed))
    differing = sum(np.asarray(a).tobytes() != np.asarray(b).tobytes() for a, b in zip(ours, theirs, strict=True))
    text = f"{agent}, {members} members, stopped after {steps // 2} of {steps} steps: "
    return {"passed": differing == 0, "text": f"{text}{differing} of {len(ours)} arrays differ"}


MEASUREMENTS: Mapping[str, Callable[..., dict[str, Any]]] = {
    "device": measure_device,
    "speed": measure_speed,
    "learning": measure_learning,
    "resume": measure_resume,
}


# --- all of them ------------------------------------------------------------------------------------------------------


class Failed(Exception):
    """A measurement that came to no result; the message says why."""


class OutOfTime(Failed):
    """One that may come to a result another time."""


def measured(deadline: float, name: str, flags: str = "", **settings: Any) -> dict[str, Any]:
    """The result of one measurement in a fresh process.

    Raises:
        OutOfTime: it took too long.
        Failed: it ended with an error.
    """
    seconds = min(MOST_SECONDS, deadline - time.monotonic())
    if seconds <= 0:
        raise OutOfTime("no time left")
    environment = os.environ | {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()}
    command = [sys.executable, __file__, "--measure", json.dumps({"name": name, **settings})]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired as error:
        raise OutOfTime(f"longer than {seconds:.0f} s") from error
    if done.returncode != 0:
        raise Failed(reason(done.stderr) or f"exit status {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def reason(errors: str) -> str:
    """The line that says what went wrong: the last exception's, since notes and XLA's log may follow it."""
    lines = errors.strip().splitlines() or [""]
    named = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Interrupted)\b", line)]
    return (named or lines)[-1][:160]


class Record:
    """What was measured, on one device, in a file of one JSON object per line; without a file, nothing is kept."""

    def __init__(self, name: str, device: Mapping[str, Any]):
        self.path, self.device = Path(name) if name else None, dict(device)
        self.known: dict[str, dict[str, Any]] = {}
        if self.path is not None and self.path.exists():
            lines = map(json.loads, self.path.read_text().splitlines())
            self.known = {line["key"]: line["found"] for line in lines if line["device"] == self.device}

    def measured(self, deadline: float, name: str, flags: str = "", **settings: Any) -> dict[str, Any]:
        """As the function of that name, where nothing is known yet; errors are known too, if it was not the time."""
        key = json.dumps([name, flags, settings], sort_keys=True)
        if key not in self.known:
            try:
                self.known[key] = measured(deadline, name, flags, **settings)
            except OutOfTime:
                raise
            except Failed as error:
                self.known[key] = {"error": str(error)}
            if self.path is not None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.path.open("a") as file:
                    file.write(json.dumps({"device": self.device, "key": key, "found": self.known[key]}) + "\n")
        if "error" in self.known[key]:
            raise Failed(self.known[key]["error"])
        return self.known[key]


def print_speeds(record: Record, deadline: float, small: bool) -> int:
    """Prints the table of speeds, each row as soon as it is there; returns the number of rows that failed."""
    print("| members | at once | CUDA graphs | steps/s | compiled in | memory |")
    print("| --- | --- | --- | --- | --- | --- |")
    failed = 0
    for row in speeds(small):
        settings = dataclasses.asdict(row)
        start = f"| {row.members} | {row.at_once or 'all'} | {'whole loop' if settings.pop('graphs') else 'default'} |"
        try:
            found = record.measured(deadline, "speed", row.flags, **settings)
        except Failed as error:
            failed += 1
            print(f"{start} {error} | | |", flush=True)
            continue
        print(f"{start} {found['rate']:,.0f} | {found['compile']:.1f} s | {found['bytes'] / 1e9:.2f} GB |", flush=True)
    return failed


def print_checks(record: Record, deadline: float, small: bool) -> int:
    """Prints what the checks say; returns the number of those that failed."""
    failed = 0
    for name in ("learning", "resume"):
        try:
            found = record.measured(deadline, name, small=small)
        except Failed as error:
            found = {"passed": False, "text": str(error)}
        failed += not found["passed"]
        print(f"* {name}: {'passed' if found['passed'] else 'FAILED'}; {found['text']}", flush=True)
    return failed


def everything(small: bool, minutes: float, name: str) -> int:
    """Prints all tables and checks; returns the exit status.

    Args:
        small: sizes at which they mean nothing.
        minutes: for all.
        name: of the record's file.
    """
    seconds = 60.0 * minutes
    deadline = time.monotonic() + seconds
    try:
        device = measured(deadline, "device")
    except Failed as error:
        print(f"error: jax does not start here: {error}", file=sys.stderr)
        return 2
    if device["platform"] == "cpu" and not small:
        print("error: jax sees no GPU here; --small tries the command out on a CPU.", file=sys.stderr)
        return 2
    print(f"omd on CartPole-v1, {device['kind']}, jax {device['jax']}:\n", flush=True)
    record = Record(name, device)
    failed = print_speeds(record, deadline - CHECKS_SHARE * seconds, small)
    print()
    failed += print_checks(record, deadline, small)
    return min(failed, 1)


def main(arguments: Arguments) -> int:
    """Measures one thing or everything; returns the exit status."""
    if arguments.measure:
        settings = json.loads(arguments.measure)
        print(json.dumps(MEASUREMENTS[settings.pop("name")](**settings)))
        return 0
    if not arguments.small:
        return everything(False, arguments.minutes, arguments.record)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {QUICK}".strip()
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", folder)  # a stopped run and its rest are compiled once
        return everything(True, arguments.minutes, arguments.record)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Arguments, use_underscores=True, config=(tyro.conf.FlagCreatePairsOff,))))

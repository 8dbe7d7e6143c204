"""The studies that decide a paper's claim: runs the presets again and checks the tables that the pages have of them.

    ./setup/run python tests/benchmarks/studies.py                        # all: half an hour on two cores
    ./setup/run python tests/benchmarks/studies.py --only omd_narrow_model --output_dir runs --resume

Prints of each study the interquartile mean of its agents with 95 % intervals, task by task where there are several, and
the probability that one agent's run is better than another's. Agents named `omd 2`, `mle 2`, `omd 8`, ... are compared
with those of the same last word. Exit status 1 where an interquartile mean is outside of the interval on its page.
"""

import dataclasses
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tyro

from purejax_bilevel.results import statistics
from purejax_bilevel.results.analysis import AgentResult, reported_variable, reporting, words
from purejax_bilevel.results.report import write_again
from purejax_bilevel.studies import presets, sweep_command

PROGRAMS = Path(__file__).resolve().parents[2] / "purejax_bilevel" / "programs"
PAGES = {"omd_narrow_model": PROGRAMS / "control" / "README.md"}  # study: a preset; page: has its table
NUMBER = r"-?[\d.]+"


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What to run."""

    only: tuple[str, ...] = tuple(PAGES)
    output_dir: Path = Path("runs/studies")
    resume: bool = False  # go on with studies that are there


def table_of(study: str, page: str) -> dict[str, tuple[float, float]]:
    """Intervals by agent, from the table under the comment `studies.py: <study>` of a page."""
    _, _, rest = page.partition(f"<!-- studies.py: {study} -->\n")
    table = rest.lstrip("\n").partition("\n\n")[0]
    rows = re.findall(rf"^\| `([^`]+)` \| {NUMBER} \(({NUMBER}) to ({NUMBER})\)", table, re.MULTILINE)
    return {agent: (float(low), float(high)) for agent, low, high in rows}


def differing(agents: Mapping[str, float], told: Mapping[str, tuple[float, float]]) -> list[str]:
    """What a page's table says otherwise, in words."""
    missing = [f"{agent} is not in the table" for agent in agents if agent not in told]
    missing += [f"{agent} was not run" for agent in told if agent not in agents]
    return missing + [
        f"{agent}: {agents[agent]:.4g} is outside of {low:.4g} to {high:.4g}"
        for agent, (low, high) in told.items()
        if agent in agents and not low <= agents[agent] <= high
    ]


class Row(NamedTuple):
    """What is told of one agent on one task."""

    label: str
    group: str  # only rows of one group are compared
    name: str  # within the group
    runs: np.ndarray


def rows_of(agents: Sequence[AgentResult]) -> list[Row]:
    """One row per agent and task."""
    tasks = [words(task) for task in statistics.tasks_of(agents[0].dataset)]
    if len(tasks) > 1:
        return [
            Row(f"{agent.label}, {task}", task, agent.label, agent.best_runs[:, [place]])
            for place, task in enumerate(tasks)
            for agent in agents
        ]
    if all(" " in agent.label for agent in agents):
        parts = [agent.label.rpartition(" ") for agent in agents]
        return [Row(a.label, group, name, a.best_runs) for a, (name, _, group) in zip(agents, parts, strict=True)]
    return [Row(agent.label, "", agent.label, agent.best_runs) for agent in agents]


def print_table(agents: Sequence[AgentResult], lower: bool) -> dict[str, float]:
    """Prints what the agents reached; returns their interquartile means."""
    rows, sign = rows_of(agents), -1.0 if lower else 1.0
    names = list(dict.fromkeys(row.name for row in rows))
    print(f"| agent | IQM (95 % interval) | runs | {' | '.join(f'better than {name}' for name in names)} |")
    print(f"| --- | --- | --- |{' --- |' * len(names)}")
    reached = {}
    for row in rows:
        found = statistics.stratified_bootstrap_interval(row.runs)
        reached[row.label] = float(found.estimate)
        others = {other.name: other for other in rows if other.group == row.group and other.name != row.name}
        better = []
        for name in names:
            if name in others:
                chance = statistics.probability_of_improvement(sign * row.runs, sign * others[name].runs)
                better.append(f"{chance.estimate:.2f} ({chance.low:.2f} to {chance.high:.2f})")
            else:
                better.append("")
        print(f"| `{row.label}` | {found.in_words()} | {row.runs.size} | {' | '.join(better)} |", flush=True)
    return reached


def main(arguments: Arguments) -> int:
    """Runs the studies; returns the exit status."""
    status = 0
    for study in arguments.only:
        folder = arguments.output_dir / study
        fresh = [study, "--scale", "paper", "--output_dir", str(arguments.output_dir), "--name", study]
        failed = sweep_command.main(["--resume", str(folder)] if arguments.resume and folder.exists() else fresh)
        if failed:
            return failed
        print(f"\n{study}:\n")
        agents = write_again(folder)
        variable = reported_variable(agents[0].dataset, reporting(presets.preset(study, "paper")["report"]))
        reached = print_table(agents, statistics.lower_is_better(agents[0].dataset, variable))
        problems = differing(reached, table_of(study, PAGES[study].read_text()))
        print("\n" + ("; ".join(problems) or "as in the page"), flush=True)
        status |= bool(problems)
    return status


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Arguments, use_underscores=True)))

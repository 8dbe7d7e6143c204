"""The studies that decide a paper's claim: runs the presets again and checks the tables that the pages have of them.

    ./setup/run python tests/benchmarks/studies.py                        # all: half an hour on two cores
    ./setup/run python tests/benchmarks/studies.py --only omd_narrow_model --output_dir runs --resume

Prints of each study the interquartile mean of its agents with 95 % intervals, and the probability that one agent's run
is better than another's. Exit status 1 where an interquartile mean is outside of the interval that its page has.
"""

import dataclasses
import re
import sys
from collections.abc import Mapping
from pathlib import Path

import tyro

from purejax_bilevel.results import statistics
from purejax_bilevel.results.analysis import AgentResult
from purejax_bilevel.results.report import write_again
from purejax_bilevel.studies import sweep_command

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
    rows = re.findall(rf"^\| `(\w+)` \| {NUMBER} \(({NUMBER}) to ({NUMBER})\)", table, re.MULTILINE)
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


def print_table(agents: list[AgentResult]) -> dict[str, float]:
    """Prints what the agents reached; returns their interquartile means."""
    others = [agent.label for agent in agents]
    print(f"| agent | IQM (95 % interval) | runs | {' | '.join(f'better than {label}' for label in others)} |")
    print(f"| --- | --- | --- |{' --- |' * len(others)}")
    reached = {}
    for agent in agents:
        runs = agent.best_runs
        found = statistics.stratified_bootstrap_interval(runs)
        reached[agent.label] = float(found.estimate)
        better = []
        for other in agents:
            chance = statistics.probability_of_improvement(runs, other.best_runs)
            better.append("" if other is agent else f"{chance.estimate:.2f} ({chance.low:.2f} to {chance.high:.2f})")
        iqm = f"{found.estimate:.0f} ({found.low:.0f} to {found.high:.0f})"
        print(f"| `{agent.label}` | {iqm} | {runs.size} | {' | '.join(better)} |", flush=True)
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
        problems = differing(print_table(write_again(folder)), table_of(study, PAGES[study].read_text()))
        print("\n" + ("; ".join(problems) or "as in the page"), flush=True)
        status |= bool(problems)
    return status


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Arguments, use_underscores=True)))

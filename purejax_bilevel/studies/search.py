"""Search for hyper-parameters: an evolution strategy and successive halving, with one compilation for all rounds.

The compiled program has a fixed number of places per sub-program. A round fills them with settings and seeds and runs
them over the same steps; the next round fills them anew, without compiling. All members of a round are at the same
step, because the step counter is shared (see `program.py`).

    es        a round is a generation: every place trains from the first to the last step.
    halving   n settings, n / 2^k places' worth at once: rung 0 trains all settings in 2^k batches up to T / 2^k steps
              and keeps the states of each batch; the better half trains on in 2^(k-1) batches up to T / 2^(k-1), and so
              on. So a place that a stopped setting leaves goes to another one that is at the same step, and a setting
              that survives has gone through exactly the steps of an uninterrupted run. A sub-program's settings compete
              among themselves. What compares them is measured since the rung before.

At the end the best settings found are trained again from the first step on seeds that took no part in the search.

Every round is a folder with a checkpoint of its own, and its scores in a file once it has ended. A search that goes on
replays the finished rounds from these scores.
"""

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from purejax_bilevel.errors import UserError
from purejax_bilevel.members import Grid
from purejax_bilevel.results.statistics import ranking
from purejax_bilevel.runtime import checkpoint as checkpoints
from purejax_bilevel.runtime.options import RunOptions
from purejax_bilevel.studies.evolving import evolve
from purejax_bilevel.studies.folder import ROUNDS, SCORES
from purejax_bilevel.studies.halving import halve, rung_ends
from purejax_bilevel.studies.plan import SweptAgent, Template, listed_grid
from purejax_bilevel.studies.rounds import Rounds, Tried
from purejax_bilevel.studies.study import Search, Study


@dataclasses.dataclass
class Finding:
    """What a search found for one agent: its finalists on the seeds that are reported, and how they were chosen."""

    grid: Grid
    outcome_rows: dict[str, np.ndarray]
    failed: np.ndarray
    selection: np.ndarray  # [members], the score that chose the setting
    bytes_per_member: int
    stage_of: dict[str, str]  # of what is not measured in the last stage


@dataclasses.dataclass
class Found:
    """Result of a search, per agent."""

    findings: list[Finding]
    compile_seconds: float
    run_seconds: float
    num_traces: int


def split_seeds(study: Study) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Seeds that choose settings and seeds that are reported; with a single seed it has to do both."""
    seeds = study.all_seeds
    select = study.seeds.select if study.seeds.select is not None else len(seeds) // 2
    return (seeds, seeds) if len(seeds) == 1 else (seeds[:select], seeds[select:])


def search(
    study: Study, agents: Sequence[SweptAgent], options: RunOptions, console: Console, watcher: Any = None
) -> Found:
    """Searches by the study's method, then trains the finalists on the seeds that are reported.

    Raises:
        UserError: the search does not fit the study.
        Interrupted: on Ctrl-C, after a checkpoint was written.
    """
    if options.folder is None:
        raise UserError("a search needs a folder: its rounds are kept there.")
    select, report = split_seeds(study)
    places = [places_of(study.search, template, len(select)) for agent in agents for template in agent.templates]
    rounds = Rounds(study, agents, places, options, console, watcher)
    if study.search.method == "es":
        spaces = [agent.space for agent in agents for _ in agent.templates]
        candidates = evolve(rounds, study.search, spaces, select)
    else:
        candidates = halve(rounds, study.search, select)
    finalists = [_distinct_best(found, study.search.finalists) for found in candidates]
    findings = _finals(rounds, agents, finalists, report)
    rounds.save_history()
    traces = rounds.compiled.num_traces if rounds.compiled else 0
    return Found(findings, rounds.compile_seconds, rounds.run_seconds, traces)


def places_of(search: Search, template: Template, num_seeds: int) -> int:
    """Members of one sub-program that the compiled program holds at once."""
    if search.method == "es":
        return search.population * num_seeds
    return math.ceil(len(template.settings) / 2**search.halving) * num_seeds


def work(study: Study, total: int, eval_frequency: int) -> int:
    """Steps that the compiled program does in all rounds of a search, without the finals."""
    if study.search.method == "es":
        return study.search.generations * total
    ends = rung_ends(total, eval_frequency, study.search.halving)
    starts = [0, *ends[:-1]]
    batches = [2 ** (study.search.halving - rung) for rung in range(len(ends))]
    return sum(count * (end - start) for count, start, end in zip(batches, starts, ends, strict=True))


def _distinct_best(candidates: list[Tried], count: int) -> list[Tried]:
    """The best different settings; `candidates` have a quality, higher is better."""
    order = ranking(np.array([quality for _, quality in candidates]))
    best: dict[str, Tried] = {}
    for number in order:
        setting, quality = candidates[number]
        best.setdefault(repr(setting), (setting, quality))
    return list(best.values())[:count]


def _finals(
    rounds: Rounds,
    agents: Sequence[SweptAgent],
    finalists: list[list[Tried]],
    seeds: tuple[int, ...],
) -> list[Finding]:
    """Trains the finalists from the first step on the seeds that are reported."""
    members = [[(setting, seed) for setting, _ in best for seed in seeds] for best in finalists]
    batches = max(math.ceil(len(listed) / places) for listed, places in zip(members, rounds.places, strict=True))
    gathered: list[tuple[list[dict], list[np.ndarray]]] = [([], []) for _ in members]
    for batch in range(batches):
        chosen = [
            listed[batch * places : (batch + 1) * places] for listed, places in zip(members, rounds.places, strict=True)
        ]
        outcome = rounds.run(
            f"finals-{batch + 1}", [part or listed[:1] for part, listed in zip(chosen, members, strict=True)]
        )
        rounds.run_seconds += outcome.run_seconds
        for (rows, failed), part, new_rows, new_failed in zip(
            gathered, chosen, outcome.rows, outcome.failed, strict=True
        ):
            rows.append({name: array[: len(part)] for name, array in new_rows.items()})
            failed.append(new_failed[: len(part)])
    findings, number = [], 0
    for agent in agents:
        own = range(number, number + len(agent.templates))
        number += len(agent.templates)
        findings.append(_finding(rounds, agent, own, finalists, gathered, seeds))
    return findings


def _finding(
    rounds: Rounds,
    agent: SweptAgent,
    parts: range,
    finalists: list[list[Tried]],
    gathered: list[tuple[list[dict], list[np.ndarray]]],
    seeds: tuple[int, ...],
) -> Finding:
    settings = [
        {**template.static, **setting}
        for template, part in zip(agent.templates, parts, strict=True)
        for setting, _ in finalists[part]
    ]
    chosen = np.repeat([quality for part in parts for _, quality in finalists[part]], len(seeds))
    counts = [len(finalists[part]) for part in parts]
    edges = np.cumsum([0, *counts])
    grid = listed_grid(settings, seeds)
    merged = SweptAgent(
        agent.label, grid, agent.templates, tuple(np.arange(a, b) for a, b in itertools.pairwise(edges))
    )
    names = gathered[parts[0]][0][0]
    rows = {
        name: merged.gather([np.concatenate([batch[name] for batch in gathered[part][0]]) for part in parts])
        for name in names
    }
    failed = merged.gather([np.concatenate(gathered[part][1]) for part in parts])
    assert rounds.compiled is not None
    size = max(rounds.compiled.bytes_per_member[part] for part in parts)
    return Finding(grid, rows, failed, -chosen if rounds.lower else chosen, size, rounds.stage_of)


def clean(folder: Path) -> None:
    """Deletes what the rounds of a finished search wrote, and nothing else; scores stay in search.json."""
    for place in (folder / ROUNDS).glob("*/"):
        for name in (SCORES, checkpoints.FILE_NAME):
            (place / name).unlink(missing_ok=True)
    for place in [*(folder / ROUNDS).glob("*/"), folder / ROUNDS]:
        with contextlib.suppress(OSError):  # not there, or it holds what is not ours
            place.rmdir()

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
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console

from purejax_bilevel.errors import Interrupted, UserError
from purejax_bilevel.members import Grid
from purejax_bilevel.program import Part, Program
from purejax_bilevel.results import dataset as datasets
from purejax_bilevel.results.report import HISTORY
from purejax_bilevel.results.statistics import ranking, row_scores, setting_scores
from purejax_bilevel.runtime import checkpoint as checkpoints
from purejax_bilevel.runtime import loop, processes
from purejax_bilevel.runtime.compiled import CompiledProgram
from purejax_bilevel.runtime.options import RunOptions
from purejax_bilevel.studies.folder import ROUNDS, SCORES
from purejax_bilevel.studies.plan import SweptAgent, Template, listed_grid
from purejax_bilevel.studies.study import Interval, Search, Study

Setting = dict[str, Any]
Member = tuple[Setting, int]  # setting and seed


@dataclasses.dataclass(frozen=True)
class Members(Grid):
    """Members one by one, where they are no product of settings and seeds."""

    listed: tuple[Member, ...] = ()

    def __len__(self) -> int:
        return len(self.listed)

    def settings(self, member_index: int) -> dict[str, Any]:
        setting, seed = self.listed[member_index]
        return {**setting, "seed": seed}

    def columns(self) -> dict[str, tuple[tuple, np.ndarray]]:
        own = np.arange(len(self.listed))
        return {name: (tuple(setting[name] for setting, _ in self.listed), own) for name in self.listed[0][0]}


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


# ---------------------------------------------------------------- rounds


class Rounds:
    """The compiled program as places that are filled again and again.

    Args:
        study: what is searched.
        agents: its agents.
        places: members of each sub-program in the compiled program.
        options: as for a run; the folder is that of the sweep.
        watcher: told when the program is planned and compiled.
    """

    def __init__(
        self,
        study: Study,
        agents: Sequence[SweptAgent],
        places: Sequence[int],
        options: RunOptions,
        console: Console,
        watcher: Any = None,
    ):
        self.templates = [template for agent in agents for template in agent.templates]
        self.places, self.options, self.console, self.watcher = list(places), options, console, watcher
        self.programs = [template.config.program() for template in self.templates]
        self.total = self.programs[0].num_steps
        self.variable, self.over = selecting(study, self.programs[0])
        self.compiled: CompiledProgram | None = None
        self.run_seconds = self.compile_seconds = 0.0
        self.history: list[dict[str, Any]] = []
        self.stage_of: dict[str, str] = {}

    def parts(self, members: Sequence[Sequence[Member]]) -> list[Part]:
        """Sub-programs with the given members; empty places repeat the first ones."""
        made = []
        for template, program, places, listed in zip(self.templates, self.programs, self.places, members, strict=True):
            filled = tuple(listed[i % len(listed)] for i in range(places))
            seeds = tuple(dict.fromkeys(seed for _, seed in filled))
            made.append(template.part(Members((), seeds, filled), program))
        return made

    def folder(self, name: str) -> Path:
        assert self.options.folder is not None
        return self.options.folder / ROUNDS / name

    def scores(
        self,
        name: str,
        members: Sequence[Sequence[Member]],
        start: int = 0,
        stop: int | None = None,
        state: Callable[[], list[Any]] | None = None,
        keep: bool = False,
    ) -> list[np.ndarray]:
        """Runs a round, unless its scores are there already.

        Args:
            name: of the round.
            members: per sub-program, at most as many as it has places.
            start: first step.
            stop: step before which it ends; the last by default.
            state: host state of all places at `start`, if not 0.
            keep: whether a later round needs the state.

        Returns:
            Per sub-program `[members]`, NaN where failed.
        """
        path = self.folder(name) / SCORES
        stop = self.total if stop is None else stop
        if not processes.from_first(path.is_file):
            outcome = self.run(name, members, start, stop, state)
            found = [
                row_scores(rows[self.variable], failed, self.over)[: len(listed)]
                for rows, failed, listed in zip(outcome.rows, outcome.failed, members, strict=True)
            ]
            record: dict[str, Any] = {
                "name": name,
                "steps": stop,
                "seconds": outcome.run_seconds,
                "parts": [
                    {
                        "label": template.label,
                        "members": [{**setting, "seed": seed} for setting, seed in listed],
                        "scores": _plain(scores),
                    }
                    for template, listed, scores in zip(self.templates, members, found, strict=True)
                ],
            }
            if processes.is_first():
                datasets.write_text(path, json.dumps(datasets.as_plain(record)))
            if not keep:
                self.forget(name)
        record = processes.from_first(lambda: json.loads(path.read_text()))
        self.history.append(record)
        self.run_seconds += record["seconds"]
        return [np.array([np.nan if x is None else x for x in part["scores"]]) for part in record["parts"]]

    def run(
        self,
        name: str,
        members: Sequence[Sequence[Member]],
        start: int = 0,
        stop: int | None = None,
        state: Callable[[], list[Any]] | None = None,
    ) -> loop.Outcome:
        """Runs or goes on with one round."""
        folder, parts = self.folder(name), self.parts(members)
        folder.mkdir(parents=True, exist_ok=True)
        options = dataclasses.replace(
            self.options, folder=folder, resume=True, wandb_mode="disabled", tensorboard=False
        )
        begun = processes.from_first((folder / checkpoints.FILE_NAME).exists)
        stretch = loop.Stretch(start, stop, None if begun or state is None else state())
        before = self.compiled.compile_seconds if self.compiled else 0.0
        run = loop.Run(parts, options, self.console, program=self.compiled, stretch=stretch, watcher=self.watcher)
        self.compiled, self.watcher = run.program, None
        try:
            if not self.options.quiet:
                self.console.print(f"{name.replace('-', ' ')}:", highlight=False)
            outcome = run.to_the_end()
        except Interrupted as error:
            raise Interrupted(f"stopped in {name}; go on with --resume {self.options.folder}") from error
        self.compile_seconds += self.compiled.compile_seconds - before
        self.stage_of = outcome.stage_of
        return outcome

    def state(self, name: str, members: Sequence[Sequence[Member]]) -> list[Any]:
        """Host state at the end of a round that was kept."""
        program = self.compiled or self._uncompiled(members)
        path = self.folder(name) / checkpoints.FILE_NAME
        placement = checkpoints.load_fingerprint(path).get(loop.PLACEMENT)  # of a round that is over: any will do
        expected = loop.fingerprint(self.parts(members)) | {loop.PLACEMENT: placement}
        return checkpoints.load(path, program.structure, expected).state

    def _uncompiled(self, members: Sequence[Sequence[Member]]) -> CompiledProgram:
        """The program of a search that goes on and has not had to run a round yet."""
        run = loop.Run(self.parts(members), dataclasses.replace(self.options, folder=None), self.console)
        self.compiled = run.program
        return run.program

    def forget(self, name: str) -> None:
        """Deletes a round's checkpoint, which is large; its scores stay."""
        if not processes.is_first():
            return
        with contextlib.suppress(FileNotFoundError):
            (self.folder(name) / checkpoints.FILE_NAME).unlink()

    def save_history(self) -> None:
        """Writes all rounds and their scores into the sweep's folder."""
        assert self.options.folder is not None
        if processes.is_first():
            datasets.write_text(self.options.folder / HISTORY, json.dumps(self.history))


def selecting(study: Study, program: Program) -> tuple[str, float]:
    """What chooses settings, and the share of the run that it is averaged over.

    Halving compares before the end, so that it needs a series: the headline in place of what is measured only then.
    """
    report = study.report
    variable = report.select_by or report.variable or default_variable(program)
    if study.search.halving and variable in program.finals:
        variable = program.headline
    return variable, report.over if report.select_over is None else report.select_over


def default_variable(program: Program) -> str:
    """What is reported unless the sweep says otherwise."""
    return next(iter(program.finals), program.headline)


def lower_is_better(program: Program, variable: str) -> bool:
    """Whether a program's variable is better when lower."""
    measure = program.measure(variable)
    return measure is not None and measure.better == "lower"


def _plain(scores: np.ndarray) -> list[float | None]:
    return [float(score) if np.isfinite(score) else None for score in scores]


# ---------------------------------------------------------------- the search


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
    lower = lower_is_better(rounds.programs[0], rounds.variable)
    if study.search.method == "es":
        spaces = [agent.space for agent in agents for _ in agent.templates]
        candidates = evolve(rounds, study.search, spaces, select, lower)
    else:
        candidates = halve(rounds, study.search, select, lower)
    finalists = [_distinct_best(found, study.search.finalists) for found in candidates]
    findings = _finals(rounds, agents, finalists, report, lower)
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


def _distinct_best(candidates: list[tuple[Setting, float]], count: int) -> list[tuple[Setting, float]]:
    """The best different settings; `candidates` have a quality, higher is better."""
    order = ranking(np.array([quality for _, quality in candidates]))
    best: dict[str, tuple[Setting, float]] = {}
    for number in order:
        setting, quality = candidates[number]
        best.setdefault(repr(setting), (setting, quality))
    return list(best.values())[:count]


def _finals(
    rounds: Rounds,
    agents: Sequence[SweptAgent],
    finalists: list[list[tuple[Setting, float]]],
    seeds: tuple[int, ...],
    lower: bool,
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
        findings.append(_finding(rounds, agent, own, finalists, gathered, seeds, lower))
    return findings


def _finding(
    rounds: Rounds,
    agent: SweptAgent,
    parts: range,
    finalists: list[list[tuple[Setting, float]]],
    gathered: list[tuple[list[dict], list[np.ndarray]]],
    seeds: tuple[int, ...],
    lower: bool,
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
    return Finding(grid, rows, failed, -chosen if lower else chosen, size, rounds.stage_of)


# ---------------------------------------------------------------- evolution strategy


class Evolution:
    """An evolution strategy of evosax in the unit cube of a search space, which it minimises over.

    Args:
        search: population, algorithm and seed.
        space: the intervals.
        start: settings to start from.
        number: of the sub-program, for a stream of random numbers of its own.
    """

    def __init__(self, search: Search, space: Sequence[Interval], start: Setting, number: int):
        from evosax.algorithms import CMA_ES, Open_ES

        self.space, self._key = tuple(space), jax.random.fold_in(jax.random.key(search.seed), number)
        mean = jnp.array([interval.position(start[interval.name]) for interval in self.space], jnp.float32)
        if search.algorithm == "cma_es":
            self._strategy = CMA_ES(search.population, jnp.zeros(len(space)))
            self._parameters = self._strategy.default_params.replace(std_init=jnp.float32(0.25))
        else:
            self._strategy = Open_ES(
                search.population,
                jnp.zeros(len(space)),
                optimizer=optax.adam(0.1),
                std_schedule=optax.exponential_decay(0.2, 1, 0.95),
            )
            self._parameters = self._strategy.default_params
        self._state = self._strategy.init(jax.random.fold_in(self._key, 0), mean, self._parameters)
        self._generation = 0

    def ask(self) -> list[Setting]:
        """Settings of the next generation."""
        self._generation += 1
        key = jax.random.fold_in(self._key, 2 * self._generation)
        population, self._state = self._strategy.ask(key, self._state, self._parameters)
        self._population = jnp.clip(population, 0.0, 1.0)  # told as what was tried: the nearest point inside
        return [
            {interval.name: interval.at(float(x)) for interval, x in zip(self.space, point, strict=True)}
            for point in np.asarray(self._population)
        ]

    def tell(self, quality: np.ndarray) -> None:
        """Quality of these settings, higher is better, NaN for failed ones."""
        worst = np.nanmin(quality) - 1.0 if np.isfinite(quality).any() else 0.0
        fitness = -np.where(np.isfinite(quality), quality, worst)
        key = jax.random.fold_in(self._key, 2 * self._generation + 1)
        self._state, _ = self._strategy.tell(
            key, self._population, jnp.asarray(fitness, jnp.float32), self._state, self._parameters
        )


def evolve(
    rounds: Rounds, search: Search, spaces: Sequence[Sequence[Interval]], seeds: tuple[int, ...], lower: bool
) -> list[list[tuple[Setting, float]]]:
    """Runs all generations; returns every setting tried with its quality, per sub-program.

    The fitness of a setting is the interquartile mean over the same seeds in all generations.
    """
    strategies = [
        Evolution(search, space, {interval.name: getattr(template.config, interval.name) for interval in space}, number)
        for number, (space, template) in enumerate(zip(spaces, rounds.templates, strict=True))
    ]
    tried: list[list[tuple[Setting, float]]] = [[] for _ in strategies]
    for generation in range(search.generations):
        asked = [strategy.ask() for strategy in strategies]
        members = [[(setting, seed) for setting in settings for seed in seeds] for settings in asked]
        scores = rounds.scores(f"generation-{generation + 1}", members)
        for strategy, settings, part_scores, found in zip(strategies, asked, scores, tried, strict=True):
            quality = setting_scores(part_scores.reshape(-1, len(seeds)), lower)
            strategy.tell(quality)
            found.extend(zip(settings, quality.tolist(), strict=True))
        _say(rounds, f"generation {generation + 1} of {search.generations}", tried, lower)
        rounds.save_history()
    return tried


def _say(rounds: Rounds, what: str, tried: list[list[tuple[Setting, float]]], lower: bool) -> None:
    if rounds.options.quiet:
        return
    words = []
    for template, found in zip(rounds.templates, tried, strict=True):
        quality = np.array([score for _, score in found])
        best = f"{np.nanmax(quality) * (-1 if lower else 1):.4g}" if np.isfinite(quality).any() else "all failed"
        words.append(f"{template.label} {best}")
    text = f"{what}: best {rounds.variable.replace('_', ' ')} so far: {', '.join(words)}"
    rounds.console.print(text, highlight=False, markup=False, soft_wrap=True)


# ---------------------------------------------------------------- successive halving


def rung_ends(total: int, eval_frequency: int, halvings: int) -> list[int]:
    """Steps at which each rung ends: total / 2^k, ..., total / 2, total; the earlier ones where an evaluation is due.

    Raises:
        UserError: the first rung would end before the first evaluation.
    """
    if halvings and eval_frequency == 0:
        raise UserError("--halving compares settings at evaluations: eval_frequency must not be 0.")
    ends = [total // 2 ** (halvings - rung) // eval_frequency * eval_frequency for rung in range(halvings)]
    if 0 in ends or len(set(ends)) < len(ends):
        raise UserError(
            f"--halving {halvings} would compare after {total / 2**halvings:.0f} of {total} steps, with evaluations "
            f"only every {eval_frequency}: halve less often or lower eval_frequency."
        )
    return [*ends, total]


def halve(rounds: Rounds, search: Search, seeds: tuple[int, ...], lower: bool) -> list[list[tuple[Setting, float]]]:
    """Runs all rungs; returns the settings of the last one with their quality, per sub-program."""
    ends = rung_ends(rounds.total, rounds.programs[0].stages[-1].eval_every, search.halving)
    alive: list[list[Setting]] = [list(template.settings) for template in rounds.templates]
    homes: dict[tuple[int, str], tuple[str, int]] = {}  # where a setting's state is: round and position
    earlier: dict[str, list[list[Member]]] = {}
    start = 0
    for rung, stop in enumerate(ends):
        tried: list[list[tuple[Setting, float]]] = [[] for _ in alive]
        current: dict[str, list[list[Member]]] = {}
        next_homes: dict[tuple[int, str], tuple[str, int]] = {}
        batches = max(
            math.ceil(len(settings) * len(seeds) / places)
            for settings, places in zip(alive, rounds.places, strict=True)
        )
        for batch in range(batches):
            name = f"rung-{rung + 1}-batch-{batch + 1}"
            chosen = [
                _share(settings, places // len(seeds), batch)
                for settings, places in zip(alive, rounds.places, strict=True)
            ]
            # A sub-program with fewer batches than others runs its first settings once more; nobody looks at them.
            members = [
                [(setting, seed) for setting in part or settings[:1] for seed in seeds]
                for part, settings in zip(chosen, alive, strict=True)
            ]
            state = None if rung == 0 else _state_getter(rounds, members, homes, earlier, len(seeds))
            scores = rounds.scores(name, members, start, stop, state, keep=stop < rounds.total)
            current[name] = members
            for number, (part, part_scores) in enumerate(zip(chosen, scores, strict=True)):
                quality = setting_scores(part_scores.reshape(-1, len(seeds)), lower)[: len(part)]
                tried[number].extend(zip(part, quality.tolist(), strict=True))
                for position, setting in enumerate(part):
                    next_homes[number, repr(setting)] = (name, position)
            rounds.save_history()
        for name in earlier:
            rounds.forget(name)
        homes, earlier, start = next_homes, current, stop
        _say(rounds, f"rung {rung + 1} of {len(ends)} ({stop} steps)", tried, lower)
        if not any(np.isfinite(quality) for found in tried for _, quality in found):
            raise UserError(
                f"every setting failed by step {stop} (results are not numbers): try smaller learning rates."
            )
        if rung + 1 < len(ends):
            alive = [_better_half(found) for found in tried]
    return tried


def _share(settings: list[Setting], count: int, batch: int) -> list[Setting]:
    return settings[batch * count : (batch + 1) * count]


def _better_half(tried: list[tuple[Setting, float]]) -> list[Setting]:
    order = ranking(np.array([quality for _, quality in tried]))
    kept = sorted(order[: math.ceil(len(tried) / 2)])
    return [tried[number][0] for number in kept]


def _state_getter(
    rounds: Rounds,
    members: list[list[Member]],
    homes: dict[tuple[int, str], tuple[str, int]],
    earlier: dict[str, list[list[Member]]],
    num_seeds: int,
) -> Callable[[], list[Any]]:
    """Collects the states of the given members from the rounds where they were left."""

    def collect() -> list[Any]:
        loaded: dict[str, list[Any]] = {}
        collected = []
        for number, listed in enumerate(members):
            filled = [listed[i % len(listed)] for i in range(rounds.places[number])]
            leaves = []
            for place, (setting, _) in enumerate(filled):
                name, position = homes[number, repr(setting)]
                if name not in loaded:
                    loaded[name] = rounds.state(name, earlier[name])
                index = position * num_seeds + place % len(listed) % num_seeds
                leaves.append(jax.tree.map(lambda leaf, index=index: leaf[index], loaded[name][number]))
            collected.append(jax.tree.map(lambda *rows: np.stack(rows), *leaves))
        return collected

    return collect


def clean(folder: Path) -> None:
    """Deletes what the rounds of a finished search wrote, and nothing else; scores stay in search.json."""
    for place in (folder / ROUNDS).glob("*/"):
        for name in (SCORES, checkpoints.FILE_NAME):
            (place / name).unlink(missing_ok=True)
    for place in [*(folder / ROUNDS).glob("*/"), folder / ROUNDS]:
        with contextlib.suppress(OSError):  # not there, or it holds what is not ours
            place.rmdir()

"""Rounds of a search: the compiled program as places that are filled with settings and seeds again and again."""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from purejax_bilevel.errors import Interrupted
from purejax_bilevel.members import Grid
from purejax_bilevel.program import Part, Program
from purejax_bilevel.results import dataset as datasets
from purejax_bilevel.results.report import HISTORY
from purejax_bilevel.results.statistics import row_scores
from purejax_bilevel.runtime import checkpoint as checkpoints
from purejax_bilevel.runtime import loop, outcomes, processes
from purejax_bilevel.runtime.compiled import CompiledProgram
from purejax_bilevel.runtime.fingerprints import PLACEMENT, fingerprint
from purejax_bilevel.runtime.options import RunOptions
from purejax_bilevel.studies.folder import ROUNDS, SCORES
from purejax_bilevel.studies.plan import SweptAgent
from purejax_bilevel.studies.study import Study

Setting = dict[str, Any]
Member = tuple[Setting, int]  # setting and seed
Tried = tuple[Setting, float]  # with its quality, higher is better


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
        self.programs = [template.program() for template in self.templates]
        self.total = self.programs[0].num_steps
        self.variable, self.over = selecting(study, self.programs[0])
        self.lower = better_when_lower(self.programs[0], self.variable)
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
    ) -> outcomes.Outcome:
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
        own = {PLACEMENT: checkpoints.load_fingerprint(path).get(PLACEMENT)}  # of a round that is over: any will do
        expected = fingerprint(self.parts(members)) | own
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

    def tell_best(self, what: str, tried: list[list[Tried]]) -> None:
        """Prints the best setting so far of each sub-program."""
        if self.options.quiet:
            return
        words, sign = [], -1 if self.lower else 1
        for template, found in zip(self.templates, tried, strict=True):
            quality = np.array([score for _, score in found])
            best = f"{sign * np.nanmax(quality):.4g}" if np.isfinite(quality).any() else "all failed"
            words.append(f"{template.label} {best}")
        text = f"{what}: best {self.variable.replace('_', ' ')} so far: {', '.join(words)}"
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)


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


def better_when_lower(program: Program, variable: str) -> bool:
    """Whether a program's variable is better when lower."""
    measure = program.measure(variable)
    return measure is not None and measure.better == "lower"


def _plain(scores: np.ndarray) -> list[float | None]:
    return [float(score) if np.isfinite(score) else None for score in scores]

"""Agents that are trained together: one compiled call for all their members, be it the one agent of a single run."""

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from purejax_bilevel.configuration import to_dict
from purejax_bilevel.program import Configuration, Part, called_outside
from purejax_bilevel.results import dataset as datasets
from purejax_bilevel.runtime import artefacts, loop, outcomes, sizes
from purejax_bilevel.runtime.arrays import typed_state
from purejax_bilevel.runtime.compiled import precision
from purejax_bilevel.runtime.options import RunOptions
from purejax_bilevel.studies import video as videos
from purejax_bilevel.studies.plan import SweptAgent


@dataclasses.dataclass(frozen=True)
class Trained:
    """All members of one program, trained in one go.

    Args:
        agents: of this program.
        parts: sub-programs of all of them, agent by agent.
        outcome: in the same order.
    """

    agents: tuple[SweptAgent, ...]
    parts: list[Part]
    outcome: outcomes.Outcome

    def spans(self) -> list[slice]:
        """Where each agent's sub-programs are."""
        ends = list(itertools.accumulate(len(agent.templates) for agent in self.agents))
        return [slice(start, end) for start, end in itertools.pairwise([0, *ends])]

    def outcome_of(self, number: int) -> tuple[Part, outcomes.Outcome]:
        """One agent's members, as if they were of one sub-program."""
        agent, span, outcome = self.agents[number], self.spans()[number], self.outcome
        names = outcome.rows[span][0]
        merged = dataclasses.replace(
            outcome,
            rows=[{name: agent.gather([rows[name] for rows in outcome.rows[span]]) for name in names}],
            failed=[agent.gather(outcome.failed[span])],
            bytes_per_member=[max(outcome.bytes_per_member[span])],
        )
        return dataclasses.replace(self.parts[span][0], grid=agent.grid), merged

    def save_artefacts(self, folders: Sequence[Path]) -> None:
        """What each agent leaves for others, in its folder; where it has several sub-programs, in a folder of each."""
        for agent, span, folder in zip(self.agents, self.spans(), folders, strict=True):
            parts, states = self.parts[span], self.outcome.state[span] if self.outcome.state else []
            for part, state, template in zip(parts, states, agent.templates, strict=False):
                own = folder if len(parts) == 1 else folder / datasets.file_name(part.label)
                _save_artefact(part, template.config, state, own)

    def write_video(self, number: int, setting: int, seed: int, folder: Path) -> None:
        """A GIF of one agent's policy, of a setting and a seed by their numbers in its grid."""
        agent, span = self.agents[number], self.spans()[number]
        place = next(i for i, settings in enumerate(agent.settings_of) if setting in settings)
        member = int(np.flatnonzero(agent.settings_of[place] == setting)[0]) * len(agent.grid.seeds) + seed
        part, state = self.parts[span][place], self.outcome.state[span][place]
        videos.write_video(part, state, member, self.outcome.steps, folder / videos.FILE_NAME)


def train(
    agents: Sequence[SweptAgent],
    options: RunOptions,
    console: Console | None = None,
    watcher: loop.Watcher | None = None,
    parts: list[Part] | None = None,
) -> Trained:
    """Trains all members of all agents in one compiled call.

    Args:
        agents: of one program.
        options: how to run.
        console: where messages go.
        watcher: told before it runs.
        parts: sub-programs of all agents, where they are made already.

    Raises:
        UserError: the options cannot be met, or the memory is too small.
        Interrupted: on Ctrl-C, after a checkpoint was written.
    """
    parts = parts or [part for agent in agents for part in agent.parts()]
    with sizes.explained():
        return Trained(tuple(agents), parts, loop.train(parts, options, console, watcher))


def _save_artefact(part: Part, config: Configuration, stored: Any, folder: Path) -> None:
    """Writes what other runs may start from, if the program leaves something and the state is known."""
    program = part.program
    if stored is None:
        return
    members = [part.grid.settings(member) for member in range(len(part.grid))]
    with precision([part]):
        states = typed_state(part, stored.state)
        program.write(states, members, folder)
        if not program.artefact_kind:
            return
        tree = jax.vmap(called_outside(program, program.artefact))(states)
    artefacts.save(folder, program.artefact_kind, tree, members, to_dict(config))

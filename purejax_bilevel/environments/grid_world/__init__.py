"""Grid-World: an agent walks on a grid and collects objects that end the episode or come back.

`GridWorld-<mode>` is level number 0 of a mode, `GridWorld-<mode>-<number>` any other one: with a number, a level is the
same everywhere. Drawing levels, the best return in one and pictures are functions here; ../README.md says more.
"""

import functools
import re

from purejax_bilevel.environments.grid_world import levels
from purejax_bilevel.environments.grid_world.levels import Level, draw, draw_lifetime, is_solvable, numbered
from purejax_bilevel.environments.grid_world.modes import MODES, Mode
from purejax_bilevel.environments.grid_world.optimum import optimal_policy, optimal_return, optimal_values
from purejax_bilevel.environments.grid_world.world import Draws, GridWorld, Places, State
from purejax_bilevel.errors import UserError

__all__ = [
    "MODES",
    "NAMES",
    "Draws",
    "GridWorld",
    "Level",
    "Mode",
    "Places",
    "State",
    "draw",
    "draw_lifetime",
    "is_solvable",
    "known",
    "make",
    "numbered",
    "optimal_policy",
    "optimal_return",
    "optimal_values",
]

PREFIX = "GridWorld-"
NAMES = tuple(PREFIX + mode for mode in MODES)
MOST_LEVELS = 2**32  # the seeds of jax.random.key


def known(name: str) -> bool:
    """Whether a name is that of a Grid-World, or looks like one."""
    return name.startswith(PREFIX)


def make(name: str) -> tuple[GridWorld, Level]:
    """The Grid-World of a name and its level.

    Raises:
        UserError: there is no such mode, or the number is too large.
    """
    mode, number = _parse(name)
    return _world(mode), levels.numbered(mode, number)


def _parse(name: str) -> tuple[str, int]:
    found = re.fullmatch(rf"{PREFIX}(\w+?)(?:-(\d+))?", name, re.ASCII)
    if not found or found[1] not in MODES:
        raise UserError(
            f"--env_name {name} is not an environment; Grid-Worlds are {PREFIX}<mode> or {PREFIX}<mode>-<number>, with "
            f"a mode of {', '.join(MODES)}."
        )
    number = int(found[2] or 0)
    if number >= MOST_LEVELS:
        raise UserError(f"--env_name {name}: levels have numbers below {MOST_LEVELS}.")
    return found[1], number


@functools.cache
def _world(mode: str) -> GridWorld:
    return GridWorld(mode)

"""The environment of a configuration: its actions discrete or continuous, its observations vectors."""

import dataclasses
import re

import jax

from purejax_bilevel import environments
from purejax_bilevel.environments import grid_world
from purejax_bilevel.errors import UserError
from purejax_bilevel.programs.learned_optimizers import settings
from purejax_bilevel.programs.learned_optimizers.actor_critic import Task


def make(config: settings.Task) -> Task:
    """Looks up the environment.

    Raises:
        UserError: there is none of that name, or `draw_level` has no levels to draw from.
    """
    name = config.env_name
    if config.draw_level and not grid_world.known(name):
        raise UserError(f"--draw_level is for Grid-Worlds, GridWorld-<mode>, not for {name}.")
    if config.draw_level and re.search(r"-\d+$", name):
        raise UserError(f"--draw_level draws levels of a mode: --env_name must have no number, got {name}.")
    if environments.is_continuous(name):
        return environments.make_continuous(name)
    task = environments.make(name, flatten=True)
    if config.draw_level:
        return dataclasses.replace(task, max_steps=grid_world.MODES[_mode(name)].horizon)
    return task


def with_level(task: Task, config: settings.Task, key: jax.Array) -> Task:
    """The Grid-World of a configuration with another level of its mode; the key may be traced."""
    return dataclasses.replace(task, params=grid_world.draw(key, _mode(config.env_name)))


def _mode(name: str) -> str:
    return name.removeprefix(grid_world.PREFIX)

"""Environments: every one speaks the gymnax >= 1.0 interface, whose `step` returns six values.

`make` gives any gymnax environment that has vector observations and discrete actions, checked, with its sizes at hand.
"""

import dataclasses
import difflib
from typing import Any

import gymnax
from gymnax.environments import spaces
from gymnax.environments.environment import Environment

from purejax_bilevel.errors import UserError


@dataclasses.dataclass(frozen=True)
class Discrete:
    """An environment with observations `[obs_dim]` and actions 0..num_actions-1."""

    environment: Environment
    params: Any  # traced argument of its `reset` and `step`
    obs_dim: int
    num_actions: int
    max_steps: int  # time limit of an episode


def make(name: str) -> Discrete:
    """Looks up a gymnax environment.

    Args:
        name: registered name, e.g. "CartPole-v1".

    Raises:
        UserError: unknown name, continuous actions, or observations that are not vectors.
    """
    if name not in gymnax.registered_envs:
        close = difflib.get_close_matches(name, gymnax.registered_envs, n=1, cutoff=0.4)
        hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(gymnax.registered_envs)}."
        raise UserError(f"--env_name {name} is not an environment; {hint}")
    environment, params = gymnax.make(name)
    action_space = environment.action_space(params)
    if not isinstance(action_space, spaces.Discrete):
        raise UserError(
            f"--env_name {name} has continuous actions; this program needs discrete ones, e.g. CartPole-v1."
        )
    shape = environment.observation_space(params).shape
    if len(shape) != 1:
        raise UserError(
            f"--env_name {name} has observations of shape {tuple(shape)}; this program needs vectors, e.g. CartPole-v1."
        )
    return Discrete(environment, params, shape[0], action_space.n, int(params.max_steps_in_episode))

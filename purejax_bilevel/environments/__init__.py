"""Environments: every one speaks the gymnax >= 1.0 interface, whose `step` returns six values.

`make` gives any gymnax environment that has vector observations and discrete actions, checked, with its sizes at hand;
`make_continuous` any of gymnax, Brax or MuJoCo Playground with vector observations and bounded continuous actions,
which become [-1, 1] everywhere.
"""

import dataclasses
import difflib
from typing import Any

from purejax_bilevel.environments import brax, probes
from purejax_bilevel.environments._gymnax import Environment, gymnax, spaces
from purejax_bilevel.environments.continuous import UnitActions
from purejax_bilevel.errors import UserError


@dataclasses.dataclass(frozen=True)
class Discrete:
    """An environment with observations `[obs_dim]` and actions 0..num_actions-1."""

    environment: Environment
    params: Any  # traced argument of its `reset` and `step`
    obs_dim: int
    num_actions: int
    max_steps: int  # time limit of an episode


@dataclasses.dataclass(frozen=True)
class Continuous:
    """An environment with observations `[obs_dim]` and actions `[action_dim]` in [-1, 1]."""

    environment: Environment
    params: Any  # traced argument of its `reset` and `step`
    obs_dim: int  # with the distractors
    action_dim: int
    max_steps: int  # time limit of an episode


def make(name: str) -> Discrete:
    """Looks up an environment with discrete actions.

    Args:
        name: registered name, e.g. "CartPole-v1".

    Raises:
        UserError: unknown name, continuous actions, or observations that are not vectors.
    """
    if is_continuous(name):
        raise UserError(
            f"--env_name {name} has continuous actions; this program needs discrete ones, e.g. CartPole-v1."
        )
    environment, params = _look_up(name)
    obs_dim = _obs_dim(name, environment, params, "CartPole-v1")
    num_actions = environment.action_space(params).n
    return Discrete(environment, params, obs_dim, num_actions, int(params.max_steps_in_episode))


def make_continuous(name: str, dim_distract: int = 0) -> Continuous:
    """Looks up an environment with continuous actions; they are clipped to [-1, 1] and scaled to its own bounds.

    Args:
        name: registered name, e.g. "Pendulum-v1".
        dim_distract: standard normal numbers that are appended to every observation, at least 0.

    Raises:
        UserError: unknown name, discrete actions, observations that are not vectors, or a negative `dim_distract`.
    """
    if dim_distract < 0:
        raise UserError(f"--dim_distract must be at least 0, got {dim_distract}.")
    environment, params = _look_up(name)
    action_space = environment.action_space(params)
    if not isinstance(action_space, spaces.Box) or len(action_space.shape) != 1:
        raise UserError(
            f"--env_name {name} has discrete actions; this program needs continuous ones, e.g. Pendulum-v1."
        )
    obs_dim = _obs_dim(name, environment, params, "Pendulum-v1")
    wrapped = UnitActions(environment, dim_distract)
    return Continuous(wrapped, params, obs_dim + dim_distract, action_space.shape[0], int(params.max_steps_in_episode))


def is_continuous(name: str) -> bool:
    """Whether `name` is an environment with continuous actions; False for unknown names."""
    if brax.known(name):  # without importing a suite that may not be installed
        return True
    if name not in gymnax.registered_envs and name not in probes.NAMES:
        return False
    environment, params = _look_up(name)
    return isinstance(environment.action_space(params), spaces.Box)


def _look_up(name: str) -> tuple[Environment, Any]:
    if brax.known(name):
        return brax.make(name)
    if name in probes.NAMES:
        return probes.make(name)
    if name not in gymnax.registered_envs:
        names = [*gymnax.registered_envs, *brax.NAMES]
        close = difflib.get_close_matches(name, [*names, *probes.NAMES], n=1, cutoff=0.4)
        hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(names)}."
        raise UserError(f"--env_name {name} is not an environment; {hint}")
    try:
        return gymnax.make(name)
    except OSError as error:  # one of them downloads its images
        raise UserError(f"--env_name {name} needs a download, which failed ({error}).") from error


def _obs_dim(name: str, environment: Environment, params: Any, example: str) -> int:
    shape = environment.observation_space(params).shape
    if len(shape) != 1:
        raise UserError(
            f"--env_name {name} has observations of shape {tuple(shape)}; this program needs vectors, e.g. {example}."
        )
    return shape[0]

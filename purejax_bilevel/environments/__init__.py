"""Environments: every one speaks the gymnax >= 1.0 interface, whose `step` returns six values.

`make` gives any gymnax environment that has vector observations and discrete actions, checked, with its sizes at hand;
`make_continuous` any of gymnax, Brax or MuJoCo Playground with vector observations and bounded continuous actions,
which become [-1, 1] everywhere.

Your own environment, a gymnax `Environment` with its parameters, goes by a name like every other:

    environments.register("Maze", Maze(), MazeParams())
    run(RLConfig(env_name="Maze"))

On the command line `--env_name mypackage.envs:make` names a function without arguments that returns it.
"""

import dataclasses
import difflib
import functools
from typing import Any

import jax

from purejax_bilevel.configuration import named_object
from purejax_bilevel.environments import brax, grid_world, probes
from purejax_bilevel.environments._gymnax import Environment, gymnax, spaces
from purejax_bilevel.environments.continuous import UnitActions
from purejax_bilevel.environments.flat import FlatObservations
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


_REGISTERED: dict[str, tuple[Environment, Any]] = {}


def register(name: str, environment: Environment, params: Any = None) -> None:
    """Gives an environment of your own a name, by which configurations then know it.

    Args:
        name: for `env_name`; a name registered before is replaced.
        environment: with the interface of gymnax >= 1.0.
        params: of its `reset` and `step`; None: its `default_params`.

    Raises:
        UserError: the name is taken, or the environment has another interface.
    """
    if name in gymnax.registered_envs or name in probes.NAMES or brax.known(name) or grid_world.known(name):
        raise UserError(f"environments.register: {name} is an environment already; choose another name.")
    _REGISTERED[name] = _checked(name, environment, params)


@functools.cache
def _from_function(name: str) -> tuple[Environment, Any]:
    """What the function `module:function` returns: an environment, or one with its parameters."""
    found = named_object("env_name", name, "function")
    if not callable(found):
        raise UserError(f"--env_name {name} must name a function that returns an environment, got {found!r}.")
    try:
        made = found()
    except Exception as error:  # whatever a stranger's code may raise
        raise UserError(f"--env_name {name}: the function fails ({type(error).__name__}: {error}).") from error
    environment, params = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    return _checked(name, environment, params)


def _checked(name: str, environment: Any, params: Any) -> tuple[Environment, Any]:
    if not isinstance(environment, Environment):
        raise UserError(
            f"--env_name {name} must be an Environment of gymnax >= 1.0, or one with its parameters, got "
            f"{type(environment).__name__}."
        )
    params = environment.default_params if params is None else params

    def one_step(key: jax.Array) -> Any:
        reset_key, step_key, action_key = jax.random.split(key, 3)
        _, state = environment.reset(reset_key, params)
        return environment.step(step_key, state, environment.action_space(params).sample(action_key), params)

    try:
        *five, info = jax.eval_shape(one_step, jax.random.key(0))
        int(params.max_steps_in_episode)
        environment.observation_space(params)
    except Exception as error:  # whatever a stranger's code may raise
        reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
        raise UserError(f"--env_name {name} cannot be reset and stepped as gymnax >= 1.0 does ({reason}).") from error
    if len(five) != 5 or not isinstance(info, dict) or "final_observation" not in info:
        raise UserError(
            f"--env_name {name}: step must return observation, state, reward, terminated, truncated and info with "
            "final_observation, as in gymnax >= 1.0."
        )
    return environment, params


def make(name: str, flatten: bool = False) -> Discrete:
    """Looks up an environment with discrete actions.

    Args:
        name: registered name, e.g. "CartPole-v1", or `module:function`.
        flatten: make vectors of observations of other shapes, such as MinAtar's images.

    Raises:
        UserError: unknown name, continuous actions, or observations that are not vectors and are not to become some.
    """
    if is_continuous(name):
        raise UserError(
            f"--env_name {name} has continuous actions; this program needs discrete ones, e.g. CartPole-v1."
        )
    environment, params = _look_up(name)
    if flatten and len(environment.observation_space(params).shape) > 1:
        environment = FlatObservations(environment)
    obs_dim = _obs_dim(name, environment, params, "CartPole-v1")
    num_actions = environment.action_space(params).n
    return Discrete(environment, params, obs_dim, num_actions, int(params.max_steps_in_episode))


def make_continuous(name: str, dim_distract: int = 0) -> Continuous:
    """Looks up an environment with continuous actions; they are clipped to [-1, 1] and scaled to its own bounds.

    Args:
        name: registered name, e.g. "Pendulum-v1", or `module:function`.
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
    if name not in (*gymnax.registered_envs, *probes.NAMES, *_REGISTERED) and ":" not in name:
        return False
    environment, params = _look_up(name)
    return isinstance(environment.action_space(params), spaces.Box)


def _look_up(name: str) -> tuple[Environment, Any]:
    if brax.known(name):
        return brax.make(name)
    if name in probes.NAMES:
        return probes.make(name)
    if grid_world.known(name):
        return grid_world.make(name)
    if name in _REGISTERED:
        return _REGISTERED[name]
    if ":" in name:
        return _from_function(name)
    if name not in gymnax.registered_envs:
        names = [*gymnax.registered_envs, *brax.NAMES, *_REGISTERED]
        close = difflib.get_close_matches(name, [*names, *probes.NAMES, *grid_world.NAMES], n=1, cutoff=0.4)
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

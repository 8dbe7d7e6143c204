"""Episodes of a policy that a run left: their returns, and a picture of one.

evaluate_policy("runs/omd#3", num_episodes=100)   # [100] returns
render_policy("runs/omd#3", "policy.gif")
"""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from purejax_bilevel import environments
from purejax_bilevel.configuration import LARGEST_WHOLE
from purejax_bilevel.environments import Continuous, Discrete
from purejax_bilevel.errors import UserError
from purejax_bilevel.programs import saved_policies
from purejax_bilevel.programs.control import rollouts
from purejax_bilevel.studies import video

MOST_EPISODES = 1_000_000
# Settings with which a run's environment is not the one of its name alone, and what they are where it is.
CHANGES = {"non_stationary": "plain", "draw_level": False}


def evaluate_policy(place: str, num_episodes: int = 20, seed: int = 0, env_name: str = "") -> np.ndarray:
    """Plays whole episodes with the policy of a run, without noise, all at once.

    Args:
        place: `runs/x` (its first member) or `runs/x#3`, or the file `artefact.safetensors` itself.
        num_episodes: how many.
        seed: of starts and of the environment's chance.
        env_name: environment; "": that of the run.

    Returns:
        Undiscounted returns `[num_episodes]`, in the environment's units of reward.

    Raises:
        UserError: there is no policy, or it cannot act there.
    """
    _check("num_episodes", num_episodes, 1, MOST_EPISODES)
    task, policy, _ = _task_and_policy(place, env_name)
    key = _key(seed)

    @jax.jit
    def play(key: jax.Array) -> jax.Array:
        arguments = (task.environment, task.params, task.max_steps, policy, key, num_episodes, num_episodes)
        return rollouts.evaluate(*arguments, is_last=jax.numpy.bool_(True))["final_return"]

    return np.asarray(play(key))


def render_policy(place: str, path: str | Path = "policy.gif", seed: int = 0, env_name: str = "") -> Path:
    """Plays one episode with the policy of a run, without noise, and writes it as a GIF.

    Args:
        place: see `evaluate_policy`.
        path: file to write.
        seed: of the start and of the environment's chance.
        env_name: environment; "": that of the run.

    Returns:
        The file.

    Raises:
        UserError: there is no policy, it cannot act there, or the file cannot be written.
    """
    task, policy, name = _task_and_policy(place, env_name)

    @jax.jit
    def play(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        return rollouts.episode(task.environment, task.params, task.max_steps, policy, key)

    observations, alive = map(np.asarray, play(_key(seed)))
    return video.write_gif(observations[alive], name, place, Path(path))


def _task_and_policy(place: str, env_name: str) -> tuple[Discrete | Continuous, rollouts.Policy, str]:
    act, settings = saved_policies.load(place)
    name = env_name or settings.get("env_name", "")
    if not name:
        raise UserError(f"{place} does not say in which environment it acts: give env_name.")
    changed = [setting for setting, usual in CHANGES.items() if settings.get(setting, usual) != usual]
    if changed and not env_name:
        raise UserError(
            f"{place} was trained with --{changed[0]} {settings[changed[0]]}: give env_name to play {name}."
        )
    task, policy = _make(name, settings), lambda obs, key: act(obs.T)
    found = jax.eval_shape(policy, jax.ShapeDtypeStruct((task.obs_dim, 1), float), jax.random.key(0)).shape[1:]
    needed = (task.action_dim,) if isinstance(task, Continuous) else ()
    if found != needed:
        raise UserError(f"the policy of {place} gives {_actions(found)}, {name} needs {_actions(needed)}.")
    return task, policy, name


def _actions(shape: tuple[int, ...]) -> str:
    return f"continuous actions of size {shape[0]}" if shape else "discrete actions"


def _make(name: str, settings: dict[str, Any]) -> Discrete | Continuous:
    if environments.is_continuous(name):
        return environments.make_continuous(name, int(settings.get("dim_distract", 0)))
    return environments.make(name, flatten=True)


def _key(seed: int) -> jax.Array:
    _check("seed", seed, 0, LARGEST_WHOLE)
    return jax.random.key(seed)


def _check(name: str, value: Any, least: int, most: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise UserError(f"{name} must be a whole number from {least} to {most}, got {value!r}.")

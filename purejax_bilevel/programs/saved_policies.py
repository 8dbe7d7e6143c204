"""Policies that runs leave, as functions from observations to actions, whatever the program.

    act = load_policy("runs/omd#3")
    action = act(obs)                       # [obs] -> one action, or [batch, obs] -> [batch]

They are greedy: the action of the highest mean value, or the most likely one, in [-1, 1] where actions are continuous.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from purejax_bilevel import networks
from purejax_bilevel.errors import UserError

Q_FUNCTION, ACTOR, POLICY = "Q-function", "actor", "policy"
KINDS = (POLICY, Q_FUNCTION, ACTOR)  # of artefacts
Arrays = Mapping[str, np.ndarray]
Function = Callable[[jax.Array], jax.Array]


class Greedy(NamedTuple):
    """Actions `[batch, ...]` at observations `[batch, obs_dim]`."""

    obs_dim: int
    act: Function


class Saved(NamedTuple):
    """A policy as `load_policy` gives it, and settings and seed with which it was trained."""

    act: Callable[[Any], jax.Array]
    settings: dict[str, Any]


def load_policy(place: str) -> Callable[[Any], jax.Array]:
    """The policy of a run, without noise, as a function of observations.

    Args:
        place: `runs/x` (its first member) or `runs/x#3`, or the file `artefact.safetensors` itself.

    Returns:
        A function from `[obs]` to an action, or from `[batch, obs]` to `[batch, ...]` of them: whole numbers, or
        `[action]` in [-1, 1] as of every continuous environment here. It may be called inside compiled functions.

    Raises:
        UserError: there is no policy, or it is not whole.
    """
    return load(place).act


def load(place: str) -> Saved:
    """What `load_policy` gives, and how it was trained; the argument is the same.

    Raises:
        UserError: as there.
    """
    from purejax_bilevel.runtime import artefacts  # imports xarray, which `--help` of programs does not need

    where, number = artefacts.place_and_member(place)
    artefact = artefacts.load(where, *KINDS)
    found = _greedy(artefact, number, place)
    compiled = jax.jit(found.act)

    def act(obs: Any) -> jax.Array:
        obs = jnp.asarray(obs, jnp.result_type(float))
        if obs.ndim not in (1, 2) or obs.shape[-1] != found.obs_dim:
            raise UserError(f"the policy of {place} observes {found.obs_dim} numbers, got {list(obs.shape)}.")
        return compiled(obs) if obs.ndim == 2 else compiled(obs[None])[0]

    return Saved(act, {**artefact.about["config"], **artefact.about["members"][number]})


def _greedy(artefact: Any, number: int, place: str) -> Greedy:
    arrays, kind = artefact.member(number), artefact.about["kind"]
    try:
        if kind == Q_FUNCTION:
            return _of_q_function(arrays)
        if kind == ACTOR:
            return _of_actor(arrays)
        if any(name.startswith("params.") for name in arrays):
            return _of_actor_critic(arrays, artefact.about["config"]["activation"])
    except (KeyError, IndexError, ValueError, TypeError) as error:
        raise UserError(f"the {kind} of {place} is not whole: make it again.") from error
    from purejax_bilevel.programs.offline import saved_policies

    saved = saved_policies.load(place)
    return Greedy(len(saved.mean), lambda obs: saved_policies.mean_action(saved, obs))


def _of_q_function(arrays: Arrays) -> Greedy:
    heads = tuple(map(_layers, _listed(_nested(arrays)["q"])))
    return Greedy(heads[0][0].kernel.shape[0], lambda obs: networks.apply_heads(heads, obs.T).mean(0).argmax(0))


def _of_actor(arrays: Arrays) -> Greedy:
    from purejax_bilevel.programs.control import policies  # imports distrax

    network = _layers(_nested(arrays)["policy"])
    return Greedy(
        network[0].kernel.shape[0], lambda obs: policies.mean_action(networks.apply_network(network, obs.T)).T
    )


def _of_actor_critic(arrays: Arrays, activation: str) -> Greedy:
    from purejax_bilevel.programs.learned_optimizers import actor_critic, normalisation

    tree = _nested(arrays)
    seen = normalisation.Moments(**tree["observations"]) if "observations" in tree else None
    normaliser = normalisation.Normaliser(seen, None)

    def act(obs: jax.Array) -> jax.Array:
        obs = normalisation.observations(normaliser, obs)
        return actor_critic.mode(actor_critic.policy(tree["params"], obs, activation))

    return Greedy(tree["params"]["actor"]["Dense_0"]["kernel"].shape[0], act)


def _nested(arrays: Arrays) -> dict[str, Any]:
    """A tree of dictionaries from names such as `q.0.1.kernel`."""
    tree: dict[str, Any] = {}
    for name, array in arrays.items():
        *path, last = name.split(".")
        branch = tree
        for step in path:
            branch = branch.setdefault(step, {})
        branch[last] = jnp.asarray(array)
    return tree


def _listed(branch: Mapping[str, Any]) -> list[Any]:
    return [branch[str(number)] for number in range(len(branch))]


def _layers(branch: Mapping[str, Any]) -> networks.Apart:
    return tuple(networks.Layer(**layer) for layer in _listed(branch))

"""Policies that runs leave: written with their critics, and read by programs that go on from them.

The artefact's kind is `policy`. Its arrays have the same names on every platform.
"""

import functools
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from purejax_bilevel import networks
from purejax_bilevel.configuration import fields, replace
from purejax_bilevel.errors import UserError
from purejax_bilevel.networks import Apart
from purejax_bilevel.programs.control import policies
from purejax_bilevel.programs.offline.agents import DeterministicLearner, Learner, Units, init_learner
from purejax_bilevel.programs.offline.settings import ActorCritic, Networks
from purejax_bilevel.programs.saved_policies import POLICY

KIND = POLICY
C = TypeVar("C", bound=Networks)


class SavedPolicy(NamedTuple):
    """What is kept of a learner."""

    policy: Apart  # from observations in units of the data to means and log standard deviations
    q: tuple[Apart, ...]  # one for each critic
    target_q: tuple[Apart, ...]
    log_temperature: jax.Array  # []
    mean: jax.Array  # [obs], what observations are seen from
    std: jax.Array  # [obs], and in units of


def saved(learner: Learner) -> SavedPolicy:
    """What is kept of a learner; the networks one by one, whether they are joined here or not."""
    q, target_q = networks.apart(learner.q), networks.apart(learner.target_q)
    policy, units = networks.layers_of(learner.policy), learner.units
    return SavedPolicy(policy, q, target_q, learner.log_temperature, units.mean, units.std)


def continued(learner: Learner, policy: SavedPolicy) -> Learner:
    """A fresh learner with the networks, temperature and units of a policy; its optimisers start afresh."""
    policy = jax.tree.map(lambda leaf: jnp.asarray(leaf, learner.log_temperature.dtype), policy)
    network = networks.network_of(policy.policy)
    slow: Any = {"target_policy": network} if isinstance(learner, DeterministicLearner) else {}
    return learner.replace(
        policy=network,
        q=networks.joined(policy.q),
        target_q=networks.joined(policy.target_q),
        log_temperature=policy.log_temperature,
        units=learner.units._replace(mean=policy.mean, std=policy.std),
        **slow,
    )


# --- reading ----------------------------------------------------------------------------------------------------------


def with_architecture(config: C, obs_dim: int, action_dim: int, environment: str) -> C:
    """The configuration with the static settings of the networks of the policy that it names.

    Args:
        config: has `policy`, the place of one.
        obs_dim: of the environment.
        action_dim: of the environment.
        environment: its name.

    Raises:
        UserError: there is no policy, or it is for other observations or actions.
    """
    place: str = config.policy  # type: ignore[attr-defined]
    arrays, about = _read(place)
    found = _dimensions(arrays)
    if found != (obs_dim, action_dim):
        raise UserError(
            f"--policy {place} acts with {found[1]} numbers on observations of {found[0]}, those of --env_name "
            f"{environment} have {action_dim} and {obs_dim}."
        )
    return replace(config, **_settings(about))


def _read(place: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    from purejax_bilevel.runtime import artefacts

    where, member = artefacts.place_and_member(place)
    artefact = artefacts.load(where, KIND)
    return artefact.member(member), artefact.about


def _settings(about: dict[str, Any]) -> dict[str, Any]:
    """The settings of the networks, as the run that wrote them had them."""
    own = {field.name for field in fields(Networks, is_traced=False)}
    return {name: value for name, value in about["config"].items() if name in own}


def _dimensions(arrays: dict[str, np.ndarray]) -> tuple[int, int]:
    last = max(int(name.split(".")[1]) for name in arrays if name.startswith("policy."))
    return len(arrays["mean"]), len(arrays[f"policy.{last}.bias"]) // 2


@functools.cache  # programs that share a policy must return the same object
def load(place: str) -> SavedPolicy:
    """A policy that a run left; numpy arrays.

    Args:
        place: `runs/x` (its first member) or `runs/x#3`, or the file with the arrays.

    Raises:
        UserError: it is not there, not whole, or not what it says to be.
    """
    from purejax_bilevel.runtime import artefacts

    where, member = artefacts.place_and_member(place)
    artefact = artefacts.load(where, KIND)
    arrays = artefact.member(member)
    config = replace(ActorCritic(), **_settings(artefact.about))
    found: SavedPolicy = artefact.member(member, _shapes(config, *_dimensions(arrays)))
    return found


def _shapes(config: ActorCritic, obs_dim: int, action_dim: int) -> SavedPolicy:
    def made() -> SavedPolicy:
        units = Units(jnp.zeros(obs_dim), jnp.ones(obs_dim))
        return saved(init_learner(config, jax.random.key(0), units, action_dim))

    with jax.enable_x64(False):
        shapes: SavedPolicy = jax.eval_shape(made)
    return shapes


# --- acting -----------------------------------------------------------------------------------------------------------


def mean_action(policy: SavedPolicy, obs: jax.Array) -> jax.Array:
    """Actions `[batch, action]` of the policy without its noise, at observations `[batch, obs]`."""
    seen = (obs - policy.mean) / policy.std
    return policies.mean_action(networks.apply_network(policy.policy, seen.T)).T

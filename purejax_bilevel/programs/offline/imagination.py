"""Rollouts of a policy in an ensemble, a step at a time, into a ring buffer; and what the ensemble thinks they earn.

Some rollouts are always under way, each at its own step: those that ended begin anew at an observation of the dataset.
So every update of the agent goes with one step of all rollouts, whatever their length, and the length may be traced.
(The original's scheme; MBPO's and MOPO's, all rollouts at once every thousand updates, gives as many transitions.)
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from purejax_bilevel import replay
from purejax_bilevel.programs.offline import buffers, ensemble, uncertainty
from purejax_bilevel.programs.offline.buffers import Ring
from purejax_bilevel.programs.offline.modes import mode_named
from purejax_bilevel.programs.offline.pessimism import Imagined, pessimise

Policy = Callable[[jax.Array, jax.Array], jax.Array]
"""Actions `[batch, action]` for observations `[batch, obs]` and a key."""


@dataclasses.dataclass(frozen=True)
class World:
    """An ensemble as an environment.

    Args:
        architecture: of the ensemble.
        networks: its arrays.
        normaliser: of the data that it was fitted to.
        ranking: numbers of its networks, the best first, `[network]`.
        num_elites: how many of them predict; may be traced.
        terminates: which observations `[batch, obs]` end an episode, `[batch]`; None: what the ensemble says, if it
            does.
    """

    architecture: ensemble.Architecture
    networks: ensemble.Networks
    normaliser: ensemble.Normaliser
    ranking: jax.Array
    num_elites: jax.Array | int
    terminates: Callable[[jax.Array], jax.Array] | None

    @property
    def used(self) -> jax.Array:
        """Which networks predict, booleans `[network]`."""
        return ensemble.elite_mask(self.ranking, self.num_elites)

    def predict(self, obs: jax.Array, action: jax.Array) -> ensemble.Prediction:
        """What every network says of `[batch, obs]` and `[batch, action]`."""
        return ensemble.predict(self.architecture, self.networks, self.normaliser, obs, action)

    def uncertainty(self, kind: str, prediction: ensemble.Prediction) -> jax.Array:
        """Uncertainty `[batch]` of the elites' predictions, 0 where the kind is ""."""
        if not kind:
            return jnp.zeros(prediction.mean.shape[1], prediction.mean.dtype)
        return uncertainty.uncertainty(kind, prediction, self.normaliser, self.used)

    def imagined(self, prediction: ensemble.Prediction, key: jax.Array) -> Imagined:
        """What comes next, of each row by one elite that is drawn for it, with noise."""
        elite_key, noise_key = jax.random.split(key)
        network = ensemble.elites(elite_key, self.ranking, self.num_elites, prediction.mean.shape[1])
        noise = jax.random.normal(noise_key, prediction.mean.shape, prediction.mean.dtype)
        return imagined(prediction, noise, network, self.used, self.terminates)


def imagined(
    prediction: ensemble.Prediction,
    noise: jax.Array,
    network: jax.Array,
    used: jax.Array,
    terminates: Callable[[jax.Array], jax.Array] | None,
) -> Imagined:
    """What comes next, of each row by one network; rows that are not finite are of no use.

    Args:
        prediction: of all networks.
        noise: standard normals `[network, batch, obs + 1]`.
        network: of each row, `[batch]`.
        used: which networks count for the mean and the lowest reward, booleans `[network]`.
        terminates: as in `World`.
    """
    samples, rewards = ensemble.sampled(prediction, noise), prediction.mean[..., -1]
    own = jnp.take_along_axis(samples, network[None, :, None], 0)[0]
    next_obs, is_used = own[:, :-1], used[:, None]
    if terminates is not None:
        terminated = terminates(next_obs)
    elif prediction.terminal_logit is not None:
        terminated = jnp.take_along_axis(prediction.terminal_logit, network[None], 0)[0] > 0
    else:
        terminated = jnp.zeros(network.shape, bool)
    return Imagined(
        next_obs=next_obs,
        reward=own[:, -1],
        terminated=terminated,
        mean_reward=jnp.where(is_used, rewards, 0.0).sum(0) / used.sum(),
        lowest_reward=jnp.where(is_used, samples[..., -1], jnp.inf).min(0),
        is_used=jnp.isfinite(own).all(1),
    )


# --- rollouts ---------------------------------------------------------------------------------------------------------


class Rollouts(NamedTuple):
    """Where they are."""

    obs: jax.Array  # [rollouts, obs]
    length: jax.Array  # [rollouts], steps so far
    goes_on: jax.Array  # [rollouts], booleans


class Pessimism(NamedTuple):
    """How predictions are seen; the numbers are absolute ones."""

    mode: str
    kind: str  # of uncertainty
    pessimism: jax.Array | float
    threshold: jax.Array | float
    r_max: jax.Array | float


def no_rollouts(count: int, obs_dim: int) -> Rollouts:
    """Before their first step: all are to begin."""
    return Rollouts(jnp.zeros((count, obs_dim)), jnp.zeros(count, jnp.int32), jnp.zeros(count, bool))


def advance(
    world: World,
    policy: Policy,
    pessimism: Pessimism,
    rollouts: Rollouts,
    ring: Ring,
    starts: jax.Array,
    key: jax.Array,
    length: jax.Array | int,
) -> tuple[Rollouts, Ring, jax.Array]:
    """One step of all rollouts.

    A transition that ends a rollout by its length is not terminal. What comes after an end is not stored.

    Args:
        world: where they go.
        policy: acts.
        pessimism: how predictions are stored.
        rollouts: where they are.
        ring: takes their transitions.
        starts: observations `[rollouts, obs]` for those that begin.
        key: consumed.
        length: steps of a rollout at most; may be traced.

    Returns:
        Rollouts, ring, and the uncertainties `[rollouts]`.
    """
    action_key, model_key = jax.random.split(key)
    obs = jnp.where(rollouts.goes_on[:, None], rollouts.obs, starts)
    steps = jnp.where(rollouts.goes_on, rollouts.length, 0) + 1
    action = policy(obs, action_key)
    prediction = world.predict(obs, action)
    doubt = world.uncertainty(pessimism.kind, prediction)
    plain = world.imagined(prediction, model_key)
    seen = pessimise(plain, doubt, pessimism.mode, pessimism.pessimism, pessimism.threshold, pessimism.r_max)
    is_used = seen.is_used & jnp.isfinite(seen.reward)
    rows = replay.packed(obs, action, seen.reward, seen.next_obs, seen.terminated.astype(obs.dtype))
    goes_on = is_used & ~seen.terminated & (steps < length)
    return Rollouts(seen.next_obs, steps, goes_on), buffers.store(ring, rows, is_used), doubt


def kind_of(mode: str, given: str) -> str:
    """The kind of uncertainty that a mode looks at, unless another is given."""
    own = mode_named(mode).uncertainty
    return own if given == "mode" or not own else given


def expected_return(world: World, policy: Policy, obs: jax.Array, key: jax.Array, steps: int) -> jax.Array:
    """Mean undiscounted return of episodes from `[episodes, obs]` on as the model has them, without pessimism."""

    def advance(carry: tuple, i: jax.Array) -> tuple[tuple, None]:
        obs, alive, returns = carry
        action_key, model_key = jax.random.split(jax.random.fold_in(key, i))
        plain = world.imagined(world.predict(obs, policy(obs, action_key)), model_key)
        alive = alive & plain.is_used
        returns = returns + jnp.where(alive, plain.reward, 0.0)
        return (jnp.where(alive[:, None], plain.next_obs, obs), alive & ~plain.terminated, returns), None

    count = obs.shape[0]
    start = (obs, jnp.ones(count, bool), jnp.zeros(count, obs.dtype))
    return jax.lax.scan(advance, start, jnp.arange(steps))[0][2].mean()


def largest_uncertainty(
    world: World,
    kind: str,
    rows: jax.Array,
    obs_dim: int,
    most: int = 20_000,
    chunk: int = 2_000,
    stored: jax.Array | None = None,
) -> jax.Array:
    """u_max: the largest uncertainty of transitions of the dataset, of at most `most` rows spread evenly over it.

    Args:
        world: whose uncertainty.
        kind: of uncertainty.
        rows: `[rows, row]`.
        obs_dim: entries of an observation.
        most: rows looked at.
        chunk: rows at a time.
        stored: how many of the first rows there are; None: all.
    """
    if not kind:
        return jnp.ones(())
    count = min(rows.shape[0], most)
    chunk = min(chunk, count)
    number = -(-count // chunk)
    last = rows.shape[0] - 1 if stored is None else stored - 1
    place = jnp.linspace(0, last, number * chunk).astype(jnp.int32).reshape(number, chunk)

    def of_chunk(place: jax.Array) -> jax.Array:
        batch = replay.unpacked(rows[place], obs_dim)
        return world.uncertainty(kind, world.predict(batch.obs.T, batch.action.T)).max()

    return jax.lax.map(of_chunk, place).max()

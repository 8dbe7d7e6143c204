"""What is done for the agents whose lives have ended in a meta-step: few of the population, so that it costs little."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from purejax_bilevel.environments.grid_world import optimal_return
from purejax_bilevel.programs.meta_objectives import worlds
from purejax_bilevel.programs.meta_objectives.learners import Network
from purejax_bilevel.programs.meta_objectives.worlds import World

PARTS = 32  # of the population: as many agents as a part has are gone through at a time


def of_finished(function: Callable[[Any], Any], given: Any, finished: jax.Array) -> Any:
    """A function of some of the agents, a few at a time; of none, if nobody's life has ended.

    Args:
        function: of one agent.
        given: leaves `[agents, ...]`; no keys, whose single use could not be seen: see `jax.random.key_data`.
        finished: `[agents]`, of which agents.

    Returns:
        Leaves `[agents, ...]`, zeros for the others.
    """
    agents = finished.shape[0]
    at_once = -(-agents // PARTS)
    order, count = jnp.argsort(~finished), finished.sum()  # stable: the finished ones come first
    order = jnp.concatenate([order, jnp.full(at_once, agents, order.dtype)])
    shapes = jax.eval_shape(function, jax.tree.map(lambda leaf: leaf[0], given))
    nothing = jax.tree.map(lambda leaf: jnp.zeros((agents, *leaf.shape), leaf.dtype), shapes)

    def some(i: jax.Array, found: Any) -> Any:
        numbers = i * at_once + jnp.arange(at_once)
        places = order[numbers]
        results = jax.vmap(function)(jax.tree.map(lambda leaf: leaf[jnp.minimum(places, agents - 1)], given))
        places = jnp.where(numbers < count, places, agents)
        return jax.tree.map(lambda whole, new: whole.at[places].set(new, mode="drop"), found, results)

    return jax.lax.fori_loop(0, (count + at_once - 1) // at_once, some, nothing)


def replaced(finished: jax.Array, old: Any, new: Any) -> Any:
    """Leaves `[agents, ...]`: the new ones where finished."""
    return jax.vmap(lambda which, *both: jax.tree.map(lambda a, b: jnp.where(which, a, b), *both))(finished, new, old)


def last_returns(
    world: World, actors: Network, params: Any, finished: jax.Array, keys: jax.Array, episodes: int
) -> jax.Array:
    """Mean undiscounted returns of whole episodes by the last policies of agents.

    All policies of an agent play with the same key.

    Args:
        world: where they live.
        actors: leaves `[agents, policies, ...]`.
        params: of their environments, leaves `[agents, ...]`.
        finished: `[agents]`.
        keys: `[agents]`, consumed.
        episodes: per policy, side by side.

    Returns:
        `[agents, policies]`, NaN where not finished.
    """

    def play(actor: Network, params: Any, data: jax.Array) -> jax.Array:
        return worlds.play(world, params, actor, jax.random.wrap_key_data(data), episodes).mean()

    every_policy = lambda given: jax.vmap(play, (0, None, None))(*given)  # noqa: E731
    found = of_finished(every_policy, (actors, params, jax.random.key_data(keys)), finished)
    return jnp.where(finished[:, None], found, jnp.nan)


def last_optima(params: Any, finished: jax.Array) -> jax.Array:
    """The best returns `[agents]` in the levels `[agents, ...]` of finished agents, NaN where not finished."""
    return jnp.where(finished, of_finished(optimal_return, params, finished), jnp.nan)

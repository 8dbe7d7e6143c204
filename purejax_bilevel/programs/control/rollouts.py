"""Playing episodes with a fixed policy, for evaluations and videos.

A policy is a function of observations `[obs, n]` and a key, giving one action for each: `[n]` or `[n, action]`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from purejax_bilevel.environments import Environment

Policy = Callable[[jax.Array, jax.Array], jax.Array]


def evaluate(
    environment: Environment,
    params: Any,
    max_steps: int,
    policy: Policy,
    key: jax.Array,
    num_episodes: int,
    num_final_episodes: int,
    is_last: jax.Array,
    discount: jax.Array | float | None = None,
) -> dict[str, jax.Array]:
    """Plays the episodes of an evaluation, more of them in the last one.

    Args:
        environment: speaks the gymnax interface.
        params: the environment's parameters.
        max_steps: no episode takes more.
        policy: see above.
        key: consumed.
        num_episodes: of an evaluation.
        num_final_episodes: of the last evaluation.
        is_last: whether this is the last one; may be traced.
        discount: of the returns that are summed with one too; None: none are.

    Returns:
        `evaluation_return` (mean over the episodes played), with a discount `discounted_return` too, and `final_return`
        `[num_final_episodes]`, all played in the last evaluation: a NaN there is a return that is not a number. Before
        it, NaN stands for episodes not played.
    """
    played = jnp.arange(max(num_episodes, num_final_episodes)) < jnp.where(is_last, num_final_episodes, num_episodes)
    returns, discounted = _play(environment, params, max_steps, policy, key, played, discount)
    mean = lambda returns: jnp.sum(jnp.where(played, returns, 0.0)) / played.sum().astype(returns.dtype)  # noqa: E731
    found = {
        "evaluation_return": mean(returns),
        "final_return": jnp.where(played, returns, jnp.nan)[:num_final_episodes],
    }
    return found if discounted is None else {**found, "discounted_return": mean(discounted)}


def _play(
    environment: Environment,
    params: Any,
    max_steps: int,
    policy: Policy,
    key: jax.Array,
    played: jax.Array,
    discount: jax.Array | float | None,
) -> tuple[jax.Array, jax.Array | None]:
    num_episodes = played.shape[0]
    reset_key, key = jax.random.split(key)
    reset = jax.vmap(environment.reset, (0, None))
    # Without the automatic reset of `step`, which would cost more than the rest: an episode is played once.
    step = jax.vmap(environment.step_env, (0, 0, 0, None))
    is_truncated = jax.vmap(environment.is_truncated, (0, None))
    obs, start = reset(jax.random.split(reset_key, num_episodes), params)

    def unfinished(carry: tuple) -> jax.Array:
        i, alive, *_ = carry
        return alive.any() & (i < max_steps)

    def advance(carry: tuple) -> tuple:
        i, alive, returns, discounted, obs, state = carry
        policy_key, step_key = jax.random.split(jax.random.fold_in(key, i))
        action = policy(obs.T.astype(returns.dtype), policy_key)
        keys = jax.random.split(step_key, num_episodes)
        obs, state, reward, terminated, _ = step(keys, state, action, params)
        returns = returns + jnp.where(alive, reward, 0.0)
        if discount is not None:
            discounted = discounted + jnp.where(alive, discount**i * reward, 0.0)
        alive = alive & ~(terminated | is_truncated(state, params))
        return i + 1, alive, returns, discounted, obs, state

    none = None if discount is None else jnp.zeros(num_episodes)
    carry = (jnp.int32(0), played, jnp.zeros(num_episodes), none, obs, start)
    return jax.lax.while_loop(unfinished, advance, carry)[2:4]


def episode(
    environment: Environment, params: Any, max_steps: int, policy: Policy, key: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Plays one episode for a video; arguments as for `evaluate`.

    Returns:
        Observations `[max_steps, obs]` and whether the episode was still going on `[max_steps]`.
    """
    reset_key, key = jax.random.split(key)

    def advance(carry: tuple, i: jax.Array) -> tuple[tuple, tuple[jax.Array, jax.Array]]:
        obs, state, alive = carry
        policy_key, step_key = jax.random.split(jax.random.fold_in(key, i))
        action = policy(obs[:, None].astype(jnp.result_type(float)), policy_key)[0]
        next_obs, state, _, terminated, truncated, _ = environment.step(step_key, state, action, params)
        return (next_obs, state, alive & ~(terminated | truncated)), (obs, alive)

    start = (*environment.reset(reset_key, params), jnp.bool_(True))
    return jax.lax.scan(advance, start, jnp.arange(max_steps))[1]

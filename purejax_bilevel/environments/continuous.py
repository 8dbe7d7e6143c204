"""Continuous actions in [-1, 1] for every environment, and observations that may carry distractors.

A distractor is a standard normal number that says nothing about the state, drawn afresh for every observation (the
distractor study of OMD, Nikishin et al. 2021, arXiv 2106.03273). The physics never sees it.
"""

from typing import Any

import jax
import jax.numpy as jnp

from purejax_bilevel.environments._gymnax import Environment, spaces
from purejax_bilevel.environments.wrapped import Wrapped

# Streams of random numbers of one step or reset: a constant each, so that distractors move nothing else.
PHYSICS, DISTRACTORS, FINAL_DISTRACTORS = range(3)


class UnitActions(Wrapped):
    """Wraps a gymnax environment with bounded actions `[action]`.

    Actions are clipped to [-1, 1] and mapped onto the wrapped environment's bounds.

    Args:
        environment: its action space is a `Box` with one axis.
        dim_distract: number of distractors after each observation.
    """

    def __init__(self, environment: Environment, dim_distract: int = 0):
        super().__init__(environment)
        self.dim_distract = dim_distract

    def reset_env(self, key: jax.Array, params: Any) -> tuple[jax.Array, Any]:
        obs, state = self.wrapped.reset_env(jax.random.fold_in(key, PHYSICS), params)
        return self._distract(key, DISTRACTORS, obs), state

    def step_env(
        self, key: jax.Array, state: Any, action: jax.Array, params: Any
    ) -> tuple[jax.Array, Any, jax.Array, jax.Array, dict]:
        obs, state, reward, terminated, info = self.wrapped.step_env(
            jax.random.fold_in(key, PHYSICS), state, self._bounded(action, params), params
        )
        return self._distract(key, FINAL_DISTRACTORS, obs), state, reward, terminated, info

    def step(
        self, key: jax.Array, state: Any, action: jax.Array, params: Any = None
    ) -> tuple[jax.Array, Any, jax.Array, jax.Array, jax.Array, dict]:
        """One step with the wrapped environment's own automatic reset, which may be cheaper than the general one."""
        if params is None:
            params = self.default_params
        obs, state, reward, terminated, truncated, info = self.wrapped.step(
            jax.random.fold_in(key, PHYSICS), state, self._bounded(action, params), params
        )
        final = self._distract(key, FINAL_DISTRACTORS, info["final_observation"])
        if self.dim_distract:  # the observation after a reset has distractors of its own
            obs = jnp.where(terminated | truncated, self._distract(key, DISTRACTORS, obs), final)
        return obs, state, reward, terminated, truncated, info | {"final_observation": final}

    def action_space(self, params: Any = None) -> spaces.Box:
        return spaces.Box(-1.0, 1.0, self.wrapped.action_space(params).shape)

    def observation_space(self, params: Any) -> spaces.Box:
        space = self.wrapped.observation_space(params)
        free = jnp.full(self.dim_distract, jnp.inf)
        low, high = (jnp.broadcast_to(bound, space.shape) for bound in (space.low, space.high))
        shape = (space.shape[0] + self.dim_distract,)
        return spaces.Box(jnp.concatenate([low, -free]), jnp.concatenate([high, free]), shape)

    def _bounded(self, action: jax.Array, params: Any) -> jax.Array:
        space = self.wrapped.action_space(params)
        middle, half = (space.high + space.low) / 2, (space.high - space.low) / 2
        return middle + half * jnp.clip(action, -1.0, 1.0)

    def _distract(self, key: jax.Array, stream: int, obs: jax.Array) -> jax.Array:
        if not self.dim_distract:
            return obs
        noise = jax.random.normal(jax.random.fold_in(key, stream), (self.dim_distract,), obs.dtype)
        return jnp.concatenate([obs, noise])

"""Observations of any shape, such as the images of MinAtar, as vectors."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from purejax_bilevel.environments._gymnax import spaces
from purejax_bilevel.environments.wrapped import Wrapped


class FlatObservations(Wrapped):
    """Wraps a gymnax environment; its observations are reshaped to `[obs]`."""

    def reset_env(self, key: jax.Array, params: Any) -> tuple[jax.Array, Any]:
        obs, state = self.wrapped.reset_env(key, params)
        return obs.ravel(), state

    def step_env(
        self, key: jax.Array, state: Any, action: jax.Array, params: Any
    ) -> tuple[jax.Array, Any, jax.Array, jax.Array, dict]:
        obs, *others = self.wrapped.step_env(key, state, action, params)
        return obs.ravel(), *others

    def observation_space(self, params: Any) -> spaces.Box:
        space = self.wrapped.observation_space(params)
        low, high = (jnp.broadcast_to(bound, space.shape).ravel() for bound in (space.low, space.high))
        return spaces.Box(low, high, (int(np.prod(space.shape)),))

"""Non-stationary reward (SmoothFBO's CartPole): it counts only while one observation lies in an interval that may
drift.

The interval is part of the traced environment parameters, so it may change at every step and differ between members.
"""

import copy
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from purejax_bilevel.environments._gymnax import Environment

# Pole angle in radians; CartPole ends beyond +-0.2095.
START_INTERVAL = (-0.2095, 0.06)
END_INTERVAL = (-0.06, 0.2095)
POLE_ANGLE = 2


@flax.struct.dataclass
class IntervalParams:
    """Parameters of the wrapped environment and the interval in which its reward counts."""

    environment: Any
    low: jax.Array | float = START_INTERVAL[0]
    high: jax.Array | float = START_INTERVAL[1]

    @property
    def max_steps_in_episode(self) -> int:
        """Time limit of the wrapped environment."""
        return self.environment.max_steps_in_episode


class RewardInterval(Environment):
    """Wraps a gymnax environment: the reward is kept where `low <= observation[index] <= high`, else 0.

    The observation judged is the one the step leads to, before any auto-reset.
    """

    def __init__(self, environment: Environment, index: int = POLE_ANGLE):
        super().__init__()
        self.wrapped = copy.copy(environment)
        self.index = index

    @property
    def default_params(self) -> IntervalParams:
        return IntervalParams(self.wrapped.default_params)

    @property
    def num_actions(self) -> int:
        return self.wrapped.num_actions

    def reset_env(self, key: jax.Array, params: IntervalParams) -> tuple[Any, Any]:
        return self.wrapped.reset_env(key, params.environment)

    def step_env(
        self, key: jax.Array, state: Any, action: jax.Array, params: IntervalParams
    ) -> tuple[Any, Any, jax.Array, jax.Array, dict]:
        obs, state, reward, terminated, info = self.wrapped.step_env(key, state, action, params.environment)
        judged = obs[self.index]
        inside = (judged >= params.low) & (judged <= params.high)
        return obs, state, jnp.where(inside, reward, 0.0), terminated, info

    def is_terminated(self, state: Any, params: IntervalParams) -> jax.Array:
        return self.wrapped.is_terminated(state, params.environment)

    def action_space(self, params: IntervalParams | None = None) -> Any:
        return self.wrapped.action_space(None if params is None else params.environment)

    def observation_space(self, params: IntervalParams) -> Any:
        return self.wrapped.observation_space(params.environment)

    @property
    def name(self) -> str:
        return self.wrapped.name


def drift_position(t: jax.Array, transition_steps: jax.Array | int, plateau_steps: jax.Array | int) -> jax.Array:
    """Where the interval stands at step `t`, from 0 (start) to 1 (end).

    It rests for `plateau_steps`, moves linearly to the other end in `transition_steps`, rests, moves back, and so on.
    """
    period = plateau_steps + transition_steps
    moved = jnp.clip((t % period - plateau_steps) / transition_steps, 0.0, 1.0)
    return jnp.where((t // period) % 2 == 0, moved, 1.0 - moved)


def last_transition_end(t: jax.Array, transition_steps: jax.Array | int, plateau_steps: jax.Array | int) -> jax.Array:
    """The step at which the latest transition up to step `t` ended; 0 if none has."""
    period = plateau_steps + transition_steps
    return (t // period) * period


def interval_params(environment_params: Any, position: jax.Array) -> IntervalParams:
    """The interval at `position` (0..1) between the start and the end interval."""
    low, high = ((1.0 - position) * a + position * b for a, b in zip(START_INTERVAL, END_INTERVAL, strict=True))
    return IntervalParams(environment_params, low, high)

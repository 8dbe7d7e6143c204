"""When episodes end, as a function of the next observation alone: for models, and to check datasets.

The rules are those of the environments themselves; time limits are not among them.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

Termination = Callable[[jax.Array], jax.Array]


def never(next_obs: jax.Array) -> jax.Array:
    """No observation `[..., obs]` ends an episode: `[...]` booleans."""
    return jnp.zeros(next_obs.shape[:-1], bool)


def hopper(next_obs: jax.Array) -> jax.Array:
    """Falls, leans or leaves what is finite; the upper limit is one-sided, as in the code of the reference."""
    height, angle = next_obs[..., 0], next_obs[..., 1]
    alive = jnp.isfinite(next_obs).all(-1) & (next_obs[..., 1:] < 100).all(-1)
    return ~(alive & (height > 0.7) & (jnp.abs(angle) < 0.2))


def walker2d(next_obs: jax.Array) -> jax.Array:
    """Falls, jumps or leans."""
    height, angle = next_obs[..., 0], next_obs[..., 1]
    return ~((height > 0.8) & (height < 2.0) & (angle > -1.0) & (angle < 1.0))


def mountain_car_continuous(next_obs: jax.Array) -> jax.Array:
    """Reaches the goal."""
    return (next_obs[..., 0] >= 0.45) & (next_obs[..., 1] >= 0.0)


KNOWN: dict[str, Termination] = {
    "hopper": hopper,
    "walker2d": walker2d,
    "halfcheetah": never,
    "pendulum-v1": never,
    "mountaincarcontinuous-v0": mountain_car_continuous,
}


def of(environment: str) -> Termination | None:
    """The rule of an environment, also of a dataset that is named after one (`hopper-medium-v2`); None: not known."""
    name = environment.lower().partition(":")[0]
    found = KNOWN.get(name, KNOWN.get(name.partition("-")[0]))
    return never if found is None and name.endswith("swingup") else found

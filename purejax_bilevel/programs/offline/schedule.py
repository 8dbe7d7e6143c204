"""When an agent in the environment does what: pure functions of the step, which all members share.

With a fit of the ensemble every 250 steps and a random start of 1000 steps:

    step            0 .. 999            1000                1001 .. 1249        1250
    actions         uniform             the policy's        the policy's        the policy's
    ensemble        -                   fitted before it    -                   fitted before it
    updates         -                   after it            after it            after it

An ensemble that is given is fitted on after `model_every` steps for the first time, also before learning starts.
(Mr-Pepe's rules, `model_needs_training`.)
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

EPSILON = 1e-4  # of a step: lengths that are whole numbers are not rounded down


class Schedule(NamedTuple):
    """Numbers of steps."""

    init_steps: int  # before learning starts
    random_steps: int  # with uniform actions
    model_every: int  # between fits
    is_fitted: bool  # whether an ensemble is given

    def fits(self, t: jax.Array | int) -> jax.Array:
        """Whether the ensemble is fitted before step `t`."""
        if self.is_fitted:
            return (jnp.asarray(t) > 0) & (jnp.asarray(t) % self.model_every == 0)
        since = jnp.asarray(t) - self.init_steps
        return (since >= 0) & (since % self.model_every == 0)

    def is_random(self, t: jax.Array | int) -> jax.Array:
        """Whether the actions of step `t` are uniform."""
        return jnp.asarray(t) < self.random_steps


def rollout_length(
    t: jax.Array | int,
    first: jax.Array | int,
    last: jax.Array | int,
    start: jax.Array | int,
    end: jax.Array | int,
) -> jax.Array:
    """Steps of a rollout at step `t`: whole numbers on the line from one length to the other (MBPO).

    Args:
        t: number of the step.
        first: length up to step `start`.
        last: length from step `end` on; 0: as `first`.
        start: step at which rollouts begin to get longer.
        end: step from which on they have their last length.
    """
    last = jnp.where(jnp.asarray(last) == 0, first, last)
    share = jnp.clip((jnp.asarray(t) - start) / jnp.maximum(end - start, 1), 0.0, 1.0)
    return jnp.floor(first + share * (last - first) + EPSILON).astype(jnp.int32)

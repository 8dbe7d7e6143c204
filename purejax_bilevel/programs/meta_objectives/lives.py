"""Whole lives of agents under candidate objectives: the fitness that an evolution strategy climbs.

A life is hundreds of updates, through which no gradient goes. Lives differ in length: sorted by it, those of about the
same length are lived side by side, and no part lasts longer than its longest life.
Source: Jackson et al. 2024, "Discovering temporally-aware reinforcement learning algorithms" (TA-LPG), section 4.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from purejax_bilevel.programs.meta_objectives import population
from purejax_bilevel.programs.meta_objectives.curriculum import Lot
from purejax_bilevel.programs.meta_objectives.network import Weights
from purejax_bilevel.programs.meta_objectives.settings import ObjectiveTraining
from purejax_bilevel.programs.meta_objectives.worlds import World


class Candidate(NamedTuple):
    """An objective and the life that it is tried on, leaves `[candidates, ...]`."""

    weights: Weights
    lot: Lot
    key: jax.Array  # of all that chance decides in the life: the same for both of a pair


def fitness(world: World, config: ObjectiveTraining, candidates: Candidate, parts: int) -> jax.Array:
    """Mean undiscounted returns `[candidates]` of whole episodes by the last policies of their agents.

    Args:
        world: where agents live.
        config: of one member.
        candidates: to be tried.
        parts: that they are divided in, lived one after another; a divisor of the population.
    """
    order = jnp.argsort(candidates.lot.lifetime)
    parts = math.gcd(parts, order.size)  # where devices share the candidates
    divided = jax.tree.map(lambda leaf: leaf[order].reshape(parts, -1, *leaf.shape[1:]), candidates)

    def live_part(part: Candidate) -> jax.Array:
        longest = part.lot.lifetime.max()
        return jax.vmap(lambda candidate: live(world, config, candidate, longest))(part)

    found = jax.lax.map(live_part, divided).ravel()
    return jnp.zeros_like(found).at[order].set(found)


def live(world: World, config: ObjectiveTraining, candidate: Candidate, longest: jax.Array) -> jax.Array:
    """Mean return `[]` of an agent at the end of its life; it does not depend on `longest`, if that is long enough.

    Args:
        world: where it lives.
        config: of one member.
        candidate: one.
        longest: updates after which it is over for sure.
    """
    weights, lot, key = candidate
    return population.trial(world, config, weights, lot.params, key, lifetime=lot.lifetime, longest=longest)

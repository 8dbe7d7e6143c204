"""Which level an agent lives on: a new random one, one of a fixed set, or one that is replayed by its score.

Levels have numbers, from which they are drawn: number n of a mode is what `GridWorld-<mode>-<n>` is everywhere. A life
comes with its level: the same number, the same lifetime.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from purejax_bilevel.program import own_individuals, population_gather
from purejax_bilevel.programs.meta_objectives import endings, level_buffer
from purejax_bilevel.programs.meta_objectives.level_buffer import LevelBuffer, Prior
from purejax_bilevel.programs.meta_objectives.scores import Score

MOST_NUMBERS = 2**24  # of levels: those that 32-bit floats can tell apart


class Lot(NamedTuple):
    """What a life is spent on."""

    number: jax.Array  # [], of the level
    params: Any  # of the environment
    lifetime: jax.Array  # [], in updates


class Ended(NamedTuple):
    """What has become of agents' lives, leaves `[agents]`."""

    finished: jax.Array  # the other entries are of no meaning where not
    slot: jax.Array
    score: jax.Array
    reference: jax.Array


class Curriculum(NamedTuple):
    """The way to choose levels.

    Args:
        score: what levels are chosen by.
        agents: in the population.
        slots: levels of the buffer or of the fixed set.
        draw: `number -> Lot`.
        release: whether the buffer's flags are those of GROOVE's released code (B5).
    """

    score: Score
    agents: int
    slots: int
    draw: Callable[[jax.Array], Lot]
    release: bool = False

    @property
    def has_buffer(self) -> bool:
        """Whether levels are kept at all."""
        return self.score.is_fixed or self.score.measure is not None

    def begin(self, key: jax.Array) -> tuple[LevelBuffer | None, jax.Array, Lot]:
        """Before the first life.

        Args:
            key: consumed; the same on all devices.

        Returns:
            The buffer; slots and lots of the agents on this device, `[agents here]`.
        """
        own = own_individuals(self.agents)
        if not self.has_buffer:
            return None, jnp.zeros_like(own), jax.vmap(self.draw)(_numbers(key, own))
        set_key, choice_key = jax.random.split(key)
        buffer = level_buffer.new_buffer(jax.vmap(self.draw)(_numbers(set_key, jnp.arange(self.slots))))
        if self.score.is_fixed:
            slots = jax.random.randint(choice_key, (self.agents,), 0, self.slots)
        else:
            slots = jnp.arange(self.agents)
            buffer = buffer.replace(active=jnp.arange(self.slots) < self.agents)
        return buffer, slots[own], _taken(buffer, slots[own])

    def renew(
        self, key: jax.Array, buffer: LevelBuffer | None, ended: Ended, p_replay: Any, prior: Prior, now: jax.Array
    ) -> tuple[LevelBuffer | None, jax.Array, Lot, jax.Array]:
        """Gives the agents whose lives have ended their next lots.

        Args:
            key: consumed; the same on all devices.
            buffer: as it is.
            ended: of the agents on this device.
            p_replay: probability of a replay.
            prior: of replays.
            now: the time.

        Returns:
            The buffer; slots and lots of the agents on this device `[agents here]`, lots of no meaning for agents that
            live on; which of them replay.
        """
        number_key, choice_key = jax.random.split(key)
        own = own_individuals(self.agents)
        if self.score.is_fixed:
            drawn = jax.random.randint(choice_key, (self.agents,), 0, self.slots)[own]
            slots = jnp.where(ended.finished, drawn, ended.slot)
            return buffer, slots, _taken(buffer, slots), jnp.zeros_like(ended.finished)
        fresh = endings.of_finished(self.draw, _numbers(number_key, own), ended.finished)
        if buffer is None:
            return None, ended.slot, fresh, jnp.zeros_like(ended.finished)
        everyone, fresh = population_gather((ended, fresh))
        spare = level_buffer.replaceable(buffer, self.agents)
        buffer = level_buffer.refill(buffer, spare, fresh, everyone.finished, self.release)
        buffer = level_buffer.record(buffer, everyone.slot, everyone.finished, everyone.score, everyone.reference)
        given = (choice_key, buffer, everyone.finished, spare, p_replay, prior, now)
        buffer, slots, replays = level_buffer.hand_out(*given)
        slots = jnp.where(ended.finished, slots[own], ended.slot)
        return buffer, slots, _taken(buffer, slots), replays[own]


def _numbers(key: jax.Array, agents: jax.Array) -> jax.Array:
    """A random number of a level for each agent, whatever device it is on."""
    draw = lambda agent: jax.random.randint(jax.random.fold_in(key, agent), (), 0, MOST_NUMBERS)  # noqa: E731
    return jax.vmap(draw)(agents)


def _taken(buffer: LevelBuffer | None, slots: jax.Array) -> Lot:
    assert buffer is not None, "levels are kept"
    return jax.tree.map(lambda whole: whole[slots], buffer.levels)

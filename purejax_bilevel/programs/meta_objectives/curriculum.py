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
from purejax_bilevel.programs.meta_objectives.level_buffer import LevelBuffer, Prior, Scalar
from purejax_bilevel.programs.meta_objectives.scores import Score
from purejax_bilevel.programs.meta_objectives.settings import ObjectiveTraining
from purejax_bilevel.programs.meta_objectives.worlds import World

LIFETIME = 1  # stream of random numbers of a level, which draws itself without one
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
    number: jax.Array  # of the level
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

    def begin(self, key: jax.Array) -> tuple[LevelBuffer | None, jax.Array, jax.Array]:
        """Before the first life.

        Args:
            key: consumed; the same on all devices.

        Returns:
            The buffer; slots and numbers of the levels of the agents on this device, `[agents here]`.
        """
        own = own_individuals(self.agents)
        if not self.has_buffer:
            return None, jnp.zeros_like(own), numbers(key, own)
        set_key, choice_key = jax.random.split(key)
        buffer = level_buffer.new_buffer(jax.vmap(self.draw)(numbers(set_key, jnp.arange(self.slots))))
        if self.score.is_fixed:
            slots = jax.random.randint(choice_key, (self.agents,), 0, self.slots)
        else:
            slots = jnp.arange(self.agents)
            buffer = buffer.replace(active=jnp.arange(self.slots) < self.agents)
        return buffer, slots[own], buffer.levels.number[slots[own]]

    def lots(self, buffer: LevelBuffer | None, slots: jax.Array, own: jax.Array, finished: jax.Array) -> Lot:
        """What the next lives are spent on, `[agents here, ...]`; of no meaning for those who live on.

        Args:
            buffer: as it is.
            slots: of the agents' levels.
            own: numbers of these levels.
            finished: whose lives are over.
        """
        if buffer is None:
            return endings.of_finished(self.draw, own, finished)
        return jax.tree.map(lambda whole: whole[slots], buffer.levels)

    def renew(
        self,
        key: jax.Array,
        buffer: LevelBuffer | None,
        ended: Ended,
        p_replay: Scalar,
        prior: Prior,
        now: jax.Array | int,
    ) -> tuple[LevelBuffer | None, jax.Array, jax.Array, jax.Array]:
        """Gives the agents whose lives have ended their next levels.

        Args:
            key: consumed; the same on all devices.
            buffer: as it is.
            ended: of the agents on this device.
            p_replay: probability of a replay.
            prior: of replays.
            now: the time.

        Returns:
            The buffer; slots and numbers of the levels of the agents on this device, `[agents here]`; which replay.
        """
        number_key, choice_key = jax.random.split(key)
        own = own_individuals(self.agents)
        fresh, nobody = numbers(number_key, own), jnp.zeros_like(ended.finished)
        if buffer is None:
            return None, ended.slot, jnp.where(ended.finished, fresh, ended.number), nobody
        if self.score.is_fixed:
            drawn = jax.random.randint(choice_key, (self.agents,), 0, self.slots)[own]
            slots = jnp.where(ended.finished, drawn, ended.slot)
            return buffer, slots, buffer.levels.number[slots], nobody
        everyone, lots = population_gather((ended, endings.of_finished(self.draw, fresh, ended.finished)))
        spare = level_buffer.replaceable(buffer, self.agents)
        buffer = level_buffer.refill(buffer, spare, lots, everyone.finished, self.release)
        buffer = level_buffer.record(buffer, everyone.slot, everyone.finished, everyone.score, everyone.reference)
        given = (choice_key, buffer, everyone.finished, spare, p_replay, prior, now)
        buffer, slots, replays = level_buffer.hand_out(*given)
        slots = jnp.where(ended.finished, slots[own], ended.slot)
        return buffer, slots, buffer.levels.number[slots], replays[own]


def numbers(key: jax.Array, agents: jax.Array) -> jax.Array:
    """A random number of a level for each agent, whatever device it is on; the key is consumed."""
    draw = lambda agent: jax.random.randint(jax.random.fold_in(key, agent), (), 0, MOST_NUMBERS)  # noqa: E731
    return jax.vmap(draw)(agents)


def lottery(world: World, config: ObjectiveTraining) -> Callable[[jax.Array], Lot]:
    """`number -> Lot` of a world: its environment and a lifetime."""

    def draw(number: jax.Array) -> Lot:
        lifetime_key = jax.random.fold_in(jax.random.key(number), LIFETIME)
        return Lot(number, world.draw(jax.random.key(number)), world.draw_lifetime(lifetime_key, config.lifetime))

    return draw

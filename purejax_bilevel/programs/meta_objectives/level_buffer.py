"""A buffer of levels that are replayed by score: prioritised level replay (PLR), as GROOVE uses it.

A slot holds a level, its last score and whether an agent is on it. In a meta-step, for the agents whose lives end:

    slots = replaceable(buffer, agents)                 never scored ones first, then those of the lowest scores
    buffer = refill(buffer, slots, new random levels, ...)
    buffer = record(buffer, slots of the agents, their scores)
    buffer, slots = hand_out(key, buffer, ...)          a replayed level, or the agent's own fresh one

Nothing here knows what a level is: it is a tree with slots as first dimension. Every function may be mapped over
members. A population on several devices calls them with what is gathered, so that each device holds the same buffer.
Sources: Jiang et al. 2021, "Prioritized level replay"; Jackson et al. 2023 (GROOVE), section 4 and its released code.
"""

from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

Scalar = float | jax.Array
Tree = Any
LEAST = -1e30  # of the logarithms of probabilities: what may be replayed stays above what may not


class LevelBuffer(flax.struct.PyTreeNode):
    """Levels and what is known of them."""

    levels: Tree  # [slots, ...]
    score: jax.Array  # [slots], the last one; 0 before
    reference: jax.Array  # [slots], what scores compare with, from earlier visits (see scores.py)
    active: jax.Array  # [slots], whether an agent is on it
    scored: jax.Array  # [slots], whether the score is that of an agent that was on it
    visits: jax.Array  # [slots], how many agents have ended their lives on it
    handed_out: jax.Array  # [slots], the last time that it was


class Prior(NamedTuple):
    """How scores become probabilities of replay.

    Args:
        transform: "rank": rank^(-1 / temperature), the highest score has rank 1; "proportional":
            exp(score / temperature).
        temperature: above 0. Towards 0, the highest scores are replayed first; that is what "rank" of GROOVE's
            released code does at any temperature.
        staleness: share of the probability that goes by the time since a level was handed out.
    """

    transform: str
    temperature: Scalar
    staleness: Scalar


def new_buffer(levels: Tree) -> LevelBuffer:
    """A buffer of levels `[slots, ...]` that nobody has been on."""
    slots = jax.tree.leaves(levels)[0].shape[0]
    no, nothing, zero = jnp.zeros(slots, bool), jnp.zeros(slots, jnp.float32), jnp.zeros(slots, jnp.int32)
    return LevelBuffer(levels, nothing, nothing, no, no, zero, zero)


def replayable(buffer: LevelBuffer) -> jax.Array:
    """Which levels may be replayed, `[slots]`: those with a score that no agent is on."""
    return buffer.scored & ~buffer.active


def fresh(buffer: LevelBuffer) -> jax.Array:
    """Which levels are as good as new random ones, `[slots]`: never scored, and no agent is on them."""
    return ~buffer.scored & ~buffer.active


def replaceable(buffer: LevelBuffer, number: int) -> jax.Array:
    """The slots `[number]` to give up first: fresh ones in their order, then those of the lowest scores.

    No slot with an agent on it is among them if `number` is at most the number of the others.
    """
    order = jnp.where(buffer.active, -jnp.inf, jnp.where(buffer.scored, -buffer.score, jnp.inf))
    return jax.lax.top_k(order, number)[1]


def refill(
    buffer: LevelBuffer, slots: jax.Array, levels: Tree, wanted: jax.Array, release: bool = False
) -> LevelBuffer:
    """Puts other levels in some slots.

    Args:
        buffer: as it is.
        slots: `[number]`.
        levels: `[number, ...]`, nobody has been on them.
        wanted: `[number]`, which of them are put there.
        release: as GROOVE's released code does: all other levels that no agent is on count as scored from then on,
            with the score 0 if they never were.
    """
    places = jnp.where(wanted, slots, buffer.score.shape[0])
    put = lambda whole, new: whole.at[places].set(new, mode="drop")  # noqa: E731
    return LevelBuffer(
        levels=jax.tree.map(put, buffer.levels, levels),
        score=put(buffer.score, 0.0),
        reference=put(buffer.reference, 0.0),
        active=put(buffer.active, False),
        scored=put(~buffer.active if release else buffer.scored, False),
        visits=put(buffer.visits, 0),
        handed_out=put(buffer.handed_out, 0),
    )


def record(
    buffer: LevelBuffer, slots: jax.Array, finished: jax.Array, scores: jax.Array, references: jax.Array
) -> LevelBuffer:
    """Takes agents off their levels and keeps their scores; a level whose score is no finite number is fresh again.

    Args:
        buffer: as it is.
        slots: `[agents]` of the agents' levels.
        finished: `[agents]`, whose lives have ended; nothing changes for the others.
        scores: `[agents]`.
        references: `[agents]`, see `LevelBuffer`.
    """
    places = jnp.where(finished, slots, buffer.score.shape[0])
    usable = jnp.isfinite(scores) & jnp.isfinite(references)

    def put(whole: jax.Array, new: jax.Array) -> jax.Array:
        return whole.at[places].set(jnp.where(usable, new, 0.0).astype(whole.dtype), mode="drop")

    return buffer.replace(
        score=put(buffer.score, scores),
        reference=put(buffer.reference, references),
        active=buffer.active.at[places].set(False, mode="drop"),
        scored=buffer.scored.at[places].set(usable, mode="drop"),
        visits=buffer.visits.at[places].add(1, mode="drop"),
    )


def replay_log_probabilities(buffer: LevelBuffer, prior: Prior, now: jax.Array | int) -> jax.Array:
    """Logarithm of the probability `[slots]` that a level is the next one replayed; -inf where it may not be.

    P = (1 - staleness) P(score) + staleness P(time since it was handed out): Jiang et al. 2021, equation 3. In
    logarithms, since exp(score / temperature) may be too large or too small a number.

    Args:
        buffer: with the scores.
        prior: how they count.
        now: the time, in the units of `handed_out`.
    """
    may = replayable(buffer)
    if prior.transform == "rank":
        order = jax.lax.top_k(jnp.where(may, buffer.score, -jnp.inf), may.shape[0])[1]
        rank = jnp.zeros_like(order).at[order].set(jnp.arange(1, may.shape[0] + 1, dtype=order.dtype))
        preference = -jnp.log(rank.astype(buffer.score.dtype))
    else:
        preference = buffer.score - jnp.where(may, buffer.score, -jnp.inf).max()
    ages = jnp.where(may, jnp.maximum(now - buffer.handed_out, 0), 0).astype(buffer.score.dtype)
    by_score = _log_normalised(preference / prior.temperature, may)
    by_age = jnp.where(ages.sum() > 0, jnp.log(ages) - jnp.log(ages.sum()), by_score)
    mixed = jnp.logaddexp(jnp.log1p(-prior.staleness) + by_score, jnp.log(prior.staleness) + by_age)
    return jnp.where(may, jnp.maximum(mixed, LEAST), -jnp.inf)


def _log_normalised(logits: jax.Array, where: jax.Array) -> jax.Array:
    logits = jnp.where(where, jnp.maximum(logits, LEAST), LEAST)
    return logits - jax.scipy.special.logsumexp(logits, where=where)


def hand_out(
    key: jax.Array,
    buffer: LevelBuffer,
    finished: jax.Array,
    fresh_slots: jax.Array,
    p_replay: Scalar,
    prior: Prior,
    now: jax.Array | int,
) -> tuple[LevelBuffer, jax.Array, jax.Array]:
    """Gives each agent whose life has ended its next level, no level to two agents.

    Replayed levels are drawn one after another without replacement. There are none as long as fewer levels may be
    replayed than agents need one.

    Args:
        key: consumed.
        buffer: as `record` leaves it.
        finished: `[agents]`.
        fresh_slots: `[agents]`, different fresh levels, one for each agent that does not replay.
        p_replay: probability that an agent replays.
        prior: of replays.
        now: the time.

    Returns:
        The buffer; slots `[agents]`, of no meaning for agents that live on; which agents replay, `[agents]`.
    """
    replay_key, level_key = jax.random.split(key)
    allowed = replayable(buffer).sum() >= finished.sum()
    replays = finished & allowed & jax.random.bernoulli(replay_key, p_replay, finished.shape)
    logits = replay_log_probabilities(buffer, prior, now)
    # The largest of log p + Gumbel noise are draws without replacement (Kool et al. 2019).
    luck = jax.random.gumbel(level_key, logits.shape, logits.dtype)
    drawn = jax.lax.top_k(logits + luck, finished.shape[0])[1]
    slots = jnp.where(replays, drawn[jnp.cumsum(replays) - 1], fresh_slots)
    places = jnp.where(finished, slots, buffer.score.shape[0])
    buffer = buffer.replace(
        active=buffer.active.at[places].set(True, mode="drop"),
        handed_out=buffer.handed_out.at[places].set(now, mode="drop"),
    )
    return buffer, slots, replays

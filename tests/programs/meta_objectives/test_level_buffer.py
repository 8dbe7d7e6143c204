"""The level buffer: GROOVE's own numbers, the prior of replays, and what never happens in a long life of a buffer.

Reference numbers are every `groove_plr_*.npz` in or below `tests/data/`, or the folder named by
PUREJAX_BILEVEL_REFERENCE_DATA; all sizes come from the files.
"""

import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from purejax_bilevel.programs.meta_objectives import level_buffer
from purejax_bilevel.programs.meta_objectives.level_buffer import LevelBuffer, Prior

FOLDER = Path(os.environ.get("PUREJAX_BILEVEL_REFERENCE_DATA", Path(__file__).parents[2] / "data"))
FILES = sorted(FOLDER.rglob("groove_plr_*.npz"))


# --- reference numbers ------------------------------------------------------------------------------------------------


def cases() -> list[Any]:
    found = []
    for path in FILES:
        golden = np.load(path)
        for case in range(int(golden["cases"])):
            prefix = f"case_{case}/"
            entries = {name.removeprefix(prefix): golden[name] for name in golden.files if name.startswith(prefix)}
            found.append(pytest.param(entries, id=f"{path.stem}-{case}"))
    return found


def buffer_of(golden: dict[str, np.ndarray]) -> LevelBuffer:
    slots = len(golden["in/score"])
    return level_buffer.new_buffer(jnp.arange(slots)).replace(
        score=jnp.asarray(golden["in/score"]),
        active=jnp.asarray(golden["in/active"]),
        scored=jnp.asarray(~golden["in/never_scored"]),
    )


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("golden", cases())
@pytest.mark.parametrize("release", [True, False])
def test_refill_and_scores_are_the_releases(golden: dict[str, np.ndarray], release: bool) -> None:
    buffer, batch = buffer_of(golden), int(golden["batch"])
    slots = level_buffer.replaceable(buffer, batch)
    replaced = np.isin(np.arange(len(golden["in/score"])), slots)
    np.testing.assert_array_equal(replaced, golden["out/reset_replaced"])
    buffer = level_buffer.refill(buffer, slots, -1 - jnp.arange(batch), jnp.ones(batch, bool), release)
    np.testing.assert_array_equal(buffer.levels[slots], -1 - np.arange(batch))
    check(buffer, golden, "out/reset", release)
    agents = golden["in/agent_level"], golden["in/agent_terminated"], golden["in/agent_regret"]
    check(level_buffer.record(buffer, *agents, jnp.zeros(batch)), golden, "out/scored", release)


def check(buffer: LevelBuffer, golden: dict[str, np.ndarray], name: str, release: bool) -> None:
    np.testing.assert_allclose(buffer.score, golden[f"{name}_score"], rtol=1e-6)  # of float32
    np.testing.assert_array_equal(buffer.active, golden[f"{name}_active"])
    never_scored = golden[f"{name}_never_scored_{'released' if release else 'fixed'}"]
    np.testing.assert_array_equal(~buffer.scored, never_scored)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("golden", cases())
def test_replays_are_the_releases(golden: dict[str, np.ndarray]) -> None:
    buffer, batch = buffer_of(golden), int(golden["batch"])
    np.testing.assert_array_equal(level_buffer.replayable(buffer), golden["out/replayable"])
    np.testing.assert_array_equal(level_buffer.fresh(buffer), golden["out/fresh_probability"] > 0)
    everyone, fresh = jnp.ones(batch, bool), level_buffer.replaceable(buffer, batch)
    # At a temperature near 0 the best are replayed in order, which the release calls rank.
    prior = Prior("rank", 1e-6, 0.0)
    _, slots, replays = level_buffer.hand_out(jax.random.key(0), buffer, everyone, fresh, 1.0, prior, 0)
    np.testing.assert_array_equal(replays, np.full(batch, golden["out/replay_allowed"]))
    if golden["out/replay_allowed"]:
        np.testing.assert_array_equal(slots, golden["out/replay_rank_ids"])
        prior = Prior("proportional", golden["temperature"], 0.0)
        found = jnp.exp(level_buffer.replay_log_probabilities(buffer, prior, 0))
        np.testing.assert_allclose(found, golden["out/replay_proportional_probability"], rtol=1e-6)
    else:
        np.testing.assert_array_equal(slots, fresh)


def test_there_are_golden_files() -> None:
    assert FILES


# --- the prior --------------------------------------------------------------------------------------------------------


def scored_buffer(scores: Any, **fields: Any) -> LevelBuffer:
    scores = jnp.asarray(scores, jnp.float32)
    known = level_buffer.new_buffer(jnp.arange(len(scores))).replace(score=scores, scored=jnp.ones(len(scores), bool))
    return known.replace(**fields)


def frequencies(buffer: LevelBuffer, prior: Prior, now: int, draws: int = 20_000) -> np.ndarray:
    """Shares `[slots]` of the levels that one agent is given, which replays always."""

    def draw(key: jax.Array) -> jax.Array:
        return level_buffer.hand_out(key, buffer, jnp.array([True]), jnp.array([0]), 1.0, prior, now)[1][0]

    drawn = jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(0), draws))
    return np.bincount(drawn, minlength=len(buffer.score)) / draws


def test_frequencies_follow_the_rank() -> None:
    buffer = scored_buffer([0.3, 9.0, -2.0, 1.0, 5.0], active=jnp.array([False, False, False, False, True]))
    expected = np.array([3, 1, 4, 2, np.inf]) ** (-1 / 0.5)
    expected /= expected.sum()
    found = frequencies(buffer, Prior("rank", 0.5, 0.0), 0)
    np.testing.assert_allclose(found, expected, atol=4 * np.sqrt(0.25 / 20_000))
    exact = jnp.exp(level_buffer.replay_log_probabilities(buffer, Prior("rank", 0.5, 0.0), 0))
    np.testing.assert_allclose(exact, expected, rtol=1e-5)


def test_staleness_is_a_share_of_the_probability() -> None:
    buffer = scored_buffer([2.0, 1.0, 0.0], handed_out=jnp.array([10, 4, 8]))
    exact = jnp.exp(level_buffer.replay_log_probabilities(buffer, Prior("rank", 1.0, 0.25), 10))
    by_rank, by_age = np.array([6, 3, 2]) / 11, np.array([0, 6, 2]) / 8
    np.testing.assert_allclose(exact, 0.75 * by_rank + 0.25 * by_age, rtol=1e-5)


@pytest.mark.parametrize("transform", ["rank", "proportional"])
def test_no_score_is_too_large(transform: str) -> None:
    """B13: of scores of any size and sign, at any temperature, those that may be replayed are, and no other."""

    def replay(scale: jax.Array, temperature: jax.Array, key: jax.Array) -> Any:
        buffer = scored_buffer(scale * jnp.arange(4.0)).replace(active=jnp.array([True, False, False, False]))
        prior = Prior(transform, temperature, 0.0)
        everyone, fresh = jnp.ones(3, bool), jnp.zeros(3, int)
        _, slots, replays = level_buffer.hand_out(key, buffer, everyone, fresh, 1.0, prior, 3)
        return level_buffer.replay_log_probabilities(buffer, prior, 3), slots, replays

    scales = jnp.repeat(jnp.array([1e30, -1e30, 1e-30]), 2)
    temperatures = jnp.tile(jnp.array([1e-6, 1e6]), 3)
    logits, slots, replays = jax.jit(jax.vmap(replay))(scales, temperatures, jax.random.split(jax.random.key(1), 6))
    np.testing.assert_array_equal(jnp.isneginf(logits), np.tile([True, False, False, False], (6, 1)))
    np.testing.assert_allclose(jnp.exp(logits).sum(1), 1.0, rtol=1e-5)
    assert replays.all()
    np.testing.assert_array_equal(jnp.sort(slots), np.tile([1, 2, 3], (6, 1)))


def test_nothing_to_replay() -> None:
    buffer = level_buffer.new_buffer(jnp.arange(4))
    for transform in ("rank", "proportional"):
        assert jnp.isneginf(level_buffer.replay_log_probabilities(buffer, Prior(transform, 0.3, 0.1), 5)).all()


def test_a_score_that_is_no_number_makes_a_level_fresh() -> None:
    buffer = scored_buffer([1.0, 2.0, 3.0, 4.0])
    agents = jnp.array([0, 1, 2]), jnp.array([True, True, False])
    buffer = level_buffer.record(buffer, *agents, jnp.array([jnp.nan, 7.0, 8.0]), jnp.array([0.0, 5.0, 6.0]))
    np.testing.assert_array_equal(buffer.scored, [False, True, True, True])
    np.testing.assert_array_equal(buffer.score, [0.0, 7.0, 3.0, 4.0])
    np.testing.assert_array_equal(buffer.reference, [0.0, 5.0, 0.0, 0.0])
    np.testing.assert_array_equal(buffer.visits, [1, 1, 0, 0])


# --- a long life ------------------------------------------------------------------------------------------------------

AGENTS, SLOTS, STEPS, P_REPLAY = 6, 40, 2000, 0.4


def live(release: bool) -> tuple[Any, Any]:
    """Agents of random lifetimes on numbered levels whose score is known; a level never comes twice."""
    prior = Prior("rank", 0.3, 0.1)

    def step(carry: Any, t: jax.Array) -> Any:
        buffer, slots = carry
        end_key, key = jax.random.split(jax.random.fold_in(jax.random.key(3), t))
        finished = jax.random.bernoulli(end_key, 0.3, (AGENTS,))
        fresh_slots = level_buffer.replaceable(buffer, AGENTS)
        numbers = SLOTS + t * AGENTS + jnp.arange(AGENTS)
        buffer = level_buffer.refill(buffer, fresh_slots, numbers, finished, release)
        scores = jnp.sin(buffer.levels[slots].astype(jnp.float32))
        buffer = level_buffer.record(buffer, slots, finished, scores, scores)
        before = buffer
        buffer, new, replays = level_buffer.hand_out(key, buffer, finished, fresh_slots, P_REPLAY, prior, t)
        slots = jnp.where(finished, new, slots)
        seen = {"finished": finished, "replays": replays, "slots": slots, "levels": buffer.levels[slots]}
        return (buffer, slots), {**seen, "visits": before.visits[slots], "active": buffer.active, "score": before.score}

    buffer = level_buffer.new_buffer(jnp.arange(SLOTS))
    start = buffer.replace(active=jnp.arange(SLOTS) < AGENTS), jnp.arange(AGENTS)
    return jax.jit(lambda: jax.lax.scan(step, start, jnp.arange(STEPS)))()


@pytest.fixture(scope="module")
def lived() -> tuple[Any, Any]:
    return jax.tree.map(np.asarray, live(release=False))


def test_no_level_has_two_agents(lived: tuple[Any, Any]) -> None:
    slots, active = lived[1]["slots"], lived[1]["active"]
    assert all(len(set(row)) == AGENTS for row in slots)
    for row, flags in zip(slots, active, strict=True):
        np.testing.assert_array_equal(np.sort(row), np.flatnonzero(flags))


def test_only_scored_levels_are_replayed(lived: tuple[Any, Any]) -> None:
    replays, visits, finished = (lived[1][name] for name in ("replays", "visits", "finished"))
    assert (visits[replays] > 0).all()
    assert (visits[finished & ~replays] == 0).all()
    fresh = lived[1]["levels"][finished & ~replays]
    assert len(set(fresh.tolist())) == len(fresh)


def test_replay_share_is_its_probability(lived: tuple[Any, Any]) -> None:
    replays, finished = lived[1]["replays"][200:], lived[1]["finished"][200:]
    share, number = replays.sum() / finished.sum(), finished.sum()
    assert abs(share - P_REPLAY) < 4 * np.sqrt(P_REPLAY * (1 - P_REPLAY) / number)


def test_high_scores_stay(lived: tuple[Any, Any]) -> None:
    buffer = lived[0][0]
    kept = buffer.score[buffer.scored]
    np.testing.assert_allclose(kept, np.sin(buffer.levels[buffer.scored].astype(np.float32)), atol=1e-5)
    assert np.median(kept) > 0.99  # of thousands of levels with scores between -1 and 1
    replayed = np.sin(lived[1]["levels"][200:][lived[1]["replays"][200:]].astype(np.float32))
    assert replayed.mean() > 0.9


def test_the_release_replays_levels_that_nobody_was_on() -> None:
    seen = jax.tree.map(np.asarray, live(release=True)[1])
    assert (seen["visits"][seen["replays"]] == 0).any()

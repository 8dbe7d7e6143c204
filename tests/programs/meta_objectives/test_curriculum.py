"""Which levels agents are given, with the population in one place and on two devices."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from purejax_bilevel.program import POPULATION, alone
from purejax_bilevel.programs.meta_objectives.curriculum import Curriculum, Ended, Lot
from purejax_bilevel.programs.meta_objectives.level_buffer import Prior
from purejax_bilevel.programs.meta_objectives.scores import SCORES

AGENTS, PRIOR = 4, Prior("rank", 0.3, 0.1)


def lot(number: jax.Array) -> Lot:
    return Lot(number, {"level": 2 * number}, number % 7 + 1)


def lives(rule: Curriculum, key: jax.Array, steps: int) -> tuple[Any, ...]:
    """Agents that live for one step or two; the score of a level is its number.

    Slots, lots, replays and ends of lives, `[steps, agents]`.
    """
    buffer, slots, numbers = rule.begin(jax.random.fold_in(key, 0))

    def step(carry: Any, t: jax.Array) -> Any:
        buffer, slots, numbers = carry
        lots = rule.lots(buffer, slots, numbers, jnp.ones_like(slots, bool))
        score = numbers.astype(jnp.float32)
        ended = Ended((numbers + t) % 2 == 0, slots, numbers, score, score)
        *carry, replays = rule.renew(jax.random.fold_in(key, t), buffer, ended, 0.5, PRIOR, t)
        return tuple(carry), (slots, lots, replays, ended.finished)

    return jax.lax.scan(step, (buffer, slots, numbers), jnp.arange(1, steps + 1))[1]


@functools.cache
def run(name: str, slots: int, devices: int = 1) -> tuple[Any, ...]:
    rule = Curriculum(SCORES[name], AGENTS, slots, lot)
    function = lambda key: lives(rule, key, 40)  # noqa: E731
    if devices == 1:
        function = alone(function)
    else:
        mesh = jax.make_mesh((devices,), (POPULATION,), devices=jax.devices()[:devices])
        spec = PartitionSpec(None, POPULATION)
        function = jax.shard_map(function, mesh=mesh, in_specs=PartitionSpec(), out_specs=spec, check_vma=False)
    return jax.tree.map(np.asarray, jax.jit(function)(jax.random.key(0)))


@pytest.mark.parametrize(("name", "slots"), [("random", 0), ("frozen", 3), ("alg_regret", 12)])
def test_the_devices_of_a_population_agree(name: str, slots: int) -> None:
    jax.tree.map(np.testing.assert_array_equal, run(name, slots), run(name, slots, devices=2))


def test_random_levels_are_all_new() -> None:
    _, lots, replays, finished = run("random", 0)
    assert len(np.unique(lots.number)) == finished[:-1].sum() + AGENTS > 40
    assert not replays.any()
    np.testing.assert_array_equal(lots.params["level"], 2 * lots.number)
    np.testing.assert_array_equal(lots.lifetime, lots.number % 7 + 1)


def test_a_fixed_set_may_be_smaller_than_the_population() -> None:
    taken, lots, replays, _ = run("frozen", 3)
    assert not replays.any()
    known = {slot: lots.number[taken == slot] for slot in np.unique(taken)}
    assert all(len(set(numbers)) == 1 for numbers in known.values())
    assert len(known) == 3


def test_high_scores_are_replayed() -> None:
    _, lots, replays, finished = run("alg_regret", 12)
    assert 0 < replays.sum() < finished.sum()
    given, new = replays[20:-1], finished[20:-1] & ~replays[20:-1]
    numbers = lots.number[21:]  # what they are given is theirs a step later
    assert numbers[given].min() > np.median(numbers[new])

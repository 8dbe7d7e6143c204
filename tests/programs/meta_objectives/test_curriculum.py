"""Which levels agents are given, with the population in one place and on two devices."""

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


def lives(curriculum: Curriculum, key: jax.Array, steps: int) -> tuple[Any, ...]:
    """Agents that live for one step or two; the score of a level is its number. Lots and replays `[steps, agents]`."""
    buffer, slots, lots = curriculum.begin(jax.random.fold_in(key, 0))

    def step(carry: Any, t: jax.Array) -> Any:
        buffer, slots, lots = carry
        score = lots.number.astype(jnp.float32)
        ended = Ended((lots.number + t) % 2 == 0, slots, score, score)
        buffer, slots, given, replays = curriculum.renew(jax.random.fold_in(key, t), buffer, ended, 0.5, PRIOR, t)
        choose = lambda old, new: jnp.where(ended.finished, new.T, old.T).T  # noqa: E731
        lots = jax.tree.map(choose, lots, given)
        return (buffer, slots, lots), (slots, lots, replays, ended.finished)

    return jax.lax.scan(step, (buffer, slots, lots), jnp.arange(1, steps + 1))[1]


def run(name: str, slots: int, devices: int = 1) -> tuple[Any, ...]:
    curriculum = Curriculum(SCORES[name], AGENTS, slots, lot)
    function = lambda key: lives(curriculum, key, 40)  # noqa: E731
    if devices == 1:
        function = alone(function)
    else:
        mesh = jax.make_mesh((devices,), (POPULATION,), devices=jax.devices()[:devices])
        spec = PartitionSpec(None, POPULATION)
        function = jax.shard_map(function, mesh=mesh, in_specs=PartitionSpec(), out_specs=spec, check_vma=False)
    return jax.tree.map(np.asarray, jax.jit(function)(jax.random.key(0)))


@pytest.mark.parametrize("name", ["random", "frozen", "alg_regret"])
def test_the_devices_of_a_population_agree(name: str) -> None:
    jax.tree.map(np.testing.assert_array_equal, run(name, 12), run(name, 12, devices=2))


def test_random_levels_are_all_new() -> None:
    _, lots, replays, finished = run("random", 0)
    assert len(np.unique(lots.number[finished])) == finished.sum() > 40
    assert not replays.any()
    np.testing.assert_array_equal(lots.params["level"], 2 * lots.number)
    np.testing.assert_array_equal(lots.lifetime, lots.number % 7 + 1)


@pytest.mark.parametrize("slots", [1, 3, 64])
def test_a_fixed_set_may_be_smaller_or_larger_than_the_population(slots: int) -> None:
    taken, lots, replays, _ = run("frozen", slots)
    assert not replays.any()
    known = {slot: lots.number[taken == slot] for slot in np.unique(taken)}
    assert all(len(set(numbers)) == 1 for numbers in known.values())
    assert min(slots, 20) <= len(known) <= slots


def test_high_scores_are_replayed() -> None:
    _, lots, replays, finished = run("positive_value_loss", 12)
    late = slice(20, None)
    assert 0 < replays.sum() < finished.sum()
    fresh = finished & ~replays
    assert lots.number[late][replays[late]].min() > np.median(lots.number[late][fresh[late]])

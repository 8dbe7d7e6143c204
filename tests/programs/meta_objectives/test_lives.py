"""Whole lives of agents, antagonists beside them, and what is measured at their end."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from purejax_bilevel.environments import grid_world
from purejax_bilevel.programs.meta_objectives import antagonist, endings, lives, network, population, worlds
from purejax_bilevel.programs.meta_objectives.curriculum import Lot
from purejax_bilevel.programs.meta_objectives.lives import Candidate
from purejax_bilevel.programs.meta_objectives.settings import ObjectiveTraining

WORLD = worlds.make("GridWorld-debug")
CONFIG = ObjectiveTraining(
    lifetime_conditioning=True,
    env_workers=4,
    train_rollout_len=4,
    lpg_gru_width=8,
    lpg_target_width=3,
    actor_lr=40.0,
    critic_lr=4.0,
)
SHAPES = network.shapes(3, 4, 8, has_clocks=True)


def candidates(lifetimes: tuple[int, ...]) -> Candidate:
    """Three pairs; a pair has the same level and chances, and here the same weights."""
    keys = jax.random.split(jax.random.key(0), 6)
    pair = jnp.array([0, 1, 2, 0, 1, 2])
    weights = jax.tree.map(lambda leaf: 10 * leaf, jax.vmap(lambda key: network.init(key, SHAPES))(keys[:3]))
    level = jax.vmap(WORLD.draw)(keys[3:])
    lot = Lot(jnp.arange(3), level, jnp.zeros(3, int))
    tried = Candidate(weights, lot, jax.random.split(jax.random.key(1), 3))
    tried = jax.tree.map(lambda leaf: leaf[pair], tried)
    return tried._replace(lot=tried.lot._replace(lifetime=jnp.array(lifetimes)))


def test_fitness_is_of_the_candidates_own_life() -> None:
    """Its chances are those of its pair, and it does not matter how long others live, beside it or later."""
    fitness = jax.jit(lambda tried: lives.fitness(WORLD, CONFIG, tried, parts=2))
    pairs = np.asarray(fitness(candidates((2, 9, 1, 2, 9, 1))))
    np.testing.assert_array_equal(pairs[:3], pairs[3:])
    own, others = (
        np.asarray(fitness(candidates(lifetimes))) for lifetimes in ((2, 9, 1, 8, 3, 4), (2, 9, 1, 30, 3, 4))
    )
    np.testing.assert_array_equal(own[:3], pairs[:3])
    assert (own[3:] != own[:3]).any()
    np.testing.assert_array_equal(np.delete(others, 3), np.delete(own, 3))


# --- antagonists ------------------------------------------------------------------------------------------------------


def test_an_antagonist_learns_until_its_life_is_over() -> None:
    level, lifetime = WORLD.draw(jax.random.key(0)), jnp.int32(7)
    life = population.born_in(WORLD, CONFIG, jax.random.key(5), level, lifetime)
    start = antagonist.born(WORLD, CONFIG, life, jax.random.key(1))
    train = jax.jit(lambda state, key: antagonist.train(WORLD, CONFIG, state, level, key))
    after = train(start, jax.random.key(2))
    last = train(after, jax.random.key(3))
    late = train(last, jax.random.key(4))
    assert [int(state.agent.step) for state in (start, after, last, late)] == [0, 5, 7, 7]
    for one, other in ((start, after), (after, last)):
        assert not np.array_equal(one.agent.actor.network[0].kernel, other.agent.actor.network[0].kernel)
        assert not np.array_equal(one.agent.critic.network[0].kernel, other.agent.critic.network[0].kernel)
    jax.tree.map(np.testing.assert_array_equal, last.agent, late.agent)


def test_an_agent_that_copies_the_antagonist_has_no_regret() -> None:
    """And one that is not at the end of its life is not measured."""
    levels = jax.vmap(WORLD.draw)(jax.random.split(jax.random.key(0), 3))
    actors = [WORLD.build.learner(jax.random.key(i), 5).network for i in range(3)]
    both = jax.tree.map(lambda *leaves: jnp.stack(leaves), *actors)
    both = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf], 1), both)
    finished, keys = jnp.array([True, False, True]), jax.random.split(jax.random.key(1), 3)
    returns = endings.last_returns(WORLD, both, levels, finished, keys, episodes=8)
    np.testing.assert_array_equal(jnp.isnan(returns).any(1), ~finished)
    np.testing.assert_array_equal(returns[:, 0], returns[:, 1])
    optima = endings.last_optima(levels, finished)
    expected = jax.vmap(grid_world.optimal_return)(levels)
    np.testing.assert_allclose(optima, jnp.where(finished, expected, jnp.nan), rtol=1e-6)


@pytest.mark.parametrize(("parts", "at_once"), [(5, 1), (3, 2), (1, 5)])
@pytest.mark.parametrize("count", [0, 1, 3, 5])
def test_only_the_finished_ones_are_computed(
    parts: int, at_once: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endings, "PARTS", parts)
    calls = []

    def function(given: dict[str, Any]) -> Any:
        jax.debug.callback(lambda x: calls.append(x), given["x"])
        return jnp.stack([given["x"], given["x"] + 0.5]), given["x"] > 0

    finished = jnp.arange(5)[::-1] < count
    x = 10.0 * jnp.arange(1, 6)
    pairs, flags = jax.jit(lambda x, finished: endings.of_finished(function, {"x": x}, finished))(x, finished)
    np.testing.assert_array_equal(pairs, np.where(finished[:, None], np.stack([x, x + 0.5], 1), 0.0))
    np.testing.assert_array_equal(flags, finished)
    jax.effects_barrier()
    assert len(calls) == at_once * -(-count // at_once)

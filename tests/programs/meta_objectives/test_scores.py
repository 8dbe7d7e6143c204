"""Scores of levels, by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from purejax_bilevel.programs.meta_objectives import scores
from purejax_bilevel.programs.meta_objectives.scores import SCORES, Evidence


def evidence(**known: object) -> Evidence:
    given = dict.fromkeys(Evidence._fields, jnp.float32(jnp.nan)) | {"visits": 0, "reference": 0.0} | known
    return Evidence(**{name: jnp.asarray(value) for name, value in given.items()})


def test_regret_is_to_the_mean_antagonist() -> None:
    """Three antagonists of a level earn 4, 1 and 7."""
    reference = 0.0
    for visits, (earned, own, expected) in enumerate([(4.0, 1.0, 3.0), (1.0, 3.0, 2.5 - 3.0), (7.0, 2.0, 4.0 - 2.0)]):
        seen = evidence(agent_return=own, antagonist_return=earned, reference=reference, visits=visits)
        score, reference = scores.algorithmic_regret(seen)
        np.testing.assert_allclose(score, expected, rtol=1e-6)
    np.testing.assert_allclose(reference, 4.0, rtol=1e-6)


def test_optimal_regret() -> None:
    score, reference = scores.optimal_regret(evidence(agent_return=1.5, optimum=2.25))
    assert (score, reference) == (0.75, 2.25)


def test_value_losses() -> None:
    seen = evidence(advantage=[[1.0, -2.0], [0.5, 0.0]])
    assert scores.positive_value_loss(seen)[0] == 1.5 / 4
    assert scores.l1_value_loss(seen)[0] == 3.5 / 4


def test_max_mc_remembers_the_highest_return() -> None:
    value = jnp.array([[0.0, 1.0], [2.0, 3.0]])
    first = scores.max_mc(evidence(value=value, highest_return=4.0, reference=99.0))
    assert first == (4.0 - 1.5, 4.0)
    second = scores.max_mc(evidence(value=value, highest_return=3.0, reference=first[1], visits=1))
    assert second == (4.0 - 1.5, 4.0)
    nothing = scores.max_mc(evidence(value=value, highest_return=-jnp.inf))
    assert not jnp.isfinite(nothing[0])  # no episode ended: the level has no score


def test_returns_of_episodes_that_end_in_a_rollout() -> None:
    reward = jnp.array([[1.0, 2.0, 4.0, 8.0], [1.0, 1.0, 1.0, 1.0]])
    done = jnp.array([[False, True, False, False], [False, False, False, False]])
    assert scores.highest_return(jnp.zeros(2), reward, done) == 3.0
    assert scores.highest_return(jnp.array([5.0, 9.0]), reward, done.at[1, 0].set(True)) == 10.0
    assert scores.highest_return(jnp.zeros(2), reward, jnp.zeros_like(done)) == -jnp.inf


@pytest.mark.parametrize("name", [name for name, score in SCORES.items() if score.measure])
def test_a_score_asks_for_what_it_reads(name: str) -> None:
    """What is not asked for may be NaN."""
    costly = {"agent_return": 1.0, "antagonist_return": 2.0, "optimum": 3.0, "highest_return": 4.0}
    asked = {entry: costly[entry] for entry in SCORES[name].asks}
    rollout = {"advantage": jnp.ones((2, 3)), "value": jnp.ones((2, 3))}
    measure = SCORES[name].measure
    assert measure is not None
    score, reference = measure(evidence(**asked, **rollout))
    assert jnp.isfinite(score)
    assert jnp.isfinite(reference)
    for entry in asked:
        assert jnp.isnan(measure(evidence(**{**asked, entry: jnp.nan}, **rollout))[0])

"""The bandit that counts how often policies are tried."""

import numpy as np
import pytest

from purejax_bilevel.errors import UserError
from purejax_bilevel.programs.offline.protocol import bandit


@pytest.mark.parametrize("arms", [(0.0, 100.0), (-100.0, -50.0)])
def test_of_two_constant_policies_the_better_one_is_found(arms: tuple[float, float]):
    """After one episode it is the one that was tried, half of the time either; after two it is known."""
    curve = bandit(np.repeat(np.array(arms)[:, None], 7, 1), episodes=30, repeats=400)
    np.testing.assert_array_equal(curve.mean[1:], arms[1])
    np.testing.assert_array_equal(curve.high[1:] - curve.low[1:], 0)
    assert abs(curve.mean[0] - np.mean(arms)) < 0.1 * abs(arms[1] - arms[0])
    assert curve.low[0] < np.mean(arms) < curve.high[0]


def test_noise_takes_more_episodes_and_some_policies_more_than_all():
    random = np.random.default_rng(0)
    returns = np.array([0.0, 1.0, 2.0])[:, None] + 2.0 * random.standard_normal((3, 200))
    best, worst = returns.mean(1).max(), returns.mean(1).min()
    curve = bandit(returns, episodes=300, repeats=60)
    assert curve.mean[5] < curve.mean[-1] <= best + 1e-9
    assert curve.mean[-1] > best - 0.1
    some = bandit(returns, episodes=20, policies=1, repeats=200)
    assert abs(some.mean[0] - returns.mean()) < 0.3  # whichever it is
    assert worst < some.mean[0] < best


def test_what_was_not_played_is_left_out():
    returns = np.array([[np.nan, 3.0, 3.0], [1.0, np.nan, np.nan]])
    assert bandit(returns, episodes=4, repeats=5).mean[-1] == 3.0
    with pytest.raises(UserError, match="some of each policy"):
        bandit(np.full((2, 3), np.nan))

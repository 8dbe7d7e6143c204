"""How good a set of trained policies is to somebody who may try them only so often: evaluation by bandit.

Choosing the best of many policies by their true returns is online learning in disguise. Here the price is counted: a
bandit (UCB1, Auer et al. 2002) spends one episode at a time on the policies at hand, and after each the true mean of
the policy that looks best then is reported.

As in Jackson et al. 2025 ("A clean slate for offline reinforcement learning", unifloral), but for three faults of its
code: policies that were never tried do not count as return 0, the bonus is in units of the range of returns, and equal
policies have an interval of width zero.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import xarray

from purejax_bilevel.errors import UserError
from purejax_bilevel.results import statistics
from purejax_bilevel.results.dataset import EPISODE, SEED, setting_dimensions

EXPLORATION = 2.0  # of UCB1


class Curve(NamedTuple):
    """True mean return of the policy that is chosen after 1, 2, ... episodes, `[episodes]` each."""

    mean: np.ndarray
    low: np.ndarray  # of the 95 % interval
    high: np.ndarray


def variable_of(datasets: Iterable[xarray.Dataset]) -> str:
    """What policies are compared by: normalised scores, or returns where some run has none.

    Raises:
        UserError: a run has neither.
    """
    found = list(datasets)
    for name in ("final_score", "final_return"):
        if all(name in dataset for dataset in found):
            return name
    raise UserError("the bandit needs the episodes of a last evaluation, final_return, which some run has not.")


def returns_of(dataset: xarray.Dataset, variable: str) -> np.ndarray:
    """Of the episodes of each member, `[members, episodes]`; members that failed are left out."""
    values = dataset[variable].transpose(*setting_dimensions(dataset), SEED, EPISODE).values
    values = values.reshape(-1, values.shape[-1])
    return values[~statistics.failed_members(dataset).reshape(-1)]


def bandit(returns: np.ndarray, episodes: int = 200, policies: int = 20, repeats: int = 1000, seed: int = 0) -> Curve:
    """Plays the bandit many times, each time on some of the policies.

    Args:
        returns: of episodes of each policy, `[policies, episodes]`; higher is better. NaN are left out.
        episodes: that may be spent.
        policies: at hand in each repeat, drawn without replacement; all where there are no more.
        repeats: of the whole.
        seed: of all draws.

    Raises:
        UserError: there is a policy without returns, or nothing to spend.
    """
    returns = np.asarray(returns, np.float64)
    if returns.ndim != 2 or not np.isfinite(returns).any(1).all():
        raise UserError(f"bandit needs returns [policies, episodes], some of each policy, got {list(returns.shape)}.")
    if min(episodes, policies, repeats) < 1:
        raise UserError(f"bandit: episodes, policies and repeats must be at least 1, got {episodes}.")
    random = np.random.default_rng(seed)
    chosen = np.stack([_played(returns, min(policies, len(returns)), episodes, random) for _ in range(repeats)])
    interval = statistics.stratified_bootstrap_interval(chosen.T[..., None], statistics.mean, seed=seed)
    return Curve(interval.estimate, interval.low, interval.high)


def _played(returns: np.ndarray, policies: int, episodes: int, random: np.random.Generator) -> np.ndarray:
    """True means `[episodes]` of what is chosen in one repeat."""
    at_hand = [row[np.isfinite(row)] for row in returns[random.permutation(len(returns))[:policies]]]
    true = np.array([row.mean() for row in at_hand])
    spread = max(row.max() for row in at_hand) - min(row.min() for row in at_hand)
    counts, sums, found = np.zeros(policies), np.zeros(policies), np.empty(episodes)
    for number in range(episodes):
        if number < policies:
            arm = number  # each once, in random order
        else:
            bonus = spread * np.sqrt(EXPLORATION * np.log(number) / counts)
            arm = int(np.argmax(sums / counts + bonus))
        counts[arm] += 1
        sums[arm] += random.choice(at_hand[arm])
        means = np.where(counts > 0, sums / np.maximum(counts, 1), -np.inf)
        found[number] = true[np.argmax(means)]
    return found

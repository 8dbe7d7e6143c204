"""How much there is to learn on a level, judged when an agent ends its life on it.

The scores are the values of `SCORES`, at the end of this file. Each says what it must be told (`Evidence`) and gives a
score and a reference, which the level keeps for the next agent on it.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

Scored = tuple[jax.Array, jax.Array]


class Evidence(NamedTuple):
    """What is known of one agent at the end of its life; NaN where a score does not ask for it."""

    agent_return: jax.Array  # [], mean undiscounted return of its last policy
    antagonist_return: jax.Array  # [], likewise, of the antagonist that lived beside it
    optimum: jax.Array  # [], the best expected return
    highest_return: jax.Array  # [], of the episodes of the agent's life
    advantage: jax.Array  # [workers, steps], of its last rollout
    value: jax.Array  # [workers, steps], likewise
    reference: jax.Array  # [], of the level, from earlier agents
    visits: jax.Array  # [], how many there were


@dataclasses.dataclass(frozen=True)
class Score:
    """A way to choose levels.

    Args:
        name: for `score_function`.
        text: what it is, for `--help`.
        measure: `Evidence -> (score, reference)`; None: levels are not scored.
        is_fixed: whether the levels are the same ones all the time.
        asks: which of the costly entries of `Evidence` it reads: agent_return, antagonist_return, optimum,
            highest_return.
    """

    name: str
    text: str
    measure: Callable[[Evidence], Scored] | None = None
    is_fixed: bool = False
    asks: tuple[str, ...] = ()


def algorithmic_regret(evidence: Evidence) -> Scored:
    """How much more an antagonist earns, in the mean over all that have lived on the level; may be negative.

    Source: Jackson et al. 2023 (GROOVE), section 4.1.
    """
    known = evidence.visits * evidence.reference + evidence.antagonist_return
    reference = known / (evidence.visits + 1)
    return reference - evidence.agent_return, reference


def optimal_regret(evidence: Evidence) -> Scored:
    """How much more the best policy earns."""
    return evidence.optimum - evidence.agent_return, evidence.optimum


def positive_value_loss(evidence: Evidence) -> Scored:
    """Mean positive part of the advantages (Jiang et al. 2021, "Replay-guided adversarial environment design")."""
    return jnp.maximum(evidence.advantage, 0.0).mean(), jnp.zeros_like(evidence.reference)


def l1_value_loss(evidence: Evidence) -> Scored:
    """Mean absolute advantage (Jiang et al. 2021, "Prioritized level replay")."""
    return jnp.abs(evidence.advantage).mean(), jnp.zeros_like(evidence.reference)


def max_mc(evidence: Evidence) -> Scored:
    """Highest return that any agent has had on the level, minus values (Jiang et al. 2021, "Replay-guided ...").

    Returns are not discounted and values are, as in the publications.
    """
    earlier = jnp.where(evidence.visits > 0, evidence.reference, -jnp.inf)
    highest = jnp.maximum(evidence.highest_return, earlier)
    return (highest - evidence.value).mean(), highest


# --- returns of the episodes of a life --------------------------------------------------------------------------------


def highest_return(running: jax.Array, reward: jax.Array, done: jax.Array) -> jax.Array:
    """Highest undiscounted return `[]` of the episodes that end in a rollout; -inf if none does.

    Args:
        running: `[workers]`, returns so far of the episodes that go on when the rollout begins.
        reward: `[workers, steps]`.
        done: `[workers, steps]`, whether the episode ended with the step.
    """

    def step(running: jax.Array, seen: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        running = running + seen[0].astype(running.dtype)
        return jnp.where(seen[1], 0.0, running), jnp.where(seen[1], running, -jnp.inf).max()

    return jax.lax.scan(step, running, (reward.T, done.T))[1].max()


# --- by name ----------------------------------------------------------------------------------------------------------

SCORES = {
    score.name: score
    for score in (
        Score("random", "every life on a new random level"),
        Score("frozen", "always the same levels, each as likely", is_fixed=True),
        Score(
            "alg_regret",
            "how much more A2C earns, which lives on the same level",
            algorithmic_regret,
            asks=("agent_return", "antagonist_return"),
        ),
        Score(
            "optimal_regret",
            "how much more the best policy earns",
            optimal_regret,
            asks=("agent_return", "optimum"),
        ),
        Score("positive_value_loss", "mean positive advantage", positive_value_loss),
        Score("l1_value_loss", "mean absolute advantage", l1_value_loss),
        Score("max_mc", "the highest return so far minus the values", max_mc, asks=("highest_return",)),
    )
}

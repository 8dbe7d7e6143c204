"""Settings of meta-learned objectives, in groups; names are those of GROOVE's released code where they mean the same.

Functions take the narrowest group that has what they need.
"""

from typing import Literal

from purejax_bilevel.configuration import (
    FRACTION,
    NONNEGATIVE,
    POSITIVE,
    Check,
    at_least,
    changed,
    configuration,
    static,
    traced,
)
from purejax_bilevel.evolution_settings import EVEN, GROUP, Evolution

DEFECTS = {
    "B1": "the meta-loss's value critic is never trained",
    "B2": "log-probabilities are multiplied with the mean advantage of their worker, not each with its own",
    "B4": "lifetime inputs are raw counters, not n/N and log N",
    "B5": "levels that were never scored count as scored once the buffer is refreshed",
    "B8": "all agents are born at once, so that they age together",
}


def defects(text: str) -> frozenset[str]:
    """The defects that `--compat` names: "B1,B2", or "all"."""
    named = {word.strip() for word in text.split(",")} - {""}
    return frozenset(DEFECTS) if named == {"all"} else frozenset(named)


COMPAT = Check(f"all, or some of {', '.join(DEFECTS)} with commas", lambda text: defects(text) <= DEFECTS.keys())


@configuration
class Task:
    """What runs."""

    agent_type: str = static("", "who learns", group="agent")
    env_name: str = static("", "environment", group="environment", task=True)


@configuration
class Rollouts:
    """How agents gather experience."""

    env_workers: int = static(64, "copies of its environment that each agent acts in", at_least(1), "agents")
    train_rollout_len: int = static(20, "steps of every copy per update of an agent", at_least(1), "agents")


@configuration
class Returns:
    """What actions are judged by: generalised advantages."""

    gamma: float = traced(0.99, "discount factor of the value critics", FRACTION, "returns")
    gae_lambda: float = traced(0.95, "lambda of the advantages", FRACTION, "returns")


@configuration
class Updates(Returns):
    """How the parameters of agents are updated."""

    actor_lr: float | None = traced(None, "rate of actors (default: as the environment's agents)", POSITIVE, "agents")
    critic_lr: float | None = traced(None, "rate of both sorts of critics (default: likewise)", POSITIVE, "agents")
    max_grad_norm: float = traced(0.5, "norm to which gradients are clipped (linear agents)", POSITIVE, "agents")
    lpg_agent_target_coeff: float = traced(0.5, "alpha_y: weight of the agent's prediction", NONNEGATIVE, "agents")
    entropy_coeff: float = traced(0.01, "weight of the entropy (A2C)", NONNEGATIVE, "agents")


@configuration
class NetworkSizes:
    """The learned objective."""

    lpg_embedding_net_width: int = static(16, "hidden units of the embedding of predictions", at_least(1), "objective")
    lpg_gru_width: int = static(256, "units of the recurrent cell", at_least(1), "objective")
    lpg_target_width: int = static(8, "categories of the agent's prediction", at_least(1), "objective")
    lifetime_conditioning: bool | None = static(
        None, "inputs n/N and log N (update n of a life of N; default: as the agent)", group="objective"
    )


@configuration
class MetaGradient:
    """The loss of the learned objective."""

    num_agent_updates: int = static(
        5, "updates of the agents that a meta-gradient goes through", at_least(1), "meta", particular=True
    )
    lpg_policy_entropy_coeff: float = traced(5e-2, "weight of the policies' entropy", NONNEGATIVE, "meta")
    lpg_target_entropy_coeff: float = traced(1e-3, "weight of the predictions' entropy", NONNEGATIVE, "meta")
    lpg_policy_l2_coeff: float = traced(5e-3, "weight of the squares of pi_hat", NONNEGATIVE, "meta")
    lpg_target_l2_coeff: float = traced(1e-3, "weight of the squares of y_hat", NONNEGATIVE, "meta")


@configuration
class ObjectiveTraining(Task, Rollouts, Updates, NetworkSizes, MetaGradient):
    """All that meta-training learns by."""

    num_train_steps: int = static(5000, "meta-steps of each member", at_least(1), "schedule")
    eval_frequency: int = static(100, "meta-steps between evaluations (0: only at the end)", at_least(0), "schedule")
    eval_agents: int = static(
        8, "agents that live on levels of their own in every evaluation (0: none)", at_least(0), "schedule"
    )
    num_agents: int = static(512, "agents that live at the same time", at_least(1), "meta", particular=True)
    num_mini_batches: int = static(
        1, "parts that a meta-step goes through one after another, to save memory", at_least(1), "meta"
    )
    lifetime: int = traced(0, "updates that an agent lives (0: as the environment says)", at_least(0), "agents")
    lpg_learning_rate: float | None = traced(
        None, "Adam rate of the objective (default: as the agent)", POSITIVE, "meta"
    )
    compat: str = static("", f"defects of the released code to restore: {COMPAT.allowed}", COMPAT, "meta")


@configuration
class Levels:
    """Which levels agents live on."""

    score_function: Literal[
        "random", "frozen", "alg_regret", "optimal_regret", "positive_value_loss", "l1_value_loss", "max_mc"
    ] = static("alg_regret", "what levels are chosen by", group="levels", particular=True)
    buffer_size: int = static(4000, "levels that are kept", at_least(1), "levels", particular=True)
    score_transform: Literal["rank", "proportional"] = static(
        "rank", "a level's weight: rank^(-1 / temperature) or exp(score / temperature)", group="levels", particular=True
    )
    score_temperature: float = traced(0.3, "temperature of these weights", POSITIVE, "levels")
    staleness_coeff: float = traced(0.1, "share of the weight by the time since a level was used", FRACTION, "levels")
    p_replay: float = traced(0.5, "probability that a new life is on a level replayed", FRACTION, "levels")


@configuration
class ObjectiveSearch(Evolution):
    """How an evolution strategy searches for an objective; defaults are those of TA-LPG."""

    strategy: Literal["open_es", "pgpe"] = static(
        "open_es",
        "one sigma with a schedule (OpenAI-ES), or a learned one per parameter (PGPE)",
        None,
        GROUP,
        particular=True,
    )
    population: int = static(1024, "candidates of a generation, in mirrored pairs", EVEN, GROUP, particular=True)
    fitness_shaping: Literal["ranks", "pairs"] = static(
        "pairs",
        "a candidate's rank in the population, or which one of each mirrored pair is better",
        None,
        GROUP,
        particular=True,
    )
    ties: Literal["shared", "by_order"] = static(
        "shared",
        "equal fitness: equal shares, or the second of a pair wins, as in the released code (B9)",
        None,
        GROUP,
        particular=True,
    )
    es_optimizer: Literal["adam", "sgd"] = static("adam", "steps of the mean", None, GROUP, particular=True)
    sigma: float = changed(Evolution, "sigma", 0.1)
    sigma_decay: float = changed(Evolution, "sigma_decay", 1.0)
    es_lr: float = changed(Evolution, "es_lr", 1e-2)
    es_lr_floor: float = changed(Evolution, "es_lr_floor", 1e-5)


@configuration
class LevelTraining(Levels, ObjectiveTraining):
    """Meta-gradients on chosen levels."""


@configuration
class SearchTraining(ObjectiveSearch, ObjectiveTraining):
    """Evolution on whole lives."""

"""Settings of optimal model design on a finite MDP, in groups."""

import math
from typing import Literal

from purejax_bilevel.configuration import (
    NONNEGATIVE,
    POSITIVE,
    Check,
    at_least,
    configuration,
    static,
    traced,
)

DISCOUNT = Check("a number from 0 to below 1", lambda x: 0 <= x < 1)
BOUND = Check("a number, 0 or above (inf: no bound)", lambda x: x >= 0)


@configuration
class Task:
    """What runs, and the true MDP."""

    agent_type: str = static("", "who trains the model", group="agent")
    env_name: Literal["tabular"] = static("tabular", "a finite MDP, see below", group="environment")
    num_train_steps: int = static(10_000, "outer steps of each member", at_least(1), "schedule")
    eval_frequency: int = static(500, "outer steps between evaluations (0: only at the end)", at_least(0), "schedule")
    # the true MDP
    mdp: Literal["two_state", "garnet", "file"] = static(
        "two_state", "the paper's MDP, random ones, or (implied by --mdp_file) your own", group="environment", task=True
    )
    mdp_file: str = static(
        "",
        "numpy archive with P [actions, states, states], R [states, actions], gamma and start [states]",
        group="environment",
        task=True,
    )
    garnet_seed: int = traced(0, "garnet: which random MDP", at_least(0), "environment", task=True)
    num_states: int = static(10, "garnet: number of states", at_least(1), "environment")
    num_actions: int = static(3, "garnet: number of actions", at_least(1), "environment")
    branching: int = static(3, "garnet: states reachable in one step", at_least(1), "environment")
    discount: float | None = traced(None, "discount factor (default: the file's, else 0.9)", DISCOUNT, "environment")


@configuration
class Learning:
    """All that agents learn by."""

    # outer problem
    outer_objective: Literal["return", "bellman"] = static(
        "return", "return of the policy, or squared Bellman error, in the true MDP", group="outer problem"
    )
    lr: float = traced(0.01, "Adam rate of the model", POSITIVE, "outer problem")
    norm_bound: float = traced(math.inf, "largest norm of the model's [logits / T, reward]", BOUND, "outer problem")
    # hypergradient
    with_inv_jac: Literal["exact", "identity"] = static(
        "exact", "inverse Jacobian of the Bellman equation, exact or taken for the identity", group="hypergradient"
    )
    # inner problem
    temperature: float = traced(0.01, "T of the smooth maximum, the policy and the model", POSITIVE, "inner problem")
    inner_noise: float = traced(
        0.0, "standard deviation of noise added to each inner solution", NONNEGATIVE, "inner problem"
    )
    notebook_noise: bool = static(
        False,
        "noise as in the original notebook, exact Jacobians and a noisy Q in evaluations (default: the reverse)",
        group="inner problem",
        particular=True,
    )

"""Settings of PPO and of the optimiser that trains it, in groups; functions take the narrowest group that they need."""

from typing import Literal

from purejax_bilevel.configuration import (
    FEW,
    FRACTION,
    NONNEGATIVE,
    POSITIVE,
    at_least,
    configuration,
    static,
    traced,
)


@configuration
class Task:
    """What runs."""

    agent_type: str = static("ppo", "the agent", group="agent")
    env_name: str = static(
        "CartPole-v1", "environment, its actions discrete or continuous", group="environment", task=True
    )
    draw_level: bool = static(
        False, "each member draws its own level of the Grid-World mode from its seed", group="environment"
    )


@configuration
class Schedule(Task):
    """How long it runs. A step of the program is an iteration: a rollout and the epochs over it."""

    num_train_steps: int = static(
        100, "iterations, each of num_envs x num_steps environment steps", at_least(1), "schedule"
    )
    horizon: int = static(
        0,
        "iterations in all, for annealing and OPEN's clock (0: num_train_steps)",
        at_least(0),
        "schedule",
    )


@configuration
class Evaluation(Schedule):
    """How often the policy is evaluated, and on how many episodes."""

    eval_frequency: int = static(10, "iterations between evaluations (0: only at the end)", at_least(0), "schedule")
    eval_episodes: int = static(10, "episodes of an evaluation", at_least(1), "schedule")
    final_eval_episodes: int = static(20, "episodes of the last evaluation", at_least(1), "schedule")


@configuration
class Rollouts:
    """How experience is collected."""

    num_envs: int = static(64, "copies of the environment of each member", at_least(1), "data")
    num_steps: int = static(128, "steps of each copy in a rollout", at_least(1), "data")
    truncation_is_end: bool = static(
        False,
        "time limits end the task, as in PureJaxRL and OPEN's code (default: the value of the last observation counts)",
        group="data",
    )
    normalize_observations: bool = static(False, "by their running mean and standard deviation", group="data")
    normalize_rewards: bool = static(False, "by the running standard deviation of the discounted return", group="data")


@configuration
class ActorCritic:
    """The two networks."""

    hidden_dim: int = static(64, "units in each hidden layer", at_least(1), "networks")
    num_layers: int = static(2, "hidden layers of actor and critic each", FEW, "networks")
    activation: Literal["relu", "tanh"] = static("relu", "of the hidden layers", group="networks")


@configuration
class Surrogate:
    """The objective of PPO, and the passes over a rollout."""

    discount: float = traced(0.99, "discount factor", FRACTION, "objective")
    gae_lambda: float = traced(0.95, "decay of the advantage estimate", FRACTION, "objective")
    clip: float = traced(0.2, "largest change of a probability ratio", POSITIVE, "objective")
    value_clip: float = traced(
        0.2, "largest change of a value in an iteration, in units of the reward", POSITIVE, "objective"
    )
    entropy_weight: float = traced(0.01, "weight of the policy's entropy", NONNEGATIVE, "objective")
    value_weight: float = traced(0.5, "weight of the value loss", NONNEGATIVE, "objective")
    max_gradient_norm: float = traced(
        0.5, "largest norm of the actor's and of the critic's gradient", POSITIVE, "objective"
    )
    num_epochs: int = static(4, "passes over a rollout", at_least(1), "objective")
    num_minibatches: int = static(8, "optimiser steps of a pass", at_least(1), "objective")


@configuration
class UpdateRule:
    """The optimiser; rates that are not given are those of `tuned.py`."""

    optimizer: Literal["adam", "rmsprop", "lion", "sgd", "open", "no_features"] = static(
        "adam", "what turns gradients into updates; open and no_features are learned", group="optimiser"
    )
    lr: float | None = traced(None, "learning rate (default: tuned)", POSITIVE, "optimiser")
    beta1: float | None = traced(
        None,
        "decay of the first moment: adam, lion; momentum of sgd (default: tuned)",
        FRACTION,
        "optimiser",
    )
    beta2: float | None = traced(
        None, "decay of the second moment: adam, rmsprop, lion (default: tuned)", FRACTION, "optimiser"
    )
    epsilon: float | None = traced(
        None, "added to the denominator: adam, rmsprop (default: tuned)", POSITIVE, "optimiser"
    )
    anneal: float | None = traced(
        None, "share of the learning rate that is lost linearly by the end (default: tuned)", FRACTION, "optimiser"
    )
    model: str = static(
        "",
        "weights of open and no_features: a name of published ones, a .npy file, or a run (runs/x, runs/x#3)",
        group="optimiser",
    )
    without: Literal["none", "parameter", "training_clock", "batch_clock", "layer", "dormancy", "noise"] = static(
        "none", "what open does not see or do", group="optimiser"
    )
    zero_mean: Literal["agent", "network", "none"] = static(
        "agent", "what the updates of open have mean 0 over", group="optimiser"
    )


@configuration
class PPO(UpdateRule, Surrogate, ActorCritic, Rollouts):
    """All that an agent learns by; a program of your own adds what runs and how long."""

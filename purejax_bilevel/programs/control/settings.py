"""Settings that the programs of control share, in groups; functions take the narrowest group that has what they need.

A program's configuration is composed of these and its own groups, by inheritance: `q_learning.Config`,
`soft_actor_critic.Config`. Numbers of units are traced, so each comes with the size of the arrays that hold the largest
among the members.
"""

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

    agent_type: str = static("", "who trains the model", group="agent")
    env_name: str = static("", "environment with vector observations", group="environment", task=True)


@configuration
class Schedule(Task):
    """How long it runs."""

    num_train_steps: int = static(50_000, "environment steps of each member", at_least(1), "schedule")
    init_steps: int = static(1000, "steps with uniform actions before learning starts", at_least(1), "schedule")


@configuration
class Evaluation(Schedule):
    """How often the policy is evaluated, and on how many episodes."""

    eval_frequency: int = static(1000, "steps between evaluations (0: only at the end)", at_least(0), "schedule")
    eval_episodes: int = static(10, "episodes of an evaluation", at_least(1), "schedule")
    final_eval_episodes: int = static(20, "episodes of the last evaluation", at_least(1), "schedule")


@configuration
class Differentiable:
    """What it takes to differentiate through steps of Adam."""

    eps_root: float = static(0.0, "added to Adam's squared gradients before the root", hidden=True)


@configuration
class Outer(Differentiable):
    """The model and its optimiser."""

    lr: float | None = traced(None, "Adam rate of the model (default: tuned per agent)", POSITIVE, "outer problem")
    model_hidden_dim: int = traced(
        32, "units in each hidden layer of the model", at_least(1), "outer problem", "max_model_hidden_dim"
    )
    num_T_steps: int = static(1, "model steps per environment step", at_least(1), "outer problem")
    max_model_hidden_dim: int = static(0, "array size of the model", hidden=True)


@configuration
class ValueEquivalence(Outer):
    """The model's loss of value-equivalent prediction."""

    num_ensemble_vep: int = static(5, "random value functions", FEW, "outer problem")


@configuration
class Hypergradient(Outer):
    """Where the model's gradient comes from in a bilevel problem, and its smoothing over time."""

    with_inv_jac: Literal["identity", "cg", "gmres", "neumann", "dense"] = static(
        "identity",
        "inverse Hessian: identity approximation or a linear solver",
        group="hypergradient",
        particular=True,
    )
    damping: float = traced(1e-5, "added to the Hessian (cg, gmres, dense)", NONNEGATIVE, "hypergradient")
    solver_steps: int = static(
        100,
        "largest number of solver steps, terms of the Neumann series, size of GMRES's Krylov space",
        at_least(1),
        "hypergradient",
    )
    neumann_step_size: float = traced(0.1, "step size of the Neumann series", POSITIVE, "hypergradient")
    num_dual_Q_steps: int = static(
        0,
        "steps on a dual network per outer step (0: closed-form adjoint)",
        at_least(0),
        "hypergradient",
        particular=True,
    )
    dual_lr: float = traced(3e-4, "Adam rate of the dual network", POSITIVE, "hypergradient")
    smoothing: Literal["none", "window", "ema"] = static(
        "none",
        "time smoothing of the hypergradient: exact window, exponential average",
        group="hypergradient",
        particular=True,
    )
    smoothing_window: int = traced(
        1000, "hypergradients averaged (ema: effective number)", at_least(1), "hypergradient", "max_smoothing_window"
    )
    beta: float = traced(0.3, "share of the newest hypergradient beside the average", FRACTION, "hypergradient")
    max_smoothing_window: int = static(0, "array size of the smoothing window", hidden=True)


@configuration
class Inner(Differentiable):
    """The Q-function, its optimiser and its target network."""

    inner_lr: float | None = traced(
        None, "Adam rate of the Q-function (default: tuned per agent)", POSITIVE, "inner problem"
    )
    num_Q_steps: int | None = static(1, "Q steps per outer step", at_least(1), "inner problem")
    hidden_dim: int = traced(
        32, "units in each hidden layer of the Q-function", at_least(1), "inner problem", "max_hidden_dim"
    )
    tau: float | None = traced(None, "target network's step (default: tuned per agent)", FRACTION, "inner problem")
    discount: float = traced(0.99, "discount factor", FRACTION, "inner problem")
    max_hidden_dim: int = static(0, "array size of the Q-function", hidden=True)


@configuration
class WarmStart(Inner):
    """Where each inner problem starts."""

    no_warm: bool = static(False, "start each inner problem from a fresh Q-function", group="inner problem")
    # A fresh Adam starts with a step of the rate's size along the gradient's sign: the critic follows the model's
    # targets at full speed. With its state carried, as in OMD's code, omd learned later on Pendulum-v1.
    warm_opt: bool = static(False, "carry the Q-function's Adam state between inner problems", group="inner problem")


@configuration
class Learning(WarmStart, Hypergradient, ValueEquivalence):
    """All that agents of either kind of actions learn by."""


@configuration
class Replay:
    """The transitions that are learned from."""

    batch_size: int = static(256, "transitions per batch", at_least(1), "data")
    capacity: int = static(20_000, "transitions stored", at_least(1), "data")


# --- discrete actions alone -------------------------------------------------------------------------------------------


@configuration
class ModelHeads(Outer):
    """What the model predicts, and how."""

    prob_model: bool = static(False, "Gaussian model of the next observation", group="outer problem")
    no_learn_reward: bool = static(False, "use the true reward instead of a learned one", group="outer problem")


@configuration
class SoftQ(Inner):
    """Soft Q-learning and its policy."""

    alpha: float = traced(0.01, "temperature of the soft value and of the policy", POSITIVE, "inner problem")
    hard: bool = static(False, "hard maximum and greedy policy instead of soft ones", group="inner problem")
    no_double: bool = static(False, "one Q head instead of two", group="inner problem")
    eps: float = traced(0.1, "probability of a uniform action", FRACTION, "data")


@configuration
class QLearning(Learning, SoftQ, ModelHeads):
    """All that agents for discrete actions learn by."""


# --- continuous actions alone -----------------------------------------------------------------------------------------


@configuration
class Copies(Schedule):
    """How many environments a member steps, how often it learns from them, and what else it observes."""

    dim_distract: int = static(0, "standard normal numbers appended to every observation", at_least(0), "environment")
    num_envs: int = static(1, "copies of the environment of each member", at_least(1), "environment")
    updates_per_step: int = static(1, "updates after each step of all copies", at_least(1), "schedule")


@configuration
class PolicyLearning(Differentiable):
    """The policy, its temperature and their optimisers."""

    policy_lr: float = traced(3e-4, "Adam rate of the policy", POSITIVE, "policy")
    temperature_lr: float = traced(3e-4, "Adam rate of the temperature's logarithm", POSITIVE, "policy")
    init_temperature: float = traced(1.0, "weight of the entropy at the start", POSITIVE, "policy")
    target_entropy: float = traced(-0.5, "entropy aimed at, per dimension of the action", group="policy")
    policy_with_critic: bool = static(
        False,
        "policy and temperature step after each critic step, on its observations, so before the outer loss, as in "
        "OMD's code (default: once per update, at its end)",
        group="policy",
    )
    separate_policy_heads: bool = static(
        False,
        "start the policy's means and log standard deviations as two layers of gain sqrt(2), as in OMD's code "
        "(default: one of gain 1)",
        group="policy",
    )


@configuration
class SoftActorCritic(PolicyLearning, Learning):
    """All that agents for continuous actions learn by."""

    separate_noise: bool = static(
        False,
        "draw the policy's noise anew for each critic step and for the outer loss, as OMD's code (default: shared)",
        group="hypergradient",
    )
    one_batch: bool = static(
        False,
        "all losses of an update on one batch, as in OMD's code (default: the policy draws its own, mle and vep one "
        "for each step)",
        group="data",
    )

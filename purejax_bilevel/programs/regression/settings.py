"""Settings of non-stationary regression, in groups; functions take the narrowest group that has what they need.

Numbers of units, lags and steps of a window are traced, so each comes with the size of the arrays that hold the largest
among the members.
"""

from typing import Literal

from purejax_bilevel.configuration import (
    FINITE,
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

    agent_type: str = static("", "where the gradient of lambda comes from", group="agent")


@configuration
class Schedule(Task):
    """How long it runs, and how often it is measured."""

    T_max: int = static(5000, "time steps of each member", at_least(1), "schedule")
    eval_frequency: int = static(
        100,
        "time steps between evaluations, over which the error is averaged (0: only one, at the end)",
        at_least(0),
        "schedule",
    )
    regret_frequency: int = static(
        10, "time steps between comparisons with constant lambda (0: never)", at_least(0), "schedule"
    )


@configuration
class Samples:
    """The function to be learned, its inputs and the noise."""

    input_dim: int = static(5, "inputs of the regression", at_least(1), "data")
    output_dim: int = static(3, "outputs of the regression", at_least(1), "data")
    n_samples: int = static(256, "fixed inputs; one half is for the inner problem", at_least(2), "data")
    batch_size: int = static(128, "inputs per time step, of each half", at_least(1), "data")
    truth_hidden_dim: int = static(64, "hidden units of the function to be learned", at_least(1), "data")
    noise_level: float = traced(1.0, "standard deviation of the targets' noise", NONNEGATIVE, "data")


@configuration
class Shift(Samples):
    """How the targets move."""

    shift_type: Literal["sinusoidal", "linear", "abrupt", "none"] = static(
        "sinusoidal", "how the targets move", group="shift", task=True
    )
    beta: float = traced(10.0, "amplitude (sinusoidal, abrupt)", FINITE, "shift")
    omega: float = traced(0.2, "radians per time step (sinusoidal)", FINITE, "shift")
    alpha: float = traced(
        0.002, "distance per time step (linear; the original's 0 does not move the targets)", FINITE, "shift"
    )
    abrupt_steps: int = traced(500, "time steps between jumps from beta to -beta or back", at_least(1), "shift")


@configuration
class Inner(Samples):
    """The network, its optimiser and the past that it is fitted to."""

    hidden_dim: int = traced(
        64, "units in each hidden layer of the network", at_least(1), "inner problem", "max_hidden_dim"
    )
    window_size: int = traced(60, "past times in the inner problem", at_least(1), "inner problem", "max_window_size")
    num_inner_steps: int = static(16, "Adam steps per time step", at_least(1), "inner problem")
    inner_lr: float = traced(1e-4, "Adam rate of the network", POSITIVE, "inner problem")
    max_hidden_dim: int = static(0, "array size of the network", hidden=True)
    max_window_size: int = static(0, "array size of lambda", hidden=True)


@configuration
class Window(Inner, Shift):
    """The past targets."""


@configuration
class Outer(Inner):
    """The weights lambda of the past and their optimiser."""

    outer_lr: float = traced(1e-2, "Adam rate of lambda", POSITIVE, "outer problem")
    lambda_reg: float = traced(0.0, "initial value of every lambda", NONNEGATIVE, "outer problem")
    average_hypergradients: bool | None = static(
        None,
        "average hypergradients over time (default: as the agent does)",
        group="outer problem",
        particular=True,
    )
    grad_buffer_size: int = traced(100, "hypergradients averaged", at_least(1), "outer problem", "max_grad_buffer_size")
    newest_share: float = traced(0.0, "share of the newest hypergradient beside the average", FRACTION, "outer problem")
    max_grad_buffer_size: int = static(0, "array size of the smoothing window", hidden=True)


@configuration
class Hypergradient(Inner):
    """Where the gradient of lambda comes from."""

    num_dual_steps: int = static(1, "Adam steps on the dual network per time step", at_least(1), "hypergradient")
    dual_lr: float = traced(0.0, "Adam rate of the dual network (0: inner_lr)", NONNEGATIVE, "hypergradient")
    reference_dual: bool = static(
        False,
        "the original's rule, a dual forgotten at every step and the opposite sign",
        group="hypergradient",
        particular=True,
    )
    adjoint_floor: float = traced(1.0, "smallest sum of lambda that the adjoint sees", POSITIVE, "hypergradient")
    aid_cg_iters: int = static(10, "largest number of conjugate gradient steps", at_least(1), "hypergradient")
    aid_cg_tol: float = traced(1e-6, "tolerance of conjugate gradient", NONNEGATIVE, "hypergradient")
    aid_cg_reg: float = traced(1e-4, "added to the Hessian", NONNEGATIVE, "hypergradient")
    eps_root: float = traced(
        1e-24, "under the root of the network's Adam: bounds its derivative", NONNEGATIVE, "hypergradient"
    )


@configuration
class Learning(Hypergradient, Outer):
    """All that agents learn by."""


@configuration
class Regret:
    """What the agent is compared with."""

    regret_window: int = traced(
        100, "hypergradients averaged in the local regret", at_least(1), "regret", "max_regret_window"
    )
    regret_grid_size: int = static(7, "constant values of lambda compared with", at_least(2), "regret")
    regret_lambda_max: float = traced(5.0, "largest of them; the smallest is 0", POSITIVE, "regret")
    max_regret_window: int = static(0, "array size of the local regret's window", hidden=True)

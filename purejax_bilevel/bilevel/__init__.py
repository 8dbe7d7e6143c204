"""Bilevel optimisation in jax, on any pytree: hypergradients, their smoothing over time, and regret.

`implicit` and `functional` differentiate the inner solution, `unrolled` the inner optimiser, `evolution` nothing;
`smoothing` and `regret` treat the hypergradients that come out. Nothing here knows of reinforcement learning or of
experiments.
"""

from purejax_bilevel.bilevel._common import LinearSolver
from purejax_bilevel.bilevel.evolution import antithetic_gradient
from purejax_bilevel.bilevel.functional import (
    adjoint_objective,
    closed_form_adjoint,
    fit_dual,
    functional_hypergradient,
    separable_hessian,
)
from purejax_bilevel.bilevel.implicit import (
    conjugate_gradient,
    dense,
    gmres,
    identity,
    implicit_root,
    minimum_hypergradient,
    minimum_hypergradient_and_residual,
    neumann,
    relative_residual,
    root_hypergradient,
    root_hypergradient_and_residual,
)
from purejax_bilevel.bilevel.regret import LocalRegret, LocalRegretState, local_regret, static_regret
from purejax_bilevel.bilevel.smoothing import (
    ExponentialAverageState,
    WindowAverageState,
    exponential_average,
    window_average,
)
from purejax_bilevel.bilevel.unrolled import iterated, iterated_hypergradient, unrolled_hypergradient

__all__ = [
    "ExponentialAverageState",
    "LinearSolver",
    "LocalRegret",
    "LocalRegretState",
    "WindowAverageState",
    "adjoint_objective",
    "antithetic_gradient",
    "closed_form_adjoint",
    "conjugate_gradient",
    "dense",
    "exponential_average",
    "fit_dual",
    "functional_hypergradient",
    "gmres",
    "identity",
    "implicit_root",
    "iterated",
    "iterated_hypergradient",
    "local_regret",
    "minimum_hypergradient",
    "minimum_hypergradient_and_residual",
    "neumann",
    "relative_residual",
    "root_hypergradient",
    "root_hypergradient_and_residual",
    "separable_hessian",
    "static_regret",
    "unrolled_hypergradient",
    "window_average",
]

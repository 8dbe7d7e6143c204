"""The observatory of finite MDPs: theta is the model of the MDP, phi its action values, and the truth is exact."""

from typing import Any

import jax
import jax.numpy as jnp

from purejax_bilevel.configuration import changed, configuration, replace
from purejax_bilevel.environments import finite
from purejax_bilevel.program import Tree
from purejax_bilevel.programs.observatory.estimators import Problem, flat
from purejax_bilevel.programs.observatory.program import Observatory
from purejax_bilevel.programs.observatory.settings import Observed, Observing
from purejax_bilevel.programs.tabular import agents, program

KINDS = ("identity", "neumann", "dense", "unrolled", "es")
NO_NETWORK = "action values in a table are no network"
WHY_NOT = {
    "cg": "the Jacobian of the Bellman equation is not symmetric",
    "adam": "the inner problem is solved by Newton's method",
    "functional": "with a value of its own for each state and action it is the same as identity",
    "dual": NO_NETWORK,
}


@configuration
class Config(Observing, program.Config, Observed):
    """Settings of optimal model design, and what is compared at its evaluations."""

    kinds = KINDS
    why_not = WHY_NOT

    estimators: str = changed(
        Observed, "estimators", "identity neumann:5 neumann:50 dense unrolled:5 unrolled:50 es:32:50"
    )
    estimator_damping: float = changed(Observed, "estimator_damping", 0.0)
    estimator_step_size: float = changed(
        Observed, "estimator_step_size", 1.0, "of value iteration (neumann, unrolled, es)"
    )

    def program(self) -> "TabularObservatory":
        """The program of this (resolved) configuration."""
        return TabularObservatory(self)


class TabularObservatory(Observatory, program.Tabular):
    """Optimal model design whose evaluations compare hypergradients of the model with the exact one.

    A batch is a draw of the noise on the inner solution (`inner_noise`): all that is inexact here. Estimators see the
    noisy action values, the reference the exact ones.
    """

    def frozen_batch(self, state: Any, config: Any, t: jax.Array, key: jax.Array) -> Tree:
        return config.inner_noise * jax.random.normal(key, state.optimal_q.shape)

    def problem(self, state: Any, config: Any, batch: jax.Array) -> Problem:
        return Problem(
            outer=state.model,
            inner=_solution(state, config) + batch,
            outer_loss=lambda q: agents.outer_loss(config, state.true, q),
            optimality=lambda model, q: agents.optimality(config, state.true, model, q),
        )

    def reference(
        self, state: Any, config: Any, batches: Tree, key: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The exact hypergradient at the exact action values; dampings and step sizes are what they are."""
        exact = replace(config, with_inv_jac="exact")
        gradient = agents.hypergradient(exact, state.true, state.model, _solution(state, config))[1]
        return flat(gradient), jnp.zeros(()), jnp.ones(())

    def exact(self, problem: Problem, config: Any, reference: jax.Array) -> jax.Array:
        """The same on every batch."""
        return reference


def _solution(state: Any, config: Any) -> jax.Array:
    """The action values that solve the model's Bellman equation."""
    world = agents.imagined(state.model, state.true, config.temperature)
    return finite.action_values(world, finite.optimal_values(world, config.temperature, state.values))

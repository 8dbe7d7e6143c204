"""The observatory of regression whose targets move: theta are the weights of the past, phi is the network."""

import functools
from typing import Any

import jax

from purejax_bilevel.configuration import configuration, replace
from purejax_bilevel.networks import Network
from purejax_bilevel.program import Tree
from purejax_bilevel.programs.observatory.estimators import Problem
from purejax_bilevel.programs.observatory.program import Observatory
from purejax_bilevel.programs.observatory.settings import Observed, Observing
from purejax_bilevel.programs.regression import agents, data, program
from purejax_bilevel.programs.regression.agents import Data, Summary


@configuration
class Config(Observing, program.Config, Observed):
    """Settings of regression, and what is compared at its evaluations."""

    def program(self) -> "RegressionObservatory":
        """The program of this (resolved) configuration."""
        return RegressionObservatory(self)


class RegressionObservatory(Observatory, program.Regression):
    """Regression whose evaluations compare hypergradients of the weights lambda.

    A batch is what a time step draws: inputs, targets of the past on the inner ones and today's on the outer ones.
    """

    def __init__(self, config: Config):
        super().__init__(config)
        # `exact` draws today's targets on the inner inputs too, which the closed form needs.
        self.drawing = program.Regression(replace(config, agent_type="exact"))

    def frozen_batch(self, state: Any, config: Any, t: jax.Array, key: jax.Array) -> Tree:
        return self.drawing._draw(state.replace(key=key), config, t)

    def problem(self, state: Any, config: Any, batch: tuple[Data, data.WindowData]) -> Problem:
        (own, window), learner = batch, state.learner
        summary = data.summarise(window, learner.weights)

        def inner_loss(summary: Summary, inner: Network) -> jax.Array:
            return agents.inner_loss(summary, inner, own.x_inner)

        def dual(num_steps: int, key: jax.Array) -> Summary:
            rates = {"num_dual_steps": num_steps, "dual_lr": config.estimator_dual_lr, "reference_dual": False}
            fitting, fresh = replace(config, **rates), agents.init_network(config, key)
            with_dual = learner.replace(dual=fresh, dual_optimizer=agents.dual_optimizer(fitting).init(fresh))
            return agents.dual_hypergradient(fitting, with_dual, own, summary)[1]

        return Problem(
            outer=summary,
            inner=learner.inner,
            outer_loss=lambda inner: agents.outer_loss(agents.predict(inner, own.x_outer), own.y_outer),
            optimality=lambda summary, inner: jax.grad(inner_loss, argnums=1)(summary, inner),
            inner_loss=inner_loss,
            optimizer=agents.inner_optimizer(config),
            optimizer_state=learner.inner_optimizer,
            functional=lambda: agents.closed_form_hypergradient(config, learner, own, summary),
            dual=dual,
            pull_back=functools.partial(data.pull_back, window),
        )

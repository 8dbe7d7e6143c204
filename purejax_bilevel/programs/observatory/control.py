"""The observatory of model-based Q-learning: theta is the world model, phi the Q-function, as in `control`."""

from typing import Any

import jax
import optax

from purejax_bilevel.configuration import configuration, replace
from purejax_bilevel.networks import Heads
from purejax_bilevel.program import Program, Tree
from purejax_bilevel.programs.adaptation import adapted
from purejax_bilevel.programs.control import agents, q_learning
from purejax_bilevel.programs.control.learners import Learner, Model, q_optimizer
from purejax_bilevel.programs.control.learning_ahead import EPS_ROOT
from purejax_bilevel.programs.observatory.estimators import Problem
from purejax_bilevel.programs.observatory.program import Observatory
from purejax_bilevel.programs.observatory.settings import Observed, Observing
from purejax_bilevel.replay import Batch


@configuration
class Config(Observing, q_learning.Config, Observed):
    """Settings of model-based Q-learning, and what is compared at its evaluations."""

    def program(self) -> Program:
        """The program of this (resolved) configuration."""
        return adapted(ControlObservatory(self), self)


class ControlObservatory(Observatory, q_learning.ModelBased):
    """Q-learning with a model whose evaluations compare hypergradients of the model.

    The inner problem is that of omd on one batch: the Q-function of smallest Bellman error on the batch as the model
    would have it, with a target network that stays. The outer loss is the Bellman error on the real batch.
    """

    def frozen_batch(self, state: Any, config: Any, t: jax.Array, key: jax.Array) -> Tree:
        return self._draw(state.storage, config, t, key)

    def problem(self, state: Any, config: Any, batch: Batch) -> Problem:
        learner: Learner = state.learner

        def inner_loss(model: Model, q: Heads) -> jax.Array:
            return learner.q_loss(config, q, learner.predict(config, model, batch))

        def dual(num_steps: int, key: jax.Array) -> Model:
            fitting = replace(config, num_dual_Q_steps=num_steps, dual_lr=config.estimator_dual_lr)
            fresh = learner.init_q(config, key, batch.obs.shape[0], batch.action.shape[0])
            state = optax.adam(fitting.dual_lr).init(fresh)
            own = learner.replace(dual=fresh, dual_optimizer=state)
            return agents.hypergradient_funcbo(fitting, own, batch)[1]

        return Problem(
            outer=learner.model,
            inner=learner.q,
            outer_loss=lambda q: learner.q_loss(config, q, batch),
            optimality=lambda model, q: jax.grad(inner_loss, argnums=1)(model, q),
            inner_loss=inner_loss,
            optimizer=q_optimizer(replace(config, eps_root=EPS_ROOT)),
            optimizer_state=learner.q_optimizer,
            functional=lambda: agents.hypergradient_funcbo(config, learner.replace(dual=None), batch)[1],
            dual=dual,
        )

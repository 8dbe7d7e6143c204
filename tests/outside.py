"""Agents of somebody else: one file outside the package, one value for each program."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from purejax_bilevel.programs.control import agents, soft_actor_critic_agents
from purejax_bilevel.programs.control.settings import Learning, QLearning
from purejax_bilevel.programs.regression import agents as regression
from purejax_bilevel.programs.regression import settings as regression_settings
from purejax_bilevel.programs.tabular import agents as tabular
from purejax_bilevel.programs.tabular import settings as tabular_settings
from purejax_bilevel.replay import Batch

# --- discrete actions: a loss of the model, and something carried from step to step -----------------------------------


class Learner(agents.Learner):
    slow: agents.Model  # follows the model

    def target(self, config: QLearning, batch: Batch) -> jax.Array:
        """With the rewards that the slow model predicts."""
        slow = self.predict(config, self.slow, batch)
        return agents.bellman_target(config, self.target_q, batch._replace(reward=slow.reward))


def init(config: QLearning, key: jax.Array, obs_dim: int, num_actions: int) -> Learner:
    learner = agents.init_learner(config, key, obs_dim, num_actions)
    return Learner(**vars(learner), slow=learner.model)


def absolute_error(config: Learning, learner: Learner, batch: Batch, predicted: Batch) -> jax.Array:
    return jnp.abs(predicted.next_obs - batch.next_obs).sum(0).mean() + jnp.abs(predicted.reward - batch.reward).mean()


def step(config: QLearning, learner: Learner, draw: Any, key: jax.Array, t: jax.Array) -> tuple[Learner, agents.Losses]:
    learner, losses = agents.predictive_agent(absolute_error)(config, learner, draw, key, t)
    return learner.replace(slow=optax.incremental_update(learner.model, learner.slow, 0.1)), losses


SLOW = agents.DiscreteAgent(
    name="slow",
    text="absolute errors, and rewards of a model that follows slowly",
    step=step,
    init=init,
    defaults={"lr": 2e-3, "inner_lr": 3e-3, "tau": 0.04},
    settings=("num_T_steps", "smoothing"),
)

# --- the other programs -----------------------------------------------------------------------------------------------

CONTINUOUS = soft_actor_critic_agents.ContinuousAgent(
    name="absolute",
    text="absolute errors",
    step=soft_actor_critic_agents.with_policy(agents.predictive_agent(absolute_error)),
    defaults={"lr": 2e-3, "inner_lr": 3e-3, "num_Q_steps": 2},
)


def sign_step(config: regression_settings.Learning, learner: Any, data: Any, summary: Any) -> Any:
    found, learner = regression.exact_agent(config, learner, data, summary)
    return found._replace(gradient=jax.tree.map(jnp.sign, found.gradient)), learner


REGRESSION = regression.RegressionAgent(
    name="signs",
    text="signs of the exact hypergradient",
    step=sign_step,
    inner_targets=True,
    defaults={"average_hypergradients": False},
)


def reward_step(config: tabular_settings.Learning, state: tabular.State, t: jax.Array) -> Any:
    def loss_of(model: tabular.Model) -> jax.Array:
        return jnp.square(model.reward - state.true.reward).mean()

    return state, *jax.value_and_grad(loss_of)(state.model)


TABULAR = tabular.TabularAgent(name="reward", text="the reward alone", step=reward_step)

# --- mistakes ---------------------------------------------------------------------------------------------------------

NO_RATE = agents.DiscreteAgent(name="no_rate", text="", step=step, defaults={"inner_lr": 1e-3, "tau": 0.1})
FIXED_DEFAULT = agents.DiscreteAgent(name="fixed", text="", step=step, defaults={"num_Q_steps": 3})
UNKNOWN_SETTING = agents.DiscreteAgent(name="unknown", text="", step=step, settings=("depth",))

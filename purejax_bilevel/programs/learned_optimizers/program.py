"""PPO with any optimiser, fixed or learned, as one pure program.

Outline of a run (every line inside one compiled loop):

    for t in 0 .. num_train_steps - 1:
        step num_envs copies of the environment num_steps times with the policy (ppo.py)
        num_epochs times, over num_minibatches: gradients of actor and critic, clipped apart, one step of the optimiser
        every eval_frequency iterations: evaluate the policy's most likely actions

The optimiser is an argument; nothing else depends on which one it is.
"""

import dataclasses
from typing import Any, Self

import flax.struct
import jax
import jax.numpy as jnp

from purejax_bilevel.configuration import changed, configuration, replace, validate
from purejax_bilevel.errors import UserError
from purejax_bilevel.program import Measure, Metrics, Program, Stage, Tree
from purejax_bilevel.programs.control import rollouts
from purejax_bilevel.programs.learned_optimizers import actor_critic, normalisation, ppo, tasks, update_rules
from purejax_bilevel.programs.learned_optimizers.agents import AGENTS
from purejax_bilevel.programs.learned_optimizers.settings import PPO, Evaluation, Task
from purejax_bilevel.programs.saved_policies import POLICY

# Named streams of random numbers, after those of `ppo`.
AGENT, LEVEL, EVALUATE, VIDEO = range(4)

LARGEST_COUNT = 2**31 - 1  # environment and optimiser steps are counted in 32 bits


@configuration
class Config(PPO, Evaluation):
    """Settings of one training program; a traced field may hold several values, one per point of a grid.

    The defaults are those of OPEN's MinAtar studies (Goldie et al. 2024, table 3), but for the length of a run.
    """

    agent_type: str = changed(Task, "agent_type", "ppo", choices=AGENTS)

    def program(self) -> "PolicyOptimization":
        """The training program of this (resolved) configuration."""
        return PolicyOptimization(self)

    @property
    def title(self) -> str:
        """Short name of the experiment."""
        return f"{AGENTS[self.agent_type].name}-{self.optimizer}-{self.env_name}"

    def resolved(self) -> Self:
        """Fills in the optimiser's rates and checks everything.

        Raises:
            UserError: for a value that is not allowed, or two that do not go together.
        """
        config = update_rules.with_model(update_rules.with_rates(AGENTS.tuned(self)))
        validate(config)
        config = replace(config, horizon=config.horizon or config.num_train_steps)
        _check_together(config)
        return config


def _check_together(config: Config) -> None:
    size = config.num_envs * config.num_steps
    if size % config.num_minibatches:
        raise UserError(
            f"--num_envs {config.num_envs} x --num_steps {config.num_steps} = {size} samples cannot be divided into "
            f"--num_minibatches {config.num_minibatches} of one size."
        )
    steps = config.num_train_steps * max(size, config.num_epochs * config.num_minibatches)
    if steps > LARGEST_COUNT:
        raise UserError(
            f"--num_train_steps {config.num_train_steps} are {steps} environment or optimiser steps, more than can be "
            f"counted ({LARGEST_COUNT})."
        )
    if config.horizon < config.num_train_steps:
        raise UserError(
            f"--horizon {config.horizon} is below --num_train_steps {config.num_train_steps}: rates would fall below 0."
        )
    AGENTS.check_settings(config)
    update_rules.check(config)
    tasks.make(config)


class State(flax.struct.PyTreeNode):
    """Everything a member carries from step to step."""

    key: jax.Array
    level: Any  # of its Grid-World, where each member draws one
    agent: ppo.State


class PolicyOptimization(Program[Config]):
    """The program: pure functions of a member's configuration, sharing environment and weights of a learned optimiser.

    Args:
        config: resolved configuration; only its static fields matter here.
    """

    headline = "evaluation_return"
    step_unit = "iterations"
    artefact_kind = POLICY
    measures = (
        Measure("evaluation_return", "return of evaluation episodes", better="higher"),
        Measure("training_return", "return of the episodes finished in training", better="higher"),
        Measure("last_return", "return of the last finished episode of each environment", better="higher"),
        Measure("dormant_share", "share of neurons that are dormant"),
        Measure("update_norm", "norm of the update of the parameters"),
        Measure("loss", "loss"),
        Measure("policy_loss", "loss of the policy"),
        Measure("value_loss", "loss of the values"),
        Measure("entropy", "entropy of the policy"),
        Measure("clipped_share", "share of probability ratios beyond the clip"),
        Measure("divergence", "KL divergence from the policy that collected"),
        Measure("actor_gradient_norm", "norm of the actor's gradient"),
        Measure("critic_gradient_norm", "norm of the critic's gradient"),
        Measure("parameter_norm", "norm of the parameters"),
        Measure("final_return", "return of the last evaluation", better="higher", dims=("episode",), when="end"),
    )

    def __init__(self, config: Config):
        self.config = config
        self.task = tasks.make(config)
        self.agent = AGENTS[config.agent_type]
        self.stages = (Stage(config.num_train_steps, config.eval_frequency, self.update, self.evaluate),)

    def shared(self) -> Tree:
        """Weights of a learned optimiser."""
        return update_rules.load(self.config.model) if self.config.optimizer in update_rules.LEARNED else ()

    def init(self, key: jax.Array, config: Config, shared: Tree = ()) -> State:
        """State of a member before its first step; the key becomes the member's own."""
        level: Any = ()
        if config.draw_level:
            level = tasks.with_level(self.task, config, jax.random.fold_in(key, LEVEL)).params
        rule = update_rules.make(config, shared)
        agent = self.agent.init(jax.random.fold_in(key, AGENT), config, self._task(config, level), rule)
        return State(key, level, agent)

    def _task(self, config: Config, level: Any) -> tasks.Task:
        return dataclasses.replace(self.task, params=level) if config.draw_level else self.task

    def update(self, state: State, config: Config, t: jax.Array, shared: Tree = ()) -> tuple[State, Metrics]:
        """One iteration.

        Args:
            state: of one member.
            config: of that member.
            t: number of the iteration, shared by all members.
            shared: weights of a learned optimiser.
        """
        rule = update_rules.make(config, shared)
        agent, metrics = self.agent.step(state.agent, config, self._task(config, state.level), rule, t, config.horizon)
        return state.replace(agent=agent), metrics

    def evaluate(
        self, state: State, config: Config, t: jax.Array, is_last: jax.Array, shared: Tree = ()
    ) -> dict[str, jax.Array]:
        """Plays episodes with the policy's most likely actions, and reads what training leaves.

        Returns:
            `evaluation_return` (mean), `final_return` `[episodes]` (NaN for those not played before the last
            evaluation), `last_return` (mean over environments; 0 for one whose first episode goes on),
            `parameter_norm`.
        """
        key = jax.random.fold_in(jax.random.fold_in(state.key, EVALUATE), t)
        episodes = (config.eval_episodes, config.final_eval_episodes)
        return rollouts.evaluate(*self._rollout(state, config), key, *episodes, is_last) | {
            "last_return": state.agent.episodes.last.mean(),
            "parameter_norm": jnp.sqrt(sum(jnp.vdot(leaf, leaf) for leaf in jax.tree.leaves(self._params(state)))),
        }

    def episode(self, state: State, config: Config, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        """One episode of the policy's most likely actions, for a video.

        Returns:
            Observations `[max_steps, obs]` and whether the episode was still going on `[max_steps]`.
        """
        key = jax.random.fold_in(jax.random.fold_in(state.key, VIDEO), t)
        return rollouts.episode(*self._rollout(state, config), key)

    def _rollout(self, state: State, config: Config) -> tuple[Any, Any, int, rollouts.Policy]:
        def policy(obs: jax.Array, key: jax.Array) -> jax.Array:
            del key
            seen = normalisation.observations(state.agent.normaliser, obs.T)
            return actor_critic.mode(actor_critic.policy(self._params(state), seen, config.activation))

        task = self._task(config, state.level)
        return task.environment, task.params, task.max_steps, policy

    def _params(self, state: State) -> Tree:
        return state.agent.learner.params

    def artefact(self, state: State) -> Tree:
        """The policy: actor and critic, and the statistics by which observations are normalised."""
        return {"params": self._params(state), "observations": state.agent.normaliser.obs}

    def is_finite(self, state: State) -> jax.Array:
        """Whether all learned parameters of a member are finite numbers."""
        return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(self._params(state))]).all()

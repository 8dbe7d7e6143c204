"""Bilevel model-based Q-learning with discrete actions, as one pure program.

Outline of a run (every line inside one compiled loop):

    for t in 0 .. num_train_steps - 1:
        act softly (uniformly before init_steps, and with probability eps), step the environment, store the transition
        if t >= init_steps:
            agent (agents.py): inner steps on Q with the model's transitions, then one outer step on the model
        every eval_frequency steps: evaluate the policy

The agent is an argument; nothing else in this file depends on which one it is.
"""

import functools
from typing import Any, Literal, Self

import jax
import jax.numpy as jnp

from purejax_bilevel import environments, networks, replay
from purejax_bilevel.configuration import (
    POSITIVE,
    at_least,
    changed,
    configuration,
    replace,
    static,
    traced,
    validate,
    warn_if_idle,
)
from purejax_bilevel.environments import non_stationary
from purejax_bilevel.errors import UserError
from purejax_bilevel.program import Metrics, Program, Tree
from purejax_bilevel.programs import adaptation, saved_policies
from purejax_bilevel.programs.control import agents, learning_ahead, rollouts
from purejax_bilevel.programs.control.acting import ACT, ENVIRONMENT, INIT, LEARN, Acting, State, arrived
from purejax_bilevel.programs.control.settings import Evaluation, Inner, QLearning, Replay, Schedule, SoftQ, Task


@configuration
class NonStationary(Schedule):
    """A reward that changes in the course of a run."""

    non_stationary: Literal["plain", "stationary", "drift"] = static(
        "plain",
        "CartPole's reward everywhere, inside a fixed interval of pole angles, or a drifting one",
        group="environment",
    )
    transition_steps: int = traced(
        0, "drift: steps from one end to the other (0: num_train_steps)", at_least(0), "environment", task=True
    )
    plateau_steps: int = traced(0, "drift: steps of rest at each end", at_least(0), "environment", task=True)
    clear_buffer: bool = static(False, "drift: forget the buffer when a transition ends", group="environment")


@configuration
class Config(adaptation.Adaptation, Replay, QLearning, NonStationary, Evaluation):
    """Settings of one training program; a traced field may hold several values, one per point of a grid."""

    agent_type: str = changed(Task, "agent_type", "omd", choices=agents.AGENTS)
    env_name: str = changed(
        Task, "env_name", "CartPole-v1", "gymnax environment with vector observations, discrete actions"
    )
    eval_frequency: int = changed(
        Evaluation, "eval_frequency", 1000, "environment steps between evaluations (0: only at the end)"
    )
    num_Q_steps: int = changed(Inner, "num_Q_steps", 1)
    time_weighted_sampling: bool = static(False, "prefer recent transitions", group="data")
    time_weight_decay: float = traced(0.05, "probability falls as exp(-decay * age in steps)", POSITIVE, "data")

    def program(self) -> Program:
        """The training program of this (resolved) configuration."""
        return adaptation.adapted(ModelBased(self), self)

    @property
    def title(self) -> str:
        """Short name of the experiment."""
        name = agents.AGENTS[self.agent_type].name
        smoothed, adapted = "" if self.smoothing == "none" else "-smoothed", "-adapted" if self.adapt else ""
        return f"{name}-{self.env_name}{smoothed}{adapted}"

    def resolved(self) -> Self:
        """Fills in the agent's tuned values and checks everything.

        Raises:
            UserError: for a value that is not allowed, or two that do not go together.
        """
        config = agents.AGENTS.tuned(self)
        if config.transition_steps == 0 and config.non_stationary == "drift":
            config = replace(config, transition_steps=config.num_train_steps)
        validate(config)
        _check_together(config)
        warn_if_idle(config)
        return config


def _check_together(config: Config) -> None:
    if config.batch_size > config.init_steps:
        raise UserError(
            f"--batch_size {config.batch_size} is larger than the {config.init_steps} transitions that --init_steps "
            "collects; lower the one or raise the other."
        )
    if config.capacity < config.batch_size:
        raise UserError(f"--capacity {config.capacity} is smaller than --batch_size {config.batch_size}.")
    agents.AGENTS.check_settings(config)
    agent = agents.AGENTS[config.agent_type]
    adaptation.check(config, agent, learning_ahead.why_not(config, agent))
    if config.non_stationary != "plain" and not config.env_name.startswith("CartPole"):
        raise UserError(
            f"--non_stationary {config.non_stationary} is about CartPole's pole angle: not {config.env_name}."
        )
    if config.clear_buffer and config.non_stationary != "drift":
        raise UserError("--clear_buffer needs --non_stationary drift: there is no transition otherwise.")
    if environments.is_continuous(config.env_name):
        raise UserError(
            f"--env_name {config.env_name} has continuous actions and --agent_type {config.agent_type} is for discrete "
            "ones here; use --agent_type sac (from Python: ContinuousConfig)."
        )
    environments.make(config.env_name)


class ModelBased(Acting[Config]):
    """The program: three pure functions of a member's configuration, sharing the environment and the agent.

    Args:
        config: resolved configuration; only its static fields matter here.
    """

    artefact_kind = saved_policies.Q_FUNCTION

    def __init__(self, config: Config):
        self.task = environments.make(config.env_name)
        self.environment = self.task.environment
        if config.non_stationary != "plain":
            self.environment = non_stationary.RewardInterval(self.environment)
        self.agent = agents.AGENTS[config.agent_type]
        super().__init__(config)

    def init(self, key: jax.Array, config: Config, shared: Tree = ()) -> State:
        """State of a member before its first step; the key becomes the member's own."""
        init_key, reset_key = jax.random.split(jax.random.fold_in(key, INIT))
        obs, environment = self.environment.reset(reset_key, self._environment_params(config, jnp.int32(0)))
        task = self.task
        return State(
            key=key,
            obs=obs.astype(jnp.result_type(float)),
            environment=environment,
            episode_return=jnp.zeros(()),
            storage=replay.init(config.capacity, task.obs_dim, task.num_actions),
            learner=self.agent.init(config, init_key, task.obs_dim, task.num_actions),
        )

    def update(self, state: State, config: Config, t: jax.Array, shared: Tree = ()) -> tuple[State, Metrics]:
        """One environment step and one outer step.

        Args:
            state: of one member.
            config: of that member.
            t: number of the step, shared by all members, so that buffer writes stay cheap under vmap.
        """
        key = self._key(state, t)
        state, metrics = self._interact(state, config, t, key)
        draw = lambda key: self._draw(state.storage, config, t, key)  # noqa: E731
        learner, losses = self.agent.step(config, state.learner, draw, jax.random.fold_in(key, LEARN), t)
        return state.replace(learner=learner), metrics | agents.measured(losses)

    def lookahead(self, state: State, config: Config, t: jax.Array, key: jax.Array) -> adaptation.Lookahead:
        """What would be learned after step `t`, for settings that are adapted; the key is consumed."""
        draw = lambda key: self._draw(state.storage, config, t, key)  # noqa: E731
        return learning_ahead.lookahead(self.agent.step, state.learner, draw, config, t + 1, key)

    def _interact(self, state: State, config: Config, t: jax.Array, key: jax.Array) -> tuple[State, Metrics]:
        policy_key, explore_key, uniform_key = jax.random.split(jax.random.fold_in(key, ACT), 3)
        explore = (jax.random.uniform(explore_key) < config.eps) | (t < config.init_steps)
        uniform = jax.random.randint(uniform_key, (), 0, self.task.num_actions)
        action = jnp.where(explore, uniform, act(config, state.learner.q, state.obs[:, None], policy_key)[0])
        obs, environment, reward, terminated, truncated, info = self.environment.step(
            jax.random.fold_in(key, ENVIRONMENT), state.environment, action, self._environment_params(config, t)
        )
        dtype = state.obs.dtype
        one_hot = jax.nn.one_hot(action, self.task.num_actions, dtype=dtype)
        next_obs = info["final_observation"].astype(dtype)
        storage = replay.add(state.storage, t, state.obs, one_hot, reward, next_obs, terminated)
        state, done, episode_return = arrived(state, storage, obs, environment, reward, terminated | truncated)
        return state, {"training_return": (done * episode_return, done)}

    def _draw(self, storage: jax.Array, config: Config, t: jax.Array, key: jax.Array) -> replay.Batch:
        sample_key, noise_key = jax.random.split(key) if config.prob_model else (key, None)
        since: jax.Array | int = 0
        if config.clear_buffer:
            since = non_stationary.last_transition_end(t, config.transition_steps, config.plateau_steps)
        decay = config.time_weight_decay if config.time_weighted_sampling else None
        batch = replay.sample(storage, t, sample_key, config.batch_size, self.task.obs_dim, since, decay)
        if noise_key is not None:
            batch = batch._replace(noise=jax.random.normal(noise_key, batch.obs.shape, batch.obs.dtype))
        return batch

    def _environment_params(self, config: Config, t: jax.Array) -> Any:
        if config.non_stationary == "plain":
            return self.task.params
        position = jnp.zeros(())
        if config.non_stationary == "drift":
            position = non_stationary.drift_position(t, config.transition_steps, config.plateau_steps)
        return non_stationary.interval_params(self.task.params, position)

    def _rollout(self, state: State, config: Config, t: jax.Array) -> tuple[Any, Any, int, rollouts.Policy]:
        policy = functools.partial(act, config, state.learner.q)
        return self.environment, self._environment_params(config, t), self.task.max_steps, policy

    def artefact(self, state: State) -> Tree:
        """The Q-function's heads, one by one."""
        return {"q": networks.apart(state.learner.q)}

    def is_finite(self, state: State) -> jax.Array:
        """Whether all learned parameters of a member are finite numbers."""
        leaves = jax.tree.leaves((state.learner.q, state.learner.model))
        return jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves]).all()


def act(config: SoftQ, q: networks.Heads, obs: jax.Array, key: jax.Array) -> jax.Array:
    """Actions `[n]` for observations `[obs, n]`: softmax of the mean Q at temperature alpha, greedy if `hard`."""
    values = networks.apply_heads(q, obs).mean(0)
    if config.hard:
        return values.argmax(0)
    return jax.random.categorical(key, values / config.alpha, axis=0)

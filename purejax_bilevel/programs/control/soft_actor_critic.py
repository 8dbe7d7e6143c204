"""Bilevel model-based control with continuous actions, on the skeleton of soft actor-critic, as one pure program.

Outline of a run (every line inside one compiled loop):

    for t in 0 .. num_train_steps - 1:
        in each of num_envs copies of the environment: sample an action from the policy (uniformly before init_steps),
        step, store the transition
        if t >= init_steps, updates_per_step times:
            agent (soft_actor_critic_agents.py): inner steps on the critic with the model's transitions, one outer step
            on the model; then a step on policy and temperature, which never see the model
        every eval_frequency steps: evaluate the policy's mean action

The agent is an argument; nothing else in this file depends on which one it is.
"""

from typing import Any, Self

import jax
import jax.numpy as jnp

from purejax_bilevel import environments, networks, replay
from purejax_bilevel.configuration import (
    LARGEST_WHOLE,
    at_least,
    changed,
    configuration,
    replace,
    validate,
    warn_if_idle,
)
from purejax_bilevel.errors import UserError
from purejax_bilevel.program import Measure, Metrics, Program, Tree
from purejax_bilevel.programs import adaptation, saved_policies
from purejax_bilevel.programs.control import agents, learning_ahead, policies, rollouts, soft_actor_critic_agents
from purejax_bilevel.programs.control.acting import ACT, ENVIRONMENT, INIT, LEARN, Acting, State, step_copies
from purejax_bilevel.programs.control.settings import (
    Copies,
    Evaluation,
    Hypergradient,
    Inner,
    Outer,
    Replay,
    Schedule,
    SoftActorCritic,
    Task,
    WarmStart,
)

LARGEST_CAPACITY = 1_000_000  # transitions stored unless told otherwise


@configuration
class Config(adaptation.Adaptation, Replay, SoftActorCritic, Evaluation, Copies):
    """Settings of one training program; a traced field may hold several values, one per point of a grid.

    The defaults are near those of OMD's MuJoCo study. Different are the lengths of runs and of the random start, what
    is tuned per agent, the model's width (256; there 64), a fresh Adam state of the critic in each inner problem (there
    carried), the order of steps and what batches and noise they share (see `soft_actor_critic_agents`), and the
    policy's last layer. The preset `omd_continuous_original` has that study's treatment: `warm_opt`,
    `policy_with_critic`, `one_batch`, `separate_noise`, `separate_policy_heads` and its numbers.
    """

    agent_type: str = changed(Task, "agent_type", "omd", choices=soft_actor_critic_agents.AGENTS)
    env_name: str = changed(Task, "env_name", "Pendulum-v1", "environment with vector observations, continuous actions")
    num_train_steps: int = changed(
        Schedule, "num_train_steps", 30_000, "steps of each copy of the environment (in all: times num_envs)"
    )
    init_steps: int = changed(
        Schedule, "init_steps", 1000, "steps with uniform actions before learning starts (the paper: 10000)"
    )
    model_hidden_dim: int = changed(Outer, "model_hidden_dim", 256)
    num_T_steps: int = changed(Outer, "num_T_steps", 1, "model steps per update")
    smoothing_window: int = changed(Hypergradient, "smoothing_window", 100)
    inner_lr: float | None = changed(Inner, "inner_lr", None, "Adam rate of the critic (default: tuned per agent)")
    num_Q_steps: int | None = changed(Inner, "num_Q_steps", None, "critic steps per update (default: tuned per agent)")
    hidden_dim: int = changed(Inner, "hidden_dim", 256, "units in each hidden layer of critic and policy")
    tau: float = changed(Inner, "tau", 0.005, "target network's step")
    no_warm: bool = changed(WarmStart, "no_warm", False, "start each inner problem from a fresh critic")
    warm_opt: bool = changed(WarmStart, "warm_opt", False, "carry the critic's Adam state between inner problems")
    capacity: int = changed(
        Replay,
        "capacity",
        0,
        f"transitions stored, in multiples of num_envs (0: all, at most {LARGEST_CAPACITY})",
        check=at_least(0),
    )

    def program(self) -> Program:
        """The training program of this (resolved) configuration."""
        return adaptation.adapted(ActorCritic(self), self)

    @property
    def title(self) -> str:
        """Short name of the experiment."""
        name = soft_actor_critic_agents.AGENTS[self.agent_type].name
        smoothed, adapted = "" if self.smoothing == "none" else "-smoothed", "-adapted" if self.adapt else ""
        return f"{name}-{self.env_name}{smoothed}{adapted}"

    def resolved(self) -> Self:
        """Fills in the agent's tuned values and the capacity, and checks everything.

        Raises:
            UserError: for a value that is not allowed, or two that do not go together.
        """
        config = soft_actor_critic_agents.AGENTS.tuned(self)
        validate(config)
        capacity = config.capacity or min(config.num_train_steps * config.num_envs, LARGEST_CAPACITY)
        config = replace(config, capacity=-(-capacity // config.num_envs) * config.num_envs)
        _check_together(config)
        warn_if_idle(config)
        return config


def _check_together(config: Config) -> None:
    collected = config.init_steps * config.num_envs
    if config.batch_size > collected:
        raise UserError(
            f"--batch_size {config.batch_size} is larger than the {collected} transitions that --init_steps "
            "collects; lower the one or raise the other."
        )
    # Without --capacity a run shorter than its random start is allowed: it stores less and does not learn.
    if config.capacity < config.batch_size and config.num_train_steps > config.init_steps:
        raise UserError(f"--capacity {config.capacity} is smaller than --batch_size {config.batch_size}.")
    per_step = max(config.num_envs, config.updates_per_step)
    if config.num_train_steps * per_step > LARGEST_WHOLE:
        raise UserError(
            f"--num_train_steps {config.num_train_steps} with {config.num_envs} environments and "
            f"{config.updates_per_step} updates per step is more than can be counted ({LARGEST_WHOLE})."
        )
    soft_actor_critic_agents.AGENTS.check_settings(config)
    agent = soft_actor_critic_agents.AGENTS[config.agent_type]
    adaptation.check(config, agent, learning_ahead.why_not(config, agent))
    _make_task(config)


def _make_task(config: Config) -> environments.Continuous:
    name, agent = config.env_name, config.agent_type
    if _is_discrete(name):
        use = "RLConfig" if agent in agents.AGENTS else "--agent_type sql"
        raise UserError(f"--agent_type {agent} needs continuous actions; {name} has discrete ones, use {use}.")
    return environments.make_continuous(name, config.dim_distract)


def _is_discrete(name: str) -> bool:
    if environments.is_continuous(name):
        return False
    try:
        environments.make(name)
    except UserError:  # what is wrong with it, `make_continuous` will say
        return False
    return True


class ActorCritic(Acting[Config]):
    """The program: three pure functions of a member's configuration, sharing the environment and the agent.

    Args:
        config: resolved configuration; only its static fields matter here.
    """

    artefact_kind = saved_policies.ACTOR
    measures = (
        *Acting.measures,
        Measure("policy_loss", "loss of the policy"),
        Measure("temperature", "temperature"),
        Measure("entropy", "entropy of the policy"),
        Measure("policy_gradient_norm", "norm of the policy's gradient"),
    )

    def __init__(self, config: Config):
        self.task = _make_task(config)
        self.agent = soft_actor_critic_agents.AGENTS[config.agent_type]
        super().__init__(config)

    def init(self, key: jax.Array, config: Config, shared: Tree = ()) -> State:
        """State of a member before its first step; the key becomes the member's own."""
        init_key, reset_key = jax.random.split(jax.random.fold_in(key, INIT))
        task = self.task
        obs, environment = jax.vmap(task.environment.reset, (0, None))(
            jax.random.split(reset_key, config.num_envs), task.params
        )
        return State(
            key=key,
            obs=obs.astype(jnp.result_type(float)),
            environment=environment,
            episode_return=jnp.zeros(config.num_envs),
            storage=replay.init(config.capacity, task.obs_dim, task.action_dim),
            learner=self.agent.init(config, init_key, task.obs_dim, task.action_dim),
        )

    def update(self, state: State, config: Config, t: jax.Array, shared: Tree = ()) -> tuple[State, Metrics]:
        """One step of every copy of the environment and `updates_per_step` updates.

        Args:
            state: of one member.
            config: of that member.
            t: number of the step, shared by all members, so that buffer writes stay cheap under vmap.
        """
        key = self._key(state, t)
        state, metrics = self._interact(state, config, t, key)
        learner, losses = self._learn(state.learner, state.storage, config, t, jax.random.fold_in(key, LEARN))
        return state.replace(learner=learner), metrics | agents.measured(losses)

    def _interact(self, state: State, config: Config, t: jax.Array, key: jax.Array) -> tuple[State, Metrics]:
        noise_key, uniform_key = jax.random.split(jax.random.fold_in(key, ACT))
        dtype, shape = state.obs.dtype, (config.num_envs, self.task.action_dim)
        uniform = jax.random.uniform(uniform_key, shape, dtype, -1.0, 1.0)
        outputs = networks.apply_network(state.learner.policy, state.obs.T)
        sampled, _ = policies.sample_and_log_prob(outputs, jax.random.normal(noise_key, shape, dtype).T)
        action = jnp.where(t < config.init_steps, uniform, sampled.T)
        return step_copies(self.task, state, action, jax.random.fold_in(key, ENVIRONMENT), t)

    def _learn(
        self,
        learner: soft_actor_critic_agents.Learner,
        storage: jax.Array,
        config: Config,
        t: jax.Array,
        key: jax.Array,
    ) -> tuple[soft_actor_critic_agents.Learner, agents.Losses]:
        draw = lambda key: self._draw(storage, config, t, key)  # noqa: E731

        def update(learner: soft_actor_critic_agents.Learner, i: jax.Array) -> tuple[Any, agents.Losses]:
            number = t * config.updates_per_step + i
            return self.agent.step(config, learner, draw, jax.random.fold_in(key, i), number)

        if config.updates_per_step == 1:
            return update(learner, jnp.int32(0))
        learner, losses = jax.lax.scan(update, learner, jnp.arange(config.updates_per_step))
        return learner, jax.tree.map(lambda loss: loss.mean(0), losses)

    def lookahead(self, state: State, config: Config, t: jax.Array, key: jax.Array) -> adaptation.Lookahead:
        """What would be learned after step `t`, for settings that are adapted; the key is consumed."""
        draw = lambda key: self._draw(state.storage, config, t, key)  # noqa: E731
        first = (t + 1) * config.updates_per_step
        return learning_ahead.lookahead(self.agent.step, state.learner, draw, config, first, key)

    def _draw(self, storage: jax.Array, config: Config, t: jax.Array, key: jax.Array) -> replay.Batch:
        """Transitions of the steps up to `t`, with noise for the policy."""
        sample_key, noise_key = jax.random.split(key)
        latest = (t + 1) * config.num_envs - 1
        batch = replay.sample(storage, latest, sample_key, config.batch_size, self.task.obs_dim)
        return soft_actor_critic_agents.with_new_noise(batch, noise_key)

    def _rollout(self, state: State, config: Config, t: jax.Array) -> tuple[Any, Any, int, rollouts.Policy]:
        def policy(obs: jax.Array, key: jax.Array) -> jax.Array:
            del key
            return policies.mean_action(networks.apply_network(state.learner.policy, obs)).T

        return self.task.environment, self.task.params, self.task.max_steps, policy

    def artefact(self, state: State) -> Tree:
        """The network of the policy."""
        return {"policy": networks.layers_of(state.learner.policy)}

    def is_finite(self, state: State) -> jax.Array:
        """Whether all learned parameters of a member are finite numbers."""
        learner = state.learner
        leaves = jax.tree.leaves((learner.q, learner.model, learner.policy, learner.log_temperature))
        return jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves]).all()

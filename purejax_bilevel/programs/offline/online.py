"""Reinforcement learning in the environment with an ensemble that is fitted again and again: MBPO, as one pure program.

Outline of a run (every line inside one compiled loop):

    for t in 0 .. num_train_steps - 1:
        every model_every steps: the ensemble is fitted to all real transitions until it gets no better (refitting.py)
        one step in each of num_envs copies of the environment, into the real buffer
        if t >= init_steps, updates_per_step times:
            all rollouts of the policy in the ensemble go one step, into a ring buffer
            the agent makes an update on transitions of both buffers
        every eval_frequency steps: true return of the policy's mean action, and what critics and ensemble expect

It may begin from a policy (`policy`), an ensemble (`model`) and transitions (`dataset`) that other runs left: offline
agents go on online. Source: MBPO, Janner et al. 2019 (arXiv 1906.08253). Its rollouts of all lengths at once every 250
steps are here always under way (imagination.py), as in Mr-Pepe's code.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from purejax_bilevel import environments, replay
from purejax_bilevel.configuration import changed, configuration, replace, validate, warn_if_idle
from purejax_bilevel.program import Measure, Metrics, Stage, Tree
from purejax_bilevel.programs.control import acting
from purejax_bilevel.programs.control import agents as control
from purejax_bilevel.programs.control import settings as control_settings
from purejax_bilevel.programs.offline import (
    buffers,
    datasets,
    ensemble_program,
    fitting,
    imagination,
    models,
    online_checks,
    policy_program,
    refitting,
    saved_policies,
    settings,
)
from purejax_bilevel.programs.offline.agents import ONLINE_AGENTS, Learner, Sources, Units
from purejax_bilevel.programs.offline.ensemble import no_normaliser
from purejax_bilevel.programs.offline.imagination import World
from purejax_bilevel.programs.offline.policy_program import (
    ENSEMBLE,
    EPOCH,
    EVALUATE,
    INIT,
    LEARN,
    ROLLOUT,
    STARTS,
    STEP,
)
from purejax_bilevel.programs.offline.schedule import Schedule, rollout_length
from purejax_bilevel.programs.offline.settings import Fitting, Learning, Task

# Further streams of random numbers: of a member, and of a step.
RESET = 101
ACT, ENVIRONMENT = 101, 102


@configuration
class Config(settings.Online):
    """Settings of one training program; a traced field may hold several values, one per point of a grid."""

    agent_type: str = changed(Task, "agent_type", "mbpo", choices=ONLINE_AGENTS)
    env_name: str = changed(
        control_settings.Task, "env_name", "Pendulum-v1", "environment with vector observations, continuous actions"
    )
    dataset: str = changed(Task, "dataset", "", "file of transitions that the real buffer begins with (default: none)")
    model: str = changed(
        Task, "model", "", "run that left an ensemble to begin from, runs/x or runs/x#3 (default: fresh networks)"
    )
    num_train_steps: int = changed(
        Task, "num_train_steps", 10_000, "steps of each copy of the environment (in all: times num_envs)"
    )
    eval_frequency: int = changed(Task, "eval_frequency", 250, "steps between evaluations (0: only at the end)")
    normalise_observations: bool = changed(
        Learning, "normalise_observations", True, "agents see observations in units of what was seen before learning"
    )
    model_epochs: int = changed(Fitting, "model_epochs", 50, "most epochs of each fit")
    model_batch_size: int = changed(Fitting, "model_batch_size", 64)

    def program(self) -> "Online":
        """The training program of this (resolved) configuration."""
        return Online(self)

    @property
    def title(self) -> str:
        """Short name of the experiment."""
        return f"{ONLINE_AGENTS[self.agent_type].name}-{self.env_name}"

    def resolved(self) -> "Config":
        """Fills in the agent's tuned values and what is given by other runs, and checks everything.

        Raises:
            UserError: for a value that is not allowed, two that do not go together, or a file that does not fit.
        """
        config: Config = ONLINE_AGENTS.tuned(self)
        if config.random_steps is None:
            config = replace(config, random_steps=0 if config.policy else config.init_steps)
        validate(config)
        ONLINE_AGENTS.check_settings(config)
        task = environments.make_continuous(config.env_name)
        sizes = (task.obs_dim, task.action_dim)
        if config.policy:
            config = saved_policies.with_architecture(config, *sizes, config.env_name)
        if config.dataset:
            data = ensemble_program.dataset_of(config)
            datasets.check_environment(data, config.env_name, *sizes, task.max_steps)
        if ONLINE_AGENTS[config.agent_type].has_model:
            config = models.with_parts(config, config.env_name, *sizes) if config.model else config
            online_checks.terminals_of(config)
            policy_program.check_imagination(config)
        config = replace(config, real_capacity=online_checks.capacity_of(config))
        online_checks.check_together(config, ONLINE_AGENTS[config.agent_type])
        policy_program.check_pessimism(config, ONLINE_AGENTS[config.agent_type].defaults)
        warn_if_idle(config)
        return config


class State(flax.struct.PyTreeNode):
    """Everything a member carries from step to step; None for what its agent has no use for."""

    key: jax.Array
    # acting, one of each for every copy of the environment
    obs: jax.Array
    environment: Any
    episode_return: jax.Array
    # data
    storage: jax.Array  # [real_capacity, row]
    # learning
    learner: Learner
    fit: Any  # fitting.Fit
    rollouts: Any  # imagination.Rollouts
    ring: Any  # buffers.Ring
    scales: Any  # Scales


class Scales(flax.struct.PyTreeNode):
    """What pessimism is measured by, of the real transitions at the last fit."""

    largest: jax.Array  # [], u_max
    magnitude: jax.Array  # [], r_max by size
    halt: jax.Array  # [], minus the reward of a halt


class Online(policy_program.PolicyProgram):
    """The program: pure functions of a member's configuration, sharing the environment and the agent.

    Args:
        config: resolved configuration; only its static fields matter here.
    """

    step_unit = "environment steps"

    def __init__(self, config: Config):
        super().__init__(config)
        self.task = environments.make_continuous(config.env_name)
        self.agent = ONLINE_AGENTS[config.agent_type]
        self.fits = self.agent.has_model
        self.data = ensemble_program.dataset_of(config) if config.dataset else None
        self.given, self.capacity, self.num_envs = (
            online_checks.given_rows(config),
            config.real_capacity,
            config.num_envs,
        )
        self.policy = saved_policies.load(config.policy) if config.policy else None
        assert config.random_steps is not None, "resolved"
        self.schedule = Schedule(config.init_steps, config.random_steps, config.model_every, bool(config.model))
        self.measures = _measures(self.fits)
        if self.fits:
            self.terminates = online_checks.terminals_of(config)
            sizes = (self.task.obs_dim, self.task.action_dim)
            self.architecture = fitting.architecture_of(config, *sizes, self.terminates is None)
            self.model = models.load(config.model, self.architecture) if config.model else None
        self.stages = (
            Stage(
                config.num_train_steps,
                config.eval_frequency,
                self.update,
                self.evaluate,
                warm_up=config.init_steps,
                collect=self.collect,
            ),
        )

    def shared(self) -> dict[str, Any]:
        """Rows of the dataset, ensemble and policy, as far as they are given."""
        given = {
            "rows": None if self.data is None else self.data.rows,
            "model": self.model if self.fits else None,
            "policy": self.policy,
        }
        return {name: value for name, value in given.items() if value is not None}

    def init(self, key: jax.Array, config: Config, shared: Tree) -> State:
        """State of a member before its first step; the key becomes the member's own."""
        task, dtype = self.task, jnp.result_type(float)
        reset_keys = jax.random.split(jax.random.fold_in(key, RESET), config.num_envs)
        obs, environment = jax.vmap(task.environment.reset, (0, None))(reset_keys, task.params)
        storage = replay.init(self.capacity, task.obs_dim, task.action_dim)
        if self.given:
            storage = storage.at[: self.given].set(shared["rows"][: self.given].astype(storage.dtype))
        units = Units(jnp.zeros(task.obs_dim), jnp.ones(task.obs_dim))
        learner = self.agent.init(config, jax.random.fold_in(key, INIT), units, task.action_dim)
        if self.policy is not None:
            learner = saved_policies.continued(learner, shared["policy"])
        state = State(
            key=key,
            obs=obs.astype(dtype),
            environment=environment,
            episode_return=jnp.zeros(config.num_envs),
            storage=storage,
            learner=learner,
            fit=None,
            rollouts=None,
            ring=None,
            scales=None,
        )
        return self._with_model(state, config, shared) if self.fits else state

    def _with_model(self, state: State, config: Config, shared: Tree) -> State:
        obs_dim = self.task.obs_dim
        one, fresh = jnp.ones(()), self._fresh(state, config, 0)
        return state.replace(
            fit=fitting.begun_from(config, shared["model"]) if self.model is not None else fresh,
            rollouts=imagination.no_rollouts(config.num_rollouts, obs_dim),
            ring=buffers.empty(config.capacity, state.storage.shape[1]),
            scales=Scales(one, one, one),
        )

    def _fresh(self, state: State, config: Config, t: jax.Array | int) -> fitting.Fit:
        key = jax.random.fold_in(jax.random.fold_in(state.key, ENSEMBLE), t)
        return fitting.begin(config, self.architecture, no_normaliser(self.architecture), key)

    # --- steps --------------------------------------------------------------------------------------------------------

    def collect(self, state: State, config: Config, t: jax.Array, shared: Tree = ()) -> tuple[State, Metrics]:
        """One step of every copy of the environment; arguments as for `update`."""
        state, metrics = self._refitted(state, config, t) if self.schedule.is_fitted else (state, {})
        state, acted = self._interact(state, config, t, self._key(state, t))
        return state, metrics | acted

    def update(self, state: State, config: Config, t: jax.Array, shared: Tree = ()) -> tuple[State, Metrics]:
        """A fit where it is due, one step of every copy of the environment, and `updates_per_step` updates.

        Args:
            state: of one member.
            config: of that member.
            t: number of the step, shared by all members, so that buffer writes stay cheap under vmap.
            shared: of `shared`.
        """
        key = self._key(state, t)
        if config.normalise_observations and self.policy is None:
            state = self._with_units(state, t)
        state, fitted = self._refitted(state, config, t) if self.fits else (state, {})
        state, acted = self._interact(state, config, t, key)
        state, learned = self._learn(state, config, t, key)
        return state, fitted | acted | learned

    def _key(self, state: State, t: jax.Array) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(state.key, STEP), t)

    def _stored(self, steps: jax.Array) -> jax.Array:
        """Real transitions after so many steps."""
        return jnp.minimum(self.given + steps * self.num_envs, self.capacity)

    def _with_units(self, state: State, t: jax.Array) -> State:
        """When learning starts, observations get the units of what was seen until then, if anything was."""
        if self.given + self.schedule.init_steps * self.num_envs < 2:
            return state
        obs_dim = self.task.obs_dim

        def measured() -> Units:
            found = refitting.normaliser_of(state.storage, self._stored(t), obs_dim)
            return state.learner.units._replace(mean=found.mean[:obs_dim], std=found.std[:obs_dim])

        due = t == self.schedule.init_steps
        return state.replace(
            learner=state.learner.replace(units=jax.lax.cond(due, measured, lambda: state.learner.units))
        )

    def _refitted(self, state: State, config: Config, t: jax.Array) -> tuple[State, Metrics]:
        """Fits the ensemble, where it is due."""
        key = jax.random.fold_in(jax.random.fold_in(state.key, EPOCH), t)
        due, zero = self.schedule.fits(t), jnp.zeros(())

        def fit() -> tuple[fitting.Fit, Scales, jax.Array, jax.Array]:
            before = self._fresh(state, config, t) if config.fresh_model else state.fit
            after, loss, epochs = refitting.refit(
                config, self.architecture, before, state.storage, self._stored(t), key
            )
            return after, self._scales(after, state, config, t), loss, epochs.astype(zero.dtype)

        found, scales, loss, epochs = jax.lax.cond(due, fit, lambda: (state.fit, state.scales, zero, zero))
        count = due.astype(zero.dtype)
        metrics = {"model_loss": (loss, count), "model_fit_epochs": (epochs, count)}
        return state.replace(fit=found, scales=scales), metrics

    def _scales(self, fit: fitting.Fit, state: State, config: Config, t: jax.Array) -> Scales:
        if config.mode == "none":
            return state.scales
        stored, world = self._stored(t), self._world(fit, config)
        kind = imagination.kind_of(str(config.mode), config.uncertainty)
        largest = imagination.largest_uncertainty(world, kind, state.storage, self.task.obs_dim, stored=stored)
        reward, is_stored = state.storage[:, -2], jnp.arange(self.capacity) < stored
        low, high = jnp.where(is_stored, reward, jnp.inf).min(), jnp.where(is_stored, reward, -jnp.inf).max()
        magnitude = jnp.maximum(jnp.abs(low), jnp.abs(high))
        return Scales(
            largest, magnitude, {"magnitude": magnitude, "maximum": high, "minimum": -low}[config.halt_reward]
        )

    def _world(self, fit: fitting.Fit, config: Config) -> World:
        model = fitting.fitted(fit)
        parts = (model.networks, model.normaliser, model.ranking)
        return World(self.architecture, *parts, config.num_elites, self.terminates)

    def _interact(self, state: State, config: Config, t: jax.Array, key: jax.Array) -> tuple[State, Metrics]:
        noise_key, uniform_key = jax.random.split(jax.random.fold_in(key, ACT))
        dtype, shape = state.obs.dtype, (config.num_envs, self.task.action_dim)
        uniform = jax.random.uniform(uniform_key, shape, dtype, -1.0, 1.0)
        sampled = policy_program.sampled_action(state.learner, shape[1])(state.obs, noise_key)
        action = jnp.where(self.schedule.is_random(t), uniform, sampled)
        number = t + self.given // config.num_envs
        return acting.step_copies(self.task, state, action, jax.random.fold_in(key, ENVIRONMENT), number)

    def _learn(self, state: State, config: Config, t: jax.Array, key: jax.Array) -> tuple[State, Metrics]:
        """All updates of a step, each after a step of all rollouts."""

        def update(carry: tuple, i: jax.Array) -> tuple[tuple, Metrics]:
            learner, moving, ring = carry
            own_key = jax.random.fold_in(jax.random.fold_in(key, LEARN), i)
            metrics: Metrics = {}
            if self.fits:
                moving, ring, metrics = self._imagined(state, config, t, own_key, *carry)
            sources = self._sources(state, ring, config, t)
            number = t * config.updates_per_step + i
            learner, losses = self.agent.step(config, learner, sources, jax.random.fold_in(own_key, LEARN), number)
            return (learner, moving, ring), metrics | control.measured(losses)

        start = (state.learner, state.rollouts, state.ring)
        (learner, moving, ring), metrics = jax.lax.scan(update, start, jnp.arange(config.updates_per_step))
        state = state.replace(learner=learner, rollouts=moving, ring=ring)
        return state, jax.tree.map(lambda column: column.sum(0), metrics)

    def _imagined(
        self,
        state: State,
        config: Config,
        t: jax.Array,
        key: jax.Array,
        learner: Learner,
        moving: imagination.Rollouts,
        ring: buffers.Ring,
    ) -> tuple[imagination.Rollouts, buffers.Ring, Metrics]:
        # Every observation that an action was taken at is one that no episode ended at.
        places = jax.random.randint(jax.random.fold_in(key, STARTS), (config.num_rollouts,), 0, self._stored(t + 1))
        scales = state.scales
        return policy_program.imagine(
            self._world(state.fit, config),
            policy_program.pessimism_of(config, scales.magnitude, scales.largest, scales.halt),
            learner,
            moving,
            ring,
            state.storage[places, : self.task.obs_dim],
            jax.random.fold_in(key, ROLLOUT),
            self._length(config, t),
        )

    def _length(self, config: Config, t: jax.Array) -> jax.Array:
        assert config.rollout_length is not None  # resolved
        ends = (config.rollout_length, config.last_rollout_length)
        return rollout_length(t, *ends, config.lengthening_start, config.lengthening_end)

    def _sources(self, state: State, ring: buffers.Ring | None, config: Config, t: jax.Array) -> Sources:
        stored, real_ratio = self._stored(t + 1), config.real_ratio
        assert real_ratio is not None  # resolved

        def draw(ring: buffers.Ring | None, key: jax.Array) -> replay.Batch:
            sizes = (config.batch_size, self.task.obs_dim)
            return buffers.mixed(state.storage, ring, key, *sizes, real_ratio, stored)

        return Sources(lambda key: draw(ring, key), lambda key: draw(None, key))

    # --- evaluations --------------------------------------------------------------------------------------------------

    def evaluate(
        self, state: State, config: Config, t: jax.Array, is_last: jax.Array, shared: Tree
    ) -> dict[str, jax.Array]:
        """True returns of the policy's mean action, and what critics and ensemble expect.

        Returns:
            Values of the program's measures; NaN where there is nothing to measure.
        """
        key = jax.random.fold_in(jax.random.fold_in(state.key, EVALUATE), t)
        found = self.measured(state, config, key, is_last, self._world(state.fit, config) if self.fits else None)
        if self.fits:
            error = state.fit.best_errors.mean()
            found["validation_error"] = error
            for name in ("validation_error", "predicted_return", "return_gap"):  # nothing before the first fit
                found[name] = jnp.where(jnp.isfinite(error), found[name], jnp.nan)
            found["rollout_length"] = self._length(config, t).astype(error.dtype)
        return found


def _measures(has_model: bool) -> tuple[Measure, ...]:
    modelled = (
        *policy_program.IMAGINED_MEASURES,
        *policy_program.FITTED_MEASURES,
        Measure("model_fit_epochs", "epochs of a fit of the ensemble"),
        Measure("rollout_length", "steps of a rollout at most"),
    )
    return (
        policy_program.EVALUATION_RETURN,
        Measure("training_return", "return of the episodes finished in training", better="higher"),
        *policy_program.VALUE_MEASURES,
        *(modelled if has_model else ()),
        *policy_program.LEARNING_MEASURES,
    )

"""Reinforcement learning from a dataset, with a dynamics ensemble or without, as one pure program.

Outline of a run (every line inside one compiled loop):

    stage "ensemble", unless the agent needs none or one is given (`model`): see ensemble_program.py
    stage "policy":
        the largest uncertainty about the dataset's transitions, in whose units pessimism is
        for t in 0 .. num_train_steps - 1:
            all rollouts of the policy in the ensemble go one step, into a ring buffer, pessimistically
            the agent (agents.py) makes an update on transitions of dataset and ring buffer
            every eval_frequency updates: true return of the policy, and the return that the ensemble predicts

The dataset, and an ensemble that is given, are there once for all members (`shared`).
"""

from pathlib import Path
from typing import Any, Self, TypeVar

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from purejax_bilevel import environments
from purejax_bilevel.configuration import changed, configuration, replace, validate
from purejax_bilevel.errors import UserError
from purejax_bilevel.program import Measure, Metrics, Stage, Tree
from purejax_bilevel.programs.control import agents as control
from purejax_bilevel.programs.offline import (
    buffers,
    datasets,
    ensemble_program,
    fitting,
    imagination,
    models,
    policy_program,
    saved_policies,
    settings,
)
from purejax_bilevel.programs.offline.agents import AGENTS, Learner, OfflineAgent, Sources, Units
from purejax_bilevel.programs.offline.datasets import Dataset
from purejax_bilevel.programs.offline.ensemble import Normaliser
from purejax_bilevel.programs.offline.imagination import World
from purejax_bilevel.programs.offline.policy_program import (
    ENSEMBLE,
    EPOCH,
    EVALUATE,
    INIT,
    LEARN,
    RESAMPLE,
    ROLLOUT,
    STARTS,
    STEP,
)
from purejax_bilevel.programs.offline.settings import Task
from purejax_bilevel.replay import Batch

C = TypeVar("C", bound=Task)


@configuration
class Config(settings.Offline):
    """Settings of one training program; a traced field may hold several values, one per point of a grid."""

    agent_type: str = changed(Task, "agent_type", "mopo", choices=AGENTS)

    def program(self) -> "Offline":
        """The training program of this (resolved) configuration."""
        return Offline(self)

    @property
    def title(self) -> str:
        """Short name of the experiment."""
        return f"{AGENTS[self.agent_type].name}-{Path(self.dataset).stem}"

    def resolved(self) -> Self:
        """Fills in the agent's tuned values, the environment and what the given ensemble is made of; checks everything.

        Raises:
            UserError: for a value that is not allowed, two that do not go together, or a file that does not fit.
        """
        config = AGENTS.tuned(self)
        validate(config)
        AGENTS.check_settings(config)
        data = ensemble_program.dataset_of(config)
        config = _with_environment(config, data)
        config = replace(config, model=config.model.replace("{dataset}", Path(config.dataset).stem))
        if AGENTS[config.agent_type].has_model:
            config = models.with_architecture(config, data) if config.model else config
            _check_model(config, data)
        if config.policy:
            sizes = (data.obs_dim, data.action_dim)
            config = saved_policies.with_architecture(config, *sizes, config.env_name)
        policy_program.check_pessimism(config, AGENTS[config.agent_type].defaults)
        return config


def _with_environment(config: C, data: Dataset) -> C:
    name = config.env_name or data.environment
    if not name:
        raise UserError(f"--dataset {config.dataset} does not say of which environment it is: give --env_name.")
    task = environments.make_continuous(name)
    datasets.check_environment(data, name, task.obs_dim, task.action_dim, task.max_steps)
    return replace(config, env_name=name)


def _check_model(config: Config, data: Dataset) -> None:
    if not config.model:
        fitting.split_of(config, len(data), config.dataset)
    ensemble_program.terminals_of(config, data, config.env_name)
    policy_program.check_imagination(config)


class State(flax.struct.PyTreeNode):
    """Everything a member carries from step to step; None for what its agent has no use for."""

    key: jax.Array
    learner: Learner
    fit: Any  # fitting.Fit of an ensemble of its own
    rollouts: Any  # imagination.Rollouts
    ring: Any  # buffers.Ring
    largest: Any  # [], u_max


class Offline(policy_program.PolicyProgram):
    """The program: pure functions of a member's configuration, sharing dataset, environment and agent.

    Args:
        config: resolved configuration; only its static fields matter here.
    """

    step_unit = "updates"
    figures = "purejax_bilevel.programs.offline.figures"

    def __init__(self, config: Config):
        super().__init__(config)
        self.task = environments.make_continuous(config.env_name)
        self.data, self.agent = ensemble_program.dataset_of(config), AGENTS[config.agent_type]
        self.has_model, self.fits = self.agent.has_model, self.agent.has_model and not config.model
        self.policy = saved_policies.load(config.policy) if config.policy else None
        self.measures = _measures(self.data, self.agent, self.fits)
        policy = Stage(
            config.num_train_steps,
            config.eval_frequency,
            self.update,
            self.evaluate,
            "policy" if self.fits else "training",
            begin=self.begin if self.has_model else None,
        )
        self.stages: tuple[Stage, ...] = (policy,)
        if self.has_model:
            self._prepare_model(config)
        if self.fits:
            self.split = fitting.split_of(config, len(self.data), config.dataset)
            done = lambda state: state.fit.is_over  # noqa: E731
            fit = Stage(config.model_epochs, 1, self.fit, self.judge, "ensemble", done=done, most_block_steps=1)
            self.stages = (fit, policy)

    def _prepare_model(self, config: Config) -> None:
        self.terminates = ensemble_program.terminals_of(config, self.data, config.env_name)
        sizes = (self.data.obs_dim, self.data.action_dim)
        self.architecture = fitting.architecture_of(config, *sizes, self.terminates is None)
        self.model = models.load(config.model, self.architecture) if config.model else None
        reward = self.data.reward
        self.magnitude = float(np.abs(reward).max())
        halts = {"magnitude": self.magnitude, "maximum": float(reward.max()), "minimum": -float(reward.min())}
        self.halt = halts[config.halt_reward]

    def shared(self) -> dict[str, Any]:
        """The rows, their order, mean and standard deviation; ensemble and policy, if they are given."""
        found: dict[str, Any] = dict(fitting.shared_rows(self.data, False))
        if self.has_model and self.model is not None:
            found["model"] = self.model
        return found if self.policy is None else {**found, "policy": self.policy}

    def init(self, key: jax.Array, config: Config, shared: Tree) -> State:
        """State of a member before its first step; the key becomes the member's own."""
        obs_dim, action_dim = self.data.obs_dim, self.data.action_dim
        mean, std = shared["mean"][:obs_dim], shared["std"][:obs_dim]
        if not config.normalise_observations:
            mean, std = jnp.zeros_like(mean), jnp.ones_like(std)
        learner = self.agent.init(config, jax.random.fold_in(key, INIT), Units(mean, std), action_dim)
        if self.policy is not None:
            learner = saved_policies.continued(learner, shared["policy"])
        state = State(key, learner, None, None, None, None)
        if self.has_model:
            moving = imagination.no_rollouts(config.num_rollouts, obs_dim)
            ring = buffers.empty(config.capacity, 2 * obs_dim + action_dim + 2)
            state = state.replace(rollouts=moving, ring=ring, largest=jnp.ones(()))
        if self.fits:
            fit = fitting.begin(
                config, self.architecture, self._normaliser(config, shared), jax.random.fold_in(key, ENSEMBLE)
            )
            state = state.replace(fit=fit)
        return state

    def _normaliser(self, config: Config, shared: Tree) -> Normaliser:
        mean, std = shared["mean"], shared["std"]
        return Normaliser(jnp.zeros_like(mean), jnp.ones_like(std)) if config.raw_inputs else Normaliser(mean, std)

    # --- the ensemble -------------------------------------------------------------------------------------------------

    def fit(self, state: State, config: Config, t: jax.Array, shared: Tree) -> tuple[State, Metrics]:
        """One epoch of the ensemble."""
        draw = fitting.drawer(config, self.architecture, self.split, shared, jax.random.fold_in(state.key, RESAMPLE))
        held_out = fitting.held_out_rows(shared, self.split, self.data.obs_dim)
        key = jax.random.fold_in(jax.random.fold_in(state.key, EPOCH), t)
        steps = fitting.epoch_steps(config, self.split)
        fit, loss = fitting.epoch(config, self.architecture, state.fit, draw, held_out, key, steps)
        return state.replace(fit=fit), {"model_loss": (loss, jnp.ones(()))}

    def judge(self, state: State, config: Config, t: jax.Array, is_last: jax.Array, shared: Tree) -> dict:
        """Errors of the best networks on held-out rows."""
        return {"validation_error": state.fit.best_errors.mean()}

    def _world(self, state: State, config: Config, shared: Tree) -> World:
        model = fitting.fitted(state.fit) if self.fits else shared["model"]
        parts = (model.networks, model.normaliser, model.ranking)
        return World(self.architecture, *parts, config.num_elites, self.terminates)

    # --- the policy ---------------------------------------------------------------------------------------------------

    def begin(self, state: State, config: Config, shared: Tree) -> State:
        """Measures the largest uncertainty about the dataset."""
        kind = imagination.kind_of(str(config.mode), config.uncertainty)
        world = self._world(state, config, shared)
        return state.replace(largest=imagination.largest_uncertainty(world, kind, shared["rows"], self.data.obs_dim))

    def update(self, state: State, config: Config, t: jax.Array, shared: Tree) -> tuple[State, Metrics]:
        """One step of all rollouts, and one update of the agent.

        Args:
            state: of one member.
            config: of that member.
            t: number of the update, shared by all members.
            shared: of `shared`.
        """
        key = jax.random.fold_in(jax.random.fold_in(state.key, STEP), t)
        metrics: Metrics = {}
        if self.has_model:
            state, metrics = self._imagine(state, config, shared, key)
        learner, losses = self.agent.step(
            config, state.learner, self._sources(state, config, shared), jax.random.fold_in(key, LEARN), t
        )
        return state.replace(learner=learner), metrics | control.measured(losses)

    def _imagine(self, state: State, config: Config, shared: Tree, key: jax.Array) -> tuple[State, Metrics]:
        start_key, rollout_key = jax.random.fold_in(key, STARTS), jax.random.fold_in(key, ROLLOUT)
        rows = shared["rows"]
        assert config.rollout_length is not None, "resolved"
        # Every observation that an action was taken at is one that no episode ended at.
        places = jax.random.randint(start_key, (config.num_rollouts,), 0, rows.shape[0])
        moving, ring, metrics = policy_program.imagine(
            self._world(state, config, shared),
            policy_program.pessimism_of(config, self.magnitude, state.largest, self.halt),
            state.learner,
            state.rollouts,
            state.ring,
            rows[places, : self.data.obs_dim],
            rollout_key,
            config.rollout_length,
        )
        return state.replace(rollouts=moving, ring=ring), metrics

    def _sources(self, state: State, config: Config, shared: Tree) -> Sources:
        def draw(ring: buffers.Ring | None, key: jax.Array) -> Batch:
            assert config.real_ratio is not None, "resolved"
            return buffers.mixed(shared["rows"], ring, key, config.batch_size, self.data.obs_dim, config.real_ratio)

        return Sources(lambda key: draw(state.ring, key), lambda key: draw(None, key))

    def evaluate(
        self, state: State, config: Config, t: jax.Array, is_last: jax.Array, shared: Tree
    ) -> dict[str, jax.Array]:
        """True returns of the policy's mean action, their scores, and the return that the ensemble predicts.

        Returns:
            Values of the program's measures; those of single episodes are NaN where they are not played.
        """
        key = jax.random.fold_in(jax.random.fold_in(state.key, EVALUATE), t)
        world = self._world(state, config, shared) if self.has_model else None
        found = self.measured(state, config, key, is_last, world)
        if self.data.scores is not None:
            found["score"] = self.data.scores.normalised(found["evaluation_return"])
            found["final_score"] = self.data.scores.normalised(found["final_return"])
        return found


def _measures(data: Dataset, agent: OfflineAgent, fits: bool) -> tuple[Measure, ...]:
    scores = (
        Measure("score", "normalised score", better="higher"),
        Measure(
            "final_score", "normalised score of the last evaluation", better="higher", dims=("episode",), when="end"
        ),
    )
    return (
        policy_program.EVALUATION_RETURN,
        *(scores if data.scores is not None else ()),
        *(policy_program.VALUE_MEASURES if agent.has_values else ()),
        *(policy_program.IMAGINED_MEASURES if agent.has_model else ()),
        *(policy_program.FITTED_MEASURES if fits else ()),
        *policy_program.LEARNING_MEASURES,
    )

"""Makes datasets: soft actor-critic learns, then policies of different skill act, and files hold what they saw.

Outline of a run (all but the files inside one compiled loop):

    training: soft actor-critic (control/soft_actor_critic.py); at every evaluation the policy is kept with its return
    collecting: uniform actions, a policy of the way (medium) and the best one (expert) act in
        collect_envs copies of the environment each, with the policy's own noise

    random, medium, expert    what these three saw
    medium-replay             all that soft actor-critic saw until the medium policy
    medium-expert             one half of each, whole episodes

Returns that stand for 0 and 100 are those of uniform actions and of the expert's mean action, over
`reference_episodes` episodes; files have them with their standard errors. The seed decides every bit.
Source of the kinds: D4RL, Fu et al. 2020 (arXiv 2004.07219), whose medium policy has about a third of the
expert's score.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from purejax_bilevel import environments, networks, replay
from purejax_bilevel.agents import Agent, Agents
from purejax_bilevel.configuration import (
    FRACTION,
    POSITIVE,
    Check,
    at_least,
    changed,
    configuration,
    fields,
    replace,
    static,
    traced,
    validate,
    warn,
)
from purejax_bilevel.errors import UserError
from purejax_bilevel.program import Measure, Metrics, Program, Stage, Tree
from purejax_bilevel.programs.control import (
    acting,
    policies,
    rollouts,
    settings,
    soft_actor_critic,
    soft_actor_critic_agents,
)
from purejax_bilevel.programs.offline import dataset_files
from purejax_bilevel.programs.offline.datasets import Dataset, Scores

KINDS = ("random", "medium", "expert", "medium-replay", "medium-expert")
ACTING = KINDS[:3]  # in this order everywhere
SEVERAL = Check(
    f"one or more of {', '.join(KINDS)}, with commas between them",
    lambda text: isinstance(text, str) and bool(text) and set(text.split(",")) <= set(KINDS),
)
# Named streams of random numbers of a member; soft actor-critic has the key itself.
COLLECT, REFERENCE, RESET = 101, 102, 103

SAC = soft_actor_critic_agents.AGENTS["sac"]
AGENTS = Agents(
    Agent,
    [Agent("collect", f"makes datasets by soft actor-critic: {', '.join(KINDS)}", SAC.step, SAC.init)],
)


@configuration
class Collecting:
    """What is collected."""

    kinds: str = static(",".join(KINDS), "datasets to write, with commas between them", SEVERAL, "collecting")
    rows: int = static(20_000, "rows of each dataset (medium-replay: as many as there are)", at_least(2), "collecting")
    collect_envs: int = static(10, "copies of the environment that are collected from", at_least(1), "collecting")
    medium_score: float = traced(
        1 / 3, "share of the way from uniform actions to the expert that makes a policy medium", FRACTION, "collecting"
    )
    reference_episodes: int = static(
        1000, "episodes for the returns that stand for 0 and 100", at_least(2), "collecting"
    )


@configuration
class Config(Collecting):
    """Settings of one training program; those of soft actor-critic are as in `soft_actor_critic.Config`."""

    agent_type: str = changed(settings.Task, "agent_type", "collect", choices=AGENTS)
    env_name: str = changed(soft_actor_critic.Config, "env_name", "Pendulum-v1")
    num_train_steps: int = changed(settings.Schedule, "num_train_steps", 30_000)
    init_steps: int = changed(settings.Schedule, "init_steps", 1000)
    eval_frequency: int = changed(
        settings.Evaluation, "eval_frequency", 1000, "steps between policies that are kept", at_least(1)
    )
    eval_episodes: int = changed(settings.Evaluation, "eval_episodes", 10)
    num_envs: int = changed(settings.Copies, "num_envs", 1)
    updates_per_step: int = changed(settings.Copies, "updates_per_step", 1)
    batch_size: int = changed(settings.Replay, "batch_size", 256)
    hidden_dim: int = static(256, "units in each hidden layer of critic and policy", at_least(1), "agent")
    inner_lr: float = traced(3e-4, "Adam rate of the critic", POSITIVE, "agent")
    policy_lr: float = traced(3e-4, "Adam rate of the policy", POSITIVE, "agent")
    temperature_lr: float = traced(3e-4, "Adam rate of the temperature's logarithm", POSITIVE, "agent")
    tau: float = traced(0.005, "target network's step", FRACTION, "agent")
    discount: float = traced(0.99, "discount factor", FRACTION, "agent")

    def program(self) -> "Collect":
        """The training program of this (resolved) configuration."""
        return Collect(self)

    @property
    def title(self) -> str:
        """Short name of the experiment."""
        return f"collect-{self.env_name}"

    def resolved(self) -> Self:
        """Checks everything.

        Raises:
            UserError: for a value that is not allowed, or two that do not go together.
        """
        config = AGENTS.tuned(self)
        validate(config)
        if config.num_train_steps % config.eval_frequency or config.init_steps >= config.num_train_steps:
            raise UserError(
                f"--num_train_steps {config.num_train_steps} must be a multiple of --eval_frequency "
                f"{config.eval_frequency} and above --init_steps {config.init_steps}."
            )
        if config.rows < config.collect_envs:
            raise UserError(f"--rows {config.rows} is smaller than --collect_envs {config.collect_envs}.")
        _actor_critic(config).resolved()
        return config


def _actor_critic(config: Config) -> soft_actor_critic.Config:
    """The settings of soft actor-critic, with the same names."""
    known = {field.name for field in fields(soft_actor_critic.Config)} - {"agent_type"}
    own = {field.name: getattr(config, field.name) for field in fields(config) if field.name in known}
    own |= {"agent_type": "sac", "num_Q_steps": 1, "max_hidden_dim": config.hidden_dim}
    own["capacity"] = config.num_train_steps * config.num_envs  # medium-replay is the buffer from its first row on
    return replace(soft_actor_critic.Config(), **own)


class State(flax.struct.PyTreeNode):
    """Everything a member carries from step to step."""

    key: jax.Array
    learning: acting.State
    # the policies that were kept
    policies: networks.Network  # leaves [policies, ...]
    returns: jax.Array  # [policies], of the mean action; NaN in the random start
    # chosen when collecting begins
    medium: jax.Array  # [], number of the policy
    expert: jax.Array  # []
    references: jax.Array  # [4], Scores
    # what is collected, by uniform actions, medium and expert
    obs: jax.Array  # [3, copies, obs]
    environment: Any  # leaves [3, copies, ...]
    episode_return: jax.Array  # [3, copies]
    storage: jax.Array  # [3, rows, row]


class Collect(Program[Config]):
    """The program: pure functions of a member's configuration.

    Args:
        config: resolved configuration; only its static fields matter here.
    """

    headline = "expert_return"
    step_unit = "steps"
    measures = (
        Measure("evaluation_return", "return of evaluation episodes", better="higher"),
        Measure("training_return", "return of the episodes finished in training", better="higher"),
        Measure("random_return", "return of uniform actions"),
        Measure("medium_return", "return of the medium policy"),
        Measure("expert_return", "return of the expert", better="higher", tabled=True),
        Measure("reference_scores", "returns of 0 and 100, and their standard errors", dims=("reference",), when="end"),
    )

    def __init__(self, config: Config):
        # Numbers that differ between members are put in by `_member`.
        anything = replace(config, **dict.fromkeys(_traced(config), 0.1))
        self.config, self.settings = config, _actor_critic(anything).resolved()
        self.actor_critic = soft_actor_critic.ActorCritic(self.settings)
        self.task = environments.make_continuous(config.env_name)
        self.kept = config.num_train_steps // config.eval_frequency
        self.collect_steps = -(-config.rows // config.collect_envs)
        training = Stage(
            config.num_train_steps,
            config.eval_frequency,
            self.learn,
            self.evaluate,
            "training",
            warm_up=config.init_steps,
            collect=self.act_at_random,
        )
        collecting = Stage(self.collect_steps, 0, self.collect, self.references, "collecting", begin=self.begin)
        self.stages = (training, collecting)

    # --- training -----------------------------------------------------------------------------------------------------

    def _member(self, config: Config) -> soft_actor_critic.Config:
        return replace(self.settings, **{name: getattr(config, name) for name in _traced(config)})

    def init(self, key: jax.Array, config: Config, shared: Tree) -> State:
        """State of a member before its first step; the key becomes the member's own."""
        learning = self.actor_critic.init(key, self._member(config), shared)
        copies, task = (len(ACTING), config.collect_envs), self.task
        environment = jax.tree.map(
            lambda leaf: jnp.broadcast_to(leaf[0], (*copies, *leaf.shape[1:])), learning.environment
        )
        kept = jax.tree.map(lambda leaf: jnp.zeros((self.kept, *leaf.shape), leaf.dtype), learning.learner.policy)
        rows = replay.init(self.collect_steps * config.collect_envs, task.obs_dim, task.action_dim)
        return State(
            key=key,
            learning=learning,
            policies=kept,
            returns=jnp.full(self.kept, jnp.nan),
            medium=jnp.int32(0),
            expert=jnp.int32(0),
            references=jnp.full(4, jnp.nan),
            obs=jnp.zeros((*copies, task.obs_dim)),
            environment=environment,
            episode_return=jnp.zeros(copies),
            storage=jnp.broadcast_to(rows, (len(ACTING), *rows.shape)),
        )

    def act_at_random(self, state: State, config: Config, t: jax.Array, shared: Tree) -> tuple[State, Metrics]:
        """One step of the random start."""
        learning, metrics = self.actor_critic.collect(state.learning, self._member(config), t, shared)
        return state.replace(learning=learning), metrics

    def learn(self, state: State, config: Config, t: jax.Array, shared: Tree) -> tuple[State, Metrics]:
        """One step of soft actor-critic; when it is time its policy is kept."""
        learning, metrics = self.actor_critic.update(state.learning, self._member(config), t, shared)
        state = state.replace(learning=learning)
        due = (t + 1) % config.eval_frequency == 0
        state = jax.lax.cond(due, lambda: self._keep(state, config, t), lambda: state)
        return state, {"training_return": metrics["training_return"]}

    def _keep(self, state: State, config: Config, t: jax.Array) -> State:
        found = self.actor_critic.evaluate(state.learning, self._member(config), t, jnp.bool_(False))
        number, policy = (t + 1) // config.eval_frequency - 1, state.learning.learner.policy
        return state.replace(
            policies=jax.tree.map(lambda kept, new: kept.at[number].set(new), state.policies, policy),
            returns=state.returns.at[number].set(found["evaluation_return"]),
        )

    def evaluate(self, state: State, config: Config, t: jax.Array, is_last: jax.Array, shared: Tree) -> dict:
        """The return of the policy that was kept last."""
        return {"evaluation_return": state.returns[(t + 1) // config.eval_frequency - 1]}

    # --- collecting ---------------------------------------------------------------------------------------------------

    def begin(self, state: State, config: Config, shared: Tree) -> State:
        """Chooses the policies, measures what stands for 0 and 100, and resets all copies of the environment."""
        task, keys = self.task, jax.random.split(jax.random.fold_in(state.key, REFERENCE))
        expert = jnp.nanargmax(state.returns).astype(jnp.int32)
        low, high = self._returns(keys, config.reference_episodes, _picked(state.policies, expert))
        score = (state.returns - low.mean()) / (high.mean() - low.mean())
        medium = medium_of(score, config.medium_score)
        errors = [jnp.std(found, ddof=1) / jnp.sqrt(config.reference_episodes) for found in (low, high)]
        reset_keys = jax.random.split(jax.random.fold_in(state.key, RESET), state.obs.shape[:2])
        obs, environment = jax.vmap(jax.vmap(task.environment.reset, (0, None)), (0, None))(reset_keys, task.params)
        return state.replace(
            medium=medium,
            expert=expert,
            references=jnp.stack([low.mean(), high.mean(), *errors]),
            obs=obs.astype(state.obs.dtype),
            environment=environment,
        )

    def _returns(self, keys: jax.Array, episodes: int, network: networks.Network) -> jax.Array:
        """Returns `[2, episodes]` of uniform actions and of a policy's mean action."""
        environment, params, limit = self.task.environment, self.task.params, self.task.max_steps

        def play(place: tuple[jax.Array, jax.Array]) -> jax.Array:
            key, is_uniform = place

            def policy(obs: jax.Array, key: jax.Array) -> jax.Array:
                mean = policies.mean_action(networks.apply_network(network, obs)).T
                return jnp.where(is_uniform, jax.random.uniform(key, mean.shape, mean.dtype, -1.0, 1.0), mean)

            last = jnp.bool_(True)
            found = rollouts.evaluate(environment, params, limit, policy, key, episodes, episodes, last)
            return found["final_return"]

        return jax.lax.map(play, (keys, jnp.array([True, False])))

    def collect(self, state: State, config: Config, t: jax.Array, shared: Tree) -> tuple[State, Metrics]:
        """One step of all copies."""
        key = jax.random.fold_in(jax.random.fold_in(state.key, COLLECT), t)
        noise_key, uniform_key, step_key = jax.random.split(key, 3)
        shape, dtype = (*state.obs.shape[:2], self.task.action_dim), state.obs.dtype
        noise = jax.random.normal(noise_key, shape, dtype)
        action = [jax.random.uniform(uniform_key, shape[1:], dtype, -1.0, 1.0)]
        for place, number in ((1, state.medium), (2, state.expert)):
            outputs = networks.apply_network(_picked(state.policies, number), state.obs[place].T)
            action.append(policies.sample_and_log_prob(outputs, noise[place].T)[0].T)
        return self._step(state, step_key, jnp.stack(action), t)

    def _step(self, state: State, key: jax.Array, action: jax.Array, t: jax.Array) -> tuple[State, Metrics]:
        step = jax.vmap(jax.vmap(self.task.environment.step, (0, 0, 0, None)), (0, 0, 0, None))
        keys = jax.random.split(key, action.shape[:2])
        obs, environment, reward, terminated, truncated, info = step(keys, state.environment, action, self.task.params)
        next_obs = info["final_observation"].astype(state.obs.dtype)
        storage = jax.vmap(replay.add_block, (0, None, 0, 0, 0, 0, 0))(
            state.storage, t, state.obs, action, reward, next_obs, terminated
        )
        done, episode_return = (terminated | truncated).astype(reward.dtype), state.episode_return + reward
        sums, counts = (done * episode_return).sum(1), done.sum(1)
        metrics = {f"{kind}_return": (sums[place], counts[place]) for place, kind in enumerate(ACTING)}
        state = state.replace(
            obs=obs.astype(state.obs.dtype),
            environment=environment,
            storage=storage,
            episode_return=(1.0 - done) * episode_return,
        )
        return state, metrics

    def references(self, state: State, config: Config, t: jax.Array, is_last: jax.Array, shared: Tree) -> dict:
        """The returns that stand for 0 and 100."""
        return {"reference_scores": state.references}

    def is_finite(self, state: State) -> jax.Array:
        """Whether all learned parameters of a member are finite numbers."""
        return self.actor_critic.is_finite(state.learning)

    # --- files --------------------------------------------------------------------------------------------------------

    def write(self, states: Tree, members: Sequence[dict[str, Any]], folder: Path) -> None:
        """Writes `<kind>.npz` of each kind asked for; `<kind>_<member>.npz` where there are several members."""
        for number, about in enumerate(members):
            ending = f"_{number}" if len(members) > 1 else ""
            for kind, dataset in self._datasets(states, number, about).items():
                dataset_files.save(dataset, folder / f"{kind}{ending}.npz")

    def _datasets(self, states: Tree, number: int, settings: Mapping[str, Any]) -> dict[str, Dataset]:
        config, (low, high, *errors) = self.config, (float(x) for x in states.references[number])
        scores = Scores(low, high, *errors) if high > low else None
        if scores is None:
            warn(f"the best policy has the return {high:g}, uniform actions have {low:g}: train longer.")
        steps = (int(states.medium[number]) + 1) * config.eval_frequency
        about = {"settings": dict(settings), "trained_steps": config.num_train_steps, "medium_after": steps}

        def made(rows: np.ndarray, copies: int, kind: str) -> Dataset:
            return _dataset(rows, copies, self.task.obs_dim, config.env_name, scores, {"kind": kind, **about})

        acted, copies = np.asarray(states.storage[number]), config.collect_envs
        found = {kind: made(rows, copies, kind)[: config.rows] for kind, rows in zip(ACTING, acted, strict=True)}
        seen = np.asarray(states.learning.storage[number])[: steps * config.num_envs]
        found["medium-replay"] = made(seen, config.num_envs, "medium-replay")
        halves = [_whole_episodes(found[kind], config.rows // 2) for kind in ("medium", "expert")]
        about_both = {**halves[0].about, "kind": "medium-expert"}
        found["medium-expert"] = dataclasses.replace(halves[0].joined(halves[1]), about=about_both)
        return {kind: found[kind] for kind in KINDS if kind in config.kinds.split(",")}


def medium_of(score: jax.Array, wanted: jax.Array | float) -> jax.Array:
    """Which of the policies `[policies]`, in the order of training, is medium.

    Of the first one whose score is as wanted (else of the best) and all before it, the one whose score is nearest:
    where one evaluation lies far below and the next far above, the first to reach it would be too good.
    """
    wanted = jnp.minimum(wanted, jnp.nanmax(score))
    first = jnp.argmax(score >= wanted)
    distance = jnp.where(jnp.arange(score.shape[0]) <= first, jnp.abs(score - wanted), jnp.inf)
    return jnp.nanargmin(distance).astype(jnp.int32)


def _traced(config: Config) -> list[str]:
    """Settings of soft actor-critic that members may differ in."""
    known = {field.name for field in fields(soft_actor_critic.Config)}
    return [field.name for field in fields(config, is_traced=True) if field.name in known]


def _picked(trees: Tree, number: jax.Array) -> Tree:
    return jax.tree.map(lambda leaf: leaf[number], trees)


def _dataset(
    rows: np.ndarray, copies: int, obs_dim: int, environment: str, scores: Scores | None, about: Mapping[str, Any]
) -> Dataset:
    """Rows of a replay buffer, in which copies of the environment take turns, one copy after the other."""
    width = rows.shape[1]
    turns = rows.reshape(-1, copies, width).swapaxes(0, 1).reshape(-1, width).astype(np.float32)
    obs, next_obs, action, scalars = np.split(turns, [obs_dim, 2 * obs_dim, width - 2], 1)
    terminated, uncut = scalars[:, 1] > 0, np.zeros(len(rows), bool)
    return Dataset(obs, action, scalars[:, 0], next_obs, terminated, uncut, environment, scores, about)[:]


def _whole_episodes(dataset: Dataset, rows: int) -> Dataset:
    """The first episodes, as many as fit into a number of rows; a part of the first if that does not fit."""
    ends = np.flatnonzero(dataset.ends[:rows]) + 1
    return dataset[: int(ends[-1]) if len(ends) else rows]

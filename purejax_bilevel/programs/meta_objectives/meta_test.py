"""Meta-test: ordinary agents that learn under a saved objective, or by A2C, on any environment with discrete actions.

Outline of a run (every line inside one compiled loop):

    for t in 0 .. num_train_steps - 1:
        the workers of the agent act for some steps, and the agent makes one update
        every eval_frequency updates: whole episodes with its policy
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Self

import flax.struct
import jax
import jax.numpy as jnp

from purejax_bilevel.agents import Agent, Agents
from purejax_bilevel.configuration import at_least, changed, configuration, static, traced, validate, values_of
from purejax_bilevel.errors import UserError
from purejax_bilevel.program import Measure, Metrics, Program, Stage, Tree
from purejax_bilevel.programs.meta_objectives import learners, models, population, worlds
from purejax_bilevel.programs.meta_objectives.learners import Rollout
from purejax_bilevel.programs.meta_objectives.meta_gradient import Switches, follow
from purejax_bilevel.programs.meta_objectives.settings import Rollouts, Task, Updates
from purejax_bilevel.programs.meta_objectives.worlds import Acting, World

# Named streams of random numbers; a constant each, so that adding one moves no other.
START, STEP, EVALUATE = range(3)  # of a member


@configuration
class MetaTest(Task, Rollouts, Updates):
    """All that agents of a meta-test learn by."""

    model: str = static(
        "", "run or artefact of a learned objective, maybe with #member (default: the one shipped)", particular=True
    )
    level: int = traced(0, "GridWorld-<mode>: number of the level", at_least(0), "environment", task=True)
    num_train_steps: int = static(250, "updates of each member", at_least(1), "schedule")
    eval_frequency: int = static(25, "updates between evaluations (0: only at the end)", at_least(0), "schedule")
    eval_episodes: int = static(64, "episodes of an evaluation", at_least(1), "schedule")


@dataclasses.dataclass(frozen=True)
class TestedAgent(Agent):
    """A way to learn, in a meta-test.

    Args:
        step: `(world, config, shared, agent, rollout) -> agent`, one update.
        init: `(config) -> int`, how many outputs its critic has.
        uses_model: whether its shared inputs are the weights of `--model`.
    """

    step: Callable[[World, Any, Tree, learners.LivingAgent, Rollout], learners.LivingAgent]
    init: Callable[[Any], int]
    uses_model: bool = False


def a2c_step(
    world: World, config: MetaTest, shared: Tree, agent: learners.LivingAgent, rollout: Rollout
) -> learners.LivingAgent:
    """One update of advantage actor-critic."""
    return learners.a2c_update(world.build, config, agent, rollout)[0]


def objective_step(
    world: World, config: MetaTest, shared: Tree, agent: learners.LivingAgent, rollout: Rollout
) -> learners.LivingAgent:
    """One update as the saved objective says; its weights are the shared inputs."""
    model = models.load(config.model)
    return follow(world.build, Switches(model.has_clocks, model.raw_clocks), config, shared, agent, rollout)[0]


AGENTS = Agents(
    TestedAgent,
    [
        TestedAgent(
            name="lpg_agent",
            text="learns under a saved objective",
            step=objective_step,
            init=lambda config: models.load(config.model).target_width,
            settings=("model",),
            uses_model=True,
        ),
        TestedAgent(
            name="a2c", text="advantage actor-critic with generalised advantages", step=a2c_step, init=lambda config: 1
        ),
    ],
)


@configuration
class Config(MetaTest):
    """Settings of one training program; a traced field may hold several values, one per point of a grid."""

    agent_type: str = changed(Task, "agent_type", "lpg_agent", choices=AGENTS)
    env_name: str = changed(Task, "env_name", "GridWorld-small", "GridWorld-<mode>, or a gymnax environment")

    def program(self) -> "MetaTestProgram":
        """The training program of this (resolved) configuration."""
        return MetaTestProgram(self)

    @property
    def title(self) -> str:
        """Short name of the experiment."""
        return f"{AGENTS[self.agent_type].name}-{self.env_name}"

    def resolved(self) -> Self:
        """Fills in what the environment says, and checks everything.

        Raises:
            UserError: for a value that is not allowed, or two that do not go together.
        """
        config = AGENTS.tuned(self)
        world = worlds.make(config.env_name)
        config = worlds.with_rates(config, world)
        validate(config)
        AGENTS.check_settings(config)
        if AGENTS[config.agent_type].uses_model:
            models.load(config.model)
        if values_of(config.level) != (0,) and world.params is not None:
            raise UserError(f"--level is for GridWorld-<mode>: --env_name {config.env_name} has no other levels.")
        return config


class State(flax.struct.PyTreeNode):
    """Everything a member carries from step to step."""

    key: jax.Array
    params: Any  # of the environment
    optimum: jax.Array  # [], the best expected return; NaN where it is not known
    agent: learners.LivingAgent
    acting: Acting


class MetaTestProgram(Program[Config]):
    """The program: pure functions of a member's configuration.

    Args:
        config: resolved configuration; only its static fields matter here.
    """

    headline = "evaluation_return"
    step_unit = "updates"
    measures = (
        Measure("evaluation_return", "return of evaluation episodes", better="higher"),
        Measure("training_return", "return of the episodes finished in training", better="higher"),
        Measure("optimum_normalised", "that return over the optimum (tabular Grid-Worlds)", better="higher"),
        Measure("policy_entropy", "entropy of the policy"),
        Measure("final_return", "return of the last evaluation", better="higher", dims=("episode",), when="end"),
    )

    def __init__(self, config: Config):
        self.world, self.agent = worlds.make(config.env_name), AGENTS[config.agent_type]
        self.critic_outputs = self.agent.init(config)
        self.model = config.model
        self.stages = (Stage(config.num_train_steps, config.eval_frequency, self.update, self.evaluate),)

    def shared(self) -> Tree:
        """The weights of the objective, where there is one."""
        return models.load(self.model).weights if self.agent.uses_model else ()

    def init(self, key: jax.Array, config: Config, shared: Tree = ()) -> State:
        """State of a member before its first step; the key becomes the member's own."""
        agent_key, begin_key = jax.random.split(jax.random.fold_in(key, START))
        params = self.world.draw(jax.random.key(config.level))
        agent = population.new_agent(self.world, agent_key, jnp.int32(config.num_train_steps), self.critic_outputs)
        acting = worlds.begin(self.world, params, begin_key, config.env_workers)
        return State(key, params, self.world.optimum(params), agent, acting)

    def update(self, state: State, config: Config, t: jax.Array, shared: Tree = ()) -> tuple[State, Metrics]:
        """One update of the agent.

        Args:
            state: of one member.
            config: of that member.
            t: number of the step, shared by all members.
            shared: the weights of the objective, where there is one.
        """
        key = jax.random.fold_in(jax.random.fold_in(state.key, STEP), t)
        # A run that goes on may have been made longer.
        agent = state.agent.replace(lifetime=jnp.int32(config.num_train_steps))
        collect = functools.partial(worlds.collect, self.world, state.params, agent.actor.network, state.acting)
        acting, rollout, returns = collect(key, config.train_rollout_len)
        agent = self.agent.step(self.world, config, shared, agent, rollout)
        chances = learners.probabilities(agent.actor.network, learners.first_observations(rollout))
        metrics = {
            "training_return": (returns.total, returns.number),
            "policy_entropy": (learners.entropy(chances), jnp.ones(())),
        }
        return state.replace(agent=agent, acting=acting), metrics

    def evaluate(
        self, state: State, config: Config, t: jax.Array, is_last: jax.Array, shared: Tree = ()
    ) -> dict[str, jax.Array]:
        """Plays whole episodes with the policy of update `t`."""
        key = jax.random.fold_in(jax.random.fold_in(state.key, EVALUATE), t)
        found = worlds.play(self.world, state.params, state.agent.actor.network, key, config.eval_episodes)
        return {
            "evaluation_return": found.mean(),
            "optimum_normalised": found.mean() / state.optimum,
            "final_return": jnp.where(is_last, found, jnp.nan),
        }

    def is_finite(self, state: State) -> jax.Array:
        """Whether all learned parameters of a member are finite numbers."""
        leaves = jax.tree.leaves((state.agent.actor.network, state.agent.critic.network))
        return jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves]).all()

"""Meta-training: an objective is learned on a population of agents, each in the middle of its life.

Outline of a run (every line inside one compiled loop):

    for t in 0 .. num_train_steps - 1:
        the agents live on for some updates under the objective, and the objective learns from it (agents.py)
        agents whose lives are over make room for new ones, on new levels
        every eval_frequency meta-steps: whole lives on levels of their own, beside A2C and the untrained objective

The agents are the individuals of the population that the contract knows; the objective is theirs in common.
"""

from typing import Any, Self

import flax.struct
import jax
import jax.numpy as jnp

from purejax_bilevel.configuration import changed, configuration, validate
from purejax_bilevel.errors import UserError
from purejax_bilevel.program import POPULATION, Measure, Metrics, Program, Stage, Tree, population_gather
from purejax_bilevel.programs.meta_objectives import network, population, worlds
from purejax_bilevel.programs.meta_objectives.agents import Learning
from purejax_bilevel.programs.meta_objectives.registry import AGENTS
from purejax_bilevel.programs.meta_objectives.settings import Levels, ObjectiveSearch, ObjectiveTraining, Task
from purejax_bilevel.programs.meta_objectives.worlds import World

# Named streams of random numbers; a constant each, so that adding one moves no other.
START, STEP, TRIALS = range(3)  # of a member
LEVEL, LIFE = range(2)  # of a trial

NEAR = 0.75  # of A2C's return: what counts as near


@configuration
class Config(Levels, ObjectiveSearch, ObjectiveTraining):
    """Settings of one training program; a traced field may hold several values, one per point of a grid."""

    agent_type: str = changed(Task, "agent_type", "lpg", choices=AGENTS)
    env_name: str = changed(
        Task, "env_name", "GridWorld-all_shortlife", "GridWorld-<mode> (its levels), one level, or any of gymnax"
    )

    def program(self) -> "MetaProgram":
        """The training program of this (resolved) configuration."""
        return MetaProgram(self)

    @property
    def title(self) -> str:
        """Short name of the experiment."""
        return f"{AGENTS[self.agent_type].name}-{self.env_name}"

    def resolved(self) -> Self:
        """Fills in what the agent and the environment say, and checks everything.

        Raises:
            UserError: for a value that is not allowed, or two that do not go together.
        """
        config = AGENTS.tuned(self)
        world = worlds.make(config.env_name)
        config = worlds.with_rates(config, world)
        validate(config)
        _check_together(config, world)
        return config


def _check_together(config: Config, world: World) -> None:
    AGENTS.check_settings(config)
    field = AGENTS[config.agent_type].population
    agents = getattr(config, field)
    if agents % config.num_mini_batches:
        raise UserError(f"--num_mini_batches {config.num_mini_batches} must divide the {agents} agents of --{field}.")
    AGENTS[config.agent_type].check(config, world)


class Yardsticks(flax.struct.PyTreeNode):
    """The levels of the trials, and what agents under the objective are compared with on them."""

    params: Any  # of the environments, leaves [levels, ...]
    a2c: jax.Array  # [levels], returns of A2C at the end of its life
    untrained: jax.Array  # [levels], of agents under the objective before its first step
    optimum: jax.Array  # [levels], the best expected returns; NaN where they are not known


class State(flax.struct.PyTreeNode):
    """Everything a member carries from step to step."""

    key: jax.Array
    learning: Learning
    yardsticks: Yardsticks | None  # None: there are no trials


class MetaProgram(Program[Config]):
    """The program: pure functions of a member's configuration.

    Args:
        config: resolved configuration; only its static fields matter here.
    """

    step_unit = "meta-steps"
    artefact_kind = network.ARTEFACT_KIND

    def __init__(self, config: Config):
        self.world, self.agent = worlds.make(config.env_name), AGENTS[config.agent_type]
        self.population = getattr(config, self.agent.population)
        self.trials = config.eval_agents
        self.measures = self.agent.measures + (TRIAL_MEASURES if self.trials else ())
        self.headline = "unseen_return" if self.trials else self.agent.measures[0].name
        self.stages = (
            Stage(config.num_train_steps, config.eval_frequency, self.update, self.evaluate, most_block_steps=1),
        )

    def init(self, key: jax.Array, config: Config, shared: Tree = ()) -> State:
        """State of a member before its first step; the key becomes the member's own."""
        learning = self.agent.init(self.world, config, jax.random.fold_in(key, START))
        return State(key, learning, self._yardsticks(key, config, learning))

    def individuals(self, state: State) -> State:
        nothing = jax.tree.map(lambda leaf: False, state)
        return nothing.replace(learning=state.learning.individuals())

    def update(self, state: State, config: Config, t: jax.Array, shared: Tree = ()) -> tuple[State, Metrics]:
        """One meta-step.

        Args:
            state: of one member.
            config: of that member.
            t: number of the step, shared by all members.
        """
        key = jax.random.fold_in(jax.random.fold_in(state.key, STEP), t)
        learning, metrics = self.agent.step(self.world, config, state.learning, key)
        return state.replace(learning=learning), metrics

    def evaluate(
        self, state: State, config: Config, t: jax.Array, is_last: jax.Array, shared: Tree = ()
    ) -> dict[str, jax.Array]:
        """Whole lives of new agents under the objective, always on the same levels, on which nobody learns.

        Returns:
            What `TRIAL_MEASURES` names, unless `eval_agents` is 0, and what the agent measures.
        """
        own = self.agent.evaluate(config, state.learning, is_last)
        if state.yardsticks is None:
            return own
        found = self._lived(state.key, config, state.learning, state.yardsticks.params)
        yards, mean = state.yardsticks, found.mean()
        return own | {
            "unseen_return": mean,
            "a2c_normalised": mean / yards.a2c.mean(),
            "optimum_normalised": mean / yards.optimum.mean(),
            "near_a2c": (found >= NEAR * yards.a2c).astype(found.dtype).mean(),
            "a2c_return": yards.a2c.mean(),
            "untrained_return": yards.untrained.mean(),
            "unseen_level_return": jnp.where(is_last, found, jnp.nan),
            "a2c_level_return": jnp.where(is_last, yards.a2c, jnp.nan),
            "optimum_level_return": jnp.where(is_last, yards.optimum, jnp.nan),
        }

    def artefact(self, state: State) -> network.Weights:
        """The weights of the objective."""
        return state.learning.weights

    def is_finite(self, state: State) -> jax.Array:
        """Whether the weights of a member's objective are finite numbers."""
        return jnp.stack([jnp.isfinite(leaf).all() for leaf in state.learning.weights]).all()

    # --- trials -------------------------------------------------------------------------------------------------------

    def _yardsticks(self, key: jax.Array, config: Config, learning: Learning) -> Yardsticks | None:
        if not self.trials:
            return None
        draw = lambda number: self.world.draw(_own(key, LEVEL, number))  # noqa: E731
        params = jax.vmap(draw)(jnp.arange(self.trials))
        optimum = jax.vmap(self.world.optimum)(params)
        lived = lambda is_a2c: self._lived(key, config, learning, params, is_a2c)  # noqa: E731
        a2c, untrained = jax.lax.map(lived, jnp.array([True, False]))  # compiled once for both
        return Yardsticks(params, a2c, untrained, optimum)

    def _lived(
        self, key: jax.Array, config: Config, learning: Learning, params: Any, is_a2c: jax.Array | bool = False
    ) -> jax.Array:
        """Returns at the end of lives on the levels of the trials, `[levels]`; each device does its share."""
        each = -(-self.trials // jax.lax.axis_size(POPULATION))
        numbers = (jax.lax.axis_index(POPULATION) * each + jnp.arange(each)) % self.trials

        def live(number: jax.Array, params: Any) -> jax.Array:
            own = _own(key, LIFE, number)
            return population.trial(self.world, config, learning.weights, params, own, is_a2c)

        found = jax.vmap(live)(numbers, jax.tree.map(lambda leaf: leaf[numbers], params))
        return population_gather(found)[: self.trials]


def _own(key: jax.Array, stream: int, number: jax.Array) -> jax.Array:
    return jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(key, TRIALS), stream), number)


LEVELS = ("level",)
TRIAL_MEASURES = (
    Measure("unseen_return", "return at the end of a life on levels of the trials", better="higher"),
    Measure("a2c_normalised", "that return over A2C's on the same levels", better="higher"),
    Measure("optimum_normalised", "that return over the optimum on the same levels", better="higher"),
    Measure("near_a2c", "share of the levels with at least 75 % of A2C's return", better="higher"),
    Measure("a2c_return", "return of A2C on these levels, trained as long"),
    Measure("untrained_return", "return on these levels under the untrained objective"),
    Measure("unseen_level_return", "return per level", dims=LEVELS, when="end", logged=False),
    Measure("a2c_level_return", "return of A2C per level", dims=LEVELS, when="end", logged=False),
    Measure("optimum_level_return", "best return per level", dims=LEVELS, when="end", logged=False),
)

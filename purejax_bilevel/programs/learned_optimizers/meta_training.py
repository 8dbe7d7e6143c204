"""Meta-training of a learned optimiser: an evolution strategy whose candidates each train agents for a whole life.

Outline of a run (every line inside one compiled loop):

    for t in 0 .. num_train_steps - 1:                            generations
        ask for candidates, weights of the learned optimiser, in mirrored pairs (evolution.py)
        each of them trains num_rollouts agents from scratch in each environment; fitness is the return at the end
        tell their ranks to the evolution strategy
        every eval_frequency generations: lives of the mean with keys of their own; the best mean so far is kept

The candidates' lives are the population of a member: they are spread over devices. All candidates live with the same
keys, or each mirrored pair with its own (`--fitness_shaping pairs`), its level of a Grid-World among them.

Source: Goldie et al. 2024, "Can learned optimization make reinforcement learning less difficult?" (OPEN).
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, Self

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from purejax_bilevel import evolution
from purejax_bilevel.agents import Agents
from purejax_bilevel.configuration import (
    LARGEST,
    SMALLEST,
    at_least,
    changed,
    configuration,
    replace,
    static,
    validate,
)
from purejax_bilevel.environments import grid_world
from purejax_bilevel.errors import UserError
from purejax_bilevel.evolution import Evolution, SearchState, Strategy
from purejax_bilevel.program import POPULATION, Measure, Metrics, Program, Stage, Tree
from purejax_bilevel.programs.learned_optimizers import ppo, settings, tasks, update_rules
from purejax_bilevel.programs.learned_optimizers.agents import PolicyGradient
from purejax_bilevel.programs.learned_optimizers.weights import ARTEFACT_KIND, SIZES, unflatten

# Named streams of random numbers; a constant each, so that adding one moves no other.
CANDIDATES, TRAINING, VALIDATION, START = range(4)  # of a member
AGENT, LEVEL = range(2)  # of a life

# Returns that count 0 and 1 in a mean over environments: of no skill, and of tuned Adam (OPEN's code), or the best.
RANGES = {
    "Asterix-MinAtar": (0.0, 15.0353),
    "Breakout-MinAtar": (0.0, 50.0822),
    "Freeway-MinAtar": (0.0, 61.8369),
    "SpaceInvaders-MinAtar": (0.0, 167.0913),
    "ant": (0.0, 6517.31),
    "CartPole-v1": (0.0, 500.0),
    "Acrobot-v1": (-500.0, -80.0),
    "MountainCar-v0": (-200.0, -110.0),
}

AGENTS: Agents[PolicyGradient] = Agents(
    PolicyGradient,
    [
        PolicyGradient(
            "open_training",
            "trains a learned optimiser by evolution, in lives of PPO",
            step=ppo.iteration,
            init=ppo.init,
        )
    ],
)


@configuration
class Task(settings.Task):
    """What candidates are tried on."""

    agent_type: str = changed(settings.Task, "agent_type", "open_training", choices=AGENTS)
    draw_level: bool = changed(
        settings.Task, "draw_level", False, help="each life has a level of its own of the Grid-World mode"
    )
    further_envs: str = static("", "more environments, joined by commas or spaces", group="environment", task=True)
    fitness_ranges: str = static(
        "",
        "low:high for each environment, by commas or spaces: returns that count 0 and 1 (default: known for some)",
        group="environment",
    )


@configuration
class Schedule(Task):
    """How long it runs. A step of the program is a generation."""

    num_train_steps: int = static(500, "generations", at_least(1), "schedule")
    eval_frequency: int = static(25, "generations between evaluations of the mean", at_least(1), "schedule")
    validation_lives: int = static(8, "lives of the mean in each environment", at_least(1), "schedule")


@configuration
class Lives:
    """How a candidate is tried."""

    num_iterations: int = static(1220, "iterations of PPO in a life", at_least(2), "lives")
    num_rollouts: int = static(1, "lives of each candidate in each environment", at_least(1), "lives")
    fitness_iterations: int = static(1, "last iterations of a life whose returns are its fitness", at_least(1), "lives")
    lives_at_once: int = static(
        0, "lives that a device computes side by side (0: one on a CPU, else all of its own)", at_least(0), "lives"
    )


@configuration
class Start:
    """The first mean of the evolution strategy, an optimiser that changes nothing; or what --model names."""

    larger: bool = static(False, "3571 weights instead of 1211", group="optimiser")
    first_mean: Literal["zeros", "random_features"] = static(
        "zeros", "all weights 0 (published), or only those of the last layer and others random", group="optimiser"
    )


@configuration
class Config(Start, settings.PPO, Evolution, Lives, Schedule):
    """Settings of one meta-training program; a traced field may hold several values, one per point of a grid."""

    optimizer: Literal["open", "no_features"] = changed(settings.PPO, "optimizer", "open", help="what is trained")
    model: str = changed(
        settings.PPO, "model", "", help="weights to start from: a .npy file, or a run (runs/x, runs/x#3)"
    )

    def program(self) -> "MetaTraining":
        """The training program of this (resolved) configuration."""
        return MetaTraining(self)

    @property
    def title(self) -> str:
        """Short name of the experiment."""
        return f"{AGENTS[self.agent_type].name}-{'-'.join(environments(self))}"

    def resolved(self) -> Self:
        """Fills in what is known, and checks everything.

        Raises:
            UserError: for a value that is not allowed, or two that do not go together.
        """
        config = update_rules.with_rates(AGENTS.tuned(self))
        validate(config)
        _check_together(config)
        return config


def environments(config: Task) -> list[str]:
    """Names of all environments."""
    return [config.env_name, *_words(config.further_envs)]


def ranges(config: Task) -> list[tuple[float, float]]:
    """Returns that count 0 and 1, of each environment.

    Raises:
        UserError: they are not pairs of different numbers, one for each environment, or none are known.
    """
    names = environments(config)
    if config.fitness_ranges:
        pairs = [_pair(config.fitness_ranges, text) for text in _words(config.fitness_ranges)]
        if len(pairs) != len(names):
            raise UserError(
                f"--fitness_ranges {config.fitness_ranges} must have low:high for each of {', '.join(names)}."
            )
        return pairs
    unknown = [name for name in names if name not in RANGES]
    if len(names) > 1 and unknown:
        raise UserError(
            f"--fitness_ranges must be given: which returns of {', '.join(unknown)} count 0 and 1 is not known."
        )
    return [RANGES.get(name, (0.0, 1.0)) for name in names]


def _words(text: str) -> list[str]:
    """A command line of sweeps takes values with commas for several settings, so that spaces join as well."""
    return text.replace(",", " ").split()


def _pair(given: str, text: str) -> tuple[float, float]:
    try:
        low, high = (float(number) for number in text.split(":"))
    except ValueError:
        low = high = math.nan
    if not (math.isfinite(high - low) and SMALLEST <= abs(high - low) <= LARGEST):
        raise UserError(
            f"--fitness_ranges must be low:high, two different numbers, for each environment, got {given!r}."
        )
    return low, high


def own_config(config: Config, name: str) -> Config:
    """The configuration of lives in one of the environments."""
    draw_level = config.draw_level and (grid_world.known(name) or not config.further_envs)
    return replace(config, env_name=name, draw_level=draw_level)


def _check_together(config: Config) -> None:
    size, names = config.num_envs * config.num_steps, environments(config)
    if size % config.num_minibatches:
        raise UserError(
            f"--num_envs {config.num_envs} x --num_steps {config.num_steps} = {size} samples cannot be divided into "
            f"--num_minibatches {config.num_minibatches} of one size."
        )
    if config.num_epochs < 2 and update_rules.switches(config).batch_clock:
        raise UserError(
            f"--num_epochs {config.num_epochs} is too few for --optimizer open, whose clock divides by one less: at "
            "least 2, or --without batch_clock."
        )
    if config.fitness_iterations > config.num_iterations:
        raise UserError(
            f"--fitness_iterations {config.fitness_iterations} is above --num_iterations {config.num_iterations}."
        )
    if config.num_train_steps % config.eval_frequency:
        raise UserError(
            f"--num_train_steps {config.num_train_steps} must be a multiple of --eval_frequency "
            f"{config.eval_frequency}: what is kept is chosen at evaluations."
        )
    if len(set(names)) < len(names):
        raise UserError(f"--further_envs {config.further_envs}: every environment must be named once.")
    AGENTS.check_settings(config)
    ranges(config)
    for name in names:
        _check_length(config, name)
    _start(config)


def _check_length(config: Config, name: str) -> None:
    """Until its first episode has ended an environment's return is 0, which may be a good one."""
    steps = (config.num_iterations - config.fitness_iterations + 1) * config.num_steps
    limit = tasks.make(own_config(config, name)).max_steps
    if steps < limit:
        raise UserError(
            f"--num_iterations {config.num_iterations} x --num_steps {config.num_steps} is too short for {name}: its "
            f"fitness is measured from step {steps} on, and an episode may have {limit}."
        )


def _start(config: Config) -> np.ndarray | None:
    """The weights that --model names."""
    if not config.model:
        return None
    vector = update_rules.load(config.model)
    if isinstance(vector, Mapping):
        raise UserError(f"--model {config.model} has weights for each network; meta-training starts from one vector.")
    assert vector is not None
    if len(vector) != num_weights(config):
        raise UserError(
            f"--model {config.model} has {len(vector)} weights, --larger {config.larger} has {num_weights(config)}."
        )
    return np.asarray(vector)


def num_weights(config: Start) -> int:
    """Numbers that are learned."""
    small, larger = SIZES
    return larger if config.larger else small


class State(flax.struct.PyTreeNode):
    """Everything a member carries from generation to generation."""

    key: jax.Array
    search: SearchState
    returns: jax.Array  # [environments], of the mean's lives when last evaluated
    best: jax.Array  # [weights], the mean whose lives were best
    best_fitness: jax.Array  # [], theirs


class MetaTraining(Program[Config]):
    """The program: pure functions of a member's configuration, sharing environments and first weights.

    Args:
        config: resolved configuration; only its static fields matter here.
    """

    headline = "fitness_at_mean"
    step_unit = "generations"
    artefact_kind = ARTEFACT_KIND
    measures = (
        Measure("fitness_at_mean", "fitness of the mean on lives of its own", better="higher", tabled=True),
        Measure("best_at_mean", "best of these so far", better="higher"),
        Measure("return_at_mean", "return of the mean", better="higher", dims=("environment",)),
        Measure("fitness", "fitness of the candidates", better="higher"),
        Measure("best_fitness", "fitness of the best candidate of a generation", better="higher"),
        Measure("worst_fitness", "fitness of the worst candidate of a generation", better="higher"),
        Measure("fitness_spread", "standard deviation of the candidates' fitness"),
        Measure("failed_lives", "share of candidates whose fitness is no number", better="lower"),
        Measure("sigma", "mean standard deviation of the candidates' weights"),
        Measure("es_rate", "rate of the evolution strategy"),
        Measure("weight_size", "mean size of the mean's weights"),
    )

    def __init__(self, config: Config):
        self.config = config
        names = environments(config)
        self.tasks = [tasks.make(own_config(config, name)) for name in names]
        self.names, self.ranges = names, np.array(ranges(config))
        self.agent = AGENTS[config.agent_type]
        self.strategy = Strategy(config, jnp.zeros(num_weights(config)))
        self.population = config.population * config.num_rollouts
        self.at_once = config.lives_at_once or (1 if jax.default_backend() == "cpu" else self.population)
        stage = Stage(config.num_train_steps, config.eval_frequency, self.update, self.evaluate, most_block_steps=1)
        self.stages = (stage,)

    def shared(self) -> Tree:
        """Weights to start from, if there are any."""
        start = _start(self.config)
        return () if start is None else start

    def init(self, key: jax.Array, config: Config, shared: Tree = ()) -> State:
        """State of a member before its first step; the key becomes the member's own."""
        mean = shared if config.model else first_mean(jax.random.fold_in(key, START), config)
        unknown = jnp.full(len(self.names), jnp.nan)
        return State(key, self.strategy.init(mean, config), unknown, mean, -jnp.asarray(jnp.inf, mean.dtype))

    def update(self, state: State, config: Config, t: jax.Array, shared: Tree = ()) -> tuple[State, Metrics]:
        """One generation.

        Args:
            state: of one member.
            config: of that member.
            t: number of the generation, shared by all members.
            shared: not needed any more.
        """
        candidates = self.strategy.ask(_stream(state.key, CANDIDATES, t), state.search, config)
        is_due = (t + 1) % config.eval_frequency == 0

        def told(state: State, fitness: jax.Array, returns: jax.Array) -> tuple[State, jax.Array]:
            returns = returns[:, : self.population].reshape(len(returns), -1, config.num_rollouts)
            fitness = self.fitness(returns.mean(2))
            shaped = evolution.shaped(fitness, config)
            return state.replace(search=self.strategy.tell(candidates, shaped, state.search, config)), fitness

        def validated(state: State, fitness: jax.Array, returns: jax.Array) -> tuple[State, jax.Array]:
            return self._validated(state, returns[:, : config.validation_lives].mean(1)), fitness

        def phase(number: jax.Array, carry: tuple[State, jax.Array]) -> tuple[State, jax.Array]:
            returns = self._returns(carry[0], candidates, config, t, number == 0)
            return jax.lax.cond(number == 0, told, validated, *carry, returns)

        # Lives of the candidates, then of the mean where that is due: in one loop they are compiled once.
        start = state, jnp.zeros(config.population, state.best.dtype)
        state, fitness = jax.lax.fori_loop(0, 1 + is_due, phase, start)
        return state, _metrics(fitness)

    def fitness(self, returns: jax.Array) -> jax.Array:
        """Fitness `[...]` of returns `[environments, ...]`: their mean when each lies between 0 and 1 in its range."""
        low, high = jnp.asarray(self.ranges, returns.dtype).T
        shape = (-1, *(1,) * (returns.ndim - 1))
        return ((returns - low.reshape(shape)) / (high - low).reshape(shape)).mean(0)

    def _returns(
        self, state: State, candidates: jax.Array, config: Config, t: jax.Array, is_training: jax.Array
    ) -> jax.Array:
        """Returns `[environments, lives]` of all lives of a generation, or of the mean in its own, always the same."""
        mean, rollouts = self.strategy.mean(state.search), config.num_rollouts
        count = jnp.where(is_training, self.population, config.validation_lives)
        stream, generation = jnp.where(is_training, TRAINING, VALIDATION), jnp.where(is_training, t, 0)
        key = _stream(state.key, stream, generation)

        def lived(number: int, index: jax.Array) -> jax.Array:
            candidate = index // rollouts
            task = index % rollouts
            if config.fitness_shaping == "pairs":
                task += rollouts * evolution.pair_of(candidate, config.population)
            own = _stream(key, number, jnp.where(is_training, task, index))
            weights = jnp.where(is_training, candidates[candidate % config.population], mean)
            return self.life(weights, own, config, number)

        most = max(self.population, config.validation_lives)
        share = functools.partial(spread, count=count, most=most, at_once=self.at_once)
        return jnp.stack([share(functools.partial(lived, number)) for number in range(len(self.tasks))])

    def _validated(self, state: State, returns: jax.Array) -> State:
        """With the returns `[environments]` of the mean, which is kept if it is the best so far."""
        mean, fitness = self.strategy.mean(state.search), self.fitness(returns)
        is_best = fitness > state.best_fitness
        best, best_fitness = (
            jnp.where(is_best, new, old) for new, old in ((mean, state.best), (fitness, state.best_fitness))
        )
        return state.replace(returns=returns, best=best, best_fitness=best_fitness)

    def life(self, weights: jax.Array, key: jax.Array, config: Config, number: int = 0) -> jax.Array:
        """The return at the end of an agent's training.

        Args:
            weights: of the learned optimiser `[weights]`.
            key: of this life.
            config: of the member.
            number: of the environment.

        Returns:
            `[]`, the mean of the last finished episodes of all copies of the environment, after the last iterations.
        """
        own, task = own_config(config, self.names[number]), self.tasks[number]
        if own.draw_level:
            task = tasks.with_level(task, own, jax.random.fold_in(key, LEVEL))
        rule = update_rules.make(own, weights)
        agent = self.agent.init(jax.random.fold_in(key, AGENT), own, task, rule)

        def iteration(agent: Any, t: jax.Array) -> tuple[Any, jax.Array]:
            agent, _ = self.agent.step(agent, own, task, rule, t, own.num_iterations)
            return agent, agent.episodes.last.mean()

        _, returns = jax.lax.scan(iteration, agent, jnp.arange(own.num_iterations))
        return returns[-own.fitness_iterations :].mean()

    def evaluate(
        self, state: State, config: Config, t: jax.Array, is_last: jax.Array, shared: Tree = ()
    ) -> dict[str, jax.Array]:
        """What the last validation found, and where the search is."""
        return {
            "fitness_at_mean": self.fitness(state.returns),
            "best_at_mean": state.best_fitness,
            "return_at_mean": state.returns,
            "sigma": state.search.sigma.mean(),
            "es_rate": evolution.scheduled_rate(config, state.search.generation),
            "weight_size": jnp.abs(state.search.mean).mean(),
        }

    def artefact(self, state: State) -> Tree:
        """The weights: of the mean that was best on validation, and of the last one."""
        return {"weights": state.best, "last": self.strategy.mean(state.search)}

    def is_finite(self, state: State) -> jax.Array:
        """Whether the mean of a member is finite."""
        return jnp.isfinite(state.search.mean).all()


def first_mean(key: jax.Array, config: Start) -> jax.Array:
    """An optimiser that changes nothing `[weights]`: at least the last layer is zeros.

    From zeros the fitness of mirrored candidates is the same to first order, as every output is a product of several
    layers' weights; with random features it is not, and a search of few generations gets further.
    """
    weights = unflatten(jnp.zeros(num_weights(config)))
    if config.first_mean == "random_features":
        drawn = {
            name: jax.random.normal(jax.random.fold_in(key, number), kernel.shape) / math.sqrt(len(kernel))
            for number, (name, kernel) in enumerate(weights._asdict().items())
            if kernel.ndim == 2 and name != "output_kernel"
        }
        ones = jnp.ones_like(weights.first_norm_scale)
        weights = weights._replace(**drawn, first_norm_scale=ones, second_norm_scale=ones)
    return jnp.concatenate([leaf.ravel() for leaf in weights])


def spread(function: Callable[[jax.Array], jax.Array], count: jax.Array, most: int, at_once: int) -> jax.Array:
    """Results of a function of the numbers 0 .. count - 1, shared out among the devices of a population.

    Args:
        function: of one number, gives one number.
        count: how many there are, may be traced.
        most: the largest that this may be.
        at_once: numbers that a device computes side by side.

    Returns:
        `[most]`; only the first `count` have a meaning.
    """
    devices = jax.lax.axis_size(POPULATION)
    at_once = min(at_once, -(-most // devices))
    batches = -(-most // (devices * at_once))
    own = (jax.lax.axis_index(POPULATION) + devices * jnp.arange(batches * at_once)).reshape(batches, at_once) % most
    several = jax.vmap(function) if at_once > 1 else lambda numbers: function(numbers[0])[None]

    def batch(i: jax.Array, results: jax.Array) -> jax.Array:
        return results.at[i].set(several(own[i]))

    empty = jnp.zeros((batches, at_once), jax.eval_shape(function, jnp.int32(0)).dtype)
    results = jax.lax.fori_loop(0, -(-count // (devices * at_once)), batch, empty)
    return jax.lax.all_gather(results.ravel(), POPULATION, axis=1).ravel()[:most]


def _stream(key: jax.Array, stream: jax.Array | int, number: jax.Array | int) -> jax.Array:
    return jax.random.fold_in(jax.random.fold_in(key, stream), number)


def _metrics(fitness: jax.Array) -> Metrics:
    """Of a generation's fitness `[population]`; candidates that failed count in their own share alone."""
    lived = ~jnp.isnan(fitness)
    one, some = jnp.ones(()), lived.any().astype(fitness.dtype)
    numbers = {
        "fitness": jnp.mean(fitness, where=lived),
        "best_fitness": jnp.nanmax(fitness),
        "worst_fitness": jnp.nanmin(fitness),
        "fitness_spread": jnp.std(fitness, where=lived),
    }
    measured = {name: (jnp.where(lived.any(), number, 0.0), some) for name, number in numbers.items()}
    return measured | {"failed_lives": (jnp.mean(~lived, dtype=fitness.dtype), one)}

"""Evolution strategies inside a compiled program: a search distribution that learns from the fitness of its samples.

    strategy = Strategy(settings, like)
    state = strategy.init(mean, settings)
    for generation in ...:
        candidates = strategy.ask(key, state, settings)             leaves [population, ...]
        fitness = ...                                               [population], higher is better
        state = strategy.tell(candidates, shaped(fitness, settings), state, settings)

Candidate i and candidate i + population / 2 are mirror images (antithetic sampling), a pair. All rates may differ
between the members of a program. The steps are those of evosax, which minimises and keeps no floors; both is taken care
of here.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from purejax_bilevel.configuration import FRACTION, NONNEGATIVE, POSITIVE, Check, configuration, static, traced

Tree = Any
MOST = 1_000_000  # candidates: more are told here, not by a compiler that takes minutes to find out
EVEN = Check(f"an even whole number from 2 to {MOST}", lambda x: x == int(x) and 2 <= x <= MOST and x % 2 == 0)
DECAY = Check("a number above 0, at most 1", lambda x: 0 < x <= 1)
MOMENTUM = Check("a number from 0 to below 1", lambda x: 0 <= x < 1)
GROUP = "evolution strategy"


@configuration
class Evolution:
    """An evolution strategy; defaults are those of OPEN on MinAtar (Goldie et al. 2024, table 9)."""

    strategy: Literal["open_es", "pgpe"] = static(
        "open_es", "one sigma with a schedule (OpenAI-ES), or a learned one per parameter (PGPE)", group=GROUP
    )
    population: int = static(64, "candidates of a generation, in mirrored pairs", EVEN, GROUP)
    fitness_shaping: Literal["ranks", "pairs"] = static(
        "ranks", "a candidate's rank in the population, or which one of each mirrored pair is better", group=GROUP
    )
    ties: Literal["shared", "by_order"] = static(
        "shared", "equal fitness: equal shares (default), or decided by the order as in evosax 0.1", group=GROUP
    )
    es_optimizer: Literal["adam", "sgd"] = static("adam", "steps of the mean", group=GROUP)
    sigma: float = traced(0.03, "standard deviation of the candidates, at first", POSITIVE, GROUP)
    sigma_decay: float = traced(0.999, "open_es: factor of sigma per generation", DECAY, GROUP)
    sigma_lr: float = traced(0.1, "pgpe: rate of sigma", NONNEGATIVE, GROUP)
    sigma_floor: float = traced(0.0, "sigma does not go below", NONNEGATIVE, GROUP)
    es_lr: float = traced(0.03, "rate of the mean, at first", POSITIVE, GROUP)
    es_lr_decay: float = traced(0.999, "factor of that rate per generation", DECAY, GROUP)
    es_lr_floor: float = traced(0.0, "that rate does not go below", NONNEGATIVE, GROUP)
    es_beta_1: float = traced(0.99, "Adam's decay of the mean gradient", MOMENTUM, GROUP)
    es_beta_2: float = traced(0.999, "Adam's decay of the squared gradient", MOMENTUM, GROUP)
    mean_decay: float = traced(0.0, "share of the mean that is taken off per generation", FRACTION, GROUP)


class SearchState(NamedTuple):
    """The search distribution, and how far the search is."""

    mean: jax.Array  # [numbers]
    sigma: jax.Array  # [] (open_es) or [numbers] (pgpe)
    optimizer: optax.OptState
    generation: jax.Array  # []


class Strategy:
    """An evolution strategy over trees of numbers.

    Args:
        settings: only what is static matters here.
        like: a solution, leaves with shapes.
    """

    def __init__(self, settings: Evolution, like: Tree):
        # Here: it takes a second, and few programs need it.
        from evosax.algorithms.distribution_based import open_es, pgpe
        from evosax.core.fitness_shaping import identity_fitness_shaping_fn

        self.population, self.is_open_es = settings.population, settings.strategy == "open_es"
        rule = {"adam": optax.adam, "sgd": optax.sgd}[settings.es_optimizer]
        # Rates are numbers of the state, since evosax takes the optimiser before it is told any.
        self.optimizer = optax.inject_hyperparams(rule)(learning_rate=1.0)
        self.flat, self.unravel = ravel_pytree(like)
        self.State = open_es.State if self.is_open_es else pgpe.State
        self.algorithm = (open_es.Open_ES if self.is_open_es else pgpe.PGPE)(
            settings.population,
            self.flat,
            optimizer=self.optimizer,
            fitness_shaping_fn=identity_fitness_shaping_fn,
            metrics_fn=lambda *_: {},
        )

    def init(self, mean: Tree, settings: Evolution) -> SearchState:
        """The search before its first generation.

        Args:
            mean: the solution to start from.
            settings: of one member.
        """
        start = ravel_pytree(mean)[0]
        sigma = jnp.maximum(settings.sigma, settings.sigma_floor).astype(start.dtype)
        sigma = sigma if self.is_open_es else jnp.full(start.shape, sigma)
        return SearchState(start, sigma, self.optimizer.init(start), jnp.zeros((), jnp.int32))

    def mean(self, state: SearchState) -> Tree:
        """The middle of the search distribution: the solution so far."""
        return self.unravel(state.mean)

    def ask(self, key: jax.Array, state: SearchState, settings: Evolution) -> Tree:
        """The candidates of a generation.

        Args:
            key: used for this generation only.
            state: of the search.
            settings: of one member.

        Returns:
            Solutions, leaves `[population, ...]`; row i and row i + population / 2 are mirror images.
        """
        flat, _ = self.algorithm.ask(key, self._told(state, settings), self.algorithm.default_params)
        return jax.vmap(self.unravel)(flat)

    def tell(self, candidates: Tree, shaped: jax.Array, state: SearchState, settings: Evolution) -> SearchState:
        """The search after a generation.

        Args:
            candidates: as asked for.
            shaped: `[population]`, lower is better: see `shaped`.
            state: that they were asked from.
            settings: of one member.
        """
        before = self._told(state, settings)
        parameters = self.algorithm.default_params
        if not self.is_open_es:
            parameters = parameters.replace(std_lr=jnp.asarray(settings.sigma_lr, before.std.dtype))
        flat = jax.vmap(lambda solution: ravel_pytree(solution)[0])(candidates)
        # Neither algorithm draws anything here.
        after, _ = self.algorithm.tell(None, flat, shaped.astype(flat.dtype), before, parameters)
        generation = state.generation + 1
        mean = after.mean * (1 - jnp.asarray(settings.mean_decay, flat.dtype))
        sigma = scheduled_sigma(settings, generation) if self.is_open_es else after.std
        floor = jnp.asarray(settings.sigma_floor, flat.dtype)
        sigma = jnp.maximum(jnp.asarray(sigma, flat.dtype), floor)
        return SearchState(mean, sigma, after.opt_state, generation)

    def _told(self, state: SearchState, settings: Evolution) -> Any:
        """evosax's own state, with the rates of this generation."""
        known = state.optimizer.hyperparams
        rates = {
            "learning_rate": scheduled_rate(settings, state.generation),
            "b1": settings.es_beta_1,
            "b2": settings.es_beta_2,
        }
        ours = {name: jnp.asarray(rates[name], known[name].dtype) for name in rates if name in known}
        return self.State(
            mean=state.mean,
            std=state.sigma,
            opt_state=state.optimizer._replace(hyperparams=known | ours),
            best_solution=state.mean,  # not kept: it would be the luckiest candidate
            best_fitness=jnp.asarray(jnp.inf, state.mean.dtype),
            generation_counter=state.generation,
        )


def scheduled_sigma(settings: Evolution, generation: jax.Array) -> jax.Array:
    """Standard deviation of the candidates of a generation, counted from 0, without the floor."""
    return settings.sigma * _power(settings.sigma_decay, generation)


def scheduled_rate(settings: Evolution, generation: jax.Array) -> jax.Array:
    """Rate of the mean in a generation, counted from 0."""
    return jnp.maximum(settings.es_lr * _power(settings.es_lr_decay, generation), settings.es_lr_floor)


def _power(base: jax.Array | float, exponent: jax.Array) -> jax.Array:
    return jnp.asarray(base, float) ** exponent.astype(float)


# --- fitness ----------------------------------------------------------------------------------------------------------


def shaped(fitness: jax.Array, settings: Evolution) -> jax.Array:
    """What a strategy is told of a generation, whatever the size of the fitness.

    Args:
        fitness: `[population]`, higher is better; NaN is the worst.
        settings: which shaping.

    Returns:
        `[population]`, lower is better.
    """
    shape = centred_ranks if settings.fitness_shaping == "ranks" else pair_wins
    return shape(fitness, settings.ties == "shared")


def centred_ranks(fitness: jax.Array, ties_shared: bool = True) -> jax.Array:
    """Ranks from -0.5 (best) to 0.5 (worst) `[population]`, of a fitness `[population]` where higher is better.

    Args:
        fitness: NaN is the worst.
        ties_shared: whether equal ones get their mean rank, so that a population of equals moves nothing; else the
            first of them is the best (evosax 0.1).

    Source: Salimans et al. 2017, "Evolution strategies as a scalable alternative to reinforcement learning".
    """
    badness = jnp.where(jnp.isnan(fitness), jnp.inf, -fitness)
    ranks = jnp.argsort(jnp.argsort(badness)) if not ties_shared else jax.scipy.stats.rankdata(badness) - 1
    most = len(fitness) - 1
    # In this order equals are 0 to the last bit: Adam makes whole steps of the smallest gradients.
    return (2 * ranks - most).astype(fitness.dtype) / (2 * most)


def pair_wins(fitness: jax.Array, ties_shared: bool = True) -> jax.Array:
    """-0.5 for the better one of each mirrored pair and 0.5 for the other `[population]`; higher fitness is better.

    Pairs may then be given tasks of different difficulty (antithetic task sampling). The original has -1 and 0, from
    which the same steps follow.

    Args:
        fitness: `[population]`, row i and row i + population / 2 are a pair; NaN loses.
        ties_shared: whether both get 0, which moves nothing; else the second one wins (original code).

    Source: Jackson et al. 2024, "Discovering temporally-aware reinforcement learning algorithms", section 4.
    """
    goodness = jnp.where(jnp.isnan(fitness), -jnp.inf, fitness)
    first, second = jnp.split(goodness, 2)
    lead = jnp.where(first > second, 0.5, -0.5)
    lead = jnp.where((first == second) & ties_shared, 0.0, lead)
    return jnp.concatenate([-lead, lead])


def pair_of(candidate: jax.Array, population: int) -> jax.Array:
    """Number of the pair of a candidate, to give both the same task and keys."""
    return candidate % (population // 2)

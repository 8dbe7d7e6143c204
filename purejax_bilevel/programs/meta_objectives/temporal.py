"""TA-LPG: an objective that knows how much of a life is over, found by an evolution strategy on whole lives.

    candidates = weights + sigma noise, in mirrored pairs
    each one: a whole life of an agent, on a level and with chances that it shares with its mirror image
    the better one of each pair wins, and the weights move towards the winners

Source: Jackson et al. 2024, "Discovering temporally-aware reinforcement learning algorithms".
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from purejax_bilevel.evolution import Strategy, pair_of, shaped
from purejax_bilevel.program import Measure, Metrics, own_individuals, population_gather
from purejax_bilevel.programs.meta_objectives import agents, curriculum, lives, network
from purejax_bilevel.programs.meta_objectives.agents import Learning, MetaAgent
from purejax_bilevel.programs.meta_objectives.lives import Candidate
from purejax_bilevel.programs.meta_objectives.settings import SearchTraining
from purejax_bilevel.programs.meta_objectives.worlds import World

# Named streams of random numbers; a constant each, so that adding one moves no other.
ASK, LEVELS, CHANCES = range(3)  # of a generation


def strategy_of(config: SearchTraining) -> Strategy:
    """The search over an objective's weights."""
    shapes = agents.weight_shapes(config)
    return Strategy(config, network.Weights(*(jnp.zeros(shape) for shape in shapes)))


def init(world: World, config: SearchTraining, key: jax.Array) -> Learning:
    """New weights in the middle of the search; nobody lives between generations. The key is consumed."""
    weights = network.init(key, agents.weight_shapes(config))
    return Learning(weights, strategy_of(config).init(weights, config), ())  # type: ignore[arg-type]


def step(world: World, config: SearchTraining, learning: Learning, key: jax.Array) -> tuple[Learning, Metrics]:
    """A generation; the key is consumed."""
    strategy, search = strategy_of(config), learning.optimizer
    ask_key, level_key, chance_key = (jax.random.fold_in(key, stream) for stream in (ASK, LEVELS, CHANCES))
    candidates = strategy.ask(ask_key, search, config)
    own = own_individuals(config.population)
    pairs = pair_of(own, config.population)
    lots = jax.vmap(curriculum.lottery(world, config))(curriculum.numbers(level_key, pairs))
    chances = jax.vmap(lambda pair: jax.random.fold_in(chance_key, pair))(pairs)
    tried = Candidate(jax.tree.map(lambda leaf: leaf[own], candidates), lots, chances)
    found = lives.fitness(world, config, tried, config.num_mini_batches)
    fitness = population_gather(found)
    search = strategy.tell(candidates, shaped(fitness, config), search, config)
    weights = strategy.mean(search)
    return Learning(weights, search, learning.lives), _metrics(learning.weights, weights, fitness)


def _metrics(before: Any, after: Any, fitness: jax.Array) -> Metrics:
    one = jnp.ones(())
    first, second = jnp.split(fitness, 2)
    return {
        "fitness": (fitness.mean(), one),
        "best_fitness": (fitness.max(), one),
        "tied_pairs": ((first == second).astype(fitness.dtype).mean(), one),
        "search_step": (optax.tree.norm(jax.tree.map(jnp.subtract, after, before)), one),
    }


TA_LPG = MetaAgent(
    name="ta_lpg",
    text="an evolution strategy on whole lives, and an objective that knows their length",
    step=step,
    init=init,
    defaults={"lifetime_conditioning": True, "lpg_learning_rate": 1e-4},
    settings=("strategy", "population", "fitness_shaping", "ties", "es_optimizer"),
    population="population",
    measures=(
        Measure("fitness", "return at the end of a candidate's life", better="higher"),
        Measure("best_fitness", "highest of these returns in a generation"),
        Measure("tied_pairs", "share of the pairs of equal fitness, which move nothing"),
        Measure("search_step", "norm of the step of the weights"),
    ),
    check=lambda config, world: None,
)

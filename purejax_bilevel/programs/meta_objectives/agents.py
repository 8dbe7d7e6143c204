"""The agents of meta-training: how the weights of an objective change in a meta-step.

The agents are the values of `AGENTS`, at the end of this file. Each has functions of the individuals of one device:
`init(world, config, key) -> Learning` and `step(world, config, learning, key) -> (Learning, metrics)`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from purejax_bilevel.agents import Agent, Agents
from purejax_bilevel.program import Metrics, own_individuals, population_mean
from purejax_bilevel.programs.meta_objectives import network, population
from purejax_bilevel.programs.meta_objectives.network import Weights
from purejax_bilevel.programs.meta_objectives.population import Life
from purejax_bilevel.programs.meta_objectives.settings import MetaTraining
from purejax_bilevel.programs.meta_objectives.worlds import World

# Named streams of random numbers; a constant each, so that adding one moves no other.
LIVE, BIRTH = range(2)  # of a meta-step


class Learning(flax.struct.PyTreeNode):
    """What a member has learned, and the lives that it learns from."""

    weights: Weights
    optimizer: optax.OptState
    lives: Life  # leaves [agents, ...]

    def individuals(self) -> "Learning":
        """Which leaves have the population's individuals as first dimension."""
        shared = jax.tree.map(lambda leaf: False, self)
        return shared.replace(lives=jax.tree.map(lambda leaf: True, self.lives))


def init(world: World, config: MetaTraining, key: jax.Array) -> Learning:
    """New weights, and room for lives; the key is consumed."""
    weights = network.init(key, weight_shapes(config))
    return Learning(weights, adam(config).init(weights), population.nobody(world, config, key))


def weight_shapes(config: MetaTraining) -> Weights:
    """Shapes of the objective's weights."""
    sizes = (config.lpg_target_width, config.lpg_embedding_net_width, config.lpg_gru_width)
    return network.shapes(*sizes, bool(config.lifetime_conditioning))


def adam(config: MetaTraining) -> optax.GradientTransformation:
    return optax.adam(config.lpg_learning_rate)


def meta_gradient_step(
    world: World, config: MetaTraining, learning: Learning, key: jax.Array
) -> tuple[Learning, Metrics]:
    """New lives for those that are over, then one step of Adam down the meta-gradient; the key is consumed."""
    own = own_individuals(config.num_agents)
    keys, birth_keys = (_each(jax.random.fold_in(key, stream), own) for stream in (LIVE, BIRTH))
    lives = population.reborn(world, config, birth_keys, learning.lives)
    gradient, lives, lived = population.gradient(world, config, learning.weights, lives, keys)
    updates, optimizer = adam(config).update(gradient, learning.optimizer)
    weights = optax.apply_updates(learning.weights, updates)
    one = jnp.ones(())
    means = population_mean((lived.terms, lived.returns, lives.is_over.astype(jnp.result_type(float))))
    terms, (returns, episodes), ended = means
    metrics = {name: (value, one) for name, value in terms._asdict().items()}
    metrics |= {
        "training_return": (config.num_agents * returns, config.num_agents * episodes),
        "ended_lives": (config.num_agents * ended, one),
        "meta_gradient_norm": (optax.tree.norm(gradient), one),
    }
    return learning.replace(weights=weights, optimizer=optimizer, lives=lives), metrics


def _each(key: jax.Array, numbers: jax.Array) -> jax.Array:
    """A key for each individual, whatever device it is on."""
    return jax.vmap(lambda number: jax.random.fold_in(key, number))(numbers)


@dataclasses.dataclass(frozen=True)
class MetaAgent(Agent):
    """A way to learn an objective.

    Args:
        step: `(world, config, learning, key) -> (Learning, metrics)`.
        init: `(world, config, key) -> Learning`.
    """

    step: Callable[[World, Any, Any, jax.Array], tuple[Any, Metrics]]
    init: Callable[[World, Any, jax.Array], Any] = init
    defaults: Mapping[str, Any] = dataclasses.field(
        default_factory=lambda: {"lpg_learning_rate": 1e-4, "lifetime_conditioning": False}
    )


AGENTS = Agents(
    MetaAgent,
    [MetaAgent(name="lpg", text="meta-gradients through some updates of the agents", step=meta_gradient_step)],
)

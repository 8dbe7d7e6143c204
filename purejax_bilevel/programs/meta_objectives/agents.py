"""The agents of meta-training: how the weights of an objective change in a meta-step.

LPG is here, and `registry.py` names all. Each agent has functions of the individuals of one device:
`init(world, config, key) -> Learning` and `step(world, config, learning, key) -> (Learning, metrics)`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import flax.struct
import jax
import jax.numpy as jnp
import optax

from purejax_bilevel.agents import Agent
from purejax_bilevel.configuration import values_of
from purejax_bilevel.errors import UserError
from purejax_bilevel.program import Measure, Metrics, own_individuals, population_mean
from purejax_bilevel.programs.meta_objectives import network, population
from purejax_bilevel.programs.meta_objectives.network import Weights
from purejax_bilevel.programs.meta_objectives.population import Life, Lived
from purejax_bilevel.programs.meta_objectives.settings import ObjectiveTraining
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


def init(world: World, config: ObjectiveTraining, key: jax.Array) -> Learning:
    """New weights, and room for lives; the key is consumed."""
    weights = network.init(key, weight_shapes(config))
    return Learning(weights, adam(config).init(weights), population.nobody(world, config, key))


def weight_shapes(config: ObjectiveTraining) -> Weights:
    """Shapes of the objective's weights."""
    sizes = (config.lpg_target_width, config.lpg_embedding_net_width, config.lpg_gru_width)
    return network.shapes(*sizes, bool(config.lifetime_conditioning))


def adam(config: ObjectiveTraining) -> optax.GradientTransformation:
    return optax.adam(config.lpg_learning_rate)


def meta_gradient_step(
    world: World, config: ObjectiveTraining, learning: Learning, key: jax.Array
) -> tuple[Learning, Metrics]:
    """New lives for those that are over, then one step of Adam down the meta-gradient; the key is consumed."""
    keys, birth_keys = (each_own(jax.random.fold_in(key, stream), config.num_agents) for stream in (LIVE, BIRTH))
    learning = learning.replace(lives=population.reborn(world, config, birth_keys, learning.lives))
    learning, _, metrics = live_on(world, config, learning, keys)
    return learning, metrics


L = TypeVar("L", bound=Learning)


def live_on(world: World, config: ObjectiveTraining, learning: L, keys: jax.Array) -> tuple[L, Lived, Metrics]:
    """One step of Adam down the meta-gradient through the lives as they are; the keys are consumed."""
    gradient, lives, lived = population.gradient(world, config, learning.weights, learning.lives, keys)
    updates, optimizer = adam(config).update(gradient, learning.optimizer)
    weights = optax.apply_updates(learning.weights, updates)
    one = jnp.ones(())
    means = population_mean((lived.terms, lived.returns, lives.is_over.astype(jnp.result_type(float))))
    terms, (returns, episodes, _), ended = means
    metrics = {name: (value, one) for name, value in terms._asdict().items()}
    metrics |= {
        "training_return": (config.num_agents * returns, config.num_agents * episodes),
        "ended_lives": (config.num_agents * ended, one),
        "meta_gradient_norm": (optax.tree.norm(gradient), one),
    }
    return learning.replace(weights=weights, optimizer=optimizer, lives=lives), lived, metrics


def each_own(key: jax.Array, individuals: int) -> jax.Array:
    """A key for each individual of this device; it does not depend on the device."""
    return jax.vmap(lambda number: jax.random.fold_in(key, number))(own_individuals(individuals))


def no_evaluation(*_: Any) -> dict[str, jax.Array]:
    """Of agents without measures of their own."""
    return {}


def check_lifetimes(config: ObjectiveTraining, world: World) -> None:
    """Refuses lives that are over before a meta-step is.

    Raises:
        UserError: naming the number of updates and the lifetime.
    """
    for given in values_of(config.lifetime):
        shortest = given or world.lifetime[0]
        if config.num_agent_updates > shortest:
            raise UserError(
                f"--num_agent_updates {config.num_agent_updates} is above the shortest lifetime, {shortest} updates; "
                "lower it or raise --lifetime."
            )


META_GRADIENT_SETTINGS = ("num_agents", "num_agent_updates")
MEASURES = (
    Measure("training_return", "return of the episodes finished in training, by agents of all ages", better="higher"),
    Measure("meta_loss", "loss of the objective"),
    Measure("policy_loss", "minus the advantage-weighted log-probabilities of updated agents"),
    Measure("value_loss", "loss of the meta-loss's value critics", better="lower"),
    Measure("policy_entropy", "entropy of updated policies"),
    Measure("target_entropy", "entropy of updated predictions"),
    Measure("policy_l2", "mean square of pi_hat"),
    Measure("target_l2", "mean summed square of y_hat"),
    Measure("divergence", "divergence of predictions from y_hat"),
    Measure("meta_gradient_norm", "norm of the meta-gradient"),
    Measure("ended_lives", "lives that ended, per meta-step"),
)


@dataclasses.dataclass(frozen=True)
class MetaAgent(Agent):
    """A way to learn an objective.

    Args:
        step: `(world, config, learning, key) -> (Learning, metrics)`.
        init: `(world, config, key) -> Learning`.
        population: the field that says how many individuals there are.
        measures: what its steps and `evaluate` give; the first is the most telling one.
        check: `(config, world)`, raises a `UserError` for settings that do not go together.
        evaluate: `(config, learning, is_last) -> {name: array}`, for its own measures.
    """

    step: Callable[[World, Any, Any, jax.Array], tuple[Any, Metrics]]
    init: Callable[[World, Any, jax.Array], Any] = init
    defaults: Mapping[str, Any] = dataclasses.field(
        default_factory=lambda: {"lpg_learning_rate": 1e-4, "lifetime_conditioning": False}
    )
    population: str = "num_agents"
    measures: tuple[Measure, ...] = MEASURES
    check: Callable[[Any, World], None] = check_lifetimes
    evaluate: Callable[[Any, Any, jax.Array], dict[str, jax.Array]] = no_evaluation


LPG = MetaAgent(
    name="lpg",
    text="meta-gradients through some updates of the agents",
    step=meta_gradient_step,
    settings=META_GRADIENT_SETTINGS,
)

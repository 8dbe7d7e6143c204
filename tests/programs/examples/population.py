"""A population of learners in each member, and a learning rate that all share, learned through two of their updates.

Every learner fits its own least-squares problem. The gradient of its loss after two updates with respect to the
learning rate is averaged over the population, wherever its learners are (learning to learn by gradient descent:
Andrychowicz et al. 2016; here the learned optimiser is one number).
"""

import flax.struct
import jax
import jax.numpy as jnp
import optax

from purejax_bilevel.configuration import POSITIVE, at_least, configuration, static, traced
from purejax_bilevel.program import Measure, Program, Stage, own_individuals, population_mean


@configuration
class Config:
    """What may be set; `lr` may differ between members."""

    lr: float = traced(0.05, "rate of the meta-optimiser", POSITIVE)
    learners: int = static(16, "learners in the population", at_least(1))
    num_train_steps: int = static(60, "steps of the meta-optimiser", at_least(1))
    eval_frequency: int = static(20, "steps between evaluations", at_least(0))

    def program(self) -> "MetaRate":
        return MetaRate(self)


class State(flax.struct.PyTreeNode):
    key: jax.Array
    log_rate: jax.Array  # [], shared by all learners
    optimizer: optax.OptState
    weights: jax.Array  # [learners, 8]


class MetaRate(Program):
    headline = "loss"
    step_unit = "meta-steps"
    measures = (
        Measure("loss", "loss of the learners", better="lower"),
        Measure("rate", "learning rate of the learners"),
    )

    def __init__(self, config: Config):
        self.population = config.learners
        self.stages = (Stage(config.num_train_steps, config.eval_frequency, self.update, self.evaluate),)

    def init(self, key: jax.Array, config: Config, shared: tuple) -> State:
        keys = jax.vmap(lambda learner: jax.random.fold_in(key, learner))(own_individuals(self.population))
        log_rate = jnp.log(jnp.float32(1e-3))
        return State(
            key, log_rate, optax.adam(config.lr).init(log_rate), jax.vmap(jax.random.normal, (0, None))(keys, (8,))
        )

    def individuals(self, state: State) -> State:
        return jax.tree.map(lambda leaf: False, state).replace(weights=True)

    def update(self, state: State, config: Config, t: jax.Array, shared: tuple) -> tuple[State, dict]:
        def learn(log_rate: jax.Array, learner: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
            loss = lambda w, i: jnp.mean((problem(state.key, learner, 3 * t + i) @ (w - 1.0)) ** 2)  # noqa: E731
            for i in range(2):
                weights = weights - jnp.exp(log_rate) * jax.grad(loss)(weights, i)
            return loss(weights, 2), weights

        gradient = jax.vmap(jax.value_and_grad(learn, has_aux=True), (None, 0, 0))
        (losses, weights), gradients = gradient(state.log_rate, own_individuals(self.population), state.weights)
        updates, optimizer = optax.adam(config.lr).update(population_mean(gradients), state.optimizer)
        state = state.replace(log_rate=state.log_rate + updates, optimizer=optimizer, weights=weights)
        return state, {"loss": (population_mean(losses), jnp.ones(()))}

    def evaluate(self, state: State, config: Config, t: jax.Array, is_last: jax.Array, shared: tuple) -> dict:
        return {"rate": jnp.exp(state.log_rate)}


def problem(key: jax.Array, learner: jax.Array, t: jax.Array) -> jax.Array:
    """A batch `[4, 8]` of inputs of a learner."""
    return jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, learner), t), (4, 8))

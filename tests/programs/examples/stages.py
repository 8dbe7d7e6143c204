"""A dataset that all members read, an ensemble fitted to it until it gets no better, then a policy in the ensemble."""

import functools

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from purejax_bilevel.configuration import POSITIVE, at_least, configuration, static, traced
from purejax_bilevel.program import Measure, Program, Stage


@configuration
class Config:
    lr: float = traced(0.1, "rate of the ensemble", POSITIVE)
    penalty: float = traced(1.0, "pessimism: weight of the ensemble's disagreement", POSITIVE)
    rows: int = static(1_000_000, "rows of the dataset, 64 bytes each", at_least(200))
    ensemble_steps: int = static(400, "most steps of the ensemble", at_least(1))
    num_train_steps: int = static(100, "steps of the policy", at_least(1))

    def program(self) -> "EnsembleThenPolicy":
        return EnsembleThenPolicy(self)


class State(flax.struct.PyTreeNode):
    key: jax.Array
    networks: jax.Array  # [5, 15], linear models of the reward
    best: jax.Array  # [], lowest error on held-out rows
    since: jax.Array  # [], evaluations since then
    action: jax.Array  # [15], the policy: the same whatever is observed


class EnsembleThenPolicy(Program):
    headline, artefact_kind = "value", "linear ensemble"
    measures = (Measure("held_out", "error on held-out rows", better="lower"), Measure("value", "pessimistic value"))

    def __init__(self, config: Config):
        self.rows = config.rows
        held_out = lambda state, config, t, is_last, shared: {"held_out": error(state.networks, shared[:100])}  # noqa: E731
        value = lambda state, config, *_: {"value": pessimistic(state.networks, state.action, config.penalty)}  # noqa: E731
        fit = Stage(config.ensemble_steps, 20, self.fit, held_out, "ensemble", done=lambda state: state.since >= 3)
        self.stages = (fit, Stage(config.num_train_steps, 20, self.improve, value, "policy"))

    def shared(self) -> np.ndarray:
        return dataset(self.rows)

    def init(self, key: jax.Array, config: Config, shared: jax.Array) -> State:
        networks = jax.random.normal(jax.random.fold_in(key, 0), (5, 15))
        return State(key, networks, jnp.float32(jnp.inf), jnp.int32(0), jnp.zeros(15))

    def artefact(self, state: State) -> jax.Array:
        return state.networks

    def fit(self, state: State, config: Config, t: jax.Array, shared: jax.Array) -> tuple[State, dict]:
        batch = shared[jax.random.randint(jax.random.fold_in(state.key, t + 1), (64,), 100, self.rows)]
        networks = state.networks - config.lr * jax.grad(lambda networks: 5 * error(networks, batch))(state.networks)
        new = jax.lax.cond((t + 1) % 20 == 0, lambda: error(networks, shared[:100]), lambda: state.best)
        since = jnp.where(new < 0.99 * state.best, 0, state.since + ((t + 1) % 20 == 0))
        return state.replace(networks=networks, best=jnp.minimum(new, state.best), since=since), {}

    def improve(self, state: State, config: Config, t: jax.Array, shared: jax.Array) -> tuple[State, dict]:
        action = state.action + 0.05 * jax.grad(pessimistic, 1)(state.networks, state.action, config.penalty)
        return state.replace(action=action / jnp.maximum(1.0, jnp.linalg.norm(action))), {}


@functools.cache
def dataset(rows: int) -> np.ndarray:  # [rows, 16]: 15 numbers and a reward that is linear in them but for noise
    numbers = np.random.default_rng(0).standard_normal((rows, 16), np.float32)
    numbers[:, 15] = numbers[:, :15] @ np.linspace(-1, 1, 15, dtype=np.float32) + 0.1 * numbers[:, 15]
    return numbers


def error(networks: jax.Array, rows: jax.Array) -> jax.Array:
    return jnp.mean((rows[:, :15] @ networks.T - rows[:, 15:]) ** 2)


def pessimistic(networks: jax.Array, action: jax.Array, penalty: jax.Array) -> jax.Array:
    return (networks @ action).mean() - penalty * jnp.sqrt((networks @ action).var() + 1e-6)

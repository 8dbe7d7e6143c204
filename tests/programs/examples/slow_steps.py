"""A program whose single step takes seconds: a long inner solve for each step of the outer variable.

Nothing else is needed for it: the host looks after every step, so that the progress bar moves, Ctrl-C stops after the
step in progress, and a checkpoint is written when one is due. On an accelerator `most_block_steps` keeps a block short.
"""

import flax.struct
import jax
import jax.numpy as jnp

from purejax_bilevel.configuration import POSITIVE, at_least, configuration, static, traced
from purejax_bilevel.program import Measure, Program, Stage


@configuration
class Config:
    lr: float = traced(0.5, "rate of the outer variable", POSITIVE)
    inner_steps: int = static(3000, "gradient steps of the inner problem", at_least(1))
    size: int = static(300, "unknowns of the inner problem", at_least(1))
    num_train_steps: int = static(20, "outer steps", at_least(1))
    eval_frequency: int = static(1, "outer steps between evaluations", at_least(0))

    def program(self) -> "SlowSteps":
        return SlowSteps(self)


class State(flax.struct.PyTreeNode):
    matrix: jax.Array  # [size, size]
    outer: jax.Array  # [], scale of the inner problem's right-hand side
    inner: jax.Array  # [size]


class SlowSteps(Program):
    headline = "distance"
    step_unit = "outer steps"
    measures = (Measure("distance", "distance of the mean inner solution from 1", better="lower"),)

    def __init__(self, config: Config):
        self.config = config
        stage = Stage(config.num_train_steps, config.eval_frequency, self.update, self.evaluate, most_block_steps=1)
        self.stages = (stage,)

    def init(self, key: jax.Array, config: Config, shared: tuple) -> State:
        size = self.config.size
        matrix = jnp.eye(size) + 0.3 * jax.random.normal(key, (size, size)) / jnp.sqrt(size)
        return State(matrix, jnp.zeros(()), jnp.zeros(size))

    def update(self, state: State, config: Config, t: jax.Array, shared: tuple) -> tuple[State, dict]:
        def inner_step(i: jax.Array, inner: jax.Array) -> jax.Array:
            return inner - 0.3 * state.matrix.T @ (state.matrix @ inner - state.outer)

        inner = jax.lax.fori_loop(0, self.config.inner_steps, inner_step, state.inner)
        return state.replace(inner=inner, outer=state.outer - config.lr * (inner.mean() - 1.0)), {}

    def evaluate(self, state: State, config: Config, t: jax.Array, is_last: jax.Array, shared: tuple) -> dict:
        return {"distance": jnp.abs(state.inner.mean() - 1.0)}

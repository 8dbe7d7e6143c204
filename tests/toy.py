"""A toy training program for sweeps: best at one learning rate, worse further away, failing where it is too large."""

from typing import Literal

import flax.struct
import jax
import jax.numpy as jnp

from purejax_bilevel.configuration import POSITIVE, at_least, configuration, replace, static, traced, validate
from purejax_bilevel.program import Measure, Program, Stage

BEST = 1e-2
FAILS_ABOVE = 1.0


@configuration
class Config:
    agent_type: Literal["left", "right"] = static("left", "side")
    num_train_steps: int = static(16, "steps", at_least(1))
    eval_frequency: int = static(2, "steps between rows", at_least(0))
    lr: float | None = traced(None, "learning rate", POSITIVE)
    width: int = traced(2, "width", at_least(1), maximum="max_width")
    noise: float = traced(0.1, "noise", POSITIVE)
    repeats: int = static(1, "terms", at_least(1))
    max_width: int = static(0, "array size", hidden=True)

    @property
    def title(self) -> str:
        return f"{self.agent_type}-toy"

    def resolved(self) -> "Config":
        return validate(replace(self, lr=0.1) if self.lr is None else self)

    def program(self) -> "Toy":
        return Toy(self)


class State(flax.struct.PyTreeNode):
    key: jax.Array
    walk: jax.Array
    cells: jax.Array


class Toy(Program):
    headline = "score"
    measures = (
        Measure("score", "score of the toy", better="higher"),
        Measure("error", "error of the toy", better="lower"),
        Measure("motion", "change of the walk"),
        Measure("final_score", "final score", dims=("episode",), when="end"),
    )

    def __init__(self, config: Config):
        self.stages = (Stage(config.num_train_steps, config.eval_frequency, self.update, self.evaluate),)

    def init(self, key: jax.Array, config: Config, shared: tuple = ()) -> State:
        return State(key, jnp.zeros(()), jnp.zeros(config.max_width))

    def update(self, state: State, config: Config, t: jax.Array, shared: tuple = ()) -> tuple[State, dict]:
        step = config.noise * jax.random.normal(jax.random.fold_in(state.key, t))
        step = jnp.where(config.lr > FAILS_ABOVE, jnp.nan, step)
        return state.replace(walk=0.5 * state.walk + step), {"motion": (step, jnp.ones(()))}

    def evaluate(
        self, state: State, config: Config, t: jax.Array, is_last: jax.Array, shared: tuple = ()
    ) -> dict[str, jax.Array]:
        error = config.repeats * (jnp.log10(config.lr) - jnp.log10(BEST)) ** 2 + state.walk
        error = error + (1.0 if config.agent_type == "right" else 0.0)
        finals = jnp.where(is_last, -error, jnp.nan)[None]
        return {"score": -error, "error": error, "final_score": finals}

    def is_finite(self, state: State) -> jax.Array:
        return jnp.isfinite(state.walk)

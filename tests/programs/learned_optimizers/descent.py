"""An agent for meta-training that takes no time: it descends on a bowl, whose place depends on the key of its life."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from purejax_bilevel.programs.learned_optimizers import ppo
from purejax_bilevel.programs.learned_optimizers.agents import PolicyGradient
from purejax_bilevel.programs.learned_optimizers.settings import PPO


class Episodes(NamedTuple):
    last: jax.Array  # [1]


class State(NamedTuple):
    key: jax.Array
    params: Any
    optimizer: Any
    episodes: Episodes


GOALS = {"actor": 0.01, "critic": -0.01}  # of mean 0, as OPEN's updates are


def loss(params: Any) -> jax.Array:
    return sum(jnp.square(layers["Dense_0"]["bias"] - GOALS[name]).sum() for name, layers in params.items())


def init(key: jax.Array, config: PPO, task: Any, rule: Any) -> State:
    bias = 0.002 * jax.random.normal(jax.random.fold_in(key, 0), (3,))
    params = {name: {"Dense_0": {"bias": bias}} for name in ("actor", "critic")}
    return State(key, params, rule.init(params), Episodes(jnp.zeros(1)))


def iteration(state: State, config: PPO, task: Any, rule: Any, t: jax.Array, horizon: int) -> tuple[State, dict]:
    def step(carry: tuple, number: jax.Array) -> tuple:
        params, optimizer = carry
        clues = ppo.clues_of(number, config, horizon) | {
            "key": jax.random.fold_in(jax.random.fold_in(state.key, 1), number)
        }
        gradients = jax.grad(loss)(params)
        updates, optimizer = rule.update(gradients, optimizer, params, activations=layers(params), **clues)
        return (optax.apply_updates(params, updates), optimizer), None

    steps = config.num_epochs * config.num_minibatches
    (params, optimizer), _ = jax.lax.scan(step, (state.params, state.optimizer), t * steps + jnp.arange(steps))
    return State(state.key, params, optimizer, Episodes(-1e3 * loss(params)[None])), {}


def layers(params: Any) -> Any:
    return {name: {"Dense_0": jnp.ones(3)} for name in params}


DESCENT = PolicyGradient("descent", "gradient descent on a bowl", step=iteration, init=init)

"""The agents of optimal model design on a finite MDP: where the gradient of the model comes from.

The agents are the values of `AGENTS`, at the end of this file. Each has a function
`step(config, state, t) -> (State, loss, gradient)`; the program takes the Adam step along the gradient.
Source: Nikishin et al. 2022, "Control-oriented model-based reinforcement learning with implicit differentiation".
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax

from purejax_bilevel.agents import Agent, Agents
from purejax_bilevel.bilevel import implicit
from purejax_bilevel.environments import finite
from purejax_bilevel.environments.finite import MDP
from purejax_bilevel.programs.tabular.settings import Learning

# Named streams of random numbers; a constant each, so that adding one moves no other. (0 was the initial Q of the
# reference, whose initial models these are; here Q is solved for from zero.)
LOGITS, REWARD, NOISE, MEASURED = 1, 2, 3, 4

Scalar = float | jax.Array


# --- model ------------------------------------------------------------------------------------------------------------


class Model(NamedTuple):
    """The outer variable."""

    logits: jax.Array  # [actions, states, next states]
    reward: jax.Array  # [states, actions]


def imagined(model: Model, true: MDP, temperature: Scalar) -> MDP:
    """The MDP that a model describes: transition softmax(logits / T), its own reward, the true discount and start."""
    return true.replace(transition=jax.nn.softmax(model.logits / temperature, axis=-1), reward=model.reward)


def norm(model: Model, temperature: Scalar) -> jax.Array:
    """|[logits / T, reward]|."""
    return optax.tree.norm(Model(model.logits / temperature, model.reward))


def project(model: Model, temperature: Scalar, bound: Scalar) -> Model:
    """Scales the model back onto the ball of that norm, if it lies outside."""
    size = norm(model, temperature)
    scale = jnp.where(size > bound, bound / jnp.where(size > 0, size, 1.0), 1.0)
    return jax.tree.map(lambda leaf: scale * leaf, model)


# --- outer objectives -------------------------------------------------------------------------------------------------


def outer_loss(config: Learning, true: MDP, q: jax.Array) -> jax.Array:
    """What omd minimises: minus the return of softmax(Q / T), or the mean squared Bellman error of Q."""
    if config.outer_objective == "bellman":
        return jnp.square(finite.bellman(true, q, config.temperature) - q).mean()
    return -finite.expected_return(true, finite.policy(q, config.temperature))


def likelihood_loss(config: Learning, true: MDP, model: Model) -> jax.Array:
    """What mle minimises: squared error of the reward plus KL(true | model), means over states and actions."""
    log_transition = jax.nn.log_softmax(model.logits / config.temperature, axis=-1)
    divergence = jax.scipy.special.xlogy(true.transition, true.transition) - true.transition * log_transition
    return jnp.square(model.reward - true.reward).mean() + divergence.sum(-1).mean()


def hypergradient(
    config: Learning, true: MDP, model: Model, q: jax.Array, solution: jax.Array | None = None
) -> tuple[jax.Array, Model]:
    """Outer loss and its gradient with respect to the model, through the inner solution.

    If Q is inexact (`inner_noise`), so are the outer gradient and both Jacobians: all are taken where Q is. With the
    exact `solution` given too, the Jacobians are taken there.

    Args:
        config: of one member.
        true: where the outer loss is measured.
        model: the outer variable.
        q: what the outer loss sees, `[states, actions]`.
        solution: where the Bellman equation is differentiated, `[states, actions]`; default `q`.
    """
    solution = q if solution is None else solution
    loss, cotangent = jax.value_and_grad(lambda q: outer_loss(config, true, q))(q)

    def exact(_: object, b: jax.Array) -> jax.Array:
        world = imagined(model, true, config.temperature)
        return finite.adjoint_solve(world, finite.policy(solution, config.temperature), b)

    solver = exact if config.with_inv_jac == "exact" else implicit.identity()
    condition = functools.partial(optimality, config, true)
    return loss, implicit.root_hypergradient(condition, model, solution, cotangent, solver)


def optimality(config: Learning, true: MDP, model: Model, q: jax.Array) -> jax.Array:
    """q - B q `[states, actions]` with the model's smooth Bellman operator B: 0 at the inner solution."""
    return q - finite.bellman(imagined(model, true, config.temperature), q, config.temperature)


# --- state ------------------------------------------------------------------------------------------------------------


class State(flax.struct.PyTreeNode):
    """Everything a member carries from step to step."""

    # constant
    key: jax.Array
    true: MDP
    optimal_q: jax.Array  # [states, actions], of the true MDP
    optimal_return: jax.Array  # [], of softmax(optimal_q / T)
    # outer problem
    model: Model
    optimizer: optax.OptState
    # inner problem
    values: jax.Array  # [states], the last solution, from which the next one starts


def init_state(config: Learning, key: jax.Array, true: MDP) -> State:
    """State of a member before its first step; the key becomes the member's own."""
    zero = jnp.zeros(true.reward.shape[0])
    values = finite.optimal_values(true, config.temperature, zero)
    optimal_q = finite.action_values(true, values)
    model = Model(
        jax.random.uniform(jax.random.fold_in(key, LOGITS), true.transition.shape),
        jax.random.uniform(jax.random.fold_in(key, REWARD), true.reward.shape),
    )
    return State(
        key=key,
        true=true,
        optimal_q=optimal_q,
        optimal_return=finite.expected_return(true, finite.policy(optimal_q, config.temperature)),
        model=model,
        optimizer=adam(config).init(model),
        values=zero,
    )


def noise(state: State, config: Learning, stream: int, t: jax.Array) -> jax.Array:
    """Noise on the inner solution of step `t`, `[states, actions]`."""
    key = jax.random.fold_in(jax.random.fold_in(state.key, stream), t)
    return config.inner_noise * jax.random.normal(key, state.optimal_q.shape)


def adam(config: Learning) -> optax.GradientTransformation:
    return optax.adam(config.lr)


# --- agents -----------------------------------------------------------------------------------------------------------


def implicit_step(config: Learning, state: State, t: jax.Array) -> tuple[State, jax.Array, Model]:
    """omd: the model's smooth Bellman equation is solved, then differentiated at its solution."""
    world = imagined(state.model, state.true, config.temperature)
    values = finite.optimal_values(world, config.temperature, state.values)
    state, solution = state.replace(values=values), finite.action_values(world, values)
    q = solution + noise(state, config, NOISE, t)
    jacobians_at = solution if config.notebook_noise else None
    return state, *hypergradient(config, state.true, state.model, q, jacobians_at)


def likelihood_step(config: Learning, state: State, t: jax.Array) -> tuple[State, jax.Array, Model]:
    """mle: the likelihood's gradient; there is no inner problem."""
    del t
    return state, *jax.value_and_grad(lambda model: likelihood_loss(config, state.true, model))(state.model)


@dataclasses.dataclass(frozen=True)
class TabularAgent(Agent):
    """An agent that designs a model of a finite MDP.

    Args:
        step: `(config, state, t) -> (State, loss, gradient of the model)`; `config` is a `program.Config` of one
            member.
        init: `(config, key, true MDP) -> State`; a subclass of `State` may carry more.
    """

    step: Callable[[Any, State, jax.Array], tuple[State, jax.Array, Model]]
    init: Callable[[Any, jax.Array, MDP], State] = init_state


AGENTS = Agents(
    TabularAgent,
    [
        TabularAgent(
            name="omd",
            text="implicit differentiation of the Bellman equation",
            step=implicit_step,
            settings=("outer_objective", "with_inv_jac", "inner_noise", "notebook_noise"),
        ),
        TabularAgent(name="mle", text="likelihood of the true MDP's transitions and rewards", step=likelihood_step),
    ],
)

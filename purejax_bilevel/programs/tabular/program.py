"""Optimal model design on a finite MDP, with the inner problem solved and differentiated exactly.

Outline of a run (every line inside one compiled loop, in float64):

    for t in 0 .. num_train_steps - 1:
        solve the model's smooth Bellman equation for Q (omd)
        gradient of the outer objective with respect to the model: implicit (omd) or of a likelihood (mle)
        one Adam step on the model, then back onto the ball |[logits / T, reward]| <= norm_bound
        every eval_frequency steps: return of the model's optimal policy in the true MDP, errors and their bounds

The bound on the norm misspecifies the model: under a small one no model is right everywhere, and the objective decides
where it errs (Nikishin et al. 2022, "Control-oriented model-based reinforcement learning with implicit
differentiation", section 4).
"""

import math
from typing import ClassVar, Literal, NamedTuple, Self

import flax.struct
import jax
import jax.numpy as jnp
import optax

from purejax_bilevel.bilevel import implicit
from purejax_bilevel.configuration import (
    NONNEGATIVE,
    POSITIVE,
    Check,
    at_least,
    configuration,
    replace,
    static,
    traced,
    validate,
    values_of,
)
from purejax_bilevel.environments import finite
from purejax_bilevel.environments.finite import MDP
from purejax_bilevel.errors import UserError
from purejax_bilevel.program import Measure, Metrics, Program, Stage, Tree

# Named streams of random numbers; a constant each, so that adding one moves no other. (0 was the initial Q of the
# reference, whose initial models these are; here Q is solved for from zero.)
LOGITS, REWARD, NOISE, MEASURED = 1, 2, 3, 4

Scalar = float | jax.Array
DISCOUNT = Check("a number from 0 to below 1", lambda x: 0 <= x < 1)
BOUND = Check("a number, 0 or above (inf: no bound)", lambda x: x >= 0)


@configuration
class Config:
    """Settings of one training program; a traced field may hold several values, one per point of a grid."""

    float64: ClassVar[bool] = True
    vectorized: ClassVar[bool] = True

    # what runs
    agent_type: Literal["omd", "mle"] = static("omd", "who trains the model", group="agent")
    env_name: Literal["tabular"] = static("tabular", "a finite MDP, see below", group="environment")
    num_train_steps: int = static(10_000, "outer steps of each member", at_least(1), "schedule")
    eval_frequency: int = static(500, "outer steps between evaluations (0: only at the end)", at_least(0), "schedule")
    # the true MDP
    mdp: Literal["two_state", "garnet", "file"] = static(
        "two_state", "the paper's MDP, random ones, or (implied by --mdp_file) your own", group="environment", task=True
    )
    mdp_file: str = static(
        "",
        "numpy archive with P [actions, states, states], R [states, actions], gamma and start [states]",
        group="environment",
        task=True,
    )
    garnet_seed: int = traced(0, "garnet: which random MDP", at_least(0), "environment")
    num_states: int = static(10, "garnet: number of states", at_least(1), "environment")
    num_actions: int = static(3, "garnet: number of actions", at_least(1), "environment")
    branching: int = static(3, "garnet: states reachable in one step", at_least(1), "environment")
    discount: float | None = traced(None, "discount factor (default: the file's, else 0.9)", DISCOUNT, "environment")
    # outer problem
    outer_objective: Literal["return", "bellman"] = static(
        "return", "omd: return of the policy, or squared Bellman error, in the true MDP", group="outer problem"
    )
    lr: float = traced(0.01, "Adam rate of the model", POSITIVE, "outer problem")
    norm_bound: float = traced(math.inf, "largest norm of the model's [logits / T, reward]", BOUND, "outer problem")
    # hypergradient
    with_inv_jac: Literal["exact", "identity"] = static(
        "exact", "omd: inverse Jacobian of the Bellman equation, exact or taken for the identity", group="hypergradient"
    )
    # inner problem
    temperature: float = traced(0.01, "T of the smooth maximum, the policy and the model", POSITIVE, "inner problem")
    inner_noise: float = traced(
        0.0, "omd: standard deviation of noise added to each inner solution", NONNEGATIVE, "inner problem"
    )
    notebook_noise: bool = static(
        False,
        "omd: noise as in the original notebook, exact Jacobians and a noisy Q in evaluations (default: the reverse)",
        group="inner problem",
    )

    def program(self) -> "Tabular":
        """The training program of this (resolved) configuration."""
        return Tabular(self)

    @property
    def title(self) -> str:
        """Short name of the experiment."""
        return f"{self.agent_type}-tabular-{self.mdp.replace('_', '-')}"

    def resolved(self) -> Self:
        """Fills in the discount factor and checks everything.

        Raises:
            UserError: for a value that is not allowed, or two that do not go together.
        """
        config = replace(self, mdp="file") if self.mdp_file and self.mdp == "two_state" else self
        if config.discount is None:
            config = replace(config, discount=float(_fixed_mdp(config).discount) if config.mdp != "garnet" else 0.9)
        validate(config)
        _check_together(config)
        return config


def _check_together(config: Config) -> None:
    if config.mdp_file and config.mdp != "file":
        raise UserError(f"--mdp_file {config.mdp_file} does not go with --mdp {config.mdp}.")
    if config.mdp != "garnet" and values_of(config.garnet_seed) != (0,):
        raise UserError("--garnet_seed needs --mdp garnet: the MDP is a given one otherwise.")
    if config.notebook_noise and config.agent_type != "omd":
        raise UserError(
            f"--notebook_noise is for --agent_type omd, not {config.agent_type}: it solves no inner problem."
        )
    if config.branching > config.num_states:
        raise UserError(f"--branching {config.branching} is larger than --num_states {config.num_states}.")
    if config.mdp != "garnet":
        _fixed_mdp(config)


def _fixed_mdp(config: Config) -> MDP:
    if config.mdp == "file" and not config.mdp_file:
        raise UserError("--mdp file needs --mdp_file.")
    return finite.load(config.mdp_file) if config.mdp == "file" else finite.two_state()


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


def outer_loss(config: Config, true: MDP, q: jax.Array) -> jax.Array:
    """What omd minimises: minus the return of softmax(Q / T), or the mean squared Bellman error of Q."""
    if config.outer_objective == "bellman":
        return jnp.square(finite.bellman(true, q, config.temperature) - q).mean()
    return -finite.expected_return(true, finite.policy(q, config.temperature))


def likelihood_loss(config: Config, true: MDP, model: Model) -> jax.Array:
    """What mle minimises: squared error of the reward plus KL(true | model), means over states and actions."""
    log_transition = jax.nn.log_softmax(model.logits / config.temperature, axis=-1)
    divergence = jax.scipy.special.xlogy(true.transition, true.transition) - true.transition * log_transition
    return jnp.square(model.reward - true.reward).mean() + divergence.sum(-1).mean()


def hypergradient(
    config: Config, true: MDP, model: Model, q: jax.Array, solution: jax.Array | None = None
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

    def optimality(model: Model, q: jax.Array) -> jax.Array:
        return q - finite.bellman(imagined(model, true, config.temperature), q, config.temperature)

    def exact(_: object, b: jax.Array) -> jax.Array:
        world = imagined(model, true, config.temperature)
        return finite.adjoint_solve(world, finite.policy(solution, config.temperature), b)

    solver = exact if config.with_inv_jac == "exact" else implicit.identity()
    return loss, implicit.root_hypergradient(optimality, model, solution, cotangent, solver)


# --- program ----------------------------------------------------------------------------------------------------------


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


class Tabular(Program):
    """The program: three pure functions of a member's configuration, sharing the MDP unless it is random.

    Args:
        config: resolved configuration; only its static fields matter here.
    """

    headline = "evaluation_return"
    step_unit = "outer steps"
    measures = (
        Measure("evaluation_return", "return of the model's optimal policy", better="higher"),
        Measure("optimality_gap", "return of softmax(Q* / T) minus that of the model's optimal policy", better="lower"),
        Measure("q_error", "largest error of the model's optimal Q", better="lower"),
        Measure("omd_bound", "bound on that error by the model's Bellman error", better="lower"),
        Measure("mle_bound", "bound on that error by the model's prediction errors", better="lower"),
        Measure("bellman_error", "mean squared Bellman error of the model's optimal Q", better="lower"),
        Measure("likelihood_loss", "squared error of the reward plus KL divergence of the transition", better="lower"),
        Measure("model_norm", "norm of the model's [logits / T, reward]"),
        Measure("outer_loss", "outer loss"),
        Measure("model_gradient_norm", "norm of the model's gradient"),
    )

    def __init__(self, config: Config):
        self.stages = (Stage(config.num_train_steps, config.eval_frequency, self.update, self.evaluate),)
        self._fixed = None if config.mdp == "garnet" else _fixed_mdp(config)

    def init(self, key: jax.Array, config: Config, shared: Tree = ()) -> State:
        """State of a member before its first step; the key becomes the member's own."""
        true = self._true_mdp(config)
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
            optimizer=_adam(config).init(model),
            values=zero,
        )

    def _true_mdp(self, config: Config) -> MDP:
        assert config.discount is not None, "resolved"
        if self._fixed is None:
            sizes = (config.num_states, config.num_actions, config.branching)
            return finite.garnet(jax.random.key(config.garnet_seed), *sizes, config.discount)
        fixed = jax.tree.map(lambda array: jnp.asarray(array, float), self._fixed)
        return fixed.replace(discount=config.discount)

    def update(self, state: State, config: Config, t: jax.Array, shared: Tree = ()) -> tuple[State, Metrics]:
        """One outer step.

        Args:
            state: of one member.
            config: of that member.
            t: number of the step, shared by all members.
        """
        if config.agent_type == "mle":
            loss, gradient = jax.value_and_grad(lambda model: likelihood_loss(config, state.true, model))(state.model)
        else:
            state, solution = self._solve_inner(state, config)
            q = solution + _noise(state, config, NOISE, t)
            loss, gradient = hypergradient(
                config, state.true, state.model, q, solution if config.notebook_noise else None
            )
        updates, optimizer = _adam(config).update(gradient, state.optimizer)
        model = project(optax.apply_updates(state.model, updates), config.temperature, config.norm_bound)
        one = jnp.ones(())
        metrics = {"outer_loss": (loss, one), "model_gradient_norm": (optax.tree.norm(gradient), one)}
        return state.replace(model=model, optimizer=optimizer), metrics

    def _solve_inner(self, state: State, config: Config) -> tuple[State, jax.Array]:
        world = imagined(state.model, state.true, config.temperature)
        values = finite.optimal_values(world, config.temperature, state.values)
        return state.replace(values=values), finite.action_values(world, values)

    def evaluate(
        self, state: State, config: Config, t: jax.Array, is_last: jax.Array, shared: Tree = ()
    ) -> dict[str, jax.Array]:
        """Measures the model by its exact (noiseless) optimal Q, in the true MDP.

        With `notebook_noise` the returns and `bellman_error` are those of a noisy Q, as the original notebook plots
        them; errors and bounds stay those of the exact one.

        `omd_bound` is max |B Q - Q| / (1 - discount) with the true Bellman operator B; `mle_bound` is
        e_r / (1 - discount) + discount * e_p * (r_max - r_min) / (2 (1 - discount)^2) with the largest error e_r of the
        reward, the largest L1 error e_p of a transition row and the range of the true rewards: optimal values differ by
        at most (r_max - r_min) / (1 - discount), at any temperature. Both bound `q_error` = max |Q* - Q| (Nikishin et
        al. 2022, section 4, where rewards are not negative and r_max stands for the range; Agarwal et al. 2021,
        simulation lemma).
        """
        true, temperature = state.true, config.temperature
        world = imagined(state.model, true, temperature)
        q = finite.action_values(world, finite.optimal_values(world, temperature, state.values))
        measured = q + _noise(state, config, MEASURED, t) if config.notebook_noise else q
        achieved = finite.expected_return(true, finite.policy(measured, temperature))
        residual = finite.bellman(true, q, temperature) - q
        measured_residual = finite.bellman(true, measured, temperature) - measured
        horizon = 1 / (1 - true.discount)
        reward_error = jnp.abs(world.reward - true.reward).max()
        transition_error = jnp.abs(world.transition - true.transition).sum(-1).max()
        spread = true.discount * transition_error * jnp.ptp(true.reward) / 2
        return {
            "evaluation_return": achieved,
            "optimality_gap": state.optimal_return - achieved,
            "q_error": jnp.abs(state.optimal_q - q).max(),
            "omd_bound": jnp.abs(residual).max() * horizon,
            "mle_bound": reward_error * horizon + spread * horizon**2,
            "bellman_error": jnp.square(measured_residual).mean(),
            "likelihood_loss": likelihood_loss(config, true, state.model),
            "model_norm": norm(state.model, temperature),
        }

    def is_finite(self, state: State) -> jax.Array:
        """Whether all learned parameters of a member are finite numbers."""
        return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves((state.model, state.values))]).all()


def _noise(state: State, config: Config, stream: int, t: jax.Array) -> jax.Array:
    """Noise on the inner solution of step `t`, `[states, actions]`."""
    key = jax.random.fold_in(jax.random.fold_in(state.key, stream), t)
    return config.inner_noise * jax.random.normal(key, state.optimal_q.shape)


def _adam(config: Config) -> optax.GradientTransformation:
    return optax.adam(config.lr)

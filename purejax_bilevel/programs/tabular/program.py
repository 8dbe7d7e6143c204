"""Optimal model design on a finite MDP, with the inner problem solved and differentiated exactly.

Outline of a run (every line inside one compiled loop, in float64):

    for t in 0 .. num_train_steps - 1:
        solve the model's smooth Bellman equation for Q (omd)
        gradient of the outer objective with respect to the model (agents.py): implicit (omd) or of a likelihood (mle)
        one Adam step on the model, then back onto the ball |[logits / T, reward]| <= norm_bound
        every eval_frequency steps: return of the model's optimal policy in the true MDP, errors and their bounds

The bound on the norm misspecifies the model: under a small one no model is right everywhere, and the objective decides
where it errs (Nikishin et al. 2022, "Control-oriented model-based reinforcement learning with implicit
differentiation", section 4).
"""

from typing import ClassVar, Self

import jax
import jax.numpy as jnp
import optax

from purejax_bilevel.configuration import changed, configuration, replace, validate, values_of
from purejax_bilevel.environments import finite
from purejax_bilevel.environments.finite import MDP
from purejax_bilevel.errors import UserError
from purejax_bilevel.program import Measure, Metrics, Program, Stage, Tree
from purejax_bilevel.programs.tabular.agents import (
    AGENTS,
    MEASURED,
    State,
    adam,
    imagined,
    likelihood_loss,
    noise,
    norm,
    project,
)
from purejax_bilevel.programs.tabular.settings import Learning, Task


@configuration
class Config(Learning, Task):
    """Settings of one training program; a traced field may hold several values, one per point of a grid."""

    float64: ClassVar[bool] = True
    vectorized: ClassVar[bool] = True

    agent_type: str = changed(Task, "agent_type", "omd", choices=AGENTS)

    def program(self) -> "Tabular":
        """The training program of this (resolved) configuration."""
        return Tabular(self)

    @property
    def title(self) -> str:
        """Short name of the experiment."""
        return f"{AGENTS[self.agent_type].name}-tabular-{self.mdp.replace('_', '-')}"

    def resolved(self) -> Self:
        """Fills in the discount factor and checks everything.

        Raises:
            UserError: for a value that is not allowed, or two that do not go together.
        """
        config = AGENTS.tuned(self)
        config = replace(config, mdp="file") if config.mdp_file and config.mdp == "two_state" else config
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
    AGENTS.check_settings(config)
    if config.branching > config.num_states:
        raise UserError(f"--branching {config.branching} is larger than --num_states {config.num_states}.")
    if config.mdp != "garnet":
        _fixed_mdp(config)


def _fixed_mdp(config: Config) -> MDP:
    if config.mdp == "file" and not config.mdp_file:
        raise UserError("--mdp file needs --mdp_file.")
    return finite.load(config.mdp_file) if config.mdp == "file" else finite.two_state()


class Tabular(Program[Config]):
    """The program: three pure functions of a member's configuration, sharing the MDP unless it is random.

    Args:
        config: resolved configuration; only its static fields matter here.
    """

    headline = "evaluation_return"
    step_unit = "outer steps"
    figures = "purejax_bilevel.programs.tabular.figures"
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
        self.agent = AGENTS[config.agent_type]
        self._fixed = None if config.mdp == "garnet" else _fixed_mdp(config)

    def init(self, key: jax.Array, config: Config, shared: Tree = ()) -> State:
        """State of a member before its first step; the key becomes the member's own."""
        return self.agent.init(config, key, self._true_mdp(config))

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
        state, loss, gradient = self.agent.step(config, state, t)
        updates, optimizer = adam(config).update(gradient, state.optimizer)
        model = project(optax.apply_updates(state.model, updates), config.temperature, config.norm_bound)
        one = jnp.ones(())
        metrics = {"outer_loss": (loss, one), "model_gradient_norm": (optax.tree.norm(gradient), one)}
        return state.replace(model=model, optimizer=optimizer), metrics

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
        measured = q + noise(state, config, MEASURED, t) if config.notebook_noise else q
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

"""What programs that learn a policy have in common, from a dataset alone (`program`) or in the environment (`online`):
checks of their settings, rollouts in an ensemble, evaluation, and the policy that they leave.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from purejax_bilevel import environments
from purejax_bilevel.configuration import fields, values_of
from purejax_bilevel.errors import UserError
from purejax_bilevel.program import Measure, Metrics, Program, Tree
from purejax_bilevel.programs.control import rollouts
from purejax_bilevel.programs.offline import fitting, imagination, saved_policies
from purejax_bilevel.programs.offline.agents import Learner, OfflineAgent
from purejax_bilevel.programs.offline.buffers import Ring
from purejax_bilevel.programs.offline.ensemble_program import KIND
from purejax_bilevel.programs.offline.imagination import Pessimism, Rollouts, World
from purejax_bilevel.programs.offline.modes import mode_named
from purejax_bilevel.programs.offline.pessimism import coefficients
from purejax_bilevel.programs.offline.saved_policies import SavedPolicy
from purejax_bilevel.programs.offline.settings import Offline
from purejax_bilevel.programs.offline.uncertainty import ALEATORIC

ENSEMBLE_FOLDER = "ensemble"  # in the folder of a run that fits one beside its policy

# Named streams of random numbers; a constant each, so that adding one moves no other.
INIT, ENSEMBLE, RESAMPLE, EPOCH, STEP, EVALUATE, VIDEO = range(7)  # of a member
STARTS, ROLLOUT, LEARN = range(3)  # of a step
EPISODES, FIRST, IMAGINED = range(3)  # of an evaluation

IMAGINED_MEASURES = (
    Measure("predicted_return", "return that the ensemble predicts"),
    Measure("return_gap", "predicted minus true return"),
    Measure("uncertainty", "uncertainty of imagined transitions"),
    Measure("rollout_steps", "steps into a rollout"),
)
FITTED_MEASURES = (
    Measure("validation_error", "mean squared error of the ensemble on held-out rows", better="lower"),
    Measure("model_loss", "loss of the ensemble"),
)
VALUE_MEASURES = (
    Measure("value", "value of first observations, by the critics"),
    Measure("value_gap", "value minus true discounted return"),
    Measure("discounted_return", "discounted return of evaluation episodes", better="higher"),
)
LEARNING_MEASURES = (
    Measure("q_loss", "loss of the critics"),
    Measure("policy_loss", "loss of the policy"),
    Measure("temperature", "temperature"),
    Measure("entropy", "entropy of the policy"),
    Measure("q_gradient_norm", "norm of the critics' gradient"),
    Measure("policy_gradient_norm", "norm of the policy's gradient"),
    Measure("final_return", "return of the last evaluation", better="higher", dims=("episode",), when="end"),
)
EVALUATION_RETURN = Measure("evaluation_return", "return of evaluation episodes", better="higher")


# --- settings ---------------------------------------------------------------------------------------------------------


def check_imagination(config: Offline) -> None:
    """Refuses settings of ensemble and rollouts that do not go together.

    Raises:
        UserError: naming the two.
    """
    if max(values_of(config.num_elites)) > config.model_networks:
        raise UserError(
            f"--num_elites {max(values_of(config.num_elites))} is more than the ensemble has: "
            f"--model_networks {config.model_networks}."
        )
    if config.capacity < config.num_rollouts:
        raise UserError(f"--capacity {config.capacity} is smaller than --num_rollouts {config.num_rollouts}.")
    kind = imagination.kind_of(str(config.mode), config.uncertainty)
    if kind in ALEATORIC and config.model_type == "deterministic":
        raise UserError(
            f"--mode {config.mode} looks at variances ({kind}), which --model_type deterministic does not learn."
        )


def check_pessimism(config: Offline, defaults: Mapping[str, Any]) -> None:
    """A coefficient that changes nothing would be mistaken for an experiment.

    Args:
        config: resolved.
        defaults: of its agent.

    Raises:
        UserError: naming it.
    """
    mode = mode_named(str(config.mode))
    for name, is_used in (("pessimism", mode.has_pessimism), ("ood_threshold", mode.has_threshold)):
        if not is_used and values_of(getattr(config, name)) != (defaults[name],):
            given = " ".join(map(str, values_of(getattr(config, name))))
            raise UserError(f"--{name} {given} changes nothing with --mode {config.mode}.")


# --- programs ---------------------------------------------------------------------------------------------------------


def imagine(
    world: World,
    pessimism: Pessimism,
    learner: Learner,
    moving: Rollouts,
    ring: Ring,
    starts: jax.Array,
    key: jax.Array,
    length: jax.Array | int,
) -> tuple[Rollouts, Ring, Metrics]:
    """One step of all rollouts of a learner's policy.

    Args:
        world: where they go.
        pessimism: how transitions are stored.
        learner: whose policy acts.
        moving: where they are.
        ring: takes their transitions.
        starts: observations `[rollouts, obs]` for those that begin.
        key: consumed.
        length: steps of a rollout at most; may be traced.
    """
    policy = sampled_action(learner, world.architecture.action_dim)
    moving, ring, doubt = imagination.advance(world, policy, pessimism, moving, ring, starts, key, length)
    count = jnp.asarray(starts.shape[0], doubt.dtype)
    metrics = {"uncertainty": (doubt.sum(), count), "rollout_steps": (moving.length.sum().astype(doubt.dtype), count)}
    return moving, ring, metrics


def pessimism_of(
    config: Offline, largest_reward: jax.Array | float, largest: jax.Array, halt: jax.Array | float
) -> Pessimism:
    """Settings of pessimism in absolute numbers.

    Args:
        config: of one member, resolved.
        largest_reward: r_max, by size.
        largest: u_max.
        halt: minus the reward of a halted rollout.
    """
    mode, weight, threshold = config.mode, config.pessimism, config.ood_threshold
    assert mode is not None
    assert weight is not None
    assert threshold is not None
    if config.units == "relative":
        own = coefficients(weight, threshold, largest_reward, largest)
    else:
        own = (weight, threshold)
    return Pessimism(mode, imagination.kind_of(mode, config.uncertainty), *own, halt)


def sampled_action(learner: Learner, action_dim: int) -> imagination.Policy:
    """The policy with its noise, for actions of so many numbers."""

    def act(obs: jax.Array, key: jax.Array) -> jax.Array:
        noise = jax.random.normal(key, (action_dim, obs.shape[0]), obs.dtype)
        return learner.sample(learner.policy, obs.T, noise)[0].T

    return act


class PolicyProgram(Program):
    """A program whose state has a `key` and a `learner`, and that leaves its policy.

    Args:
        config: resolved configuration; only its static fields matter here.
    """

    headline = "evaluation_return"
    artefact_kind = saved_policies.KIND
    task: environments.Continuous
    agent: OfflineAgent
    fits: bool  # whether its state has a `fit`, an ensemble of its own

    def __init__(self, config: Offline):
        self.settings = {field.name: getattr(config, field.name) for field in fields(config, is_traced=False)}

    def measured(self, state: Any, config: Offline, key: jax.Array, is_last: jax.Array, world: World | None) -> dict:
        """True returns of the policy's mean action, and what critics and ensemble expect.

        Args:
            state: of one member.
            config: of that member.
            key: consumed.
            is_last: whether this is the last evaluation.
            world: the ensemble; None: there is none.
        """
        episodes = (config.eval_episodes, config.final_eval_episodes)
        discount = config.discount if self.agent.has_values else None
        found = rollouts.evaluate(
            *self._rollout(state), jax.random.fold_in(key, EPISODES), *episodes, is_last, discount
        )
        first = self._first_observations(config, key)
        if self.agent.has_values:
            value = state.learner.value(first.T).mean()
            found |= {"value": value, "value_gap": value - found["discounted_return"]}
        if world is not None:
            predicted = self._predicted_return(state.learner, world, key, first)
            found |= {"predicted_return": predicted, "return_gap": predicted - found["evaluation_return"]}
        return found

    def _first_observations(self, config: Offline, key: jax.Array) -> jax.Array:
        """Of new episodes, `[eval_episodes, obs]`."""
        keys = jax.random.split(jax.random.fold_in(key, FIRST), config.eval_episodes)
        obs, _ = jax.vmap(self.task.environment.reset, (0, None))(keys, self.task.params)
        return obs.astype(jnp.result_type(float))

    def _predicted_return(self, learner: Learner, world: World, key: jax.Array, first: jax.Array) -> jax.Array:
        act = lambda obs, key: learner.mean_action(learner.policy, obs.T).T  # noqa: E731
        key = jax.random.fold_in(key, IMAGINED)
        return imagination.expected_return(world, act, first, key, self.task.max_steps)

    def episode(self, state: Any, config: Offline, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        """One episode of the policy's mean action, for a video.

        Returns:
            Observations `[max_steps, obs]` and whether the episode was still going on `[max_steps]`.
        """
        del config
        return rollouts.episode(*self._rollout(state), jax.random.fold_in(jax.random.fold_in(state.key, VIDEO), t))

    def _rollout(self, state: Any) -> tuple[Any, Any, int, rollouts.Policy]:
        def policy(obs: jax.Array, key: jax.Array) -> jax.Array:
            del key
            return state.learner.mean_action(state.learner.policy, obs).T

        return self.task.environment, self.task.params, self.task.max_steps, policy

    def is_finite(self, state: Any) -> jax.Array:
        """Whether all learned parameters of a member are finite numbers."""
        learner = state.learner
        leaves = jax.tree.leaves((learner.q, learner.policy, learner.log_temperature))
        return jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves]).all()

    # --- what it leaves -----------------------------------------------------------------------------------------------

    def artefact(self, state: Any) -> SavedPolicy:
        """Policy, critics, temperature and units."""
        return saved_policies.saved(state.learner)

    def write(self, states: Tree, members: Sequence[dict[str, Any]], folder: Path) -> None:
        """The ensemble, where each member has fitted its own, as an artefact in a folder beside the policy's."""
        if self.fits:
            from purejax_bilevel.runtime import artefacts

            models = jax.vmap(fitting.fitted)(states.fit)
            artefacts.save(folder / ENSEMBLE_FOLDER, KIND, models, list(members), self.settings)

"""What the programs of control share: a policy acts, transitions are stored, an agent learns from them step by step."""

from typing import Any, TypeVar

import flax.struct
import jax
import jax.numpy as jnp

from purejax_bilevel import environments, replay
from purejax_bilevel.program import Measure, Metrics, Program, Stage, Tree
from purejax_bilevel.programs.control import rollouts
from purejax_bilevel.programs.control.settings import Evaluation

# Named streams of random numbers; a constant each, so that adding one moves no other.
INIT, STEP, EVALUATE, VIDEO = range(4)  # of a member
ACT, ENVIRONMENT, LEARN = range(3)  # of a step

C = TypeVar("C", bound=Evaluation)
S = TypeVar("S", bound=Any)  # a state with more than, or other learners than, `State`


class State(flax.struct.PyTreeNode):
    """Everything a member carries from step to step."""

    # constant
    key: jax.Array
    # acting; where there are several copies of the environment, one of each for every copy
    obs: jax.Array
    environment: Any
    episode_return: jax.Array
    # data
    storage: jax.Array
    # learning
    learner: Any  # an `agents.Learner`; that of continuous actions has more


def arrived(
    state: S, storage: jax.Array, obs: jax.Array, environment: Any, reward: jax.Array, ended: jax.Array
) -> tuple[S, jax.Array, jax.Array]:
    """A state after a step of its environment, or of all copies of it, with what came of the step.

    Returns:
        The state, whether an episode ended (0 or 1), and the return of the episode up to this step.
    """
    dtype = state.obs.dtype
    done = ended.astype(dtype)
    episode_return = state.episode_return + reward
    state = state.replace(
        obs=obs.astype(dtype),
        environment=environment,
        storage=storage,
        episode_return=(1.0 - done) * episode_return,
    )
    return state, done, episode_return


def step_copies(
    task: environments.Continuous, state: S, action: jax.Array, key: jax.Array, number: jax.Array
) -> tuple[S, Metrics]:
    """One step of every copy of an environment, into the buffer.

    Args:
        task: the environment.
        state: of one member, with what `State` has of acting and data.
        action: `[copies, action]`.
        key: consumed.
        number: which block of the buffer is written.
    """
    step = jax.vmap(task.environment.step, (0, 0, 0, None))
    keys = jax.random.split(key, action.shape[0])
    obs, environment, reward, terminated, truncated, info = step(keys, state.environment, action, task.params)
    next_obs = info["final_observation"].astype(state.obs.dtype)
    storage = replay.add_block(state.storage, number, state.obs, action, reward, next_obs, terminated)
    state, done, episode_return = arrived(state, storage, obs, environment, reward, terminated | truncated)
    return state, {"training_return": (jnp.vdot(done, episode_return), done.sum())}


class Acting(Program[C]):
    """A program of one stage in which a policy acts; subclasses say how it does and what is learned from it.

    Args:
        config: resolved configuration; only its static fields matter here.
    """

    headline = "evaluation_return"
    step_unit = "environment steps"
    measures: tuple[Measure, ...] = (
        Measure("evaluation_return", "return of evaluation episodes", better="higher"),
        Measure("training_return", "return of the episodes finished in training", better="higher"),
        Measure("model_loss", "outer loss"),
        Measure("q_loss", "inner loss"),
        Measure("model_gradient_norm", "norm of the model's gradient"),
        Measure("q_gradient_norm", "norm of the inner gradient"),
        Measure("model_error", "mean squared error of the predicted next observation"),
        Measure("solver_residual", "relative residual of the linear solver"),
        Measure("final_return", "return of the last evaluation", better="higher", dims=("episode",), when="end"),
    )

    def __init__(self, config: C):
        self.stages = (
            Stage(
                config.num_train_steps,
                config.eval_frequency,
                self.update,
                self.evaluate,
                warm_up=config.init_steps,
                collect=self.collect,
            ),
        )

    def update(self, state: State, config: C, t: jax.Array, shared: Tree = ()) -> tuple[State, Metrics]:
        """One step of the environment, and what is learned then.

        Args:
            state: of one member.
            config: of that member.
            t: number of the step, shared by all members, so that buffer writes stay cheap under vmap.
            shared: nothing.
        """
        raise NotImplementedError

    def collect(self, state: State, config: C, t: jax.Array, shared: Tree = ()) -> tuple[State, Metrics]:
        """One step of the environment with uniform actions; arguments as for `update`."""
        return self._interact(state, config, t, self._key(state, t))

    def _interact(self, state: State, config: C, t: jax.Array, key: jax.Array) -> tuple[State, Metrics]:
        raise NotImplementedError

    def _key(self, state: State, t: jax.Array) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(state.key, STEP), t)

    def evaluate(
        self, state: State, config: C, t: jax.Array, is_last: jax.Array, shared: Tree = ()
    ) -> dict[str, jax.Array]:
        """Plays episodes with the policy of step `t`, without exploration, in the environment as it is at that step.

        Returns:
            `evaluation_return` (mean), `final_return` `[episodes]` (NaN for those not played before the last
            evaluation).
        """
        key = jax.random.fold_in(jax.random.fold_in(state.key, EVALUATE), t)
        episodes = (config.eval_episodes, config.final_eval_episodes)
        return rollouts.evaluate(*self._rollout(state, config, t), key, *episodes, is_last)

    def episode(self, state: State, config: C, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        """One episode of the policy of step `t`, for a video.

        Returns:
            Observations `[max_steps, obs]` and whether the episode was still going on `[max_steps]`.
        """
        key = jax.random.fold_in(jax.random.fold_in(state.key, VIDEO), t)
        return rollouts.episode(*self._rollout(state, config, t), key)

    def _rollout(self, state: State, config: C, t: jax.Array) -> tuple[Any, Any, int, rollouts.Policy]:
        """Environment, its parameters, the most steps of an episode and the policy."""
        raise NotImplementedError

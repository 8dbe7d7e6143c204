"""Where the agents of a population live: a distribution of Grid-World levels, one level, or one gymnax environment.

Each agent has copies of one environment, its workers. In a Grid-World, observations are `Places`, so that nothing is as
long as the one-hot vectors.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import flax.struct
import jax
import jax.numpy as jnp

from purejax_bilevel import environments
from purejax_bilevel.configuration import replace
from purejax_bilevel.environments import grid_world
from purejax_bilevel.environments._gymnax import Environment, gymnax
from purejax_bilevel.environments.grid_world import MODES, GridWorld, optimal_return
from purejax_bilevel.errors import UserError
from purejax_bilevel.programs.meta_objectives.learners import Build, Network, Observations, Rollout, probabilities
from purejax_bilevel.programs.meta_objectives.settings import Updates

C = TypeVar("C", bound=Updates)

MINATAR = "-MinAtar"
RATES = {"sgd": (40.0, 4.0), "grid": (1e-3, 1e-3), "adam": (5e-4, 5e-4)}
CLASSIC_LIFETIME, MINATAR_LIFETIME = (1000, 1000), (100_000, 100_000)


@dataclasses.dataclass(frozen=True)
class World:
    """An environment, or a distribution of them, and the agents that suit it.

    Args:
        environment: speaks the gymnax interface.
        params: its parameters; None: every agent draws a level.
        mode: of a Grid-World, else "".
        build: of the agents.
        rates: learning rates of actors and of critics.
        lifetime: bounds of the updates that an agent lives.
        horizon: no episode takes more steps.
    """

    environment: Environment
    params: Any
    mode: str
    build: Build
    rates: tuple[float, float]
    lifetime: tuple[int, int]
    horizon: int

    @property
    def is_tabular(self) -> bool:
        """Whether best returns are known: of Grid-Worlds in tabular modes."""
        return isinstance(self.environment, GridWorld) and self.environment.mode.tabular

    def optimum(self, params: Any) -> jax.Array:
        """The best expected return with these parameters, []; NaN where it is not known."""
        return optimal_return(params) if self.is_tabular else jnp.full((), jnp.nan)

    def draw(self, key: jax.Array) -> Any:
        """Parameters of the environment for a new agent; the key is consumed."""
        return grid_world.draw(key, self.mode) if self.params is None else jax.tree.map(jnp.asarray, self.params)

    def draw_lifetime(self, key: jax.Array, given: Any) -> jax.Array:
        """Updates that a new agent lives: as given, unless that is 0; the key is consumed."""
        own = grid_world.draw_lifetime(key, self.mode) if self.mode else jnp.int32(self.lifetime[0])
        return jnp.where(given > 0, given, own).astype(jnp.int32)

    def observe(self, obs: jax.Array, state: Any, params: Any) -> Observations:
        """What an agent of this project reads in a state."""
        if isinstance(self.environment, GridWorld):
            return self.environment.places(state, params)
        return obs.ravel().astype(jnp.result_type(float))


def make(name: str) -> World:
    """The world of an environment's name; `GridWorld-<mode>` is the whole mode, with a number one level of it.

    Raises:
        UserError: there is no such environment, or its actions are continuous.
    """
    if grid_world.known(name):
        environment, level = grid_world.make(name)
        mode = environment.name.removeprefix(grid_world.PREFIX)
        is_whole = name == environment.name
        return grid(mode, None if is_whole else level)
    is_minatar = name.endswith(MINATAR)
    if is_minatar:
        _check_minatar(name)
    task = environments.make(name, flatten=is_minatar)
    build = Build(task.obs_dim, task.num_actions, (64, 64), "adam")
    lifetime = MINATAR_LIFETIME if is_minatar else CLASSIC_LIFETIME
    return World(task.environment, task.params, "", build, RATES["adam"], lifetime, task.max_steps)


def grid(mode: str, level: Any = None) -> World:
    """The world of a Grid-World mode, or of one level of it."""
    environment, own = GridWorld(mode), MODES[mode]
    hidden = () if own.tabular else (32, 32, 32) if mode == "rand_tiny" else (32,)
    build = Build(environment.obs_dim, environment.num_actions, hidden, "sgd" if own.tabular else "adam")
    rates = RATES["sgd" if own.tabular else "grid"]
    return World(environment, level, mode, build, rates, own.lifetime, own.horizon)


def _check_minatar(name: str) -> None:
    names = [known for known in gymnax.registered_envs if known.endswith(MINATAR)]
    if name not in names:
        raise UserError(f"--env_name {name} is not an environment; those of MinAtar are {', '.join(names)}.")


def with_rates(config: C, world: World) -> C:
    """The configuration with the world's learning rates where none are given."""
    rates = dict(zip(("actor_lr", "critic_lr"), world.rates, strict=True))
    return replace(config, **{name: rate for name, rate in rates.items() if getattr(config, name) is None})


# --- acting -----------------------------------------------------------------------------------------------------------


class Finished(NamedTuple):
    """Returns of the episodes that ended in some steps."""

    total: jax.Array
    number: jax.Array
    highest: jax.Array  # -inf if there are none

    def joined(self, later: "Finished") -> "Finished":
        """With those of later steps."""
        highest = jnp.maximum(self.highest, later.highest)
        return Finished(self.total + later.total, self.number + later.number, highest)


class Acting(flax.struct.PyTreeNode):
    """Where the workers of an agent are."""

    state: Any  # leaves [workers, ...]
    observation: Observations  # leaves [workers, ...]
    episode_return: jax.Array  # [workers], so far


def begin(world: World, params: Any, key: jax.Array, workers: int) -> Acting:
    """Workers at the start of an episode; the key is consumed."""
    obs, state = jax.vmap(world.environment.reset_env, (0, None))(jax.random.split(key, workers), params)
    observation = jax.vmap(world.observe, (0, 0, None))(obs, state, params)
    return Acting(state, observation, jnp.zeros(workers))


def choose(key: jax.Array, chances: jax.Array) -> jax.Array:
    """Actions `[n]` by their probabilities `[n, actions]`; the key is consumed."""
    below = jnp.cumsum(chances, -1)
    luck = jax.random.uniform(key, chances.shape[:1], chances.dtype) * below[:, -1]
    return jnp.minimum((luck[:, None] >= below).sum(-1), chances.shape[-1] - 1)


def collect(
    world: World, params: Any, actor: Network, acting: Acting, key: jax.Array, steps: int
) -> tuple[Acting, Rollout, Finished]:
    """Some steps of all workers with one policy.

    Args:
        world: of the agent.
        params: of its environment.
        actor: layers of the policy.
        acting: where the workers are.
        key: consumed.
        steps: of each worker.

    Returns:
        Where the workers are then, what they saw, and the returns of finished episodes: sum, number and highest.
    """
    workers = acting.episode_return.shape[0]
    environment_step = jax.vmap(world.environment.step, (0, 0, 0, None))

    def step(acting: Acting, t: jax.Array) -> tuple[Acting, tuple]:
        action_key, step_key = jax.random.split(jax.random.fold_in(key, t))
        action = choose(action_key, probabilities(actor, acting.observation))
        keys = jax.random.split(step_key, workers)
        obs, state, reward, terminated, truncated, _ = environment_step(keys, acting.state, action, params)
        done, reward = terminated | truncated, reward.astype(acting.episode_return.dtype)
        total = acting.episode_return + reward
        observation = jax.vmap(world.observe, (0, 0, None))(obs, state, params)
        after = Acting(state, observation, jnp.where(done, 0.0, total))
        return after, (acting.observation, action, reward, done, total)

    acting, (seen, action, reward, done, totals) = jax.lax.scan(step, acting, jnp.arange(steps))
    join = lambda before, last: jnp.moveaxis(jnp.concatenate([before, last[None]]), 0, 1)  # noqa: E731
    rollout = Rollout(jax.tree.map(join, seen, acting.observation), action.T, reward.T, done.T)
    sums = jnp.where(done, totals, 0.0).sum(), done.sum().astype(totals.dtype)
    return acting, rollout, Finished(*sums, jnp.where(done, totals, -jnp.inf).max())


def play(world: World, params: Any, actor: Network, key: jax.Array, episodes: int) -> jax.Array:
    """Returns `[episodes]` of whole episodes, undiscounted.

    Args:
        world: of the agent.
        params: of its environment.
        actor: layers of the policy.
        key: consumed.
        episodes: played side by side; the last one to end says how long it takes.
    """
    begin_key, key = jax.random.split(key)
    environment = world.environment
    step = jax.vmap(environment.step_env, (0, 0, 0, None))
    is_truncated: Callable = jax.vmap(environment.is_truncated, (0, None))
    observe = jax.vmap(world.observe, (0, 0, None))

    def unfinished(carry: tuple) -> jax.Array:
        t, alive, _ = carry
        return alive.any() & (t < world.horizon)

    def advance(carry: tuple) -> tuple:
        t, alive, acting = carry
        action_key, step_key = jax.random.split(jax.random.fold_in(key, t))
        action = choose(action_key, probabilities(actor, acting.observation))
        keys = jax.random.split(step_key, episodes)
        obs, state, reward, terminated, _ = step(keys, acting.state, action, params)
        total = acting.episode_return + jnp.where(alive, reward, 0.0).astype(acting.episode_return.dtype)
        alive = alive & ~(terminated | is_truncated(state, params))
        return t + 1, alive, Acting(state, observe(obs, state, params), total)

    start = begin(world, params, begin_key, episodes)
    return jax.lax.while_loop(unfinished, advance, (jnp.int32(0), jnp.ones(episodes, bool), start))[2].episode_return

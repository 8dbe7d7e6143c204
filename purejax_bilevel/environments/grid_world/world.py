"""The Grid-World itself: moves, objects that are collected, end episodes and come back, and what is observed.

Source: Oh et al. 2020, "Discovering reinforcement learning algorithms", in the five-action form of GROOVE.
"""

from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from purejax_bilevel.environments._gymnax import Environment, spaces
from purejax_bilevel.environments.grid_world import levels
from purejax_bilevel.environments.grid_world.levels import NUM_ACTIONS, Level
from purejax_bilevel.environments.grid_world.modes import MODES, Mode

TIME_UNIT = 0.001  # of the observation's last entry, per step


@flax.struct.dataclass
class State:
    """Where everything is; M is the largest number of objects of the mode."""

    time: jax.Array
    cell: jax.Array
    object_cell: jax.Array  # [M]
    object_exists: jax.Array  # [M]
    terminated: jax.Array  # whether an object has ended the episode


class Draws(NamedTuple):
    """What chance decides in a step."""

    respawn: jax.Array  # [M], whether an object that is absent comes back
    new_cell: jax.Array  # [M], where it comes back; not read where objects keep their cells
    terminate: jax.Array  # [], whether what is collected ends the episode


class Places(NamedTuple):
    """An observation without its zeros: row numbers of a weight matrix instead of a vector to multiply with it.

    Read with `jnp.take(rows, places, axis=0, mode="fill", fill_value=0)`, add with `rows.at[places].add(x,
    mode="drop")`: places at the length of the observation are of objects that are not there.
    """

    places: jax.Array  # [1] in tabular modes, else [1 + M]: where the ones are
    time: jax.Array  # [], the last entry


class GridWorld(Environment):
    """A Grid-World of any level of a mode; the level is the environment's parameter.

    The time limit truncates; only objects terminate. The time is observed, so values may count either as an end.

    Args:
        mode: a name in `MODES`, or a mode of your own.
        name: of the environment.
    """

    def __init__(self, mode: str | Mode, name: str = ""):
        super().__init__()
        self.mode = MODES[mode] if isinstance(mode, str) else mode
        self._mode_name = mode if isinstance(mode, str) else None
        self._name = name or f"GridWorld-{self._mode_name or 'own'}"

    @property
    def name(self) -> str:
        return self._name

    @property
    def default_params(self) -> Level:
        """Level number 0 of the mode."""
        if self._mode_name is None:
            raise NotImplementedError("a mode of your own has no default level")
        return levels.numbered(self._mode_name, 0)

    @property
    def num_actions(self) -> int:
        return NUM_ACTIONS

    @property
    def obs_dim(self) -> int:
        """Length of the observation."""
        cells, mode = self.mode.max_grid_size**2, self.mode
        return 1 + cells * (2**mode.max_objects if mode.tabular else 1 + mode.max_types)

    def action_space(self, params: Level | None = None) -> spaces.Discrete:
        return spaces.Discrete(NUM_ACTIONS)

    def observation_space(self, params: Level | None = None) -> spaces.Box:
        return spaces.Box(0.0, max(1.0, TIME_UNIT * self.mode.horizon), (self.obs_dim,))

    # --- transitions --------------------------------------------------------------------------------------------------

    def reset_env(self, key: jax.Array, params: Level) -> tuple[jax.Array, State]:
        cells = jnp.asarray(params.object_cell)
        if not self.mode.tabular:
            cells = levels.draw_cells(key, params.free, self.mode.max_objects).astype(cells.dtype)
        state = State(jnp.int32(0), jnp.asarray(params.start_cell), cells, params.used, jnp.bool_(False))
        return self.observe_state(state, params), state

    def step_env(
        self, key: jax.Array, state: State, action: jax.Array, params: Level
    ) -> tuple[jax.Array, State, jax.Array, jax.Array, dict]:
        state, reward = self.transition(state, action, params, self.draw(key, state, action, params))
        info = {"discount": 1.0 - state.terminated}
        return self.observe_state(state, params), state, reward, state.terminated, info

    def draw(self, key: jax.Array, state: State, action: jax.Array, params: Level) -> Draws:
        """What chance decides when an action is taken; arguments as of `step_env`."""
        respawn_key, cell_key, terminate_key = jax.random.split(key, 3)
        _, collected = self._collect(state, action, params)
        respawn = jax.random.bernoulli(respawn_key, jnp.asarray(params.object_p_respawn))
        new_cell = state.object_cell
        if not self.mode.tabular:
            new_cell = levels.draw_cells(cell_key, params.free, self.mode.max_objects).astype(new_cell.dtype)
        p_terminate = jnp.where(collected, params.object_p_terminate, 0.0).sum()
        return Draws(respawn, new_cell, jax.random.bernoulli(terminate_key, jnp.minimum(p_terminate, 1.0)))

    def transition(self, state: State, action: jax.Array, params: Level, draws: Draws) -> tuple[State, jax.Array]:
        """A step whose chances are known.

        An object cannot come back in the step in which it is collected. One that comes back under the agent is
        collected by the next action that stays there.

        Args:
            state: before the step.
            action: 0 up, 1 down, 2 left, 3 right, 4 stay.
            params: the level.
            draws: what chance decides.

        Returns:
            The state after the step and the reward.
        """
        cell, collected = self._collect(state, action, params)
        reward = jnp.where(collected, params.object_reward, 0.0).sum()
        object_cell = state.object_cell
        if not self.mode.tabular:
            object_cell = jnp.where(draws.respawn & ~state.object_exists, draws.new_cell, object_cell)
        exists = (state.object_exists | draws.respawn) & ~collected & params.used
        terminated = state.terminated | draws.terminate
        return State(state.time + 1, cell, object_cell, exists, terminated), reward

    def _collect(self, state: State, action: jax.Array, params: Level) -> tuple[jax.Array, jax.Array]:
        """The agent's next cell and which objects `[M]` it finds there."""
        cell = levels.move(params, state.cell, action).astype(state.cell.dtype)
        return cell, state.object_exists & (state.object_cell == cell)

    def is_terminated(self, state: State, params: Level) -> jax.Array:
        return state.terminated

    # --- observations -------------------------------------------------------------------------------------------------

    def places(self, state: State, params: Level) -> Places:
        """The observation as places of its ones, for meta-programs.

        Tabular: cell + G * G * sum over objects of 2^i where object i exists. Otherwise the agent's cell, and for each
        object that exists G * G * (1 + its type) + its cell, once.
        """
        cells = self.mode.max_grid_size**2
        time = TIME_UNIT * state.time.astype(jnp.float32)
        if self.mode.tabular:
            mask = (state.object_exists << jnp.arange(self.mode.max_objects)).sum()
            return Places((state.cell + cells * mask).astype(jnp.int32)[None], time)
        objects = cells * (1 + params.object_type) + state.object_cell
        earlier = jnp.tri(self.mode.max_objects, k=-1, dtype=bool) & state.object_exists
        seen_before = (earlier & (objects[:, None] == objects)).any(1)
        objects = jnp.where(state.object_exists & ~seen_before, objects, self.obs_dim)
        return Places(jnp.concatenate([state.cell[None], objects]).astype(jnp.int32), time)

    def observe_state(self, state: State, params: Level) -> jax.Array:
        """The observation as a vector `[obs]` of zeros and ones, and the time."""
        places, time = self.places(state, params)
        ones = (jnp.arange(self.obs_dim - 1)[:, None] == places).any(1)
        return jnp.append(ones.astype(time.dtype), time)

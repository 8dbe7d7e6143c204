"""Brax's environments, and MuJoCo Playground's dm_control suite, behind the gymnax interface.

Both suites have the same shape, `reset(key) -> state` and `step(state, action) -> state`, so that one adapter serves
both. It leaves their training wrappers aside, because those lose the observation before a reset and always reset to
the same first state. Instead:

* The time limit is a parameter, and truncates.
* A reset draws a fresh state. It may cost 200 physics steps, so it happens only when an episode has ended, under
  `vmap` too: then when one of the batch has.
* Only those arrays of a suite's state are carried which a later step reads: 8 of 88 in CheetahRun.
* Physics that is no longer finite terminates the episode.

The suites come with the optional extra `brax` and are imported when one of their environments is asked for.
"""

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.interpreters import partial_eval

from purejax_bilevel.environments._gymnax import Environment, spaces
from purejax_bilevel.errors import UserError

BRAX = (
    "ant",
    "halfcheetah",
    "hopper",
    "humanoid",
    "humanoidstandup",
    "inverted_double_pendulum",
    "inverted_pendulum",
    "pusher",
    "reacher",
    "swimmer",
    "walker2d",
)
# The physics of Brax, the default first: generalized coordinates are Brax's own most accurate physics, spring is over
# twice as fast on a CPU and coarser (other motors, too), mjx is MuJoCo and calls LAPACK in every step.
BACKENDS = ("generalized", "spring", "positional", "mjx")
PLAYGROUND = (
    "AcrobotSwingup",
    "AcrobotSwingupSparse",
    "BallInCup",
    "CartpoleBalance",
    "CartpoleBalanceSparse",
    "CartpoleSwingup",
    "CartpoleSwingupSparse",
    "CheetahRun",
    "FingerSpin",
    "FingerTurnEasy",
    "FingerTurnHard",
    "FishSwim",
    "HopperHop",
    "HopperStand",
    "HumanoidRun",
    "HumanoidStand",
    "HumanoidWalk",
    "PendulumSwingup",
    "PointMass",
    "ReacherEasy",
    "ReacherHard",
    "SwimmerSwimmer6",
    "WalkerRun",
    "WalkerStand",
    "WalkerWalk",
)
NAMES = (*BRAX, *PLAYGROUND)
TIME_LIMIT = 1000


@flax.struct.dataclass
class State:
    """The arrays of a suite's state that a later step reads, and the steps since the reset."""

    physics: tuple[jax.Array, ...]
    time: jax.Array


@flax.struct.dataclass
class Params:
    """What may differ between the members of a program."""

    max_steps_in_episode: int | jax.Array = TIME_LIMIT


def known(name: str) -> bool:
    """Whether `name` is an environment of the suites, with or without `:backend`."""
    return name.partition(":")[0] in NAMES


@functools.cache  # tracing its physics takes seconds
def make(name: str) -> tuple["SuiteEnvironment", Params]:
    """Looks up an environment of one of the suites.

    Args:
        name: one of `PLAYGROUND`, or of `BRAX`, which may be followed by a backend ("halfcheetah:spring").

    Raises:
        UserError: unknown backend, or the extra is not installed.
    """
    base, colon, backend = name.partition(":")
    if colon and (base not in BRAX or backend not in BACKENDS):
        allowed = f"one of {', '.join(BACKENDS)}" if base in BRAX else "not allowed there"
        raise UserError(f"--env_name {name}: the backend after {base}: must be {allowed}, got '{backend}'.")
    try:
        environment, bounds = _load_brax(base, backend or BACKENDS[0]) if base in BRAX else _load_playground(base)
    except ImportError as error:
        raise UserError(
            f"--env_name {name} needs the extra brax ({error}): start with PUREJAX_BILEVEL_EXTRAS=brax ./setup/run, "
            "or pip install -e '.[brax]'."
        ) from error
    return SuiteEnvironment(name, environment, bounds), Params()


def _load_brax(name: str, backend: str) -> tuple[Any, np.ndarray]:
    from brax import envs

    with _without_warnings():
        environment = envs.get_environment(name, backend=backend)
    return environment, np.tile(np.array([-1.0, 1.0], np.float32), (environment.action_size, 1))


def _load_playground(name: str) -> tuple[Any, np.ndarray]:
    from mujoco_playground import registry

    # The default implementation is written for NVIDIA GPUs: on a CPU it is 20 times slower.
    with _without_warnings():
        environment = registry.load(name, config_overrides={"impl": "jax"})
    return environment, environment.mj_model.actuator_ctrlrange.astype(np.float32)


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Brax warns that MJX is its successor; MuJoCo writes MUJOCO_LOG.TXT about an old word in the suites' files."""
    import mujoco

    before = mujoco.get_mju_user_warning()
    mujoco.set_mju_user_warning(lambda message: None)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Brax System", UserWarning)
            yield
    finally:
        mujoco.set_mju_user_warning(before)


class SuiteEnvironment(Environment):
    """An environment of a suite as a gymnax environment.

    Args:
        name: of the environment.
        environment: has `reset(key)` and `step(state, action)`.
        bounds: lowest and highest action, `[action, 2]`.
    """

    def __init__(self, name: str, environment: Any, bounds: np.ndarray):
        super().__init__()
        self._name = name
        self.bounds = bounds
        # Compiled functions, because those are traced only once for all programs.
        self._reset, self._step = jax.jit(environment.reset), jax.jit(environment.step)
        self.template = jax.eval_shape(self._reset, jax.random.key(0))
        action = jax.ShapeDtypeStruct((len(bounds),), jnp.float32)
        self.carried = _leaves_read(self._step, self.template, action)
        self._restart = _where_done(functools.partial(self.reset_env, params=None))

    @property
    def default_params(self) -> Params:
        return Params()

    @property
    def name(self) -> str:
        return self._name

    @property
    def num_actions(self) -> int:
        return len(self.bounds)

    def reset_env(self, key: jax.Array, params: Params | None) -> tuple[jax.Array, State]:
        del params
        state = self._reset(key)
        return state.obs, State(self._pack(state), jnp.int32(0))

    def step_env(
        self, key: jax.Array, state: State, action: jax.Array, params: Params
    ) -> tuple[jax.Array, State, jax.Array, jax.Array, dict]:
        del key, params  # the physics is deterministic
        moved = self._step(self._unpack(state.physics), action)
        finite = jnp.isfinite(moved.obs).all() & jnp.isfinite(moved.reward)
        obs = jnp.where(jnp.isfinite(moved.obs), moved.obs, 0.0)
        terminated = (moved.done > 0) | ~finite
        info = {"discount": 1.0 - terminated}
        return obs, State(self._pack(moved), state.time + 1), jnp.where(finite, moved.reward, 0.0), terminated, info

    def step(
        self, key: jax.Array, state: State, action: jax.Array, params: Params | None = None
    ) -> tuple[jax.Array, State, jax.Array, jax.Array, jax.Array, dict]:
        """One step, then a fresh state if the episode has ended; the key is for that state."""
        params = self.default_params if params is None else params
        final_obs, final_state, reward, terminated, info = self.step_env(key, state, action, params)
        truncated = self.is_truncated(final_state, params)
        obs, state = self._restart(terminated | truncated, key, (final_obs, final_state))
        info |= {"terminated": terminated, "truncated": truncated, "final_observation": final_obs}
        return obs, state, reward, terminated, truncated, info

    def action_space(self, params: Params | None = None) -> spaces.Box:
        return spaces.Box(self.bounds[:, 0], self.bounds[:, 1], (len(self.bounds),))

    def observation_space(self, params: Params | None = None) -> spaces.Box:
        return spaces.Box(-jnp.inf, jnp.inf, self.template.obs.shape)

    def _pack(self, state: Any) -> tuple[jax.Array, ...]:
        leaves = zip(self.carried, jax.tree.leaves(state), jax.tree.leaves(self.template), strict=True)
        # Branches must agree about types, and a reset may give 0 where a step gives an array's type.
        return tuple(jnp.asarray(leaf, like.dtype) for carried, leaf, like in leaves if carried)

    def _unpack(self, physics: tuple[jax.Array, ...]) -> Any:
        leaves, structure = jax.tree.flatten(self.template)
        values = iter(physics)
        filled = [next(values) if carried else _blank(like) for carried, like in zip(self.carried, leaves, strict=True)]
        return jax.tree.unflatten(structure, filled)


def _blank(like: jax.ShapeDtypeStruct) -> jax.Array:
    if jnp.issubdtype(like.dtype, jax.dtypes.prng_key):
        return jnp.broadcast_to(jax.random.key(0), like.shape)
    return jnp.zeros(like.shape, like.dtype)


def _leaves_read(step: Callable[[Any, jax.Array], Any], state: Any, action: Any) -> list[bool]:
    """For each leaf of the state, whether the observation, reward or end of some later step depends on it."""
    jaxpr = jax.make_jaxpr(step)(state, action).jaxpr
    fields = [path[0].name for path, _ in jax.tree_util.tree_flatten_with_path(state)[0]]
    seen = [field in ("obs", "reward", "done") for field in fields]
    read = [False] * len(fields)
    while True:
        wanted = [a or b for a, b in zip(seen, read, strict=True)]
        before, read = read, partial_eval.dce_jaxpr(jaxpr, wanted)[1][: len(fields)]
        if read == before:
            return read


def _where_done(reset: Callable[[jax.Array], Any], batch_axes: int = 0) -> Callable[[jax.Array, jax.Array, Any], Any]:
    """A function `(done, key, stepped)` that gives `reset(key)` where `done`, else `stepped`.

    It resets only if there is something to reset. `vmap` would turn such a branch into a computation of both sides;
    this one stays a branch, taken when any of the batch is done.

    Args:
        reset: of one environment.
        batch_axes: number of leading axes of all three arguments.
    """
    batched_reset = reset
    for _ in range(batch_axes):
        batched_reset = jax.vmap(batched_reset)

    @jax.custom_batching.custom_vmap
    def choose(done: jax.Array, key: jax.Array, stepped: Any) -> Any:
        def where_done(new: jax.Array, old: jax.Array) -> jax.Array:
            return jnp.where(done.reshape(done.shape + (1,) * (old.ndim - done.ndim)), new, old)

        return jax.lax.cond(done.any(), lambda: jax.tree.map(where_done, batched_reset(key), stepped), lambda: stepped)

    @choose.def_vmap
    def choose_in_batch(axis_size: int, in_batched: Any, *arguments: Any) -> tuple[Any, Any]:
        arguments = jax.tree.map(
            lambda x, batched: x if batched else jnp.broadcast_to(x, (axis_size, *x.shape)),
            arguments,
            tuple(in_batched),
        )
        chosen = _where_done(reset, batch_axes + 1)(*arguments)
        return chosen, jax.tree.map(lambda _: True, chosen)

    return choose

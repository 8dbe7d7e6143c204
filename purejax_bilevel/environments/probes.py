"""Probes: tiny environments whose optimal values are known in closed form, each for one thing that an agent must get
right.

    constant            reward 1, then the end: values can be learned at all
    observation         reward +-1 is seen: values depend on the observation
    delay               reward 1 after the second step: values travel back, discounted
    action              reward depends on the action: the policy improves
    observation-action  on both
    truncation          reward 1 at every step, episodes end by time limit only: the value is that of an infinite
                        episode, which a time limit taken for a termination misses

An episode of "probe-all" is one of them, drawn at its reset and shown in the observation, so that one program is a test
of everything.

Observation: what is seen (-1, 1, or 0 where there is nothing to see), whether it is the second step of "delay", the
probe one-hot. Actions are 0 and 1, or one number in [-1, 1] in the environments named "...-continuous".
"""

from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from purejax_bilevel.environments._gymnax import Environment, spaces

KINDS = ("constant", "observation", "delay", "action", "observation-action", "truncation")
CONSTANT, OBSERVATION, DELAY, ACTION, OBSERVATION_ACTION, TRUNCATION = range(len(KINDS))
NAMES = tuple(f"probe-{kind}{end}" for kind in (*KINDS, "all") for end in ("", "-continuous"))
BEST_ACTION = 0.5  # continuous; with an observation: its sign is that of what is seen


def make(name: str) -> tuple["Probe", "Params"]:
    """The probe of a name among `NAMES`."""
    kind = name.removeprefix("probe-").removesuffix("-continuous")
    kinds = tuple(range(len(KINDS))) if kind == "all" else (KINDS.index(kind),)
    return Probe(name, kinds, name.endswith("-continuous")), Params()


@flax.struct.dataclass
class State:
    """Which probe, what is seen, and the steps since the reset."""

    kind: jax.Array
    seen: jax.Array
    time: jax.Array


@flax.struct.dataclass
class Params:
    """The time limit: the shortest that lets "delay" end by itself."""

    max_steps_in_episode: int | jax.Array = 2


class Probe(Environment):
    """One of several probes, drawn at each reset.

    Args:
        name: of the environment.
        kinds: the probes, numbers in `KINDS`.
        continuous: whether the action is a number in [-1, 1].
    """

    def __init__(self, name: str, kinds: tuple[int, ...], continuous: bool):
        super().__init__()
        self._name = name
        self.kinds = kinds
        self.continuous = continuous

    @property
    def default_params(self) -> Params:
        return Params()

    @property
    def name(self) -> str:
        return self._name

    @property
    def num_actions(self) -> int:
        return 1 if self.continuous else 2

    def reset_env(self, key: jax.Array, params: Params) -> tuple[jax.Array, State]:
        kind_key, seen_key = jax.random.split(key)
        kind = jax.random.choice(kind_key, jnp.array(self.kinds))
        seen = jnp.where(_shows(kind), jax.random.rademacher(seen_key, (), float), 0.0)
        state = State(kind, seen, jnp.int32(0))
        return _observe(state), state

    def step_env(
        self, key: jax.Array, state: State, action: jax.Array, params: Params
    ) -> tuple[jax.Array, State, jax.Array, jax.Array, dict]:
        second = state.time == 1
        reward = _reward(state.kind, state.seen, second, action, self.continuous)
        state = State(state.kind, state.seen, state.time + 1)
        terminated = jnp.where(state.kind == DELAY, second, state.kind != TRUNCATION)
        return _observe(state), state, reward, terminated, {"discount": 1.0 - terminated}

    def is_terminated(self, state: State, params: Params) -> jax.Array:
        needed = jnp.where(state.kind == DELAY, 2, 1)
        return (state.time >= needed) & (state.kind != TRUNCATION)

    def action_space(self, params: Params | None = None) -> spaces.Space:
        return spaces.Box(-1.0, 1.0, (1,)) if self.continuous else spaces.Discrete(2)

    def observation_space(self, params: Params | None = None) -> spaces.Box:
        return spaces.Box(-1.0, 1.0, (2 + len(KINDS),))


def _shows(kind: jax.Array) -> jax.Array:
    return (kind == OBSERVATION) | (kind == OBSERVATION_ACTION)


def _observe(state: State) -> jax.Array:
    second = jnp.where(state.kind == DELAY, state.time, 0).astype(state.seen.dtype)
    return jnp.concatenate([jnp.stack([state.seen, second]), jax.nn.one_hot(state.kind, len(KINDS))])


def _reward(kind: jax.Array, seen: jax.Array, second: jax.Array, action: jax.Array, continuous: bool) -> jax.Array:
    wanted = jnp.where(kind == ACTION, 1.0, seen)
    choice = 2.0 * action - 1.0
    acted = 1.0 - (jnp.reshape(action, ()) - BEST_ACTION * wanted) ** 2 if continuous else wanted * choice
    rewards = {
        CONSTANT: 1.0,
        OBSERVATION: seen,
        DELAY: second.astype(seen.dtype),
        ACTION: acted,
        OBSERVATION_ACTION: acted,
        TRUNCATION: 1.0,
    }
    return jnp.stack([jnp.asarray(rewards[number], seen.dtype) for number in range(len(KINDS))])[kind]


# --- what is to be learned --------------------------------------------------------------------------------------------


class Situation(NamedTuple):
    """An observation in which an action is taken."""

    kind: int
    seen: float
    second: bool

    @property
    def observation(self) -> jax.Array:
        """`[obs]`."""
        return _observe(State(jnp.int32(self.kind), jnp.float32(self.seen), jnp.int32(self.second)))


SITUATIONS = (
    Situation(CONSTANT, 0.0, False),
    Situation(OBSERVATION, -1.0, False),
    Situation(OBSERVATION, 1.0, False),
    Situation(DELAY, 0.0, False),
    Situation(DELAY, 0.0, True),
    Situation(ACTION, 0.0, False),
    Situation(OBSERVATION_ACTION, -1.0, False),
    Situation(OBSERVATION_ACTION, 1.0, False),
    Situation(TRUNCATION, 0.0, False),
)


def optimal_value(situation: Situation, action: float, discount: float, bonus: float, continuous: bool) -> float:
    """Value of taking `action` in `situation` and acting optimally from then on.

    Args:
        situation: one of `SITUATIONS`.
        action: 0 or 1, or a number in [-1, 1].
        discount: below 1.
        bonus: what a soft value adds where all actions are equally good; temperature * log 2 for two actions,
            temperature * entropy of the policy for continuous ones.
        continuous: which kind of actions.
    """
    kind, seen, second = situation
    if kind == DELAY and not second:
        return discount * (1.0 + bonus)
    if kind == TRUNCATION:
        return (1.0 + discount * bonus) / (1.0 - discount)
    if kind == OBSERVATION:
        return seen
    if kind in (ACTION, OBSERVATION_ACTION):
        best = best_action(situation, continuous)
        assert best is not None
        return 1.0 - (action - best) ** 2 if continuous else (1.0 if action == best else -1.0)
    return 1.0


def best_action(situation: Situation, continuous: bool) -> float | None:
    """The best action, None where all are equally good."""
    if situation.kind not in (ACTION, OBSERVATION_ACTION):
        return None
    sign = 1.0 if situation.kind == ACTION else situation.seen
    return BEST_ACTION * sign if continuous else float(sign > 0)

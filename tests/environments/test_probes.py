"""Probe environments: what the closed forms say is what the dynamics do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from purejax_bilevel import environments
from purejax_bilevel.environments import probes

TEMPERATURE = 0.2
ACTIONS = {False: (0.0, 1.0), True: (-1.0, -0.5, 0.0, 0.5, 1.0)}


def value_iteration(continuous: bool, discount: float) -> np.ndarray:
    """Soft optimal values `[situations, actions]` found from `step_env` alone; a time limit is not an end."""
    environment, params = probes.make("probe-all-continuous" if continuous else "probe-all")
    actions = jnp.array(ACTIONS[continuous])
    situations = probes.SITUATIONS
    observations = np.stack([situation.observation for situation in situations])

    def outcome(situation: probes.Situation, action: jax.Array):
        state = probes.State(jnp.int32(situation.kind), jnp.float32(situation.seen), jnp.int32(situation.second))
        return environment.step_env(jax.random.key(0), state, action, params)

    outcomes = [jax.vmap(lambda action, s=situation: outcome(s, action))(actions) for situation in situations]
    q = np.zeros((len(situations), len(actions)))
    for _ in range(200):
        values = q.max(1) if continuous else TEMPERATURE * np.log(np.exp(q / TEMPERATURE).sum(1))
        for i, (obs, _, reward, terminated, _) in enumerate(outcomes):
            following = [np.abs(observations - o).sum(1).argmin() for o in np.asarray(obs)]
            q[i] = np.asarray(reward) + discount * (1 - np.asarray(terminated)) * values[following]
    return q


@pytest.mark.parametrize("continuous", [False, True])
@pytest.mark.parametrize("discount", [0.5, 0.9])
def test_closed_forms_are_the_fixed_point_of_the_dynamics(continuous: bool, discount: float):
    bonus = 0.0 if continuous else TEMPERATURE * np.log(2)
    expected = [
        [probes.optimal_value(situation, action, discount, bonus, continuous) for action in ACTIONS[continuous]]
        for situation in probes.SITUATIONS
    ]
    found = value_iteration(continuous, discount)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    for row, situation in zip(found, probes.SITUATIONS, strict=True):
        best = probes.best_action(situation, continuous)
        if best is None:
            assert np.ptp(row) == 0
        else:
            assert ACTIONS[continuous][row.argmax()] == best


@pytest.mark.parametrize("name", probes.NAMES)
def test_every_probe_is_found_by_name_and_shows_itself(name: str):
    continuous = name.endswith("-continuous")
    assert environments.is_continuous(name) == continuous
    task = environments.make_continuous(name) if continuous else environments.make(name)
    obs, _ = jax.vmap(task.environment.reset, (0, None))(jax.random.split(jax.random.key(0), 200), task.params)
    kinds = set(np.asarray(obs[:, 2:]).argmax(1).tolist())
    kind = name.removeprefix("probe-").removesuffix("-continuous")
    assert kinds == (set(range(len(probes.KINDS))) if kind == "all" else {probes.KINDS.index(kind)})
    observed = {tuple(row) for row in np.asarray(obs).tolist()}
    first = [s for s in probes.SITUATIONS if s.kind in kinds and not s.second]
    assert observed == {tuple(np.asarray(situation.observation).tolist()) for situation in first}


def test_ends_of_episodes():
    """One step; two with a delay; the truncation probe never terminates and is cut off after two."""
    environment, params = probes.make("probe-all")
    for number, kind in enumerate(probes.KINDS):
        state = probes.State(jnp.int32(number), jnp.float32(1), jnp.int32(0))
        first = environment.step(jax.random.key(0), state, 0, params)
        second = environment.step(jax.random.key(0), state.replace(time=jnp.int32(1)), 0, params)
        ends = tuple(bool(end) for step in (first, second) for end in step[3:5])
        expected = {"delay": (False, False, True, True), "truncation": (False, False, False, True)}
        assert ends == expected.get(kind, (True, False, True, True)), kind

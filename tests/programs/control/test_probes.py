"""Every agent finds the optimal values of every probe environment (`environments/probes.py`).

One program for each agent: an episode of "probe-all" is one of the probes. Three seeds, and the median counts, because
a network of 16 units now and then learns slowly from where it starts. What takes longest is marked as slow and left out
by default: `./setup/run pytest -m slow` runs it.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from purejax_bilevel import networks
from purejax_bilevel.configuration import replace
from purejax_bilevel.environments import probes
from purejax_bilevel.program import Configuration
from purejax_bilevel.programs.control import agents, policies, q_learning, soft_actor_critic, soft_actor_critic_agents
from tests.programs.programs import mostly, step

SEEDS = 3
SLOW = ("mle", "vep", "funcbo", "funcbo_reward_only")  # discrete actions
SLOW_CONTINUOUS = tuple(soft_actor_critic_agents.AGENTS)
DISCOUNT = 0.5
TEMPERATURE = 0.1
SITUATIONS = jnp.stack([situation.observation for situation in probes.SITUATIONS])


def train(config: Configuration) -> Any:
    """Final learners of all seeds, without evaluations."""
    config = config.resolved()
    config = replace(config, max_hidden_dim=config.hidden_dim, max_model_hidden_dim=config.model_hidden_dim)
    program = config.program()

    def member(key: jax.Array) -> Any:
        start = program.init(key, config)
        update = lambda t, state: step(program, state, config, t)[0]  # noqa: E731
        return jax.lax.fori_loop(0, config.num_train_steps, update, start).learner

    keys = [jax.random.key(seed) for seed in range(SEEDS)]
    stacked = jnp.stack(keys)
    return jax.jit(lambda keys: jax.lax.map(member, keys)).lower(stacked).compile()(stacked)


# --- discrete actions -------------------------------------------------------------------------------------------------

DISCRETE = q_learning.Config(
    env_name="probe-all",
    num_train_steps=2000,
    init_steps=200,
    batch_size=64,
    capacity=6000,
    hidden_dim=16,
    model_hidden_dim=16,
    lr=3e-3,
    inner_lr=3e-3,
    tau=0.05,
    discount=DISCOUNT,
    alpha=TEMPERATURE,
    eps=0.5,
)
# What each agent needs, and the largest error it may make: values are between -1 and 2.1. Agents that let the model
# follow a hypergradient keep moving a little, because each of Adam's fresh starts takes a step of full length.
NEEDED: dict[str, tuple[dict[str, Any], float]] = {
    "omd": ({"num_train_steps": 6000, "lr": 6e-3, "tau": 1.0}, 0.2),
    "funcbo": ({"num_train_steps": 4000, "lr": 1e-3, "tau": 0.2}, 0.15),
    # Its reward head makes up for a next observation that is never learned.
    "funcbo_reward_only": ({"num_train_steps": 4000, "lr": 1e-3, "tau": 0.2}, 0.15),
    "mle": ({}, 0.02),
    # Fewer random value functions than an observation has entries do not tell all observations apart.
    "vep": ({"num_ensemble_vep": 32}, 0.02),
    "sql": ({}, 0.02),
}


@pytest.fixture(scope="module", params=mostly(agents.AGENTS, SLOW))
def discrete(request: pytest.FixtureRequest) -> tuple[np.ndarray, float]:
    """Learned values `[seeds, situations, actions]` (mean of the heads) and the error allowed."""
    settings, tolerance = NEEDED[request.param]
    learner = train(replace(DISCRETE, agent_type=request.param, **settings))
    values = jax.jit(jax.vmap(lambda q: networks.apply_heads(q, SITUATIONS.T).mean(0).T))(learner.q)
    return np.asarray(values), tolerance


def test_discrete_values_are_optimal(discrete: tuple[np.ndarray, float]):
    values, tolerance = discrete
    bonus = TEMPERATURE * np.log(2)
    optimal = [
        [probes.optimal_value(situation, action, DISCOUNT, bonus, False) for action in (0.0, 1.0)]
        for situation in probes.SITUATIONS
    ]
    errors = np.median(np.abs(values - np.array(optimal)), axis=0).max(1)
    assert errors.max() < tolerance, dict(zip(probes.SITUATIONS, errors.tolist(), strict=True))


def test_discrete_policy_is_optimal(discrete: tuple[np.ndarray, float]):
    greedy = discrete[0].argmax(2)
    for i, situation in enumerate(probes.SITUATIONS):
        best = probes.best_action(situation, continuous=False)
        assert best is None or np.median(greedy[:, i]) == best, situation


# --- continuous actions -----------------------------------------------------------------------------------------------

CONTINUOUS = soft_actor_critic.Config(
    env_name="probe-all-continuous",
    num_train_steps=4000,
    init_steps=200,
    batch_size=64,
    hidden_dim=16,
    model_hidden_dim=16,
    lr=3e-3,
    inner_lr=3e-3,
    policy_lr=1e-3,
    tau=0.05,
    discount=DISCOUNT,
    init_temperature=TEMPERATURE,
    temperature_lr=1e-9,  # a temperature that stays as it is, so that the values are known
)
ACTION_TOLERANCE = 0.25  # best actions are -0.5 and 0.5
NEEDED_CONTINUOUS: dict[str, tuple[dict[str, Any], float]] = {
    "omd": ({"num_train_steps": 8000}, 0.2),
    "funcbo": ({"lr": 1e-3}, 0.15),
    "mle": ({}, 0.1),
    "vep": ({"num_ensemble_vep": 16}, 0.1),
    "sac": ({}, 0.1),
}


@pytest.fixture(scope="module", params=mostly(soft_actor_critic_agents.AGENTS, SLOW_CONTINUOUS))
def continuous(request: pytest.FixtureRequest) -> tuple[np.ndarray, np.ndarray, float]:
    """The policy's mean action and the value of it, both `[seeds, situations]`, and the error allowed."""
    settings, tolerance = NEEDED_CONTINUOUS[request.param]
    learner = train(replace(CONTINUOUS, agent_type=request.param, **settings))

    def look(learner: soft_actor_critic_agents.Learner) -> tuple[jax.Array, jax.Array]:
        action = policies.mean_action(networks.apply_network(learner.policy, SITUATIONS.T))
        inputs = jnp.concatenate([SITUATIONS.T, action])
        return action[0], networks.apply_heads(learner.q, inputs).mean(0)[0]

    action, value = jax.jit(jax.vmap(look))(learner)
    return np.asarray(action), np.asarray(value), tolerance


def test_continuous_values_are_optimal(continuous: tuple[np.ndarray, np.ndarray, float]):
    """Of the action that the policy takes; where all are equal, the policy's entropy is that of a uniform one."""
    actions, values, tolerance = continuous
    bonus = TEMPERATURE * np.log(2)
    optimal = [
        [
            probes.optimal_value(situation, action, DISCOUNT, bonus, True)
            for situation, action in zip(*pair, strict=True)
        ]
        for pair in ((probes.SITUATIONS, row) for row in actions)
    ]
    errors = np.median(np.abs(values - np.array(optimal)), axis=0)
    assert errors.max() < tolerance, dict(zip(probes.SITUATIONS, errors.tolist(), strict=True))


def test_continuous_policy_is_optimal(continuous: tuple[np.ndarray, np.ndarray, float]):
    actions = continuous[0]
    for i, situation in enumerate(probes.SITUATIONS):
        best = probes.best_action(situation, continuous=True)
        assert best is None or np.median(np.abs(actions[:, i] - best)) < ACTION_TOLERANCE, situation

"""Offline agents against the numbers of the reference's code, in float64.

Files are those of `tests/data/offline`, and of the folder named by PUREJAX_BILEVEL_REFERENCE_DATA where it has some;
sizes are taken from them.
"""

import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from purejax_bilevel import networks
from purejax_bilevel.configuration import replace
from purejax_bilevel.networks import Layer
from purejax_bilevel.programs.control import policies
from purejax_bilevel.programs.offline import agents
from purejax_bilevel.programs.offline.agents import Learner, Units
from purejax_bilevel.programs.offline.settings import Learning
from purejax_bilevel.replay import Batch

OWN = Path(__file__).parents[2] / "data" / "offline"
GIVEN = os.environ.get("PUREJAX_BILEVEL_REFERENCE_DATA")
TOLERANCE = 1e-9  # of the largest entry of an array

Golden = dict[str, np.ndarray]


def files(pattern: str) -> list[Path]:
    given = sorted(Path(GIVEN).rglob(pattern)) if GIVEN else []
    found = {path.name: path for path in [*sorted(OWN.glob(pattern)), *given]}
    assert found, pattern
    return list(found.values())


def close(own: Any, expected: np.ndarray, name: str, tolerance: float = TOLERANCE) -> None:
    largest = max(np.abs(expected).max(), 1e-6)
    np.testing.assert_allclose(np.asarray(own), expected, rtol=0, atol=tolerance * largest, err_msg=name)


# --- soft actor-critic ------------------------------------------------------------------------------------------------


def layers(golden: Golden, prefix: str) -> tuple[Layer, ...]:
    """A network in the reference's layout: kernels are `[out, in]`."""
    count = sum(name.startswith(f"{prefix}/") and name.endswith("/w") for name in golden)
    return tuple(
        Layer(jnp.asarray(golden[f"{prefix}/{i}/w"].T), jnp.asarray(golden[f"{prefix}/{i}/b"])) for i in range(count)
    )


def policy_of(golden: Golden, prefix: str) -> tuple[Layer, ...]:
    """Two heads side by side are one layer."""
    heads = [(golden[f"{prefix}/{name}/w"], golden[f"{prefix}/{name}/b"]) for name in ("mu", "log_std")]
    kernel, bias = (np.concatenate(parts) for parts in zip(*heads, strict=True))
    return (*layers(golden, f"{prefix}/net"), Layer(jnp.asarray(kernel.T), jnp.asarray(bias)))


def learner_of(golden: Golden, case: str, config: Learning) -> Learner:
    obs_dim, action_dim = int(golden["config/obs_dim"]), int(golden["config/act_dim"])
    mean, std = np.zeros(obs_dim), np.ones(obs_dim)
    if case == "norm":
        mean, std = golden["normaliser/mean"][:obs_dim], golden["normaliser/std"][:obs_dim]
    units = Units(jnp.asarray(mean), jnp.asarray(std), float(golden["config/act_limit"]))
    q, target_q = (tuple(layers(golden, f"init/{of}/{name}") for name in ("q1", "q2")) for of in ("online", "target"))
    policy = policy_of(golden, "init/online/pi")
    learner = agents.init_learner(config, jax.random.key(0), units, action_dim)
    learner = learner.replace(q=q, target_q=target_q, policy=policy)
    return learner.replace(
        q_optimizer=learner.q_rule(config).init(q), policy_optimizer=learner.policy_rule(config).init(policy)
    )


def settings_of(golden: Golden) -> Learning:
    number = {name: float(golden[f"config/{name}"]) for name in ("gamma", "alpha", "polyak", "lr", "weight_decay")}
    return replace(
        Learning(),
        discount=number["gamma"],
        init_temperature=number["alpha"],
        temperature_lr=0.0,
        tau=1.0 - number["polyak"],
        q_lr=number["lr"],
        policy_lr=number["lr"],
        weight_decay=number["weight_decay"],
        hidden_dim=int(golden["config/hidden"][0]),
        num_layers=len(golden["config/hidden"]),
    )


def batch_of(golden: Golden) -> Batch:
    names = {"obs": "obs", "action": "act", "next_obs": "next_obs"}
    arrays = {own: jnp.asarray(golden[f"batch/{name}"].T) for own, name in names.items()}
    return Batch(reward=jnp.asarray(golden["batch/rew"]), terminated=jnp.asarray(golden["batch/done"], float), **arrays)


def check_parameters(golden: Golden, learner: Learner, prefix: str) -> None:
    for own, name in ((learner.q, "online"), (learner.target_q, "target")):
        for number, head in enumerate(own, 1):
            check_layers(head, layers(golden, f"{prefix}/{name}/q{number}"), f"{prefix}/{name}/q{number}")
    check_layers(learner.policy, policy_of(golden, f"{prefix}/online/pi"), f"{prefix}/online/pi")


def check_layers(own: Any, expected: Any, name: str) -> None:
    for number, (mine, its) in enumerate(zip(own, expected, strict=True)):
        close(mine.kernel, its.kernel, f"{name}/{number}/w")
        close(mine.bias, its.bias, f"{name}/{number}/b")


CASES = [(path, case) for path in files("offline_sac*.npz") for case in ("plain", "norm")]


@pytest.fixture(params=CASES, ids=lambda given: f"{given[0].stem}-{given[1]}")
def problem(request: pytest.FixtureRequest, float64: Any) -> tuple[Golden, str, Learning, Learner, Batch]:
    golden, case = dict(np.load(request.param[0])), request.param[1]
    config = settings_of(golden)
    return golden, case, config, learner_of(golden, case, config), batch_of(golden)


def test_actor(problem: tuple):
    golden, case, _, learner, batch = problem
    noise = jnp.asarray(golden["noise"][0, 1].T)
    action, log_prob = learner.sample(learner.policy, batch.obs, noise)
    outputs = networks.apply_network(learner.policy, learner.units(batch.obs))
    own = {
        "mu": jnp.split(outputs, 2)[0].T,
        "log_std_raw": jnp.split(outputs, 2)[1].T,
        "action": action.T,
        "log_prob": log_prob,
        "deterministic_action": learner.mean_action(learner.policy, batch.obs).T,
    }
    for name, value in own.items():
        close(value, golden[f"{case}/actor/{name}"], name)


def test_actor_at_its_bounds(problem: tuple):
    golden, case, _, learner, _ = problem
    outputs = networks.apply_network(learner.policy, jnp.asarray(golden[f"{case}/clip/obs"].T))  # not normalised there
    noise = jnp.asarray(golden[f"{case}/clip/noise"].T)
    action, log_prob = policies.sample_and_log_prob(outputs, noise, agents.LOG_STD_RANGE)
    close(learner.units.action_limit * action.T, golden[f"{case}/clip/action"], "action")
    close(log_prob, golden[f"{case}/clip/log_prob"], "log_prob", 1e-8)  # torch's softplus is linear above 20


def test_updates(problem: tuple):
    golden, case, config, learner, batch = problem
    step = jax.jit(lambda learner, *batches: agents.soft_step(config, learner, *batches))
    for update, noise in enumerate(golden["noise"]):
        prefix = f"{case}/update{update}"
        critic_batch, policy_batch = (batch._replace(noise=jnp.asarray(own.T)) for own in noise)
        close(learner.target(config, critic_batch), golden[f"{prefix}/backup"], "backup")
        for number, values in enumerate(learner.q_values(learner.q, batch)[:, 0], 1):
            close(values, golden[f"{prefix}/q{number}"], f"q{number}")
        if update == 0:
            gradient = jax.grad(lambda q: learner.q_loss(config, q, critic_batch))(learner.q)  # noqa: B023
            for number, head in enumerate(gradient, 1):
                check_layers(head, layers(golden, f"{prefix}/grad/q{number}"), f"grad/q{number}")
        learner, losses = step(learner, critic_batch, policy_batch)
        close(losses["q_loss"], golden[f"{prefix}/loss_q"], "loss_q")
        close(losses["policy_loss"], golden[f"{prefix}/loss_pi"], "loss_pi")
        close(losses["temperature"], golden["config/alpha"], "alpha")
        check_parameters(golden, learner, f"{prefix}/after")


def test_log_probability_of_a_known_action():
    """A = 1, mean 0, deviation 1, u = 0.5."""
    _, log_prob = policies.sample_and_log_prob(jnp.zeros((2, 1)), jnp.full((1, 1), 0.5), agents.LOG_STD_RANGE)
    np.testing.assert_allclose(log_prob, -0.8037095, rtol=1e-5)

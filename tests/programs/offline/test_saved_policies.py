"""Policies that runs leave: as functions, as what other programs begin from, and what is refused."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from purejax_bilevel import load_policy
from purejax_bilevel.configuration import replace
from purejax_bilevel.errors import UserError
from purejax_bilevel.programs.offline import agents, online, program, saved_policies
from purejax_bilevel.programs.offline.settings import ActorCritic
from tests.programs.offline import pendulum
from tests.programs.offline.pendulum import HIDDEN
from tests.programs.offline.test_online import TINY

OBS, ACTION = 3, 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("policies")


@pytest.fixture(scope="module")
def place(folder: Path) -> str:
    return pendulum.saved_policy(folder / "run")


@pytest.fixture(scope="module")
def tiny(folder: Path) -> str:
    return pendulum.saved(folder)


def test_a_policy_is_a_function_of_observations(place: str):
    act, own = load_policy(f"{place}#1"), jax.tree.map(lambda leaf: leaf[1], pendulum.policies())
    obs = np.random.default_rng(0).standard_normal((5, OBS)).astype(np.float32)
    hidden = np.maximum(((obs - own.mean) / own.std) @ own.policy[0].kernel + own.policy[0].bias, 0.0)
    expected = np.tanh(hidden @ own.policy[1].kernel + own.policy[1].bias)[:, :ACTION]
    np.testing.assert_allclose(act(obs), expected, rtol=1e-5)
    np.testing.assert_allclose(jax.jit(act)(obs[2]), expected[2], rtol=1e-5)
    assert not np.allclose(load_policy(f"{place}/artefact.safetensors")(obs), expected)  # the first member's
    with pytest.raises(UserError, match=r"observes 3 numbers, got \[4\]"):
        act(np.zeros(4))


@pytest.mark.parametrize("agent_type", ["mbpo", "td3_bc"])
def test_what_is_saved_is_what_was_continued(agent_type: str):
    own = jax.tree.map(lambda leaf: leaf[0], pendulum.policies())
    config = replace(ActorCritic(), hidden_dim=HIDDEN, num_layers=1, num_critics=3)
    units = agents.Units(jnp.zeros(OBS), jnp.ones(OBS))
    make = {**{name: agents.AGENTS[name] for name in agents.AGENTS}, "mbpo": agents.ONLINE_AGENTS["mbpo"]}[
        agent_type
    ].init
    learner: Any = jax.eval_shape(lambda: make(config, jax.random.key(0), units, ACTION))
    found: Any = saved_policies.continued(learner, own)
    jax.tree.map(np.testing.assert_array_equal, saved_policies.saved(found), own)
    if agent_type == "td3_bc":
        jax.tree.map(np.testing.assert_array_equal, found.target_policy, own.policy)


def test_programs_begin_from_a_policy_and_are_made_as_it_is(place: str, tiny: str):
    own = pendulum.policies()
    offline = {name: value for name, value in TINY.items() if name in program.Config.__dataclass_fields__}
    configs = (
        online.Config(policy=f"{place}#1", **TINY),
        program.Config(agent_type="offline_sac", dataset=tiny, policy=f"{place}#1", **offline),
    )
    for config in configs:
        config: Any = config.resolved()
        assert (config.hidden_dim, config.num_layers, config.num_critics, config.layer_norm) == (HIDDEN, 1, 3, True)
        trained = config.program()
        assert trained.artefact_kind == "policy"
        begin = jax.jit(lambda shared: trained.init(jax.random.key(0), config, shared).learner.policy)  # noqa: B023
        kernels = [layer.kernel for layer in begin(trained.shared())]
        np.testing.assert_array_equal(kernels[0], own.policy[0].kernel[1])
    assert configs[0].resolved().random_steps == 0


def test_an_ensemble_is_fitted_on(folder: Path, tiny: str):
    """Its architecture is taken from it, how it is fitted is the run's own."""
    place = pendulum.saved_model(folder / "model", tiny, model_hidden_dim=9, model_epochs=77)
    config = online.Config(**TINY | {"model": f"{place}#1", "init_steps": 0, "model_joint": False}).resolved()
    assert (config.model_hidden_dim, config.model_epochs) == (9, TINY["model_epochs"])
    trained = config.program()
    shared = trained.shared()
    begin = jax.jit(lambda shared: trained.init(jax.random.key(0), config, shared).fit)
    fit = begin(shared)
    np.testing.assert_array_equal(fit.best.trunks["obs"][0].kernel, shared["model"].networks.trunks["obs"][0].kernel)
    np.testing.assert_array_equal(fit.normaliser.mean, shared["model"].normaliser.mean)
    assert trained.schedule.is_fitted


def test_what_does_not_fit_is_refused_in_a_sentence(folder: Path, place: str, tiny: str):
    other, model = pendulum.saved_policy(folder / "other", obs_dim=2), pendulum.saved_model(folder / "second", tiny)
    for changes, sentence in (
        ({"policy": other}, "acts with 1 numbers on observations of 2, those of --env_name Pendulum-v1 have 1 and 3."),
        ({"policy": model}, "is a dynamics ensemble, not a policy."),
        ({"model": place}, "is a policy, not a dynamics ensemble."),
        ({"policy": f"{place}#2"}, "the artefact has members 0 to 1, got 2."),
        ({"model": model, "env_name": "MountainCarContinuous-v0"}, "predicts from 4 numbers, observations and actions"),
    ):
        with pytest.raises(UserError, match=r"^[^\n]*$") as raised:
            online.Config(**TINY | changes).resolved()
        assert sentence in str(raised.value)

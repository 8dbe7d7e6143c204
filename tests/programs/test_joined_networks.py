"""Programs with networks as an accelerator stores them learn what they learn on a CPU."""

from collections.abc import Callable

import jax
import numpy as np
import pytest

from purejax_bilevel import ContinuousConfig, RegressionConfig, RLConfig, networks
from purejax_bilevel.studies import run as runs
from tests.programs.programs import recorded

SIZES = {"init_steps": 8, "batch_size": 8, "hidden_dim": 8, "model_hidden_dim": 6}


@pytest.mark.parametrize(
    "config",
    [
        RLConfig(agent_type="omd", **SIZES),
        pytest.param(RLConfig(agent_type="vep", no_learn_reward=True, **SIZES), marks=pytest.mark.slow),
        pytest.param(RLConfig(agent_type="mle", prob_model=True, **SIZES), marks=pytest.mark.slow),
        pytest.param(ContinuousConfig(agent_type="omd", env_name="Pendulum-v1", **SIZES), marks=pytest.mark.slow),
    ],
    ids=["omd", "vep", "mle", "sac-omd"],
)
def test_agents(config: RLConfig | ContinuousConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    *_, apart = recorded(config, 14, 20)
    monkeypatch.setattr(networks, "together", lambda: True)
    _, _, state, together = recorded(config, 14, 20)
    assert isinstance(state.learner.q, networks.Joined)
    assert isinstance(state.learner.model, networks.Joined)
    assert float(np.abs(together["q_loss"][0]).sum()) > 0
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), apart, together)


@pytest.mark.slow
def test_regression(monkeypatch: pytest.MonkeyPatch) -> None:
    """So do the steps of the cycle that an accelerator goes through: two without a comparison, one with."""
    config = RegressionConfig(agent_type="aid", T_max=3, n_samples=32, batch_size=8, regret_frequency=3).resolved()
    part = runs.make_part(config, 1, 0)
    own = jax.tree.map(lambda leaf: jax.numpy.asarray(leaf)[0], part.config)

    def after(*steps: Callable[..., tuple]) -> tuple:
        state, functions = part.program.init(jax.random.key(0), own), {step: jax.jit(step) for step in steps}
        for t, step in enumerate(steps):
            state, metrics = functions[step](state, own, jax.numpy.int32(t), ())
        return state, (metrics, state.regret.own, state.regret.constant)

    _, apart = after(*[part.program.update] * 3)
    monkeypatch.setattr(networks, "together", lambda: True)
    (stage,) = part.program.stages
    state, together = after(*(step for count, step in stage.cycle for _ in range(count)))
    assert networks.Joined in map(type, jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, networks.Joined)))
    assert (np.asarray(together[-1]) > 0).all()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), apart, together)

"""What agents and levels are worth, measured: returns of A2C, of the uniform policy and of the best one, minutes each.

Numbers are those of GROOVE's released code. Spread over levels is large, and so are the tolerances.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from purejax_bilevel.configuration import replace
from purejax_bilevel.program import alone
from purejax_bilevel.programs.meta_objectives import meta_test, network, population, worlds
from purejax_bilevel.programs.meta_objectives.agents import weight_shapes
from purejax_bilevel.programs.meta_objectives.learners import Layer
from purejax_bilevel.programs.meta_objectives.settings import ObjectiveTraining
from tests.programs import programs

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("mode", "levels", "share"), [("small", 32, (0.85, 1.0)), ("all_shortlife", 16, (0.5, 0.95))])
def test_a2c_comes_near_the_best_policies(mode: str, levels: int, share: tuple[float, float]) -> None:
    """About 1.08 to 1.12 of 1.24 on `small`, 1.63 of 2.70 on `all_shortlife`; nobody earns more than can be earned."""
    config = meta_test.Config(
        agent_type="a2c", env_name=f"GridWorld-{mode}", level=tuple(range(levels)), eval_frequency=0
    )
    outcome = programs.train(config, 1, devices=2)[1]
    found = np.asarray(outcome.rows[0]["final_return"])[:, -1]
    best = np.array([worlds.make(config.env_name).optimum(params) for params in _params(mode, levels)])
    lowest, highest = share
    assert lowest < found.mean() / best.mean() < highest
    error = np.maximum(found.std(1) / np.sqrt(found.shape[1]), 0.01)
    assert ((found.mean(1) - best) / error < 4).all()


def _params(mode: str, levels: int) -> list[Any]:
    return [worlds.make(f"GridWorld-{mode}-{number}").params for number in range(levels)]


@pytest.mark.parametrize(
    ("mode", "levels", "mean", "tolerance"),
    [("small", 128, 0.2, 0.1), ("all", 64, 0.4, 0.25), ("long_dense", 4, 11.0, 3.0)],
)
def test_the_uniform_policy_earns_little(mode: str, levels: int, mean: float, tolerance: float) -> None:
    world = worlds.make(f"GridWorld-{mode}")
    nothing = (Layer(jnp.zeros((world.build.obs_dim, world.build.num_actions)), None),)

    def earned(key: jax.Array) -> jax.Array:
        level_key, key = jax.random.split(key)
        return worlds.play(world, world.draw(level_key), nothing, key, 16).mean()

    found = jax.jit(jax.vmap(earned))(jax.random.split(jax.random.key(0), levels))
    assert float(found.mean()) == pytest.approx(mean, abs=tolerance)


def test_the_number_of_mini_batches_does_not_matter() -> None:
    """Gradient, agents and terms of four agents at once, two at a time, and one after another."""
    world = worlds.make("GridWorld-small-3")
    sizes = {"env_workers": 3, "train_rollout_len": 5, "lpg_gru_width": 4, "lpg_target_width": 3, "num_agents": 4}
    config = ObjectiveTraining(actor_lr=40.0, critic_lr=4.0, num_agent_updates=3, **sizes)
    weights = network.init(jax.random.key(0), weight_shapes(config))
    keys = jax.random.split(jax.random.key(1), 4)
    lives = jax.vmap(partial(population.born, world, config))(jax.random.split(jax.random.key(2), 4))

    def gradient(parts: int) -> Any:
        own = replace(config, num_mini_batches=parts)
        return jax.jit(alone(lambda lives: population.gradient(world, own, weights, lives, keys)))(lives)

    whole, half, single = map(gradient, (1, 2, 4))
    assert max(np.abs(leaf).max() for leaf in whole[0]) > 1e-3
    for other in (half, single):
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), other, whole)

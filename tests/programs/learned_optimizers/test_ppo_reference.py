"""PPO against recorded runs of the original code: advantages, losses, gradients, and every step of three iterations.

Files are those of `tests/data/open`, and of the folder named by PUREJAX_BILEVEL_REFERENCE_DATA where it has some. The
environment is not needed: rollouts are recorded, and values and log-probabilities are compared with those of the
parameters that this code has reached by then.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from purejax_bilevel.configuration import replace
from purejax_bilevel.programs.learned_optimizers import actor_critic, layout, ppo, update_rules
from purejax_bilevel.programs.learned_optimizers.program import Config
from tests.programs.learned_optimizers.test_open_reference import files, subtree, weights_of

TOLERANCE = 1e-13


def golden_files() -> list[Any]:
    paths = [path for path in files("open_ppo_*.npz") if "rollout0/obs" in np.load(path)]
    assert len(paths) >= 6
    return [pytest.param(path, id=path.stem.removeprefix("open_ppo_")) for path in paths]


@pytest.fixture(params=golden_files())
def golden(request: Any) -> dict[str, np.ndarray]:
    with np.load(request.param) as file:
        return dict(file)


def config_of(golden: dict[str, np.ndarray]) -> Config:
    own = {name.removeprefix("config/"): value.item() for name, value in golden.items() if name.startswith("config/")}
    config = Config(
        num_envs=own["num_envs"],
        num_steps=own["num_steps"],
        num_epochs=own["epochs"],
        num_minibatches=own["minibatches"],
        num_train_steps=own["updates"],
        hidden_dim=own["hidden"],
        activation=own["activation"],
        discount=own["gamma"],
        gae_lambda=own["gae_lambda"],
        clip=own["clip"],
        value_clip=own["clip"],
        value_weight=own["vf_coef"],
        entropy_weight=own["ent_coef"],
        max_gradient_norm=own["max_grad_norm"],
        truncation_is_end=True,
        optimizer=own["optimizer"],
    )
    if own["optimizer"] == "open":
        return replace(config, without="none" if own["noise"] else "noise")
    assert own["optimizer"] == "adam"
    return replace(config, lr=own["adam_lr"], beta1=own["adam_b1"], beta2=own["adam_b2"], epsilon=own["adam_eps"])


def rule_of(golden: dict[str, np.ndarray], config: Config) -> Any:
    weights = weights_of(str(golden["config/weights"])) if config.optimizer == "open" else None
    return update_rules.make(config, weights)


def rollout_of(golden: dict[str, np.ndarray], number: int) -> ppo.Rollout:
    """The recorded experience; the original counts every end of an episode as a termination."""
    own = subtree(golden, f"rollout{number}/")
    done = own["done"].astype(float)
    next_value = np.concatenate([own["value"][1:], own["last_value"][None]])
    values = (own["obs"], own["action"], own["log_prob"], own["value"], next_value, own["reward"], done, done)
    return ppo.Rollout(*map(jnp.asarray, values))


def clues_of(golden: dict[str, np.ndarray], config: Config, params: Any, steps: np.ndarray) -> Any:
    """Of one epoch; with the recorded noise, where there is some."""
    clues = ppo.clues_of(jnp.asarray(steps), config, config.num_train_steps)
    for clock in ("training", "batch"):
        if f"steps/{clock}_prop" in golden:
            np.testing.assert_allclose(clues[f"{clock}_clock"], golden[f"steps/{clock}_prop"][steps], rtol=1e-15)
    if config.optimizer == "open" and golden["config/noise"]:
        drawn = jax.tree.map(lambda leaf: jnp.asarray(leaf[steps]), subtree(golden, "noise/"))
        zeros = jax.tree.map(lambda leaf: jnp.zeros((len(steps), *leaf.shape)), params["critic"])
        clues["noise"] = {"critic": zeros, **drawn}
    return clues


def close(found: Any, expected: Any, tolerance: float = TOLERANCE) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert one.dtype == np.float64
        np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance)


def start_of(golden: dict[str, np.ndarray]) -> Any:
    return jax.tree.map(jnp.asarray, subtree(golden, "init/"))


def test_advantages(golden: dict[str, np.ndarray], float64: Any, strict_promotion: Any) -> None:
    config = config_of(golden)
    batch = jax.jit(lambda rollout: ppo.batch_of(rollout, config))(rollout_of(golden, 0))
    close(batch.advantage, golden["rollout0/advantages"].ravel())
    close(batch.target, golden["rollout0/targets"].ravel())


def test_first_losses_and_gradients(golden: dict[str, np.ndarray], float64: Any, strict_promotion: Any) -> None:
    config, params = config_of(golden), start_of(golden)
    rows = golden["rollout0/permutations"][0].reshape(config.num_minibatches, -1)[0]
    batch = jax.tree.map(lambda leaf: leaf[rows], ppo.batch_of(rollout_of(golden, 0), config))
    gradients, (activations, measured) = jax.jit(jax.grad(lambda p: ppo.loss(p, config, batch), has_aux=True))(params)
    close(gradients, subtree(golden, "step0/grad/"))
    clipped, norms = ppo.clip_each(gradients, config.max_gradient_norm)
    close(clipped, subtree(golden, "step0/grad_clipped/"))
    for network, norm in norms.items():
        name = network.removesuffix("_gradient_norm")
        np.testing.assert_allclose(norm, golden[f"steps/grad_norm_{name}"][0], rtol=TOLERANCE)
        for index, layer in enumerate(layer for layer in params[name] if layer != "log_std"):
            close(activations[name][layer], golden[f"step0/activation/{name}/{index}"])
    for name, entry in (("loss", "total_loss"), ("policy_loss", "actor_loss")):
        np.testing.assert_allclose(measured[name], golden[f"steps/{entry}"][0], rtol=0, atol=TOLERANCE)


def test_every_step_of_a_run(golden: dict[str, np.ndarray], float64: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The original holds the places of layers, such as 1/3, in float32; so does this test."""
    exact = layout._proportions
    monkeypatch.setattr(layout, "_proportions", lambda *given: np.float32(exact(*given)).tolist())
    config = config_of(golden)
    rule, params = rule_of(golden, config), start_of(golden)
    learner = ppo.Learner(params, rule.init(params))
    one_epoch = jax.jit(lambda learner, *others: ppo.epoch(learner, config, rule, *others))
    for number in range(config.num_train_steps):
        rollout = rollout_of(golden, number)
        check_networks(learner.params, rollout, config)
        batch = ppo.batch_of(rollout, config)
        for index, permutation in enumerate(golden[f"rollout{number}/permutations"]):
            first = (number * config.num_epochs + index) * config.num_minibatches
            steps = first + np.arange(config.num_minibatches)
            clues = clues_of(golden, config, params, steps)
            learner, measured = one_epoch(learner, batch, jnp.asarray(permutation), clues)
            check_measured(measured, golden, steps, number, index)
            if number == index == 0:
                close(learner.params, subtree(golden, f"step{steps[-1]}/after/"))
        if number == 0:
            close(learner.params, subtree(golden, "after_update0/"))
    close(learner.params, subtree(golden, "final/"))


def check_networks(params: Any, rollout: ppo.Rollout, config: Config) -> None:
    """Values and log-probabilities were recorded with the parameters of that time."""
    obs = rollout.obs.reshape(-1, rollout.obs.shape[-1])
    close(actor_critic.value(params, obs, config.activation), rollout.value.ravel())
    policy = actor_critic.policy(params, obs, config.activation)
    action = rollout.action.reshape(-1, *rollout.action.shape[2:])
    close(actor_critic.log_prob(policy, action), rollout.log_prob.ravel())


def check_measured(measured: Any, golden: dict[str, np.ndarray], steps: np.ndarray, number: int, epoch: int) -> None:
    recorded = {
        "loss": "total_loss",
        "policy_loss": "actor_loss",
        "value_loss": "value_loss",
        "entropy": "entropy",
        "actor_gradient_norm": "grad_norm_actor",
        "critic_gradient_norm": "grad_norm_critic",
        "update_norm": "param_l2_change",
    }
    for name, entry in recorded.items():
        close(measured[name], golden[f"steps/{entry}"][steps])
    ratio = golden["steps/ratio"][steps]
    np.testing.assert_allclose(measured["clipped_share"], (np.abs(ratio - 1) > 0.2).mean(1))
    np.testing.assert_allclose(measured["divergence"], (ratio - 1 - np.log(ratio)).mean(1), atol=TOLERANCE)
    np.testing.assert_allclose(measured["dormant_share"], golden["metric/dormancy"][number, epoch], rtol=1e-12)


def test_the_files_reach_the_clip() -> None:
    """Else the comparison above would say nothing about it."""
    shares = [(np.abs(np.load(path)["steps/ratio"] - 1) > 0.2).mean() for path in map(Path, files("open_ppo_*adam*"))]
    assert max(shares) > 0.1

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
    rates = {"lr": own["adam_lr"], "beta1": own["adam_b1"], "beta2": own["adam_b2"], "epsilon": own["adam_eps"]}
    return replace(config, **rates, anneal=1.0)


def rule_of(golden: dict[str, np.ndarray], config: Config) -> Any:
    weights = weights_of(str(golden["config/weights"])) if config.optimizer == "open" else None
    return update_rules.make(config, weights)


def rollout_of(golden: dict[str, np.ndarray], number: int) -> ppo.Rollout:
    """The recorded experience; the original counts every end of an episode as a termination."""
    own = subtree(golden, f"rollout{number}/")
    done = own["done"].astype(float)
    next_value = np.concatenate([own["value"][1:], own["last_value"][None]])
    values = (own["obs"], own["action"], own["log_prob"], own["value"], next_value, own["reward"], done, done)
    return ppo.Rollout(*values)


def clues_of(golden: dict[str, np.ndarray], config: Config, params: Any, steps: np.ndarray) -> Any:
    """Of all steps; with the recorded noise, where there is some."""
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


def stacked(golden: dict[str, np.ndarray], config: Config, params: Any) -> Any:
    """For each iteration its rollout, and for each of its epochs the order of the rows and the optimiser's clues."""
    numbers = range(config.num_train_steps)
    rollouts = [rollout_of(golden, number) for number in numbers]
    orders = np.stack([golden[f"rollout{number}/permutations"] for number in numbers])
    shape = (config.num_train_steps, config.num_epochs, config.num_minibatches)
    clues = clues_of(golden, config, params, np.arange(np.prod(shape)))
    clues = jax.tree.map(lambda leaf: leaf.reshape(*shape, *leaf.shape[1:]), clues)
    return jax.tree.map(lambda *leaves: np.stack(leaves), *rollouts), orders, clues


def replayed(golden: dict[str, np.ndarray]) -> tuple[Config, Any]:
    """The recorded run again: gradients of the first minibatch, these clipped, and activations; then networks at the
    start of each iteration, batches, what each epoch leaves and measures."""
    config, params = config_of(golden), start_of(golden)
    rule = rule_of(golden, config)
    recorded = stacked(golden, config, params)

    def iteration(learner: ppo.Learner, given: Any) -> Any:
        rollout, orders, clues = given
        networks = networks_at(learner.params, rollout, config)
        batch = ppo.batch_of(rollout, config)

        def epoch(learner: ppo.Learner, given: Any) -> Any:
            learner, measured = ppo.epoch(learner, config, rule, batch, *given)
            return learner, (learner.params, measured)

        learner, epochs = jax.lax.scan(epoch, learner, (orders, clues))
        return learner, (networks, batch, epochs)

    @jax.jit
    def run(params: Any, recorded: Any) -> Any:
        first, orders, _ = jax.tree.map(lambda leaf: leaf[0], recorded)
        rows = orders[0].reshape(config.num_minibatches, -1)[0]
        batch = jax.tree.map(lambda leaf: leaf[rows], ppo.batch_of(first, config))
        gradients, (activations, _) = jax.grad(ppo.loss, has_aux=True)(params, config, batch)
        clipped = ppo.clip_each(gradients, config.max_gradient_norm)[0]
        start = ppo.Learner(params, rule.init(params))
        return gradients, clipped, activations, jax.lax.scan(iteration, start, recorded)[1]

    return config, run(params, recorded)


def networks_at(params: Any, rollout: ppo.Rollout, config: Config) -> tuple[jax.Array, jax.Array]:
    """Values and log-probabilities of what was recorded, `[steps x envs]`."""
    obs = rollout.obs.reshape(-1, rollout.obs.shape[-1])
    policy = actor_critic.policy(params, obs, config.activation)
    action = rollout.action.reshape(-1, *rollout.action.shape[2:])
    return actor_critic.value(params, obs, config.activation), actor_critic.log_prob(policy, action)


def test_every_step_of_a_run(golden: dict[str, np.ndarray], float64: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The original holds the places of layers, such as 1/3, in float32; so does this test."""
    exact = layout._proportions
    monkeypatch.setattr(layout, "_proportions", lambda *given: np.float32(exact(*given)).tolist())
    config, (gradients, clipped, activations, (networks, batches, (params, measured))) = replayed(golden)
    close(gradients, subtree(golden, "step0/grad/"))
    close(clipped, subtree(golden, "step0/grad_clipped/"))
    for name, layers in activations.items():
        for index, layer in enumerate(layer for layer in layers if layer != "log_std"):
            close(layers[layer], golden[f"step0/activation/{name}/{index}"])
    for number in range(config.num_train_steps):
        own = subtree(golden, f"rollout{number}/")
        close(networks[0][number], own["value"].ravel())
        close(networks[1][number], own["log_prob"].ravel())
        close(batches.advantage[number], own["advantages"].ravel())
        close(batches.target[number], own["targets"].ravel())
    at = lambda *place: jax.tree.map(lambda leaf: leaf[place], params)  # noqa: E731
    close(at(0, 0), subtree(golden, f"step{config.num_minibatches - 1}/after/"))
    close(at(0, -1), subtree(golden, "after_update0/"))
    close(at(-1, -1), subtree(golden, "final/"))
    check_measured(measured, golden)


def check_measured(measured: Any, golden: dict[str, np.ndarray]) -> None:
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
        close(measured[name].ravel(), golden[f"steps/{entry}"])
    ratio = golden["steps/ratio"]
    np.testing.assert_allclose(measured["clipped_share"].ravel(), (np.abs(ratio - 1) > 0.2).mean(1))
    np.testing.assert_allclose(measured["divergence"].ravel(), (ratio - 1 - np.log(ratio)).mean(1), atol=TOLERANCE)
    np.testing.assert_allclose(measured["dormant_share"], golden["metric/dormancy"], rtol=1e-12)


def test_the_files_reach_the_clip() -> None:
    """Else the comparison above would say nothing about it."""
    shares = [(np.abs(np.load(path)["steps/ratio"] - 1) > 0.2).mean() for path in map(Path, files("open_ppo_*adam*"))]
    assert max(shares) > 0.1

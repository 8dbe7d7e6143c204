"""Golden numbers: losses, gradients and inner solutions of the reference implementations, in float64.

Every `*.npz` in `tests/data/`, or in the folder named by PUREJAX_BILEVEL_REFERENCE_DATA, is compared entry by entry:
whatever a file says under `out/` must be reproduced, for any widths, batch sizes and numbers of inner steps found in
it. Files whose name starts with `mbrl_` hold model-based agents, `nsr_` non-stationary regression. Those in the folder
`sac` hold two consecutive updates of OMD's code for continuous control: whole agents are run on them, in the treatment
of the preset `omd_continuous_original`.

"Reproduced" means to 1e-8 of the largest entry of an array (its small entries are sums that cancel); to 1e-6 for the
regression agent aid, whose conjugate gradients amplify rounding; and as `check_iterative_hypergradient` says for
conjugate gradients on an indefinite Hessian. That check is blunt: a damping of 1.1e-5 instead of 1e-5, or a Hessian
wrong by 1e-4, passes it. `programs/control/test_agents.py` has a sharp one, and cases for the settings without files.
"""

import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from purejax_bilevel.bilevel import implicit
from purejax_bilevel.configuration import replace
from purejax_bilevel.networks import Heads, Layer, Network
from purejax_bilevel.programs.control import agents, learners, soft_actor_critic, soft_actor_critic_agents
from purejax_bilevel.programs.control.q_learning import Config
from purejax_bilevel.programs.regression import agents as regression_agents
from purejax_bilevel.programs.regression import program as regression
from purejax_bilevel.replay import Batch
from purejax_bilevel.studies import presets

FOLDER = Path(os.environ.get("PUREJAX_BILEVEL_REFERENCE_DATA", Path(__file__).parent / "data"))
TOLERANCE, ITERATIVE_TOLERANCE = 1e-8, 1e-5
# The reference calls its reward-only rule funcBO.
AGENTS = {"funcBO": "funcbo_reward_only", "omd": "omd", "mle": "mle", "vep": "vep"}
BILEVEL = {"omd": agents.hypergradient_omd, "funcbo_reward_only": agents.hypergradient_reward_only}

Entries = dict[str, np.ndarray]


def files(prefix: str) -> list[Path]:
    return sorted(FOLDER.glob(f"{prefix}*.npz"))


def test_there_are_golden_files():
    assert files("mbrl_") or files("nsr_"), f"no mbrl_*.npz or nsr_*.npz in {FOLDER}"


@pytest.mark.parametrize("path", files("mbrl_"), ids=lambda path: path.stem)
def test_model_based(path: Path, float64: Any):
    golden = dict(np.load(path))
    computed = jax.jit(lambda: model_based_outputs(golden))()
    expected = {name: value for name, value in golden.items() if name.startswith("out/")}
    assert expected
    for name, value in expected.items():
        assert name in computed, f"{path.name} has {name}, which nothing here computes"
        if not (golden["config/inverse_jacobian"] and name.startswith("out/outer_grad/")):
            assert_close(computed[name], value, TOLERANCE, f"{path.name} {name}")
    if golden["config/inverse_jacobian"]:
        gradients = {name: value for name, value in expected.items() if name.startswith("out/outer_grad/")}
        check_iterative_hypergradient(golden, gradients, path.name)


def assert_close(computed: Any, expected: np.ndarray, tolerance: float, message: str) -> None:
    """Relative to the largest entry of the array, so that entries that cancel to rounding level do not count."""
    computed = np.asarray(computed)
    assert computed.shape == expected.shape, f"{message}: shape {computed.shape}, expected {expected.shape}"
    assert computed.dtype == np.float64, f"{message}: not computed in float64"
    scale = max(np.abs(expected).max(), 1e-300)
    error = np.abs(computed - expected).max() / scale if expected.any() else np.abs(computed).max()
    assert error <= tolerance, f"{message}: relative error {error:.2e}"


def model_based_outputs(golden: Entries) -> dict[str, Any]:
    config = reference_config(golden)
    batch = reference_batch(golden)
    learner = reference_learner(golden, config)
    predicted = agents.predict(config, learner.model, batch)
    loss, gradient = jax.value_and_grad(lambda q: agents.q_loss(config, q, learner.target_q, batch))(learner.q)
    out = {
        "loss_q_real": loss,
        **heads_entries("grad_q_real", gradient, "q"),
        "model_next_obs": predicted.next_obs.T,
        "model_reward": predicted.reward[:, None],
        "model_mse": agents.model_error(predicted, batch),
    }
    if config.agent_type in BILEVEL:
        out |= bilevel_outputs(config, learner, batch, predicted)
    else:
        out |= predictive_outputs(config, learner, batch)
    return {f"out/{name}": value for name, value in out.items()}


def bilevel_outputs(config: Config, learner: agents.Learner, batch: Batch, predicted: Batch) -> dict[str, Any]:
    learner, losses = agents.solve_inner(config, learner, predicted, jax.random.key(0))
    outer_losses, gradient, learner = BILEVEL[config.agent_type](config, learner, batch)
    return {
        "outer_loss": outer_losses["model_loss"],
        "inner_loss": losses["q_loss"],
        **model_entries("outer_grad", gradient),
        **heads_entries("q_after", learner.q, "q"),
        **heads_entries("target_q_after", learner.target_q, "q"),
    }


def predictive_outputs(config: Config, learner: agents.Learner, batch: Batch) -> dict[str, Any]:
    objective = agents.likelihood_loss if config.agent_type == "mle" else agents.value_equivalence_loss

    def loss_of(model: agents.Model) -> jax.Array:
        return objective(config, learner.replace(model=model), batch, agents.predict(config, model, batch))

    loss, gradient = jax.value_and_grad(loss_of)(learner.model)
    return {"outer_loss": loss, **model_entries("outer_grad", gradient)}


# --- conjugate gradients on an indefinite Hessian ---------------------------------------------------------------------

NUM_PERTURBED = 300
MOST_DEVIATIONS = 15.0  # measured: the golden vector 1.5; a damping of 1e-6 instead of 1e-5 42; 1.001 x golden 90


def check_iterative_hypergradient(golden: Entries, expected: Entries, message: str) -> None:
    """Compares a hypergradient found by conjugate gradients to 1e-5 wherever its inputs determine it that well.

    The Hessian may be indefinite: then 100 iterations do not converge, and a change of the right-hand side by 1e-15
    moves some directions of the result by tens of per cent. What the inputs do determine is found by solving with many
    such changes: along every direction the golden vector must lie within their spread, and it must lie in the range of
    the cross derivative.
    """
    config, batch = reference_config(golden), reference_batch(golden)
    learner = reference_learner(golden, config)
    learner, _ = agents.solve_inner(config, learner, agents.predict(config, learner.model, batch), jax.random.key(0))
    q, target_q = learner.q, learner.target_q
    right_side, unravel = ravel_pytree(jax.grad(lambda q: agents.q_loss(config, q, target_q, batch))(q))

    def inner_loss(model: agents.Model, q: Heads) -> jax.Array:
        return agents.q_loss(config, q, target_q, agents.predict(config, model, batch))

    def flat(model: agents.Model) -> jax.Array:
        return jnp.concatenate([jnp.ravel(leaf) for leaf in model_entries("", model).values()])

    def along(adjoint: jax.Array) -> jax.Array:
        return flat(implicit.minimum_hypergradient(inner_loss, learner.model, q, unravel(adjoint)))

    def hessian_product(x: jax.Array) -> jax.Array:
        return ravel_pytree(jax.jvp(jax.grad(lambda q: inner_loss(learner.model, q)), (q,), (unravel(x),))[1])[0]

    identity = jnp.eye(right_side.size)
    hessian, cross = jax.jit(jax.vmap(hessian_product))(identity), jax.jit(jax.vmap(along))(identity)
    solve = agents.linear_solver(config)

    def targets(model: agents.Model) -> jax.Array:
        return agents.bellman_target(config, target_q, agents.predict(config, model, batch))

    names = [f"out/outer_grad{name}" for name in model_entries("", learner.model)]
    assert set(names) == set(expected), f"{message}: other entries of the outer gradient than expected"
    gold = np.concatenate([expected[name].ravel() for name in names])
    size = np.linalg.norm(gold)

    # The hypergradient is a combination of the gradients of the batch's Bellman targets.
    jacobian = jax.jit(jax.jacrev(targets))(learner.model)
    columns = [np.asarray(leaf).reshape(batch.reward.shape[0], -1) for leaf in model_entries("", jacobian).values()]
    left, singular, _ = np.linalg.svd(np.concatenate(columns, 1).T, full_matrices=False)
    basis = left[:, singular > 1e-12 * singular[0]]
    outside = np.linalg.norm(gold - basis @ (basis.T @ gold)) / size
    assert outside <= 1e-10, (
        f"{message}: {outside:.1e} of the hypergradient lies outside the range of the cross derivative"
    )

    noise = jax.random.normal(jax.random.key(1), (NUM_PERTURBED, right_side.size))
    solve_perturbed = jax.jit(
        jax.vmap(lambda change: solve(lambda x: hessian @ x, right_side * (1.0 + 1e-15 * change)))
    )
    runs = np.asarray(solve_perturbed(noise) @ cross)
    deviation = np.linalg.norm(runs - np.median(runs, 0), axis=1)
    runs = runs[deviation <= size]  # a few solves blow up
    assert len(runs) > 0.9 * NUM_PERTURBED
    centre = runs.mean(0)
    _, spread, directions = np.linalg.svd((runs - centre) @ basis / np.sqrt(len(runs)), full_matrices=False)
    own = np.asarray(jax.jit(lambda: flat(agents.hypergradient_omd(config, learner, batch)[1]))())
    if spread[0] < 1e-6 * size:  # well conditioned: one answer
        error = np.abs(own - gold).max() / np.abs(gold).max()
        assert error <= ITERATIVE_TOLERANCE, f"{message}: relative error {error:.2e}"
        return
    for whose, vector in (("golden", gold), ("our", own)):
        difference = directions @ (basis.T @ (vector - centre))
        deviations = np.abs(difference) / np.maximum(spread, 1e-10 * size)
        assert deviations.max() <= MOST_DEVIATIONS, f"{message}: {whose} solution {deviations.max():.1f} deviations off"
    difference = directions @ (basis.T @ (gold - own))
    determined = spread < 1e-6 * size
    error = np.linalg.norm(difference[determined]) / size
    assert error <= ITERATIVE_TOLERANCE, f"{message}: relative error {error:.2e} where the inputs determine the result"


# --- reading ----------------------------------------------------------------------------------------------------------


def reference_config(golden: Entries) -> Config:
    setting = {
        name.removeprefix("config/"): value.item() for name, value in golden.items() if name.startswith("config/")
    }
    with_inv_jac = "cg" if setting.pop("inverse_jacobian") else "identity"
    agent_type = AGENTS[setting.pop("agent_type")]
    return Config(
        agent_type=agent_type,
        with_inv_jac=with_inv_jac,
        max_hidden_dim=setting["hidden_dim"],
        max_model_hidden_dim=setting["model_hidden_dim"],
        **setting,
    )


def reference_batch(golden: Entries) -> Batch:
    action = golden["batch/action"][:, 0].astype(int)
    num_actions = golden["q/q1/2/w"].shape[1]
    return Batch(
        obs=jnp.asarray(golden["batch/obs"].T),
        action=jnp.asarray(np.eye(num_actions)[action].T),
        reward=jnp.asarray(golden["batch/reward"][:, 0]),
        next_obs=jnp.asarray(golden["batch/next_obs"].T),
        terminated=jnp.asarray(1.0 - golden["batch/not_done_no_max"][:, 0]),
    )


def reference_learner(golden: Entries, config: Config) -> agents.Learner:
    q = read_heads(golden, "q", "q")
    reward = None if config.no_learn_reward else read_network(golden, "model/reward")
    model = agents.Model(read_network(golden, "model/next_obs"), reward)
    return agents.Learner(
        q=q,
        target_q=read_heads(golden, "target_q", "q"),
        q_optimizer=agents.q_optimizer(config).init(q),
        model=model,
        model_optimizer=agents.model_optimizer(config).init(model),
        values=read_heads(golden, "value", "v") if config.agent_type == "vep" else None,
        dual=None,
        dual_optimizer=None,
    )


def read_network(golden: Entries, prefix: str) -> Network:
    depth = len([name for name in golden if name.startswith(f"{prefix}/") and name.endswith("/w")])
    return tuple(
        Layer(jnp.asarray(golden[f"{prefix}/{i}/w"]), jnp.asarray(golden[f"{prefix}/{i}/b"])) for i in range(depth)
    )


def read_heads(golden: Entries, prefix: str, letter: str) -> Heads:
    names = sorted({name.split("/")[1] for name in golden if name.startswith(f"{prefix}/{letter}")})
    return tuple(read_network(golden, f"{prefix}/{name}") for name in names)


# --- writing ----------------------------------------------------------------------------------------------------------


def network_entries(prefix: str, network: Network) -> dict[str, Any]:
    layers = enumerate(network)
    return {f"{prefix}/{i}/{letter}": array for i, layer in layers for letter, array in zip("wb", layer, strict=True)}


def heads_entries(prefix: str, heads: Heads, letter: str) -> dict[str, Any]:
    entries: dict[str, Any] = {}
    for index in range(len(heads)):
        entries |= network_entries(f"{prefix}/{letter}{index + 1}", heads[index])
    return entries


def model_entries(prefix: str, model: agents.Model) -> dict[str, Any]:
    entries = network_entries(f"{prefix}/next_obs", model.next_obs)
    return entries if model.reward is None else entries | network_entries(f"{prefix}/reward", model.reward)


# --- continuous control -----------------------------------------------------------------------------------------------

# Measured: 1.7e-15. The original's gradients are twice (critic) and four times (model of omd) those here, so that
# Adam's eps is another share of them: with eps as it is, 2.8e-7.
CONTINUOUS_TOLERANCE, OTHER_EPS_TOLERANCE = 1e-14, 1e-6


@pytest.mark.parametrize("same_eps", [True, False])
@pytest.mark.parametrize("agent_type", ["omd", "mle"])
def test_continuous_control(agent_type: str, same_eps: bool, float64: Any, monkeypatch: pytest.MonkeyPatch):
    golden = dict(np.load(FOLDER / "sac" / f"sac_{agent_type}.npz"))
    config = continuous_config(golden, agent_type)
    if same_eps:
        model_eps = 0.25e-8 if agent_type == "omd" else 1e-8
        for module in (agents, learners):
            monkeypatch.setattr(module, "q_optimizer", lambda config: optax.adam(config.inner_lr, eps=0.5e-8))
            monkeypatch.setattr(
                module, "model_optimizer", lambda config: with_step(optax.adam(config.lr, eps=model_eps))
            )
    learner = continuous_learner(golden, config)
    for update in (1, 2):
        learner, losses = continuous_update(golden, config, learner, update, monkeypatch)
        computed = continuous_entries(learner, losses, agent_type)
        for name, value in computed.items():
            tolerance = CONTINUOUS_TOLERANCE if same_eps else OTHER_EPS_TOLERANCE
            assert_close(value, expected_of(golden, update, name), tolerance, f"{agent_type} {update} {name}")


def with_step(optimizer: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    return optax.with_extra_args_support(optimizer)


def continuous_config(golden: Entries, agent_type: str) -> soft_actor_critic.Config:
    settings = presets.preset("omd_continuous_original", "smoke")["settings"]
    setting = {name.removeprefix("config/"): value.item() for name, value in golden.items() if "config/" in name}
    assert bool(setting.pop("is_omd")) == (agent_type == "omd")
    for name in ("lr", "inner_lr", "discount", "tau"):  # the preset's own values are those of the original
        assert settings.get(name, getattr(soft_actor_critic.Config, name)) == setting[name]
    widths = {name: int(setting.pop(name)) for name in ("hidden_dim", "model_hidden_dim")}
    config = soft_actor_critic.Config(agent_type=agent_type, **{**settings, **setting, **widths}).resolved()
    return replace(config, **{f"max_{name}": width for name, width in widths.items()})


def continuous_learner(golden: Entries, config: soft_actor_critic.Config) -> soft_actor_critic_agents.Learner:
    learner = soft_actor_critic_agents.init_learner(config, jax.random.key(0), 3, 1)
    q, model, policy = read_heads(golden, "q", "q"), read_network(golden, "model"), read_network(golden, "policy")
    assert jax.tree.map(jnp.shape, (q, model, policy)) == jax.tree.map(
        jnp.shape, (learner.q, learner.model, learner.policy)
    )
    return learner.replace(
        q=q,
        target_q=read_heads(golden, "target_q", "q"),
        model=model,
        policy=policy,
        log_temperature=jnp.asarray(golden["log_temperature"]),
    )


def continuous_update(
    golden: Entries, config: soft_actor_critic.Config, learner: Any, update: int, monkeypatch: pytest.MonkeyPatch
) -> tuple[Any, dict[str, Any]]:
    """One update on the file's batch, with the file's noise where the agent draws its own, in that order."""
    entry = lambda name: jnp.asarray(golden[f"batch{update}/{name}"])  # noqa: E731
    omd = config.agent_type == "omd"
    names = ("critic", "policy", "outer") if omd else ("critic", "policy")
    noise = {name: jnp.asarray(golden[f"noise{update}/{name}"]).T for name in names}
    nothing = jnp.full_like(noise["critic"], jnp.nan)  # drawn and never used
    drawn = [nothing] * (1 if omd else 2) + list(noise.values())
    batch = Batch(entry("obs").T, entry("action").T, entry("reward"), entry("next_obs").T, 1.0 - entry("mask"))
    monkeypatch.setattr(
        soft_actor_critic_agents, "with_new_noise", lambda batch, key: batch._replace(noise=drawn.pop(0))
    )
    agent = soft_actor_critic_agents.AGENTS[config.agent_type].step
    draw = lambda key: batch._replace(noise=nothing)  # noqa: E731
    result = jax.jit(lambda learner: agent(config, learner, draw, jax.random.key(0), jnp.int32(update)))(learner)
    assert not drawn
    return result


def continuous_entries(learner: Any, losses: dict[str, Any], agent_type: str) -> dict[str, Any]:
    """What the files hold, in the originals' scale: their critic's loss is twice ours, their hypergradient four
    times."""
    is_omd = agent_type == "omd"
    return {
        "critic_loss": 2 * losses["q_loss"],
        "norm of grad/q/": 2 * losses["q_gradient_norm"],
        "model_loss": (1 + is_omd) * losses["model_loss"],
        "norm of grad/model/": (1 + 3 * is_omd) * losses["model_gradient_norm"],
        "policy_loss": losses["policy_loss"],
        "norm of grad/policy/": losses["policy_gradient_norm"],
        "entropy": losses["entropy"],
        "temperature": losses["temperature"],
        **network_entries("after/model", learner.model),
        **heads_entries("after/q", learner.q, "q"),
        **heads_entries("after/target_q", learner.target_q, "q"),
        **network_entries("after/policy", learner.policy),
        "after/log_temperature": learner.log_temperature,
    }


def expected_of(golden: Entries, update: int, name: str) -> np.ndarray:
    if not name.startswith("norm of "):
        return golden[f"out{update}/{name}"]
    prefix = f"out{update}/{name.removeprefix('norm of ')}"
    return np.sqrt(sum((value**2).sum() for key, value in golden.items() if key.startswith(prefix)))


# --- non-stationary regression ----------------------------------------------------------------------------------------

REGRESSION_TOLERANCES = {"aid": 1e-6}  # conjugate gradients amplify rounding; measured on nsr_aid.npz: 1e-10


@pytest.mark.parametrize("path", files("nsr_"), ids=lambda path: path.stem)
def test_regression(path: Path, float64: Any):
    golden = dict(np.load(path))
    config = regression_config(golden)
    computed = regression_outputs(golden, config)
    expected = {name: value for name, value in golden.items() if name.startswith("out/")}
    assert expected
    tolerance = REGRESSION_TOLERANCES.get(config.agent_type, TOLERANCE)
    for name, value in expected.items():
        assert name in computed, f"{path.name} has {name}, which nothing here computes"
        assert_close(computed[name], value, tolerance, f"{path.name} {name}")


def regression_config(golden: Entries) -> regression.Config:
    setting = {
        name.removeprefix("config/"): value.item() for name, value in golden.items() if name.startswith("config/")
    }
    setting["agent_type"] = setting["agent_type"].lower()
    setting["reference_dual"] = setting["agent_type"].startswith("funcbo")
    config = regression.Config(
        **setting,
        max_hidden_dim=setting["hidden_dim"],
        max_window_size=setting["window_size"],
        grad_buffer_size=1,
        max_grad_buffer_size=1,
    )
    return config.resolved()


def regression_outputs(golden: Entries, config: regression.Config) -> Entries:
    """The window's targets are given here, one block per past time, all on the same inputs."""
    x_inner, y_inner, lags = (split_blocks(golden, golden[f"batch/{name}"]) for name in ("x_inner", "y_inner", "lag"))
    assert (x_inner == x_inner[0]).all()
    slots = lags[:, 0].astype(int) - 1
    weights, targets = jnp.asarray(golden["lambda"])[slots], jnp.asarray(y_inner.swapaxes(1, 2))
    data = regression_agents.Data(
        jnp.asarray(x_inner[0].T), jnp.asarray(golden["batch/x_outer"].T), jnp.asarray(golden["batch/y_outer"].T)
    )
    summary = regression_agents.Summary(weights.sum(), jnp.tensordot(weights, targets, 1))
    agent = jax.jit(lambda *arguments: regression_agents.AGENTS[config.agent_type].step(config, *arguments))
    step, learner = agent(regression_learner(golden, config), data, summary)
    by_block = step.gradient.weight + jnp.tensordot(targets, step.gradient.target, 2)
    constant = weights @ (targets**2).sum(1).mean(1)
    out = {
        "outer_loss": step.outer_loss,
        "inner_loss": step.inner_loss + constant,
        "hypergradient": jnp.zeros(golden["lambda"].shape).at[slots].add(by_block),
        **network_entries("inner_after/mlp", learner.inner),
    }
    return {f"out/{name}": np.asarray(value) for name, value in out.items()}


def split_blocks(golden: Entries, array: np.ndarray) -> np.ndarray:
    """`[blocks * batch, ...]` to `[blocks, batch, ...]`, in the order of the block numbers."""
    blocks = golden["batch/block"].reshape(-1)
    return np.stack([array[blocks == block] for block in np.unique(blocks)])


def regression_learner(golden: Entries, config: regression.Config) -> regression_agents.Learner:
    inner = read_network(golden, "inner/mlp")
    dual = read_network(golden, "dual/mlp") if config.agent_type.startswith("funcbo") else None
    weights = jnp.asarray(golden["lambda"])
    return regression_agents.Learner(
        inner=inner,
        inner_optimizer=regression_agents.inner_optimizer(config).init(inner),
        dual=dual,
        dual_optimizer=None if dual is None else regression_agents.dual_optimizer(config).init(dual),
        weights=weights,
        outer_optimizer=regression_agents.outer_optimizer(config).init(weights),
    )

"""Every agent for continuous actions: alone, as a member of a grid, sharded over eight devices, in chunks and resumed;
its losses and hypergradients against others written out by hand.

Programs are tiny; what is compared is the whole state and every recorded number.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from jax.flatten_util import ravel_pytree

import train_rl
from purejax_bilevel import load_policy
from purejax_bilevel.configuration import replace
from purejax_bilevel.errors import UserError
from purejax_bilevel.programs.control import acting, agents, q_learning, soft_actor_critic, soft_actor_critic_agents
from purejax_bilevel.programs.control.soft_actor_critic import Config
from purejax_bilevel.programs.control.soft_actor_critic_agents import Learner
from purejax_bilevel.programs.tabular import program as tabular
from purejax_bilevel.replay import Batch
from purejax_bilevel.runtime import artefacts, outcomes
from purejax_bilevel.runtime.devices import make_mesh
from purejax_bilevel.studies import command_line
from tests.programs.programs import (
    check_resume_is_bitwise,
    count_conds,
    initial_learners,
    mostly,
    moved,
    own_run,
    recorded,
    step,
    train,
)

pytestmark = pytest.mark.usefixtures("compiled_once")

STEPS = 60
SMALL = Config(
    num_train_steps=STEPS,
    init_steps=16,
    batch_size=16,
    capacity=40,
    eval_frequency=20,
    eval_episodes=2,
    final_eval_episodes=3,
    lr=1e-3,
    inner_lr=(1e-3, 3e-3),
    num_Q_steps=1,
    hidden_dim=5,
    model_hidden_dim=(2, 4),
)
VARIANTS: dict[str, dict[str, Any]] = {
    "omd": {"agent_type": "omd", "hidden_dim": (3, 5), "inner_lr": 1e-3},
    "sac": {"agent_type": "sac", "hidden_dim": (3, 5), "model_hidden_dim": 4},
    "mle": {"agent_type": "mle", "num_T_steps": 2},
    "vep": {"agent_type": "vep", "dim_distract": 2},
    "funcbo": {"agent_type": "funcbo", "warm_opt": True},
    "smoothfbo": {"agent_type": "smoothfbo", "smoothing_window": (2, 9), "num_dual_Q_steps": 2, "inner_lr": 1e-3},
    "omd_copies": {
        "agent_type": "omd",
        "with_inv_jac": "cg",
        "solver_steps": 3,
        "no_warm": True,
        "num_Q_steps": 2,
        "num_envs": 3,
        "updates_per_step": 2,
        "capacity": 60,
        "smoothing": "ema",
    },
    "omd_as_the_original": {
        "agent_type": "omd",
        "warm_opt": True,
        "num_Q_steps": 2,
        "policy_with_critic": True,
        "one_batch": True,
        "separate_noise": True,
        "separate_policy_heads": True,
    },
}


# By omd, and in test_q_learning.py and tests/test_reference.py.
COVERED = ("mle", "vep", "funcbo", "smoothfbo", "omd_copies", "omd_as_the_original")


@pytest.fixture(scope="module", params=mostly(VARIANTS, COVERED), ids=str)
def trained(request: pytest.FixtureRequest) -> tuple[Config, Any, outcomes.Outcome]:
    """Two model widths, two other settings, two seeds, in two chunks; omd on eight devices."""
    config = replace(SMALL, **VARIANTS[request.param])
    return config, *train(config, chunks=2, devices=8 if request.param == "omd" else 1)


def test_runs_in_one_compilation(trained: tuple):
    config, part, outcome = trained
    assert outcome.num_traces == 1
    assert outcome.steps == STEPS
    assert not outcome.failed[0].any()
    rows = outcome.rows[0]
    measured = {measure.name for measure in part.program.measures}
    if config.agent_type == "sac":
        measured -= {"model_loss", "model_gradient_norm", "model_error"}
    if part.config.with_inv_jac == "identity":
        measured -= {"solver_residual"}
    assert set(rows) == measured
    assert rows["evaluation_return"].shape == (len(part.grid), 3)
    for name in measured - {"training_return", "final_return"}:
        assert np.isfinite(rows[name]).all(), name
    played = np.isfinite(rows["final_return"]).sum(-1)
    np.testing.assert_array_equal(played, np.broadcast_to([2, 2, 3], played.shape))


def test_every_trainable_leaf_moves_and_fixed_ones_do_not(trained: tuple):
    _, part, outcome = trained
    start, end = initial_learners(part), outcome.state[0][0].learner
    for name in ("q", "policy", "log_temperature", "model"):
        pairs = zip(jax.tree.leaves(getattr(start, name)), jax.tree.leaves(getattr(end, name)), strict=True)
        for first, last in pairs:
            assert not np.any(np.all(first == last, axis=tuple(range(1, last.ndim)))), name  # in no member
    assert moved(start.target_q, end.target_q)
    assert (start.model is None) == (part.config.agent_type == "sac")
    assert start.values is None or not moved(start.values, end.values)
    assert start.dual is None or moved(start.dual, end.dual)


def test_seeds_act_differently(trained: tuple):
    state = trained[2].state[0][0]
    assert not np.array_equal(state.storage[0], state.storage[1])


@pytest.mark.slow  # networks of a traced width and devices are those of test_q_learning.py
@pytest.mark.parametrize("trained", soft_actor_critic_agents.AGENTS, indirect=True)
def test_narrow_member_equals_a_run_of_its_own(trained: tuple):
    """The narrowest member of a grid on eight devices in the widest one's arrays, and alone in its own arrays."""
    config, part, outcome = trained
    single = own_run(config, part, 0)
    for name, array in single.rows[0].items():
        np.testing.assert_allclose(array[0], outcome.rows[0][name][0], rtol=2e-3, atol=1e-5, err_msg=name)
    storage = single.state[0][0].storage[0]
    np.testing.assert_allclose(storage, outcome.state[0][0].storage[0], rtol=1e-3, atol=1e-4)


@pytest.mark.slow  # and so is the map over members
@pytest.mark.parametrize("trained", ["omd"], indirect=True)
def test_vmapped_members_agree(trained: tuple):
    config, _, one_by_one = trained
    _, together = train(config, member_batch=0)
    for name in ("q_loss", "policy_loss", "model_loss"):
        np.testing.assert_allclose(together.rows[0][name], one_by_one.rows[0][name], rtol=2e-3)


@pytest.mark.slow  # as in test_q_learning.py
def test_step_counter_stays_shared_under_vmap():
    config = replace(SMALL, smoothing="window", smoothing_window=9, num_envs=2)
    mesh = make_mesh(1, 1)
    assert count_conds(config, 4, None, mesh) == count_conds(config, 1, 1, mesh) >= 3


@pytest.mark.slow  # the loop is that of test_q_learning.py
def test_resume_is_bitwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = replace(SMALL, agent_type="omd", smoothing="window", smoothing_window=9, num_envs=2, model_hidden_dim=4)
    check_resume_is_bitwise(config, tmp_path, monkeypatch)


# --- the original's treatment (whole updates: tests/test_reference.py) ------------------------------------------------


def one_update(problem: tuple, **changes: Any) -> tuple[Learner, int]:
    """The learner after an update, and how many batches it drew."""
    config, learner, batch = problem
    config, drawn = replace(config, **changes), []

    def draw(key: jax.Array) -> Batch:
        drawn.append(key)
        return soft_actor_critic_agents.with_new_noise(batch, key)

    agent = soft_actor_critic_agents.AGENTS[config.agent_type].step
    after, _ = jax.jit(lambda learner: agent(config, learner, draw, jax.random.key(5), jnp.int32(0)))(learner)
    return after, len(drawn)


@pytest.mark.parametrize(("agent_type", "batches"), [("omd", 2), ("mle", 3), ("sac", 2)])
def test_one_batch_serves_a_whole_update(problem: tuple, agent_type: str, batches: int):
    assert one_update(problem, agent_type=agent_type)[1] == batches
    assert one_update(problem, agent_type=agent_type, one_batch=True)[1] == 1


@pytest.mark.parametrize("agent_type", ["omd", "mle", "sac"])
def test_policy_and_temperature_step_once_or_with_each_critic_step(problem: tuple, agent_type: str):
    for with_critic in (False, True):
        changes = {"agent_type": agent_type, "num_Q_steps": 3, "warm_opt": True, "policy_with_critic": with_critic}
        after, _ = one_update(problem, **changes)
        assert int(after.q_optimizer[0].count) == 3
        assert int(after.policy_optimizer[0].count) == int(after.temperature_optimizer[0].count) == (1, 3)[with_critic]


def test_noise_of_the_outer_loss_is_shared_unless_separate(problem: tuple):
    """Adam's first moment of the model holds its first hypergradient."""
    moments = [one_update(problem, separate_noise=separate)[0].model_optimizer[0].mu for separate in (False, True)]
    assert moved(*moments)


def test_policy_heads_start_as_one_layer_or_as_two():
    config = replace(SMALL, inner_lr=1e-3, hidden_dim=3, model_hidden_dim=3).resolved()
    config = replace(config, max_hidden_dim=6, max_model_hidden_dim=3)
    for separate in (False, True):
        own = replace(config, separate_policy_heads=separate)
        kernel = np.asarray(soft_actor_critic_agents.init_policy(own, jax.random.key(1), 3, 1)[-1].kernel)
        assert not kernel[3:].any()  # units beyond the width
        means_by_deviations = kernel[:, 0] @ kernel[:, 1]
        np.testing.assert_allclose(np.linalg.norm(kernel, axis=0), 2.0**0.5 if separate else 1.0, rtol=1e-5)
        assert (abs(means_by_deviations) > 1e-3) == separate


# --- data -------------------------------------------------------------------------------------------------------------

LIMIT = 5


@pytest.fixture(scope="module")
def interrupted() -> tuple[Config, soft_actor_critic.ActorCritic, acting.State, dict[str, Any]]:
    """Two copies of Pendulum with a time limit of 5 steps, after 23 steps of which 11 had three updates each."""
    config = Config(
        agent_type="sac",
        num_envs=2,
        updates_per_step=3,
        init_steps=12,
        batch_size=8,
        hidden_dim=3,
        model_hidden_dim=3,
        capacity=31,
        num_train_steps=23,
    )
    return recorded(config, 23, LIMIT)


def test_time_limits_are_not_terminations(interrupted: tuple):
    """What is stored is the observation before the reset, from which the target bootstraps."""
    config, _, state, metrics = interrupted
    assert config.capacity == 32
    rows = np.asarray(state.storage).reshape(16, 2, -1)
    steps = np.arange(7, 23)  # the last 16 of 23 steps, two copies each
    rows = rows[steps % 16]
    obs, next_obs, terminated = rows[..., :3], rows[..., 3:6], rows[..., -1]
    assert not terminated.any()
    goes_on = (steps[:-1] + 1) % LIMIT != 0
    np.testing.assert_allclose(next_obs[:-1][goes_on], obs[1:][goes_on], rtol=1e-6)
    assert np.abs(next_obs[:-1][~goes_on] - obs[1:][~goes_on]).max(-1).min() > 1e-3
    angle, turned = (np.arctan2(x[..., 1], x[..., 0]) for x in (obs, next_obs))
    moved_by = (turned - angle + np.pi) % (2 * np.pi) - np.pi
    np.testing.assert_allclose(moved_by, 0.05 * next_obs[..., 2], atol=1e-4)  # the physics go on across the limit
    np.testing.assert_array_equal(metrics["training_return"][1], np.where((np.arange(23) + 1) % LIMIT == 0, 2, 0))
    ended = [r for r, count in zip(*map(np.asarray, metrics["training_return"]), strict=True) if count]
    first, second = (rows[i : i + LIMIT, :, -2].sum() for i in (3, 8))  # the episodes of steps 10-14 and 15-19
    np.testing.assert_allclose(ended[2:4], [first, second], rtol=1e-5)


def test_updates_and_copies_are_counted(interrupted: tuple):
    _, _, state, metrics = interrupted
    for optimizer in (state.learner.q_optimizer, state.learner.policy_optimizer, state.learner.temperature_optimizer):
        assert int(optimizer[0].count) == 3 * 11
    np.testing.assert_array_equal(metrics["q_loss"][1], np.arange(23) >= 12)
    assert state.obs.shape == (2, 3)
    assert not np.allclose(state.obs[0], state.obs[1])


def test_batches_hold_every_copy_of_the_latest_steps(interrupted: tuple):
    config, program, state, _ = interrupted
    draw = jax.jit(lambda key: program._draw(state.storage, replace(config, batch_size=500), jnp.int32(22), key))
    batch = draw(jax.random.key(3))
    drawn = np.unique(np.asarray(batch.reward))
    np.testing.assert_array_equal(drawn, np.unique(np.asarray(state.storage)[:, -2]))
    assert batch.noise.shape == batch.action.shape == (1, 500)
    assert np.abs(batch.action).max() <= 1
    # Before the buffer is full: the rows of steps 0 to 5, two each, and none of those not yet written.
    numbered = jnp.zeros_like(state.storage).at[:12, -2].set(jnp.arange(1.0, 13.0))
    batch = program._draw(numbered, replace(config, batch_size=500), jnp.int32(5), jax.random.key(4))
    np.testing.assert_array_equal(np.unique(batch.reward), np.arange(1.0, 13.0))


def test_random_actions_are_uniform_then_the_policys(interrupted: tuple):
    config, program, state, _ = interrupted
    certain = jax.tree.map(jnp.zeros_like, state.learner.policy)
    last = certain[-1]._replace(bias=jnp.array([9.0, -10.0]))  # always 1
    state = state.replace(learner=state.learner.replace(policy=(*certain[:-1], last)))
    act = jax.jit(lambda t: step(program, state, config, t)[0].storage)
    written = np.asarray(act(jnp.int32(3)))[6:8, 6]
    assert np.abs(written).max() < 1
    np.testing.assert_allclose(np.asarray(act(jnp.int32(13)))[26:28, 6], 1.0, rtol=1e-6)


# --- losses and hypergradients ----------------------------------------------------------------------------------------

OBS, ACTION, BATCH = 3, 2, 7


@pytest.fixture
def problem(float64: Any) -> tuple[Config, Learner, Batch]:
    """Random networks, a batch of which some transitions end."""
    config = replace(SMALL, inner_lr=1e-3, hidden_dim=4, model_hidden_dim=3, agent_type="omd", capacity=64).resolved()
    config = replace(config, max_hidden_dim=4, max_model_hidden_dim=3, discount=0.9)
    learner = soft_actor_critic_agents.init_learner(config, jax.random.key(1), OBS, ACTION)
    random = np.random.default_rng(2)
    jitter = lambda leaf: leaf + 0.3 * random.standard_normal(leaf.shape)  # noqa: E731
    parts = {name: jax.tree.map(jitter, getattr(learner, name)) for name in ("q", "target_q", "model", "policy")}
    batch = Batch(
        obs=random.standard_normal((OBS, BATCH)),
        action=random.uniform(-1, 1, (ACTION, BATCH)),
        reward=random.standard_normal(BATCH),
        next_obs=random.standard_normal((OBS, BATCH)),
        terminated=(np.arange(BATCH) % 3 == 0).astype(float),
        noise=random.standard_normal((ACTION, BATCH)),
    )
    batch = jax.tree.map(jnp.asarray, batch)
    return config, learner.replace(**parts, log_temperature=jnp.log(0.3)), batch


def network(layers: Any, inputs: Any) -> Any:
    for layer in layers[:-1]:
        inputs = jnp.maximum(layer.kernel.T @ inputs + layer.bias[:, None], 0.0)
    return layers[-1].kernel.T @ inputs + layers[-1].bias[:, None]


def loss_by_hand(config: Config, learner: Learner, q: Any, batch: Batch, next_obs: Any, reward: Any) -> Any:
    """The soft critic's loss, written from the formulas; the next action does not follow the next observation."""
    mean, log_std = jnp.split(network(learner.policy, jax.lax.stop_gradient(next_obs)), 2)
    before = mean + jnp.exp(log_std) * batch.noise
    action = jnp.tanh(before)
    normal = -0.5 * batch.noise**2 - log_std - 0.5 * jnp.log(2 * jnp.pi)
    log_prob = (normal - jnp.log(1 - action**2)).sum(0)
    following = jnp.concatenate([next_obs, action])
    smallest = jnp.minimum(*(network(head, following)[0] for head in learner.target_q))
    target = reward + config.discount * (1 - batch.terminated) * (smallest - 0.3 * log_prob)
    taken = jnp.concatenate([batch.obs, batch.action])
    return sum(0.5 * ((network(head, taken)[0] - target) ** 2).mean() for head in q)


def modelled(model: Any, batch: Batch) -> tuple[Any, Any]:
    outputs = network(model, jnp.concatenate([batch.obs, batch.action]))
    return outputs[:OBS], outputs[OBS]


def test_critic_loss_is_the_formula(problem: tuple):
    config, learner, batch = problem
    own = jax.jit(learner.q_loss, static_argnums=())(config, learner.q, batch)
    by_hand = loss_by_hand(config, learner, learner.q, batch, batch.next_obs, batch.reward)
    np.testing.assert_allclose(own, by_hand, rtol=1e-9)


def test_identity_hypergradient_of_omd_is_the_vector_jacobian_product(problem: tuple):
    config, learner, batch = problem

    def by_hand() -> Any:
        def optimality(model: Any) -> Any:
            return jax.grad(lambda q: loss_by_hand(config, learner, q, batch, *modelled(model, batch)))(learner.q)

        outer = jax.grad(lambda q: loss_by_hand(config, learner, q, batch, batch.next_obs, batch.reward))(learner.q)
        return jax.tree.map(jnp.negative, jax.vjp(optimality, learner.model)[1](outer)[0])

    own = jax.jit(lambda: agents.hypergradient_omd(config, learner, batch)[1])()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-10), own, jax.jit(by_hand)())
    assert all(np.abs(leaf).max() > 1e-6 for leaf in jax.tree.leaves(own))


def test_hypergradient_of_funcbo_solves_the_adjoint_equation(problem: tuple):
    config, learner, batch = problem
    config = replace(config, agent_type="funcbo")
    taken = jnp.concatenate([batch.obs, batch.action])
    values = jnp.stack([network(head, taken)[0] for head in learner.q])
    flat_model, unravel = ravel_pytree(learner.model)

    def target(next_obs: Any, reward: Any) -> Any:
        return learner.target(config, batch._replace(next_obs=next_obs, reward=reward))

    def objective(model: Any, values: Any) -> Any:
        return 0.5 * ((values.reshape(2, BATCH) - target(*modelled(unravel(model), batch))) ** 2).mean(1).sum()

    def outer(values: Any) -> Any:
        return 0.5 * ((values.reshape(2, BATCH) - target(batch.next_obs, batch.reward)) ** 2).mean(1).sum()

    def dense() -> Any:
        flat = values.ravel()
        hessian = jax.hessian(objective, argnums=1)(flat_model, flat)
        cross = jax.jacobian(jax.grad(objective, argnums=1))(flat_model, flat)
        return hessian, jax.grad(outer)(flat), cross

    hessian, cotangent, cross = map(np.asarray, jax.jit(dense)())
    expected = cross.T @ np.linalg.solve(hessian, -cotangent)
    own = jax.jit(lambda: ravel_pytree(agents.hypergradient_funcbo(config, learner, batch)[1])[0])()
    np.testing.assert_allclose(own, expected, rtol=1e-8, atol=1e-10)


def test_policy_climbs_the_soft_value_and_temperature_follows_the_entropy(problem: tuple):
    config, learner, batch = problem
    config = replace(config, policy_lr=1e-3, temperature_lr=1e-3)
    step = jax.jit(
        lambda target: soft_actor_critic_agents.policy_step(replace(config, target_entropy=target), learner, batch)
    )
    (low, losses), (high, _) = step(-50.0), step(50.0)
    after, _ = jax.jit(lambda: soft_actor_critic_agents.policy_loss(learner, low.policy, batch))()
    assert after < losses["policy_loss"]
    assert low.log_temperature < learner.log_temperature < high.log_temperature
    np.testing.assert_allclose(losses["temperature"], 0.3)
    outputs = network(learner.policy, batch.obs)
    log_prob = np.asarray(soft_actor_critic_agents.policies.sample_and_log_prob(outputs, batch.noise)[1])
    np.testing.assert_allclose(losses["entropy"], -log_prob.mean())


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"agent_type": "sac", "env_name": "CartPole-v1"}, "CartPole-v1 has discrete ones, use --agent_type sql."),
        ({"env_name": "CartPole-v1"}, "--agent_type omd needs continuous actions; CartPole-v1 has discrete ones"),
        ({"env_name": "Pendulum-v2"}, "did you mean Pendulum-v1"),
        ({"num_envs": 0}, "--num_envs must be a whole number of at least 1, got 0"),
        ({"dim_distract": -1}, "--dim_distract must be a whole number of at least 0"),
        ({"batch_size": 32}, "--batch_size 32 is larger than the 16 transitions that --init_steps"),
        ({"capacity": 8}, "--capacity 8 is smaller than --batch_size 16"),
        ({"num_train_steps": 10**9, "num_envs": 3}, "is more than can be counted"),
        (
            {"agent_type": "sac", "smoothing": "ema"},
            "--smoothing ema is for --agent_type omd, funcbo, not sac.",
        ),
        ({"agent_type": "mle", "with_inv_jac": "cg"}, "--with_inv_jac cg is for --agent_type omd"),
        ({"init_temperature": 0.0}, "--init_temperature must be a finite number above 0"),
    ],
)
def test_bad_settings_are_one_sentence(changes: dict[str, Any], sentence: str):
    with pytest.raises(UserError, match=r"^[^\n]*$") as raised:
        replace(SMALL, **changes).resolved()
    assert sentence in str(raised.value)


def test_other_configurations_point_to_this_one():
    with pytest.raises(UserError, match="use --agent_type sac"):
        q_learning.Config(env_name="Pendulum-v1").resolved()


def test_capacity_is_the_run_up_to_a_bound_in_whole_steps():
    assert Config(num_train_steps=2000, num_envs=4).resolved().capacity == 8000
    assert Config(num_train_steps=10**6, num_envs=3).resolved().capacity == 1_000_002
    assert Config(capacity=1000, num_envs=3).resolved().capacity == 1002


def test_tuned_values_fill_in_only_what_is_not_given():
    for agent in soft_actor_critic_agents.AGENTS:
        tuned = soft_actor_critic_agents.AGENTS[agent].defaults
        config = Config(agent_type=agent, inner_lr=0.5).resolved()
        assert (config.lr, config.num_Q_steps, config.inner_lr) == (tuned["lr"], tuned["num_Q_steps"], 0.5)


def test_script_chooses_the_configuration(tmp_path: Path, capsys: pytest.CaptureFixture):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"config": {"env_name": "Pendulum-v1"}, "run": {}}))
    for words, expected in (
        ("", q_learning.Config),
        ("--env_name Pendulum-v1", Config),
        ("--env_name=Pendulum-v1 --agent_type mle", Config),
        ("--agent_type SAC", Config),
        ("--agent-type=sac --env_name CartPole-v1", Config),
        ("--env_name Pendulum-v1 --agent_type sql", q_learning.Config),
        ("--env_name CartPole-v1 --agent_type omd", q_learning.Config),
        ("--env_name NoSuch-v0", q_learning.Config),
        ("--env_name tabular --agent_type omd", tabular.Config),
        (f"--resume {tmp_path}", Config),
    ):
        assert train_rl.configuration(words.split()) is expected, words
    for words, sentence in (
        ("--agent_type sac --env_name CartPole-v1", "--agent_type sac needs continuous actions"),
        ("--env_name Pendulum-v1 --agent_type sql", "--agent_type sql is for discrete ones here"),
    ):
        arguments = words.split()
        assert (
            command_line.main(train_rl.configuration(arguments), "", [*arguments, "--output_dir", str(tmp_path)]) == 2
        )
        assert sentence in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow  # by default tests/studies/test_command_line.py does the same with Q-learning
def test_command_line_runs_and_resumes(tmp_path: Path, capsys: pytest.CaptureFixture):
    words = (
        f"--agent_type sac --num_train_steps 20 --init_steps 10 --batch_size 8 --hidden_dim 3 --eval_frequency 10 "
        f"--eval_episodes 1 --final_eval_episodes 1 --output_dir {tmp_path} --name run --quiet --video --devices 1"
    ).split()
    assert command_line.main(train_rl.configuration(words), "", words) == 0
    assert (tmp_path / "run" / "policy.gif").stat().st_size > 0
    saved = artefacts.load(tmp_path / "run", "actor").member(0)
    obs = outputs = np.array([[0.6, -0.8, 2.0], [1.0, 0.0, 0.0]], np.float32)
    for layer in range(len(saved) // 2):
        inputs = outputs if layer == 0 else np.maximum(outputs, 0.0)
        outputs = inputs @ saved[f"policy.{layer}.kernel"] + saved[f"policy.{layer}.bias"]
    np.testing.assert_allclose(load_policy(str(tmp_path / "run"))(obs), np.tanh(outputs[:, :1]), rtol=1e-4)
    words = f"--resume {tmp_path / 'run'} --num_train_steps 30 --quiet --devices 1".split()
    assert command_line.main(train_rl.configuration(words), "", words) == 2
    assert "--capacity 0 stood for 20" in capsys.readouterr().err  # all of 20 steps are not all of 30
    words += ["--capacity", "20"]
    assert command_line.main(train_rl.configuration(words), "", words) == 0

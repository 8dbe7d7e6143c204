"""Every registered agent: alone, as a member of a grid, vmapped, sharded over eight devices, in chunks and resumed.

Programs are tiny; what is compared is the whole state and every recorded number.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from purejax_bilevel import load_policy, replay
from purejax_bilevel.configuration import replace
from purejax_bilevel.errors import UserError
from purejax_bilevel.programs.control import agents
from purejax_bilevel.programs.control.q_learning import Config
from purejax_bilevel.runtime import artefacts, outcomes
from purejax_bilevel.runtime.devices import make_mesh
from tests.programs.programs import (
    check_resume_is_bitwise,
    count_conds,
    initial_learners,
    mostly,
    moved,
    own_run,
    recorded,
    same,
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
    hidden_dim=5,
    eval_frequency=20,
    eval_episodes=2,
    final_eval_episodes=3,
)
VARIANTS: dict[str, dict[str, Any]] = {
    **{agent: {"agent_type": agent} for agent in agents.AGENTS},
    "smoothfbo": {"agent_type": "smoothfbo", "smoothing_window": (2, 9)},
    "funcbo_dual": {"agent_type": "funcbo", "num_dual_Q_steps": 2},
    "omd_cg_many_steps_ema": {
        "agent_type": "omd",
        "with_inv_jac": "cg",
        "solver_steps": 3,
        "num_Q_steps": 2,
        "warm_opt": True,
        "smoothing": "ema",
        "beta": (0.0, 0.5),
    },
    "mle": {
        "agent_type": "mle",
        "non_stationary": "drift",
        "transition_steps": 20,
        "clear_buffer": True,
        "time_weighted_sampling": True,
    },
    "omd_neumann_no_warm_hard": {
        "agent_type": "omd",
        "with_inv_jac": "neumann",
        "solver_steps": 3,
        "no_warm": True,
        "hard": True,
        "no_double": True,
    },
    "mle_probabilistic_true_reward_acrobot": {
        "agent_type": "mle",
        "prob_model": True,
        "num_T_steps": 2,
        "num_Q_steps": 2,
        "no_learn_reward": True,
        "env_name": "Acrobot-v1",
    },
}


# Their rules are those of smoothfbo, omd and mle, and in tests/test_reference.py.
COVERED = (
    *("funcbo", "funcbo_reward_only", "funcbo_dual", "vep"),
    *("omd_cg_many_steps_ema", "omd_neumann_no_warm_hard", "mle_probabilistic_true_reward_acrobot"),
)
SHARDED = ("omd", "smoothfbo")


@pytest.fixture(scope="module", params=mostly(VARIANTS, COVERED), ids=str)
def trained(request: pytest.FixtureRequest) -> tuple[Config, Any, outcomes.Outcome]:
    """Two model widths, two rates, two seeds (and the variant's own axes), some on eight devices."""
    config = replace(SMALL, model_hidden_dim=(2, 4), lr=(1e-3, 3e-3), **VARIANTS[request.param])
    return config, *train(config, chunks=2, devices=8 if request.param in SHARDED else 1)


def test_runs_in_one_compilation(trained: tuple):
    _, part, outcome = trained
    assert outcome.num_traces == 1
    assert outcome.steps == STEPS
    assert not outcome.failed[0].any()
    rows = outcome.rows[0]
    assert {"evaluation_return", "training_return", "q_loss", "q_gradient_norm", "final_return"} <= rows.keys()
    assert rows["evaluation_return"].shape == (len(part.grid), 3)
    assert np.isfinite(rows["q_loss"]).all()
    played = np.isfinite(rows["final_return"]).sum(-1)
    np.testing.assert_array_equal(played, np.broadcast_to([2, 2, 3], played.shape))
    assert ("solver_residual" in rows) == (part.config.with_inv_jac != "identity")


def test_every_trainable_leaf_moves_and_fixed_ones_do_not(trained: tuple):
    config, part, outcome = trained
    start = initial_learners(part)
    end = outcome.state[0][0].learner
    for first, last in zip(jax.tree.leaves(start.q), jax.tree.leaves(end.q), strict=True):
        assert not np.any(np.all(first == last, axis=tuple(range(1, last.ndim))))  # in no member a leaf stays as it was
    assert moved(start.target_q, end.target_q)
    assert moved(start.model, end.model) == (config.resolved().agent_type != "sql")
    assert start.values is None or not moved(start.values, end.values)
    if start.dual is not None:
        assert moved(start.dual, end.dual)
        assert np.all(jax.tree.leaves(end.dual_optimizer)[0] > 0)


def test_seeds_act_differently_and_settings_learn_differently(trained: tuple):
    config, part, outcome = trained
    state = outcome.state[0][0]
    assert not np.array_equal(state.storage[0], state.storage[1])
    rates = len(part.grid) // 2
    leaves = [leaf.reshape(len(part.grid), -1) for leaf in jax.tree.leaves(state.learner.model)]
    models = np.concatenate(leaves, axis=1)
    if config.resolved().agent_type != "sql":
        assert len(np.unique(models[::2], axis=0)) == rates


ALONE = ("omd",)  # by default; the others are the same program with another step
WINDOWED = [pytest.param("smoothfbo", marks=pytest.mark.slow)]


@pytest.mark.parametrize(
    "trained", mostly([*agents.AGENTS, "smoothfbo"], {*agents.AGENTS, "smoothfbo"} - {*ALONE}), indirect=True
)
def test_member_equals_a_run_of_its_own(trained: tuple):
    """The widest member of a grid on eight devices, and alone on one: programs of other shapes, equal to rounding."""
    config, part, outcome = trained
    member = len(part.grid) - 1
    single = own_run(config, part, member)
    for name, array in single.rows[0].items():
        np.testing.assert_allclose(array[0], outcome.rows[0][name][member], rtol=1e-4, atol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a[0], b[member], rtol=1e-3, atol=1e-6), single.state, outcome.state
    )


@pytest.mark.parametrize("trained", ["omd"], indirect=True)
def test_the_policy_that_a_run_leaves_is_greedy(trained: tuple, tmp_path: Path):
    _, part, outcome = trained
    settings = [part.grid.settings(member) for member in range(len(part.grid))]
    rng = np.random.default_rng(0)
    tree = jax.vmap(part.program.artefact)(outcome.state[0][0])
    tree = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), tree)  # so that both actions occur
    artefacts.save(tmp_path, part.program.artefact_kind, tree, settings, {})
    obs = rng.standard_normal((40, 4), np.float32)
    heads = jax.tree.map(lambda leaf: leaf[3], tree["q"])
    values = []
    for first, *layers in heads:
        outputs = obs @ first.kernel + first.bias
        for layer in layers:
            outputs = np.maximum(outputs, 0.0) @ layer.kernel + layer.bias
        values.append(outputs)
    expected = np.mean(values, 0).argmax(1)
    act = load_policy(f"{tmp_path}#3")
    np.testing.assert_array_equal(act(obs), expected)
    assert 0 < expected.sum() < 40
    assert jax.jit(act)(obs[7]) == expected[7]
    with pytest.raises(UserError, match=r"observes 4 numbers, got \[3\]"):
        act(np.zeros(3))


@pytest.mark.slow  # with a small program: tests/runtime/test_loop.py
@pytest.mark.parametrize("trained", ["omd"], indirect=True)
def test_vmapped_members_agree(trained: tuple):
    config, _, one_by_one = trained
    _, together = train(config, member_batch=0)
    for name in ("q_loss", "training_return"):
        np.testing.assert_allclose(together.rows[0][name], one_by_one.rows[0][name], rtol=1e-3)


def test_step_counter_stays_shared_under_vmap():
    """`cond` on the step must stay a branch: batched, it would compute both sides and copy the buffer at every step."""
    config = replace(SMALL, smoothing="window", smoothing_window=9)
    mesh = make_mesh(1, 1)
    assert count_conds(config, 4, None, mesh) == count_conds(config, 1, 1, mesh) >= 3


@pytest.mark.parametrize("solver", mostly(("cg", "gmres", "neumann", "dense"), ("cg", "neumann")))
def test_every_solver_fits_into_the_program_of_a_run(solver: str):
    """Members are on a mesh of devices there, which a solver from elsewhere may not take."""
    config = replace(SMALL, agent_type="omd", with_inv_jac=solver, solver_steps=2)
    assert count_conds(config, 1, 1, make_mesh(1, 1)) >= 3


@pytest.mark.parametrize("devices", mostly((2, 8), (8,)))
def test_resume_is_bitwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, devices: int):
    config = replace(SMALL, agent_type="smoothfbo", lr=(1e-3, 3e-3), smoothing_window=9)
    check_resume_is_bitwise(config, tmp_path, monkeypatch, resumed_on=devices)


@pytest.mark.slow  # with a small program: tests/runtime/test_loop.py
def test_a_member_that_diverges_leaves_the_others_untouched(capsys: pytest.CaptureFixture):
    small = replace(SMALL, agent_type="sql")
    part, outcome = train(replace(small, inner_lr=(1e-3, 1e30)), num_seeds=1)
    _, calm = train(replace(small, inner_lr=(1e-3, 3e-3)), num_seeds=1)
    np.testing.assert_array_equal(outcome.failed[0], [False, True])
    assert not calm.failed[0].any()
    same(*(jax.tree.map(lambda leaf: leaf[:1], found.state) for found in (outcome, calm)))
    dataset = outcomes.to_dataset(part, outcome, 0, SMALL, {})
    assert dataset.failed.values.tolist() == [[False], [True]]


# --- data -------------------------------------------------------------------------------------------------------------

LIMIT, RECORDED = 5, 23


@pytest.fixture(scope="module")
def interrupted() -> tuple[Config, Any, Any, dict[str, Any]]:
    """CartPole with a time limit of 5 steps, after 23 steps of which the last 11 were learned from; the last 20 are
    stored."""
    config = Config(
        agent_type="sql",
        init_steps=12,
        batch_size=8,
        hidden_dim=3,
        model_hidden_dim=3,
        capacity=20,
        num_train_steps=RECORDED,
    )
    return recorded(config, RECORDED, LIMIT)


def test_time_limits_are_not_terminations(interrupted: tuple):
    """What is stored is the observation before the reset, from which the target bootstraps."""
    _, _, state, metrics = interrupted
    steps = np.arange(RECORDED - 20, RECORDED)
    rows = np.asarray(state.storage)[steps % 20]
    obs, next_obs, reward, terminated = rows[:, :4], rows[:, 4:8], rows[:, -2], rows[:, -1]
    assert not terminated.any()
    np.testing.assert_array_equal(reward, 1.0)
    np.testing.assert_allclose(next_obs[:, 0], obs[:, 0] + 0.02 * obs[:, 1], atol=1e-6)  # across the limit too
    goes_on = (steps[:-1] + 1) % LIMIT != 0
    np.testing.assert_array_equal(next_obs[:-1][goes_on], obs[1:][goes_on])
    assert np.abs(next_obs[:-1][~goes_on] - obs[1:][~goes_on]).max(-1).min() > 1e-3
    total, count = metrics["training_return"]
    ended = (np.arange(RECORDED) + 1) % LIMIT == 0
    np.testing.assert_array_equal(count, ended)
    np.testing.assert_array_equal(total, LIMIT * ended)


def test_learning_starts_after_the_random_steps(interrupted: tuple):
    _, _, state, metrics = interrupted
    np.testing.assert_array_equal(metrics["q_loss"][1], np.arange(RECORDED) >= 12)
    assert int(state.learner.q_optimizer[0].count) == 11


def test_a_cleared_buffer_starts_at_the_latest_transitions_end():
    """The interval rests for 4 steps, moves for 3: at step 9 only steps 7 to 9 are drawn."""
    config = replace(SMALL, non_stationary="drift", plateau_steps=4, transition_steps=3, batch_size=400, init_steps=400)
    numbered = jnp.zeros((40, 12)).at[:10, -2].set(jnp.arange(10.0))
    for clear_buffer, steps in ((True, np.arange(7, 10)), (False, np.arange(10))):
        own = replace(config, clear_buffer=clear_buffer, capacity=400).resolved()
        batch = own.program()._draw(numbered, own, jnp.int32(9), jax.random.key(2))
        np.testing.assert_array_equal(np.unique(batch.reward), steps)


@pytest.mark.parametrize(("warm_opt", "count"), [(False, 2), (True, 3 + 2)])
def test_adam_starts_afresh_in_each_inner_problem_unless_warm(warm_opt: bool, count: int):
    config = Config(agent_type="omd", warm_opt=warm_opt, num_Q_steps=2, hidden_dim=3, model_hidden_dim=3).resolved()
    config = replace(config, max_hidden_dim=3, max_model_hidden_dim=3, max_smoothing_window=1)
    learner = agents.init_learner(config, jax.random.key(0), 4, 2)
    used = learner.q_optimizer[0]._replace(count=jnp.int32(3))
    learner = learner.replace(q_optimizer=(used, *learner.q_optimizer[1:]))
    batch = replay.Batch(jnp.ones((4, 8)), jnp.ones((2, 8)) / 2, jnp.ones(8), jnp.ones((4, 8)), jnp.zeros(8))
    solved, _ = agents.solve_inner(config, learner, batch, jax.random.key(1))
    assert int(solved.q_optimizer[0].count) == count


@pytest.fixture
def small_problem(float64: Any) -> tuple[Config, agents.Learner, replay.Batch]:
    """Random networks and a batch, in 64 bits."""
    config = replace(SMALL, agent_type="omd", hidden_dim=3, model_hidden_dim=3, no_double=True).resolved()
    config = replace(config, max_hidden_dim=3, max_model_hidden_dim=3, damping=0.01, alpha=1.0)
    learner = jax.jit(lambda key: agents.init_learner(config, key, 3, 2))(jax.random.key(0))
    random = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(random.normal(size=shape))  # noqa: E731
    action = jax.nn.one_hot(random.integers(2, size=16), 2, axis=0, dtype=float)
    batch = replay.Batch(normal(3, 16), action, normal(16), normal(3, 16), jnp.zeros(16), normal(3, 16))
    return config, learner, batch


def test_solvers_tell_how_well_they_solved(small_problem: tuple):
    """On the critic's own Hessian: what is not solved is not silent."""
    config, learner, batch = small_problem

    def found(**changes: Any) -> tuple[agents.Losses, Any]:
        return jax.jit(lambda: agents.hypergradient_omd(replace(config, **changes), learner, batch)[:2])()

    exact_losses, exact = found(with_inv_jac="dense")
    assert exact_losses["solver_residual"] < 1e-9
    losses, gradient = found(with_inv_jac="gmres", solver_steps=100)
    assert losses["solver_residual"] < 1e-4
    size = np.sqrt(sum(float((leaf**2).sum()) for leaf in jax.tree.leaves(exact)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3 * size), gradient, exact)
    assert found(with_inv_jac="gmres", solver_steps=2)[0]["solver_residual"] > 1e-2
    assert found(with_inv_jac="cg", solver_steps=2)[0]["solver_residual"] > 1e-2
    assert found(with_inv_jac="neumann", solver_steps=2)[0]["solver_residual"] > 1e-2
    assert "solver_residual" not in found(with_inv_jac="identity")[0]


@pytest.mark.parametrize("agent_type", ["omd", "mle"])
def test_the_error_of_a_probabilistic_model_is_that_of_its_mean(small_problem: tuple, agent_type: str):
    """A model that knows nothing but the mean: its samples are 1 off per dimension, its mean is right."""
    config, learner, batch = small_problem
    config = replace(config, agent_type=agent_type, prob_model=True)
    learner = jax.jit(lambda key: agents.init_learner(config, key, 3, 2))(jax.random.key(0))
    silent = learner.model._replace(next_obs=jax.tree.map(jnp.zeros_like, learner.model.next_obs))
    batch = batch._replace(next_obs=jnp.full((3, 16), 2.0))
    learner = learner.replace(model=silent)
    agent = agents.AGENTS[agent_type].step
    losses = jax.jit(lambda: agent(config, learner, lambda _: batch, jax.random.key(1), jnp.int32(0))[1])()
    np.testing.assert_allclose(losses["model_error"], 3 * 2.0**2, rtol=1e-12)


def test_random_actions_are_uniform_then_the_policys(interrupted: tuple):
    """With a Q-function that always prefers action 1, and no exploration."""
    config, program, state, _ = interrupted
    config = replace(config, eps=0.0, alpha=1e-6)
    certain = jax.tree.map(jnp.zeros_like, state.learner.q)
    certain = tuple((*head[:-1], head[-1]._replace(bias=jnp.array([0.0, 1.0]))) for head in certain)
    state = state.replace(learner=state.learner.replace(q=certain))

    @jax.jit
    def actions(keys: jax.Array, t: jax.Array) -> jax.Array:
        moved = jax.vmap(lambda key: step(program, state.replace(key=key), config, t)[0].storage)(keys)
        return moved[:, t % 20, 9]

    keys = jax.random.split(jax.random.key(1), 400)
    assert 0.4 < actions(keys, jnp.int32(3)).mean() < 0.6
    np.testing.assert_array_equal(actions(keys, jnp.int32(13)), 1.0)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"env_name": "NoSuch-v0"}, "--env_name NoSuch-v0 is not an environment"),
        ({"lr": -1.0}, "--lr must be a finite number above 0, got -1.0"),
        ({"lr": (1e-3, float("nan"))}, "--lr must be a finite number above 0, got nan"),
        ({"lr": (1e-3, 1e-3)}, "--lr was given the same value twice"),
        ({"tau": 1.5}, "--tau must be a number from 0 to 1"),
        ({"model_hidden_dim": 0}, "--model_hidden_dim must be a whole number of at least 1"),
        ({"model_hidden_dim": 2.5}, "--model_hidden_dim must be a whole number"),
        (
            {"agent_type": "dqn"},
            "--agent_type must be one of omd, funcbo, funcbo_reward_only, smoothfbo, mle",
        ),
        ({"batch_size": 32}, "--batch_size 32 is larger than the 16 transitions that --init_steps"),
        ({"capacity": 8}, "--capacity 8 is smaller than --batch_size 16"),
        (
            {"agent_type": "mle", "smoothing": "ema"},
            "ema is for --agent_type omd, funcbo, funcbo_reward_only, not mle.",
        ),
        ({"agent_type": "mle", "with_inv_jac": "cg"}, "--with_inv_jac cg is for --agent_type omd, not mle."),
        ({"num_dual_Q_steps": 1}, "--num_dual_Q_steps 1 is for --agent_type funcbo, funcbo_reward_only, not omd."),
        ({"env_name": "Acrobot-v1", "non_stationary": "drift"}, "CartPole's pole angle"),
        ({"clear_buffer": True}, "--clear_buffer needs --non_stationary drift"),
    ],
)
def test_bad_settings_are_one_sentence(changes: dict[str, Any], sentence: str):
    with pytest.raises(UserError, match=r"^[^\n]*$") as raised:
        replace(SMALL, **changes).resolved()
    assert sentence in str(raised.value)


def test_tuned_values_fill_in_only_what_is_not_given():
    for agent in agents.AGENTS:
        tuned = agents.AGENTS[agent].defaults
        config = Config(agent_type=agent, inner_lr=0.5).resolved()
        assert (config.lr, config.tau, config.inner_lr) == (tuned["lr"], tuned["tau"], 0.5)


def test_smoothfbo_is_funcbo_with_a_window():
    config = Config(agent_type="smoothfbo").resolved()
    assert (config.agent_type, config.smoothing) == ("funcbo", "window")
    config = Config(agent_type="smoothfbo", smoothing="ema").resolved()
    assert (config.agent_type, config.smoothing) == ("funcbo", "ema")

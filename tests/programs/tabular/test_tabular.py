"""Optimal model design on finite MDPs: known values, gradients against finite differences, the published curve."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import train_rl
from purejax_bilevel import members
from purejax_bilevel.bilevel import implicit
from purejax_bilevel.configuration import replace
from purejax_bilevel.environments import finite
from purejax_bilevel.errors import UserError
from purejax_bilevel.programs.control import q_learning
from purejax_bilevel.programs.tabular import agents
from purejax_bilevel.programs.tabular import figures as tabular_figures
from purejax_bilevel.programs.tabular import program as tabular
from purejax_bilevel.programs.tabular.agents import Model
from purejax_bilevel.programs.tabular.program import Config
from purejax_bilevel.results import dataset as datasets
from purejax_bilevel.runtime import loop, outcomes
from purejax_bilevel.studies import command_line, sweep_command
from purejax_bilevel.studies import run as runs

pytestmark = pytest.mark.usefixtures("compiled_once")

GOLDEN = Path(__file__).parents[2] / "data" / "tabular_curve.npz"
OPTIMAL_Q = [[0.16363807, 0.06282009], [1.89091046, 0.66282009]]
MDPS = ("two_state", "garnet")


def true_mdp(name: str, discount: float = 0.9) -> finite.MDP:
    if name == "garnet":
        return jax.jit(lambda key: finite.garnet(key, 8, 3, branching=3, discount=discount))(jax.random.key(3))
    return jax.tree.map(jnp.asarray, finite.two_state()).replace(discount=jnp.asarray(discount))


def random_model(true: finite.MDP, temperature: float, seed: int = 0) -> Model:
    logits_key, reward_key = jax.random.split(jax.random.key(seed))
    return Model(
        temperature * jax.random.normal(logits_key, true.transition.shape),
        jax.random.normal(reward_key, true.reward.shape),
    )


@jax.jit
def solution(model: Model, true: finite.MDP, temperature: float) -> jax.Array:
    world = agents.imagined(model, true, temperature)
    return finite.action_values(world, finite.optimal_values(world, temperature, jnp.zeros(true.reward.shape[0])))


def train(*configs: Config, num_seeds: int = 2, seed: int = 0, **options: Any) -> tuple[list, outcomes.Outcome]:
    parts = [runs.make_part(config.resolved(), num_seeds, seed) for config in configs]
    return parts, loop.train(parts, loop.RunOptions(quiet=True, **options))


# --- dynamic programming ----------------------------------------------------------------------------------------------


def test_optimum_of_the_two_state_mdp(float64: None):
    true = true_mdp("two_state")
    values = jax.jit(finite.optimal_values)(true, 0.01, jnp.array([50.0, -50.0]))
    q = finite.action_values(true, values)
    np.testing.assert_allclose(q, OPTIMAL_Q, atol=1e-8)
    np.testing.assert_allclose(finite.expected_return(true, finite.policy(q, 0.01)), 1.02725509, atol=1e-8)
    np.testing.assert_allclose(finite.expected_return(true, jnp.eye(2)[q.argmax(1)]), 1.0272727, atol=1e-7)


@pytest.mark.parametrize("name", MDPS)
@pytest.mark.parametrize("temperature", [0.01, 1.0])
def test_newton_finds_the_limit_of_value_iteration(name: str, temperature: float, float64: None):
    true = true_mdp(name, discount=0.97)
    expected = jax.jit(lambda q: jax.lax.fori_loop(0, 1500, lambda _, q: finite.bellman(true, q, temperature), q))(
        jnp.zeros_like(true.reward)
    )
    values = jax.jit(finite.optimal_values)(true, temperature, jnp.zeros(true.reward.shape[0]))
    np.testing.assert_allclose(finite.action_values(true, values), expected, rtol=1e-11)


def test_return_is_that_of_simulated_steps(float64: None):
    true = true_mdp("garnet")
    chances = finite.policy(jax.random.normal(jax.random.key(1), true.reward.shape), 1.0)
    transition, reward, reached, pi = map(np.asarray, (true.transition, true.reward, true.start, chances))
    expected = 0.0
    for t in range(400):
        expected += 0.9**t * (reached[:, None] * pi * reward).sum()
        reached = np.einsum("s,sa,ast->t", reached, pi, transition)
    np.testing.assert_allclose(finite.expected_return(true, chances), expected, rtol=1e-12)


# --- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MDPS)
@pytest.mark.parametrize("objective", ["return", "bellman"])
def test_exact_hypergradient_is_that_of_finite_differences(name: str, objective: str, float64: None):
    temperature = 0.3  # the smoother the maximum, the more digits of a difference are right
    config = Config(outer_objective=objective, temperature=temperature)
    true = true_mdp(name)
    model = random_model(true, temperature)
    flat, unravel = jax.flatten_util.ravel_pytree(model)

    def loss(flat: jax.Array) -> jax.Array:
        return agents.outer_loss(config, true, solution(unravel(flat), true, temperature))

    steps = 1e-5 * jnp.concatenate([jnp.eye(flat.size), -jnp.eye(flat.size)])
    ahead, behind = jax.jit(jax.vmap(loss))(flat + steps).reshape(2, -1)
    expected = (ahead - behind) / 2e-5
    _, gradient = jax.jit(lambda q: agents.hypergradient(config, true, model, q))(solution(model, true, temperature))
    computed = jax.flatten_util.ravel_pytree(gradient)[0]
    np.testing.assert_allclose(computed, expected, atol=1e-7 * float(jnp.abs(expected).max()))


def test_adjoint_solve_is_the_dense_solve_of_all_action_values(float64: None):
    world, cotangent = true_mdp("garnet"), jax.random.normal(jax.random.key(5), (8, 3))
    q = jax.random.normal(jax.random.key(6), (8, 3))

    @jax.jit
    def dense(cotangent: jax.Array) -> jax.Array:
        _, transposed = jax.vjp(lambda q: q - finite.bellman(world, q, 0.1), q)
        return implicit.dense()(lambda u: transposed(u)[0], cotangent)

    expected = dense(cotangent)
    computed = jax.jit(finite.adjoint_solve)(world, finite.policy(q, 0.1), cotangent)
    np.testing.assert_allclose(computed, expected, rtol=1e-10)


def test_identity_hypergradient_passes_the_outer_gradient_on(float64: None):
    true = true_mdp("garnet")
    config = Config(with_inv_jac="identity", temperature=0.3)
    model = random_model(true, 0.3)
    q = solution(model, true, 0.3)

    @jax.jit
    def parts(q: jax.Array) -> tuple:
        outer_gradient = jax.grad(lambda q: agents.outer_loss(config, true, q))(q)
        operator = lambda model: finite.bellman(agents.imagined(model, true, 0.3), q, 0.3)  # noqa: E731
        exact = agents.hypergradient(replace(config, with_inv_jac="exact"), true, model, q)[1]
        return outer_gradient, jax.vjp(operator, model)[1](outer_gradient)[0], exact

    _, gradient = jax.jit(lambda q: agents.hypergradient(config, true, model, q))(q)
    outer_gradient, expected, exact = parts(q)
    np.testing.assert_allclose(gradient.reward, outer_gradient, rtol=1e-12)
    np.testing.assert_allclose(gradient.logits, expected.logits, rtol=1e-9, atol=1e-15)
    assert jnp.abs(exact.reward - gradient.reward).max() > 0.1 * jnp.abs(exact.reward).max()


def test_likelihood_loss_is_squared_error_and_divergence(float64: None):
    true = true_mdp("two_state")
    model = random_model(true, 0.01)
    predicted = agents.imagined(model, true, 0.01).transition
    expected = ((model.reward - true.reward) ** 2).mean()
    expected += (true.transition * jnp.log(true.transition / predicted)).sum(-1).mean()
    np.testing.assert_allclose(agents.likelihood_loss(Config(), true, model), expected, rtol=1e-10)
    sparse = true_mdp("garnet")  # most of its transitions are impossible
    perfect = Model(0.01 * jnp.log(jnp.maximum(sparse.transition, 1e-300)), sparse.reward)
    np.testing.assert_allclose(agents.likelihood_loss(Config(), sparse, perfect), 0.0, atol=1e-12)


# --- projection and errors --------------------------------------------------------------------------------------------


def test_projection_scales_back_onto_the_ball_only(float64: None):
    model = random_model(true_mdp("two_state"), 0.01)
    size = float(agents.norm(model, 0.01))
    plain = np.concatenate([np.ravel(model.logits) / 0.01, np.ravel(model.reward)])
    np.testing.assert_allclose(size, np.linalg.norm(plain), rtol=1e-12)
    for bound in (2 * size, np.inf):
        jax.tree.map(np.testing.assert_array_equal, agents.project(model, 0.01, bound), model)
    projected = agents.project(model, 0.01, 0.5 * size)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, 0.5 * y, rtol=1e-12), projected, model)
    zero = agents.project(agents.project(model, 0.01, 0.0), 0.01, 0.0)
    assert all((leaf == 0).all() for leaf in zero)


def test_logged_bounds_hold_and_are_the_published_formulas(float64: None):
    program, config = tabular.Tabular(Config()), Config(discount=0.9).resolved()
    state = jax.jit(program.init)(jax.random.key(0), config)
    evaluate = jax.jit(lambda model: program.evaluate(state.replace(model=model), config, 0, False))
    true = state.true
    for seed in range(20):
        model = random_model(true, 0.01, seed)
        row = evaluate(model)
        world = agents.imagined(model, true, 0.01)
        q = solution(model, true, 0.01)
        error = np.abs(np.asarray(OPTIMAL_Q) - q).max()
        np.testing.assert_allclose(row["q_error"], error, rtol=1e-6)
        np.testing.assert_allclose(row["omd_bound"], np.abs(finite.bellman(true, q, 0.01) - q).max() / 0.1, rtol=1e-9)
        e_r = np.abs(world.reward - true.reward).max()
        e_p = np.abs(world.transition - true.transition).sum(-1).max()
        np.testing.assert_allclose(row["mle_bound"], e_r / 0.1 + 0.9 * e_p * 0.95 / (2 * 0.1**2), rtol=1e-9)
        assert error <= row["omd_bound"]
        assert error <= row["mle_bound"]
        assert row["optimality_gap"] >= -1e-4  # the softmax policy is optimal up to its temperature


def measured_bounds(true: finite.MDP, model: Model, temperature: float) -> dict[str, jax.Array]:
    """What `evaluate` says of a model in an MDP of any size."""
    config = replace(Config().resolved(), temperature=temperature)
    program = tabular.Tabular(config)
    start = program.init(jax.random.key(0), config)
    zero = jnp.zeros(true.reward.shape[0])
    optimal_q = finite.action_values(true, finite.optimal_values(true, temperature, zero))
    state = start.replace(true=true, optimal_q=optimal_q, model=model, values=zero)
    return program.evaluate(state, config, jnp.int32(0), jnp.bool_(False))


def test_the_bound_by_prediction_errors_holds_for_rewards_of_both_signs(float64: None):
    """Two states that never change, rewards +-1, and a model that leads to the bad one: |r|_max is not enough."""
    reward = jnp.array([[1.0], [-1.0]])
    true = finite.MDP(jnp.eye(2)[None], reward, discount=jnp.asarray(0.3), start=jnp.array([0.5, 0.5]))
    model = Model(jnp.array([[[0.0, 1.0], [0.0, 1.0]]]), reward)  # softmax(100): 1 in 64 bits
    row = jax.jit(measured_bounds)(true, model, 0.01)
    np.testing.assert_allclose(row["q_error"], 0.6 / 0.7, rtol=1e-9)
    np.testing.assert_allclose(row["mle_bound"], 0.3 * 2 * 2 / (2 * 0.7**2), rtol=1e-9)

    @jax.jit
    @jax.vmap
    def random_bounds(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        mdp_key, reward_key, sizes_key, model_key, which_key = jax.random.split(key, 5)
        discount, temperature = jax.random.uniform(sizes_key, (2,)) * jnp.array([0.95, 0.5]) + jnp.array([0.0, 0.01])
        transition = jax.nn.softmax(5.0 * jax.random.normal(mdp_key, (2, 4, 4)))
        reward = jax.random.uniform(reward_key, (4, 2), minval=-1.0)
        mdp = finite.MDP(transition, reward, discount=discount, start=jnp.full(4, 0.25))
        # half of the models have the true reward: their whole error is that of the transition
        error = jax.random.bernoulli(which_key) * jnp.sin(7.0 * jnp.arange(8.0).reshape(4, 2))
        logits = 5.0 * temperature * jax.random.normal(model_key, transition.shape)
        row = measured_bounds(mdp, Model(logits, reward + error), temperature)
        return row["q_error"], row["mle_bound"]

    error, bound = random_bounds(jax.random.split(jax.random.key(0), 500))
    assert (error <= bound).all()
    assert (error > 0.3 * bound).any()  # the bound is not so loose that anything would pass


# --- the program ------------------------------------------------------------------------------------------------------


def test_published_curve():
    """Mean return over ten seeds at a misspecified model; all 20 bounds are in tests/benchmarks/tabular_curve.py."""
    golden = np.load(GOLDEN)
    chosen = [2, 7, 10, 13]
    bounds = tuple(float(bound) for bound in golden["bounds"][chosen])
    configs = [Config(agent_type=agent, norm_bound=bounds, eval_frequency=0) for agent in ("omd", "mle")]
    _, outcome = train(*configs, num_seeds=10, seed=1, devices=2)
    assert outcome.num_traces == 1
    omd, mle = (rows["evaluation_return"][:, -1].reshape(len(chosen), 10).mean(1) for rows in outcome.rows)
    np.testing.assert_allclose(omd, golden["omd_return"][chosen].mean(1), atol=0.05)
    np.testing.assert_allclose(mle, golden["mle"][chosen].mean(1), atol=0.05)
    assert (omd > mle + 0.05).all()
    for part, rows in enumerate(outcome.rows):
        norms = rows["model_norm"][:, -1].reshape(len(chosen), 10)
        assert (norms <= np.array(bounds)[:, None] * (1 + 1e-12)).all(), part


def test_runs_in_64_bits_whatever_the_caller_has_set():
    parts, outcome = train(Config(lr=(0.01, 0.1), num_train_steps=4, eval_frequency=2), chunks=2)
    assert not jax.config.jax_enable_x64
    assert jnp.zeros(()).dtype == jnp.float32
    assert parts[0].config.lr.tolist() == [0.01, 0.01, 0.1, 0.1]  # 32 bits would not hold 0.01
    floats = [leaf for leaf in jax.tree.leaves(outcome.state) if leaf.dtype.kind == "f"]
    assert {leaf.dtype for leaf in floats} == {np.dtype(np.float64)}
    assert all(array.dtype == np.float64 for array in outcome.rows[0].values())
    np.testing.assert_allclose(outcome.state[0][0].optimal_q[0], OPTIMAL_Q, atol=1e-8)
    plain = members.batch_config(q_learning.Config().resolved(), parts[0].grid)
    assert plain.lr.dtype == np.float32


def test_chunks_and_resuming_change_nothing(tmp_path: Path):
    config = Config(norm_bound=(2.0, 5.0), inner_noise=0.01, num_train_steps=60, eval_frequency=20)
    _, whole = train(config, chunks=1)
    _, chunked = train(config, chunks=4)
    jax.tree.map(np.testing.assert_array_equal, (whole.rows, whole.state), (chunked.rows, chunked.state))
    train(replace(config, num_train_steps=40), folder=tmp_path)
    _, resumed = train(config, folder=tmp_path, resume=True, chunks=1)
    jax.tree.map(np.testing.assert_array_equal, (whole.rows, whole.state), (resumed.rows, resumed.state))


def test_placement_of_members_changes_rounding_only():
    # Adam divides by gradients, Q by the temperature: at T = 0.01 both amplify rounding to 1e-6 within a few steps.
    config = Config(norm_bound=(2.0, 5.0), temperature=0.5, num_train_steps=10, eval_frequency=5)
    _, together = train(config, devices=1)
    _, apart = train(config, devices=3, member_batch=1)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-12), together.rows, apart.rows)


def test_noise_disturbs_every_inner_solution_anew():
    config = Config(num_train_steps=5, eval_frequency=1, lr=1e-12, inner_noise=(0.0, 0.1))
    _, outcome = train(config, num_seeds=1)
    loss = outcome.rows[0]["outer_loss"]
    assert np.ptp(loss[0]) < 1e-6  # the model stands still
    assert len(np.unique(loss[1].round(9))) == 5
    assert np.isfinite(loss).all()


def test_noise_as_in_the_notebook_leaves_the_jacobians_exact(float64: None):
    """The outer gradient is taken at the noisy Q, then pulled back through the exact solution."""
    true = true_mdp("garnet")
    config = replace(Config(mdp="garnet", discount=0.9).resolved(), temperature=0.5)
    model = random_model(true, 0.5)
    exact = solution(model, true, 0.5)
    noisy = exact + 0.3 * jax.random.normal(jax.random.key(5), exact.shape)
    flat, unravel = ravel_pytree(model)
    own = lambda *at: jax.jit(lambda: ravel_pytree(agents.hypergradient(config, true, model, *at)[1])[0])()  # noqa: E731
    cotangent = jax.grad(lambda q: agents.outer_loss(config, true, q))(noisy)
    along = lambda x: jnp.vdot(cotangent, solution(unravel(x), true, 0.5))  # noqa: E731
    direction = jax.random.normal(jax.random.key(6), flat.shape)
    slope = (along(flat + 1e-5 * direction) - along(flat - 1e-5 * direction)) / 2e-5
    np.testing.assert_allclose(own(noisy, exact) @ direction, slope, rtol=1e-5)
    assert abs(own(noisy) @ direction / slope - 1) > 1e-3  # Jacobians where the noisy Q is


def test_noise_as_in_the_notebook_is_measured_too():
    base = Config(num_train_steps=4, eval_frequency=2, lr=1e-12, inner_noise=(0.0, 0.3))
    rows = [train(replace(base, notebook_noise=flag), num_seeds=1)[1].rows[0] for flag in (False, True)]
    clean, noisy = ({name: array[1] for name, array in row.items()} for row in rows)  # the member with noise
    for name in ("evaluation_return", "bellman_error"):
        assert np.ptp(clean[name]) < 1e-6  # the model stands still
        assert abs(noisy[name][0] - noisy[name][1]) > 1e-6
        np.testing.assert_array_equal(rows[0][name][0], rows[1][name][0])  # the member without
    for name in ("q_error", "omd_bound", "mle_bound"):
        np.testing.assert_allclose(noisy[name], clean[name], rtol=1e-6)


def test_garnets_are_members_of_one_program():
    config = Config(
        mdp="garnet", garnet_seed=(0, 1, 2), num_states=7, branching=3, num_train_steps=30, eval_frequency=15
    )
    _, outcome = train(config, num_seeds=2)
    assert outcome.num_traces == 1
    true = outcome.state[0][0].true
    transition, reward = np.asarray(true.transition), np.asarray(true.reward)
    assert transition.shape == (6, 3, 7, 7)
    np.testing.assert_allclose(transition.sum(-1), 1.0, rtol=1e-12)
    assert ((transition > 0).sum(-1) == 3).all()
    np.testing.assert_array_equal(transition[0::2], transition[1::2])  # same MDP, another seed of the model
    np.testing.assert_array_equal(reward[0::2], reward[1::2])
    for first, second in ((0, 2), (0, 4), (2, 4)):
        assert (transition[first] > 0).tolist() != (transition[second] > 0).tolist()
        assert np.abs(reward[first] - reward[second]).max() > 0.1
    assert np.isfinite(outcome.rows[0]["evaluation_return"]).all()


def test_omd_copes_with_a_wrong_model_of_garnets_and_mle_does_not():
    settings = {"mdp": "garnet", "garnet_seed": (0, 1, 2), "num_states": 4, "num_actions": 2, "branching": 2}
    settings |= {"norm_bound": 20.0, "num_train_steps": 1500, "eval_frequency": 0}
    _, outcome = train(*(Config(agent_type=agent, **settings) for agent in ("omd", "mle")), num_seeds=4, devices=1)
    omd, mle = (rows["optimality_gap"][:, -1].reshape(3, 4) for rows in outcome.rows)
    assert (np.median(omd, axis=1) < 0.05).all(), omd
    assert mle.mean() > 0.5, mle


# --- input ------------------------------------------------------------------------------------------------------------


def write(path: Path, **changes: Any) -> str:
    mdp = finite.two_state()
    arrays = {"P": mdp.transition, "R": mdp.reward, "gamma": mdp.discount, "start": mdp.start, **changes}
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return str(path)


def test_own_mdp_gives_what_the_built_in_one_gives(tmp_path: Path):
    path = write(tmp_path / "mine.npz")
    config = Config(num_train_steps=20, eval_frequency=10)
    parts, own = train(replace(config, mdp_file=path))
    assert parts[0].config.mdp == "file"
    _, built_in = train(config)
    jax.tree.map(np.testing.assert_array_equal, own.rows, built_in.rows)
    shorter = Config(mdp_file=write(tmp_path / "shorter.npz", gamma=0.5)).resolved()
    assert shorter.discount == 0.5
    assert replace(shorter, discount=0.7).resolved().discount == 0.7


P = finite.two_state().transition


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"P": None}, "there is no P among its arrays"),
        ({"start": None}, "there is no start among its arrays"),
        ({"P": P[0]}, r"P must have shape \[actions, states, states\], got \(2, 2\)"),
        ({"R": np.zeros((3, 2))}, r"R must have shape \(2, 2\) beside this P, got \(3, 2\)"),
        ({"gamma": np.array([0.9])}, r"gamma must have shape \(\)"),
        ({"start": np.ones(3) / 3}, r"start must have shape \(2,\)"),
        ({"R": np.array([[0.0, np.nan], [0, 0]])}, "R must hold finite numbers, got nan"),
        ({"P": P * np.array([1.0, 0.9])}, r"P\[0, 0\] must hold probabilities that sum to 1, got a sum of 0.97"),
        ({"P": P + np.array([-0.5, 0.5])}, r"P\[0, 1\] must hold probabilities that sum to 1, got the entry -0.3"),
        ({"start": np.array([0.5, 0.6])}, "start must hold probabilities that sum to 1, got a sum of 1.1"),
        ({"gamma": np.array(1.0)}, "gamma must be from 0 to below 1, got 1.0"),
        ({"gamma": np.array(-0.1)}, "gamma must be from 0 to below 1, got -0.1"),
        ({"R": np.array([["a", "b"], ["c", "d"]])}, "must be a numpy archive .* of numbers"),
    ],
    ids=str,
)
def test_wrong_mdp_files_get_one_sentence(changes: dict, message: str, tmp_path: Path):
    path = write(tmp_path / "wrong.npz", **changes)
    with pytest.raises(UserError, match=message) as caught:
        Config(mdp_file=path).resolved()
    assert str(caught.value).startswith(f"--mdp_file {path}: ")
    assert "\n" not in str(caught.value)


def test_files_that_are_no_archive(tmp_path: Path):
    (tmp_path / "text.npz").write_text("no archive")
    np.save(tmp_path / "single.npy", np.zeros(3))
    for name, message in (
        ("missing.npz", "there is no such file"),
        ("text.npz", "must be a numpy archive"),
        ("single.npy", "must be a numpy archive"),
    ):
        with pytest.raises(UserError, match=message):
            Config(mdp_file=str(tmp_path / name)).resolved()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm_bound": -1.0}, "--norm_bound must be a number, 0 or above"),
        ({"discount": 1.0}, "--discount must be a number from 0 to below 1"),
        ({"temperature": 0.0}, "--temperature must be"),
        ({"agent_type": "funcbo"}, "--agent_type must be one of omd, mle"),
        ({"garnet_seed": (1, 2)}, "--garnet_seed needs --mdp garnet"),
        ({"agent_type": "mle", "notebook_noise": True}, "--notebook_noise is for --agent_type omd, not mle"),
        ({"mdp": "garnet", "branching": 20}, "--branching 20 is larger than --num_states 10"),
        ({"mdp": "garnet", "mdp_file": "a.npz"}, "--mdp_file a.npz does not go with --mdp garnet"),
        ({"mdp": "file"}, "--mdp file needs --mdp_file"),
    ],
    ids=str,
)
def test_wrong_settings_get_one_sentence(changes: dict, message: str):
    with pytest.raises(UserError, match=message):
        Config(**changes).resolved()


# --- command line and figures -----------------------------------------------------------------------------------------


def test_script_chooses_the_configuration_by_environment(tmp_path: Path):
    (tmp_path / "config.yaml").write_text("config: {env_name: tabular}\nrun: {}\n")
    for words in (["--env_name", "tabular"], ["--env-name=tabular", "--help"], ["--resume", str(tmp_path)]):
        assert train_rl.configuration(words) is Config, words
    for words in (
        [],
        ["--env_name", "CartPole-v1"],
        ["--env_name"],
        ["--resume", str(tmp_path / "none")],
        ["--resume"],
    ):
        assert train_rl.configuration(words) is not Config, words


def test_command_line_runs_and_resumes(tmp_path: Path, capsys: pytest.CaptureFixture):
    words = ["--env_name", "tabular", "--norm_bound", "1", "inf", "--num_train_steps", "10", "--eval_frequency", "5"]
    folder = tmp_path / "run"
    where = ["--output_dir", str(tmp_path), "--name", "run", "--quiet"]
    assert command_line.main(Config, "", [*words, *where]) == 0
    assert datasets.load(folder).norm_bound.values.tolist() == [1.0, np.inf]
    assert command_line.main(Config, "", ["--resume", str(folder), "--num_train_steps", "15", "--quiet"]) == 0
    assert datasets.load(folder).step.values.tolist() == [5, 10, 15]
    assert command_line.main(Config, "", [*words, "--mdp_file", "missing.npz"]) == 2
    assert "--mdp_file missing.npz: there is no such file." in capsys.readouterr().err


def test_figures_of_the_studies(tmp_path: Path):
    swept = {"norm_bound": (1.0, 4.0), "inner_noise": (0.01, 0.1)}
    datasets = {
        axis: runs.run(Config(num_train_steps=10, **{axis: values}), num_seeds=2, quiet=True)
        for axis, values in swept.items()
    }
    for name, figure in tabular_figures.FIGURES.items():
        right, wrong = ("inner_noise", "norm_bound") if name == "ift_noise" else ("norm_bound", "inner_noise")
        pair = {"omd": datasets[right], "mle": datasets[right]}
        assert figure(pair, tmp_path / f"{name}.png").stat().st_size > 10_000
        with pytest.raises(UserError, match=f"needs {right} to be the only axis"):
            figure({"omd": datasets[wrong]}, tmp_path / "wrong.png")


@pytest.mark.slow  # the figures themselves: below
def test_a_sweep_draws_its_figure_where_the_axes_are_those_of_the_figure(tmp_path: Path):
    words = ["tabular_norm_bound", "num_train_steps=10", "eval_frequency=5", "norm_bound=1,4", "seeds.count=4"]
    where = ["--output_dir", str(tmp_path), "--quiet", "--name"]
    title = "Return against the norm bound"
    assert sweep_command.main([*words, *where, "own"]) == 0
    assert f"![{title}" in (tmp_path / "own" / "report.md").read_text()
    for agent in ("mle", "omd"):
        dataset = datasets.load(tmp_path / "own" / agent)
        assert dataset.attrs["compilations"] == 1
        assert dataset.evaluation_return.dtype == np.float64
    assert sweep_command.main([*words, "lr=0.01,0.1", *where, "other"]) == 0
    assert title not in (tmp_path / "other" / "report.md").read_text()

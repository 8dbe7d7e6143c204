"""The observatory: estimators on problems with a known hypergradient, statistics by hand, whole runs."""

import dataclasses
import functools
import json
import re
import types
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import purejax_bilevel
from purejax_bilevel import bilevel
from purejax_bilevel.configuration import LARGEST_WHOLE, replace
from purejax_bilevel.environments import finite
from purejax_bilevel.errors import UserError
from purejax_bilevel.program import Program
from purejax_bilevel.programs.control import agents as control_agents
from purejax_bilevel.programs.observatory import COSTS, control, estimators, figures, regression, settings, tabular
from purejax_bilevel.programs.observatory.estimators import Problem
from purejax_bilevel.programs.observatory.program import OBSERVE
from purejax_bilevel.programs.regression import agents as regression_agents
from purejax_bilevel.programs.regression import data
from purejax_bilevel.replay import Batch
from purejax_bilevel.studies import plan, presets, study
from tests.programs.programs import check_resume_is_bitwise

PAGE = Path(tabular.__file__).parent / "README.md"
SMALL_CONTROL = {
    "hidden_dim": 4,
    "model_hidden_dim": 4,
    "num_train_steps": 60,
    "init_steps": 20,
    "eval_frequency": 20,
    "batch_size": 16,
    "capacity": 60,
    "eval_episodes": 1,
    "final_eval_episodes": 1,
    "num_batches": 3,
    "reference_batches": 2,
}
SMALL_REGRESSION = {
    "T_max": 60,
    "eval_frequency": 20,
    "n_samples": 16,
    "batch_size": 8,
    "hidden_dim": 4,
    "window_size": 5,
    "lambda_reg": 1.0,
    "regret_frequency": 0,
    "num_batches": 3,
    "reference_batches": 2,
}

FEW = "adam:1 dual:2"  # tracing takes its time


# --- estimators -------------------------------------------------------------------------------------------------------


class Quadratic:
    """min_x 1/2 x'Ax - x'B theta with outer loss 1/2 |x - c|^2, so that the hypergradient is B'A^-1 (x* - c)."""

    def __init__(self, seed: int = 0):
        rng = np.random.default_rng(seed)
        root = rng.normal(size=(4, 4))
        self.matrix, self.mixing = root @ root.T / 4 + np.eye(4), rng.normal(size=(4, 3))
        self.target, self.outer = np.ones(4), np.array([0.5, -1.0, 2.0])
        self.solution = np.linalg.solve(self.matrix, self.mixing @ self.outer)
        self.exact = self.mixing.T @ np.linalg.solve(self.matrix, self.solution - self.target)

    def problem(self, inner: Any = None) -> Problem:
        inner_loss = lambda theta, x: 0.5 * x @ self.matrix @ x - x @ self.mixing @ theta  # noqa: E731
        return Problem(
            outer=jnp.asarray(self.outer),
            inner=jnp.asarray(self.solution if inner is None else inner),
            outer_loss=lambda x: 0.5 * jnp.sum((x - self.target) ** 2),
            optimality=lambda theta, x: jax.grad(inner_loss, argnums=1)(theta, x),
            inner_loss=inner_loss,
            curvature=1.0,
        )


def estimates(names: str, problem: Problem, **changes: Any) -> dict[str, tuple[np.ndarray, float]]:
    """Hypergradient and residual of each of the estimators that a text names."""
    config = settings.Observed(**{"estimator_damping": 0.0, "estimator_step_size": 0.3, **changes})
    parsed, key = settings.parse(names), jax.random.key(3)
    found = jax.jit(lambda: [estimators.estimate(one, problem, config, key) for one in parsed])()
    return {one.name: (np.asarray(gradient), float(rest)) for one, (gradient, rest) in zip(parsed, found, strict=True)}


def test_estimators_of_a_quadratic_problem_are_what_is_known_of_them(float64: None) -> None:
    known = Quadratic()
    names = "identity cg:4 neumann:7 neumann:200 dense dense:0.5 unrolled:7 unrolled:200 unrolled:7:0.1 es:4000:200"
    found = estimates(names, known.problem())
    for exact in ("cg:4", "dense", "neumann:200", "unrolled:200"):
        np.testing.assert_allclose(found[exact][0], known.exact, rtol=1e-8, err_msg=exact)
    np.testing.assert_allclose(found["neumann:7"][0], found["unrolled:7"][0], rtol=1e-12)  # at the inner solution
    assert np.abs(found["unrolled:7:0.1"][0] - found["unrolled:7"][0]).max() > 0.01
    error = known.solution - known.target
    np.testing.assert_allclose(found["identity"][0], known.mixing.T @ error, rtol=1e-12)
    damped = known.mixing.T @ np.linalg.solve(known.matrix + 0.5 * np.eye(4), error)
    np.testing.assert_allclose(found["dense:0.5"][0], damped, rtol=1e-10)
    residual = np.linalg.norm(known.matrix @ error - error) / np.linalg.norm(error)
    np.testing.assert_allclose(found["identity"][1], residual, rtol=1e-10)
    assert found["dense"][1] < 1e-12
    assert np.isnan(found["unrolled:7"][1])
    # 4000 pairs in three dimensions: a relative error of about sqrt(4 / 4000)
    assert np.linalg.norm(found["es:4000:200"][0] - known.exact) < 0.1 * np.linalg.norm(known.exact)


def test_away_from_the_inner_solution_unrolling_goes_there_and_implicit_gradients_stay(float64: None) -> None:
    known = Quadratic()
    away = known.solution + np.array([1.0, 0.0, -2.0, 0.5])
    found = estimates("dense unrolled:200", known.problem(away))
    np.testing.assert_allclose(found["unrolled:200"][0], known.exact, rtol=1e-8)
    there = known.mixing.T @ np.linalg.solve(known.matrix, away - known.target)
    np.testing.assert_allclose(found["dense"][0], there, rtol=1e-10)
    assert np.linalg.norm(there - known.exact) > 0.1 * np.linalg.norm(known.exact)


def test_dampings_and_step_sizes_are_in_units_of_the_curvature(float64: None) -> None:
    known = Quadratic()
    problem = known.problem()
    largest = np.linalg.eigvalsh(known.matrix)[-1]
    curvature = float(jax.jit(lambda: estimators.curvature(problem, jax.random.key(0)))())
    np.testing.assert_allclose(curvature, largest, rtol=1e-6)
    names = "neumann:5 unrolled:5 dense cg:4 es:2:5"
    rates = {"estimator_damping": 0.1, "estimator_step_size": 0.8}
    scaled = {name: rate * (2.0 if "damping" in name else 0.5) for name, rate in rates.items()}
    with_unit, without = estimates(names, problem._replace(curvature=2.0), **rates), estimates(names, problem, **scaled)
    for name, (gradient, _) in with_unit.items():
        np.testing.assert_allclose(gradient, without[name][0], rtol=1e-12, err_msg=name)


def test_samples_of_evolution_strategies_are_in_units_of_the_outer_variable(float64: None) -> None:
    known = Quadratic()
    problem = known.problem()._replace(outer_loss=lambda x: jnp.sum(x**4))  # a quadratic one is blind to sigma

    def loss(outer: jax.Array) -> jax.Array:
        inner = problem.inner
        for _ in range(2):
            inner = inner - 0.3 * (known.matrix @ inner - known.mixing @ outer)
        return problem.outer_loss(inner)

    found = estimates("es:6:2:0.5", problem)["es:6:2:0.5"][0]
    sigma = 0.5 * float(np.sqrt((known.outer**2).mean()))
    same = jax.jit(lambda key: bilevel.antithetic_gradient(loss, problem.outer, key, 6, sigma))(jax.random.key(3))
    np.testing.assert_allclose(found, same, rtol=1e-10)


def test_several_batches_as_one_are_the_problem_of_the_mean_losses(float64: None) -> None:
    several = [Quadratic(seed) for seed in range(3)]
    matrices, mixings = (np.stack([getattr(one, name) for one in several]) for name in ("matrix", "mixing"))
    outer, inner, target = several[0].outer, np.arange(4.0), several[0].target

    def make(batch: Any) -> Problem:
        matrix, mixing = batch
        inner_loss = lambda theta, x: 0.5 * x @ matrix @ x - x @ mixing @ theta  # noqa: E731
        optimality = lambda theta, x: jax.grad(inner_loss, argnums=1)(theta, x)  # noqa: E731
        loss = lambda x: jnp.sum(matrix[0] * (x - target) ** 2)  # noqa: E731
        return Problem(jnp.asarray(outer), jnp.asarray(inner), loss, optimality, inner_loss)

    config = settings.Observed(estimator_damping=0.1)
    joined = jax.jit(lambda: estimators.dense(estimators.joined(make, (matrices, mixings)), config)[0])()
    cotangent = 2 * matrices[:, 0].mean(0) * (inner - target)
    adjoint = np.linalg.solve(matrices.mean(0) + 0.1 * np.eye(4), cotangent)
    np.testing.assert_allclose(joined, mixings.mean(0).T @ adjoint, rtol=1e-10)


def test_antithetic_gradients_are_the_mean_over_mirrored_pairs(float64: None) -> None:
    slope, at = np.array([1.0, -2.0, 0.5]), {"a": jnp.ones(2), "b": jnp.zeros(1)}
    loss = lambda outer: ravel_pytree(outer)[0] @ slope + 7.0  # noqa: E731
    found = jax.jit(lambda key: bilevel.antithetic_gradient(loss, at, key, 6, 0.1))(jax.random.key(5))
    noise = np.asarray(jax.random.normal(jax.random.key(5), (6, 3)))
    np.testing.assert_allclose(ravel_pytree(found)[0], noise.T @ (noise @ slope) / 6, rtol=1e-10)
    with pytest.raises(ValueError, match="num_pairs"):
        bilevel.antithetic_gradient(loss, at, jax.random.key(5), 0, 0.1)


# --- statistics -------------------------------------------------------------------------------------------------------


def test_statistics_are_those_of_numpy(float64: None) -> None:
    rng = np.random.default_rng(1)
    given, exact, reference = rng.normal(size=(2, 3, 5)), rng.normal(size=(3, 5)), rng.normal(size=5)
    found = {name: np.asarray(value) for name, value in jax.jit(estimators.compared)(given, exact, reference).items()}
    for e in range(2):
        mean, size = given[e].mean(0), np.linalg.norm(exact.mean(0))
        variance = sum(np.var(given[e, :, i], ddof=1) for i in range(5))
        np.testing.assert_allclose(found["relative_bias"][e], np.linalg.norm(mean - exact.mean(0)) / size)
        np.testing.assert_allclose(found["relative_variance"][e], variance / size**2)
        for b in range(3):
            norms = [np.linalg.norm(vector) for vector in (given[e, b], exact[b], reference)]
            np.testing.assert_allclose(found["cosine"][e, b], given[e, b] @ reference / norms[0] / norms[2])
            np.testing.assert_allclose(found["batch_cosine"][e, b], given[e, b] @ exact[b] / norms[0] / norms[1])
            np.testing.assert_allclose(found["norm_ratio"][e, b], norms[0] / norms[2])
    assert {name: value.shape for name, value in found.items() if value.ndim == 1} == {
        "relative_bias": (2,),
        "relative_variance": (2,),
    }


# --- what may be asked for --------------------------------------------------------------------------------------------


def test_estimators_are_read() -> None:
    assert settings.parse("identity cg:20:0.5 es:32:5") == (
        settings.Estimator("identity", "identity"),
        settings.Estimator("cg:20:0.5", "cg", (20,), 0.5),
        settings.Estimator("es:32:5", "es", (32, 5)),
    )
    assert settings.form("es") == "es:PAIRS:STEPS[:SIGMA]"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "--estimators must be names from identity, "),
        ("gmres:3", "got 'gmres:3'"),
        ("cg", r"cg:STEPS\[:DAMPING\] is how cg is written, got 'cg'"),
        ("cg:1:2:3", "is how cg is written"),
        ("cg:0", "cg:0: steps must be a whole number from 1 to 100000, got '0'"),
        ("cg:1e3", "got '1e3'"),
        ("dense:-1", "damping must be a finite number, 0 or above, got '-1'"),
        ("neumann:3:0", "step_size must be a finite number above 0, got '0'"),
        ("es:4:5:nan", "sigma must be a finite number above 0, got 'nan'"),
        ("identity identity", "names identity twice"),
    ],
)
def test_what_is_no_estimator_is_refused(text: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        control.Config(estimators=text).resolved()


@pytest.mark.parametrize(("name", "reason"), tabular.WHY_NOT.items())
def test_estimators_that_a_problem_has_no_use_for_are_refused(name: str, reason: str) -> None:
    numbers = ":5" if settings.NUMBERS[name][0] else ""
    with pytest.raises(UserError, match=f"--estimators {name}{numbers}: {re.escape(reason)}; it may be identity"):
        tabular.Config(estimators=f"dense {name}{numbers}").resolved()


def test_train_rl_does_not_take_an_observatory_for_a_family_of_agents() -> None:
    from purejax_bilevel import scripts

    assert scripts.rl_configuration(["--agent_type", "aid"]) is purejax_bilevel.RLConfig


def test_the_keys_of_an_evaluation_are_of_no_step() -> None:
    assert LARGEST_WHOLE < OBSERVE < 2**32


def test_the_preset_compares_in_three_problems() -> None:
    for scale in ("smoke", "paper"):
        agents = plan.make_agents(study.parse(presets.preset("observatory", scale)))
        assert [type(agent.templates[0].config) for agent in agents] == [
            control.Config,
            tabular.Config,
            regression.Config,
        ]


# --- the problems -----------------------------------------------------------------------------------------------------


def sized(config: Any) -> Any:
    """A resolved configuration of one member, outside a run."""
    config = config.resolved()
    sizes = {"max_hidden_dim": "hidden_dim", "max_model_hidden_dim": "model_hidden_dim"}
    sizes |= {"max_window_size": "window_size", "max_grad_buffer_size": "grad_buffer_size"}
    sizes |= {"max_smoothing_window": "smoothing_window", "max_regret_window": "regret_window"}
    known = {field.name for field in dataclasses.fields(config)}
    return replace(config, **{size: getattr(config, name) for size, name in sizes.items() if size in known})


def test_the_problem_of_cartpole_is_that_of_its_agents() -> None:
    """identity is the hypergradient of omd, functional that of funcbo."""
    config = sized(control.Config(agent_type="omd", **SMALL_CONTROL))
    program = config.program()

    @jax.jit
    def both() -> Any:
        learner = control_agents.init_learner(config, jax.random.key(2), obs_dim=4, num_actions=2)
        draws = jax.random.normal(jax.random.key(1), (3, 4, 16))
        batch = Batch(draws[0], jax.nn.one_hot(jnp.arange(16) % 2, 2).T, draws[1, 0], draws[2], jnp.zeros(16))
        problem = program.problem(types.SimpleNamespace(learner=learner), config, batch)
        parsed, key = settings.parse("identity functional"), jax.random.key(0)
        own = [estimators.estimate(one, problem, config, key)[0] for one in parsed]
        theirs = [
            control_agents.hypergradient_omd(config, learner, batch)[1],
            control_agents.hypergradient_funcbo(config, learner, batch)[1],
        ]
        return own, [ravel_pytree(gradient)[0] for gradient in theirs]

    for own, theirs in zip(*both(), strict=True):
        assert np.abs(theirs).max() > 0
        np.testing.assert_allclose(own, theirs, rtol=1e-5, atol=1e-7 * float(np.abs(theirs).max()))


def test_the_problem_of_regression_is_that_of_its_agents() -> None:
    """cg is the hypergradient of aid where that takes no step of its own, in the weights lambda."""
    config = sized(regression.Config(agent_type="aid", inner_lr=1e-30, aid_cg_tol=0.0, **SMALL_REGRESSION))
    program = config.program()

    @jax.jit
    def both() -> Any:
        state, key = program.init(jax.random.key(2), config), jax.random.key(9)
        batch, window = program.frozen_batch(state, config, jnp.int32(9), key)
        problem = program.problem(state, config, (batch, window))
        (cg,) = settings.parse(f"cg:{config.aid_cg_iters}:{config.aid_cg_reg}")
        own = estimators.estimate(cg, problem, config, key)[0]
        summary = data.summarise(window, state.learner.weights)
        step, _ = regression_agents.implicit_agent(config, state.learner, batch, summary)
        return own, data.pull_back(window, step.gradient)

    own, theirs = both()
    assert np.abs(theirs).max() > 0
    np.testing.assert_allclose(own, theirs, rtol=1e-3)


def test_on_a_table_the_closed_form_adjoint_is_identity(float64: None) -> None:
    """As the page says: with targets that stay, the Hessian in the action values is the identity."""
    config = sized(tabular.Config(mdp="garnet", num_states=4, temperature=0.3, estimators="identity"))
    program = config.program()

    @jax.jit
    def both() -> Any:
        state = program.init(jax.random.key(0), config)
        problem = program.problem(state, config, jnp.zeros((4, config.num_actions)))
        cotangent, held = jax.grad(problem.outer_loss)(problem.inner), jax.lax.stop_gradient(problem.inner)

        def objective(model: Any, values: jax.Array) -> jax.Array:
            world = tabular.agents.imagined(model, state.true, config.temperature)
            return 0.5 * jnp.sum((values - finite.bellman(world, held, config.temperature)) ** 2)

        adjoint = bilevel.closed_form_adjoint(cotangent, jnp.ones_like(cotangent))
        closed = bilevel.functional_hypergradient(objective, problem.outer, problem.inner, adjoint)
        (identity,) = settings.parse("identity")
        return ravel_pytree(closed)[0], estimators.estimate(identity, problem, config, jax.random.key(0))[0]

    closed, identity = both()
    np.testing.assert_allclose(closed, identity, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(control.Config(estimators=FEW, **SMALL_CONTROL), marks=pytest.mark.slow, id="control"),
        pytest.param(regression.Config(estimators=FEW, **SMALL_REGRESSION), id="regression"),
    ],
)
def test_evaluations_with_what_networks_alone_have_can_be_traced(config: Any) -> None:
    """They run in the slow part."""
    config = sized(config)
    program: Program = config.program()
    state = jax.eval_shape(lambda: program.init(jax.random.key(0), config, ()))
    (stage,) = program.stages
    found = jax.eval_shape(lambda state: stage.evaluate(state, config, jnp.int32(40), jnp.bool_(True), ()), state)
    assert {measure.name for measure in program.measures} >= set(found)
    assert found["cosine"].shape == (len(program.estimators), 3)  # type: ignore[attr-defined]


# --- whole runs -------------------------------------------------------------------------------------------------------


def test_the_run_of_the_page_measures_what_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without noise implicit differentiation is exact on an MDP, and unrolling with it too."""
    (example,) = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    monkeypatch.setattr(purejax_bilevel, "run", functools.partial(purejax_bilevel.run, quiet=True, devices=1))
    names: dict[str, Any] = {}
    exec(example, names)
    results = names["results"]
    assert set(results["estimator"].values) == {"identity", "dense", "unrolled:100"}
    exact, noisy = results.sel(inner_noise=0.0), results.sel(inner_noise=0.05)
    for name in ("dense", "unrolled:100"):
        np.testing.assert_allclose(exact.cosine.sel(estimator=name), 1.0, atol=1e-6)
        assert exact.relative_bias.sel(estimator=name).max() < 1e-3
        assert exact.relative_variance.sel(estimator=name).max() < 1e-6
    assert (exact.cosine.sel(estimator="identity") < 0.999).any()
    assert (noisy.relative_bias.sel(estimator="dense") > 0.01).all()  # the noise is in its Jacobians
    assert noisy.relative_bias.sel(estimator="unrolled:100").max() < 0.01  # and steps take it away
    assert exact.adjoint_residual.sel(estimator="dense").max() < 1e-10
    check_table(results, tmp_path)


def check_table(results: Any, folder: Path) -> None:
    costs = {name: {"relative_time": 2.5, "temporary_bytes": 4096.0} for name in ("identity", "dense")}
    (folder / "an_MDP").mkdir()
    (folder / "an_MDP" / COSTS).write_text(json.dumps({"estimators": costs}))
    found = figures.table({"an MDP": results}, folder / "figures" / "study-0.png")
    assert [row[1] for row in found.rows] == ["identity", "dense", "unrolled:100"]
    assert [row[-2:] for row in found.rows] == [("2.5", "4 KiB"), ("2.5", "4 KiB"), ("-", "-")]
    last = results.isel(inner_noise=0, step=-1).cosine.sel(estimator="identity").values
    assert found.rows[0][4] == f"{np.median(last):.2f}"
    assert len(found.columns) == len(found.rows[0])


@pytest.mark.slow
def test_costs_are_measured_and_drawn_in_a_run_with_a_folder(tmp_path: Path) -> None:
    config = tabular.Config(num_train_steps=20, eval_frequency=10, estimators="identity dense es:4:5")
    results = purejax_bilevel.run(config, folder=tmp_path, quiet=True)
    costs = json.loads((tmp_path / COSTS).read_text())
    assert set(costs["estimators"]) == set(results["estimator"].values)
    assert all(cost["seconds"] > 0 and cost["relative_time"] > 0 for cost in costs["estimators"].values())
    assert (tmp_path / figures.FIGURE).is_file()
    both = {"first": results, "second": results}
    assert figures.cosines(both, tmp_path / "both.png").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        control.Config(**SMALL_CONTROL, lr=(1e-3, 1e-2)),
        regression.Config(agent_type="aid", outer_lr=(1e-2, 1e-1), **SMALL_REGRESSION),
        tabular.Config(num_train_steps=60, eval_frequency=20, inner_noise=(0.0, 0.1)),
    ],
    ids=["control", "regression", "tabular"],
)
def test_a_resumed_run_measures_the_same_bits(config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_resume_is_bitwise(config, tmp_path, monkeypatch)

"""Non-stationary regression: the program's members, its data's law, its hypergradients, regrets, figures and messages.

Programs are tiny; regrets are compared with a plain numpy version, and the window's noise with one that draws all of
it.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xarray

from purejax_bilevel.configuration import replace
from purejax_bilevel.errors import UserError
from purejax_bilevel.programs.regression import agents as regression_agents
from purejax_bilevel.programs.regression import data as regression_data
from purejax_bilevel.programs.regression import figures as regression_figures
from purejax_bilevel.programs.regression.program import Config
from purejax_bilevel.results import dataset as datasets
from purejax_bilevel.results import statistics
from purejax_bilevel.runtime import loop, outcomes
from purejax_bilevel.studies import command_line
from purejax_bilevel.studies import run as runs
from tests.programs.programs import mostly

pytestmark = pytest.mark.usefixtures("compiled_once")

STEPS = 24
SMALL = Config(
    T_max=STEPS,
    eval_frequency=8,
    regret_frequency=3,
    n_samples=12,
    batch_size=5,
    hidden_dim=6,
    truth_hidden_dim=4,
    window_size=5,
    num_inner_steps=3,
    inner_lr=1e-3,
    grad_buffer_size=4,
    regret_window=3,
    regret_grid_size=3,
)


def train(config: Config, num_seeds: int = 2, seed: int = 0, **options: Any) -> outcomes.Outcome:
    part = runs.make_part(config.resolved(), num_seeds, seed)
    return loop.train([part], loop.RunOptions(**{"quiet": True, "devices": 1, **options}))


def member(rows: dict[str, np.ndarray], number: int) -> dict[str, np.ndarray]:
    return {name: array[number] for name, array in rows.items()}


def assert_same(first: Any, second: Any, tolerance: float = 0.0) -> None:
    for name in first:
        np.testing.assert_allclose(first[name], second[name], rtol=tolerance, atol=tolerance, err_msg=name)


def batched(config: Config) -> Config:
    """One member's configuration, with the array sizes filled in and every traced field one number."""
    config = config.resolved()
    part = runs.make_part(config, 1, 0)
    return jax.tree.map(
        lambda x: jnp.asarray(x[0], jnp.result_type(float) if x.dtype.kind == "f" else None), part.config
    )


# --- members ----------------------------------------------------------------------------------------------------------


GRID = replace(SMALL, lambda_reg=(0.0, 1.0))


@pytest.fixture(scope="module")
def together() -> outcomes.Outcome:
    """Two settings and two seeds on four devices, in one compiled program."""
    return train(GRID, chunks=3, devices=4)


def test_a_grid_is_compiled_once_and_its_members_differ(together: outcomes.Outcome):
    rows = together.rows[0]
    assert together.num_traces == 1
    assert not together.failed[0].any()
    assert len(np.unique(rows["outer_loss"][:, -1])) == 4
    assert np.isfinite(rows["static_regret"]).all()
    assert (rows["lambda"] >= 0).all()


def test_the_local_regret_is_the_sum_of_its_increments(together: outcomes.Outcome):
    """Both are logged: the sum says how much, the increments how it goes on where the sum no longer moves."""
    rows = together.rows[0]
    total = np.cumsum(rows["local_regret_increment"].astype(np.float64) * SMALL.eval_frequency, axis=1)
    assert rows["local_regret"].dtype == np.float64
    np.testing.assert_array_equal(rows["local_regret"], total)
    assert (rows["local_regret_increment"] > 0).all()


@pytest.mark.parametrize("options", [{"devices": 1}, {"devices": 1, "member_batch": 0}], ids=str)
def test_a_member_does_not_depend_on_its_neighbours(together: outcomes.Outcome, options: dict[str, Any]):
    """Alone, one after another or side by side (rounding differs by how products are grouped)."""
    alone = options == {"devices": 1}
    config = replace(GRID, lambda_reg=1.0) if alone else GRID
    other = train(config, num_seeds=1 if alone else 2, seed=int(alone), **options)
    assert_same(member(together.rows[0], 3), member(other.rows[0], -1), 1e-4)


@pytest.mark.slow  # networks of a traced width: tests/test_networks.py
def test_small_sizes_in_larger_arrays_are_the_small_program():
    sizes = {"window_size": 2, "grad_buffer_size": 1, "regret_window": 2, "hidden_dim": 3}
    mixed = train(replace(SMALL, **{name: (size, size + 4) for name, size in sizes.items()}), num_seeds=1).rows[0]
    small = train(replace(SMALL, **sizes), num_seeds=1, devices=1).rows[0]
    assert np.isnan(mixed["lambda"][0, :, 2:]).all()
    mixed["lambda"] = mixed["lambda"][..., :2]
    assert_same(member(mixed, 0), member(small, 0), 1e-4)
    assert len(np.unique(mixed["local_regret"][:, -1])) == 16


def test_a_resumed_run_goes_on_bit_for_bit(together: outcomes.Outcome, tmp_path: Path):
    train(replace(GRID, T_max=16), folder=tmp_path, devices=4, chunks=5)
    resumed = train(GRID, folder=tmp_path, resume=True, devices=4)
    assert_same(resumed.rows[0], together.rows[0])
    jax.tree.map(np.testing.assert_array_equal, resumed.state, together.state)


def test_memory_grows_neither_with_time_nor_with_the_pool_of_noise():
    def size(**changes: Any) -> int:
        config = runs.make_part(replace(SMALL, **changes).resolved(), 1, 0).config
        one = jax.tree.map(lambda x: jax.ShapeDtypeStruct((), x.dtype), config)
        state = jax.eval_shape(config.program().init, jax.random.key(0), one)
        return sum(leaf.size for leaf in jax.tree.leaves(state))

    assert size(T_max=10) == size(T_max=100_000)
    per_lag = size(window_size=6) - size()
    assert 0 < per_lag < 100  # lambda, its optimiser and the rings; no targets


# --- data -------------------------------------------------------------------------------------------------------------


def test_shifts():
    times = np.arange(1, 13)

    def shift(**changes: Any) -> np.ndarray:
        return np.asarray(regression_data.shift(replace(SMALL, **changes), jnp.asarray(times)))

    np.testing.assert_allclose(shift(shift_type="linear", alpha=0.5), 0.5 * times)
    np.testing.assert_allclose(shift(shift_type="sinusoidal"), 10 * np.sin(0.2 * times), rtol=1e-5)
    np.testing.assert_array_equal(shift(shift_type="none"), 0 * times)
    np.testing.assert_array_equal(
        shift(shift_type="abrupt", beta=2.0, abrupt_steps=5), np.where((times - 1) // 5 % 2 == 0, 2.0, -2.0)
    )


@pytest.mark.parametrize("weights", [(0.7, 0.0, 2.0, 1.1), (0.0, 0.0, 0.0, 0.0), (0.5, 0.5, 0.5, 0.5)], ids=str)
@pytest.mark.parametrize("time", [10, 4])
def test_the_window_has_the_law_of_noise_drawn_in_full(weights: tuple[float, ...], time: int):
    """Means and covariances of all that a step computes from the targets, the direction depending on their sums."""
    config = batched(replace(SMALL, window_size=4, noise_level=1.5, output_dim=2, n_samples=6, batch_size=3))
    problem = regression_data.init_problem(config, jax.random.key(3))
    lags = np.arange(1, 5)
    present = lags < time
    uniform = np.ones(4, np.float32)
    given = jnp.asarray(weights, jnp.float32)

    def measure(summary: Any, plain: Any, pull_back: Any, square: jax.Array) -> jax.Array:
        direction = jnp.sin(summary.target) + 0.3 * plain.target
        pulled = pull_back(regression_agents.Summary(summary.weight, direction))
        return jnp.concatenate([summary.target.ravel(), plain.target.ravel()[:2], pulled, square[None]])

    def drawn_in_part(key: jax.Array) -> jax.Array:
        noise = jax.random.normal(key, (regression_data.noise_size(config),))
        window = regression_data.make_window(config, problem, problem.f_inner, given, jnp.int32(time), noise)
        summary, plain = (regression_data.summarise(window, w) for w in (given, uniform))
        pull_back = lambda gradient: regression_data.pull_back(window, gradient)  # noqa: E731
        return measure(summary, plain, pull_back, regression_data.mean_square(window, given))

    def drawn_in_full(key: jax.Array) -> jax.Array:
        shifts = regression_data.shift(config, jnp.asarray(time - lags, jnp.float32))
        clean = problem.f_inner + shifts[:, None, None] * problem.direction[:, None]
        targets = clean + 1.5 * jax.random.normal(key, (4, *problem.f_inner.shape))
        kept = [jnp.where(present, w, 0.0) for w in (given, uniform)]
        summary, plain = (regression_agents.Summary(w.sum(), jnp.tensordot(w, targets, 1)) for w in kept)
        pull_back = lambda g: present * (g.weight + jnp.tensordot(targets, g.target, 2))  # noqa: E731
        return measure(summary, plain, pull_back, kept[0] @ (targets**2).sum(1).mean(1))

    samples = 40_000
    part, full = (
        np.asarray(jax.jit(jax.vmap(f))(jax.random.split(jax.random.key(seed), samples)), np.float64)
        for seed, f in enumerate((drawn_in_part, drawn_in_full))
    )
    spread = full.std(0) + 1e-3
    assert (np.abs(part.mean(0) - full.mean(0)) < 6 * spread * (2 / samples) ** 0.5).all()
    scaled = [(x - full.mean(0))[:, :-1] / spread[:-1] for x in (part, full)]  # the last one is an expectation
    for power in (1, 2):
        moments = [np.einsum("ni,nj->nij", x**power, x) for x in scaled]
        error = (moments[0].mean(0) - moments[1].mean(0)) / (moments[1].std(0) + 1e-3) * (samples / 2) ** 0.5
        assert np.abs(error).max() < 6


# --- hypergradients ---------------------------------------------------------------------------------------------------


def fitted_learner(config: Config, optimum: jax.Array) -> regression_agents.Learner:
    """A learner whose network is constant."""
    learner = regression_agents.init_learner(config, jax.random.key(1))
    inner = jax.tree.map(jnp.zeros_like, learner.inner)
    return learner.replace(inner=(*inner[:-1], inner[-1]._replace(bias=optimum)))


def test_exact_is_the_derivative_of_the_outer_loss_at_the_inner_optimum(float64: Any):
    config = batched(replace(SMALL, agent_type="exact"))
    optimum, weight = jnp.array([1.0, -2.0, 0.5]), 3.0
    summary = regression_agents.Summary(jnp.asarray(weight), weight * jnp.tile(optimum[:, None], (1, 5)))
    x_inner, x_outer = jax.random.normal(jax.random.key(0), (2, 5, 5))
    y_outer, y_inner = jax.random.normal(jax.random.key(2), (2, 3, 5))
    data = regression_agents.Data(x_inner, x_outer, y_outer, y_inner)
    step, _ = regression_agents.exact_agent(config, fitted_learner(config, optimum), data, summary)
    truth = jax.grad(lambda s: regression_agents.outer_loss(s.target / s.weight, y_inner))(summary)
    np.testing.assert_allclose(step.gradient.weight, truth.weight, rtol=1e-9)
    np.testing.assert_allclose(step.gradient.target, truth.target, rtol=1e-9)


def test_a_well_fitted_dual_gives_the_exact_hypergradient():
    """Also its sign: the dual of funcbo descends the outer loss, that of the reference ascends it."""
    base = replace(SMALL, dual_lr=1e-2, num_dual_steps=1500, hidden_dim=16)
    x, y = jax.random.normal(jax.random.key(0), (5, 5)), jax.random.normal(jax.random.key(2), (3, 5))
    data = regression_agents.Data(x, x, y, y)
    summary = regression_agents.Summary(jnp.asarray(2.0), jax.random.normal(jax.random.key(4), (3, 5)))
    gradients = {}
    for name, agent_type, reference in (
        ("exact", "exact", False),
        ("dual", "funcbo", False),
        ("reference", "funcbo", True),
    ):
        config = batched(replace(base, agent_type=agent_type, reference_dual=reference))
        agent = regression_agents.AGENTS[agent_type]
        learner = agent.init(config, jax.random.key(1))
        step = jax.jit(lambda *args, config=config, agent=agent: agent.step(config, *args)[0])
        gradients[name] = step(learner, data, summary).gradient.target.ravel()
    np.testing.assert_allclose(gradients["dual"], gradients["exact"], atol=0.05 * jnp.abs(gradients["exact"]).max())
    np.testing.assert_allclose(
        -5 * gradients["reference"], gradients["exact"], atol=0.2 * jnp.abs(gradients["exact"]).max()
    )


def test_unroll_is_the_derivative_through_its_steps(float64: Any):
    config = batched(replace(SMALL, agent_type="unroll"))
    learner = regression_agents.init_learner(config, jax.random.key(1))
    x_inner, x_outer = jax.random.normal(jax.random.key(0), (2, 5, 5))
    data = regression_agents.Data(x_inner, x_outer, jax.random.normal(jax.random.key(2), (3, 5)))
    summary = regression_agents.Summary(jnp.asarray(2.0), jax.random.normal(jax.random.key(4), (3, 5)))
    run = jax.jit(lambda summary: regression_agents.unrolled_agent(config, learner, data, summary)[0])
    direction = regression_agents.Summary(jnp.asarray(0.3), jax.random.normal(jax.random.key(5), (3, 5)))
    small = 1e-5
    ahead, behind = (
        run(jax.tree.map(lambda s, d, sign=sign: s + sign * small * d, summary, direction)).outer_loss
        for sign in (1, -1)
    )
    gradient = run(summary).gradient
    slope = gradient.weight * direction.weight + jnp.vdot(gradient.target, direction.target)
    np.testing.assert_allclose(slope, (ahead - behind) / (2 * small), rtol=1e-5)


@pytest.mark.parametrize("reference", [False, True])
def test_the_dual_is_carried_unless_the_reference_is_asked_for(reference: bool):
    config = batched(replace(SMALL, reference_dual=reference))
    program = config.program()
    state = jax.jit(program.init)(jax.random.key(0), config)
    after, _ = jax.jit(program.update)(state, config, jnp.int32(4))
    pairs = zip(jax.tree.leaves(state.learner.dual), jax.tree.leaves(after.learner.dual), strict=True)
    assert all((first == last).all() for first, last in pairs) == reference


@pytest.mark.parametrize("agent_type", mostly(regression_agents.AGENTS, {"unroll1", "funcbo_nosmooth", "exact"}))
def test_agents_learn_a_problem_that_stands_still(agent_type: str):
    config = Config(
        agent_type=agent_type,
        shift_type="none",
        T_max=400,
        eval_frequency=20,
        regret_frequency=0,
        n_samples=32,
        batch_size=16,
        hidden_dim=16,
        truth_hidden_dim=4,
        window_size=8,
        num_inner_steps=4,
        inner_lr=3e-3,
        noise_level=0.1,
        input_dim=2,
    )
    outcome = train(config, num_seeds=1, devices=1, chunks=3)
    error = outcome.rows[0]["evaluation_mse"][0]
    assert outcome.num_traces == 1
    assert not outcome.failed[0].any()
    assert error[-1] < 0.25 * error[0]


def test_the_error_is_the_mean_over_all_times_since_the_last_evaluation():
    """A sinusoid's single times show one phase of it; each error is that of all inputs, with the targets of its
    time."""
    config = replace(SMALL, noise_level=0.5)
    means = train(config, num_seeds=1).rows[0]["evaluation_mse"][0]
    single = train(replace(config, eval_frequency=1), num_seeds=1).rows[0]["evaluation_mse"][0]
    np.testing.assert_allclose(means, single.reshape(3, 8).mean(1), rtol=1e-5)
    assert single.max() > 1.5 * single.min()
    config = batched(config)
    program = config.program()
    state = jax.jit(program.init)(jax.random.key(0), config)
    after, metrics = jax.jit(program.update)(state, config, jnp.int32(4))
    parameters = [np.asarray(leaf) for layer in after.learner.inner for leaf in layer]
    errors = [
        plain_forward(parameters, np.asarray(x))[0]
        - np.asarray(f)
        - 10 * np.sin(0.2 * 5) * np.asarray(state.problem.direction)[:, None]
        for x, f in ((state.problem.x_inner, state.problem.f_inner), (state.problem.x_outer, state.problem.f_outer))
    ]
    np.testing.assert_allclose(metrics["evaluation_mse"][0], np.mean(np.square(errors)) + 0.25, rtol=1e-5)


# --- regret -----------------------------------------------------------------------------------------------------------


def test_regrets_are_those_of_plain_numpy(float64: Any):
    config = batched(replace(SMALL, noise_level=0.5))
    program = config.program()
    state = jax.jit(program.init)(jax.random.key(0), config)

    @jax.jit
    def look(state: Any, t: jax.Array) -> tuple:
        batch, window = program._draw(state, config, t)
        summary = regression_data.summarise(window, state.learner.weights)
        result, _ = regression_agents.functional_agent(config, state.learner, batch, summary)
        uniform = regression_data.summarise(window, window.present)
        return batch, uniform, result.outer_loss, regression_data.pull_back(window, result.gradient)

    step = jax.jit(program.update)
    hypergradients, increments, own, constant = [], [], 0.0, np.zeros(3)
    for t in range(10):
        batch, uniform, outer_loss, hypergradient = look(state, jnp.int32(t))
        hypergradients.append(np.asarray(hypergradient))
        if (t + 1) % 3 == 0:
            own += float(outer_loss)
            constant += [plain_loss(config, state.learner, batch, uniform, c) for c in (0.0, 2.5, 5.0)]
        state, metrics = step(state, config, jnp.int32(t))
        increments.append(float(metrics["local_regret_increment"][0]))
    row = jax.jit(program.evaluate)(state, config, jnp.int32(9), jnp.bool(False))
    means = [np.mean(hypergradients[max(0, t - 2) : t + 1], axis=0) for t in range(10)]
    np.testing.assert_allclose(increments, [(mean**2).sum() for mean in means], rtol=1e-8)
    np.testing.assert_allclose(row["static_regret"], own - constant.min(), rtol=1e-8)
    assert row["best_constant"] == (0.0, 2.5, 5.0)[int(constant.argmin())]


def plain_loss(config: Config, learner: Any, batch: Any, uniform: Any, constant: float) -> float:
    """Outer loss after Adam steps with all weights equal to `constant`, in numpy."""
    parameters = [np.asarray(leaf) for layer in learner.inner for leaf in layer]
    adam = learner.inner_optimizer[0]
    first, second = ([np.asarray(leaf) for layer in moment for leaf in layer] for moment in (adam.mu, adam.nu))
    weight, target = constant * float(uniform.weight), constant * np.asarray(uniform.target)
    x, size = np.asarray(batch.x_inner), batch.x_inner.shape[1]
    for step in range(int(adam.count) + 1, int(adam.count) + 1 + config.num_inner_steps):
        values, tape = plain_forward(parameters, x)
        gradient = plain_backward(parameters, tape, 2 * (weight * values - target) / size)
        for i, g in enumerate(gradient):
            first[i] = 0.9 * first[i] + 0.1 * g
            second[i] = 0.999 * second[i] + 0.001 * g**2
            scaled = first[i] / (1 - 0.9**step) / (np.sqrt(second[i] / (1 - 0.999**step)) + 1e-8)
            parameters[i] = parameters[i] - float(config.inner_lr) * scaled
    return float(np.mean((plain_forward(parameters, np.asarray(batch.x_outer))[0] - np.asarray(batch.y_outer)) ** 2))


def plain_forward(parameters: list, x: np.ndarray) -> tuple[np.ndarray, list]:
    tape = []
    for i in range(0, len(parameters), 2):
        z = parameters[i].T @ x + parameters[i + 1][:, None]
        tape.append((x, z))
        inside = np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)
        x = 0.5 * z * (1 + np.tanh(inside))
    return z, tape


def plain_backward(parameters: list, tape: list, error: np.ndarray) -> list:
    gradient: list = []
    for i in range(len(tape) - 1, -1, -1):
        x, z = tape[i]
        if i < len(tape) - 1:
            tanh = np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3))
            slope = np.sqrt(2 / np.pi) * (1 + 3 * 0.044715 * z**2)
            error = error * (0.5 * (1 + tanh) + 0.5 * z * (1 - tanh**2) * slope)
        gradient = [x @ error.T, error.sum(1), *gradient]
        error = parameters[2 * i] @ error
    return gradient


# --- command line and figures -----------------------------------------------------------------------------------------


def test_a_run_leaves_results_and_figures(tmp_path: Path, capsys: pytest.CaptureFixture):
    arguments = (
        "--T_max 6 --eval_frequency 2 --regret_frequency 0 --n_samples 8 --batch_size 4 --input_dim 2 --hidden_dim 4 "
        "--num_inner_steps 1 --window_size 2 3 --num_seeds 2 --agent_type funcBO_noSmooth --devices 1 "
        f"--output_dir {tmp_path} --name one"
    ).split()
    assert command_line.main(Config, "", arguments) == 0
    folder = tmp_path / "one"
    for name in ("curves.png", "lambda.png", "approximation.png", "results.nc", "config.yaml"):
        assert (folder / name).stat().st_size > 0
    printed = capsys.readouterr().out
    assert "evaluation MSE" in printed
    assert "local regret" in printed
    dataset = datasets.load(folder)
    assert statistics.lower_is_better(dataset, "evaluation_mse")
    assert dataset["lambda"].dims == ("window_size", "seed", "step", "lag")
    assert command_line.main(Config, "", ["--resume", str(folder), "--T_max", "8", "--devices", "1"]) == 0
    assert datasets.load(folder).sizes["step"] == 4
    assert command_line.main(Config, "", ["--resume", str(folder), "--T_max", "4"]) == 2
    for input_dim in (1, 3):  # the numbers are of two inputs: what counts is that every kind of figure is drawn
        dataset.attrs["config"]["input_dim"] = input_dim
        assert regression_figures.approximation(dataset, tmp_path / f"{input_dim}.png").stat().st_size > 0
    failed = dataset.assign(failed=dataset["failed"] | True)
    regression_figures.write_figures(failed, tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"batch_size": 7}, "--batch_size 7 is larger than the 6 inputs"),
        (
            {"agent_type": "aid", "reference_dual": True},
            "--reference_dual is for --agent_type funcbo, funcbo_nosmooth, not aid.",
        ),
        (
            {"agent_type": "funcbo_nosmooth", "average_hypergradients": True},
            "--average_hypergradients is for --agent_type funcbo, aid, unroll1, unroll, exact, not",
        ),
        ({"shift_type": "wobbly"}, "--shift_type must be one of sinusoidal, linear, abrupt, none, got 'wobbly'"),
        ({"window_size": (3, 0)}, "--window_size must be a whole number of at least 1, got 0"),
    ],
)
def test_bad_input_is_refused_in_words(changes: dict[str, Any], words: str):
    with pytest.raises(UserError) as error:
        replace(SMALL, **changes).resolved()
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("failed", "words"),
    [
        ([False], "one seed"),
        ([True, False], "IQM over 2 seeds, 95 % interval; 1 diverged member left out"),
        ([True, True, False], "IQM over 3 seeds, 95 % interval; 2 diverged members left out"),
    ],
)
def test_words_under_a_figure_are_singular_where_there_is_one(failed: list[bool], words: str):
    assert regression_figures._seeds_in_words(xarray.Dataset({"failed": ("seed", failed)}, attrs={"axes": {}})) == words

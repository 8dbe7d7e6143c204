"""Implicit differentiation against finite differences, closed forms and numpy; each solver by its definition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.flatten_util import ravel_pytree

from purejax_bilevel import bilevel
from tests.programs.programs import mostly

pytestmark = pytest.mark.usefixtures("float64")

EXACT = {
    "conjugate_gradient": lambda: bilevel.conjugate_gradient(tolerance=1e-13),
    "neumann": lambda: bilevel.neumann(3000, 0.15),
    "dense": lambda: bilevel.dense(),
    "gmres": lambda: bilevel.gmres(tolerance=1e-12),
}
ALL = {"identity": bilevel.identity, **EXACT}
INDEFINITE = np.array([[2.0, 1.0, 0.0], [1.0, -3.0, 0.5], [0.0, 0.5, 1.0]])
UNSYMMETRIC = np.array([[0.0, 2.0, 0.3], [1.0, 0.1, -0.4], [0.2, -1.0, 1.5]])  # zero pivot first
POSITIVE = np.array([[2.0, 0.5, 0.1], [0.5, 1.0, -0.2], [0.1, -0.2, 1.5]])
RIGHT = np.array([1.0, -2.0, 0.5])


def product(matrix):
    return lambda x: jnp.asarray(matrix) @ x


def descend(problem, steps=3000):
    """Solve the inner problem by a loop that reverse mode cannot differentiate."""

    def solver(outer, inner):
        gradient = lambda x: jax.grad(problem.inner_loss, argnums=1)(outer, x)  # noqa: E731
        step = lambda x: jax.tree.map(lambda p, g: p - problem.step_size * g, x, gradient(x))  # noqa: E731
        return lax.while_loop(lambda c: c[0] < steps, lambda c: (c[0] + 1, step(c[1])), (0, inner))[1]

    return solver


def whole_gradient(problem, outer, hypergradient, solve):
    """Direct part plus the indirect part found by `hypergradient`, at the exact inner solution."""
    inner = problem.solution(outer)
    direct, cotangent = jax.grad(problem.outer_loss, argnums=(0, 1))(outer, inner)
    return jax.tree.map(jnp.add, direct, hypergradient(outer, inner, cotangent, solve))


def hypergradients(problem):
    optimality = jax.grad(problem.inner_loss, argnums=1)
    return {
        "root": lambda *args: bilevel.root_hypergradient(optimality, *args),
        "minimum": lambda *args: bilevel.minimum_hypergradient(problem.inner_loss, *args),
    }


# ---------------------------------------------------------------------------------------------------- hypergradients


@pytest.mark.parametrize("solver", EXACT)
def test_every_exact_solver_gives_finite_differences(problem, reference, assert_close, solver):
    rules = hypergradients(problem)
    gradients = jax.jit(lambda outer: [whole_gradient(problem, outer, r, EXACT[solver]()) for r in rules.values()])
    for gradient in gradients(problem.outer):
        assert_close(gradient, reference, atol=1e-7)


def test_quadratic_closed_form(quadratic_problem, assert_close):
    problem = quadratic_problem
    theta, zero = np.asarray(problem.outer), jnp.zeros(4)
    matrix = np.asarray(jax.jit(jax.hessian(problem.inner_loss, argnums=1))(problem.outer, zero))
    mixing = -np.asarray(jax.jit(jax.jacfwd(jax.grad(problem.inner_loss, argnums=1)))(problem.outer, zero))
    target = -np.asarray(jax.grad(problem.outer_loss, argnums=1)(problem.outer, zero))
    inner = np.linalg.solve(matrix, mixing @ theta)
    expected = mixing.T @ np.linalg.solve(matrix, inner - target) + 0.1 * theta
    for rule in hypergradients(problem).values():
        gradient = jax.jit(lambda outer: whole_gradient(problem, outer, rule, bilevel.dense()))  # noqa: B023
        assert_close(gradient(problem.outer), expected, atol=1e-12)


def test_identity_is_the_cross_product(problem, assert_close):
    inner = jax.tree.map(lambda x: x + 0.3, problem.initial_inner)  # any point, not only a solution
    flat_outer, unravel_outer = ravel_pytree(problem.outer)
    flat_inner, unravel_inner = ravel_pytree(inner)
    cotangent = jnp.asarray(np.linspace(-1.0, 1.0, flat_inner.size))

    @jax.jit
    def cross_product(outer):
        loss = lambda o, i: problem.inner_loss(unravel_outer(o), unravel_inner(i))  # noqa: E731
        return unravel_outer(-cotangent @ jax.jacfwd(jax.grad(loss, argnums=1))(outer, flat_inner))

    for rule in hypergradients(problem).values():
        for solve in ((), (bilevel.identity(),)):
            hypergradient = jax.jit(lambda outer: rule(outer, inner, unravel_inner(cotangent), *solve))  # noqa: B023
            assert_close(hypergradient(problem.outer), cross_product(flat_outer), atol=1e-12)


@pytest.mark.parametrize("solver", EXACT)
def test_root_and_minimum_agree_away_from_the_solution(ridge, assert_close, solver):
    inner = jax.tree.map(lambda x: x + 0.2, ridge.initial_inner)
    cotangent = jax.tree.map(lambda x: jnp.sin(1.0 + x), inner)
    rules = hypergradients(ridge).values()
    root, minimum = jax.jit(lambda outer: [rule(outer, inner, cotangent, EXACT[solver]()) for rule in rules])(
        ridge.outer
    )
    assert_close(minimum, root, atol=1e-9)


@pytest.mark.parametrize("solver", ["dense", "gmres"])
def test_root_uses_the_transposed_jacobian(solver, assert_close):
    """x = J^-1 theta with an unsymmetric J: the hypergradient of <c, x> is J^-T c."""
    optimality = lambda theta, x: product(UNSYMMETRIC)(x) - theta  # noqa: E731
    theta = jnp.asarray(RIGHT)
    inner = jnp.asarray(np.linalg.solve(UNSYMMETRIC, RIGHT))
    cotangent = jnp.asarray([0.5, 1.0, -1.0])
    expected = np.linalg.solve(UNSYMMETRIC.T, cotangent)
    rule = jax.jit(lambda theta: bilevel.root_hypergradient(optimality, theta, inner, cotangent, EXACT[solver]()))
    assert_close(rule(theta), expected)
    solution = bilevel.implicit_root(
        lambda theta, _: bilevel.dense()(product(UNSYMMETRIC), theta), optimality, EXACT[solver]()
    )
    assert_close(jax.jit(jax.grad(lambda theta: cotangent @ solution(theta, jnp.zeros(3))))(theta), expected)


def test_matrix_products_run_in_full_precision(quadratic_problem):
    problem = quadratic_problem
    inner = problem.initial_inner
    for rule in hypergradients(problem).values():
        for solve in (bilevel.identity(), bilevel.conjugate_gradient()):
            program = str(jax.make_jaxpr(lambda outer: rule(outer, inner, inner + 1.0, solve))(problem.outer))  # noqa: B023
            products = program.count("dot_general[")
            assert products > 0
            assert program.count("Precision.HIGHEST") >= products


# ------------------------------------------------------------------------------------------------------ implicit_root


@pytest.mark.parametrize("solver", ["conjugate_gradient", "dense"])
def test_implicit_root_gives_the_whole_gradient(problem, reference, assert_close, solver):
    solution = bilevel.implicit_root(descend(problem), jax.grad(problem.inner_loss, argnums=1), EXACT[solver]())

    @jax.jit
    def value_and_gradient(outer):
        return jax.value_and_grad(lambda o: problem.outer_loss(o, solution(o, problem.initial_inner)))(outer)

    value, gradient = value_and_gradient(problem.outer)
    np.testing.assert_allclose(value, problem.outer_loss(problem.outer, problem.solution(problem.outer)), rtol=1e-10)
    assert_close(gradient, reference, atol=1e-7)


def test_implicit_root_by_default(ridge, assert_close):
    """The identity for the outer variables, and no gradient at all for the starting point."""
    solution = bilevel.implicit_root(descend(ridge), jax.grad(ridge.inner_loss, argnums=1))
    loss = lambda outer, initial: ridge.outer_loss(outer, solution(outer, initial))  # noqa: E731
    over_outer, over_initial = jax.jit(jax.grad(loss, argnums=(0, 1)))(ridge.outer, ridge.initial_inner)
    rule = hypergradients(ridge)["root"]
    assert_close(over_outer, jax.jit(lambda o: whole_gradient(ridge, o, rule, bilevel.identity()))(ridge.outer))
    assert_close(over_initial, ridge.initial_inner, atol=0.0)  # zeros


@pytest.mark.parametrize("solver", ["conjugate_gradient", "dense"])
def test_forward_mode_and_second_order(ridge, assert_close, solver):
    solution = bilevel.implicit_root(descend(ridge), jax.grad(ridge.inner_loss, argnums=1), EXACT[solver]())
    implicit = lambda outer: ridge.outer_loss(outer, solution(outer, ridge.initial_inner))  # noqa: E731
    direct = lambda outer: ridge.outer_loss(outer, ridge.solution(outer))  # noqa: E731
    direction = jax.tree.map(jnp.ones_like, ridge.outer)
    along = lambda f: jax.jvp(jax.grad(f), (ridge.outer,), (direction,))  # noqa: E731
    for actual, expected in zip(jax.jit(lambda: along(implicit))(), along(direct), strict=True):
        assert_close(actual, expected, atol=1e-7)


def test_captured_values_are_differentiated_through_vmap(assert_close):
    """The condition captures a batched scale, the solver a batched integer, and the gradient is taken outside vmap."""

    def loss(scale, theta, repeats):
        def member(scale, repeats):
            solver = lambda theta, x: lax.fori_loop(0, repeats, lambda _, x: x - 0.5 * (scale * x - theta), x)  # noqa: E731
            solution = bilevel.implicit_root(solver, lambda theta, x: scale * x - theta, bilevel.dense())
            return jnp.sum(solution(theta, jnp.zeros(2)) ** 2)

        return jax.vmap(member)(scale, repeats).sum()

    scale, theta = jnp.asarray([0.5, 1.0, 1.5]), jnp.asarray([1.0, -2.0])
    over_scale, over_theta = jax.jit(jax.grad(loss, argnums=(0, 1)))(scale, theta, jnp.asarray([200, 201, 202]))
    np.testing.assert_allclose(over_scale, -2 * 5.0 / scale**3, rtol=1e-10)
    np.testing.assert_allclose(over_theta, 2 * theta * jnp.sum(scale**-2.0), rtol=1e-10)


# ---------------------------------------------------------------------------------------------------- transformations


@pytest.mark.parametrize("solver", mostly(ALL, {"gmres", "neumann", "identity"}))
def test_vmapped_hypergradients_equal_single_ones(ridge, assert_close, solver):
    scales = jnp.asarray([0.8, 1.3])
    members = jax.tree.map(lambda x: scales.reshape(-1, *[1] * x.ndim) * x, ridge.outer)
    inner = ridge.initial_inner
    cotangent = jax.tree.map(jnp.ones_like, inner)
    solution = bilevel.implicit_root(descend(ridge, 300), jax.grad(ridge.inner_loss, argnums=1), ALL[solver]())

    def gradients(outer):
        implicit = jax.grad(lambda o: ridge.outer_loss(o, solution(o, inner)))(outer)
        return [implicit, *(rule(outer, inner, cotangent, ALL[solver]()) for rule in hypergradients(ridge).values())]

    together = jax.jit(jax.vmap(gradients))(members)
    alone = jax.jit(lambda members: lax.map(gradients, members))(members)
    assert_close(together, alone, atol=1e-9)


def test_solver_parameters_may_be_traced_and_vmapped(assert_close):
    b = jnp.asarray(RIGHT)
    numbers = jnp.asarray([0.1, 0.2, 0.3])
    factories = [
        lambda x: bilevel.conjugate_gradient(damping=x, tolerance=1e-12 * x, absolute_tolerance=1e-12 * x),
        lambda x: bilevel.neumann(3, step_size=x),
        lambda x: bilevel.dense(damping=x),
        lambda x: bilevel.gmres(damping=x, tolerance=1e-12),
    ]
    for factory in factories:
        solve = lambda x: factory(x)(product(POSITIVE), b)  # noqa: B023, E731
        together = jax.jit(jax.vmap(solve))(numbers)
        alone = jax.jit(lambda: [solve(x) for x in (0.1, 0.2, 0.3)])()  # noqa: B023
        assert_close(together, jnp.stack(alone), atol=1e-10)


def test_hypergradient_inside_a_scan(ridge, assert_close):
    """An online loop: one inner descent step, one hypergradient, one outer step."""

    def step(carry, _):
        outer, inner = carry
        gradient = jax.grad(ridge.inner_loss, argnums=1)(outer, inner)
        inner = jax.tree.map(lambda p, g: p - ridge.step_size * g, inner, gradient)
        cotangent = jax.grad(ridge.outer_loss, argnums=1)(outer, inner)
        rule = hypergradients(ridge)["minimum"]
        hypergradient = rule(outer, inner, cotangent, bilevel.conjugate_gradient(tolerance=1e-12))
        outer = jax.tree.map(lambda p, g: p - 0.1 * g, outer, hypergradient)
        return (outer, inner), ridge.outer_loss(outer, inner)

    carry = ridge.outer, ridge.initial_inner
    scanned, losses = jax.jit(lambda c: lax.scan(step, c, length=30))(carry)
    one_step = jax.jit(lambda c: step(c, None))
    for _ in range(30):
        carry, loss = one_step(carry)
    assert_close(scanned, carry, atol=1e-10)
    assert losses[-1] < losses[0]
    np.testing.assert_allclose(losses[-1], loss, rtol=1e-10)


# ----------------------------------------------------------------------------------------------------- linear solvers


@pytest.mark.parametrize(
    ("solve", "matrix"),
    [
        (bilevel.identity(), np.eye(3)),
        (bilevel.conjugate_gradient(tolerance=1e-12), POSITIVE),
        (bilevel.conjugate_gradient(tolerance=1e-12), INDEFINITE),
        (bilevel.dense(), POSITIVE),
        (bilevel.dense(), INDEFINITE),
        (bilevel.dense(), UNSYMMETRIC),
        (bilevel.gmres(tolerance=1e-12), INDEFINITE),
        (bilevel.gmres(tolerance=1e-12), UNSYMMETRIC),
        (bilevel.neumann(500, 0.5), POSITIVE),
    ],
)
def test_solution_of_a_known_system(solve, matrix):
    x = solve(product(matrix), jnp.asarray(RIGHT))
    np.testing.assert_allclose(x, np.linalg.solve(matrix, RIGHT), atol=1e-9)


@pytest.mark.parametrize(
    "factory", [functools.partial(bilevel.conjugate_gradient, tolerance=1e-12), bilevel.dense, bilevel.gmres]
)
def test_damping_is_added_to_the_diagonal(factory):
    x = factory(damping=0.7)(product(POSITIVE), jnp.asarray(RIGHT))
    np.testing.assert_allclose(x, np.linalg.solve(POSITIVE + 0.7 * np.eye(3), RIGHT), atol=1e-5)


@pytest.mark.parametrize("num_terms", [1, 2, 5])
def test_neumann_sums_its_terms(num_terms):
    step = 0.2
    power = lambda k: np.linalg.matrix_power(np.eye(3) - step * POSITIVE, k)  # noqa: E731
    expected = step * sum(power(k) @ RIGHT for k in range(num_terms))
    np.testing.assert_allclose(
        bilevel.neumann(num_terms, step)(product(POSITIVE), jnp.asarray(RIGHT)), expected, rtol=1e-12
    )


@pytest.mark.parametrize("matrix", [POSITIVE, INDEFINITE])
def test_conjugate_gradient_stops_after_max_steps(matrix):
    x, residual = np.zeros(3), RIGHT.copy()
    direction = residual.copy()
    for _ in range(2):
        length = residual @ residual / (direction @ matrix @ direction)
        x, new = x + length * direction, residual - length * matrix @ direction
        direction, residual = new + new @ new / (residual @ residual) * direction, new
    solve = bilevel.conjugate_gradient(tolerance=0.0, max_steps=2)
    np.testing.assert_allclose(solve(product(matrix), jnp.asarray(RIGHT)), x, rtol=1e-12)


@pytest.mark.parametrize("arguments", [{"tolerance": 1.0}, {"tolerance": 0.0, "absolute_tolerance": 3.0}])
def test_conjugate_gradient_stops_at_either_tolerance(arguments):
    """|b| = 2.29: both tolerances are met by x = 0 already; a little smaller ones are not."""
    b = jnp.asarray(RIGHT)
    assert not bilevel.conjugate_gradient(**arguments)(product(POSITIVE), b).any()
    smaller = {name: 0.5 * value for name, value in arguments.items()}
    assert bilevel.conjugate_gradient(**smaller)(product(POSITIVE), b).any()


def test_zero_right_side_gives_zero():
    for solver in ALL.values():
        assert not solver()(product(POSITIVE), jnp.zeros(3)).any()


def test_dense_on_a_larger_system_and_pytree(assert_close):
    rng = np.random.default_rng(3)
    matrix = rng.normal(size=(40, 40))
    b = {"a": jnp.asarray(rng.normal(size=(5, 6))), "b": (jnp.asarray(rng.normal(size=10)),)}
    flat, unravel = ravel_pytree(b)
    matvec = lambda x: unravel(matrix @ ravel_pytree(x)[0])  # noqa: E731
    assert_close(bilevel.dense()(matvec, b), unravel(jnp.asarray(np.linalg.solve(matrix, flat))), atol=1e-10)


def test_dense_loses_no_more_digits_than_lapack():
    matrix = 1.0 / (np.arange(8)[:, None] + np.arange(8) + 1)  # Hilbert: condition number 1.5e10
    b = matrix @ np.ones(8)
    error = lambda x: np.abs(np.asarray(x) - 1).max()  # noqa: E731
    assert error(bilevel.dense()(product(matrix), jnp.asarray(b))) < 100 * error(np.linalg.solve(matrix, b)) + 1e-12


def indefinite(size, seed):
    """Symmetric, a third of the eigenvalues negative, all between 0.02 and 3 in size."""
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.normal(size=(size, size)))[0]
    positive = size * 2 // 3
    eigenvalues = np.concatenate([np.geomspace(0.02, 3.0, positive), -np.geomspace(0.02, 0.5, size - positive)])
    return basis @ np.diag(eigenvalues) @ basis.T, rng.normal(size=size)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("seed", range(3))
def test_gmres_with_a_whole_krylov_space_solves_indefinite_systems(dtype, seed):
    """A space of 20 vectors stagnates there, however often it starts again; the residual says so."""
    matrix, b = indefinite(60, seed)
    expected = np.linalg.solve(matrix + 0.01 * np.eye(60), b)
    with jax.enable_x64(dtype == np.float64):
        small, right = product(matrix.astype(dtype)), jnp.asarray(b, dtype)

        def solved(restart):
            x = bilevel.gmres(0.01, max_steps=20, restart=restart)(small, right)
            return x, bilevel.relative_residual(small, x, right, 0.01)

        (short, short_residual), (whole, whole_residual) = jax.jit(lambda: (solved(20), solved(60)))()
        exact = jax.jit(lambda: bilevel.dense(0.01)(small, right))()
    error = lambda x: np.linalg.norm(x - expected) / np.linalg.norm(expected)  # noqa: E731
    assert error(whole) < 1e-3
    assert error(exact) < 1e-3
    assert whole_residual < 1e-3
    assert error(short) > 0.1
    assert short_residual > 0.02


def test_relative_residual_is_that_of_the_damped_system():
    x, b = {"a": jnp.asarray([1.0, 2.0]), "b": jnp.asarray(-1.0)}, {"a": jnp.asarray([3.0, 0.0]), "b": jnp.asarray(4.0)}
    twice = lambda x: jax.tree.map(lambda leaf: 2.0 * leaf, x)  # noqa: E731
    expected = np.linalg.norm(2.5 * np.array([1.0, 2.0, -1.0]) - [3.0, 0.0, 4.0]) / 5.0
    np.testing.assert_allclose(bilevel.relative_residual(twice, x, b, 0.5), expected, rtol=1e-12)
    assert bilevel.relative_residual(twice, jax.tree.map(jnp.zeros_like, x), b) == 1.0
    assert bilevel.relative_residual(twice, jax.tree.map(jnp.zeros_like, b), jax.tree.map(jnp.zeros_like, b)) == 0.0


def test_the_residual_comes_with_the_hypergradient(quadratic_problem, assert_close):
    problem = quadratic_problem
    inner = problem.solution(problem.outer)
    cotangent = jax.grad(problem.outer_loss, argnums=1)(problem.outer, inner)
    hessian = np.asarray(jax.hessian(problem.inner_loss, argnums=1)(problem.outer, inner))
    arguments = (problem.inner_loss, problem.outer, inner, cotangent)
    for solve, damping in ((bilevel.dense(0.3), 0.3), (bilevel.identity(), 0.0), (bilevel.neumann(3, 0.1), 0.0)):
        gradient, residual = bilevel.minimum_hypergradient_and_residual(*arguments, solve, damping)
        assert_close(gradient, bilevel.minimum_hypergradient(*arguments, solve), atol=1e-12)
        adjoint = np.asarray(solve(product(hessian), cotangent))
        expected = np.linalg.norm((hessian + damping * np.eye(4)) @ adjoint - cotangent) / np.linalg.norm(cotangent)
        np.testing.assert_allclose(residual, expected, atol=1e-12)


def test_dense_calls_no_lapack():
    solve = jax.jit(jax.vmap(lambda b: bilevel.dense()(product(POSITIVE), b)))
    assert "custom-call" not in solve.lower(jnp.ones((2, 3))).compile().as_text()


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bilevel.conjugate_gradient(max_steps=0), "max_steps is 0, it must be at least 1"),
        (lambda: bilevel.conjugate_gradient(damping=-1e-3), "damping is -0.001, it must be at least 0"),
        (lambda: bilevel.conjugate_gradient(tolerance=-1), "tolerance is -1, it must be at least 0"),
        (lambda: bilevel.conjugate_gradient(absolute_tolerance=-1), "absolute_tolerance is -1, it must be at least 0"),
        (lambda: bilevel.neumann(0, 0.1), "num_terms is 0, it must be at least 1"),
        (lambda: bilevel.neumann(2.5, 0.1), "num_terms is 2.5, it must be a whole number"),
        (lambda: bilevel.neumann(2, -0.1), "step_size is -0.1, it must be at least 0"),
        (lambda: bilevel.dense(damping=-1), "damping is -1, it must be at least 0"),
        (lambda: bilevel.dense(damping=np.ones(2)), r"damping has shape \(2,\), it must be a single number"),
        (lambda: bilevel.gmres(restart=0), "restart is 0, it must be at least 1"),
        (lambda: bilevel.gmres(max_steps=0), "max_steps is 0, it must be at least 1"),
        (lambda: bilevel.gmres(damping=float("nan")), "damping is nan, it must be at least 0"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()

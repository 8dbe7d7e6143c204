"""Implicit differentiation: the gradient of an outer loss through the solution of an inner problem, without its solver.

The inner solution phi*(theta) is a root, f(theta, phi*) = 0 (for a minimum f is the inner gradient). With the outer
loss's gradient v = dF/dphi at phi*, the implicit function theorem gives the hypergradient

    -(df/dtheta)^T u,    where u solves the adjoint equation (df/dphi)^T u = v.

How u is found is an argument, a `LinearSolver`: `identity()` takes u = v (one vector-Jacobian product in all), the
others solve more or less exactly. Direct dependence of the outer loss on theta is the caller's to add;
`implicit_root` lets `jax.grad` do both.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.flatten_util import ravel_pytree

from purejax_bilevel.bilevel._common import (
    LinearSolver,
    PyTree,
    Scalar,
    check_between,
    checked_count,
    full_precision,
)

# ---------------------------------------------------------------------------------------------------- linear solvers


def _damped(matvec: Callable[[PyTree], PyTree], damping: Scalar) -> Callable[[PyTree], PyTree]:
    return lambda x: jax.tree.map(lambda product, leaf: product + damping * leaf, matvec(x), x)


def identity() -> LinearSolver:
    """Take the matrix for the identity: x = b.

    The cheapest choice, and often enough when the outer optimiser rescales gradients (Luketina et al. 2016; the default
    of Nikishin et al. 2022, "Control-oriented model-based RL with implicit differentiation").
    """
    return lambda matvec, b: b


def conjugate_gradient(
    damping: Scalar = 0.0, tolerance: Scalar = 1e-5, max_steps: int = 100, absolute_tolerance: Scalar = 0.0
) -> LinearSolver:
    """Conjugate gradient on (H + damping * I) x = b.

    Stops when |residual| <= max(tolerance * |b|, absolute_tolerance). Meant for symmetric positive definite H. An
    indefinite or unsymmetric H is not refused (inner problems of networks have one): the iterates then are what the
    recursion gives, finite unless a direction of zero curvature is met.

    Args:
        damping: added to the diagonal; may be traced.
        tolerance: relative to |b|; may be traced.
        max_steps: largest number of products with H.
        absolute_tolerance: in the units of b; may be traced.

    Raises:
        ValueError: if a known argument is negative or max_steps < 1.
    """
    check_between("damping", damping, 0)
    check_between("tolerance", tolerance, 0)
    check_between("absolute_tolerance", absolute_tolerance, 0)
    max_steps = checked_count("max_steps", max_steps)

    def solve(matvec, b):
        matrix = _damped(matvec, damping)
        x, _ = jax.scipy.sparse.linalg.cg(matrix, b, tol=tolerance, atol=absolute_tolerance, maxiter=max_steps)
        return x

    return solve


def neumann(num_terms: int, step_size: Scalar) -> LinearSolver:
    """Truncated Neumann series: x = step_size * sum_{k < num_terms} (I - step_size * H)^k b.

    Equal to differentiating num_terms gradient descent steps at the solution (Lorraine et al. 2020). It converges to
    H^-1 b when every eigenvalue of H lies in (0, 2 / step_size).

    Args:
        num_terms: number of terms; num_terms - 1 products with H.
        step_size: may be traced.

    Raises:
        ValueError: if num_terms < 1 or a known step_size is negative.
    """
    num_terms = checked_count("num_terms", num_terms)
    check_between("step_size", step_size, 0)

    def solve(matvec, b):
        def add_term(x, _):  # Horner's form of the series: one carried vector
            return jax.tree.map(lambda xi, bi, hxi: xi + step_size * (bi - hxi), x, b, matvec(x)), None

        first = jax.tree.map(lambda bi: step_size * bi, b)
        return lax.scan(add_term, first, length=num_terms - 1)[0]

    return solve


def dense(damping: Scalar = 0.0) -> LinearSolver:
    """Build H + damping * I as a matrix [n, n] and eliminate: exact, for problems of up to a few hundred unknowns.

    Gauss-Jordan elimination with partial pivoting in plain array operations, on purpose: `jnp.linalg.solve` calls
    LAPACK, and several batched LAPACK calls in one program can deadlock on CPUs with two threads.

    Args:
        damping: added to the diagonal; may be traced.

    Raises:
        ValueError: if a known damping is negative.
    """
    check_between("damping", damping, 0)

    def solve(matvec, b):
        flat, unravel = ravel_pytree(b)
        flat_matvec = lambda x: ravel_pytree(_damped(matvec, damping)(unravel(x)))[0]  # noqa: E731
        # custom_linear_solve: a derivative costs one more solve, not a pass back through the elimination
        return unravel(lax.custom_linear_solve(flat_matvec, flat, _solve_dense, _solve_dense))

    return solve


def _solve_dense(matvec: Callable[[jax.Array], jax.Array], b: jax.Array) -> jax.Array:
    columns = jax.vmap(matvec)(jnp.eye(b.size, dtype=b.dtype))
    return _eliminate(columns.T, b)


def _eliminate(matrix: jax.Array, b: jax.Array) -> jax.Array:
    """Solve matrix [n, n] @ x = b [n] by Gauss-Jordan elimination with partial pivoting."""
    rows = jnp.arange(b.size)

    def eliminate_column(i, system):
        column = jnp.where(rows >= i, jnp.abs(system[:, i]), -1.0)
        pivot = jnp.argmax(column)
        pivot_row = system[pivot] / system[pivot, i]
        system = system.at[pivot].set(system[i])
        return (system - jnp.outer(system[:, i], pivot_row)).at[i].set(pivot_row)

    return lax.fori_loop(0, b.size, eliminate_column, jnp.column_stack([matrix, b]))[:, -1]


def gmres(damping: Scalar = 0.0, tolerance: Scalar = 1e-5, max_steps: int = 100, restart: int = 20) -> LinearSolver:
    """GMRES of jax on (H + damping * I) x = b: H need be neither symmetric nor definite.

    A solve that does not converge returns its last iterate, and on an indefinite H it does not for any number of cycles
    if `restart` is much smaller than the number of unknowns: `relative_residual` tells.

    Args:
        damping: added to the diagonal; may be traced.
        tolerance: stop at |residual| <= tolerance * |b|; may be traced.
        max_steps: largest number of cycles of at most `restart` products with H.
        restart: size of the Krylov space, stored as that many vectors like b.

    Raises:
        ValueError: if a known argument is negative, max_steps < 1 or restart < 1.
    """
    check_between("damping", damping, 0)
    check_between("tolerance", tolerance, 0)
    max_steps, restart = checked_count("max_steps", max_steps), checked_count("restart", restart)

    def solve(matvec, b):
        x, _ = jax.scipy.sparse.linalg.gmres(
            _damped(matvec, damping),
            b,
            tol=tolerance,
            restart=restart,
            maxiter=max_steps,
            solve_method="incremental",  # the other one squares the condition number
        )
        return x

    return solve


def relative_residual(matvec: Callable[[PyTree], PyTree], x: PyTree, b: PyTree, damping: Scalar = 0.0) -> jax.Array:
    """|(H + damping * I) x - b| / |b|: how far a solver got, at the price of one product with H.

    Args:
        matvec: products with H.
        x: what the solver returned, a pytree like `b`.
        b: right-hand side.
        damping: what the solver added to the diagonal; may be traced.

    Returns:
        A scalar; 0 is exact, 1 is no better than x = 0. For b = 0 the norm of the product itself.
    """
    difference = jax.tree.map(jnp.subtract, _damped(matvec, damping)(x), b)
    size = optax.tree.norm(b)
    return optax.tree.norm(difference) / jnp.where(size > 0, size, 1.0)


# ---------------------------------------------------------------------------------------------------- hypergradients


def root_hypergradient(
    optimality: Callable[[PyTree, PyTree], PyTree],
    outer: PyTree,
    inner: PyTree,
    cotangent: PyTree,
    solve: LinearSolver | None = None,
) -> PyTree:
    """Hypergradient through a root: -(df/d outer)^T u with (df/d inner)^T u = cotangent.

    Args:
        optimality: f(outer, inner), a pytree like `inner`, zero at the inner solution.
        outer: outer variables (floating point leaves).
        inner: the inner solution; not checked to be one.
        cotangent: gradient of the outer loss with respect to `inner`, a pytree like `inner`.
        solve: linear solver for the adjoint equation, given the products with (df/d inner)^T. Default `identity()`.

    Returns:
        A pytree like `outer`: the indirect part of the outer gradient.
    """
    return root_hypergradient_and_residual(optimality, outer, inner, cotangent, solve)[0]


def root_hypergradient_and_residual(
    optimality: Callable[[PyTree, PyTree], PyTree],
    outer: PyTree,
    inner: PyTree,
    cotangent: PyTree,
    solve: LinearSolver | None = None,
    damping: Scalar = 0.0,
) -> tuple[PyTree, jax.Array]:
    """`root_hypergradient`, and how well its adjoint equation was solved.

    Args:
        optimality: as there, like the next four.
        outer: see there.
        inner: see there.
        cotangent: see there.
        solve: see there.
        damping: added to the diagonal in the residual, what `solve` adds there.

    Returns:
        (hypergradient, `relative_residual` of the adjoint).
    """
    solve = identity() if solve is None else solve
    with full_precision():
        _, transposed_jacobian = jax.vjp(lambda x: optimality(outer, x), inner)
        matvec = lambda x: transposed_jacobian(x)[0]  # noqa: E731
        adjoint = solve(matvec, cotangent)
        residual = relative_residual(matvec, adjoint, cotangent, damping)
        _, transposed_cross = jax.vjp(lambda x: optimality(x, inner), outer)
        return jax.tree.map(jnp.negative, transposed_cross(adjoint)[0]), residual


def minimum_hypergradient(
    inner_loss: Callable[[PyTree, PyTree], jax.Array],
    outer: PyTree,
    inner: PyTree,
    cotangent: PyTree,
    solve: LinearSolver | None = None,
) -> PyTree:
    """Hypergradient through a minimum: `root_hypergradient` of f = d inner_loss / d inner, from scalar losses alone.

    The cross product is the gradient over `outer` of the directional derivative of inner_loss along u; the products
    with the Hessian are forward over reverse, linearised once for all steps of the solver.

    Args:
        inner_loss: L(outer, inner) -> scalar.
        outer: outer variables (floating point leaves).
        inner: the inner solution; not checked to be one.
        cotangent: gradient of the outer loss with respect to `inner`, a pytree like `inner`.
        solve: linear solver for the adjoint equation, given the products with the Hessian. Default `identity()`.

    Returns:
        A pytree like `outer`: the indirect part of the outer gradient.
    """
    return minimum_hypergradient_and_residual(inner_loss, outer, inner, cotangent, solve)[0]


def minimum_hypergradient_and_residual(
    inner_loss: Callable[[PyTree, PyTree], jax.Array],
    outer: PyTree,
    inner: PyTree,
    cotangent: PyTree,
    solve: LinearSolver | None = None,
    damping: Scalar = 0.0,
) -> tuple[PyTree, jax.Array]:
    """`minimum_hypergradient`, and how well its adjoint equation was solved.

    Args:
        inner_loss: as there, like the next four.
        outer: see there.
        inner: see there.
        cotangent: see there.
        solve: see there.
        damping: what `solve` adds to the Hessian's diagonal.

    Returns:
        (hypergradient, `relative_residual` of the adjoint).
    """
    solve = identity() if solve is None else solve
    with full_precision():
        _, hessian_product = jax.linearize(lambda x: jax.grad(inner_loss, argnums=1)(outer, x), inner)
        adjoint = solve(hessian_product, cotangent)
        residual = relative_residual(hessian_product, adjoint, cotangent, damping)

        def descent_along_adjoint(outer):
            return -jax.jvp(lambda x: inner_loss(outer, x), (inner,), (adjoint,))[1]

        return jax.grad(descent_along_adjoint)(outer), residual


def implicit_root(
    solver: Callable[[PyTree, PyTree], PyTree],
    optimality: Callable[[PyTree, PyTree], PyTree],
    solve: LinearSolver | None = None,
) -> Callable[[PyTree, PyTree], PyTree]:
    """Make the answer of any solver differentiable through the condition it satisfies.

    `jax.grad(lambda outer: outer_loss(outer, solution(outer, initial)))(outer)` is then the whole hypergradient:
    direct part plus `root_hypergradient`. The solver is never differentiated. Values captured by `optimality` are
    differentiated too. Forward mode and higher orders work (with `solve` used as an approximate inverse there as
    well).

    Args:
        solver: (outer, initial_inner) -> inner, written in jax.
        optimality: f(outer, inner), a pytree like `inner`, zero at the solver's answer.
        solve: linear solver for the adjoint equation. Default `identity()`.

    Returns:
        solution(outer, initial_inner) -> inner. Its derivative with respect to initial_inner is zero.
    """
    solve = identity() if solve is None else solve

    def tangent_solve(matvec, b):
        # custom_linear_solve lets any solver be transposed: reverse mode calls it with the transposed Jacobian
        return lax.custom_linear_solve(matvec, b, solve, transpose_solve=solve)

    def solution(outer: PyTree, initial_inner: PyTree) -> PyTree:
        def condition(inner):
            with full_precision():
                return optimality(outer, inner)

        solve_inner = lambda _, initial: solver(outer, initial)  # noqa: E731
        return lax.custom_root(condition, initial_inner, solve_inner, tangent_solve)

    return solution

"""Bilevel problems with a known answer, in float64, shared by the tests of this folder."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.flatten_util import ravel_pytree


class Problem(NamedTuple):
    """An inner minimisation whose solution can be computed for any outer variables."""

    inner_loss: Callable[[Any, Any], jax.Array]
    outer_loss: Callable[[Any, Any], jax.Array]
    outer: Any
    initial_inner: Any
    solution: Callable[[Any], Any]  # by a direct method
    step_size: float  # of a gradient descent that converges


def quadratic() -> Problem:
    """min_x 1/2 x'Ax - x'B theta, outer loss 1/2 |x - c|^2 + 0.05 |theta|^2."""
    rng = np.random.default_rng(0)
    root = rng.normal(size=(4, 4))
    matrix = jnp.asarray(root @ root.T / 4 + np.eye(4))
    mixing, target = jnp.asarray(rng.normal(size=(4, 3))), jnp.asarray(rng.normal(size=4))
    return Problem(
        inner_loss=lambda theta, x: 0.5 * x @ matrix @ x - x @ mixing @ theta,
        outer_loss=lambda theta, x: 0.5 * jnp.sum((x - target) ** 2) + 0.05 * jnp.sum(theta**2),
        outer=jnp.asarray(rng.normal(size=3)),
        initial_inner=jnp.zeros(4),
        solution=lambda theta: jnp.linalg.solve(matrix, mixing @ theta),
        step_size=0.3,
    )


def ridge_regression() -> Problem:
    """Ridge regression on weighted samples; outer variables: the weight of each sample and the ridge parameter."""
    rng = np.random.default_rng(1)
    inputs, held_out = jnp.asarray(rng.normal(size=(12, 3))), jnp.asarray(rng.normal(size=(9, 3)))
    targets, held_out_targets = jnp.asarray(rng.normal(size=(12, 2))), jnp.asarray(rng.normal(size=(9, 2)))

    def inner_loss(outer, inner):
        error = ((inputs @ inner["slope"] + inner["offset"] - targets) ** 2).sum(-1)
        return (outer["weight"] * error).mean() + outer["ridge"] * sum(jnp.sum(p**2) for p in inner.values())

    def outer_loss(outer, inner):
        return ((held_out @ inner["slope"] + inner["offset"] - held_out_targets) ** 2).mean()

    def solution(outer):
        features = jnp.column_stack([inputs, jnp.ones(12)])
        weighted = features.T * outer["weight"] / 12
        params = jnp.linalg.solve(weighted @ features + outer["ridge"] * jnp.eye(4), weighted @ targets)
        return {"slope": params[:3], "offset": params[3]}

    outer = {"weight": jnp.asarray(rng.uniform(0.5, 1.5, size=12)), "ridge": jnp.asarray(0.3)}
    return Problem(inner_loss, outer_loss, outer, {"slope": jnp.zeros((3, 2)), "offset": jnp.zeros(2)}, solution, 0.15)


def logistic_regression() -> Problem:
    """Not quadratic: logistic regression with tuples; outer variables: soft labels, log ridge parameter."""
    rng = np.random.default_rng(2)
    inputs, held_out = jnp.asarray(rng.normal(size=(10, 3))), jnp.asarray(rng.normal(size=(6, 3)))

    def inner_loss(outer, inner):
        labels, log_ridge = outer
        logits = inputs @ inner[0] + inner[1]
        return (jnp.logaddexp(0.0, logits) - labels * logits).mean() + jnp.exp(log_ridge) * (
            jnp.sum(inner[0] ** 2) + inner[1] ** 2
        )

    def outer_loss(outer, inner):
        return jnp.tanh(held_out @ inner[0] + inner[1]).sum()

    def solution(outer):  # Newton's method
        loss = lambda p: inner_loss(outer, (p[:3], p[3]))  # noqa: E731
        newton = lambda _, p: p - jnp.linalg.solve(jax.hessian(loss)(p), jax.grad(loss)(p))  # noqa: E731
        inner = lax.fori_loop(0, 12, newton, jnp.zeros(4))
        return inner[:3], inner[3]

    outer = (jnp.asarray(rng.uniform(size=10)), jnp.asarray(-2.0))
    return Problem(inner_loss, outer_loss, outer, (jnp.zeros(3), jnp.asarray(0.0)), solution, 0.8)


PROBLEMS = {make.__name__: functools.cache(make) for make in (quadratic, ridge_regression, logistic_regression)}


@pytest.fixture(params=PROBLEMS)
def problem(request, float64) -> Problem:
    return PROBLEMS[request.param]()


@pytest.fixture
def ridge(float64) -> Problem:
    return PROBLEMS["ridge_regression"]()


@pytest.fixture
def quadratic_problem(float64) -> Problem:
    return PROBLEMS["quadratic"]()


@pytest.fixture
def reference(problem, request) -> Any:
    """The hypergradient by central finite differences of the directly solved problem."""
    return _finite_differences(request.node.callspec.params["problem"])


@functools.cache
def _finite_differences(name: str, width: float = 1e-5) -> Any:
    problem = PROBLEMS[name]()
    flat, unravel = ravel_pytree(problem.outer)
    value = jax.jit(lambda x: problem.outer_loss(unravel(x), problem.solution(unravel(x))))
    shifts = width * np.eye(flat.size)
    return unravel(jnp.asarray([(value(flat + s) - value(flat - s)) / (2 * width) for s in shifts]))


@pytest.fixture
def assert_close() -> Callable[..., None]:
    """Compare two pytrees of the same structure leaf by leaf."""

    def compare(actual, expected, rtol=0.0, atol=1e-8):
        assert jax.tree.structure(actual) == jax.tree.structure(expected)
        jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=rtol, atol=atol), actual, expected)

    return compare

"""Function-space hypergradients against parametric implicit differentiation where both must agree."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from purejax_bilevel import bilevel

pytestmark = pytest.mark.usefixtures("float64")

HEADS, BATCH, ACTIONS = 2, 6, 3


class Tabular(NamedTuple):
    """Regression of the taken actions' values on targets that depend on the outer variables, as in Q-learning."""

    outer: dict
    values: jax.Array  # [heads, batch, actions]
    taken: jax.Array  # [batch]

    def inner(self, outer, values):
        taken = jnp.take_along_axis(values, self.taken[None, :, None], axis=-1)[..., 0]
        target = outer["gain"] * jnp.tanh(outer["shift"]) + outer["gain"] ** 2
        return 0.5 * ((taken - target) ** 2).mean(axis=1).sum()

    def outer_loss(self, values):
        taken = jnp.take_along_axis(values, self.taken[None, :, None], axis=-1)[..., 0]
        return 0.5 * ((taken - 1.0) ** 2).mean(axis=1).sum()


@pytest.fixture
def tabular():
    rng = np.random.default_rng(0)
    outer = {"gain": jnp.asarray(0.7), "shift": jnp.asarray(rng.normal(size=BATCH))}
    values = jnp.asarray(rng.normal(size=(HEADS, BATCH, ACTIONS)))
    return Tabular(outer, values, jnp.asarray(rng.integers(ACTIONS, size=BATCH)))


class Linear(NamedTuple):
    """Functions x -> features(x) @ params [features, outputs]: weighted regression, one outer weight per sample."""

    features: jax.Array  # [batch, features], where the inner objective looks
    outer_features: jax.Array  # [outer batch, features], where the outer loss looks
    targets: jax.Array  # [batch, outputs]
    weight: jax.Array  # [batch], outer variables
    params: jax.Array

    def inner(self, weight, values):
        return (weight[:, None] * (values - jnp.exp(weight)[:, None] * self.targets) ** 2).sum() / len(weight)

    def outer_loss(self, values):
        return jnp.sin(values).sum()


def linear(batch):
    rng = np.random.default_rng(1)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape))  # noqa: E731
    weight = jnp.asarray(rng.uniform(0.5, 1.5, size=batch))
    return Linear(normal(batch, 4), normal(5, 4), normal(batch, 2), weight, normal(4, 2))


def parametric_hypergradient(problem, outer_features):
    inner_loss = lambda weight, params: problem.inner(weight, problem.features @ params)  # noqa: E731
    cotangent = jax.jit(jax.grad(lambda params: problem.outer_loss(outer_features @ params)))(problem.params)
    hypergradient = lambda *args: bilevel.minimum_hypergradient(inner_loss, *args, bilevel.dense())  # noqa: E731
    return jax.jit(hypergradient)(problem.weight, problem.params, cotangent)


def closed_form_hypergradient(problem, outer, values, outer_loss):
    @jax.jit
    def hypergradient(outer, values):
        hessian = bilevel.separable_hessian(problem.inner, outer, values)
        adjoint = bilevel.closed_form_adjoint(jax.grad(outer_loss)(values), hessian)
        return bilevel.functional_hypergradient(problem.inner, outer, values, adjoint)

    return hypergradient(outer, values)


# ---------------------------------------------------------------------------------------------------- closed form


def test_hessian_of_a_bellman_error_is_one_over_n_on_taken_actions(tabular):
    expected = np.zeros((HEADS, BATCH, ACTIONS))
    expected[:, np.arange(BATCH), tabular.taken] = 1 / BATCH
    hessian = bilevel.separable_hessian(tabular.inner, tabular.outer, tabular.values)
    np.testing.assert_allclose(hessian, expected, atol=1e-15)


def test_adjoint_of_a_bellman_error_is_the_negative_error(tabular):
    hessian = bilevel.separable_hessian(tabular.inner, tabular.outer, tabular.values)
    adjoint = bilevel.closed_form_adjoint(jax.grad(tabular.outer_loss)(tabular.values), hessian)
    expected = np.zeros((HEADS, BATCH, ACTIONS))
    taken = slice(None), np.arange(BATCH), np.asarray(tabular.taken)
    expected[taken] = 1.0 - np.asarray(tabular.values)[taken]
    np.testing.assert_allclose(adjoint, expected, atol=1e-14)


def test_adjoint_ignores_values_without_curvature():
    cotangent = {"a": jnp.asarray([1.0, -2.0, 3.0]), "b": jnp.ones((2, 3))}
    hessian = {"a": jnp.asarray([2.0, 0.0, -1.0]), "b": jnp.asarray([4.0, 0.0, 1.0])}
    adjoint = bilevel.closed_form_adjoint(cotangent, hessian)
    np.testing.assert_allclose(adjoint["a"], [-0.5, 0.0, 0.0])
    np.testing.assert_allclose(adjoint["b"], [[-0.25, 0.0, -1.0]] * 2)
    gradient = jax.grad(lambda h: bilevel.closed_form_adjoint(cotangent["a"], h).sum())(hessian["a"])
    np.testing.assert_allclose(gradient, [0.25, 0.0, 0.0])  # and no NaN from the division by zero


def test_tabular_values_agree_with_the_parametric_gradient(tabular, assert_close):
    """The table is its own parameter; damping stands in for the untaken actions, on which nothing depends."""
    cotangent = jax.grad(tabular.outer_loss)(tabular.values)
    solve = bilevel.dense(damping=1e-12)
    rule = lambda outer: bilevel.minimum_hypergradient(tabular.inner, outer, tabular.values, cotangent, solve)  # noqa: E731
    parametric = jax.jit(rule)(tabular.outer)
    functional = closed_form_hypergradient(tabular, tabular.outer, tabular.values, tabular.outer_loss)
    assert_close(functional, parametric, atol=1e-10)
    assert abs(functional["gain"]) > 0.01


def test_linear_functions_that_fit_every_value_agree_with_the_parametric_gradient(assert_close):
    problem = linear(batch=4)  # as many samples as features: every vector of values is a function of the class
    values = problem.features @ problem.params
    functional = closed_form_hypergradient(problem, problem.weight, values, problem.outer_loss)
    assert_close(functional, parametric_hypergradient(problem, problem.features), atol=1e-10)


def test_hypergradient_is_the_derivative_of_the_solved_problem(tabular, assert_close):
    """At the inner solution: derivative of the outer loss at the fitted values, by jax through the closed solution."""
    solved = lambda outer: jnp.broadcast_to(  # noqa: E731
        (outer["gain"] * jnp.tanh(outer["shift"]) + outer["gain"] ** 2)[None, :, None], (HEADS, BATCH, ACTIONS)
    )
    functional = closed_form_hypergradient(tabular, tabular.outer, solved(tabular.outer), tabular.outer_loss)
    assert_close(functional, jax.grad(lambda outer: tabular.outer_loss(solved(outer)))(tabular.outer), atol=1e-14)


# --------------------------------------------------------------------------------------------------- dual network


def dual_objective(problem, outer_features):
    values = problem.features @ problem.params
    hessian = bilevel.separable_hessian(problem.inner, problem.weight, values)
    cotangent = jax.grad(problem.outer_loss)(outer_features @ problem.params)
    return lambda dual: bilevel.adjoint_objective(problem.features @ dual, hessian, outer_features @ dual, cotangent)


@pytest.mark.parametrize("same_inputs", [True, False])
def test_trained_dual_gives_the_parametric_gradient(same_inputs, assert_close):
    """More samples than features: no closed form over values, but the best linear adjoint is the parametric one."""
    problem = linear(batch=9)
    outer_features = problem.features if same_inputs else problem.outer_features
    optimizer, dual = optax.sgd(0.2), jnp.zeros((4, 2))
    dual, _, _ = bilevel.fit_dual(
        dual_objective(problem, outer_features), dual, optimizer.init(dual), optimizer, num_steps=3000
    )
    values = problem.features @ problem.params
    functional = bilevel.functional_hypergradient(problem.inner, problem.weight, values, problem.features @ dual)
    assert_close(functional, parametric_hypergradient(problem, outer_features), atol=1e-9)


def test_trained_dual_table_is_the_closed_form(tabular):
    hessian = bilevel.separable_hessian(tabular.inner, tabular.outer, tabular.values)
    cotangent = jax.grad(tabular.outer_loss)(tabular.values)
    objective = lambda a: bilevel.adjoint_objective(a, hessian, a, cotangent)  # noqa: E731
    optimizer, start = optax.adam(0.01), jnp.zeros_like(tabular.values)
    dual, _, loss = bilevel.fit_dual(objective, start, optimizer.init(start), optimizer, num_steps=4000)
    closed = bilevel.closed_form_adjoint(cotangent, hessian)
    np.testing.assert_allclose(dual, closed, atol=1e-6)
    np.testing.assert_allclose(loss, objective(closed), atol=1e-10)


def test_dual_parameters_and_optimiser_state_are_carried(assert_close):
    problem = linear(batch=9)
    objective, optimizer, dual = dual_objective(problem, problem.outer_features), optax.adam(0.05), jnp.ones((4, 2))
    fit = jax.jit(lambda *args: bilevel.fit_dual(objective, *args[:2], optimizer, args[2]), static_argnums=2)
    once = fit(dual, optimizer.init(dual), 7)
    first_params, first_state, _ = fit(dual, optimizer.init(dual), 4)
    assert_close(fit(first_params, first_state, 3), once, atol=1e-14)
    before_last = fit(dual, optimizer.init(dual), 6)[0]
    np.testing.assert_allclose(once[2], objective(before_last), rtol=1e-12)


def test_adjoint_objective_has_its_minimum_at_the_adjoint():
    a = {"x": jnp.asarray([0.3, -1.0])}
    h, g = {"x": jnp.asarray([2.0, 0.5])}, {"x": jnp.asarray([1.0, -3.0])}
    value, gradient = jax.value_and_grad(lambda a: bilevel.adjoint_objective(a, h, a, g))(a)
    np.testing.assert_allclose(value, 0.5 * (2.0 * 0.09 + 0.5) + 0.3 + 3.0)
    np.testing.assert_allclose(gradient["x"], [0.6 + 1.0, -0.5 - 3.0])


# ------------------------------------------------------------------------------------------------ transformations


def test_vmapped_members_equal_single_ones(tabular, assert_close):
    scales = jnp.asarray([0.5, 1.0, 2.0])
    optimizer = optax.adam(0.05)

    def member(scale):
        outer = jax.tree.map(lambda x: scale * x, tabular.outer)
        values = scale * tabular.values
        hessian = bilevel.separable_hessian(tabular.inner, outer, values)
        cotangent = jax.grad(tabular.outer_loss)(values)
        objective = lambda a: bilevel.adjoint_objective(a, hessian, a, cotangent)  # noqa: E731
        dual, _, _ = bilevel.fit_dual(objective, values, optimizer.init(values), optimizer, num_steps=5)
        fitted = bilevel.functional_hypergradient(tabular.inner, outer, values, dual)
        return fitted, closed_form_hypergradient(tabular, outer, values, tabular.outer_loss)

    together = jax.jit(jax.vmap(member))(scales)
    assert_close(together, jax.jit(lambda s: jax.lax.map(member, s))(scales), atol=1e-13)


def test_hypergradient_is_differentiable(tabular):
    """vmap(grad) of a function of the hypergradient: second derivatives exist and are finite."""

    def size(gain):
        outer = {**tabular.outer, "gain": gain}
        return closed_form_hypergradient(tabular, outer, tabular.values, tabular.outer_loss)["gain"]

    gains = jnp.asarray([0.3, 0.9])
    slope = jax.jit(jax.vmap(jax.grad(size)))(gains)
    width = 1e-6
    expected = [(size(g + width) - size(g - width)) / (2 * width) for g in gains]
    np.testing.assert_allclose(slope, expected, rtol=1e-6)


@pytest.mark.parametrize("num_steps", [0, -2, "3"])
def test_bad_number_of_steps(num_steps):
    optimizer, dual = optax.sgd(0.1), jnp.zeros(2)
    with pytest.raises(ValueError, match=f"num_steps is {num_steps!r}, it must be"):
        bilevel.fit_dual(jnp.sum, dual, optimizer.init(dual), optimizer, num_steps)

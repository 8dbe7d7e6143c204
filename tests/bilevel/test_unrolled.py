"""Unrolled differentiation against a plain loop, and against the implicit gradient once the inner problem is solved."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from purejax_bilevel import bilevel

pytestmark = pytest.mark.usefixtures("float64")


def unroll(problem, optimizer, num_steps, opt_state=None, **options):
    state = optimizer.init(problem.initial_inner) if opt_state is None else opt_state
    losses = problem.inner_loss, problem.outer_loss
    return lambda outer: bilevel.unrolled_hypergradient(
        *losses, outer, problem.initial_inner, state, optimizer, num_steps, **options
    )


def plain_loop(problem, optimizer, num_steps, outer, state):
    inner = problem.initial_inner
    for _ in range(num_steps):
        updates, state = optimizer.update(jax.grad(problem.inner_loss, argnums=1)(outer, inner), state, inner)
        inner = optax.apply_updates(inner, updates)
    return problem.outer_loss(outer, inner), (inner, state)


def test_converged_unrolling_is_the_hypergradient(problem, reference, assert_close):
    """The last of the three ways: unrolled to convergence = finite differences (= implicit, in test_implicit)."""
    value, hypergradient, inner, _ = jax.jit(unroll(problem, optax.sgd(problem.step_size), 2000))(problem.outer)
    assert_close(hypergradient, reference, atol=1e-7)
    assert_close(inner, problem.solution(problem.outer), atol=1e-10)
    np.testing.assert_allclose(value, problem.outer_loss(problem.outer, inner), rtol=1e-12)


@pytest.mark.parametrize("checkpoint", [True, False])
@pytest.mark.parametrize("num_steps", [1, 3])
def test_adam_steps_equal_a_plain_loop(ridge, assert_close, num_steps, checkpoint):
    optimizer = optax.adam(0.05, eps_root=1e-12)
    # a state in mid-training: the gradient must not depend on how it came about
    gradient = jax.tree.map(jnp.ones_like, ridge.initial_inner)
    _, state = optimizer.update(gradient, optimizer.init(ridge.initial_inner), ridge.initial_inner)
    loop = jax.value_and_grad(lambda outer: plain_loop(ridge, optimizer, num_steps, outer, state), has_aux=True)
    (value, (inner, last_state)), hypergradient = jax.jit(loop)(ridge.outer)
    actual = jax.jit(unroll(ridge, optimizer, num_steps, state, checkpoint=checkpoint))(ridge.outer)
    assert_close(actual, (value, hypergradient, inner, last_state), atol=1e-12)


def test_adam_with_and_without_eps_root(quadratic_problem):
    """An inner gradient entry that is exactly zero: NaN with eps_root = 0, as the documentation says."""
    mask = jnp.asarray([1.0, 1.0, 0.0, 0.0])
    problem = quadratic_problem._replace(inner_loss=lambda theta, x: jnp.sum(theta) * mask @ (x**2 - x))
    without, with_root = (jax.jit(unroll(problem, optax.adam(0.1, eps_root=root), 2)) for root in (0.0, 1e-8))
    assert np.isnan(without(problem.outer)[1]).all()
    assert np.isfinite(with_root(problem.outer)[1]).all()


def test_vmapped_learning_rates_and_outer_variables(ridge, assert_close):
    def gradient(learning_rate, scale):
        outer = jax.tree.map(lambda x: scale * x, ridge.outer)
        return unroll(ridge, optax.adam(learning_rate, eps_root=1e-12), 4)(outer)[:3]

    rates, scales = jnp.asarray([0.01, 0.1]), jnp.asarray([0.5, 1.5])
    together = jax.jit(jax.vmap(gradient))(rates, scales)
    alone = jax.jit(lambda: [gradient(0.01, 0.5), gradient(0.1, 1.5)])()
    assert_close(together, jax.tree.map(lambda *leaves: jnp.stack(leaves), *alone), atol=1e-12)


def test_online_loop_in_a_scan_continues_the_inner_state(ridge, assert_close):
    """Two outer steps of 3 inner steps with a zero outer step = one unroll of 6, as far as the inner state goes."""
    optimizer = optax.adam(0.05, eps_root=1e-12)

    def outer_step(carry, _):
        inner, state = carry
        _, _, inner, state = bilevel.unrolled_hypergradient(
            ridge.inner_loss, ridge.outer_loss, ridge.outer, inner, state, optimizer, 3
        )
        return (inner, state), None

    start = ridge.initial_inner, optimizer.init(ridge.initial_inner)
    scanned, _ = jax.jit(lambda: jax.lax.scan(outer_step, start, length=2))()
    assert_close(scanned, jax.jit(unroll(ridge, optimizer, 6))(ridge.outer)[2:], atol=1e-12)


def test_checkpoint_saves_memory():
    """Inner loss with large intermediate values [200, 400]: without checkpoint one set per step is kept."""
    inputs = jnp.linspace(-1, 1, 200)[:, None] * jnp.ones((1, 8))

    def inner_loss(outer, inner):
        return jnp.mean((jnp.tanh(inputs @ inner["in"]) @ inner["out"] - outer) ** 2)

    inner = {"in": jnp.ones((8, 400)), "out": jnp.ones(400)}
    optimizer = optax.sgd(0.01)

    def temporary_bytes(checkpoint):
        gradient = lambda outer: bilevel.unrolled_hypergradient(  # noqa: E731
            inner_loss, inner_loss, outer, inner, optimizer.init(inner), optimizer, 30, checkpoint
        )
        return jax.jit(gradient).lower(1.0).compile().memory_analysis().temp_size_in_bytes

    assert temporary_bytes(True) < 0.3 * temporary_bytes(False)


@pytest.mark.parametrize("num_steps", [0, -1, 1.5])
def test_bad_number_of_steps(quadratic_problem, num_steps):
    with pytest.raises(ValueError, match=f"num_steps is {num_steps}, it must be"):
        unroll(quadratic_problem, optax.sgd(0.1), num_steps)(quadratic_problem.outer)

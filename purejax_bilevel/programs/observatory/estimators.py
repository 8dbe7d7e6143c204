"""Hypergradients of one frozen problem by every estimator, and how they compare with a reference.

The mathematics is that of `purejax_bilevel.bilevel`; here is only which of its functions an estimator calls, and the
statistics over batches.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from purejax_bilevel import bilevel, networks
from purejax_bilevel.bilevel import LinearSolver
from purejax_bilevel.programs.observatory.settings import Estimator, Observed

Tree = Any
POWER_STEPS = 50  # for a step size and a damping, two digits are enough


def _unchanged(gradient: Tree) -> Tree:
    return gradient


class Problem(NamedTuple):
    """A bilevel problem on one batch, at a frozen state; nothing in it changes.

    `inner` need not be the inner solution: estimators that presume one take it for that.
    """

    outer: Tree  # where the hypergradient is taken
    inner: Tree
    outer_loss: Callable[[Tree], jax.Array]  # (inner)
    # (outer, inner) -> like inner, zero at the inner solution: the inner loss's gradient where there is such a loss
    optimality: Callable[[Tree, Tree], Tree]
    inner_loss: Callable[[Tree, Tree], jax.Array] | None = None  # (outer, inner)
    # the agent's own inner optimiser and its state
    optimizer: optax.GradientTransformation | None = None
    optimizer_state: optax.OptState = ()
    # () -> gradient by the adjoint in closed form; (steps, key) -> by a dual network after so many steps
    functional: Callable[[], Tree] | None = None
    dual: Callable[[int, jax.Array], Tree] | None = None
    # gradient over `outer` -> over what the agent learns, where that is not the same
    pull_back: Callable[[Tree], Tree] = _unchanged
    # what dampings are multiples of, and step sizes of its inverse
    curvature: float | jax.Array = 1.0


# --- one estimate -----------------------------------------------------------------------------------------------------


def estimate(estimator: Estimator, problem: Problem, config: Observed, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """One hypergradient.

    Args:
        estimator: which one.
        problem: on one batch.
        config: of one member.
        key: consumed, by estimators that draw something.

    Returns:
        The hypergradient `[outer variables]`; the relative residual `[]` that its adjoint leaves in the reference's
        adjoint equation, NaN where it has no adjoint in the inner variables.
    """
    gradient, residual = _of_kind(estimator, problem, config, key)
    return flat(problem.pull_back(gradient)), jnp.asarray(residual, float)


def flat(tree: Tree) -> jax.Array:
    """All numbers of a tree in one array."""
    return ravel_pytree(tree)[0]


def _of_kind(estimator: Estimator, problem: Problem, config: Observed, key: jax.Array) -> tuple[Tree, Any]:
    counts, amount = estimator.counts, estimator.amount
    damping = problem.curvature * (config.estimator_damping if amount is None else amount)
    step_size = (config.estimator_step_size if amount is None else amount) / problem.curvature
    match estimator.kind:
        case "identity":
            return implicit(problem, bilevel.identity(), config)
        case "cg":
            # no tolerance: as many steps as are asked for, but for an exact solution
            return implicit(problem, bilevel.conjugate_gradient(damping, 0.0, counts[0]), config)
        case "neumann":
            return implicit(problem, bilevel.neumann(counts[0], step_size), config)
        case "dense":
            return implicit(problem, bilevel.dense(damping), config)
        case "unrolled":
            return unrolled(problem, counts[0], step_size), jnp.nan
        case "adam":
            return _through_own_steps(problem, counts[0]), jnp.nan
        case "functional":
            assert problem.functional is not None
            return problem.functional(), jnp.nan
        case "dual":
            assert problem.dual is not None
            return problem.dual(counts[0], key), jnp.nan
        case "es":
            sigma = config.estimator_sigma if amount is None else amount
            return _evolved(problem, counts, sigma, config.estimator_step_size / problem.curvature, key), jnp.nan
    raise ValueError(f"no estimator of kind {estimator.kind}")


def implicit(problem: Problem, solver: LinearSolver, config: Observed) -> tuple[Tree, jax.Array]:
    """Implicit differentiation at the inner variables as they are, and the residual of its adjoint."""
    cotangent = jax.grad(problem.outer_loss)(problem.inner)
    damping = problem.curvature * config.estimator_damping
    rest = (problem.outer, problem.inner, cotangent, solver, damping)
    if problem.inner_loss is not None:
        return bilevel.minimum_hypergradient_and_residual(problem.inner_loss, *rest)
    return bilevel.root_hypergradient_and_residual(problem.optimality, *rest)


def _descent(problem: Problem, step_size: float | jax.Array) -> Callable[[Tree, Tree], Tree]:
    """A step of gradient descent, or of a damped fixed-point iteration: inner - step_size * optimality."""

    def step(outer: Tree, inner: Tree) -> Tree:
        return jax.tree.map(lambda x, g: x - step_size * g, inner, problem.optimality(outer, inner))

    return step


def dense(problem: Problem, config: Observed) -> tuple[jax.Array, jax.Array]:
    """The damped dense hypergradient `[outer variables]`, and the residual of its adjoint."""
    gradient, residual = implicit(problem, bilevel.dense(problem.curvature * config.estimator_damping), config)
    return flat(problem.pull_back(gradient)), residual


def unrolled(problem: Problem, num_steps: int, step_size: float | jax.Array) -> Tree:
    """The gradient through steps of gradient descent from the inner variables as they are."""
    loss = lambda _, inner: problem.outer_loss(inner)  # noqa: E731
    step = _descent(problem, step_size)
    return bilevel.iterated_hypergradient(step, loss, problem.outer, problem.inner, num_steps)[1]


def _through_own_steps(problem: Problem, num_steps: int) -> Tree:
    assert problem.inner_loss is not None
    assert problem.optimizer is not None
    loss = lambda _, inner: problem.outer_loss(inner)  # noqa: E731
    start = (problem.outer, problem.inner, problem.optimizer_state)
    return bilevel.unrolled_hypergradient(problem.inner_loss, loss, *start, problem.optimizer, num_steps)[1]


def _evolved(
    problem: Problem, counts: tuple[int, ...], sigma: float | jax.Array, step_size: float | jax.Array, key: jax.Array
) -> Tree:
    """Evolution strategies on the outer loss after steps of gradient descent."""
    num_pairs, num_steps = counts
    step = _descent(problem, step_size)

    def loss(outer: Tree) -> jax.Array:
        return problem.outer_loss(bilevel.iterated(step, outer, problem.inner, num_steps, checkpoint=False))

    numbers = flat(problem.outer)
    size = jnp.sqrt(jnp.mean(numbers**2))
    return bilevel.antithetic_gradient(loss, problem.outer, key, num_pairs, sigma * size)


# --- several batches as one -------------------------------------------------------------------------------------------


def joined(make: Callable[[Tree], Problem], batches: Tree) -> Problem:
    """The problem on several batches taken as one: both losses are the means of theirs.

    Args:
        make: the problem on a batch, with an inner loss; the inner variables are the same on all.
        batches: leaves `[batches, ...]`.
    """
    outers = jax.vmap(lambda batch: make(batch).outer)(batches)  # a copy for each: the losses are then plain means
    inner = make(jax.tree.map(lambda leaf: leaf[0], batches)).inner

    def inner_loss(outers: Tree, inner: Tree) -> jax.Array:
        return each(lambda own: make(own[0]).inner_loss(own[1], inner), (batches, outers)).mean()  # type: ignore[misc]

    def pull_back(gradients: Tree) -> Tree:
        each = jax.vmap(lambda batch, gradient: make(batch).pull_back(gradient))(batches, gradients)
        return jax.tree.map(lambda leaf: leaf.sum(0), each)

    return Problem(
        outer=outers,
        inner=inner,
        outer_loss=lambda inner: each(lambda batch: make(batch).outer_loss(inner), batches).mean(),
        optimality=lambda outers, inner: jax.grad(inner_loss, argnums=1)(outers, inner),
        inner_loss=inner_loss,
        pull_back=pull_back,
    )


def each(function: Callable[[Tree], Any], trees: Tree) -> Any:
    """A function of every tree, leaves `[trees, ...]`: one by one on a CPU, where that needs the memory of one, all at
    once on an accelerator."""
    return jax.vmap(function)(trees) if networks.together() else jax.lax.map(function, trees)


def curvature(problem: Problem, key: jax.Array) -> jax.Array:
    """Largest absolute eigenvalue of the inner loss's Hessian, by power iteration; the key is consumed."""
    numbers, unravel = ravel_pytree(problem.inner)
    _, product = jax.linearize(lambda x: flat(problem.optimality(problem.outer, unravel(x))), numbers)

    def step(_: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        image = product(carry[0])
        size = jnp.linalg.norm(image)
        return image / jnp.where(size > 0, size, 1.0), size

    direction = jax.random.normal(key, numbers.shape, numbers.dtype)
    start = (direction / jnp.linalg.norm(direction), jnp.zeros((), numbers.dtype))
    return jax.lax.fori_loop(0, POWER_STEPS, step, start)[1]


# --- statistics -------------------------------------------------------------------------------------------------------


def cosine(a: jax.Array, b: jax.Array) -> jax.Array:
    """Cosine over the last dimension; NaN where either is zero."""
    return (a * b).sum(-1) / (jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1))


def compared(estimates: jax.Array, exact: jax.Array, reference: jax.Array) -> dict[str, jax.Array]:
    """How the estimates of each estimator compare.

    Args:
        estimates: g `[estimators, batches, outer variables]`.
        exact: d `[batches, outer variables]`, the exact hypergradient on the same batches.
        reference: r `[outer variables]`.

    Returns:
        `cosine` of g and r, `batch_cosine` of g and d on the same batch, `norm_ratio` |g| / |r|, all `[estimators,
        batches]`; `relative_bias` |mean g - mean d| / |mean d| and `relative_variance`, the sum over the outer
        variables of the (unbiased) variance over batches, over |mean d|^2, both `[estimators]`.
    """
    mean, expected = estimates.mean(1), exact.mean(0)
    size = jnp.linalg.norm(expected)
    variance = jnp.var(estimates, axis=1, ddof=1).sum(-1)
    return {
        "cosine": cosine(estimates, reference),
        "batch_cosine": cosine(estimates, exact),
        "norm_ratio": jnp.linalg.norm(estimates, axis=-1) / jnp.linalg.norm(reference),
        "relative_bias": jnp.linalg.norm(mean - expected, axis=-1) / size,
        "relative_variance": variance / size**2,
    }

"""The observatory: a program of another family, whose evaluations compare hypergradients at the state as it is then.

Outline of an evaluation (inside the compiled loop, for one member):

    freeze the state; draw num_batches fresh batches, and reference_batches others
    reference r: the damped dense hypergradient of the others taken as one (finite MDPs: the exact one)
    for each batch:
        exact d: the damped dense hypergradient on this batch (finite MDPs: r)
        for each estimator: hypergradient g, and what its adjoint leaves of the adjoint equation
    cosines, bias, variance of g over the batches

Training is that of the family, untouched: `update` and `init` are inherited. Which problem a state holds is said by
`ControlObservatory`, `TabularObservatory` and `RegressionObservatory`.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from purejax_bilevel.program import Measure, Program, Tree
from purejax_bilevel.programs.observatory import costs, estimators, settings
from purejax_bilevel.programs.observatory.estimators import Problem

# Named streams of random numbers. That of the observatory is no stream and no step of the family whose key it is of.
OBSERVE = 2**32 - 1
BATCH, REFERENCE, POWER = range(3)
DATA, DRAW = range(2)  # of a batch

ESTIMATOR, BATCH_DIMENSION = "estimator", "batch"
EACH = (ESTIMATOR, BATCH_DIMENSION)
MEASURES = (
    Measure("median_cosine", "cosine of the median estimator to the reference", better="higher"),
    Measure("cosine", "cosine to the reference", better="higher", dims=EACH, logged=False),
    Measure("batch_cosine", "cosine to the exact one on the same batch", better="higher", dims=EACH, logged=False),
    Measure("norm_ratio", "norm over that of the reference", dims=EACH, logged=False),
    Measure("adjoint_residual", "relative residual of the adjoint equation", dims=EACH, logged=False),
    Measure("relative_bias", "bias over the exact one's norm", better="lower", dims=(ESTIMATOR,), logged=False),
    Measure("relative_variance", "variance over that norm squared", better="lower", dims=(ESTIMATOR,), logged=False),
    Measure("exact_cosine", "cosine of the exact one on a batch to the reference", dims=(BATCH_DIMENSION,)),
    Measure("reference_agreement", "cosine of the exact ones' mean to the reference, which has other batches"),
    Measure("reference_norm", "norm of the reference"),
    Measure("reference_residual", "relative residual of the reference's adjoint"),
    Measure("curvature", "largest absolute eigenvalue of the inner problem's Hessian"),
    Measure("inner_gradient_norm", "norm of the inner problem's optimality condition, mean over batches"),
)


class Observatory(Program[Any]):
    """What the observatories share; the class of the family's program comes after it among the bases."""

    headline = "median_cosine"
    figures = "purejax_bilevel.programs.observatory.figures"

    def __init__(self, config: Any):
        super().__init__(config)  # type: ignore[call-arg]
        self.config = config
        self.estimators = settings.parse(config.estimators)
        self.measures = (*MEASURES, *self.measures)
        self.labels = {ESTIMATOR: tuple(estimator.name for estimator in self.estimators)}
        (stage,) = self.stages
        self.stages = (dataclasses.replace(stage, evaluate=self._observing(stage.evaluate)),)

    def _observing(self, evaluate: Callable[..., dict[str, jax.Array]]) -> Callable[..., dict[str, jax.Array]]:
        """What the family measures, and the comparison at this state."""

        def both(state: Any, config: Any, t: jax.Array, is_last: jax.Array, shared: Tree = ()) -> dict[str, jax.Array]:
            return {**evaluate(state, config, t, is_last, shared), **self.observe(state, config, t)}

        return both

    # --- of each problem

    def frozen_batch(self, state: Any, config: Any, t: jax.Array, key: jax.Array) -> Tree:
        """What an estimator sees of the data at step `t`: a fresh batch; the key is consumed."""
        raise NotImplementedError

    def problem(self, state: Any, config: Any, batch: Tree) -> Problem:
        """The bilevel problem on a batch."""
        raise NotImplementedError

    def reference(
        self, state: Any, config: Any, batches: Tree, key: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The reference, from batches of its own.

        Returns:
            It `[outer variables]`; the residual of its adjoint; the curvature of the inner problem.
        """
        problem = estimators.joined(lambda batch: self.problem(state, config, batch), batches)
        problem = problem._replace(curvature=estimators.curvature(problem, key))
        return (*estimators.dense(problem, config), jnp.asarray(problem.curvature))

    def exact(self, problem: Problem, config: Any, reference: jax.Array) -> jax.Array:
        """The exact hypergradient `[outer variables]` on a batch."""
        return estimators.dense(problem, config)[0]

    # --- of all

    def observe(self, state: Any, config: Any, t: jax.Array) -> dict[str, jax.Array]:
        """Compares all estimators at a state, which stays as it is."""
        key = jax.random.fold_in(jax.random.fold_in(state.key, OBSERVE), t)
        draw = lambda key: self.frozen_batch(state, config, t, key)  # noqa: E731
        keys = jax.random.split(jax.random.fold_in(key, REFERENCE), config.reference_batches)
        others, power_key = jax.vmap(draw)(keys), jax.random.fold_in(key, POWER)
        reference, reference_residual, curvature = self.reference(state, config, others, power_key)

        def on_batch(number: jax.Array) -> tuple[jax.Array, ...]:
            own = jax.random.fold_in(jax.random.fold_in(key, BATCH), number)
            problem = self.problem(state, config, draw(jax.random.fold_in(own, DATA)))
            problem = problem._replace(curvature=curvature)
            found = [
                estimators.estimate(estimator, problem, config, jax.random.fold_in(jax.random.fold_in(own, DRAW), i))
                for i, estimator in enumerate(self.estimators)
            ]
            gradients, residuals = (jnp.stack(column) for column in zip(*found, strict=True))
            slope = jnp.linalg.norm(estimators.flat(problem.optimality(problem.outer, problem.inner)))
            return gradients, residuals, self.exact(problem, config, reference), slope

        gradients, residuals, exact, slopes = estimators.each(on_batch, jnp.arange(config.num_batches))
        measured = estimators.compared(gradients.swapaxes(0, 1), exact, reference)
        return {
            **measured,
            "median_cosine": jnp.nanmedian(measured["cosine"].mean(1)),
            "adjoint_residual": residuals.T,
            "exact_cosine": estimators.cosine(exact, reference),
            "reference_agreement": estimators.cosine(exact.mean(0), reference),
            "reference_norm": jnp.linalg.norm(reference),
            "reference_residual": reference_residual,
            "curvature": curvature,
            "inner_gradient_norm": slopes.mean(),
        }

    def write(self, states: Tree, members: Sequence[dict[str, Any]], folder: Path) -> None:
        """Measures time and memory of each estimator at the first member's last state, and writes them."""
        super().write(states, members, folder)
        costs.write(self, states, folder)

"""The contract: what a training program offers, and nothing of how it is run.

A program is a few pure functions of one member. Batching over members, sharding, chunks, checkpoints, progress, results
and resume are the same for all programs (`runtime/`).

    init(key, config) -> state
    for t in 0 .. warm_up - 1:           state, metrics = collect(state, config, t)
    for t in warm_up .. num_steps - 1:   state, metrics = update(state, config, t)
    every eval_frequency steps and after the last: evaluate(state, config, t, is_last)

`t` is a scalar that all members share. Both bounds are decided between blocks of steps, not in each step: the loop over
steps has no branch.
"""

import dataclasses
from typing import Any, Protocol

import jax

from purejax_bilevel.members import Grid

Tree = Any
Metrics = dict[str, tuple[jax.Array, jax.Array]]
"""Name -> (sum, count) since the last evaluation; count 0 where there was nothing to measure."""


class Program(Protocol):
    """What an algorithm offers (see `programs/`): pure functions of one member.

    It may also have `warm_up` and `collect` (see above; without them every step is an `update`), `attributes` (per
    measured variable: `better`, `units`, `dimension`, as in `results.build_dataset`), `tables` (variables to print at
    the end) and `not_logged` (variables kept out of wandb and TensorBoard).
    """

    headline: str
    step_unit: str
    long_names: dict[str, str]
    finals: dict[str, str]
    num_steps: int
    eval_frequency: int

    def init(self, key: jax.Array, config: Any) -> Tree:
        """State before the first step."""

    def update(self, state: Tree, config: Any, t: jax.Array) -> tuple[Tree, Metrics]:
        """One step. `collect` has the same arguments and may leave metrics out."""

    def evaluate(self, state: Tree, config: Any, t: jax.Array, is_last: jax.Array) -> dict[str, jax.Array]:
        """Measures the current state, without changing it."""

    def is_finite(self, state: Tree) -> jax.Array:
        """Whether the member has not diverged."""


@dataclasses.dataclass(frozen=True)
class Part:
    """A sub-program and its members; `config` has leaves `[members]`; `label` tells it from other parts."""

    program: Program
    config: Any
    grid: Grid
    label: str = ""


def warm_up(program: Program) -> int:
    """Steps of a program before its first update."""
    return getattr(program, "warm_up", 0)

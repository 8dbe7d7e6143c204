"""What an estimator costs: seconds and temporary memory of each, compiled alone, at the last state of one member.

These are measurements of one machine at one time. They are in a file beside the results, which are the same bits on
every run.
"""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from purejax_bilevel.programs.observatory import COSTS, estimators
from purejax_bilevel.results.dataset import write_text

CALLS, LEAST_CALLS, SECONDS = 20, 3, 1.0  # of each estimator: at most, at least, and enough if they take so long
UNIT = "one gradient of the outer loss"


def write(program: Any, states: Any, folder: Path) -> None:
    """Measures all estimators of an observatory at its first member's last state, and writes `costs.json`.

    Args:
        program: the observatory.
        states: of all members, leaves `[members, ...]`.
        folder: of the run.
    """
    state, config = (jax.tree.map(lambda leaf: leaf[0], tree) for tree in (states, program.config))
    t = jax.numpy.int32(program.stages[-1].num_steps - 1)
    batch_key, key = jax.random.split(jax.random.key(0))
    batch = jax.jit(program.frozen_batch)(state, config, t, batch_key)

    def outer_gradient(state: Any, config: Any, batch: Any, key: jax.Array) -> Any:
        problem = program.problem(state, config, batch)
        return jax.grad(problem.outer_loss)(problem.inner)

    def alone(estimator: Any) -> Callable[..., Any]:
        return lambda state, config, batch, key: estimators.estimate(
            estimator, program.problem(state, config, batch), config, key
        )

    arguments = (state, config, batch, key)
    unit = measured(outer_gradient, *arguments)
    found = {estimator.name: measured(alone(estimator), *arguments) for estimator in program.estimators}
    for cost in found.values():
        cost["relative_time"] = cost["seconds"] / unit["seconds"]
    content = {"unit": UNIT, **unit, "platform": jax.default_backend(), "estimators": found}
    write_text(folder / COSTS, json.dumps(content, indent=1) + "\n")


def measured(function: Callable[..., Any], *arguments: Any) -> dict[str, float]:
    """Median seconds of a call and bytes of temporary memory of a compiled function."""
    compiled = jax.jit(function).lower(*arguments).compile()
    memory = compiled.memory_analysis()
    jax.block_until_ready(compiled(*arguments))
    taken: list[float] = []
    while len(taken) < LEAST_CALLS or (len(taken) < CALLS and sum(taken) < SECONDS):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*arguments))
        taken.append(time.perf_counter() - start)
    return {"seconds": statistics.median(taken), "temporary_bytes": float(getattr(memory, "temp_size_in_bytes", 0))}

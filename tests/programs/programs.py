"""What every training program must withstand, whatever its algorithm: checks shared by the tests of this folder."""

import contextlib
import dataclasses
import functools
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from purejax_bilevel.configuration import replace
from purejax_bilevel.program import Configuration
from purejax_bilevel.runtime import loop, outcomes
from purejax_bilevel.runtime.compiled import CompiledProgram
from purejax_bilevel.studies import run as runs


class Killed(BaseException):
    """As a process that ends between two chunks."""


@contextlib.contextmanager
def killed_after(calls: int) -> Iterator[None]:
    """What runs inside is killed after so many calls of a compiled program, and it must come to that."""
    original, left = CompiledProgram.__call__, [calls]

    def limited(self: CompiledProgram, *arguments: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        return original(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CompiledProgram, "__call__", limited)
        with pytest.raises(Killed):
            yield


def train(config: Configuration, num_seeds: int = 2, seed: int = 0, **options: Any) -> tuple[Any, outcomes.Outcome]:
    """A quiet run: its members and what came out. On one device unless told, which a fifth less is compiled for."""
    part = runs.make_part(config.resolved(), num_seeds, seed)
    return part, loop.train([part], loop.RunOptions(**{"quiet": True, "devices": 1, **options}))


def step(program: Any, state: Any, config: Configuration, t: Any) -> tuple[Any, dict[str, Any]]:
    """Step `t` of a program, before or after the end of its warm-up; metrics that it leaves out have count 0."""
    stage = program.stages[0]
    learn = lambda state: program.update(state, config, t)  # noqa: E731
    nothing = jax.tree.map(lambda x: jax.numpy.zeros(x.shape, x.dtype), jax.eval_shape(learn, state)[1])

    def collect(state: Any) -> tuple[Any, dict[str, Any]]:
        state, metrics = program.collect(state, config, t)
        return state, nothing | metrics

    return jax.lax.cond(t < stage.warm_up, collect, learn, state)


def same(a: Any, b: Any) -> None:
    """Equal to the last bit."""
    jax.tree.map(np.testing.assert_array_equal, a, b)


def moved(start: Any, end: Any) -> bool:
    """Whether any number is another one."""
    pairs = zip(jax.tree.leaves(start), jax.tree.leaves(end), strict=True)
    return any(not np.allclose(first, last, atol=1e-6) for first, last in pairs)


def initial_learners(part: Any) -> Any:
    """What the members of a part have learned before their first step."""
    seeds = np.array([part.grid.settings(member)["seed"] for member in range(len(part.grid))])
    batched = jax.tree.map(jax.numpy.asarray, part.config)
    start = jax.jit(jax.vmap(lambda seed, own: part.program.init(jax.random.key(seed), own)))(seeds, batched)
    return start.learner


def recorded(config: Configuration, steps: int, limit: int) -> tuple[Any, Any, Any, dict[str, Any]]:
    """The first steps of a member alone, in an environment with that time limit: configuration, program, state after
    them, metrics of each."""
    config = config.resolved()
    config = replace(config, max_hidden_dim=config.hidden_dim, max_model_hidden_dim=config.model_hidden_dim)
    program = config.program()
    params = program.task.params.replace(max_steps_in_episode=limit)
    program.task = dataclasses.replace(program.task, params=params, max_steps=limit)

    @jax.jit
    def run() -> tuple[Any, Any]:
        start = program.init(jax.random.key(0), config)
        return jax.lax.scan(lambda state, t: step(program, state, config, t), start, jax.numpy.arange(steps))

    return config, program, *run()


def own_run(config: Configuration, part: Any, member: int) -> outcomes.Outcome:
    """One member of a grid, trained again alone on one device, in arrays of its own size."""
    setting = part.grid.settings(member)
    seed = setting.pop("seed")
    return train(replace(config, **setting), 1, seed, devices=1)[1]


def mostly(names: Iterable[Any], slow: Collection[Any]) -> list[Any]:
    """Parameters of a test, those that take long marked as slow: `./setup/run pytest -m slow` runs them."""
    return [pytest.param(name, marks=pytest.mark.slow) if name in slow else name for name in names]


def check_resume_is_bitwise(
    config: Configuration, folder: Path, monkeypatch: pytest.MonkeyPatch, resumed_on: int = 2
) -> None:
    """A run of 60 steps on 3 devices broken off at 30, between two evaluations, and continued on another number."""
    _, whole = train(config, devices=2)
    assert len(whole.failed[0]) > 3  # so that a device has one member or more
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
    original = CompiledProgram.__call__

    def breaking(self: CompiledProgram, state: Any, start: int, *others: int) -> Any:
        if start >= 30:
            raise RuntimeError("power cut")
        return original(self, state, start, *others)

    monkeypatch.setattr(CompiledProgram, "__call__", breaking)
    with pytest.raises(RuntimeError, match="power cut"):
        train(config, folder=folder, devices=3, chunks=4)
    monkeypatch.undo()
    assert loop.steps_done(folder) == 30
    _, outcome = train(config, folder=folder, resume=True, devices=resumed_on, chunks=5)
    assert outcome.steps == 60
    same(outcome.state, whole.state)
    for name, array in whole.rows[0].items():
        np.testing.assert_array_equal(outcome.rows[0][name], array)


def count_conds(config: Configuration, num_seeds: int, member_batch: int | None, mesh: Any) -> int:
    """Number of real branches in the program of a run."""
    part = runs.make_part(config.resolved(), num_seeds, 0)
    program = CompiledProgram([part], mesh, member_batch)
    bounds = (*map(jax.numpy.int32, (0, 60, 60)), jax.numpy.ones(1, int))
    chunk = functools.partial(program._chunk, 0, 0)
    jaxpr = jax.make_jaxpr(chunk)(program._structure, program._configs, program._seeds, program._shared, *bounds)
    return str(jaxpr).count("cond[")

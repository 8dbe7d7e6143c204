"""The runner's loop on a toy program: chunks, rows, resume, padding, interruption, several parts."""

import dataclasses
import functools
import os
import signal
from pathlib import Path
from typing import Any

import chex
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from purejax_bilevel.configuration import POSITIVE, at_least, configuration, replace, static, traced
from purejax_bilevel.errors import UserError
from purejax_bilevel.program import Measure, Program, Stage
from purejax_bilevel.runtime import checkpoint, compiled, devices, loop, outcomes, schedule
from purejax_bilevel.studies import run as runs


@configuration
class Walk:
    """A random walk with drift."""

    drift: float = traced(0.1, "mean of a step", POSITIVE)
    num_train_steps: int = static(25, "steps", at_least(1))
    eval_frequency: int = static(4, "steps between rows", at_least(0))
    explode_after: int = static(10**6, "from this step on the walk is not a number")
    twice: bool = static(False, "steps of double length")

    def resolved(self) -> "Walk":
        return self

    def program(self) -> "WalkProgram":
        return WalkProgram(self)


class State(flax.struct.PyTreeNode):
    key: jax.Array
    position: jax.Array


class WalkProgram(Program):
    headline = "place"
    measures = (
        Measure("last_places", "last places", dims=("episode",), when="end"),
        Measure("walked", "sum of all steps", total_of="step"),
    )

    def __init__(self, config: Walk):
        cycle = tuple((1, functools.partial(self.step, odd=jnp.array(odd))) for odd in (0.0, 1.0))
        self.stages = (Stage(config.num_train_steps, config.eval_frequency, self.update, self.evaluate, cycle=cycle),)

    def init(self, key: jax.Array, config: Walk, shared: tuple = ()) -> State:
        return State(key, jnp.zeros(()))

    def update(self, state: State, config: Walk, t: jax.Array, shared: tuple = ()) -> tuple[State, dict]:
        return self.step(state, config, t, shared, (t % 2).astype(float))

    def step(self, state: State, config: Walk, t: jax.Array, shared: tuple, odd: jax.Array) -> tuple[State, dict]:
        step = config.drift + jax.random.normal(jax.random.fold_in(state.key, t)) * (2.0 if config.twice else 1.0)
        position = state.position + jnp.where(t >= config.explode_after, jnp.nan, step)
        return state.replace(position=position), {"step": (step, jnp.ones(())), "odd_step": (odd * step, odd)}

    def evaluate(
        self, state: State, config: Walk, t: jax.Array, is_last: jax.Array, shared: tuple = ()
    ) -> dict[str, jax.Array]:
        return {"place": state.position, "last_places": jnp.where(is_last, state.position, jnp.nan)[None]}

    def is_finite(self, state: State) -> jax.Array:
        return jnp.isfinite(state.position)


def run(config: Walk, seeds: int = 3, **options: Any) -> outcomes.Outcome:
    return loop.train([runs.make_part(config, seeds, 0)], loop.RunOptions(quiet=True, **options))


def expected_walk(drift: float, seed: int, steps: int) -> np.ndarray:
    normals = jax.vmap(lambda t: jax.random.normal(jax.random.fold_in(jax.random.key(seed), t)))(jnp.arange(steps))
    return np.cumsum(np.float32(drift) + np.asarray(normals), dtype=np.float32)


@pytest.mark.parametrize(("devices", "member_batch", "names"), [(1, 1, ("update", "evaluate")), (2, None, ("update",))])
def test_no_function_is_traced_twice(devices: int, member_batch: int | None, names: tuple[str, ...]):
    """Though `init` leaves a constant without a type, and their shapes have to be known before they are compiled."""
    chex.clear_trace_counter()
    part = runs.make_part(Walk(), 3, 0)
    stage, program = part.program.stages[0], part.program
    program.init = chex.assert_max_traces(lambda key, config, shared: State(key, 0.0), n=1)
    counted = {name: chex.assert_max_traces(getattr(stage, name), n=1) for name in names}
    program.stages = (dataclasses.replace(stage, **counted),)
    compiled.CompiledProgram([part], compiled.mesh_of([part], devices), member_batch).lower()


def test_chunks_are_measured_anew_where_learning_starts(monkeypatch: pytest.MonkeyPatch):
    """Steps before it take no time and 2 s after it: no call may take longer than the host waits between two looks."""
    part = runs.make_part(Walk(num_train_steps=130, eval_frequency=0), 1, 0)
    (stage,) = part.program.stages
    part.program.stages = (dataclasses.replace(stage, collect=stage.update, warm_up=100),)
    advance, chunks = loop.Run._advance, []

    def timed(self: loop.Run, count: int, *others: Any) -> float:
        advance(self, count, *others)
        chunks.append(count)
        return count * (1e-9 if self.steps <= 100 else 2.0)

    monkeypatch.setattr(loop.Run, "_advance", timed)
    loop.train([part], loop.RunOptions(quiet=True, devices=1))
    assert chunks[:5] == [1, 4, 16, 64, 15]  # up to step 100
    assert chunks[5:] == [1] * 30
    assert loop.CHUNK_SECONDS > 2.0


@pytest.mark.parametrize("kept", [True, False])
def test_a_script_that_is_stopped_while_it_compiles_ends_at_once(
    kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd
):
    class Ended(BaseException):
        pass

    def end(status: int) -> None:
        raise Ended(status)

    monkeypatch.setattr(loop.interrupts, "_in_script", True)
    monkeypatch.setattr(loop.interrupts.os, "_exit", end)
    monkeypatch.setattr(compiled.CompiledProgram, "compile", lambda *arguments: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(Ended, match="143"):
        run(Walk(), folder=tmp_path if kept else None)
    sentence = loop.STOPPED_COMPILING if kept else "stopped while compiling."
    assert capfd.readouterr().err.endswith(f"{sentence}\n")
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize("chunks", [None, 1, 2, 7, 25])
@pytest.mark.parametrize(("devices", "member_batch"), [(1, None), (8, 1), (3, 0), (1, 2)])
def test_numbers_do_not_depend_on_chunks_devices_or_batches(chunks: int | None, devices: int, member_batch: int | None):
    config = Walk(drift=(0.1, 0.5))
    outcome = run(config, chunks=chunks, devices=devices, member_batch=member_batch)
    assert outcome.num_traces == 1
    rows = outcome.rows[0]
    np.testing.assert_array_equal(schedule.row_steps(25, 4), [4, 8, 12, 16, 20, 24, 25])
    for member, (drift, seed) in enumerate([(d, s) for d in (0.1, 0.5) for s in range(3)]):
        walk = expected_walk(drift, seed, 25)
        np.testing.assert_allclose(rows["place"][member], walk[[3, 7, 11, 15, 19, 23, 24]], rtol=1e-5)
        steps = np.diff(walk, prepend=np.float32(0))
        np.testing.assert_allclose(
            rows["step"][member][:2], [steps[:4].mean(), steps[4:8].mean()], rtol=1e-4, atol=1e-6
        )
        np.testing.assert_allclose(rows["odd_step"][member][0], steps[[1, 3]].mean(), rtol=1e-4)
        assert np.isnan(rows["odd_step"][member][-1])  # no odd step in the last row's one step
        assert np.isfinite(rows["last_places"][member, -1]).all()
        assert np.isnan(rows["last_places"][member, :-1]).all()


@pytest.mark.parametrize(("frequency", "total"), [(4, 25), (8, 32), (0, 25), (9, 27), (5, 25)])
def test_blocks_of_a_fixed_length_give_the_same_numbers(frequency: int, total: int):
    """In blocks of whole cycles each step is that of its place in the cycle, else the one for any place."""
    config = Walk(drift=(0.1, 0.5), eval_frequency=frequency, num_train_steps=total)
    part = runs.make_part(config, 3, 0)
    program = compiled.CompiledProgram([part], devices.make_mesh(6, 2), 1, most_block_steps=4)
    assert program.block_steps == [{4: 4, 8: 4, 0: 4, 9: 3, 5: 1}[frequency]]
    rows: dict[str, list[np.ndarray]] = {}
    state = program.initial()
    for start, stop in ((0, 3), (3, 13), (13, total)):  # before, in and across blocks
        state, (new,), _ = program(state, start, stop, total)
        for name, array in new.items():
            rows.setdefault(name, []).append(array)
    expected = run(config).rows[0]
    for name, arrays in rows.items():
        np.testing.assert_allclose(np.concatenate(arrays, axis=1), expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("member_batch", [1, 2])
def test_a_member_has_the_same_bits_on_any_number_of_devices(member_batch: int):
    """One member of a device is computed by the same loop as many."""
    config = Walk(drift=(0.1, 0.5))
    two, three, eight = (run(config, devices=count, member_batch=member_batch).rows[0] for count in (2, 3, 8))
    jax.tree.map(np.testing.assert_array_equal, two, three)
    jax.tree.map(np.testing.assert_array_equal, two, eight)


def test_a_run_goes_on_in_batches_of_the_same_size(tmp_path: Path):
    run(Walk(num_train_steps=10), folder=tmp_path, member_batch=2, devices=2)
    with pytest.raises(UserError, match=r"begun with member batch 2, got 1: .* go on with the same --member_batch"):
        run(Walk(), folder=tmp_path, member_batch=1, resume=True)
    with pytest.raises(UserError, match=r"begun with devices several, got one: .* go on with the same --devices"):
        run(Walk(), folder=tmp_path, devices=1, resume=True)
    resumed = run(Walk(), folder=tmp_path, resume=True, devices=3)
    jax.tree.map(np.testing.assert_array_equal, resumed.rows, run(Walk(), member_batch=2).rows)


def test_a_run_goes_on_with_the_same_kind_of_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as patch:
        placement = loop.placement
        patch.setattr(loop, "placement", lambda *own: placement(*own) | {"platform": "cuda"})
        run(Walk(num_train_steps=10), folder=tmp_path)
    with pytest.raises(UserError, match=r"begun with platform cuda, got cpu: .* go on with the same JAX_PLATFORMS"):
        run(Walk(), folder=tmp_path, resume=True)


def test_a_run_with_all_members_at_once_goes_on_with_as_many_on_each_device(tmp_path: Path):
    run(Walk(num_train_steps=10), folder=tmp_path, member_batch=0, devices=3)
    with pytest.raises(UserError, match=r"members at once on each device \[1\], got \[2\]"):
        run(Walk(), folder=tmp_path, devices=2, resume=True)
    run(Walk(), folder=tmp_path, devices=3, resume=True)


def test_evaluation_only_at_the_end():
    rows = run(Walk(eval_frequency=0), chunks=3).rows[0]
    np.testing.assert_allclose(rows["place"][1], expected_walk(0.1, 1, 25)[-1:], rtol=1e-5)


def test_parts_share_one_compilation():
    parts = [runs.make_part(Walk(drift=(0.1, 0.2), twice=twice), 5, 0) for twice in (False, True)]
    outcome = loop.train(parts, loop.RunOptions(quiet=True))
    assert outcome.num_traces == 1
    for number, twice in enumerate((False, True)):
        np.testing.assert_array_equal(
            outcome.rows[number]["place"], run(Walk(drift=(0.1, 0.2), twice=twice), 5).rows[0]["place"]
        )


def test_a_longer_run_goes_on_where_a_shorter_ended(tmp_path: Path):
    """Also when the shorter one ended between two regular evaluations."""
    run(Walk(num_train_steps=10), folder=tmp_path, devices=2)
    longer = run(Walk(num_train_steps=25), folder=tmp_path, resume=True, devices=8)
    whole = run(Walk(num_train_steps=25))
    jax.tree.map(np.testing.assert_array_equal, longer.state[0][0], whole.state[0][0])
    jax.tree.map(np.testing.assert_array_equal, longer.rows, whole.rows)


def test_totals_are_sums_in_64_bits_of_what_each_step_adds():
    rows = run(Walk(), chunks=3).rows[0]
    lengths = np.array([4, 4, 4, 4, 4, 4, 1])
    assert rows["walked"].dtype == np.float64
    np.testing.assert_array_equal(rows["walked"], np.cumsum(rows["step"].astype(np.float64) * lengths, axis=1))
    np.testing.assert_allclose(rows["walked"], rows["place"], rtol=1e-5)


def test_resuming_a_finished_run_changes_nothing(tmp_path: Path):
    first = run(Walk(), folder=tmp_path)
    again = run(Walk(), folder=tmp_path, resume=True)
    assert again.num_traces == 0
    assert (again.compile_seconds, again.run_seconds) == (first.compile_seconds, first.run_seconds)
    jax.tree.map(np.testing.assert_array_equal, again.rows, first.rows)


def test_interrupt_keeps_the_last_chunk_and_says_how_to_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    original = compiled.CompiledProgram.__call__

    def interrupting(self: Any, state: Any, start: int, *others: int) -> Any:
        if start == 10:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, state, start, *others)

    monkeypatch.setattr(compiled.CompiledProgram, "__call__", interrupting)
    with pytest.raises(loop.Interrupted, match="stopped after 15 of 25 steps; go on with --resume"):
        run(Walk(), folder=tmp_path, chunks=5)
    monkeypatch.undo()
    assert loop.steps_done(tmp_path) == 15
    resumed = run(Walk(), folder=tmp_path, resume=True)
    jax.tree.map(np.testing.assert_array_equal, resumed.rows, run(Walk()).rows)


def test_failures_are_named_once(capsys: pytest.CaptureFixture):
    part = runs.make_part(Walk(explode_after=7), 2, 5)
    outcome = loop.train([part], loop.RunOptions(chunks=5))
    assert outcome.failed[0].all()
    text = capsys.readouterr().err
    assert text.count("diverged (not a number) by step 10: seed=5") == 1
    assert text.count("seed=6") == 1


def test_of_many_failures_the_first_are_named(capsys: pytest.CaptureFixture):
    loop.train([runs.make_part(Walk(explode_after=7), 13, 0)], loop.RunOptions(chunks=5))
    text = capsys.readouterr().err
    assert text.count("diverged") == 10
    assert "... and 3 more members." in text


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"devices": 9}, "--devices must be from 1 to 8"),
        ({"devices": 0}, "--devices must be from 1 to 8"),
        ({"member_batch": -1}, "--member_batch must be 0"),
        ({"chunks": 0}, "--chunks must be at least 1"),
        ({"wandb_mode": "offline"}, "need an output folder"),
    ],
)
def test_bad_options(options: dict[str, Any], sentence: str):
    with pytest.raises(UserError, match=sentence):
        run(Walk(), **options)


@pytest.mark.parametrize(
    ("seed", "num_seeds", "sentence"), [(0, 0, "--num_seeds"), (-1, 2, "--seed"), (2**32 - 1, 2, "--seed")]
)
def test_bad_seeds(seed: int, num_seeds: int, sentence: str):
    with pytest.raises(UserError, match=sentence):
        loop.make_seeds(seed, num_seeds)


# --- checkpoints ------------------------------------------------------------------------------------------------------


def test_torn_checkpoint_is_refused(tmp_path: Path):
    run(Walk(), folder=tmp_path)
    path = tmp_path / checkpoint.FILE_NAME
    content = path.read_bytes()
    for damaged in (content[: len(content) // 2], content[:100], b"", content[:700] + b"\xff" * 8 + content[708:]):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="is not a whole checkpoint"):
            run(Walk(), folder=tmp_path, resume=True)


@pytest.mark.parametrize(
    ("other", "seeds", "sentence"),
    [
        (Walk(drift=0.2), 3, "its drift is"),
        (Walk(twice=True), 3, "its twice is False, this one's True"),
        (Walk(), 4, "its seeds is"),
    ],
)
def test_foreign_checkpoint_is_refused(tmp_path: Path, other: Walk, seeds: int, sentence: str):
    run(Walk(), folder=tmp_path)
    with pytest.raises(UserError, match=sentence):
        run(other, seeds, folder=tmp_path, resume=True)


def test_checkpoint_of_other_arrays_is_refused(tmp_path: Path):
    run(Walk(), folder=tmp_path)
    part = runs.make_part(Walk(), 3, 0)
    structure = compiled.CompiledProgram([part], loop.devices.make_mesh(3), 1).structure
    wrong = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((*leaf.shape, 2), leaf.dtype), structure)
    path = tmp_path / checkpoint.FILE_NAME
    with pytest.raises(UserError, match="does not fit this version"):
        checkpoint.load(path, wrong, checkpoint.load_fingerprint(path))


def test_shorter_run_than_the_checkpoint_is_refused(tmp_path: Path):
    run(Walk(), folder=tmp_path)
    with pytest.raises(UserError, match="has done 25 steps, more than the 10"):
        run(replace(Walk(), num_train_steps=10), folder=tmp_path, resume=True)


@pytest.mark.parametrize(
    ("frequency", "total", "members", "timed"),
    [(100, 1000, 2, 2), (0, 1000, 2, 2), (7, 30, 2, 2), (100, 1000, 1000, 67)],
)
def test_time_of_a_step_leaves_out_the_cost_of_a_call(
    monkeypatch: pytest.MonkeyPatch, frequency: int, total: int, members: int, timed: int
):
    part = runs.make_part(Walk(num_train_steps=total, eval_frequency=frequency), members, 0)
    program = compiled.CompiledProgram([part], devices.make_mesh(1, 1), 1)
    clock = 0.0

    def call(
        self: compiled.CompiledProgram, state: Any, start: int, stop: int, total: int, stage: int, one_of: int
    ) -> tuple:
        nonlocal clock
        assert 0 <= start < stop <= total
        assert -(-members // one_of) == timed  # of very many members some are enough
        evaluations = sum((t + 1) % (frequency or total) == 0 or t + 1 == total for t in range(start, stop))
        clock += 5.0 + timed / members * (0.02 * (stop - start) + 3.0 * evaluations)
        return state, None, None

    monkeypatch.setattr(compiled.CompiledProgram, "__call__", call)
    monkeypatch.setattr(compiled.time, "perf_counter", lambda: clock)
    _, per_step, per_evaluation = program.time_steps(None, total)
    np.testing.assert_allclose([per_step, per_evaluation], [0.02, 3.0], rtol=1e-6)


def test_one_of_so_many_batches_steps_the_first_members_alone():
    part = runs.make_part(Walk(num_train_steps=4), 5, 0)
    program = compiled.CompiledProgram([part], devices.make_mesh(1, 1), 1)
    _, rows, _ = program(program.initial(), 0, 4, 4, 0, 2)
    (measured,) = {np.count_nonzero(np.ravel(array[:, -1])) for array in rows[0].values() if array.any()}
    assert measured == 3

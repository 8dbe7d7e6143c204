"""The contract, held by three small programs that use nothing else: `examples/`, the documentation of adding one."""

import json
import os
import re
import signal
import threading
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from rich.console import Console

from purejax_bilevel import run
from purejax_bilevel.configuration import replace
from purejax_bilevel.errors import UserError
from purejax_bilevel.program import Configuration, alone
from purejax_bilevel.results import dataset as datasets
from purejax_bilevel.runtime import artefacts, checkpoint, compiled, devices, fingerprints, loop
from purejax_bilevel.runtime.outcomes import Outcome
from purejax_bilevel.studies import run as runs
from tests.programs import programs
from tests.programs.examples import population, slow_steps, stages

EXAMPLES = sorted((Path(__file__).parent / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_small_and_uses_the_public_contract_alone(path: Path):
    lines = path.read_text().splitlines()
    assert len(lines) < 80
    ours = [line for line in lines if "purejax_bilevel" in line]
    assert all(line.startswith(("from purejax_bilevel.configuration", "from purejax_bilevel.program")) for line in ours)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_page_shows_the_example(path: Path):
    page = Path(__file__).parents[2] / "purejax_bilevel" / "programs" / "README.md"
    assert f"```python\n{path.read_text()}```" in page.read_text()


# --- a population -----------------------------------------------------------------------------------------------------


def meta(num_devices: int | None, config: Configuration | None = None, seeds: int = 1, **options: Any) -> Outcome:
    return programs.train(config or population.Config(), seeds, devices=num_devices, **options)[1]


def test_one_member_uses_all_devices_for_its_population():
    part = runs.make_part(population.Config(), 1, 0)
    mesh = compiled.mesh_of([part])
    assert dict(mesh.shape) == {"member": 1, "population": 8}
    program = compiled.CompiledProgram([part], mesh, 1)
    state = program.initial()[0].state
    assert {shard.data.shape for shard in state.weights.addressable_shards} == {(2, 2, 8)}  # room for two members
    assert {shard.data.shape for shard in state.log_rate.addressable_shards} == {(2,)}


@pytest.mark.parametrize(
    ("members", "learners", "shape"),
    [
        (1, 16, (1, 8)),
        (2, 16, (2, 4)),
        (3, 16, (3, 2)),
        (8, 16, (8, 1)),
        (1, 6, (1, 6)),
        (1, 7, (1, 7)),
        (1, 11, (1, 1)),
    ],
)
def test_devices_go_to_members_first_and_then_to_individuals(members: int, learners: int, shape: tuple[int, int]):
    assert devices.make_mesh(members, population=learners).devices.shape == shape


def test_a_population_learns_the_same_on_any_number_of_devices():
    one, two, eight = (meta(number) for number in (1, 2, 8))
    assert one.rows[0]["loss"][0, -1] < 0.5 * one.rows[0]["loss"][0, 0]
    for other in (two, eight):
        for name, array in one.rows[0].items():
            np.testing.assert_allclose(other.rows[0][name], array, rtol=2e-4)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4), one.state, other.state)
    assert any(not np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (one.state, eight.state)), strict=True))


def test_the_meta_gradient_is_that_of_the_whole_population(float64: None):
    """Against finite differences of the mean loss after two updates, of all learners in one place."""
    config = population.Config(learners=6)
    program = config.program()
    state = alone(program.init)(jax.random.key(3), config, ())
    state = jax.tree.map(lambda x: x.astype(float) if x.dtype == np.float32 else x, state)

    def loss(log_rate: float) -> float:
        moved = state.replace(log_rate=jax.numpy.asarray(log_rate))
        return float(alone(program.update)(moved, config, jax.numpy.int32(4), ())[1]["loss"][0])

    after, _ = alone(program.update)(state, config, jax.numpy.int32(4), ())
    gradient = after.optimizer[0].mu / 0.1  # Adam's first mean
    at, step = float(state.log_rate), 1e-4
    np.testing.assert_allclose(gradient, (loss(at + step) - loss(at - step)) / (2 * step), rtol=1e-5)


@pytest.mark.parametrize(("number", "seeds"), [(8, 1), (4, 2), (None, 3)])
def test_a_population_goes_on_bit_for_bit(tmp_path: Path, number: int | None, seeds: int):
    config = population.Config(num_train_steps=40)
    whole = meta(number, config, seeds)
    meta(number, replace(config, num_train_steps=20), seeds, folder=tmp_path, chunks=3)
    longer = meta(number, config, seeds, folder=tmp_path, resume=True)
    programs.same(longer.state, whole.state)
    programs.same(longer.rows, whole.rows)


def test_a_population_on_other_devices_is_refused(tmp_path: Path):
    config = population.Config(num_train_steps=20)
    meta(8, config, folder=tmp_path)
    with pytest.raises(UserError, match="begun with devices for each member's population 8, got 4"):
        meta(4, replace(config, num_train_steps=40), folder=tmp_path, resume=True)


# --- shared inputs and stages -----------------------------------------------------------------------------------------

TWO = stages.Config(lr=(0.1, 0.02), rows=2000)


def test_a_stage_ends_early_for_each_member_and_the_next_starts_from_it(tmp_path: Path):
    results = run(TWO, num_seeds=2, folder=tmp_path, quiet=True)
    assert results["held_out"].dims == ("lr", "seed", "step_ensemble")
    assert results["value"].dims == ("lr", "seed", "step")
    measured = results["held_out"].notnull().sum("step_ensemble").values
    assert (measured[0] < measured[1]).all()  # the larger rate is done sooner
    assert measured.max() <= 20
    errors = results["held_out"].values
    for member in np.ndindex(2, 2):
        count = measured[member]
        assert np.isnan(errors[member][count:]).all()
        best = np.minimum.accumulate(errors[member][:count])
        if count < 20:  # three evaluations without an improvement of one percent
            assert (errors[member][count - 3 : count] >= 0.99 * best[count - 4]).all()
    truth = np.linalg.norm(np.linspace(-1, 1, 15))  # value of the best action
    np.testing.assert_allclose(results["value"][..., -1], truth, rtol=0.02)


def test_a_member_that_is_done_changes_no_more(usual_compilation: None):
    """A patient member next to an impatient one: alone, the latter ends up the same."""
    both = programs.train(TWO, 1, devices=2)[1]
    alone_ = programs.train(replace(TWO, lr=0.1), 2, devices=2)[1]
    np.testing.assert_array_equal(both.state[0].state.networks[0], alone_.state[0].state.networks[0])


@pytest.mark.parametrize("stop", ["ensemble", "policy"])
def test_stages_go_on_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: str):
    whole = programs.train(TWO)[1]
    original = compiled.CompiledProgram.__call__

    def interrupting(self: Any, state: Any, start: int, end: int, total: int, stage: int = 0) -> Any:
        if stage == ("ensemble", "policy").index(stop) and start > 0:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, state, start, end, total, stage)

    with monkeypatch.context() as patch:
        patch.setattr(compiled.CompiledProgram, "__call__", interrupting)
        with pytest.raises(loop.Interrupted):
            programs.train(TWO, folder=tmp_path, chunks=40)
    resumed = programs.train(TWO, folder=tmp_path, resume=True)[1]
    programs.same(resumed.state, whole.state)
    programs.same(resumed.rows, whole.rows)
    longer = programs.train(replace(TWO, num_train_steps=140), folder=tmp_path, resume=True)[1]
    assert longer.rows[0]["value"].shape[1] == 7
    np.testing.assert_array_equal(longer.rows[0]["value"][:, :5], whole.rows[0]["value"])


def test_a_dataset_is_in_no_checkpoint_and_costs_no_compile_time(tmp_path: Path):
    seconds, programs_of = {}, {}
    for rows in (2000, 1_000_000):  # 64 MB
        config = replace(TWO, rows=rows, ensemble_steps=40)
        run(config, folder=tmp_path / str(rows), quiet=True)
        part = runs.make_part(config, 1, 0)
        program = compiled.CompiledProgram([part], compiled.mesh_of([part], 1), 1)
        begin = time.perf_counter()
        text = program.lower().as_text()
        seconds[rows] = time.perf_counter() - begin
        assert len(text) < 1e6  # the dataset is no constant of the program
        programs_of[rows] = re.sub(r"\d+", "", text)
        assert (tmp_path / str(rows) / checkpoint.FILE_NAME).stat().st_size < 100_000
    assert programs_of[1_000_000] == programs_of[2000]  # but for sizes: the same work for the compiler
    assert seconds[1_000_000] < 2 * seconds[2000] + 0.5


def test_parts_share_one_copy_of_a_dataset_which_is_read_once(monkeypatch: pytest.MonkeyPatch):
    parts = [runs.make_part(replace(TWO, ensemble_steps=steps), 1, 0) for steps in (40, 40)]
    read, digest = [], fingerprints._digest
    monkeypatch.setattr(fingerprints, "_digest", lambda leaves: read.append(leaves) or digest(leaves))
    experiment = loop.Run(parts, loop.RunOptions(quiet=True), Console())
    own = experiment._own_fingerprint(1)
    assert len(read) == 1
    assert own == fingerprints.fingerprint(parts[1:])
    program = compiled.CompiledProgram(parts, compiled.mesh_of(parts, 1), 1)
    first, second = program._shared
    assert first is second


def test_another_dataset_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = replace(TWO, ensemble_steps=40)
    run(config, folder=tmp_path, quiet=True)
    changed = stages.dataset(2000).copy()
    changed[7, 3] += 1
    monkeypatch.setattr(stages, "dataset", lambda rows: changed)
    with pytest.raises(UserError, match="its shared inputs is"):
        run(replace(config, num_train_steps=140), folder=tmp_path, resume=True, quiet=True)


def test_an_earlier_stage_is_seen_like_a_run(tmp_path: Path):
    run(replace(TWO, ensemble_steps=60), num_seeds=2, folder=tmp_path, quiet=True)
    results = datasets.load(tmp_path)
    assert results.attrs["stages"] == ["ensemble"]
    fitted = datasets.stage_of(results, "ensemble")
    assert fitted["held_out"].dims == ("lr", "seed", "step")
    np.testing.assert_array_equal(fitted["step"], [20, 40, 60])
    assert (tmp_path / "ensemble.png").stat().st_size > 1000


# --- artefacts --------------------------------------------------------------------------------------------------------


def test_a_run_leaves_an_artefact_of_all_members(tmp_path: Path):
    config = replace(TWO, ensemble_steps=60)
    run(config, num_seeds=2, folder=tmp_path, quiet=True)
    found = artefacts.load(tmp_path, "linear ensemble")
    _, outcome = programs.train(config)
    for number in range(4):
        like = jax.ShapeDtypeStruct((5, 15), np.float32)
        np.testing.assert_array_equal(found.member(number, like), outcome.state[0].state.networks[number])
    assert found.about["members"][1] == {"lr": 0.1, "seed": 1}
    assert found.about["config"]["rows"] == 2000


def test_a_wrong_artefact_is_refused_in_one_sentence(tmp_path: Path):
    with pytest.raises(UserError, match=r"no policy at .*: give the folder"):
        artefacts.load(tmp_path, "policy")
    path = artefacts.save(tmp_path, "policy", {"w": np.ones((2, 3), np.float32)}, [{"seed": 0}, {"seed": 1}], {})
    artefacts.load(path, "policy")
    with pytest.raises(UserError, match="is a policy, not a linear ensemble"):
        artefacts.load(tmp_path, "linear ensemble")
    found = artefacts.load(tmp_path, "policy")
    with pytest.raises(UserError, match=r"w is float32\[3\], this program needs float32\[4\]"):
        found.member(0, {"w": np.ones(4, np.float32)})
    with pytest.raises(UserError, match="v is missing"):
        found.member(0, {"v": np.ones(3, np.float32)})
    with pytest.raises(UserError, match="members 0 to 1, got 2"):
        found.member(2)
    content = path.read_bytes()
    for damaged in (content[:-1], content[:9], b"", content[:-1] + b"x"):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="is not a whole artefact"):
            artefacts.load(tmp_path, "policy")
    path.write_bytes(content)
    about = json.loads(path.with_suffix(".json").read_text())
    read = ("format", "kind", "members", "config", "sha256")
    for damaged in ("", "3", "{}", *(json.dumps({**about, name: other}) for name in read for other in (None, 3))):
        path.with_suffix(".json").write_text(damaged)
        with pytest.raises(UserError, match=r"is not a whole artefact|is a (None|3), not a policy"):
            artefacts.load(tmp_path, "policy")


@pytest.mark.parametrize(("text", "found"), [("runs/x", ("runs/x", 0)), ("runs/x#3", ("runs/x", 3))])
def test_a_member_is_named_after_a_hash(text: str, found: tuple[str, int]):
    assert artefacts.place_and_member(text) == found
    with pytest.raises(UserError, match="number of a member"):
        artefacts.place_and_member("runs/x#best")


# --- steps that take long ---------------------------------------------------------------------------------------------


def test_steps_of_seconds_show_progress_and_stop_after_the_one_in_progress(tmp_path: Path):
    config = slow_steps.Config(size=400)
    part = runs.make_part(config, 1, 0)
    program = compiled.CompiledProgram([part], compiled.mesh_of([part], 1), 1)
    begin = time.perf_counter()
    program(program.initial(), 0, 1, 20)
    single = time.perf_counter() - begin - program.compile_seconds
    config = replace(config, inner_steps=int(config.inner_steps * 1.5 / single))
    console = Console(file=(tmp_path / "shown.txt").open("w"), force_terminal=True, width=120)
    asker = threading.Timer(6.0 + 2 * program.compile_seconds, os.kill, (os.getpid(), signal.SIGINT))
    asker.start()
    folder = tmp_path / "run"
    folder.mkdir()
    with pytest.raises(loop.Interrupted, match=r"stopped after [1-9]\d* of 20 steps; go on with --resume"):
        loop.train([runs.make_part(config, 1, 0)], loop.RunOptions(folder=folder), console)
    asker.cancel()
    console.file.close()
    done = loop.steps_done(folder)
    assert 1 <= done < 20
    shown = (tmp_path / "shown.txt").read_text()
    assert "IQM distance" in shown
    shorter = replace(config, num_train_steps=done + 1)
    _, resumed = programs.train(shorter, 1, folder=folder, resume=True)
    assert resumed.rows[0]["distance"].shape == (1, done + 1)
    assert np.diff(resumed.rows[0]["distance"][0, 1:]).max(initial=-1) < 0

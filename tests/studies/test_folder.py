"""The folder of a run: one run alone has it, nothing of others is touched, and bad content is one sentence."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import yaml

from purejax_bilevel import ContinuousConfig, RLConfig
from purejax_bilevel.configuration import replace
from purejax_bilevel.errors import UserError
from purejax_bilevel.runtime import checkpoint, loop
from purejax_bilevel.runtime.options import RunOptions
from purejax_bilevel.studies import command_line, folder, search
from purejax_bilevel.studies import run as runs
from tests import toy
from tests.studies.test_command_line import parse


def take(path: Path, here: threading.Barrier) -> str:
    here.wait()
    try:
        with folder.opened(lambda: path, resume=False):
            (path / folder.CONFIG).write_text("")
            here.wait(10)
            return "has it"
    except UserError as error:
        here.wait(10)
        return str(error)


def test_of_runs_that_start_together_one_has_the_folder(tmp_path: Path):
    path, here = tmp_path / "run", threading.Barrier(4)
    with ThreadPoolExecutor(4) as pool:
        answers = sorted(pool.map(take, [path] * 4, [here] * 4), key=len)
    assert answers[0] == "has it"
    assert all("is writing to" in answer for answer in answers[1:])


def test_a_run_that_is_alive_is_not_resumed_but_one_that_ended_is(tmp_path: Path):
    with folder.opened(lambda: tmp_path / "run", False) as path:
        (path / folder.CONFIG).write_text("")
        again = folder.opened(lambda: path, True)
        with pytest.raises(UserError, match=f"process {os.getpid()} .* is writing to"):
            again.__enter__()
    with folder.opened(lambda: path, True):
        pass


def test_a_new_run_needs_an_empty_folder(tmp_path: Path):
    (tmp_path / "thesis.tex").write_text("")
    with (
        pytest.raises(UserError, match=r"is not empty \(it holds thesis.tex\)"),
        folder.opened(lambda: tmp_path, False),
    ):
        pass
    with pytest.raises(UserError, match="there is no run in that folder"), folder.opened(lambda: tmp_path, True):
        pass
    assert set(os.listdir(tmp_path)) == {folder.LOCK, "thesis.tex"}


def test_a_run_that_came_to_nothing_leaves_no_folder(tmp_path: Path):
    with pytest.raises(UserError, match="bad input"), folder.opened(lambda: tmp_path / "run", False):
        raise UserError("bad input")
    assert not (tmp_path / "run").exists()


def test_a_name_may_be_used_again_after_a_refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WANDB_SWEEP_ID", "s")
    config = toy.Config(num_train_steps=20)
    with pytest.raises(UserError, match="under `wandb agent`"):
        runs.run(config, num_seeds=2, folder=tmp_path / "run", quiet=True, wandb_mode="offline")
    assert not (tmp_path / "run").exists()
    runs.run(config, num_seeds=2, folder=tmp_path / "run", quiet=True)
    longer = replace(config, num_train_steps=24)
    with pytest.raises(UserError, match="under `wandb agent`"):
        runs.run(longer, num_seeds=2, folder=tmp_path / "run", quiet=True, wandb_mode="offline", resume=True)
    assert {folder.CONFIG, checkpoint.FILE_NAME, "results.nc"} <= set(os.listdir(tmp_path / "run"))


def test_runs_of_the_same_second_get_names_of_their_own(tmp_path: Path):
    chosen = {folder.choose(tmp_path, "", None, "omd") for _ in range(3)}
    assert len(chosen) == 3
    assert all(place.is_dir() for place in chosen)


def test_a_resumed_run_gets_no_new_name(tmp_path: Path):
    assert folder.choose(Path("runs"), "", tmp_path, "omd") == tmp_path
    with pytest.raises(UserError, match="--name 'new' does not go with --resume"):
        folder.choose(Path("runs"), "new", tmp_path, "omd")


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/tmp/x", "two\nlines", "x" * 300, " ", ".", "\udcff"])
def test_names_that_are_no_folder_inside_are_refused(name: str, tmp_path: Path):
    with pytest.raises(UserError, match="--name must") as caught:
        folder.choose(tmp_path, name, None, "omd")
    assert "\n" not in str(caught.value)
    assert folder.choose(tmp_path, "study/first", None, "omd") == tmp_path / "study" / "first"


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"\xff\xfe", "codec"),
        (b"config: [", "not of this script"),
        (b"3", "not of this script"),
        (b"run: {seed: 0, num_seeds: 1}", "no 'config'"),
        (b"config: {lr: 0.1, inner_lr: 0.1, tau: 0.1}\nrun: {seed: 0}", "no 'num_seeds'"),
        (b"config: {lr: {a: 1}}\nrun: {seed: 0, num_seeds: 1}", "--lr must be"),
        (
            b"config: {lr: 0.1, inner_lr: 0.1, tau: 0.1}\nrun: {seed: 0, num_seeds: 1}\noptions: {wandb_mode: cloud}",
            "wandb_mode is 'cloud'",
        ),
    ],
)
def test_a_damaged_description_is_one_sentence(content: bytes, sentence: str, tmp_path: Path):
    (tmp_path / folder.CONFIG).write_bytes(content)
    with pytest.raises(UserError, match=sentence) as caught:
        parse(f"--resume {tmp_path}")
    assert "\n" not in str(caught.value)


def stop(write: Path | None) -> None:
    if write:
        write.write_text("")
    raise KeyboardInterrupt


def test_an_interrupted_run_says_what_is_left(tmp_path: Path):
    def interrupted(write: str) -> str:
        with pytest.raises(loop.Interrupted) as caught, folder.opened(lambda: tmp_path / "run", True) as place:
            stop(place / write if write else None)
        return str(caught.value)

    assert "nothing was written" in interrupted("")
    assert "there is no checkpoint yet" in interrupted(folder.CONFIG)
    (tmp_path / "run" / folder.ROUNDS / "generation-1").mkdir(parents=True)
    assert "the rounds that are over remain" in interrupted(f"{folder.ROUNDS}/generation-1/{folder.SCORES}")
    assert "the last checkpoint remains" in interrupted(checkpoint.FILE_NAME)


def test_a_run_from_python_uses_the_same_door(tmp_path: Path):
    runs.run(toy.Config(num_train_steps=20), folder=tmp_path / "run", quiet=True)
    told = yaml.safe_load((tmp_path / "run" / folder.CONFIG).read_text())
    assert told["run"] == {"seed": 0, "num_seeds": 1}
    before = (tmp_path / "run" / "results.nc").read_bytes()
    with pytest.raises(UserError, match="holds a run already"):
        runs.run(toy.Config(num_train_steps=20), folder=tmp_path / "run", quiet=True)
    with pytest.raises(UserError, match="--resume goes on with --lr"):
        runs.run(toy.Config(num_train_steps=20, lr=0.7), folder=tmp_path / "run", resume=True, quiet=True)
    assert (tmp_path / "run" / "results.nc").read_bytes() == before
    longer = runs.run(toy.Config(num_train_steps=40), folder=tmp_path / "run", resume=True, quiet=True)
    whole = runs.run(toy.Config(num_train_steps=40), quiet=True)
    np.testing.assert_array_equal(longer.score, whole.score)


DRIFT = {"agent_type": "sql", "non_stationary": "drift"}


@pytest.mark.parametrize(
    ("config_class", "settings", "name"),
    [(RLConfig, DRIFT, "transition_steps"), (ContinuousConfig, {}, "capacity")],
)
def test_a_longer_run_is_refused_where_0_would_stand_for_something_else(
    config_class: type, settings: dict, name: str, tmp_path: Path
):
    """All steps of a shorter run are not all steps of a longer one: other sizes of arrays, another drift."""
    run, begun = {"seed": 0, "num_seeds": 1}, config_class(num_train_steps=3000, **settings)
    longer = replace(begun, num_train_steps=6000)
    folder.describe(tmp_path, folder.as_told(begun, run), RunOptions(), False, video=False)
    told = yaml.safe_load((tmp_path / folder.CONFIG).read_text())["config"]
    assert (told[name], told["num_train_steps"]) == (0, 3000)
    folder.check_unchanged(tmp_path, begun, run)
    with pytest.raises(UserError, match=f"--{name} 0 stood for 3000 .* 6000: go on with --{name} 3000, or start"):
        folder.check_unchanged(tmp_path, longer, run)
    given = replace(longer, **{name: 3000})
    folder.check_unchanged(tmp_path, given, run)
    folder.describe(tmp_path, folder.as_told(given, run), RunOptions(), True, video=False)
    folder.check_unchanged(tmp_path, replace(given, num_train_steps=9000), run)
    with pytest.raises(UserError, match=f"--resume goes on with --{name} 3000, got 9000;"):
        folder.check_unchanged(tmp_path, replace(longer, num_train_steps=9000), run)


def test_no_home_and_no_user_name_are_no_reason_to_stop(monkeypatch: pytest.MonkeyPatch):
    from purejax_bilevel.runtime import devices

    def unknown() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(devices.Path, "home", unknown)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    cache = devices.jax.config.jax_compilation_cache_dir
    devices.jax.config.update("jax_compilation_cache_dir", None)
    try:
        devices.prepare()
        assert devices.jax.config.jax_compilation_cache_dir is None
    finally:
        devices.jax.config.update("jax_compilation_cache_dir", cache)


def test_sigterm_before_the_loop_is_an_interrupt_with_its_own_status():
    def work(console: object) -> None:
        os.kill(os.getpid(), 15)

    assert command_line.exit_status(work, []) == 143


def test_cleaning_up_after_a_search_leaves_what_is_not_its_own(tmp_path: Path):
    for name in ("rung-1", "finals-1"):
        (tmp_path / folder.ROUNDS / name).mkdir(parents=True)
        (tmp_path / folder.ROUNDS / name / folder.SCORES).write_text("")
        (tmp_path / folder.ROUNDS / name / checkpoint.FILE_NAME).write_text("")
    note = tmp_path / folder.ROUNDS / "finals-1" / "note.txt"
    note.write_text("mine")
    search.clean(tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [note]
    note.unlink()
    search.clean(tmp_path)
    assert not (tmp_path / folder.ROUNDS).exists()

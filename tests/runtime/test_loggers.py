"""Loggers: what wandb and TensorBoard files hold, read back byte by byte, is every row of every member exactly once."""

import contextlib
import json
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from purejax_bilevel.errors import Interrupted, UserError
from purejax_bilevel.members import Axis, Grid
from purejax_bilevel.runtime import loggers
from purejax_bilevel.runtime.loggers import Loggers

GRID = Grid((Axis(("lr",), ((1e-3,), (3e-4,))),), (0, 5))
STEPS = 1000 * np.arange(1, 7)
MEMBERS = np.arange(len(GRID))
RETURNS = (100 * MEMBERS[:, None] + np.arange(6)).astype(np.float32)
NORMS = np.stack([RETURNS + 0.25, RETURNS + 0.5], axis=-1)
FINALS = {"final_return": RETURNS[:, -2:]}


def rows(start: int, stop: int) -> dict[str, np.ndarray]:
    return {"step": STEPS[start:stop], "return": RETURNS[:, start:stop], "norm": NORMS[:, start:stop]}


@pytest.fixture(scope="module", autouse=True)
def wandb_service() -> Iterator[None]:
    """Ends wandb's background process after this module."""
    yield
    if sys.modules.get("wandb") is not None:
        sys.modules["wandb"].teardown()


def wandb_records(path: Path) -> list:
    """Records of an offline run: LevelDB's log (32 KiB blocks of length-prefixed fragments) of protocol buffers."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, record, found = path.read_bytes(), 7, b"", []
    assert data[:4] == b":W&B"
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        if left < 7 or kind == 0:
            position += left
            continue
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last fragment
            found.append(Record.FromString(record))
            record = b""
    return found


def finished_records(path: Path) -> list:
    """Records of a finished run; wandb's service closes the file a moment after `finish` has returned."""
    for _ in range(200):
        records = wandb_records(path)
        if any(record.WhichOneof("record_type") == "exit" for record in records):
            return records
        time.sleep(0.05)
    raise AssertionError(f"{path.name} has no end")


def wandb_runs(folder: Path) -> dict[str, dict]:
    """Per run name its settings, its rows `[(step, values)]` in the order of the files, and its summary."""
    found: dict[str, dict] = {}
    for path in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
        records = finished_records(path)
        run = next(record.run for record in records if record.WhichOneof("record_type") == "run")
        entry = found.setdefault(run.display_name, {"rows": [], "summary": {}, "ids": set()})
        entry["ids"].add(run.run_id)
        entry["group"] = run.run_group
        entry["config"] = {item.key: json.loads(item.value_json) for item in run.config.update}
        for record in records:
            if record.WhichOneof("record_type") == "history":
                items = {"/".join(item.nested_key) or item.key: item for item in record.history.item}
                values = {name: json.loads(item.value_json) for name, item in items.items()}
                entry["rows"].append((record.history.step.num, {k: v for k, v in values.items() if k[0] != "_"}))
            if record.WhichOneof("record_type") == "summary":
                for item in record.summary.update:
                    name = "/".join(item.nested_key) or item.key
                    entry["summary"][name] = json.loads(item.value_json)
    return found


def tensorboard_rows(folder: Path) -> dict[str, list]:
    """Per run folder `[(step, values)]` of all its event files: length-prefixed protocol buffers."""
    from tensorboardX.proto.event_pb2 import Event

    found: dict[str, list] = {}
    for path in sorted(folder.glob("tensorboard/*/*")):
        data, position = path.read_bytes(), 0
        while position < len(data):
            (length,) = struct.unpack("<Q", data[position : position + 8])
            event = Event.FromString(data[position + 12 : position + 12 + length])
            position += length + 16
            if event.summary.value:
                values = {value.tag: value.simple_value for value in event.summary.value}
                found.setdefault(path.parent.name, []).append((event.step, values))
    return found


def expected_rows(member: int, start: int = 0) -> list:
    return [
        (step, {"return": RETURNS[member, i], "norm/0": NORMS[member, i, 0], "norm/1": NORMS[member, i, 1]})
        for i, step in enumerate(STEPS.tolist())
        if i >= start
    ]


def make(folder: Path, **options) -> Loggers:
    return Loggers(GRID, folder, "capacity", {"lr": [1e-3, 3e-4], "agent_type": "omd"}, **options)


@pytest.fixture(params=["live", "at the end"])
def timing(request, monkeypatch) -> str:
    """Both ways of writing: few runs, and more runs than are kept open."""
    if request.param == "at the end":
        monkeypatch.setattr(loggers, "LIVE_RUNS", 1)
    return request.param


# ---------------------------------------------------------------- wandb


def test_wandb_holds_every_row_of_every_member(tmp_path, timing):
    with make(tmp_path, wandb_mode="offline") as log:
        for start in (0, 2, 4):
            log.log_rows(MEMBERS, rows(start, start + 2))
        log.log_finals(MEMBERS, FINALS)
    runs = wandb_runs(tmp_path)
    assert set(runs) == {GRID.describe(member) for member in MEMBERS}
    for member in MEMBERS:
        run = runs[GRID.describe(member)]
        assert run["rows"] == expected_rows(member)
        assert run["group"] == "capacity"
        assert run["config"].items() >= {**GRID.settings(member), "agent_type": "omd"}.items()
        assert run["summary"]["final_return"] == RETURNS[member, -2:].mean()
        assert len(run["ids"]) == 1


def test_many_runs_written_side_by_side_do_not_mix(tmp_path, monkeypatch):
    monkeypatch.setattr(loggers, "OPEN_RUNS", 8)
    grid = Grid((), tuple(range(40)))
    with Loggers(grid, tmp_path, "many", wandb_mode="offline") as log:
        log.log_rows(range(40), {"step": STEPS[:2], "return": np.arange(80.0).reshape(40, 2)})
    runs = wandb_runs(tmp_path)
    for seed in range(40):
        assert [values["return"] for _, values in runs[f"seed={seed}"]["rows"]] == [2.0 * seed, 2.0 * seed + 1]
        assert runs[f"seed={seed}"]["config"]["seed"] == seed


def test_wandb_runs_of_settings_hold_a_series_per_seed_and_their_iqm(tmp_path):
    with make(tmp_path, wandb_mode="offline", runs="setting") as log:
        log.log_rows(MEMBERS, {"step": STEPS, "return": RETURNS})
        log.log_finals(MEMBERS, FINALS)
    runs = wandb_runs(tmp_path)
    assert set(runs) == {"lr=0.001", "lr=0.0003"}
    second = runs["lr=0.0003"]
    assert [step for step, _ in second["rows"]] == STEPS.tolist()
    assert second["rows"][3][1] == {"return/seed=0": 203.0, "return/seed=5": 303.0, "return/iqm": 253.0}
    assert second["summary"]["final_return/iqm"] == 254.5
    assert "seed" not in second["config"]


def test_every_number_of_a_measure_of_several_dimensions_is_logged(tmp_path):
    values = np.arange(len(GRID) * len(STEPS) * 6.0).reshape(len(GRID), len(STEPS), 2, 3)  # of 2 levels and 3 tasks
    with make(tmp_path, tensorboard=True) as log:
        log.log_rows(MEMBERS, {"step": STEPS, "score": values})
    _, found = min(tensorboard_rows(tmp_path).items())
    logged: dict[int, dict] = {}
    for step, row in found:
        logged.setdefault(step, {}).update(row)
    expected = [{f"score/{i}": value for i, value in enumerate(row.reshape(-1))} for row in values[0]]
    assert logged == dict(zip(STEPS.tolist(), expected, strict=True))


def test_resumed_wandb_runs_have_every_row_once(tmp_path, timing):
    with contextlib.suppress(KeyboardInterrupt), make(tmp_path, wandb_mode="offline") as log:
        log.log_rows(MEMBERS, rows(0, 4))
        raise KeyboardInterrupt
    identifier = json.loads((tmp_path / loggers.STATE_FILE).read_text())["identifier"]
    for _ in range(2):  # the second time there is nothing new
        time.sleep(1.01)  # wandb names folders by second and run
        with make(tmp_path, wandb_mode="offline", resume=True) as log:
            log.log_rows(MEMBERS, rows(0, 3))  # the checkpoint's history
            log.log_rows(MEMBERS, rows(2, 6))  # rows that overlap are dropped
            log.log_finals(MEMBERS, FINALS)
    runs = wandb_runs(tmp_path)
    for member in MEMBERS:
        assert runs[GRID.describe(member)]["rows"] == expected_rows(member)
        assert runs[GRID.describe(member)]["ids"] == {f"{identifier}-{member}"}
    assert len(list(tmp_path.glob("wandb/offline-run-*"))) == len(GRID)


def test_runs_that_are_on_a_server_already_get_new_identifiers(tmp_path):
    with make(tmp_path, wandb_mode="offline", runs="setting") as log:
        log.log_rows(MEMBERS, rows(0, 2))
    (synced,) = tmp_path.glob("wandb/offline-run-*-0/*.wandb")
    synced.with_suffix(".wandb.synced").touch()
    with make(tmp_path, wandb_mode="offline", runs="setting", resume=True) as log:
        log.log_rows(MEMBERS, rows(0, 6))
    found = wandb_runs(tmp_path)["lr=0.001"]
    assert len(found["ids"]) == 2
    assert sorted(step for step, _ in found["rows"]) == sorted([*STEPS[:2], *STEPS])


@pytest.mark.parametrize("sink", [{"wandb_mode": "offline"}, {"tensorboard": True}])
def test_resuming_in_the_middle_is_refused(tmp_path, sink):
    with make(tmp_path, **sink) as log:
        log.log_rows(MEMBERS, rows(0, 2))
    with (
        pytest.raises(ValueError, match="log again from step 1000, not from 3000"),
        make(tmp_path, resume=True, **sink) as log,
    ):
        log.log_rows(MEMBERS, rows(2, 4))


def test_a_new_experiment_in_an_old_folder_starts_new_runs(tmp_path):
    for _ in range(2):
        with make(tmp_path, wandb_mode="offline", runs="setting") as log:
            log.log_rows(MEMBERS, rows(0, 2))
    assert [len(run["ids"]) for run in wandb_runs(tmp_path).values()] == [2, 2]


def test_wandb_online_without_a_key_is_one_sentence(tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(UserError, match="no wandb key: set WANDB_API_KEY"):
        make(tmp_path, wandb_mode="online").__enter__()


@pytest.mark.parametrize(
    ("mode", "project", "environment", "target"),
    [
        (None, None, {}, ("disabled", "purejax_bilevel")),
        (None, None, {"WANDB_MODE": "", "WANDB_PROJECT": ""}, ("disabled", "purejax_bilevel")),
        (None, None, {"WANDB_MODE": "online", "WANDB_PROJECT": "theirs"}, ("online", "theirs")),
        (None, None, {"WANDB_MODE": "dryrun"}, ("offline", "purejax_bilevel")),
        ("offline", None, {"WANDB_MODE": "online", "WANDB_PROJECT": "theirs"}, ("offline", "theirs")),
        ("disabled", "mine", {"WANDB_MODE": "online", "WANDB_PROJECT": "theirs"}, ("disabled", "mine")),
    ],
)
def test_what_is_asked_for_comes_before_the_environment(mode, project, environment, target):
    assert loggers.wandb_target(mode, project, environment) == target


def test_a_wandb_mode_of_the_environment_that_does_not_exist_is_one_sentence():
    with pytest.raises(UserError, match="WANDB_MODE is 'of'; allowed: dryrun, run, disabled, offline, online"):
        loggers.wandb_target(environment={"WANDB_MODE": "of"})


def test_the_environment_names_the_project_and_the_mode(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_PROJECT", "theirs")
    with make(tmp_path, wandb_mode=None, runs="setting") as log:
        log.log_rows(MEMBERS, rows(0, 1))
    (path, _) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    (run,) = [record.run for record in finished_records(path) if record.WhichOneof("record_type") == "run"]
    assert run.project == "theirs"


def test_several_runs_under_a_wandb_agent_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep")
    with pytest.raises(UserError, match="a process is one wandb run, but this experiment has 4"):
        make(tmp_path, wandb_mode="offline")
    assert not make(tmp_path, wandb_mode="disabled").active
    seeds = Grid((), (0, 1))
    assert Loggers(seeds, tmp_path, "one", wandb_mode="offline", runs="setting").active


@pytest.mark.parametrize(("error", "code"), [(None, 0), (OSError, 1), (KeyboardInterrupt, 255), (Interrupted, 255)])
def test_wandb_is_told_how_the_experiment_ended(tmp_path, error, code):
    with (
        contextlib.suppress(OSError, KeyboardInterrupt, Interrupted),
        make(tmp_path, wandb_mode="offline", runs="setting") as log,
    ):
        log.log_rows(MEMBERS, rows(0, 2))
        if error is not None:
            raise error
    for path in tmp_path.glob("wandb/offline-run-*/run-*.wandb"):
        (end,) = [record.exit for record in finished_records(path) if record.WhichOneof("record_type") == "exit"]
        assert end.exit_code == code


def test_more_members_than_live_runs_have_a_live_run_per_setting(tmp_path, monkeypatch):
    monkeypatch.setattr(loggers, "LIVE_RUNS", 2)
    with make(tmp_path, tensorboard=True, wandb_mode="offline") as log:
        log.log_rows(MEMBERS, rows(0, 2))
        log.log_rows(MEMBERS, rows(2, 6))
        assert len(list(tmp_path.glob("wandb/offline-run-*"))) == 2  # those of the settings, already
        log.log_finals(MEMBERS, FINALS)
    runs = wandb_runs(tmp_path)
    names = {f"lr={lr}, IQM of 2 seeds" for lr in (0.001, 0.0003)}
    assert set(runs) == {GRID.describe(member) for member in MEMBERS} | names
    second = runs["lr=0.0003, IQM of 2 seeds"]
    expected = [{"return/iqm": 250.0 + i, "norm/0/iqm": 250.25 + i, "norm/1/iqm": 250.5 + i} for i in range(6)]
    assert second["rows"] == list(zip(STEPS.tolist(), expected, strict=True))
    assert second["summary"]["final_return/iqm"] == 254.5
    assert "seed" not in second["config"]
    for member in MEMBERS:
        assert runs[GRID.describe(member)]["rows"] == expected_rows(member)
    assert len(tensorboard_rows(tmp_path)) == 6


def test_an_interrupted_overview_has_every_row_once_after_a_resume(tmp_path, monkeypatch):
    monkeypatch.setattr(loggers, "LIVE_RUNS", 2)
    with contextlib.suppress(KeyboardInterrupt), make(tmp_path, wandb_mode="offline") as log:
        log.log_rows(MEMBERS, rows(0, 4))
        raise KeyboardInterrupt
    time.sleep(1.01)  # wandb names folders by second and run
    with make(tmp_path, wandb_mode="offline", resume=True) as log:
        log.log_rows(MEMBERS, rows(0, 3))
        log.log_rows(MEMBERS, rows(2, 6))  # rows that overlap are dropped
    steps = [step for step, _ in wandb_runs(tmp_path)["lr=0.001, IQM of 2 seeds"]["rows"]]
    assert steps == STEPS.tolist()


# ---------------------------------------------------------------- TensorBoard


def test_tensorboard_holds_every_row_of_every_member(tmp_path, timing):
    with make(tmp_path, tensorboard=True) as log:
        log.log_rows(MEMBERS, rows(0, 3))
        log.log_rows(MEMBERS, rows(3, 6))
        log.log_finals(MEMBERS, FINALS)
    found = tensorboard_rows(tmp_path)
    assert list(found)[1] == "0001_lr=0.001,seed=5"
    for member, events in zip(MEMBERS, found.values(), strict=True):
        assert events == [*expected_rows(member), (6000, {"final_return": RETURNS[member, -2:].mean()})]


def test_resumed_tensorboard_runs_have_every_row_once(tmp_path, timing):
    with contextlib.suppress(KeyboardInterrupt), make(tmp_path, tensorboard=True) as log:
        log.log_rows(MEMBERS, rows(0, 4))
        raise KeyboardInterrupt
    with make(tmp_path, tensorboard=True, resume=True) as log:
        log.log_rows(MEMBERS, rows(0, 3))
        log.log_rows(MEMBERS, rows(3, 3))  # a chunk without an evaluation
        log.log_rows(MEMBERS, rows(2, 6))  # rows that overlap are dropped
    for member, events in zip(MEMBERS, tensorboard_rows(tmp_path).values(), strict=True):
        assert events == expected_rows(member)


@pytest.mark.parametrize("sink", [{"wandb_mode": "offline"}, {"tensorboard": True}])
def test_a_resumed_run_removes_no_file_that_is_not_its_own(tmp_path, sink):
    with contextlib.suppress(KeyboardInterrupt), make(tmp_path, **sink) as log:
        log.log_rows(MEMBERS, rows(0, 4))
        raise KeyboardInterrupt
    place = next(path for pattern in ("wandb/offline-run-*", "tensorboard/0*") for path in tmp_path.glob(pattern))
    notes = [place / "note.txt", place.parent / "note.txt", place / "files" / "note.txt"]
    for note in notes:
        note.parent.mkdir(exist_ok=True)
        note.write_text("mine")
    time.sleep(1.01)  # wandb names folders by second and run
    with make(tmp_path, **sink, resume=True) as log:
        log.log_rows(MEMBERS, rows(0, 6))
    assert all(note.read_text() == "mine" for note in notes)
    assert len(list(tmp_path.rglob("run-*.wandb")) + list(tmp_path.rglob("events.out.*"))) == len(GRID)


def test_torn_state_starts_anew(tmp_path):
    (tmp_path / loggers.STATE_FILE).write_text('{"identi')
    with make(tmp_path, tensorboard=True, resume=True) as log:
        log.log_rows(MEMBERS, rows(0, 6))
    assert len(tensorboard_rows(tmp_path)) == len(GRID)
    assert json.loads((tmp_path / loggers.STATE_FILE).read_text())["first_step"] == 1000


def test_missing_tensorboard_package_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX.proto.summary_pb2", None)
    with pytest.raises(UserError, match=r"install the extra .*\[tensorboard\]"):
        make(tmp_path, tensorboard=True).__enter__()


# ---------------------------------------------------------------- neither


def test_nothing_is_imported_or_written_by_default(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # an import would raise
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with make(tmp_path / "run") as log:
        assert not log.active
        log.log_rows(MEMBERS, rows(0, 2))
        log.log_finals(MEMBERS, FINALS)
    assert not (tmp_path / "run").exists()


class BrokenSink:
    name = "broken"

    def __init__(self, works: int):
        self.works = works

    def open(self, run):
        return run

    def write(self, handle, steps, columns):
        self.works -= 1
        if self.works < 0:
            raise OSError("no space left")

    def last_step(self, handle):
        return -1

    def finals(self, handle, step, values):
        pass

    def close(self, handle, exit_code):
        pass


def test_a_logger_that_fails_is_switched_off_and_the_others_go_on(tmp_path, timing):
    notes: list[str] = []
    log = make(tmp_path, tensorboard=True, note=notes.append)
    log._make.insert(0, lambda _: BrokenSink(works=5))
    with log:
        for start in (0, 2, 4):
            log.log_rows(MEMBERS, rows(start, start + 2))
    expected = (
        []
        if timing == "at the end"
        else ["broken failed and is switched off (no space left); the results file is complete"]
    )
    assert notes == expected
    for member, events in zip(MEMBERS, tensorboard_rows(tmp_path).values(), strict=True):
        assert events == expected_rows(member)


def test_a_logger_that_never_worked_is_an_error(tmp_path, monkeypatch):
    log = make(tmp_path, note=print)
    log._make.append(lambda _: BrokenSink(works=0))
    monkeypatch.setattr(BrokenSink, "open", lambda *_: BrokenSink.write(BrokenSink(0), 0, 0, 0))
    with pytest.raises(OSError, match="no space left"), log:
        log.log_rows(MEMBERS, rows(0, 2))


def test_label_starts_the_name_of_every_run(tmp_path):
    with make(tmp_path, tensorboard=True, label="agent_type=omd", runs="setting") as log:
        log.log_rows(MEMBERS, rows(0, 1))
    assert list(tensorboard_rows(tmp_path)) == ["0000_agent_type=omd,lr=0.001", "0001_agent_type=omd,lr=0.0003"]


def test_bad_options_are_named():
    with pytest.raises(UserError, match="wandb_mode is 'on'; allowed: disabled, offline, online"):
        make(Path(), wandb_mode="on")
    with pytest.raises(UserError, match="wandb_runs is 'seed'; allowed: member, setting"):
        make(Path(), runs="seed")


def test_rows_of_the_wrong_shape_are_refused(tmp_path):
    with make(tmp_path, tensorboard=True) as log, pytest.raises(ValueError, match=r"return has shape \(4, 6\)"):
        log.log_rows(MEMBERS[:2], {"step": STEPS, "return": RETURNS})

"""Several processes: who they are, how they meet, agree and stop, and that they give the numbers of one process."""

import contextlib
import dataclasses
import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import yaml
from jax._src.lib import _jax

import train_rl
from purejax_bilevel.errors import UserError
from purejax_bilevel.results import dataset as datasets
from purejax_bilevel.runtime import checkpoint, devices, loop, meeting, processes, schedulers
from purejax_bilevel.runtime.schedulers import ProcessPlace
from purejax_bilevel.studies import command_line, sweep_command
from purejax_bilevel.studies import run as runs

ROOT = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).parent / "processes_worker.py"
SECONDS = 500  # after which a process counts as hanging; a busy machine takes minutes to start one
SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "gpu[07-08,11],login",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_NTASKS": "8",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_MCA_orte_hnp_uri": "3674406912.0;tcp://10.0.0.1,10.1.0.1:36789",
}


def free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


# ---------------------------------------------------------------- who started this process


def test_slurm_says_who_is_who():
    place = schedulers.started_by(SLURM)
    assert place == ProcessPlace(place.coordinator, 8, 5, (1,))
    assert re.fullmatch(r"gpu07:6[1-5]\d{3}", place.coordinator)
    assert schedulers.started_by(SLURM | {"SLURM_PROCID": "0"}).coordinator == place.coordinator
    assert schedulers.started_by(SLURM | {"SLURM_STEP_ID": "1"}).coordinator != place.coordinator
    for nodes, first in (("alone", "alone"), ("a1,b[2-3]", "a1"), ("n[1-3]-ib,m", "n1-ib"), ("x[001,007]", "x001")):
        assert schedulers.started_by(SLURM | {"SLURM_STEP_NODELIST": nodes}).coordinator.startswith(f"{first}:"), nodes
    named = schedulers.started_by(SLURM | {"JAX_COORDINATOR_ADDRESS": "n1:5"})
    assert named.coordinator == "n1:5"


@pytest.mark.parametrize(
    "changes",
    [
        {"SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NUM_NODES": "8"},  # alone on its host
        {"CUDA_VISIBLE_DEVICES": "0"},  # bound to its own by Slurm
        {"JAX_LOCAL_DEVICE_IDS": "2,3"},  # which jax reads
    ],
)
def test_a_process_takes_all_accelerators_that_are_its_own(changes):
    assert schedulers.started_by(SLURM | {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}).accelerators == (1,)
    assert schedulers.started_by(SLURM | changes).accelerators is None


@pytest.mark.parametrize(
    "environment",
    [
        {},
        SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},  # an interactive step keeps the allocation's NTASKS
        {name: value for name, value in SLURM.items() if "STEP" not in name},  # a batch script
        OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "1"},
    ],
)
def test_a_single_task_waits_for_nobody(environment):
    assert schedulers.started_by(environment) is None


def test_open_mpi_says_who_is_who():
    place = schedulers.started_by(SLURM | OPEN_MPI)  # mpirun within a Slurm job
    assert place == ProcessPlace(place.coordinator, 4, 3, (1,))
    assert re.fullmatch(r"10\.0\.0\.1:6[1-5]\d{3}", place.coordinator)
    version_5 = {name: value for name, value in OPEN_MPI.items() if "orte" not in name} | {"PMIX_NAMESPACE": "p-1@1"}
    local = schedulers.started_by(version_5 | {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"})
    assert local.coordinator.startswith("localhost:")
    with pytest.raises(UserError, match="does not say where the first one is: set JAX_COORDINATOR_ADDRESS"):
        schedulers.started_by(version_5)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--coordinator a:1", "belong together: give all or none"),
        ("--num_processes 2 --process-id=1", "belong together: give all or none"),
        ("--coordinator a --num_processes 2 --process_id 0", "--coordinator must be host:port"),
        ("--coordinator :1 --num_processes 2 --process_id 0", "--coordinator must be host:port"),
        ("--coordinator a:70000 --num_processes 2 --process_id 0", "--coordinator must be host:port"),
        ("--coordinator a:1 --num_processes 0 --process_id 0", "--num_processes must be at least 1, got 0"),
        ("--coordinator a:1 --num_processes 2 --process_id 2", "--process_id must be from 0 to 1"),
        ("--coordinator a:1 --num_processes 2 --process_id -1", "--process_id must be from 0 to 1"),
    ],
)
def test_wrong_places_get_one_sentence(words, sentence, capsys):
    assert sweep_command.main(["omd_capacity", *words.split()]) == 2
    assert command_line.main(train_rl.configuration, "", words.split()) == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2
    assert all(line.startswith("error: ") and sentence in line for line in told)


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        (SLURM | {"SLURM_STEP_NUM_TASKS": "many"}, "SLURM_STEP_NUM_TASKS must be a whole number of at least 1, got 'm"),
        (SLURM | {"SLURM_PROCID": "-1"}, "SLURM_PROCID must be a whole number from 0 to 7, got '-1'"),
        (SLURM | {"SLURM_PROCID": "8"}, "SLURM_PROCID must be a whole number from 0 to 7, got '8'"),
        (SLURM | {"SLURM_LOCALID": ""}, "SLURM_LOCALID must be a whole number of at least 0, got ''"),
        (OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "4.0"}, "OMPI_COMM_WORLD_SIZE must be"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "OMPI_COMM_WORLD_LOCAL_SIZE must be"),
        (OPEN_MPI | {"OMPI_COMM_WORLD_RANK": "4"}, "OMPI_COMM_WORLD_RANK must be a whole number from 0 to 3, got '4'"),
    ],
)
def test_wrong_variables_of_a_scheduler_are_named(environment, sentence):
    with pytest.raises(UserError, match=sentence):
        schedulers.started_by(environment)


# ---------------------------------------------------------------- meeting


def meet(monkeypatch, seconds: float, *places: ProcessPlace) -> list[str]:
    """What each process is told when all start at once; "" for those that may go on."""
    monkeypatch.setattr(meeting, "JOIN_SECONDS", seconds)

    def attempt(place: ProcessPlace) -> str:
        try:
            meeting.meet(place)
        except UserError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(len(places)) as pool:
        return list(pool.map(attempt, places))


def test_processes_meet(monkeypatch):
    address = f"localhost:{free_port()}"
    assert meet(monkeypatch, 30, *(ProcessPlace(address, 3, i) for i in (2, 1, 0))) == ["", "", ""]


def test_strangers_at_the_port_are_ignored(monkeypatch):
    port = free_port()

    def knock() -> None:
        for content in (b"GET / HTTP/1.1\r\n\r\n", b"", b"[1]\n", b'{"process_id": 1}\n'):
            with contextlib.suppress(OSError), socket.create_connection(("localhost", port)) as connection:
                connection.sendall(content)

    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(meet, monkeypatch, 30, ProcessPlace(f"localhost:{port}", 2, 0))
        time.sleep(0.3)
        knock()
        assert meet(monkeypatch, 30, ProcessPlace(f"localhost:{port}", 2, 1)) == [""]
        assert first.result() == [""]


def test_who_is_missing_is_named(monkeypatch):
    address = f"localhost:{free_port()}"
    told = meet(monkeypatch, 1, ProcessPlace(address, 4, 0), ProcessPlace(address, 4, 2))
    assert set(told) == {f"of 4 processes 2 came to {address} within 1 s; process 1, 3 did not."}


def test_an_unreachable_coordinator_is_named(monkeypatch):
    address = f"localhost:{free_port()}"
    (told,) = meet(monkeypatch, 1, ProcessPlace(address, 2, 1))
    assert told.startswith(f"process 1 cannot reach process 0 at {address} within 1 s (")


@pytest.mark.parametrize(
    ("others", "sentence"),
    [
        ([(2, 1)], "process 1 was told --num_processes 2, process 0 3; it must be the same."),
        ([(3, 1), (3, 1)], "two processes were told --process_id 1; each needs its own."),
    ],
)
def test_processes_that_do_not_belong_together_are_told(monkeypatch, others, sentence):
    address = f"localhost:{free_port()}"
    told = meet(monkeypatch, 2, ProcessPlace(address, 3, 0), *(ProcessPlace(address, *other) for other in others))
    assert sentence in told[0]
    assert sentence in told[1:]


def test_only_the_coordinators_address_is_listened_at(monkeypatch):
    for host in ("localhost", "127.0.0.1", "127.0.0.2"):
        with meeting._listen(ProcessPlace(f"{host}:{free_port()}", 2, 0)) as server:
            assert meeting._means_loopback(server.getsockname()[0]), host
    answers = {"own": "127.0.1.1", "proxy": "192.0.2.1"}  # as in Debian's /etc/hosts; an address of nobody
    look_up = lambda name, *_, **__: [(socket.AF_INET, socket.SOCK_STREAM, 0, "", (answers[name], 0))]  # noqa: E731
    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    assert [meeting.bind_address(ProcessPlace(f"{name}:7", 2, 0)) for name in answers] == ["[::]:7", "[::]:7"]
    monkeypatch.setattr(meeting, "_means_loopback", lambda name: False)
    assert meeting.bind_address(ProcessPlace("own:7", 2, 0)) == "127.0.1.1:7"


def test_who_does_not_know_the_token_cannot_join(monkeypatch):
    address = f"localhost:{free_port()}"
    script = (
        "from purejax_bilevel.runtime import meeting, schedulers\n"
        "meeting.JOIN_SECONDS = 60\n"
        "try:\n"
        f"    meeting.meet(schedulers.ProcessPlace({address!r}, 2, 1))\n"
        "except ValueError as error:\n"
        "    print(error)"
    )

    def other(token: str) -> str:
        environment = os.environ | {meeting.TOKEN: token}
        found = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, env=environment
        )
        return found.stdout

    monkeypatch.setenv(meeting.TOKEN, "of all")
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(meet, monkeypatch, 60, ProcessPlace(address, 2, 0))
        told = "process 0 does not know this process: PUREJAX_BILEVEL_JOIN_TOKEN must be the same for all.\n"
        assert other("of nobody") == told
        assert other("of all") == ""
        assert first.result() == [""]


def test_a_taken_port_is_named(monkeypatch):
    with socket.create_server(("", 0)) as server:
        (told,) = meet(monkeypatch, 1, ProcessPlace(f"localhost:{server.getsockname()[1]}", 2, 0))
    assert "process 0 cannot listen at localhost:" in told


# ---------------------------------------------------------------- agreeing, through jax's own store


@pytest.fixture
def three(monkeypatch) -> Iterator[Callable[..., list[Any]]]:
    """Runs a function in three threads that stand for three processes; returns what each returned or raised."""
    port, here, size = free_port(), threading.local(), 3
    service = _jax.get_distributed_runtime_service(f"[::]:{port}", size)
    clients = [_jax.get_distributed_runtime_client(f"localhost:{port}", i, init_timeout=20) for i in range(size)]
    monkeypatch.setattr(processes, "count", lambda: size)
    monkeypatch.setattr(processes, "index", lambda: here.index)
    monkeypatch.setattr(processes, "_store", lambda: clients[here.index])
    monkeypatch.setattr(processes, "_numbers", _OwnNumbers(here))

    def attempt(index: int, function: Callable[[int], Any]) -> Any:
        here.index, here.number = index, 0
        try:
            return function(index)
        except Exception as error:
            return error

    with ThreadPoolExecutor(size) as pool:

        def run(function: Callable[[int], Any]) -> list[Any]:
            tasks = [pool.submit(attempt, index, function) for index in range(size)]
            if wait(tasks, SECONDS).not_done:
                clients[0].key_value_set(f"{processes.STORE}/stopped/0", "this test took too long")
            return [task.result() for task in tasks]

        run(lambda i: clients[i].connect())
        yield run
        run(lambda i: clients[i].shutdown())
    service.shutdown()


@dataclasses.dataclass
class _OwnNumbers:
    """The counter of exchanges, one per thread."""

    here: threading.local

    def __next__(self) -> int:
        self.here.number += 1
        return self.here.number


def test_all_agree(three):
    def work(index: int) -> Any:
        flags = [processes.any_of(flag) for flag in (False, index == 2, True)]
        own = {"x": np.full((index, 2), index, np.float32), "y": [np.arange(3) > index]}
        whole = processes.everywhere(own)
        called = []
        values = processes.from_first(lambda: called.append(index) or {"seconds": 0.1 + 0.2, "path": None})
        return flags, whole["x"].tolist(), whole["y"][0].tolist(), str(whole["x"].dtype), values, called

    told = three(work)
    x, y = [[1, 1], [2, 2], [2, 2]], [False, True, True, False, False, True, False, False, False]
    values = {"seconds": 0.1 + 0.2, "path": None}
    for index, found in enumerate(told):
        assert found == ([False, True, True], x, y, "float32", values, [0] if index == 0 else [])


def test_one_that_fails_stops_all_and_says_why(three):
    def work(index: int) -> None:
        with processes.together():
            processes.any_of(False)
            if index == 1:
                raise UserError("the disk is full.")
            processes.any_of(False)

    told = three(work)
    assert [str(error) for error in told] == [
        "process 1 has stopped: the disk is full.",
        "the disk is full.",
        "process 1 has stopped: the disk is full.",
    ]
    assert three(lambda i: processes.should_tell(told[i])) == [True, True, False]


def test_the_same_error_in_all_is_told_once(three):
    def work(index: int) -> None:
        with processes.together():
            time.sleep(0.3 * (2 - index))  # process 0 is the last
            raise UserError("--lr must be positive.")

    told = three(work)
    assert three(lambda i: processes.should_tell(told[i])) == [True, False, False]


def test_nobody_leaves_before_process_0_is_done(three):
    ended = {}

    def work(index: int) -> None:
        with processes.together():
            if index == 0:
                time.sleep(1)
                ended["first"] = time.monotonic()
        ended[index] = time.monotonic()

    three(work)
    assert min(ended[1], ended[2]) >= ended["first"]


def test_folders_that_are_not_shared_are_refused(three, tmp_path):
    def work(index: int) -> None:
        with processes.together():
            checkpoint.begin(tmp_path / f"{index // 2}" / checkpoint.FILE_NAME)

    told = three(work)
    assert str(told[0]).startswith(f"what process 2 writes to {tmp_path / '0'} is not there for process 0")
    assert [str(error) for error in told[1:]] == [f"process 0 has stopped: {told[0]}"] * 2


def test_shards_are_merged_and_strays_deleted(three, tmp_path):
    path = tmp_path / checkpoint.FILE_NAME
    for stray in ("checkpoint.40.0.npz", "checkpoint.40.7.npz", ".checkpoint.40.1.npz.x1y2.part", "results.nc"):
        (tmp_path / stray).write_bytes(b"torn")

    def work(index: int) -> None:
        checkpoint.begin(path)
        members = np.arange(2 * index, 2 * index + (0 if index == 2 else 2))  # process 2 has padding only
        rows = {"score": np.repeat(members[:, None], 3, axis=1).astype(np.float32)}
        saved = checkpoint.Checkpoint(8, [{"walk": 10 * members}], [rows], [members == 3], (1.0, 2.0))
        checkpoint.save(path, saved, {"seeds": [0, 1, 2, 3]})

    assert three(work) == [None, None, None]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["checkpoint.npz", "results.nc"]
    structure = [{"walk": jax.ShapeDtypeStruct((4,), np.dtype(int))}]
    loaded = checkpoint.load(path, structure, {"seeds": [0, 1, 2, 3]})
    assert loaded.steps == 8
    assert loaded.state[0]["walk"].tolist() == [0, 10, 20, 30]
    assert loaded.rows[0]["score"].tolist() == [[i] * 3 for i in range(4)]
    assert loaded.failed[0].tolist() == [False, False, False, True]


# ---------------------------------------------------------------- devices of several processes


@dataclasses.dataclass(frozen=True)
class Device:
    process_index: int
    platform: str = "cpu"


@pytest.mark.parametrize(
    ("members", "asked", "own"),
    [(99, None, [3, 3]), (99, 4, [2, 2]), (99, 2, [1, 1]), (3, None, [2, 2]), (1, None, [1, 1]), (5, 6, [3, 3])],
)
def test_every_process_has_its_share_of_the_mesh(monkeypatch, members, asked, own):
    monkeypatch.setattr(jax, "devices", lambda: [Device(i) for i in (0, 1, 0, 1, 0, 1)])
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(devices, "Mesh", lambda array, axes: array)
    mesh = devices.make_mesh(members, asked)
    assert [device.process_index for device in mesh.flat] == [0] * own[0] + [1] * own[1]
    assert mesh.shape[1] == 1


def test_a_population_stays_within_a_process(monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: [Device(i) for i in (0, 1, 0, 1, 0, 1)])
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(devices, "Mesh", lambda array, axes: array)
    mesh = devices.make_mesh(1, population=6)
    assert [[device.process_index for device in row] for row in mesh] == [[0] * 3, [1] * 3]


@pytest.mark.parametrize("asked", [1, 3, 8, 9])
def test_devices_that_cannot_be_shared_are_refused(monkeypatch, asked):
    monkeypatch.setattr(jax, "devices", lambda: [Device(i) for i in (0, 0, 0, 0, 0, 1, 1, 1)])
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match="--devices"):
        devices.make_mesh(99, asked)


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 4),
        ({"job/step/cpu.max": "max 100000"}, 4),
        ({"job/step/cpu.max": "150000 100000"}, 2),
        ({"job/cpu.max": "100000 100000", "job/step/cpu.max": "max 100000"}, 1),
        ({"cpu.max": "10000 100000"}, 1),
        ({"cpu/slice/cpu.cfs_quota_us": "300000", "cpu/slice/cpu.cfs_period_us": "100000"}, 3),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 4),
    ],
)
def test_quotas_of_control_groups_limit_the_host_devices(files, cores, tmp_path, monkeypatch):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "own").write_text("2:cpu,cpuacct:/slice\n0::/job/step\n")
    (tmp_path / "cpu").mkdir(exist_ok=True)
    monkeypatch.setattr(devices, "GROUPS", tmp_path)
    monkeypatch.setattr(devices, "OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    assert devices.usable_cores() == cores


@pytest.mark.parametrize("platform", ["tpux", "cuda"])
def test_a_platform_that_is_not_here_is_named(platform):
    if platform == "cuda" and importlib.util.find_spec("jax_cuda12_plugin"):
        pytest.skip("the plug-in for GPUs is installed")
    words = [sys.executable, "train_rl.py", "--num_train_steps", "10"]
    environment = os.environ | {"JAX_PLATFORMS": platform}
    found = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert found.returncode == 2
    assert found.stderr.startswith(f"error: jax finds no device for JAX_PLATFORMS={platform} (")
    assert len(found.stderr.splitlines()) == 1


# ---------------------------------------------------------------- two processes on this machine


@contextlib.contextmanager
def started(script: Path, words: Sequence[str], settings: dict[str, Any] | None = None) -> Iterator[list]:
    """Two processes with two devices each; killed at the end, whatever happens."""
    flags = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "OMPI_"))}
    environment["XLA_FLAGS"] = " ".join([*flags, "--xla_force_host_platform_device_count=2"])
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    port = free_port()
    running = []
    try:
        for i in range(2):
            place = ["--coordinator", f"localhost:{port}", "--num_processes", "2", "--process_id", str(i)]
            first = [] if settings is None else [json.dumps(settings)]
            command = [sys.executable, str(script), *first, *words, *place]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            running.append(subprocess.Popen(command, env=environment, cwd=ROOT, **pipes))
        yield running
    finally:
        for process in running:
            process.kill()
            process.communicate()


def ended(running: list) -> tuple[list[int], list[str]]:
    """Exit status and everything printed, of each."""
    with ThreadPoolExecutor(len(running)) as pool:
        told = list(pool.map(lambda process: "".join(process.communicate(timeout=SECONDS)), running))
    return [process.returncode for process in running], told


def same(first: Path, second: Path) -> None:
    found, expected = datasets.load(first), datasets.load(second)
    assert set(found.data_vars) == set(expected.data_vars)
    for name in expected.data_vars:
        np.testing.assert_array_equal(found[name].values, expected[name].values, err_msg=str(name))


def test_the_script_gives_the_numbers_of_one_process(tmp_path):
    words = (
        "--agent_type sql --num_train_steps 60 --init_steps 16 --batch_size 16 --eval_frequency 20 --eval_episodes 1 "
        f"--final_eval_episodes 2 --hidden_dim 4 --capacity 32 --num_seeds 5 --output_dir {tmp_path} --name"
    ).split()
    with started(ROOT / "train_rl.py", [*words, "two"]) as running:
        status, told = ended(running)
    assert status == [0, 0], told
    assert "Results, figures and checkpoint" in told[0]
    assert told[1] == ""
    assert command_line.main(train_rl.configuration, "", [*words, "one", "--quiet"]) == 0
    same(tmp_path / "two", tmp_path / "one")
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == sorted(
        path.name for path in (tmp_path / "one").iterdir()
    )


TOY = {"program": "toy", "agents": ["left", "right"], "axes": [{"grid": {"lr": [0.001, 0.01, 0.1]}}], "seeds": 3}


def toy_words(folder: Path, name: str, *more: str) -> list[str]:
    (folder / "toy.yaml").write_text(yaml.safe_dump(TOY))
    return [str(folder / "toy.yaml"), "--output_dir", str(folder), "--name", name, *more]


def same_sweep(first: Path, second: Path) -> None:
    for label in ("left", "right"):
        same(first / label, second / label)


@pytest.mark.slow  # as a script does: above
def test_a_search_gives_the_numbers_of_one_process(toy, tmp_path):
    """And `run` from Python, where all processes get the whole."""
    words = ("--halving", "1")  # evolution goes through the same rounds
    with started(WORKER, toy_words(tmp_path, "two", *words), {"python": str(tmp_path / "python")}) as running:
        status, told = ended(running)
    assert status == [0, 0], told
    assert "Report: " in told[0]
    assert told[1] == ""
    assert sweep_command.main(toy_words(tmp_path, "one", *words, "--quiet")) == 0
    same_sweep(tmp_path / "two", tmp_path / "one")
    whole = runs.run(toy(lr=(0.1, 0.01)), num_seeds=3, quiet=True).score.values
    for i in range(2):
        np.testing.assert_array_equal(np.load(tmp_path / f"python.{i}.npy"), whole)


def wait_for_steps(folder: Path, least: int, running: list) -> int:
    """Until a checkpoint has done so many steps."""
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        assert all(process.poll() is None for process in running), ended(running)
        if (folder / checkpoint.FILE_NAME).exists() and (done := loop.steps_done(folder)) >= least:
            return done
        time.sleep(0.02)
    raise TimeoutError(f"no checkpoint of {least} steps in {folder}")


@pytest.mark.slow
def test_stopped_and_killed_processes_go_on_as_two_or_one(toy, tmp_path):
    total = 20_000
    steps = [f"num_train_steps={total}", "eval_frequency=2000"]
    settings = {"CHECKPOINT_SECONDS": 0.0, "HEARTBEAT_SECONDS": 10}
    folder, small = tmp_path / "two", ["--chunks", "2000"]
    assert sweep_command.main(toy_words(tmp_path, "one", *steps, "--quiet")) == 0

    with started(WORKER, toy_words(tmp_path, "two", *steps, *small), settings) as running:
        wait_for_steps(folder, 20, running)
        running[1].send_signal(signal.SIGINT)
        status, told = ended(running)
    assert status == [130, 130], told
    assert f"go on with --resume {folder}" in told[0]
    assert told[1] == ""
    stopped_at = loop.steps_done(folder)
    assert 20 <= stopped_at < total

    with started(WORKER, ["--resume", str(folder), *small], settings) as running:
        wait_for_steps(folder, stopped_at + 20, running)
        running[1].kill()
        status, told = ended(running)  # process 0 does not wait for ever
    assert status[1] == -signal.SIGKILL
    assert status[0] not in (0, None)
    killed_at = loop.steps_done(folder)
    assert stopped_at < killed_at < total
    (folder / f"checkpoint.{killed_at + 10}.1.npz").write_bytes(b"half of a shard")

    assert sweep_command.main(["--resume", str(folder), "--quiet", "--devices", "3"]) == 0
    same_sweep(folder, tmp_path / "one")  # all steps count, also those of two processes
    assert [path.name for path in folder.glob("*checkpoint*")] == [checkpoint.FILE_NAME]

"""setup/run with stand-ins for uv and nvidia-smi: what it installs, when it installs again, and what it refuses.

Nothing is downloaded: the stand-in for uv writes down its arguments and links this Python into the new environment.
"""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
UV = """#!/usr/bin/env bash
echo "$*" >>"$STAND_INS/calls"
[[ "$1" == --version ]] && exit 0
if [[ "$1" == venv ]]; then
  mkdir -p "${!#}/bin" && touch "${!#}/pyvenv.cfg" && ln -sf "$REAL_PYTHON" "${!#}/bin/python"
  exit
fi
[[ -e "$STAND_INS/slow" ]] && sleep 0.3
[[ ! -e "$STAND_INS/fail" ]]
"""
PYTHON = """#!/usr/bin/env bash
if [[ "$1 $2 $3" == "-m pip config" ]]; then
  cat "$STAND_INS/pip-settings" 2>/dev/null
elif [[ "$1 $2" == "-m pip" ]]; then
  echo "${*:2}" >>"$STAND_INS/calls"
  if [[ "${!#}" == uv==* ]]; then cp "$STAND_INS/fetched-uv" "$(dirname "$0")/uv"; fi
elif [[ "$1 $2" == "-m venv" ]]; then
  mkdir -p "$3/bin" && touch "$3/pyvenv.cfg"
  [[ ! -e "$STAND_INS/fail" ]] && cp "$0" "$3/bin/python"
else
  exec "$REAL_PYTHON" "$@"
fi
"""


class Repository:
    """A copy of what setup/run reads, in a folder with a space, and the stand-ins on PATH before everything else."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "a repository"
        self.stand_ins = folder / "stand-ins"
        self.stand_ins.mkdir()
        (self.root / "setup").mkdir(parents=True)
        for file in [ROOT / "setup" / "run", *ROOT.glob("setup/requirements-*.txt")]:
            shutil.copy2(file, self.root / "setup")
        shutil.copy2(ROOT / "pyproject.toml", self.root)
        self.program("uv", UV)
        self.program("nvidia-smi", "#!/bin/sh\nexit 9\n")

    def program(self, name: str, text: str) -> None:
        (self.stand_ins / name).write_text(text)
        (self.stand_ins / name).chmod(0o755)

    def run(self, *command: str, directory: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PUREJAX_BILEVEL_", "JAX_"))}
        kept["PATH"] = f"{self.stand_ins}:{kept['PATH']}"
        kept |= {"STAND_INS": str(self.stand_ins), "REAL_PYTHON": sys.executable, "PUREJAX_BILEVEL_DEVICE": "cpu"}
        return subprocess.run(
            [str(self.root / "setup" / "run"), *command],
            cwd=directory or self.root,
            env={name: value for name, value in (kept | environment).items() if value},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def installs(self) -> list[str]:
        """The package installations since the last call of this method, without the one of the project itself."""
        calls = self.stand_ins / "calls"
        lines = calls.read_text().splitlines() if calls.exists() else []
        calls.unlink(missing_ok=True)
        return [line for line in lines if line.startswith("pip install") and "--editable" not in line]


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return Repository(tmp_path)


def without_driver() -> bool:
    return not Path("/proc/driver/nvidia/version").exists()


def test_no_command_prints_the_usage(repository: Repository) -> None:
    result = repository.run()
    assert result.returncode == 2
    assert "usage: ./setup/run <command>" in result.stderr
    assert not (repository.root / ".venv").exists()


@pytest.mark.parametrize(
    ("variable", "value", "allowed"),
    [
        ("PUREJAX_BILEVEL_DEVICE", "tpu", "only cpu and gpu are allowed"),
        ("PUREJAX_BILEVEL_EXTRAS", "brax atari", "only brax is allowed"),
        ("PUREJAX_BILEVEL_PYTHON", "python9", "a Python from 3.11 to 3.13"),
    ],
)
def test_a_wrong_setting_is_refused_in_one_sentence(
    repository: Repository, variable: str, value: str, allowed: str
) -> None:
    result = repository.run("true", **{variable: value})
    assert result.returncode == 2
    (sentence,) = [line for line in result.stderr.splitlines() if "once; this can take" not in line]
    assert variable in sentence
    assert value.split()[-1] in sentence
    assert allowed in sentence
    assert not (repository.root / ".venv").exists()


def test_first_call_installs_and_second_starts_at_once(repository: Repository, tmp_path: Path) -> None:
    command = ["python", "-c", "import os; print(os.getcwd(), os.environ['VIRTUAL_ENV'])"]
    first = repository.run(*command, directory=tmp_path)
    (install,) = repository.installs()
    assert [f"requirements-{name}.txt" in install for name in ("base", "test", "cpu", "gpu", "brax")] == [
        True,
        True,
        True,
        False,
        False,
    ]
    second = repository.run(*command, directory=tmp_path)
    assert first.stdout == second.stdout == f"{repository.root} {repository.root / '.venv'}\n"
    assert second.stderr == ""
    assert repository.installs() == []


def test_the_command_keeps_its_arguments_and_exit_status(repository: Repository) -> None:
    result = repository.run("bash", "-c", 'printf "<%s>" "$@"; exit 7', "name", "a b", "", "*")
    assert result.returncode == 7
    assert result.stdout == "<a b><><*>"


@pytest.mark.skipif(not without_driver(), reason="a real driver is found before nvidia-smi is asked")
@pytest.mark.parametrize(("answer", "device"), [("GPU 0: a card", "gpu"), ("no devices were found", "cpu")])
def test_the_driver_chooses_the_device(repository: Repository, answer: str, device: str) -> None:
    repository.program("nvidia-smi", f"#!/bin/sh\necho '{answer}'\n")
    repository.run("true", PUREJAX_BILEVEL_DEVICE="")
    (install,) = repository.installs()
    assert f"requirements-{device}.txt" in install


def test_a_gpu_environment_also_serves_a_machine_without_gpu(repository: Repository) -> None:
    platform = ["bash", "-c", "echo ${JAX_PLATFORMS-unset}"]
    assert repository.run(*platform, PUREJAX_BILEVEL_DEVICE="gpu").stdout == "unset\n"
    assert repository.run(*platform).stdout == "cpu\n"
    assert len(repository.installs()) == 1


def test_parts_are_added_and_stay(repository: Repository) -> None:
    repository.run("true")
    repository.run("true", PUREJAX_BILEVEL_EXTRAS="brax")
    repository.run("true", PUREJAX_BILEVEL_DEVICE="gpu")
    _, second, third = repository.installs()
    assert "requirements-cpu.txt" in second
    assert "requirements-brax.txt" in second
    assert "requirements-cpu.txt" not in third
    assert "requirements-gpu.txt" in third
    assert "requirements-brax.txt" in third


@pytest.mark.parametrize("file", ["pyproject.toml", "setup/requirements-test.txt"])
def test_a_changed_requirement_installs_again(repository: Repository, file: str) -> None:
    repository.run("true")
    with (repository.root / file).open("a") as stream:
        stream.write("# changed\n")
    repository.run("true")
    assert len(repository.installs()) == 2


def test_a_failed_installation_runs_nothing_and_is_tried_again(repository: Repository) -> None:
    (repository.stand_ins / "fail").touch()
    result = repository.run("echo", "started")
    assert (result.returncode, result.stdout) == (1, "")
    assert "installation failed" in result.stderr
    (repository.stand_ins / "fail").unlink()
    (repository.root / ".venv" / "installed before").touch()
    assert repository.run("echo", "started").stdout == "started\n"
    assert (repository.root / ".venv" / "installed before").exists()
    assert len(repository.installs()) == 2


def test_an_interrupted_installation_starts_anew(repository: Repository) -> None:
    repository.run("true")
    environment = repository.root / ".venv"
    (environment / ".purejax_bilevel").rename(environment / ".purejax_bilevel.unfinished")
    (environment / "half a package").touch()
    assert repository.run("true").returncode == 0
    assert not (environment / "half a package").exists()
    assert len(repository.installs()) == 2


def test_a_moved_repository_gets_a_new_environment(repository: Repository) -> None:
    repository.run("true")
    (repository.root / ".venv" / "old").touch()
    repository.root = repository.root.rename(repository.root.parent / "moved")
    assert repository.run("true").returncode == 0
    assert len(repository.installs()) == 2
    assert not (repository.root / ".venv" / "old").exists()


def test_without_uv_venv_and_pip_do_it(repository: Repository) -> None:
    repository.program("uv", "#!/bin/sh\nexit 127\n")  # as a version manager's stand-in for a missing uv
    repository.program("my-python", PYTHON)
    (repository.stand_ins / "fail").touch()
    result = repository.run("true", PUREJAX_BILEVEL_PYTHON="my-python")
    assert result.returncode == 1
    assert "install Python's venv module" in result.stderr
    (repository.stand_ins / "fail").unlink()
    # What the failed venv left is not taken for an environment.
    result = repository.run("python", "-c", "print(1 + 1)", PUREJAX_BILEVEL_PYTHON="my-python")
    assert result.stdout == "2\n"
    fetching, install = repository.installs()
    assert "--no-deps uv==" in fetching  # in vain
    assert "requirements-base.txt" in install
    assert "--no-compile" in install


@pytest.mark.parametrize(("setting", "fetched"), [("", True), ("global.index-url='https://own'", False)])
def test_pip_fetches_uv_unless_it_has_an_index_of_its_own(repository: Repository, setting: str, fetched: bool) -> None:
    repository.program("uv", "#!/bin/sh\nexit 127\n")
    repository.program("my-python", PYTHON)
    repository.program("fetched-uv", UV)
    (repository.stand_ins / "pip-settings").write_text(setting)
    assert repository.run("true", PUREJAX_BILEVEL_PYTHON="my-python").returncode == 0
    *fetching, install = repository.installs()
    assert len(fetching) == int(fetched)
    assert ("--no-compile" in install) is not fetched  # that is pip


def test_pip_installs_where_a_fetched_uv_cannot(repository: Repository) -> None:
    repository.program("uv", "#!/bin/sh\nexit 127\n")
    repository.program("my-python", PYTHON)
    repository.program("fetched-uv", '#!/bin/sh\n[ "$1" = --version ]\n')
    result = repository.run("true", PUREJAX_BILEVEL_PYTHON="my-python")
    assert result.returncode == 0, result.stderr
    assert "--no-compile" in repository.installs()[-1]


def test_modules_are_compiled_where_python_may_not_write_them_later(repository: Repository) -> None:
    def compiled(**environment: str) -> list[Path]:
        folder = repository.root / ".venv"
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "lib").mkdir(parents=True)
        (folder / "lib" / "module.py").touch()
        (folder / "pyvenv.cfg").touch()
        (folder / "bin").mkdir()
        (folder / "bin" / "python").symlink_to(sys.executable)
        assert repository.run("true", **environment).returncode == 0
        return list(folder.rglob("*.pyc"))

    assert len(compiled(PYTHONDONTWRITEBYTECODE="1")) == 1
    assert not compiled(PYTHONDONTWRITEBYTECODE="")


def test_a_folder_that_is_no_environment_is_left_alone(repository: Repository, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    result = repository.run("true", directory=tmp_path, PUREJAX_BILEVEL_VENV="mine")
    assert result.returncode == 2
    assert "is no Python environment" in result.stderr
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    assert repository.installs() == []


def test_simultaneous_first_calls_install_once(repository: Repository) -> None:
    (repository.stand_ins / "slow").touch()
    with ThreadPoolExecutor() as threads:
        results = list(threads.map(lambda number: repository.run("echo", str(number)), range(3)))
    assert [result.stdout for result in results] == ["0\n", "1\n", "2\n"]
    assert len(repository.installs()) == 1

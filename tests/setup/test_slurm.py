"""The sbatch script with stand-ins for srun and setup/run: every process gets the arguments unchanged."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "setup" / "slurm" / "train.sbatch"


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """The folder of a job: sbatch runs a copy of the script from there, not from the repository."""
    (tmp_path / "job").mkdir()
    shutil.copy2(SCRIPT, tmp_path / "job" / "slurm_script")
    (tmp_path / "srun").write_text("#!/bin/sh\npwd\necho cores $SRUN_CPUS_PER_TASK\nprintf '%s\\n' \"$@\"\nexit 3\n")
    (tmp_path / "srun").chmod(0o755)
    return tmp_path / "job"


def submit(job: Path, *arguments: str, directory: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PATH": f"{job.parent}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(directory)}
    environment["SLURM_CPUS_PER_TASK"] = "12"
    command = ["bash", str(job / "slurm_script"), *arguments]
    return subprocess.run(command, cwd=job, env=environment, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(
    ("arguments", "script"),
    [
        (["omd_capacity", "--name", "two words"], ["sweep.py"]),
        (["train_rl.py", "--lr", "1e-3"], []),
        ([], ["sweep.py"]),
    ],
)
def test_the_step_runs_the_script_in_the_submitting_folder(job: Path, arguments: list[str], script: list[str]) -> None:
    repository = job.parent / "a repository"
    (repository / "setup").mkdir(parents=True)
    (repository / "setup" / "run").write_text("#!/bin/sh\necho set up\n")
    (repository / "setup" / "run").chmod(0o755)
    result = submit(job, *arguments, directory=repository)
    command = ["./setup/run", "python", *script, *arguments]
    assert result.stdout.splitlines() == ["set up", str(repository), "cores 12", "--kill-on-bad-exit=1", *command]
    assert result.returncode == 3  # the step's own status, so that Slurm reports the failure


def test_a_wrong_folder_is_named(job: Path) -> None:
    result = submit(job, "omd_capacity", directory=job)
    assert result.returncode == 2
    assert "call sbatch in the repository's root" in result.stderr
    assert result.stdout == ""

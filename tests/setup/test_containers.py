"""The container scripts with a stand-in for the engine: what they would run, and what they refuse."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ENGINE = """#!/bin/sh
printf '%s\\n' "$@"
echo "key in environment: ${WANDB_API_KEY-none}"
"""


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A copy of setup/docker in a folder with a space, beside stand-ins for docker and nvidia-smi."""
    root = tmp_path / "a repository"
    shutil.copytree(ROOT / "setup" / "docker", root / "setup" / "docker")
    for name, text in {"docker": ENGINE, "nvidia-smi": "#!/bin/sh\necho 0\necho 1\n"}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    return root


def script(repository: Path, name: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {variable: value for variable, value in os.environ.items() if not variable.startswith(("WANDB_", "XDG_"))}
    kept |= {"PATH": f"{repository.parent}:{kept['PATH']}", "HOME": str(repository.parent / "home")}
    return subprocess.run(
        [str(repository / "setup" / "docker" / name), *arguments],
        env=kept | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "arguments are missing"),
        (["0"], "arguments are missing"),
        (["python", "train_rl.py"], "the GPU ids are 'python'"),
        (["0,", "true"], "the GPU ids are '0,'"),
        (["-1", "true"], "the GPU ids are '-1'"),
        (["0,1,0", "true"], "GPU 0 is named twice"),
        (["0,2", "true"], "there is no GPU 2 here: the driver knows 0, 1."),
    ],
)
def test_wrong_gpu_ids_are_refused_in_one_sentence(repository: Path, arguments: list[str], sentence: str) -> None:
    result = script(repository, "run_gpu.sh", *arguments)
    assert (result.returncode, result.stdout) == (2, "")
    assert sentence in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(("ids", "given"), [("1", '"device=1"'), ("0,1", '"device=0,1"'), ("all", "all")])
def test_gpus_are_given_to_the_engine(repository: Path, ids: str, given: str) -> None:
    words = script(repository, "run_gpu.sh", ids, "python", "sweep.py").stdout.splitlines()
    assert words[words.index("--gpus") + 1] == given
    assert words[words.index("purejax_bilevel:gpu") + 1 :][:2] == ["python", "sweep.py"]


def test_results_and_caches_outlive_the_container(repository: Path) -> None:
    words = script(repository, "run_cpu.sh", "python", "-c", "print('a b')").stdout.splitlines()
    mounts = [words[index + 1] for index, word in enumerate(words) if word == "--volume"]
    assert mounts == [
        f"{repository}/runs:/app/runs",
        f"{repository.parent}/home/.cache/purejax_bilevel/container:/cache",
    ]
    assert all(Path(mount.split(":")[0]).is_dir() for mount in mounts)
    assert words[words.index("purejax_bilevel:cpu") + 1 :][:3] == ["python", "-c", "print('a b')"]


@pytest.mark.parametrize("given", ["environment", "file", None])
def test_the_key_is_in_the_environment_and_in_no_argument(repository: Path, given: str | None) -> None:
    if given == "file":
        (repository / "setup" / "wandb_key").write_text("secret\n")
    result = script(repository, "run_cpu.sh", "true", **({"WANDB_API_KEY": "secret"} if given == "environment" else {}))
    *words, last = result.stdout.splitlines()
    assert last == f"key in environment: {'secret' if given else 'none'}"
    assert "secret" not in " ".join(words)
    assert words[words.index("WANDB_API_KEY") - 1] == "--env"


def test_the_container_is_not_run_as_root(repository: Path) -> None:
    run = script(repository, "run_cpu.sh", "true").stdout.splitlines()
    if os.getuid():
        assert run[run.index("--user") + 1] == f"{os.getuid()}:{os.getgid()}"
    else:  # the image's own user then
        assert "--user" not in run
    build = script(repository, "build_gpu.sh", "--build-arg", "EXTRAS=brax").stdout.splitlines()
    assert f"USER_ID={os.getuid() or 1000}" in build
    assert build[build.index("--target") + 1] == "gpu"
    assert build[-2:] == [str(repository), "key in environment: none"]
    assert "EXTRAS=brax" in build


def test_a_missing_engine_or_command_is_named(repository: Path) -> None:
    result = script(repository, "build_cpu.sh", CONTAINER_ENGINE="no-such-engine")
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "'no-such-engine' was not found" in result.stderr
    result = script(repository, "run_cpu.sh")
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "a command is missing" in result.stderr

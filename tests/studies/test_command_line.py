"""The command line of the training scripts: what it accepts, what it refuses and what a run leaves behind."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from purejax_bilevel import TabularConfig, configuration
from purejax_bilevel.errors import UserError
from purejax_bilevel.programs.control.q_learning import Config
from purejax_bilevel.results import dataset as datasets
from purejax_bilevel.runtime import loop, processes
from purejax_bilevel.studies import arguments, command_line, folder
from purejax_bilevel.studies import run as runs
from tests import toy

ROOT = Path(__file__).parents[2]
TINY = (
    "--num_train_steps 40 --init_steps 16 --batch_size 16 --capacity 40 --hidden_dim 4 --model_hidden_dim 2 "
    "--eval_frequency 20 --eval_episodes 2 --final_eval_episodes 2 --agent_type sql"
)


def parse(text: str) -> tuple[arguments.Options, Config]:
    return command_line.parse(Config, "", text.split())


def main(text: str) -> int:
    return command_line.main(Config, "", text.split())


def test_originals_flags_are_understood():
    run, config = parse(
        "--agent_type=funcBO --env_name=CartPole-v1 --seed=42 --num_train_steps=500 --hidden_dim=16 "
        "--model_hidden_dim=8 --batch_size=64 --init_steps=100 --eval_frequency=50 --num_Q_steps=2 --num_T_steps=3 "
        "--eps=0.2 --discount=0.9 --lr=0.01 --inner_lr=0.02 --alpha=0.03 --tau=0.04 --no_warm --warm_opt --no_double"
    )
    assert run.seed == 42
    assert (config.agent_type, config.num_train_steps, config.hidden_dim, config.model_hidden_dim) == (
        "funcbo",
        500,
        16,
        8,
    )
    assert (config.batch_size, config.init_steps, config.eval_frequency) == (64, 100, 50)
    assert (config.num_Q_steps, config.num_T_steps, config.eps, config.discount) == (2, 3, 0.2, 0.9)
    assert (config.lr, config.inner_lr, config.alpha, config.tau) == (0.01, 0.02, 0.03, 0.04)
    assert (config.no_warm, config.warm_opt, config.no_double) == (True, True, True)


def test_several_values_are_an_axis():
    _, config = parse("--lr 1e-3 3e-4 --model_hidden_dim 2 3 4")
    assert config.lr == (1e-3, 3e-4)
    assert config.model_hidden_dim == (2, 3, 4)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--env_name CartPoel-v1", "did you mean CartPole-v1"),
        ("--env_name Pendulum-v1", "continuous actions"),
        ("--lr -1", "--lr must be"),
        ("--lr 1e-3 nan", "--lr must be"),
        ("--agent_type dqn", "--agent_type must be one of omd, funcbo"),
        ("--agent_type=no_such_module:mine", "the module no_such_module cannot be imported"),
        ("--batch_size 64 --init_steps 32", "--batch_size 64 is larger"),
        ("--capacity 10", "--capacity 10 is smaller"),
        ("--devices 99", "--devices must be from 1 to 8"),
        ("--num_seeds 0", "--num_seeds must be at least 1"),
        ("--chunks 0", "--chunks must be at least 1"),
        ("--resume {folder}/nowhere", "there is no run in that folder"),
        ("--output_dir {folder}/file", "cannot write"),
        ("--batch_size 16 32", "--batch_size takes one value, got 16 32: it changes the compiled program"),
        ("--seed 1 2", "--seed takes one value, got 1 2"),
        ("--lr 1e-3 abc", "--lr must be a number, got 'abc'."),
        ("--num_seeds=1.5", "--num_seeds must be a whole number, got '1.5'."),
        ("--batch_size None", "--batch_size must be a whole number, got 'None'."),
        ("--video=maybe", "--video must be True or False, got 'maybe'"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(
    words: str, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture
):
    (tmp_path / "file").write_text("")
    folder = "" if "--output_dir" in words or "--resume" in words else f" --output_dir {tmp_path} --name run"
    assert main(words.format(folder=tmp_path) + folder) == 2
    error = capsys.readouterr().err
    assert sentence in " ".join(error.split())
    assert "Traceback" not in error
    assert not (tmp_path / "run" / "config.yaml").exists()


@pytest.mark.parametrize("words", ["--no_such_flag 3", "--seed"])
def test_unparsable_words_exit_with_status_2(words: str, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as raised:
        parse(words)
    assert raised.value.code == 2


def test_a_run_leaves_everything_behind_and_resumes(tmp_path: Path, capsys: pytest.CaptureFixture):
    arguments = (
        f"{TINY} --output_dir {tmp_path} --name run --num_seeds 2 --inner_lr 1e-3 3e-3 --seed 5 --video --devices 1"
    )
    assert main(arguments) == 0
    place = tmp_path / "run"
    for name in (
        "results.nc",
        "config.yaml",
        "command.txt",
        "versions.json",
        "checkpoint.npz",
        "learning_curves.png",
        "policy.gif",
    ):
        assert (place / name).stat().st_size > 0
    dataset = datasets.load(place)
    assert dict(dataset.sizes) == {"inner_lr": 2, "seed": 2, "step": 2, "episode": 2}
    assert dataset.seed.values.tolist() == [5, 6]
    assert "IQM" in capsys.readouterr().out

    assert main(arguments) == 2  # the place is taken
    assert "holds a run already" in " ".join(capsys.readouterr().err.split())

    for words, sentence in (
        ("--hidden_dim 8", "--resume goes on with --hidden_dim 4, got 8"),
        ("--num_seeds 3", "--resume goes on with --num_seeds 2, got 3"),
        ("--inner_lr 1e-3", "--resume goes on with --inner_lr 0.001 0.003, got 0.001"),
        ("--num_train_steps 20", "--num_train_steps 20 is less than the 40 steps"),
    ):
        assert main(f"--resume {place} {words}") == 2
        assert sentence in " ".join(capsys.readouterr().err.split())

    assert main(f"--resume {place} --num_train_steps 60 --quiet --devices 1") == 0
    longer = datasets.load(place)
    assert longer.step.values.tolist() == [20, 40, 60]
    np.testing.assert_array_equal(longer.q_loss[..., :2], dataset.q_loss)
    assert len((place / "command.txt").read_text().splitlines()) == 2


def test_a_dry_run_tells_the_plan_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(loop.Run, "_advance", None)  # nor does it train
    words = f"{TINY} --output_dir {tmp_path / 'runs'} --num_seeds 3 --lr 1e-3 1e-2 --devices 2 --dry_run"
    assert main(f"{words} --tensorboard --wandb_mode offline") == 0
    told = " ".join(capsys.readouterr().err.split())
    assert "sql-CartPole-v1: 6 members in 1 sub-program, 40 environment steps each, on 2 cpu devices" in told
    assert "memory per device: " in told
    assert "time: about " in told
    assert "stopped" not in told
    assert told.endswith("dry run: nothing was written.")
    assert not list(tmp_path.iterdir())
    assert main(f"--dry_run --resume {tmp_path}") == 2


def test_settings_may_come_from_a_file(tmp_path: Path):
    file = tmp_path / "mine.yaml"
    file.write_text("agent_type: funcBO\nlr: [1e-3, 3e-4]\nno_warm: true\nnum_seeds: 4\nalpha: 0.03\nvideo: false\n")
    run, config = parse(f"--config {file} --alpha 0.5 0.6")
    assert (run.num_seeds, run.video) == (4, False)
    assert (config.agent_type, config.lr, config.alpha, config.no_warm) == ("funcbo", (1e-3, 3e-4), (0.5, 0.6), True)
    assert parse(f"--config={file} --agent_type=omd")[1].agent_type == "omd"
    assert command_line.named_setting("agent_type", ["--config", str(file)]) == "funcBO"


def test_settings_may_come_from_an_earlier_run(tmp_path: Path):
    before = parse("--agent_type vep --lr 1e-3 3e-4 --hidden_dim 7 8 --num_seeds 3 --seed 2")
    options, config = before
    folder.describe(tmp_path, folder.as_told(config, {"seed": 2, "num_seeds": 3}), options, False, False)
    run, again = parse(f"--config {tmp_path / 'config.yaml'}")
    assert (run.num_seeds, run.seed, run.config) == (3, 2, tmp_path / "config.yaml")
    assert again.resolved() == config.resolved()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "cannot be read"),
        ("lr: [", "is not YAML"),
        ("- lr", "must hold lines"),
        ("1: 2", "must hold lines"),
        ("lr: 1\nlr: 2", "stated twice"),
        ("lr: {a: 1}", "lr must be a value or a list of values"),
        ("lr: []", "lr must be a value or a list of values"),
        ("resume: runs/a", "resume belongs on the command line"),
        ("leraning_rate: 3", "there is no option leraning_rate"),
        ("hidden_dims: 3", "did you mean hidden_dim?"),
        ("sweep: {program: rl}", "is of a sweep"),
        ("num_seeds: [1, 2]", "--num_seeds takes one value"),
        ("lr: [1e-3, abc]", "lr must be a number, got 'abc'."),
        ("lr: -1", "--lr must be"),
        ("video: 3", "--video must be True or False"),
    ],
)
def test_bad_files_of_settings_are_one_sentence(
    content: str | None, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture
):
    file = tmp_path / "mine.yaml"
    if content is not None:
        file.write_text(content)
    assert main(f"--config {file} --output_dir {tmp_path} --name run") == 2
    error = " ".join(capsys.readouterr().err.split())
    assert sentence in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "code",
    [
        "import train_rl; train_rl.configuration()",
        "import train_regression as t; t.configuration()",
        "from purejax_bilevel import run",
    ],
)
def test_all_cores_are_used_without_being_asked(code: str):
    """An import that makes jax choose its devices too early would leave a single one."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, "-c", f"{code}; import jax; print(len(jax.devices()))"]
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert int(output) == len(os.sched_getaffinity(0))


def test_a_foreign_config_is_refused(tmp_path: Path):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"run": {"seed": 0}, "config": {"temperature": 3}}))
    with pytest.raises(UserError, match=r"its config\.yaml is not of this script"):
        parse(f"--resume {tmp_path}")
    config = configuration.to_dict(TabularConfig().resolved())
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"run": {"seed": 0, "num_seeds": 1}, "config": config}))
    with pytest.raises(UserError, match="of another program, --agent_type omd --env_name tabular: --resume alone"):
        parse(f"--resume {tmp_path}")


def test_flags_may_be_given_a_value():
    run, config = parse("--video=True --tensorboard=false --warm_opt=true")
    assert (run.video, run.tensorboard, config.warm_opt) == (True, False, True)


def test_a_resumed_run_does_again_what_it_was_told_unless_told_anew(tmp_path: Path):
    _, config = parse("--warm_opt")
    told = {"video": True, "tensorboard": True, "wandb_mode": "offline", "wandb_runs": "setting"}
    options = loop.RunOptions(**{name: value for name, value in told.items() if name != "video"})
    folder.describe(tmp_path, folder.as_told(config, {"seed": 3, "num_seeds": 2}), options, False, video=True)
    run, again = parse(f"--resume {tmp_path}")
    assert {name: getattr(run, name) for name in told} == told
    assert (run.seed, run.num_seeds, again.resolved()) == (3, 2, config.resolved())
    run, again = parse(f"--resume {tmp_path} --warm_opt --video=False --wandb_mode disabled")
    assert (run.video, run.tensorboard, run.wandb_mode, again.warm_opt) == (False, True, "disabled", True)


@pytest.mark.parametrize(("seeds", "who"), [(1, "the only member"), (3, "all 3 members")])
def test_a_run_whose_members_all_diverged_exits_with_1_and_keeps_everything(seeds, who, tmp_path, capsys):
    words = f"--lr 10 --num_train_steps 8 --num_seeds {seeds} --output_dir {tmp_path} --name run --quiet"
    assert command_line.main(toy.Config, "", words.split()) == 1
    told = capsys.readouterr().err
    assert told.startswith(f"error: {who} diverged")
    assert told.count("\n") == 1
    assert datasets.load(tmp_path / "run").failed.values.all()
    assert command_line.main(toy.Config, "", ["--resume", str(tmp_path / "run"), "--lr", "10", "--quiet"]) == 1


def test_a_run_with_a_member_left_exits_with_0(tmp_path):
    words = f"--lr 10 0.1 --num_train_steps 8 --output_dir {tmp_path} --name run --quiet"
    assert command_line.main(toy.Config, "", words.split()) == 0


@pytest.mark.parametrize(
    ("variable", "words", "logged"),
    [
        ("offline", "", True),
        ("", "", False),
        ("offline", "--wandb_mode disabled", False),
        ("disabled", "--wandb_mode offline", True),
    ],
)
def test_the_command_line_says_more_than_the_variable_of_wandb(variable, words, logged, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", variable)
    words = f"--num_train_steps 8 --output_dir {tmp_path} --name run --quiet {words}"
    assert command_line.main(toy.Config, "", words.split()) == 0
    assert bool(list(tmp_path.glob("run/wandb/offline-run-*"))) == logged


def test_the_variable_of_wandb_does_not_matter_without_a_folder(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert runs.run(toy.Config(num_train_steps=8), quiet=True).sizes["seed"] == 1


@pytest.mark.parametrize("is_first", [True, False])
def test_the_first_of_several_processes_prints_the_warnings(is_first, monkeypatch):
    monkeypatch.setattr(configuration, "is_quiet", None)
    monkeypatch.setattr(processes, "is_first", lambda: is_first)
    assert command_line.exit_status(lambda console: None, []) == 0
    assert configuration.is_quiet is not is_first


def test_help_says_once_what_happens_by_default(capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit):
        parse("--help")
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "(default: tuned per agent)" in text
    assert "agent) (default:" not in text
    assert "accelerators) (default:" not in text


def test_only_a_named_folder_chooses_the_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"config": {"env_name": "tabular"}}))
    monkeypatch.chdir(tmp_path)
    assert command_line.named_environment(["--help"]) == ""
    assert command_line.named_environment(["--resume", "."]) == "tabular"
    (tmp_path / "config.yaml").write_bytes(b"config: \xff\xfe")
    assert command_line.named_environment(["--resume", "."]) == ""


@pytest.mark.parametrize(
    ("stopped", "sentence"),
    [
        (loop.Interrupted("stopped after 5 of 9 steps; go on with --resume runs/x"), "go on with --resume runs/x"),
        (KeyboardInterrupt(), "stopped before anything was written"),
    ],
)
def test_an_interrupted_run_says_so_and_exits_with_130(stopped: BaseException, sentence: str, capsys):
    def work(console: object) -> None:
        raise stopped

    assert command_line.exit_status(work, []) == 130
    assert sentence in capsys.readouterr().err

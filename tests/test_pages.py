"""The pages (every README.md): links lead somewhere, commands are accepted, Python runs, tables agree with the code.

Bash blocks run with stand-ins in place of `setup/run`, `sbatch` and the container scripts, which write down what they
were called with; the scripts' own readers of the command line then judge it. Python blocks of the first page and of
the one on results run as they are, on runs made small. Those of the page on programs are not run here: its examples are
run by tests/programs/test_examples.py, the others are parts of programs, and their imports are tried.
"""

import ast
import contextlib
import importlib.util
import io
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import pytest
import yaml
from matplotlib import pyplot

import purejax_bilevel
from purejax_bilevel import ContinuousConfig, RegressionConfig, RLConfig, RunOptions, TabularConfig, run, scripts
from purejax_bilevel.configuration import replace
from purejax_bilevel.environments.grid_world import __main__ as grid_world_pictures
from purejax_bilevel.program import Configuration
from purejax_bilevel.programs.meta_objectives import figures as level_figures
from purejax_bilevel.programs.offline import __main__ as offline_commands
from purejax_bilevel.results import __main__ as report_again
from purejax_bilevel.results import dataset as datasets
from purejax_bilevel.studies import command_line, plan, study, sweep_command
from purejax_bilevel.studies import folder as folders
from tests.programs.examples import population
from tests.programs.offline import pendulum

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "purejax_bilevel"
PAGES = [ROOT / "README.md", ROOT / "setup" / "README.md", *sorted(PACKAGE.rglob("README.md"))]
FIRST, RESULTS, SWEEPS = ROOT / "README.md", PACKAGE / "results" / "README.md", PACKAGE / "studies" / "README.md"
PROGRAMS = PACKAGE / "programs" / "README.md"
CONTROL, TABULAR = (PROGRAMS.parent / name / "README.md" for name in ("control", "tabular"))
OWN_PROGRAM = "my_program"  # on the pages, a module of the reader's
STAND_INS = (
    "setup/run",
    *(f"setup/docker/{action}_{target}.sh" for action in ("build", "run") for target in ("cpu", "gpu")),
    "bin/sbatch",
    "bin/pip",
)
STAND_IN = """#!/bin/sh
{ printf '%s\\037' "${PUREJAX_BILEVEL_EXTRAS:-none}" "${0##*/}" "$@"; echo; } >> "$CALLS"
"""
# Options of commands whose help is not that of the three scripts.
ELSEWHERE = {
    "--baseline": "tests/benchmarks/speed.py",
    "--build-arg": "setup/docker/build_cpu.sh",
    "--policy": "purejax_bilevel/environments/grid_world/__main__.py",
    "--table": "purejax_bilevel/results/__main__.py",
}


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)


def prose(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def rows(text: str) -> list[list[str]]:
    """Cells of all tables, without headings."""
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return [cells for cells in lines if not set(cells[0]) <= {"-"}]


# --- links ------------------------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """Headings as GitHub names them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def linked(page: Path) -> Iterator[tuple[Path, str]]:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if not target.startswith("https://"):
            path, _, anchor = target.partition("#")
            yield (page.parent / path).resolve() if path else page, anchor


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    found = list(linked(page))
    assert found or "](" not in prose(page)
    for path, anchor in found:
        assert path.exists(), f"{path} is linked and does not exist"
        assert not anchor or anchor in anchors(path), f"{path} has no heading for #{anchor}"


def test_every_page_and_figure_is_reached_from_the_first_page() -> None:
    reached, waiting = {FIRST}, [FIRST]
    while waiting:
        new = {path for path, _ in linked(waiting.pop())} - reached
        reached |= new
        waiting += [path for path in new if path.suffix == ".md"]
    assert {*PAGES, *(ROOT / ".github").glob("*.png")} <= reached


# --- commands ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the stand-ins, and with the files and runs that the pages' commands name."""
    place = tmp_path_factory.mktemp("pages")
    for name in STAND_INS:
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(STAND_IN)
        (place / name).chmod(0o755)
    example, _ = blocks(SWEEPS, "yaml")
    (place / "my_sweep.yaml").write_text(example)
    (agent,) = blocks(CONTROL, "python")
    (place / "mypackage").mkdir()
    (place / agent.splitlines()[0].removeprefix("# ")).write_text(agent)
    datasets.write_config(place / "runs" / "capacity", {"sweep": yaml.safe_load(example)})
    seeds, config = {"seed": 0, "num_seeds": 8}, RLConfig().resolved()
    folders.describe(place / "runs" / "first", folders.as_told(config, seeds), RunOptions(), False, video=False)
    pendulum.files_of_presets(place)
    return place


def calls(place: Path, text: str) -> list[tuple[str, list[str]]]:
    """What a piece of bash calls: the extras asked for, and program and arguments."""
    record = place / "calls"
    record.write_text("")
    environment = os.environ | {"PATH": f"{place / 'bin'}:{os.environ['PATH']}", "CALLS": str(record)}
    subprocess.run(["bash", "-euc", text], cwd=place, env=environment, check=True, timeout=60)
    split = [line.rstrip("\037").split("\037") for line in record.read_text().splitlines()]
    return [(extras, words) for extras, *words in split]


def commands(page: Path) -> list[str]:
    """Bash blocks, and commands within sentences."""
    flat = " ".join(prose(page).split())
    return [*blocks(page, "bash"), *re.findall(r"`(\./setup/run [^`]*)`", flat)]


def accept(words: list[str]) -> None:
    """Lets the program that is called read its command line."""
    match words:
        case ["pytest"]:
            pass
        case ["run" | "run_cpu.sh", *rest] | ["run_gpu.sh", "0,1", *rest]:
            accept(rest)
        case ["build_cpu.sh" | "build_gpu.sh"]:
            pass
        case ["sbatch", file, *rest]:
            assert (ROOT / file).is_file()
            accept(["python", *([] if rest[0].endswith(".py") else ["sweep.py"]), *rest])
        case ["pip", "install", *rest]:
            pinned = (ROOT / "setup" / "requirements-gpu.txt").read_text()
            assert {word for word in rest if "==" in word} <= set(pinned.split())
        case ["python", "my_program.py", *rest]:
            command_line.parse(population.Config, "", rest)
        case ["python", "train_rl.py" | "train_regression.py", *_, "--help"]:
            pass
        case ["python", "train_rl.py", *rest]:
            command_line.parse(scripts.rl_configuration(rest), "", rest)
        case ["python", "train_regression.py", *rest]:
            command_line.parse(scripts.regression_configuration(), "", rest)
        case ["python", "sweep.py", *rest]:
            _, found = sweep_command.read_arguments(rest)
            if found.settings.get("env_name") != "halfcheetah":
                plan.make_agents(found)
        case ["python", "-m", "purejax_bilevel.results", *rest]:
            report_again.read_arguments(rest)
        case ["python", "-m", "purejax_bilevel.environments.grid_world", *rest]:
            grid_world_pictures.read_arguments(rest)
        case ["python", "-m", "purejax_bilevel.programs.meta_objectives.figures", *rest]:
            level_figures.read_arguments(rest)
        case ["python", "-m", "purejax_bilevel.programs.offline", *rest]:
            offline_commands.read_arguments(rest)
        case ["python", script, *rest]:
            source = (ROOT / script).read_text()
            for word in rest:
                assert not word.startswith("--") or re.search(rf"\b{word[2:]}\b", source), f"{script} has no {word}"
        case _:
            pytest.fail(f"nobody knows {shlex.join(words)}")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_are_accepted(page: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    monkeypatch.syspath_prepend(place)
    for text in [text for text in blocks(TABULAR, "python") if page == TABULAR]:
        exec(text, {})  # it makes the file that a command reads
    found = [call for text in commands(page) for call in calls(place, text)]
    assert found
    for extras, words in found:
        if extras == "brax" and importlib.util.find_spec("brax") is None:
            words = ["Pendulum-v1" if word == "halfcheetah" else word for word in words]
        accept(words)


def test_what_no_program_accepts_is_found(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    ((_, words),) = calls(place, "for tau in 2; do ./setup/run python train_rl.py --tau $tau; done  # --help")
    with pytest.raises(purejax_bilevel.UserError, match="--tau"):
        accept(words)


@pytest.fixture(scope="module")
def options() -> set[str]:
    """Every long option that the help of some script shows."""
    families = ("ppo", "open_training", "collect", "ensemble", "mopo", "mbpo", "lpg", "a2c")
    kinds = ["", "--env_name Pendulum-v1", "--env_name tabular", *(f"--agent_type {name}" for name in families)]
    helps = [(scripts.train_rl, kind) for kind in kinds] + [(scripts.train_regression, ""), (scripts.sweep, "")]
    helps += [(report_again.main, "compare")]
    shown = set().union(*(help_of(*asked) for asked in helps))
    assert {"--lr", "--dim_distract", "--norm_bound", "--lambda_reg", "--halving"} <= shown
    return shown | set(ELSEWHERE)


def help_of(script: Callable[[], int], words: str) -> set[str]:
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.setattr("sys.argv", ["script", *words.split(), "--help"])
        with pytest.raises(SystemExit):
            script()
    return set(re.findall(r"--\w+", out.getvalue()))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_options_in_sentences_exist(page: Path, options: set[str]) -> None:
    spans = [span for span in re.findall(r"`([^`]+)`", prose(page)) if not span.startswith("./setup/run")]
    for option in {option for span in spans for option in re.findall(r"(?<!\S)--[\w-]+", span)}:
        assert option in options, f"{option} is in no help"


def test_options_of_other_programs_are_theirs() -> None:
    for option, file in ELSEWHERE.items():
        assert option.removeprefix("--") in (ROOT / file).read_text()


# --- Python -----------------------------------------------------------------------------------------------------------


def small_run(config: Configuration, **options: Any) -> Any:
    sizes = {"num_train_steps": 20, "init_steps": 10, "batch_size": 8, "capacity": 20, "eval_frequency": 10}
    small = replace(config, hidden_dim=4, eval_episodes=1, final_eval_episodes=2, **sizes)
    return run(small, **{**options, "num_seeds": 2, "quiet": True})


@pytest.fixture(scope="module")
def first_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the first page's Python has run."""
    folder = tmp_path_factory.mktemp("first")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(purejax_bilevel, "run", small_run)
        for text in blocks(FIRST, "python"):
            exec(text, {})
    return folder


def test_python_of_the_page_on_results_runs(first_page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(first_page)
    texts = blocks(RESULTS, "python")
    assert len(texts) == 3
    for text in texts:
        exec(text, {})
    pyplot.close("all")  # xarray's own plots stay open
    assert Path("curves.png").is_file()


def test_the_agent_of_the_page_on_control_learns(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(place)
    config = RLConfig(agent_type="mypackage.mine:MINE").resolved()
    program = config.program()
    state = jax.eval_shape(lambda: program.init(jax.random.key(0), config))
    _, metrics = jax.eval_shape(lambda state: program.update(state, config, jax.numpy.int32(0)), state)
    assert {"model_loss", "q_loss"} <= set(metrics)


def test_imports_of_the_page_on_programs_exist() -> None:
    texts = blocks(PROGRAMS, "python")
    assert len(texts) == 6
    for text in texts:
        imports = [node for node in ast.parse(text).body if isinstance(node, ast.Import | ast.ImportFrom)]
        assert imports
        exec(compile(ast.Module(imports, []), name_of(PROGRAMS), "exec"), {})


def test_no_page_with_python_is_left_out() -> None:
    optimizers = PROGRAMS.parent / "learned_optimizers" / "README.md"  # run by programs/learned_optimizers/test_open.py
    observatory = PROGRAMS.parent / "observatory" / "README.md"  # run by programs/observatory/test_observatory.py
    known = {FIRST, PROGRAMS, CONTROL, TABULAR, RESULTS, optimizers, observatory}
    assert {name_of(page) for page in PAGES if blocks(page, "python")} == set(map(name_of, known))


# --- tables -----------------------------------------------------------------------------------------------------------


def variables(kind: str) -> set[str]:
    """What the page on results says that a program measures."""
    found = re.search(rf"<!-- variables: {kind} -->(.*?)<!-- variables", RESULTS.read_text(), re.DOTALL)
    assert found
    return {name for cells in rows(found[1]) for name in re.findall(r"`(\w+)`", cells[0])}


def test_variables_are_those_in_the_file(first_page: Path) -> None:
    shape = {"n_samples": 8, "batch_size": 4, "hidden_dim": 4, "window_size": 3, "regret_grid_size": 2}
    regression = run(RegressionConfig(T_max=2, eval_frequency=1, **shape), quiet=True, devices=1)
    tabular = run(TabularConfig(num_train_steps=2, eval_frequency=1), quiet=True)
    control = datasets.load(first_page / "runs" / "widths")
    assert set(regression.data_vars) == variables("regression") | {"failed"}
    assert set(tabular.data_vars) == variables("tabular") | {"failed"}
    only_others = {"solver_residual", "policy_loss", "policy_gradient_norm", "entropy", "temperature"}
    assert set(control.data_vars) == variables("control") - only_others | {"failed"}


def test_attributes_are_those_in_the_file(first_page: Path) -> None:
    said = {name for cells in rows(RESULTS.read_text()) for name in re.findall(r"`(\w+)`", cells[0])}
    assert set(datasets.load(first_page / "runs" / "widths").attrs) <= said


def test_tuned_defaults_are_those_of_the_agents() -> None:
    discrete, continuous = CONTROL.read_text().split("## Continuous control")
    for text, config_class in ((discrete, RLConfig), (continuous, ContinuousConfig)):
        (table,) = re.findall(r"^\| agent \| `--lr` .*?\n\n", text, re.DOTALL | re.MULTILINE)
        heading, *agents = rows(table)
        names = [re.findall(r"--(\w+)", cell)[0] for cell in heading[1:]]
        assert len(agents) >= 4
        for cells in agents:
            for agent in re.findall(r"`(\w+)`", cells[0]):
                config = config_class(agent_type=agent).resolved()
                for name, cell in zip(names, cells[1:], strict=True):
                    assert cell == "(no model)" or float(cell) == getattr(config, name), f"{agent}: {name}"


def test_the_example_of_a_sweep_file_has_the_members_that_are_said(place: Path) -> None:
    agents = plan.make_agents(study.parse(study.read(place / "my_sweep.yaml")))
    members = sum(len(agent.grid) for agent in agents)
    assert f"= {members} members in three sub-programs" in SWEEPS.read_text()
    assert sum(len(agent.templates) for agent in agents) == 3


def test_agents_of_several_programs_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, OWN_PROGRAM, population)
    _, example = blocks(SWEEPS, "yaml")
    agents = plan.make_agents(study.parse(yaml.safe_load(example)))
    assert [type(agent.templates[0].config) for agent in agents] == [RLConfig, population.Config]

"""Ctrl-C and SIGTERM before a script's work begins: real processes, stopped while they import."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from purejax_bilevel import interrupts

ROOT = Path(__file__).parents[1]
# Runs a script that gets the signal when the import of a module begins, where an exception would not be seen.
STOPPED = """
import os, runpy, sys
script, module, number = sys.argv.pop(1), sys.argv.pop(1), int(sys.argv.pop(1))
class Finder:
    def find_spec(name, path=None, target=None):
        if name == module:
            try:
                os.kill(os.getpid(), number)
                for _ in range(1000): pass
            except BaseException: pass
sys.meta_path.insert(0, Finder)
sys.path.insert(0, os.getcwd())
sys.argv[0] = script
runpy.run_path(script, run_name="__main__")
"""
ONE_LINE = "stopped before anything was written.\n"


@pytest.mark.parametrize(
    ("script", "module"),
    [
        ("train_rl.py", "tyro"),
        ("train_rl.py", "jax._src.lax"),
        ("train_rl.py", "optax"),
        ("train_regression.py", "jax"),
        ("sweep.py", "gymnax"),
        ("sweep.py", "matplotlib"),
    ],
)
@pytest.mark.parametrize("number", interrupts.SIGNALS)
def test_an_interrupt_during_imports_is_one_line(script: str, module: str, number: int, tmp_path: Path):
    words = ["omd_capacity"] if script == "sweep.py" else []
    command = [sys.executable, "-c", STOPPED, script, module, str(int(number)), *words, "--output_dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (128 + number, "", ONE_LINE)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["train_rl", "train_regression", "sweep"])
def test_the_installed_commands_do_the_same(name: str):
    code = (
        "import os, signal, sys\n"
        "from purejax_bilevel import interrupts, scripts\n"
        "inner = interrupts.end_at_once\n"
        "interrupts.end_at_once = lambda: (inner(), os.kill(os.getpid(), signal.SIGINT))\n"
        f"scripts.{name}()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (130, ONE_LINE)


def test_nothing_but_the_standard_library_comes_before():
    code = "import sys; before = set(sys.modules); import purejax_bilevel.scripts; print(*(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    tops = {name.partition(".")[0] for name in done.stdout.split()}
    assert tops - {"purejax_bilevel"} <= set(sys.stdlib_module_names)


COMPILING = """
import os, signal, sys
from purejax_bilevel import interrupts
in_script, alone, *numbers = eval(sys.argv[1])
if in_script:
    interrupts.end_at_once()
for number in interrupts.SIGNALS:
    signal.signal(number, lambda number, frame: print("told", number, flush=True))
with interrupts.while_compiling("nothing is lost", alone):
    for number in numbers:
        os.kill(os.getpid(), number)
os.kill(os.getpid(), 15)
"""
STOPPING = "stopping when the compiler is done; once more stops at once.\n"


@pytest.mark.parametrize(
    ("words", "status", "printed", "told"),
    [
        ("(True, True)", 0, "told 15\n", ""),
        ("(True, True, 15)", 143, "", "nothing is lost\n"),
        ("(True, True, 2)", 130, "", "nothing is lost\n"),
        ("(True, False, 15)", 0, "told 15\ntold 15\n", STOPPING),
        ("(True, False, 2, 15)", 143, "told 2\n", f"{STOPPING}nothing is lost\n"),
        ("(False, True, 15)", 0, "told 15\ntold 15\n", ""),
    ],
)
def test_an_interrupt_while_the_compiler_works(words: str, status: int, printed: str, told: str):
    command = [sys.executable, "-c", COMPILING, words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (status, printed, told)


def test_an_interrupt_is_an_exception_once_the_work_begins(monkeypatch: pytest.MonkeyPatch):
    ended = []
    monkeypatch.setattr(interrupts.os, "_exit", ended.append)
    before = {number: signal.getsignal(number) for number in interrupts.SIGNALS}
    try:
        for number in interrupts.SIGNALS:
            interrupts.end_at_once()
            signal.raise_signal(number)
            interrupts.raise_from_now_on()
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(number)
        assert ended == [130, 143]
        assert interrupts.status() == 143
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # as nohup leaves it
        interrupts.end_at_once()
        interrupts.raise_from_now_on()
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

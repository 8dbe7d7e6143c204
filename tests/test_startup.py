"""What a script imports before it trains: slow packages only where they are used, and real ones then."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
UNUSED = ("distrax", "tensorflow_probability", "wandb", "tensorboardX", "evosax", "scipy.stats", "seaborn")
UNUSED_BY_HELP = ("matplotlib", "xarray", "pandas", "PIL", "h5netcdf")


def printed(code: str) -> list[str]:
    """The lines that a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_discrete_agent_imports_nothing_that_it_does_not_use() -> None:
    lines = printed(
        "import sys, train_rl\n"
        "from purejax_bilevel.studies import command_line\n"
        f"found = lambda: print([name for name in {UNUSED} if name in sys.modules])\n"
        "words = ['--agent_type', 'sql']\n"
        "run, config = command_line.parse(train_rl.configuration(words), '', words)\n"
        "found()\n"
        "config.resolved().program()\n"
        "found()\n"
    )
    assert lines == ["[]", "[]"]


def test_a_regression_imports_no_environment() -> None:
    code = "import sys, train_regression, purejax_bilevel\npurejax_bilevel.RegressionConfig().resolved().program()\n"
    assert printed(code + "print('gymnax' in sys.modules)") == ["False"]


DRAWN = """
import sys
from purejax_bilevel.environments._gymnax import gymnax, DRAWING
print([name for name in DRAWING if name in sys.modules])
from gymnax.environments.misc import pong
print(pong.sns.color_palette("cubehelix", 2).as_hex()[0][0], pong.colors.to_hex("red"))
import matplotlib, matplotlib.pyplot, seaborn
print(pong.plt.subplots is matplotlib.pyplot.subplots, type(seaborn).__name__, type(matplotlib.pyplot).__name__)
from gymnax.visualize import Visualizer
print(Visualizer.__name__)
"""


@pytest.mark.slow  # gymnax and its packages are pinned
def test_gymnax_can_still_draw() -> None:
    assert printed(DRAWN) == ["[]", "# #ff0000", "True module module", "Visualizer"]
    assert printed(f"import matplotlib, seaborn\n{DRAWN}")[1:] == ["# #ff0000", "True module module", "Visualizer"]


@pytest.mark.parametrize(("script", "more"), [("train_rl", ()), ("train_regression", ("gymnax",)), ("sweep", ("jax",))])
def test_help_imports_nothing_that_it_does_not_use(script: str, more: tuple[str, ...]) -> None:
    code = (
        f"import contextlib, io, sys; from purejax_bilevel import scripts; sys.argv = ['{script}.py', '--help']\n"
        f"with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()): scripts.{script}()\n"
        f"print([name for name in {(*UNUSED, *UNUSED_BY_HELP, *more)} if name in sys.modules])\n"
        "import gc; print(gc.isenabled())\n"
    )
    assert printed(code) == ["[]", "False"]


def test_help_of_results_imports_no_package() -> None:
    code = (
        "import contextlib, io, runpy, sys; sys.argv = ['results', '--help']\n"
        "with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):\n"
        "    runpy.run_module('purejax_bilevel.results', run_name='__main__', alter_sys=True)\n"
        f"print([name for name in {(*UNUSED_BY_HELP, 'numpy', 'jax')} if name in sys.modules])\n"
    )
    assert printed(code) == ["[]"]


def test_garbage_is_collected_again_once_all_is_compiled() -> None:
    code = (
        "import gc; from purejax_bilevel import garbage\n"
        "garbage.collect_from_now_on(); print(gc.isenabled(), gc.get_freeze_count())\n"  # nobody put it off
        "garbage.put_off(); print(gc.isenabled())\n"
        "garbage.collect_from_now_on(); print(gc.isenabled(), gc.get_freeze_count() > 0)\n"
    )
    assert printed(code) == ["True 0", "False", "True True"]

"""What a script imports before it trains: slow packages only where they are used, and real ones then."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
UNUSED = ("distrax", "tensorflow_probability", "wandb", "tensorboardX", "evosax", "scipy.stats", "seaborn.relational")


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


def test_gymnax_can_still_draw() -> None:
    lines = printed(
        "import sys\n"
        "from purejax_bilevel.environments._gymnax import gymnax\n"
        "from gymnax.environments.misc import pong\n"
        "print(type(sys.modules['seaborn']).__name__, 'seaborn.relational' in sys.modules)\n"
        "print(pong.sns.color_palette('cubehelix', 2).as_hex()[0][0])\n"
        "print(type(sys.modules['seaborn']).__name__, 'seaborn.relational' in sys.modules)\n"
    )
    assert lines == ["_LazyModule False", "#", "module True"]

"""Imports inside the package point downwards only: studies, then programs and runtime, then what knows nothing of them.

`bilevel` is usable alone: it imports nothing of ours, not even `errors`.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "purejax_bilevel"
# A room imports itself and rooms of lower rank; rooms of one rank do not know each other.
RANKS = {
    "bilevel": 0,
    "errors": 0,
    "garbage": 0,
    "interrupts": 0,
    "configuration": 1,
    "agents": 2,
    "environments": 2,
    "evolution": 3,
    "evolution_settings": 2,
    "members": 2,
    "networks": 2,
    "replay": 2,
    "program": 3,
    "results": 3,
    "runtime.artefacts": 3,  # a file format, which programs read too
    "programs": 4,
    "runtime": 4,
    "studies": 5,
    "__init__": 6,
    "scripts": 7,
}


def imported_rooms(source: str, module: str) -> Iterator[str]:
    """The rooms that a module imports, at any depth of its code; `__init__` for a name of the package itself.

    Args:
        source: the module's text.
        module: its dotted name, with `__init__` where it is the file of a package.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            # One leading dot is the module's own package, each further dot the one above.
            package = module.split(".")[: -node.level] if node.level else []
            names = [".".join([*package, *filter(None, [node.module]), alias.name]) for alias in node.names]
        else:
            continue
        for top, *rest in (name.split(".") for name in names):
            if top == PACKAGE.name:
                own = ".".join(rest[:2])
                yield own if own in RANKS else rest[0] if rest and rest[0] in RANKS else "__init__"


def violations(source: str, module: str) -> list[str]:
    """The imports of a module that do not point downwards."""
    room = module.split(".")[1]
    return sorted({name for name in imported_rooms(source, module) if name != room and RANKS[name] >= RANKS[room]})


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def test_every_room_has_a_rank() -> None:
    entries = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or any(path.glob("*.py"))}
    assert entries - set(RANKS) == set(), "a new room: give it a rank"


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=dotted)
def test_imports_point_downwards(path: Path) -> None:
    assert violations(path.read_text(), dotted(path)) == []


@pytest.mark.parametrize(
    ("module", "line", "forbidden"),
    [
        ("bilevel.implicit", "from purejax_bilevel.errors import UserError", ["errors"]),
        ("bilevel.implicit", "from .. import errors", ["errors"]),
        ("bilevel.implicit", "from purejax_bilevel.bilevel import regret", []),
        ("bilevel.__init__", "from . import errors", []),
        ("bilevel.__init__", "from ..errors import UserError", ["errors"]),
        ("networks", "import purejax_bilevel.replay as replay", ["replay"]),
        ("networks", "from .replay import Batch", ["replay"]),
        ("programs.control.agents", "from purejax_bilevel import networks, runtime, studies", ["runtime", "studies"]),
        ("programs.control.agents", "from purejax_bilevel.runtime import artefacts, loop", ["runtime"]),
        ("programs.control.agents", "def f():\n    from purejax_bilevel import run", ["__init__"]),
        ("studies.run", "from purejax_bilevel import bilevel, errors, programs, runtime", []),
    ],
)
def test_upward_imports_are_found(module: str, line: str, forbidden: list[str]) -> None:
    assert violations(line, f"purejax_bilevel.{module}") == forbidden


def test_the_package_imports_no_script() -> None:
    scripts = {path.stem for path in ROOT.glob("*.py")}
    for path in PACKAGE.rglob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        imports = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        imports |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom) and node.level == 0}
        assert imports & scripts == set(), path

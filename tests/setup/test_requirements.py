"""The declared windows, the pins and the imports agree, and no tracked file names a machine or a package host."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PYTHONS = ("3.11", "3.12", "3.13")
# Import names that differ from the name of the package that brings them.
DISTRIBUTIONS = {"PIL": "pillow", "mujoco_playground": "playground", "tensorflow_probability": "tfp-nightly"}
DISTRIBUTIONS |= {"yaml": "pyyaml"}


def requirements(lines: Iterable[str], python: str = "3.11") -> list[Requirement]:
    """The requirements that hold for one Python, on the machines that the pins are made for."""
    named = [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]
    platform = {"python_version": python, "python_full_version": f"{python}.0", "platform_machine": "x86_64"}
    return [requirement for requirement in named if not requirement.marker or requirement.marker.evaluate(platform)]


def pins(python: str, *files: str) -> dict[str, str]:
    """{package: version} of some requirement files; a package pinned twice in one file is an error."""
    found: dict[str, str] = {}
    for file in files:
        lines = (ROOT / "setup" / f"requirements-{file}.txt").read_text().splitlines()
        for pin in requirements(lines, python):
            (specifier,) = pin.specifier
            name = canonicalize_name(pin.name)
            assert specifier.operator == "==", f"{pin} in requirements-{file}.txt is no exact version"
            assert found.setdefault(name, specifier.version) == specifier.version, f"{name} has two versions"
    return found


def declared(*extras: str) -> list[str]:
    groups = PROJECT["optional-dependencies"]
    own = [line for extra in extras for line in groups[extra] if not line.startswith(PROJECT["name"])]
    return [*PROJECT["dependencies"], *own]


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize(
    ("files", "extras"),
    [
        (("base", "cpu", "test"), ("test", "dev", "tensorboard")),
        (("base", "gpu", "test"), ("gpu", "test", "dev")),
        (("base", "cpu", "brax"), ("brax",)),
    ],
)
def test_every_declared_package_is_pinned_inside_its_window(
    python: str, files: tuple[str, ...], extras: tuple[str, ...]
) -> None:
    pinned = pins(python, *files)
    for requirement in requirements(declared(*extras), python):
        name = canonicalize_name(requirement.name)
        assert name in pinned, f"{name} is declared in pyproject.toml but not pinned: run setup/lock.py"
        assert requirement.specifier.contains(pinned[name], prereleases=True), f"{name} {pinned[name]}: {requirement}"


def test_what_a_pinned_package_needs_is_pinned_too() -> None:
    """Reads the packages of this environment that have the pinned version; others cannot be asked without a network."""
    pinned = pins(f"{sys.version_info.major}.{sys.version_info.minor}", "base", "cpu", "test")
    installed = {canonicalize_name(found.name): found for found in metadata.distributions()}
    asked = [name for name, version in pinned.items() if name in installed and installed[name].version == version]
    missing = [
        f"{name} needs {requirement}"
        for name in asked
        for requirement in map(Requirement, installed[name].requires or [])
        if (not requirement.marker or requirement.marker.evaluate({"extra": ""}))
        and canonicalize_name(requirement.name) not in pinned
    ]
    assert "pytest" in installed
    assert missing == []


def test_pins_cover_every_python_that_is_allowed() -> None:
    allowed = SpecifierSet(PROJECT["requires-python"])
    assert [f"3.{minor}" for minor in range(8, 20) if f"3.{minor}" in allowed] == list(PYTHONS)


def sources() -> list[Path]:
    return sorted([*(ROOT / "purejax_bilevel").rglob("*.py"), *ROOT.glob("*.py")])


def imported_modules(path: Path) -> Iterator[str]:
    """The first names of all absolute imports of a file, at any depth."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.partition(".")[0]


def test_every_imported_package_is_declared() -> None:
    names = {canonicalize_name(Requirement(line).name) for line in declared("brax", "tensorboard")}
    ours = {"purejax_bilevel", *(path.stem for path in ROOT.glob("*.py"))}
    undeclared = [
        f"{path.relative_to(ROOT)}: {module}"
        for path in sources()
        for module in sorted(set(imported_modules(path)) - ours - sys.stdlib_module_names)
        if canonicalize_name(DISTRIBUTIONS.get(module, module)) not in names
    ]
    assert len(sources()) > 1
    assert undeclared == []


def tracked_text() -> Iterator[tuple[str, str]]:
    """(path, text) of every file in git that is text."""
    try:
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not in a git checkout")
    for name in filter(None, listed.split("\0")):
        path = ROOT / name
        if path.is_file() and b"\0" not in (content := path.read_bytes()):
            yield name, content.decode()


# Written in pieces, so that this file does not contain what it looks for.
UNWANTED = re.compile(
    "|".join(
        [
            r"(?<![\w./~}-])/" + r"(?:home|root|Users|work)" + r"/[\w.]",  # a folder of one machine
            r"https?://[^\s\"']*/" + r"(?:simple|packages)/",
            "files" + r"\.pythonhosted\.org|" + "pypi" + r"\.org|--(?:extra-)?" + "index-url|--trusted" + "-host",
        ]
    )
)


@pytest.mark.parametrize(
    "line",
    ["data = '/ho" + "me/ada/data'", "pip install --index" + "-url x", "see https://host.example/sim" + "ple/jax"],
)
def test_the_pattern_finds_machine_paths_and_hosts(line: str) -> None:
    assert UNWANTED.search(line)


def test_no_machine_path_or_package_host_is_tracked() -> None:
    found = [
        f"{name}:{number}: {line.strip()}"
        for name, text in tracked_text()
        for number, line in enumerate(text.splitlines(), start=1)
        if UNWANTED.search(line)
    ]
    assert found == []

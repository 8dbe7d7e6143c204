"""Rewrite setup/requirements-*.txt: the exact version of every package, for every Python that pyproject.toml allows.

uv resolves pyproject.toml with all its extras once per Python version, so that any choice of files fits together.
Each package then goes where it is needed: by every install (base), as jax itself (cpu, or gpu with the CUDA libraries),
by the extra `brax`, or by tests and development (test). A version that differs between Pythons gets a marker.

    ./setup/run python setup/lock.py             add what is missing, keep every other version
    ./setup/run python setup/lock.py --upgrade   take the newest versions that pyproject.toml allows
"""

import argparse
import subprocess
import tempfile
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PYTHONS = ("3.11", "3.12", "3.13")
EXTRAS = {"gpu": ("gpu",), "brax": ("brax",), "test": ("dev", "tensorboard")}
DEVICE_PACKAGES = {"jax", "jaxlib"}


def resolve(
    python: str, extras: tuple[str, ...], preferences: list[str], constraints: dict[str, str]
) -> dict[str, str]:
    """Resolve pyproject.toml with `extras` for one Python; return {package: version}."""
    with tempfile.TemporaryDirectory() as folder:
        output, build, bounds = Path(folder, "pins.txt"), Path(folder, "build.in"), Path(folder, "bounds.txt")
        output.write_text("\n".join(preferences))
        bounds.write_text("\n".join(f"{package}=={version}" for package, version in constraints.items()))
        # The build backend is pinned with the rest: the editable install then needs no isolated download.
        build.write_text("\n".join(PROJECT["build-system"]["requires"]))
        command = ["uv", "pip", "compile", "--quiet", "--no-annotate", "--no-header", "--no-emit-index-url"]
        command += ["--no-emit-find-links", "--python-platform", "x86_64-unknown-linux-gnu"]
        command += [f"--python-version={python}", f"--constraints={bounds}", f"--output-file={output}"]
        command += [f"--extra={extra}" for extra in extras]
        subprocess.run([*command, str(ROOT / "pyproject.toml"), str(build)], check=True, stdout=subprocess.DEVNULL)
        pins = [Requirement(line) for line in output.read_text().splitlines() if line.strip()]
    return {pin.name: str(pin.specifier).removeprefix("==") for pin in pins}


def split(python: str, preferences: list[str]) -> dict[str, dict[str, str]]:
    """The pins for one Python as {file: {package: version}}."""
    everything = resolve(python, tuple(extra for extras in EXTRAS.values() for extra in extras), preferences, {})
    plain = set(resolve(python, (), [], everything))
    needed = {"base": plain - DEVICE_PACKAGES, "cpu": DEVICE_PACKAGES}
    needed |= {file: set(resolve(python, extras, [], everything)) - plain for file, extras in EXTRAS.items()}
    needed["gpu"] |= DEVICE_PACKAGES
    return {file: {package: everything[package] for package in sorted(packages)} for file, packages in needed.items()}


def present_pins(python: str) -> list[str]:
    """What the present files pin for `python`."""
    lines = [line for file in ROOT.glob("setup/requirements-*.txt") for line in file.read_text().splitlines()]
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    held = [pin for pin in pins if pin.marker is None or pin.marker.evaluate({"python_version": python})]
    return [f"{pin.name}{pin.specifier}" for pin in held]


def platform_markers() -> dict[str, str]:
    """The markers that pyproject.toml itself gives to a package (uv drops them when it resolves for one platform)."""
    extras = PROJECT["project"]["optional-dependencies"].values()
    named = [Requirement(text) for group in extras for text in group]
    return {requirement.name: str(requirement.marker) for requirement in named if requirement.marker}


def requirement_lines(versions: dict[str, dict[str, str]]) -> list[str]:
    """One line per package and version; `versions` is {python: {package: version}}."""
    markers, lines = platform_markers(), []
    for package in sorted(set().union(*versions.values())):
        of_python = {python: pins[package] for python, pins in versions.items() if package in pins}
        for version in dict.fromkeys(of_python.values()):
            pythons = [python for python in of_python if of_python[python] == version]
            conditions = [markers[package]] if package in markers else []
            if len(pythons) < len(PYTHONS):
                conditions.append(f"python_version in '{' '.join(pythons)}'")
            lines.append(" ; ".join([f"{package}=={version}", *([" and ".join(conditions)] if conditions else [])]))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--upgrade", action="store_true", help="take the newest versions that pyproject.toml allows")
    upgrade = parser.parse_args().upgrade
    of_python = {python: split(python, [] if upgrade else present_pins(python)) for python in PYTHONS}
    for file in ("base", "cpu", *EXTRAS):
        lines = requirement_lines({python: files[file] for python, files in of_python.items()})
        text = "\n".join(["# Written by setup/lock.py from pyproject.toml.", *lines]) + "\n"
        (ROOT / "setup" / f"requirements-{file}.txt").write_text(text)
        print(f"setup/requirements-{file}.txt: {len(lines)} lines")


if __name__ == "__main__":
    main()

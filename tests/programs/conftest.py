"""Without XLA's fusion emitters, whole training programs take half the time to compile: so they are left out here."""

from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import jax
import pytest

COMPILE = jax.stages.Lowered.compile
# An option that XLA does not know is an error: this one is for the releases that it was tried with.
QUICK = {"xla_cpu_use_fusion_emitters": False} if version("jaxlib").startswith("0.10.") else {}


def _compile_quickly(
    lowered: jax.stages.Lowered, compiler_options: dict[str, Any] | None = None
) -> jax.stages.Compiled:
    return COMPILE(lowered, QUICK | (compiler_options or {}))


@pytest.fixture(scope="module", autouse=True)
def _quick_compilation() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.stages.Lowered, "compile", _compile_quickly)
        yield


@pytest.fixture
def usual_compilation(monkeypatch: pytest.MonkeyPatch) -> None:
    """For programs of different shapes that have to agree to the last bit, which they do with the emitters."""
    monkeypatch.setattr(jax.stages.Lowered, "compile", COMPILE)

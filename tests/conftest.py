"""Set the whole suite up before jax starts: eight host devices, no display, no network, checked keys, compile cache.

XLA reads XLA_FLAGS once, when its first device is asked for: this file changes the environment, then imports jax.
What the user set stays: flags are appended, a given platform and cache folder are used. The default platform is the
CPU on every machine, because the expected numbers and the eight devices are those of a CPU.
"""

import gc
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests import compilation

HOST_DEVICES = 8
XLA_FLAGS = (
    f"--xla_force_host_platform_device_count={HOST_DEVICES}",
    "--xla_cpu_multi_thread_eigen=false",
    "--xla_backend_optimization_level=0",  # tests compile much and compute little
    *compilation.FLAGS,
)

os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *XLA_FLAGS]).strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["MPLBACKEND"] = "Agg"
os.environ["WANDB_MODE"] = "disabled"
os.environ["WANDB_SILENT"] = "true"

import jax
import pytest


def _cache_directory() -> Path | None:
    """The user's own compilation cache, else a private folder of this suite; None where nothing can be written."""
    given = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    directory = Path(given) if given else home / "purejax_bilevel" / "test-compilations"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            return directory
    except OSError:
        return None


if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in the background of a shell script
    signal.signal(signal.SIGINT, signal.default_int_handler)  # processes that tests start inherit what is ignored
gc.disable()  # what is traced stays until its file is done, and looking through it takes a tenth of the time


def _configure_jax() -> None:
    directory = _cache_directory()
    if directory is not None:
        # In the environment too: tests that start scripts as processes share the compilations.
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(directory)
        jax.config.update("jax_compilation_cache_dir", str(directory))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
    # Again for a jax that a pytest plugin imported before this file.
    jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])
    jax.config.update("jax_debug_key_reuse", True)


_configure_jax()


@pytest.fixture(scope="module", autouse=True)
def _forget_compiled_programs() -> Iterator[None]:
    """Compiled programs of a test file go with it: kept until the end they fill gigabytes."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope="module")
def compiled_once() -> Iterator[None]:
    """What is compiled for one run of a test file serves every other run of the same program there.

    For files whose tests train one small program again and again: broken off, resumed, with other numbers. A program is
    the same where its class, its static settings, its arrays' shapes and its devices are.
    """
    from purejax_bilevel.runtime.compiled import CompiledProgram

    known: dict[Any, Any] = {}
    compile_own = CompiledProgram._compile

    def compile_once(self: CompiledProgram, stage: int, block_steps: int) -> Any:
        leaves, structure = jax.tree.flatten((self._structure, self._configs, self._seeds, self._shared))
        shapes = tuple((leaf.shape, str(leaf.dtype)) for leaf in leaves)
        programs = tuple(type(part.program) for part in self.parts)
        key = (self.mesh.devices.shape, self.member_batch, stage, block_steps, programs, structure, shapes)
        if key not in known:
            known[key] = compile_own(self, stage, block_steps)
        self._compiled[stage, block_steps] = known[key]
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CompiledProgram, "_compile", compile_once)
        yield


@pytest.fixture
def float64() -> Iterator[None]:
    """64-bit floats for this test only, for gradient checks and golden numbers."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def usual_compilation(monkeypatch: pytest.MonkeyPatch) -> None:
    """For programs of different shapes that have to agree to the last bit: see `compilation.USUAL`."""
    compile_quickly = jax.stages.Lowered.compile

    def compile(lowered: Any, compiler_options: dict[str, Any] | None = None) -> Any:
        return compile_quickly(lowered, compilation.USUAL | (compiler_options or {}))

    monkeypatch.setattr(jax.stages.Lowered, "compile", compile)


@pytest.fixture
def strict_promotion() -> Iterator[None]:
    """Refuse every implicit promotion between array types in this test."""
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> type:
    """The toy (`tests/toy.py`) as the program `toy` of sweep files."""
    from purejax_bilevel import programs
    from tests import toy as module

    monkeypatch.setitem(programs.REGISTRY, "toy", "tests.toy")
    return module.Config

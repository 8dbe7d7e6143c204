"""gymnax, without the drawing library that it imports beside its environments.

One of gymnax's environments draws with seaborn, and importing any part of gymnax imports it and with it scipy's
statistics: nearly half of the time that a script took to start. Here seaborn is imported as a lazy module of the
standard library: the real one from its first use on, which training never makes.
"""

import contextlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from types import ModuleType


class _LazyFinder(importlib.abc.MetaPathFinder):
    """Finds one module as the standard finder does, and puts off running it."""

    def __init__(self, name: str) -> None:
        self._name = name

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        spec = importlib.machinery.PathFinder.find_spec(fullname, path) if fullname == self._name else None
        if spec is not None and spec.loader is not None:
            spec.loader = importlib.util.LazyLoader(spec.loader)
        return spec


@contextlib.contextmanager
def _lazily(name: str) -> Iterator[None]:
    """Inside of it, the import of a module waits for the module's first use."""
    finder = _LazyFinder(name)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


with _lazily("seaborn"):
    import gymnax
    from gymnax.environments import spaces
    from gymnax.environments.environment import Environment

__all__ = ["Environment", "gymnax", "spaces"]

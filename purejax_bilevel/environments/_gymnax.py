"""gymnax, without the drawing libraries that it imports beside its environments.

Some of gymnax's environments draw with matplotlib and seaborn, and importing any part of gymnax imports both and with
them scipy's statistics: more than half of the time that a script took to start. Here gymnax gets stand-ins, which
import the real modules when something in them is used; training never does. Nobody else sees the stand-ins.
"""

import contextlib
import importlib
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

DRAWING = ("matplotlib", "matplotlib.animation", "matplotlib.colors", "matplotlib.pyplot", "seaborn")


class _StandIn(ModuleType):
    """Has what the real module of its name has."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # asked for by the import system
            raise AttributeError(name)
        return getattr(importlib.import_module(self.__name__), name)


@contextlib.contextmanager
def _stand_ins(names: tuple[str, ...]) -> Iterator[None]:
    """Inside of it, imports of modules that are not loaded yet find their stand-ins."""
    made = {name: _StandIn(name) for name in names if name not in sys.modules}
    for name, module in made.items():
        parent, _, child = name.rpartition(".")
        if parent in made:
            setattr(made[parent], child, module)
    sys.modules.update(made)
    try:
        yield
    finally:
        for name in made:
            del sys.modules[name]


with _stand_ins(DRAWING):
    import gymnax
    from gymnax.environments import spaces
    from gymnax.environments.environment import Environment

__all__ = ["Environment", "gymnax", "spaces"]

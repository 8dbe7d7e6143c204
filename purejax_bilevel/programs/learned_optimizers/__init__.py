"""Learned optimisers for reinforcement learning: OPEN as an optax transformation, usable alone."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from purejax_bilevel.programs.learned_optimizers.optimizer import (
        NO_FEATURES,
        OpenState,
        Scales,
        Switches,
        batch_clock,
        open_optimizer,
        training_clock,
    )
    from purejax_bilevel.programs.learned_optimizers.weights import ARTEFACT_KIND, SIZES, load_weights

__all__ = [
    "ARTEFACT_KIND",
    "NO_FEATURES",
    "SIZES",
    "OpenState",
    "Scales",
    "Switches",
    "batch_clock",
    "load_weights",
    "open_optimizer",
    "training_clock",
]


def __getattr__(name: str) -> Any:  # on first use: the settings in this folder are read without jax
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "weights" if name in ("ARTEFACT_KIND", "SIZES", "load_weights") else "optimizer"
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)

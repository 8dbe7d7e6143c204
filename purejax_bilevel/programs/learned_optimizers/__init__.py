"""Learned optimisers for reinforcement learning: OPEN as an optax transformation, usable alone."""

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

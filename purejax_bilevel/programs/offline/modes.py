"""The modes of pessimism by name, without what they do, which is in `pessimism.py`.

The names are those of Mr-Pepe's code (offline-model-based-rl): they say in one word whose uncertainty is meant and what
is done with it. `mopo`, `morel` and `truncation` are added.
"""

from typing import NamedTuple

from purejax_bilevel.errors import UserError


class Mode(NamedTuple):
    """Which uncertainty a mode looks at ("": none), what it does, and which of the two coefficients it needs."""

    uncertainty: str
    treatment: str
    has_pessimism: bool = False
    has_threshold: bool = False


MODES = {
    "none": Mode("", "none"),
    "aleatoric-penalty": Mode("max_variance", "penalty", has_pessimism=True),
    "epistemic-penalty": Mode("max_distance", "penalty", has_pessimism=True),
    "aleatoric-partitioning": Mode("max_variance", "partitioning", has_threshold=True),
    "epistemic-partitioning": Mode("max_distance", "partitioning", has_threshold=True),
    "mopo": Mode("max_std_norm", "sampled penalty", has_pessimism=True),
    "morel": Mode("max_distance", "partitioning", has_threshold=True),
    "survival": Mode("max_distance", "survival", has_threshold=True),
    "offline-exploration-penalty": Mode("max_distance", "bonus", has_pessimism=True, has_threshold=True),
    "offline-exploration-partitioning": Mode("max_distance", "band", has_pessimism=True, has_threshold=True),
    "underestimation": Mode("", "underestimation"),
    "truncation": Mode("max_distance", "truncation", has_threshold=True),
}


def mode_named(name: str) -> Mode:
    """The mode of a name.

    Raises:
        UserError: there is none.
    """
    if name not in MODES:
        raise UserError(f"--mode must be one of {', '.join(MODES)}, got {name!r}.")
    return MODES[name]

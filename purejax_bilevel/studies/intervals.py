"""Intervals of hyper-parameters that are drawn at random or searched."""

import dataclasses
import math
import typing
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from purejax_bilevel.configuration import fields
from purejax_bilevel.errors import UserError
from purejax_bilevel.members import Axis, format_value
from purejax_bilevel.results.checks import (
    choice,
    known_entries,
    number_of,
)
from purejax_bilevel.studies.values import checked_value


@dataclasses.dataclass(frozen=True)
class Interval:
    """Range of a hyper-parameter that is drawn or searched, logarithmic unless `scale` is linear."""

    name: str
    low: float
    high: float
    scale: str = "log"
    whole: bool = False

    def at(self, position: float) -> float | int:
        """Value at a position from 0 (low) to 1 (high); positions outside count as the nearest end."""
        share = min(max(float(position), 0.0), 1.0)
        if share in (0.0, 1.0):  # exactly
            value = (self.low, self.high)[int(share)]
        elif self.scale == "log":
            value = math.exp((1 - share) * math.log(self.low) + share * math.log(self.high))
        else:
            value = (1 - share) * self.low + share * self.high
        value = min(max(value, self.low), self.high)
        return round(value) if self.whole else value

    def position(self, value: float) -> float:
        """The inverse of `at`; the middle for a value outside."""
        if not self.low <= value <= self.high:
            return 0.5
        low, high, value = (math.log(x) if self.scale == "log" else x for x in (self.low, self.high, value))
        return (value - low) / (high - low)


def random_axis(space: Sequence[Interval], count: int, seed: int) -> Axis:
    """`count` settings, each value drawn uniformly on its interval's scale."""
    positions = np.random.default_rng(seed).random((count, len(space)))
    points = tuple(
        tuple(interval.at(position) for interval, position in zip(space, row, strict=True)) for row in positions
    )
    return Axis(tuple(interval.name for interval in space), points)


def intervals(cls: type, content: Any, where: str) -> tuple[Interval, ...]:
    """Intervals of traced numbers: name to [low, high] or {low, high, scale}."""
    hints = typing.get_type_hints(cls)
    allowed = [
        field.name
        for field in fields(cls, is_traced=True)
        if {hints[field.name], *typing.get_args(hints[field.name])} & {int, float}
    ]
    found = []
    for name, value in known_entries(content, allowed, where).items():
        bounds = (
            dict(zip(("low", "high"), value, strict=False)) if isinstance(value, list) and len(value) == 2 else value
        )
        if not isinstance(bounds, Mapping):
            raise UserError(f"{where}: {name} must be [low, high] or {{low, high, scale}}, got {value!r}.")
        bounds = known_entries(bounds, ("low", "high", "scale"), f"{where}: {name}")
        low, high = (number_of(bounds.get(end), f"{where}: {name}: {end}") for end in ("low", "high"))
        scale = choice(bounds.get("scale", "log"), ("log", "linear"), f"{where}: {name}: scale")
        if low >= high or (scale == "log" and low <= 0):
            needed = "0 < low < high" if scale == "log" else "low < high"
            raise UserError(f"{where}: {name} needs {needed}, got [{format_value(low)}, {format_value(high)}].")
        is_whole = float not in {hints[name], *typing.get_args(hints[name])}
        for end in (low, high):
            checked_value(cls, name, round(end) if is_whole else end)
        found.append(Interval(name, low, high, scale, is_whole))
    return tuple(found)

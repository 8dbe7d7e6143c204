"""Members: every combination of hyper-parameter settings and seeds of one experiment.

A member is one (setting, seed). Members are numbered in C order: the first axis is the slowest, the seed the fastest.
"""

import dataclasses
import math
from typing import Any, TypeVar

import numpy as np

from purejax_bilevel.configuration import Settings, fields, replace, values_of
from purejax_bilevel.errors import UserError

C = TypeVar("C", bound=Settings)

MOST_MEMBERS = 1_000_000  # what the host keeps of each member, its labels above all, then takes a gigabyte


@dataclasses.dataclass(frozen=True)
class Axis:
    """One dimension of an ablation.

    Args:
        names: one name for a grid axis; several for settings that vary together (a random search, zipped lists).
        values: one tuple per point, with one entry per name.
    """

    names: tuple[str, ...]
    values: tuple[tuple, ...]

    @property
    def dimension(self) -> str:
        """Name of the dimension in the results."""
        return self.names[0] if len(self.names) == 1 else "setting"

    def __len__(self) -> int:
        return len(self.values)


@dataclasses.dataclass(frozen=True)
class Grid:
    """All members: the product of the axes (first axis slowest), then the seeds (fastest).

    Args:
        axes: the swept hyper-parameters, in the order of the dimensions.
        seeds: one integer per repetition.

    Raises:
        UserError: more than MOST_MEMBERS members.
    """

    axes: tuple[Axis, ...]
    seeds: tuple[int, ...]

    def __post_init__(self) -> None:
        check_count(*self.shape)

    @property
    def shape(self) -> tuple[int, ...]:
        """Number of points per axis, then the number of seeds."""
        return (*(len(axis) for axis in self.axes), len(self.seeds))

    def __len__(self) -> int:
        return math.prod(self.shape)

    def settings(self, member_index: int) -> dict[str, Any]:
        """Swept hyper-parameters of one member by name, the seed last."""
        *points, seed = np.unravel_index(member_index, self.shape)
        named = {
            name: value
            for axis, point in zip(self.axes, points, strict=True)
            for name, value in zip(axis.names, axis.values[point], strict=True)
        }
        return {**named, "seed": self.seeds[seed]}

    def columns(self) -> dict[str, tuple[tuple, np.ndarray]]:
        """Per swept name some values, and for each member which of them is its own, `[members]`."""
        *points, _ = np.unravel_index(np.arange(len(self)), self.shape)
        return {
            name: (tuple(value[place] for value in axis.values), point)
            for axis, point in zip(self.axes, points, strict=True)
            for place, name in enumerate(axis.names)
        }

    def describe(self, member_index: int) -> str:
        """Member in words, for example `lr=0.001, model_hidden_dim=3, seed=2`."""
        return ", ".join(f"{name}={format_value(value)}" for name, value in self.settings(member_index).items())


def format_value(value: Any) -> str:
    """Shortest usual notation of a hyper-parameter's value."""
    return f"{value:.6g}" if isinstance(value, float | np.floating) else str(value)


def bytes_in_words(number: float) -> str:
    """For example `3.2 MiB`."""
    for size, unit in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if number >= size:
            return f"{number / size:.3g} {unit}" if number < 1000 * size else f"{number / size:,.0f} {unit}"
    return f"{number:.0f} B"


def counted(number: int, noun: str) -> str:
    """`1 member`, `2 members`."""
    return f"{number} {noun}" + ("" if number == 1 else "s")


def grid_of(config: Settings, seeds: tuple[int, ...], axes: tuple[Axis, ...] = ()) -> Grid:
    """The grid that a configuration asks for: an axis per traced field with several values, in the order of
    declaration.

    Args:
        config: a configuration whose traced fields may hold several values.
        seeds: one per repetition.
        axes: further axes (zipped settings), placed first; their names must not be axes of `config`.
    """
    own = tuple(
        Axis((field.name,), tuple((value,) for value in values))
        for field in fields(config, is_traced=True)
        if len(values := values_of(getattr(config, field.name))) > 1
    )
    return Grid((*axes, *own), seeds)


def count_members(config: Settings, num_seeds: int) -> int:
    """Number of members that a configuration asks for, told before any is listed.

    Raises:
        UserError: more than MOST_MEMBERS.
    """
    lengths = [len(values_of(getattr(config, field.name))) for field in fields(config, is_traced=True)]
    return check_count(*lengths, num_seeds)


def batch_config(config: C, grid: Grid) -> C:
    """The configuration of all members at once: every traced leaf an array `[members]`.

    Static fields that size arrays receive the largest value among the members. Numbers have 32 bits unless the
    configuration's class says `float64 = True`: then its whole program runs in 64 bits (`program.precision`).

    Raises:
        UserError: a size was fixed below the largest value asked for.
    """
    columns = grid.columns()
    changes: dict[str, Any] = {}
    float_type = np.float64 if getattr(config, "float64", False) else np.float32
    for field in fields(config, is_traced=True):
        single = values_of(getattr(config, field.name))[0]
        values, point = columns.get(field.name, ((single,), np.zeros(len(grid), int)))
        whole = all(isinstance(value, int | np.integer) for value in values)
        changes[field.name] = np.asarray(values, np.int32 if whole and "int" in str(field.type) else float_type)[point]
        maximum = field.metadata["maximum"]
        if maximum is not None:
            largest, given = int(max(values)), getattr(config, maximum)
            if given and given < largest:
                raise UserError(f"{maximum}={given} is smaller than the largest {field.name}, {largest}.")
            changes[maximum] = given or largest
    return replace(config, **changes)


def check_count(*lengths: int) -> int:
    """Number of members of axes with these lengths (one of them the seeds), told before a list of them is made.

    Raises:
        UserError: more than MOST_MEMBERS.
    """
    count = math.prod(lengths)
    if count > MOST_MEMBERS:
        product = " x ".join(f"{length:,}" for length in lengths if length != 1)
        raise UserError(
            f"{count:,} members ({product}) are more than the {MOST_MEMBERS:,} that one run can have: take fewer "
            "seeds (--num_seeds) or fewer values per option."
        )
    return count

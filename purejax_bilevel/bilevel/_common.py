"""Shared by the files of this folder: two types, the precision of curvature products, checks of plain numbers."""

import operator
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

PyTree = Any
Scalar = float | int | jax.Array

LinearSolver = Callable[[Callable[[PyTree], PyTree], PyTree], PyTree]
"""`solve(matvec, b) -> x` with `matvec(x)` close to `b`; `b` and `x` are pytrees of the same structure."""


def full_precision():
    """Multiply in full float32 inside: the TF32 default of GPUs keeps 10 bits, too few for Hessian products and CG."""
    return jax.default_matmul_precision("highest")


def known_scalar(name: str, value: Scalar) -> float | None:
    """Return the number when it is known at trace time, None when it is traced; arrays are refused."""
    if np.shape(value) != ():
        raise ValueError(f"{name} has shape {np.shape(value)}, it must be a single number (use vmap for several).")
    return None if isinstance(value, jax.core.Tracer) else float(value)


def check_between(name: str, value: Scalar, low: float, high: float = float("inf")) -> None:
    """Raise ValueError when a known number lies outside [low, high]; traced numbers pass."""
    number = known_scalar(name, value)
    if number is not None and not low <= number <= high:
        allowed = f"at least {low:g}" if high == float("inf") else f"between {low:g} and {high:g}"
        raise ValueError(f"{name} is {number:g}, it must be {allowed}.")


def checked_count(name: str, value: int) -> int:
    """Return a static number of steps or terms as int; it must be a whole number of at least 1."""
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{name} is {value!r}, it must be a whole number known when the program is traced.") from None
    check_between(name, number, 1)
    return number

"""Settings of the observatory, and how its estimators are written: a kind, then its numbers, as in `cg:20:0.1`."""

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import ClassVar, Self

from purejax_bilevel.configuration import NONNEGATIVE, POSITIVE, Check, at_least, configuration, static, traced
from purejax_bilevel.errors import UserError

GROUP = "observatory"
# What may follow each kind: names and whether they are whole; those in the second tuple may be left out.
NUMBERS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "identity": ((), ()),
    "cg": (("steps",), ("damping",)),
    "neumann": (("terms",), ("step_size",)),
    "dense": ((), ("damping",)),
    "unrolled": (("steps",), ("step_size",)),
    "adam": (("steps",), ()),
    "functional": ((), ()),
    "dual": (("steps",), ()),
    "es": (("pairs", "steps"), ("sigma",)),
}
WRITTEN = "names from " + ", ".join(NUMBERS) + ", each with its numbers, as in 'identity cg:20 es:32:5'"
MOST = 100_000  # steps, terms or pairs


@dataclasses.dataclass(frozen=True)
class Estimator:
    """One way to estimate a hypergradient.

    Args:
        name: as it was written, which also labels it in results.
        kind: one of `NUMBERS`.
        counts: its whole numbers, in the order of `NUMBERS`.
        amount: its last number; None: the setting of that name.
    """

    name: str
    kind: str
    counts: tuple[int, ...] = ()
    amount: float | None = None


def parse(text: str) -> tuple[Estimator, ...]:
    """The estimators that a text names.

    Raises:
        UserError: naming what is no estimator, or is there twice.
    """
    names = text.split()
    for number, name in enumerate(names):
        if name in names[:number]:
            raise UserError(f"--estimators names {name} twice.")
    if not names:
        raise UserError(f"--estimators must be {WRITTEN}, got {text!r}.")
    return tuple(_parse_one(name) for name in names)


def _parse_one(name: str) -> Estimator:
    kind, *numbers = name.split(":")
    if kind not in NUMBERS:
        raise UserError(f"--estimators must be {WRITTEN}, got {name!r}.")
    needed, optional = NUMBERS[kind]
    if not len(needed) <= len(numbers) <= len(needed) + len(optional):
        raise UserError(f"--estimators: {form(kind)} is how {kind} is written, got {name!r}.")
    counts = tuple(_count(name, what, number) for what, number in zip(needed, numbers, strict=False))
    rest = numbers[len(needed) :]
    return Estimator(name, kind, counts, _amount(name, optional[0], rest[0]) if rest else None)


def form(kind: str) -> str:
    """How an estimator is written: `cg:STEPS[:DAMPING]`."""
    needed, optional = NUMBERS[kind]
    return kind + "".join(f":{what.upper()}" for what in needed) + "".join(f"[:{what.upper()}]" for what in optional)


def _count(name: str, what: str, number: str) -> int:
    if not number.isascii() or not number.isdigit() or not 1 <= int(number[:9]) <= MOST or len(number) > 6:
        raise UserError(f"--estimators {name}: {what} must be a whole number from 1 to {MOST}, got {number!r}.")
    return int(number)


def _amount(name: str, what: str, number: str) -> float:
    positive = what != "damping"
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value < 0 or (positive and value == 0):
        allowed = "a finite number above 0" if positive else "a finite number, 0 or above"
        raise UserError(f"--estimators {name}: {what} must be {allowed}, got {number!r}.")
    return value


@configuration
class Observed:
    """What is compared at each evaluation, and how."""

    estimators: str = static(
        "identity cg:5 cg:20 neumann:20 dense unrolled:1 unrolled:20 adam:1 functional dual:100 es:32:20",
        "hypergradients that are compared, each with its numbers; what is left out is the setting of that name: "
        + ", ".join(map(form, NUMBERS)),
        Check(WRITTEN, lambda text: isinstance(text, str)),
        GROUP,
    )
    num_batches: int = static(8, "fresh batches that each estimator sees at a frozen state", at_least(2), GROUP)
    reference_batches: int = static(32, "further batches, that the reference sees as one", at_least(1), GROUP)
    estimator_damping: float = traced(
        0.01,
        "added to the inner Hessian's diagonal (cg, dense, reference), as a share of its largest eigenvalue",
        NONNEGATIVE,
        GROUP,
    )
    estimator_step_size: float = traced(
        1.0,
        "of gradient descent on the inner problem (neumann, unrolled, es), over that eigenvalue",
        POSITIVE,
        GROUP,
    )
    estimator_sigma: float = traced(
        0.01, "es: standard deviation of the samples, as a share of the outer variable's size", POSITIVE, GROUP
    )
    estimator_dual_lr: float = traced(1e-3, "dual: Adam rate of the dual network", POSITIVE, GROUP)


class Observing:
    """What the configurations of all observatories do, the first of their bases, before that of the family.

    Attributes:
        kinds: of estimators that the problem has.
        why_not: per other kind the reason.
    """

    kinds: ClassVar[Collection[str]] = tuple(NUMBERS)
    why_not: ClassVar[Mapping[str, str]] = {}

    @property
    def title(self) -> str:
        """Short name of the experiment."""
        return f"observatory-{super().title}"  # type: ignore[misc]

    def resolved(self) -> Self:
        """Fills in what the family fills in, and checks everything.

        Raises:
            UserError: for a value that is not allowed, or two that do not go together.
        """
        config: Self = super().resolved()  # type: ignore[misc]
        for estimator in parse(config.estimators):  # type: ignore[attr-defined]
            if estimator.kind not in self.kinds:
                reason = self.why_not[estimator.kind]
                raise UserError(f"--estimators {estimator.name}: {reason}; it may be {', '.join(self.kinds)}.")
        return config

"""Configurations: frozen dataclasses whose fields declare how they may vary.

A *traced* field is a leaf of the configuration's pytree: members of one compiled program may differ in it. A *static*
field changes the program. The same declaration gives the command line, the checks with their messages and the axes of
a sweep. A *task* field names what is to be solved, such as the environment.

    @configuration
    class Inner:
        inner_lr: float = traced(1e-3, "learning rate of the inner variable", POSITIVE)
        num_steps: int = static(1, "inner steps", at_least(1))

Fields that belong together are a group, a configuration of its own: functions take the group that they need, and
programs are composed of groups by inheritance, so that fields stay flat. Python puts the fields of the last base
first. A program that has another default says so where it is composed:

    @configuration
    class Config(Inner, Outer):
        num_steps: int = changed(Inner, "num_steps", 10)
"""

import dataclasses
import functools
import importlib
import math
import sys
import types
import typing
from collections.abc import Callable, Hashable, Iterator
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar

import numpy as np

from purejax_bilevel.errors import UserError


class Settings(Protocol):
    """An instance of a class that `configuration` made: a group, or all settings of a program."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field]]


class RandomStart(Protocol):
    """Settings of a program whose members act at random before they learn."""

    @property
    def num_train_steps(self) -> int: ...

    @property
    def init_steps(self) -> int: ...


C = TypeVar("C", bound=Settings)
T = TypeVar("T")

is_quiet = False  # whether another process prints the warnings, which all have in common

RUN_LENGTH = ("num_train_steps", "T_max")  # static fields that a resumed run may raise
LARGEST_WHOLE = 2**31 - 1  # whole numbers have 32 bits in a compiled program
SMALLEST, LARGEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)


class Check(NamedTuple):
    """What a field allows: a sentence for people and a predicate."""

    allowed: str
    accepts: Callable[[Any], bool]


class Choices(Protocol):
    """The values of a field where they are more than a type can list: those registered, and what a user names."""

    @property
    def notation(self) -> str:
        """How `--help` writes them."""

    def describe(self, text: str) -> str:
        """The field's line in `--help`, with a word on each value."""

    def check(self, value: Any) -> None:
        """Raises UserError for a value that is none of them, naming the field and what is allowed."""


POSITIVE = Check("a finite number above 0", lambda x: math.isfinite(x) and x > 0)
NONNEGATIVE = Check("a finite number, 0 or above", lambda x: math.isfinite(x) and x >= 0)
FRACTION = Check("a number from 0 to 1", lambda x: 0 <= x <= 1)
FINITE = Check("a finite number", math.isfinite)
WHOLE = Check("a whole number", lambda x: math.isfinite(x) and x == int(x))


def at_least(minimum: int) -> Check:
    """Whole numbers from `minimum` upwards."""
    return Check(f"a whole number of at least {minimum}", lambda x: x == int(x) and x >= minimum)


def between(minimum: int, maximum: int) -> Check:
    """Whole numbers from one to another."""
    return Check(f"a whole number from {minimum} to {maximum}", lambda x: x == int(x) and minimum <= x <= maximum)


FEW = between(1, 1000)  # networks, layers: each is compiled by itself


def traced(
    default: Any,
    help: str,
    check: Check = FINITE,
    group: str = "training",
    maximum: str | None = None,
    task: bool = False,
) -> Any:
    """Declares a field that may differ between the members of one compiled program.

    Args:
        default: its value when nothing is said.
        help: one line for `--help`.
        check: what is allowed.
        group: heading in `--help`.
        maximum: name of the static field that receives the largest value among the members (array sizes).
        task: as of `static`.
    """
    metadata = {"traced": True, "help": help, "check": check, "group": group, "maximum": maximum, "task": task}
    return dataclasses.field(default=default, metadata=metadata)


def static(
    default: Any,
    help: str,
    check: Check | None = None,
    group: str = "training",
    hidden: bool = False,
    task: bool = False,
    choices: Choices | None = None,
    particular: bool = False,
    listed: bool = False,
) -> Any:
    """Declares a field that is the same for all members because it changes the program.

    Args:
        default: its value when nothing is said.
        help: one line for `--help`.
        check: what is allowed; None where the type says it all.
        group: heading in `--help`.
        hidden: not a command line flag.
        task: names what is to be solved (environment, dataset, level set): statistics go over its values, and none is
            chosen as the best setting.
        choices: the values allowed, where users may add some.
        particular: another value than the default is refused for agents that do not name the field in their settings.
        listed: a text of names with spaces between them, which the command line takes as words.
    """
    metadata = {"traced": False, "help": help, "check": check, "group": group, "hidden": hidden, "task": task}
    more = {"choices": choices, "particular": particular, "listed": listed}
    return dataclasses.field(default=default, metadata={**metadata, **more})


def changed(
    group: type,
    name: str,
    default: Any,
    help: str | None = None,
    check: Check | None = None,
    choices: Choices | None = None,
) -> Any:
    """A group's field declared anew for one program, with another default.

    Args:
        group: that declares it.
        name: of the field.
        default: its value when nothing is said.
        help: one line for `--help`; None: the group's.
        check: what is allowed; None: what the group allows.
        choices: the values allowed, where users may add some; None: the group's.
    """
    metadata = next(field.metadata for field in fields(group) if field.name == name)
    news = {"help": help, "check": check, "choices": choices}
    said = {entry: value for entry, value in news.items() if value is not None}
    return dataclasses.field(default=default, metadata={**metadata, **said})


@typing.dataclass_transform(frozen_default=True)
def configuration(cls: type[T]) -> type[T]:
    """Makes a frozen dataclass that is a pytree: traced fields are leaves, static fields are structure.

    Its method `program()` gives what is trained. It may have `resolved()`, the configuration with every default filled
    in and checked (else every field is checked by itself), and `title`, the heading of figures and name of runs (else
    the program's class).
    """
    cls = dataclasses.dataclass(frozen=True)(cls)
    if not hasattr(cls, "resolved"):
        cls.resolved = validate  # type: ignore[attr-defined]
    if not hasattr(cls, "title"):
        cls.title = property(lambda self: type(self.program()).__name__)  # type: ignore[attr-defined]
    names = {field.name: field.metadata["traced"] for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    leaves = [name for name, is_traced in names.items() if is_traced]
    structure = [name for name, is_traced in names.items() if not is_traced]
    try:
        import jax  # here alone
    except ImportError:  # declarations are read, and nothing is run, on machines without it
        return cls
    return jax.tree_util.register_dataclass(cls, data_fields=leaves, meta_fields=structure)


def replace(config: C, **changes: Any) -> C:
    """A copy with some fields changed."""
    return dataclasses.replace(config, **changes)


def fields(config: Settings | type[Settings], is_traced: bool | None = None) -> Iterator[dataclasses.Field]:
    """The declared fields of a configuration or its class, all or only the traced or static ones."""
    for field in dataclasses.fields(config):
        if is_traced is None or field.metadata["traced"] == is_traced:
            yield field


def values_of(value: Any) -> tuple:
    """The values a traced field was given: a list, tuple or 1-D array is an axis, anything else one value."""
    try:
        is_axis = (isinstance(value, list | tuple) or hasattr(value, "__array__")) and np.ndim(value) == 1
    except ValueError:  # lists of different lengths: no value either
        is_axis = False
    if is_axis:
        return tuple(element.item() if hasattr(element, "item") else element for element in value)
    return (value,)


def adapted_of(setting: str) -> str:
    """What the schedule of a setting that adapts itself is called in results."""
    return f"adapted_{setting}"


def validate(config: C, tuned: bool = True) -> C:
    """Checks every field and returns the configuration.

    Args:
        config: to be checked.
        tuned: whether fields without a default have been filled in; else they may be None.

    Raises:
        UserError: naming the field, its value and what is allowed.
    """
    hints = {name: _without_none(hint) for name, hint in typing.get_type_hints(type(config)).items()}
    for field in fields(config):
        given = getattr(config, field.name)
        if given is None and field.default is None and not tuned:
            continue
        values = values_of(given) if field.metadata["traced"] else (given,)
        if not values:
            raise UserError(f"--{field.name} needs at least one value.")
        for value in values:
            _check_value(field, hints[field.name], value)
        if len(set(values)) < len(values):
            raise UserError(f"--{field.name} was given the same value twice: {' '.join(map(str, values))}.")
        if field.metadata["traced"] and hints[field.name] is float and not getattr(config, "float64", False):
            _check_single_precision(field.name, values)
    return config


def _check_single_precision(name: str, values: tuple) -> None:
    """Members compute with 32 bits, in which a number may be infinite, 0 or another member's."""
    known: dict[float, Any] = {}
    for value in values:
        if math.isfinite(value) and value and not SMALLEST <= abs(value) <= LARGEST:
            raise UserError(
                f"--{name} must be a number that 32 bits can hold, of a size from {SMALLEST:.3g} to "
                f"{LARGEST:.3g}, got {value!r}."
            )
        other = known.setdefault(float(np.float32(value)), value)
        if other is not value:
            raise UserError(f"--{name} was given {other!r} and {value!r}, which are the same number in 32 bits.")


def _without_none(hint: Any) -> Any:
    remaining = [arg for arg in typing.get_args(hint) if arg is not type(None)]
    return remaining[0] if isinstance(hint, types.UnionType) and len(remaining) == 1 else hint


def _check_value(field: dataclasses.Field, hint: Any, value: Any) -> None:
    if field.metadata.get("choices") is not None:
        field.metadata["choices"].check(value)
        return
    choices = typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else None
    check = field.metadata["check"]
    if choices is not None:
        allowed, fine = f"one of {', '.join(map(str, choices))}", isinstance(value, Hashable) and value in choices
    elif hint is bool:
        allowed, fine = "True or False", isinstance(value, bool | np.bool_)
    elif hint in (int, float):
        check = check or FINITE
        numeric = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
        fine = numeric and (hint is float or _accepts(WHOLE, value)) and _accepts(check, value)
        allowed = check.allowed
        if fine and hint is int and abs(value) > LARGEST_WHOLE:
            allowed, fine = f"{allowed} and at most {LARGEST_WHOLE} (32 bits)", False
    else:
        of_kind = isinstance(value, str if hint is str else Hashable)
        allowed, fine = (check.allowed, of_kind and check.accepts(value)) if check else ("text", of_kind)
    if not fine:
        raise UserError(f"--{field.name} must be {allowed}, got {value!r}.")


def _accepts(check: Check, value: Any) -> bool:
    try:
        float(value)
        return check.accepts(value)
    except OverflowError:  # a whole number of more than 308 digits
        return False


def named_object(option: str, name: str, kind: str) -> Any:
    """What `module:attribute` names.

    Args:
        option: the field whose value the name is.
        name: `module:attribute`.
        kind: what the attribute should be, in a word.

    Raises:
        UserError: the module cannot be imported or has no such attribute.
    """
    path, _, attribute = name.partition(":")
    try:
        module = importlib.import_module(path) if path else None
    except UserError:
        raise
    except ImportError as error:
        raise UserError(
            f"--{option} {name}: the module {path} cannot be imported ({error}); install it or set PYTHONPATH."
        ) from error
    except Exception as error:  # whatever a stranger's code may raise
        raise UserError(f"--{option} {name}: the module {path} fails ({type(error).__name__}: {error}).") from error
    if not hasattr(module, attribute):
        raise UserError(f"--{option} {name}: the module {path!r} has no {kind} {attribute!r}.")
    return getattr(module, attribute)


@functools.cache
def warn(sentence: str) -> None:
    """Prints a warning on standard error, each sentence once, unless another process does."""
    if not is_quiet:
        print(f"warning: {sentence}", file=sys.stderr)


def warn_if_idle(config: RandomStart) -> None:
    """Says that nothing is learned where a run ends before its random start (`init_steps`) does."""
    if config.num_train_steps <= config.init_steps:
        warn(
            f"--num_train_steps {config.num_train_steps} is not above --init_steps {config.init_steps}, the random "
            "start: nothing will be learned."
        )


def to_dict(config: Settings) -> dict[str, Any]:
    """Plain Python values (lists where a field has several) for saving as YAML."""
    result = {}
    for field in fields(config):
        values = values_of(getattr(config, field.name))
        result[field.name] = list(values) if len(values) > 1 else values[0]
    return result


def from_dict(cls: type[C], saved: dict[str, Any]) -> C:
    """The inverse of `to_dict`.

    Raises:
        UserError: for a field the configuration does not have.
    """
    known = {field.name for field in fields(cls)}
    for name in saved:
        if name not in known:
            raise UserError(f"{cls.__name__} has no field {name!r}; it has {', '.join(sorted(known))}.")
    return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in saved.items()})

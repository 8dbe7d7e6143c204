"""Values of settings in a sweep file, checked by the declarations of the program's fields."""

import functools
import typing
from typing import Any

from purejax_bilevel import agents as agent_values
from purejax_bilevel.configuration import LARGEST_WHOLE, fields, replace, validate
from purejax_bilevel.errors import UserError
from purejax_bilevel.results.checks import (
    as_number,
    known_entries,
    text_of,
)


def settings_of(cls: type, given: Any, where: str) -> dict[str, Any]:
    """Values by field, in the fields' own types."""
    visible = [field.name for field in fields(cls) if not field.metadata.get("hidden")]
    mapping = known_entries(given, visible, where)
    return {name: _checked(cls, name, value) for name, value in mapping.items()}


def _checked(cls: type, name: str, value: Any) -> Any:
    """A value, or each of a list, as its field declares it; None is what fields without a default hold."""
    if isinstance(value, list | tuple):
        if not value:
            raise UserError(f"{name} needs at least one value.")
        if any(isinstance(entry, list | tuple) for entry in value):
            raise UserError(f"{name} must be a value or a list of values, got {value!r}.")
        return [checked_value(cls, name, entry) for entry in value]
    default = next(field.default for field in fields(cls) if field.name == name)
    return None if value is None and default is None else checked_value(cls, name, value)


def checked_value(cls: type, name: str, value: Any) -> Any:
    """A value in its field's own type.

    Raises:
        UserError: the field does not allow it.
    """
    value = _typed(cls, name, value)
    if typing.get_type_hints(cls)[name] is str and value != "":  # `validate` leaves texts to the program
        text_of(value, name)
    elif isinstance(value, int) and abs(value) > LARGEST_WHOLE:
        raise UserError(f"{name} must fit 32 bits, got {value}.")
    validate(replace(_valid(cls), **{name: value}))
    return value


@functools.cache
def _valid(cls: type) -> Any:
    """Some configuration in which everything is allowed, to check single values in."""
    try:
        return cls().resolved()
    except UserError:  # it needs what only a user has, such as a dataset
        known = agent_values.registry(cls)
        return cls() if known is None else known.tuned(cls())


def _typed(cls: type, name: str, value: Any) -> Any:
    hint = typing.get_type_hints(cls)[name]
    kinds = {hint, *typing.get_args(hint)}
    if name == agent_values.FIELD and isinstance(value, str):
        return agent_values.spelled(value)
    if isinstance(value, bool) or not kinds & {int, float}:
        return value
    found = as_number(value)
    if isinstance(found, float) and float not in kinds and found.is_integer():
        return int(found)
    return float(found) if isinstance(found, int) and float in kinds else found


def distinct(name: str, value: Any) -> list:
    """The values of a list, or a single one; none may be there twice."""
    values = value if isinstance(value, list) else [value]
    if len({repr(entry) for entry in values}) < len(values):
        raise UserError(f"{name} was given the same value twice: {', '.join(map(str, values))}.")
    return values

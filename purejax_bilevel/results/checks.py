"""Checks of what files say: whatever is wrong is one sentence that names the place, the value and what is allowed."""

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml

from purejax_bilevel.errors import UserError

MOST = 1_000_000  # seeds, settings or generations


def load_yaml(text: str, where: str) -> Any:
    """The plain content of YAML text.

    Args:
        text: to be read.
        where: what the text is, for messages.

    Raises:
        UserError: it is not YAML, states a key twice or contains itself.
    """
    try:
        return plain_copy(yaml.load(text, _UniqueKeys))
    except RecursionError as error:
        raise UserError(f"{where} contains itself or is nested too deeply.") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date or a number that cannot be
        raise UserError(f"{where} is not YAML: {' '.join(str(error).split())}.") from error


class _UniqueKeys(yaml.SafeLoader):
    """YAML lets the last of several equal keys win, silently."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict:
        stated: set[tuple[str, str]] = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if (key.tag, str(key.value)) in stated:
                problem = f"the key {key.value!r} is stated twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            stated.add((key.tag, str(key.value)))
        return super().construct_mapping(node, deep)


def plain_copy(value: Any) -> Any:
    """Mappings and lists of their own, all the way down."""
    if isinstance(value, Mapping):
        return {key: plain_copy(entry) for key, entry in value.items()}
    return [plain_copy(entry) for entry in value] if isinstance(value, list | tuple) else value


def mapping_of(value: Any, where: str) -> dict[str, Any]:
    """A mapping from names to values; nothing is an empty one."""
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise UserError(f"{where} must be a mapping from names to values, got {value!r}.")
    return dict(value)


def known_entries(value: Any, allowed: Iterable[str], where: str) -> dict[str, Any]:
    """A mapping that has no other entries than these."""
    mapping, allowed = mapping_of(value, where), tuple(allowed)
    for key in mapping:
        if key not in allowed:
            raise UserError(f"{where} has no entry {key!r}; it may have {', '.join(allowed)}.")
    return mapping


def choice(value: Any, allowed: Sequence[str], where: str) -> str:
    """One of the allowed words."""
    if value not in allowed:
        raise UserError(f"{where} must be one of {', '.join(allowed)}, got {value!r}.")
    return value


def whole(value: Any, least: int, where: str, most: int = MOST) -> int:
    """A whole number in a range."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UserError(f"{where} must be a whole number of at least {least}, got {value!r}.")
    if value > most:
        raise UserError(f"{where} must be at most {most}, got {value}.")
    return value


def text_of(value: Any, where: str) -> str:
    """Text that is not empty."""
    if not isinstance(value, str) or not value:
        raise UserError(f"{where} must be text, got {value!r}.")
    return value


def number_of(value: Any, where: str) -> float:
    """A finite number, also one that YAML reads as text."""
    found = as_number(value)
    if isinstance(value, bool) or not isinstance(found, int | float) or not math.isfinite(found):
        raise UserError(f"{where} must be a finite number, got {value!r}.")
    return found


def as_number(value: Any) -> Any:
    """YAML 1.1 reads 1e-3 as text; whole numbers may be too large for a float."""
    if isinstance(value, int) and abs(value) > sys.float_info.max:
        return math.inf if value > 0 else -math.inf
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value

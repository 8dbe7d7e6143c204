"""Changes of a sweep file that a command line asks for."""

from collections.abc import Mapping
from typing import Any

from purejax_bilevel.configuration import fields
from purejax_bilevel.errors import UserError
from purejax_bilevel.results.checks import (
    plain_copy,
)
from purejax_bilevel.studies.study import PROGRAM, config_class, parse, programs_of


def override(description: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Applies `field=value` to the content of a sweep file.

    A value takes the place of the one that the file states, be it in the settings, an axis or an agent; a field that it
    does not state becomes a setting of all agents. `agents` chooses agents; `search.x`, `report.x` and `seeds.x` change
    these sections.

    Raises:
        UserError: no such field, one that varies together with others, or the content itself is wrong.
    """
    parse(description)
    result = {key: plain_copy(value) for key, value in description.items()}
    programs = set(programs_of(result).values()) or {result[PROGRAM]}
    known = {field.name for program in programs for field in fields(config_class(program))}
    for name, value in changes.items():
        section, _, entry = name.partition(".")
        if entry and section in ("search", "report", "seeds"):
            before = result.get(section) or {}
            before = {"count": before} if section == "seeds" and isinstance(before, int) else before
            result[section] = {**before, entry: value}
        elif name == "agents":
            result["agents"] = _chosen_agents(result.get("agents"), value)
        elif name in known:
            _override_field(result, name, value)
        else:
            raise UserError(f"{name}={value!r} is no setting of the program {', '.join(sorted(programs))}.")
    return result


def _chosen_agents(given: Any, chosen: Any) -> dict[str, Any]:
    stated = {label: {} for label in given} if isinstance(given, list) else dict(given or {})
    labels = [str(label) for label in (chosen if isinstance(chosen, list) else [chosen])]
    return {label: stated.get(label, {}) for label in labels}


def _override_field(description: dict[str, Any], name: str, value: Any) -> None:
    stated = False
    for axes in description.get("axes") or []:
        for kind, content in (axes or {}).items():
            if name not in (content or {}):
                continue
            if kind != "grid":
                raise UserError(
                    f"{name} varies together with others ({kind}) in this sweep: edit the sweep file instead."
                )
            stated = True
            if isinstance(value, list):
                content[name] = value
            else:
                del content[name]
                description["settings"] = {**(description.get("settings") or {}), name: value}
    description["axes"] = [axes for axes in description.get("axes") or [] if axes and any(axes.values())]
    agents = description.get("agents")
    for own in agents.values() if isinstance(agents, dict) else []:
        if own and name in own:
            own[name], stated = value, True
    if not stated or name in (description.get("settings") or {}):
        description["settings"] = {**(description.get("settings") or {}), name: value}

"""Agents are values: each owns its name, its functions, its tuned values and the settings that it has a use for.

A program has a registry of them, from which come the choices of `--agent_type`, their words in `--help`, the tuned
values and the refusals. Nothing else lists names. An agent of your own is one value in a file of your own:

    MINE = Agent("mine", "what it does", step=my_step, init=my_init, defaults={"lr": 1e-3}, settings=("num_T_steps",))

`--agent_type mypackage.mine:MINE` loads it, on every command line and in sweep files; in Python so does
`agent_type="mypackage.mine:MINE"`, or `AGENTS.register(MINE)` and then `agent_type="mine"`.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Generic, Protocol, TypeVar

from purejax_bilevel.configuration import Settings, fields, named_object, replace, validate
from purejax_bilevel.errors import UserError

FIELD = "agent_type"
NAME = re.compile(r"[a-z0-9_]+")


@dataclasses.dataclass(frozen=True)
class Agent:
    """What one agent of a program is; each program has a subclass that says what its functions get.

    Args:
        name: for `agent_type`; lower-case letters, digits and underscores.
        text: what it does, for `--help`.
        step: one step of the agent.
        init: what it has learned before its first step.
        defaults: tuned values of fields whose own default is None.
        settings: fields that only some agents have a use for, this one among them.
        adaptable: fields that hypergradients of the validation loss can adapt (`--adapt`), and the fewest updates
            through which they reach it.
    """

    name: str
    text: str
    step: Callable[..., Any]
    init: Callable[..., Any]
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    settings: Sequence[str] = ()
    adaptable: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise UserError(
                f"the name of an agent must have lower-case letters, digits and underscores alone, got {self.name!r}."
            )


@dataclasses.dataclass(frozen=True)
class Alias:
    """Another name for an agent with some settings.

    Args:
        name: for `agent_type`.
        agent: the name of the agent meant.
        settings: values of fields that are left at their default.
    """

    name: str
    agent: str
    settings: Mapping[str, Any]

    @property
    def text(self) -> str:
        """What it means, for `--help`."""
        return " ".join([f"{self.agent} with", *(f"--{name} {value}" for name, value in self.settings.items())])


A = TypeVar("A", bound=Agent)


class OfAgent(Settings, Protocol):
    """Settings that name an agent."""

    @property
    def agent_type(self) -> str: ...


C = TypeVar("C", bound=OfAgent)


def spelled(name: str) -> str:
    """A name as registries have it: case does not matter, except in `module:attribute`."""
    return name if ":" in name else name.lower()


class Agents(Generic[A]):
    """The agents of a program, its own and users'; iteration gives their names, without aliases.

    Args:
        kind: the class of agent that the program can train.
        entries: its own agents and aliases, in the order of `--help`.
    """

    def __init__(self, kind: type[A], entries: Sequence[A | Alias]):
        self._kind = kind
        self._agents: dict[str, A] = {entry.name: entry for entry in entries if isinstance(entry, kind)}
        self._aliases = {entry.name: entry for entry in entries if isinstance(entry, Alias)}
        self._names = [entry.name for entry in entries]
        self._reserved = frozenset(self._names)

    def register(self, agent: A) -> None:
        """Adds an agent of your own; one that was registered under its name before is replaced.

        Raises:
            UserError: it is no agent of this program, or has the name of one of the program's own.
        """
        self._check_kind(agent, f"agents.register: {agent!r}")
        if agent.name in self._reserved:
            raise UserError(f"agents.register: {agent.name} is an agent already; choose another name.")
        self._add(agent.name, agent)

    def _add(self, name: str, agent: A) -> None:
        self._agents[name] = agent
        if name not in self._names:
            self._names.append(name)

    def _check_kind(self, agent: Any, what: str) -> None:
        if not isinstance(agent, self._kind):
            raise UserError(f"{what} must be a {self._kind.__module__}.{self._kind.__qualname__}.")

    # --- looking up ---------------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[str]:
        return iter(self._agents)

    def __len__(self) -> int:
        return len(self._agents)

    def __getitem__(self, name: str) -> A:
        """The agent of that name, or the one that `module:attribute` names.

        Raises:
            UserError: there is none.
        """
        if not isinstance(name, str) or (name not in self._names and ":" not in name):
            raise UserError(f"--{FIELD} must be one of {', '.join(self._names)}, or module:agent, got {name!r}.")
        if name not in self._names:
            agent = named_object(FIELD, name, "agent")
            self._check_kind(agent, f"--{FIELD} {name}")
            self._add(name, agent)
        return self._agents[self._aliases[name].agent if name in self._aliases else name]

    def __contains__(self, name: object) -> bool:
        try:
            return isinstance(name, str) and bool(self[name])
        except UserError:
            return False

    # --- as the choices of a field ------------------------------------------------------------------------------------

    @property
    def notation(self) -> str:
        """How `--help` writes the choices."""
        return f"{{{','.join(self._names)},MODULE:AGENT}}"

    def describe(self, text: str) -> str:
        """The field's line in `--help`, with a word on every agent."""
        entries: dict[str, A | Alias] = {**self._agents, **self._aliases}
        return f"{text}. " + "; ".join(f"{name}: {entries[name].text}" for name in self._names)

    def check(self, value: Any) -> None:
        """Raises UserError for a value that names no agent."""
        self[value]

    def users(self, setting: str) -> list[str]:
        """The agents that have a use for a setting, if it is one that only some have."""
        return [name for name, agent in self._agents.items() if setting in agent.settings]

    # --- what an agent says about a configuration ---------------------------------------------------------------------

    def tuned(self, config: C) -> C:
        """The configuration with an alias spelled out and the agent's tuned values where none are given.

        Raises:
            UserError: there is no such agent, it names a field that the configuration has not, or has no value for
                one that agents tune; or a value that is given is not allowed.
        """
        self.check(config.agent_type)
        config = self._without_alias(validate(config, tuned=False))
        name = config.agent_type
        agent = self[name]
        declared = {field.name: field.default for field in fields(config)}
        tunable = [field for field, default in declared.items() if default is None]
        _check_named(name, "defaults", agent.defaults, tunable)
        _check_named(name, "settings", agent.settings, list(declared))
        empty = [field for field in tunable if getattr(config, field) is None]
        for field in empty:
            if field not in agent.defaults and any(field in other.defaults for other in self._agents.values()):
                raise UserError(f"--{field} must be given: the agent {name} has no default for it.")
        return replace(config, **{field: agent.defaults[field] for field in empty if field in agent.defaults})

    def _without_alias(self, config: C) -> C:
        alias = self._aliases.get(config.agent_type)
        if alias is None:
            return config
        declared = {field.name: field.default for field in fields(config)}
        unset = {name: value for name, value in alias.settings.items() if getattr(config, name) == declared[name]}
        return replace(config, **{FIELD: alias.agent, **unset})

    def check_settings(self, config: OfAgent) -> None:
        """Refuses settings that the agent has no use for, where that would be mistaken for an experiment.

        Raises:
            UserError: naming the setting, its value and the agents that it is for.
        """
        name = config.agent_type
        agent = self[name]
        for field in fields(config, is_traced=False):
            value = getattr(config, field.name)
            if not field.metadata["particular"] or field.name in agent.settings:
                continue
            if value != agent.defaults.get(field.name, field.default):
                given = field.name if value is True else f"{field.name} {value}"
                raise UserError(f"--{given} is for --{FIELD} {', '.join(self.users(field.name))}, not {name}.")


def _check_named(name: str, what: str, named: Sequence[str] | Mapping[str, Any], known: Sequence[str]) -> None:
    for entry in named:
        if entry not in known:
            raise UserError(f"the agent {name}: {what} must be among {', '.join(known) or 'none'}, got {entry!r}.")


def registry(config_class: type) -> Agents | None:
    """The agents of the program that a configuration is of; None where it does not say."""
    return next((field.metadata.get("choices") for field in fields(config_class) if field.name == FIELD), None)


def explain(config_class: type) -> dict[str, str]:
    """Each field's line in `--help`: its own, and what the agents say about it."""
    lines = {field.name: field.metadata["help"] for field in fields(config_class)}
    choices = registry(config_class)
    if choices is None:
        return lines
    users = {name: choices.users(name) for name in lines}
    lines = {name: f"{line}; for {', '.join(users[name])}" if users[name] else line for name, line in lines.items()}
    return {**lines, FIELD: choices.describe(lines[FIELD])}

"""Sweep files: which program, agents, settings and seeds, how to search, and how the best setting is chosen.

    name: capacity
    program: rl                          # rl (discrete actions), continuous, regression, tabular or module:Config
    settings: {num_train_steps: 25000}   # fields of the program's configuration, for all agents
    agents:                              # label: own settings; agent_type is the label unless it is given
      omd: {}
      omd with CG: {agent_type: omd, with_inv_jac: cg}
    axes:
      - grid: {model_hidden_dim: [2, 8, 32]}                       # every combination
      - zip: {lr: [1e-3, 3e-4], inner_lr: [3e-4, 1e-4]}            # first with first, second with second
      - random: {count: 16, seed: 0, tau: [1e-3, 1e-1]}            # log-uniform; {low, high, scale: linear} otherwise
    seeds: {first: 0, count: 8, select: 4}                         # best settings are chosen on the first 4
    search: {method: grid}               # see Search
    report: {variable: final_return}     # see Reporting in results/analysis.py

Agents of several programs are compared by an own `program` each; settings and axes then go to those that have the
field, and each program is one compiled call with its own steps. A program of your own is `module:Config`.

A list in `settings` or in an agent's own settings is a grid axis too, there of that agent alone. Values that are leaves
of the configuration become members of one sub-program; values that change the program become sub-programs of their own.
An agent of your own is `module:agent`, as a label or as `agent_type`. README.md in this folder says it
all at length.
"""

import dataclasses
import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from purejax_bilevel import agents as agent_values
from purejax_bilevel.configuration import LARGEST_WHOLE, fields, named_object
from purejax_bilevel.errors import UserError
from purejax_bilevel.members import Axis
from purejax_bilevel.programs import REGISTRY
from purejax_bilevel.results.analysis import Reporting, reporting
from purejax_bilevel.results.checks import (
    MOST,
    choice,
    known_entries,
    load_yaml,
    mapping_of,
    number_of,
    whole,
)
from purejax_bilevel.runtime.loop import make_seeds
from purejax_bilevel.studies.intervals import intervals, random_axis
from purejax_bilevel.studies.values import distinct, settings_of

PROGRAM = "program"
METHODS = ("grid", "random", "es", "pbt")  # of searching
LEAST = 4  # individuals of pbt
SECTIONS = ("name", PROGRAM, "settings", "agents", "axes", "seeds", "search", "report")


# ---------------------------------------------------------------- what a sweep file says


@dataclasses.dataclass(frozen=True)
class Seeds:
    """Seeds first, first + 1, ...; the first `select` choose settings, the others are reported.

    Without `select` it is half of them where there is something to choose.
    """

    first: int = 0
    count: int = 4
    select: int | None = None


@dataclasses.dataclass(frozen=True)
class Search:
    """How settings are found.

    Args:
        method: grid (the axes as they are), random (log-uniform settings), es (evolution strategy) or pbt
            (population-based training).
        space: name to [low, high] or {low, high, scale}; by default from the smallest to the largest value of every
            axis of numbers.
        samples: settings drawn by random.
        population: settings per generation of es, individuals of pbt.
        generations: of es.
        algorithm: of es: cma_es or open_es.
        halving: how often the worse half of the settings is stopped early (grid, random).
        finalists: most settings that es and halving run again on the seeds that are reported.
        interval: steps between two trials of pbt; 0: as between evaluations.
        fraction: share of pbt's individuals that is replaced, and that it is replaced by.
        factors: pbt multiplies a setting that it copies by one of these.
        resample: probability that it draws one anew instead.
        seed: of the search itself (pbt: that of the member instead).
    """

    method: str = "grid"
    space: dict[str, Any] = dataclasses.field(default_factory=dict)
    samples: int = 16
    population: int = 8
    generations: int = 5
    algorithm: str = "cma_es"
    halving: int = 0
    finalists: int = 3
    interval: int = 0
    fraction: float = 0.2
    factors: Sequence[float] = (0.8, 1.2)
    resample: float = 0.25
    seed: int = 0

    @property
    def in_rounds(self) -> bool:
        """Whether the compiled program is called several times, with other members."""
        return self.method == "es" or self.halving > 0


@dataclasses.dataclass(frozen=True)
class Study:
    """A sweep file, read and checked."""

    name: str
    program: str
    settings: dict[str, Any]
    agents: dict[str, dict[str, Any]]
    axes: tuple[Axis, ...]
    seeds: Seeds
    search: Search
    report: Reporting
    description: dict[str, Any]  # what `parse` was given
    families: tuple["Study", ...] = ()  # where agents have several programs: a study of each, and no settings here

    @property
    def by_program(self) -> tuple["Study", ...]:
        """A study of each program."""
        return self.families or (self,)

    @property
    def config_class(self) -> type:
        return config_class(self.program)

    @property
    def all_seeds(self) -> tuple[int, ...]:
        return make_seeds(self.seeds.first, self.seeds.count)


def config_class(program: str) -> type:
    """Configuration of a program by its name in sweep files, or by `module:Config`."""
    if ":" not in program:
        return importlib.import_module(REGISTRY[program]).Config
    found = named_object("program", program, "configuration")
    if not (isinstance(found, type) and dataclasses.is_dataclass(found) and hasattr(found, "program")):
        raise UserError(f"program: {program} is no configuration with a method `program`.")
    return found


def program_name(value: Any, where: str = "program") -> str:
    """Checks the name of a program.

    Raises:
        UserError: there is none of that name.
    """
    if isinstance(value, str) and ":" in value:
        config_class(value)
        return value
    if not isinstance(value, str) or value not in REGISTRY:
        raise UserError(f"{where} must be one of {', '.join(REGISTRY)}, or module:Config, got {value!r}.")
    return value


def read(path: str | Path) -> dict[str, Any]:
    """The plain content of a sweep file, or of the config.yaml in a sweep's folder.

    Raises:
        UserError: there is no such file, it is not YAML or of a run.
    """
    path = Path(path)
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the sweep file {path}: {getattr(error, 'strerror', None) or error}.") from error
    content = mapping_of(load_yaml(text, f"{path}"), f"{path}")
    if "config" in content and "run" in content:
        raise UserError(f"{path} describes a run, not a sweep: go on with it by --resume of its script.")
    return {"name": path.stem, **mapping_of(content.get("sweep", content), f"{path}")}


def parse(description: Mapping[str, Any]) -> Study:
    """Checks the content of a sweep file.

    Raises:
        UserError: an unknown entry or a value that is not allowed, in one sentence.
    """
    given = known_entries(description, SECTIONS, "a sweep file")
    programs = programs_of(given)
    if len(set(programs.values())) > 1:
        return _families(given, programs)
    program = next(iter(programs.values())) if programs else program_name(given.get("program"))
    cls = config_class(program)
    settings = settings_of(cls, given.get("settings"), "settings")
    agents = _agents(cls, given.get("agents"), settings)
    axes = _axes(cls, given.get("axes"))
    swept = [name for axis in axes for name in axis.names]
    for name in swept:
        if swept.count(name) > 1:
            raise UserError(f"axes: {name} is in two axes.")
        if name in settings:
            raise UserError(f"{name} is both in settings and in axes; keep one.")
    seeds = _seeds(given.get("seeds"))
    search = _search(cls, given.get("search"))
    if not isinstance(given.get("name", "sweep"), str):
        raise UserError(f"name must be text, got {given['name']!r}.")
    report = reporting(given.get("report"))
    name = given.get("name", "sweep")
    return Study(name, program, settings, agents, axes, seeds, search, report, dict(description))


def programs_of(given: Mapping[str, Any]) -> dict[str, str]:
    """The program of each agent, where agents are listed with settings of their own."""
    agents = given.get("agents")
    if not isinstance(agents, dict):
        return {}
    stated = {label: own[PROGRAM] for label, own in agents.items() if isinstance(own, dict) and PROGRAM in own}
    if not stated:
        return {}
    return {label: program_name(stated.get(label, given.get(PROGRAM)), f"agents: {label}: program") for label in agents}


def _families(given: Mapping[str, Any], programs: dict[str, str]) -> Study:
    """A study of agents of several programs: one study of each, with the settings and axes that it has."""
    known = {program: {field.name for field in fields(config_class(program))} for program in programs.values()}
    settings, axes = mapping_of(given.get("settings"), "settings"), given.get("axes") or []
    for name in settings:
        if not any(name in names for names in known.values()):
            raise UserError(f"settings has no entry {name!r}: none of the programs {', '.join(known)} has it.")
    families = []
    for program, names in known.items():
        own = {label: given["agents"][label] for label, its in programs.items() if its == program}
        part = {
            **given,
            PROGRAM: program,
            "agents": own,
            "settings": {name: value for name, value in settings.items() if name in names},
            "axes": _axes_of(axes, names),
        }
        families.append(parse(part))
    first = families[0]
    if first.search.in_rounds:
        raise UserError("search: es and halving search settings of one program; give agents of one.")
    agents = {label: own for family in families for label, own in family.agents.items()}
    return dataclasses.replace(
        first,
        settings={},
        agents={label: agents[label] for label in programs},
        axes=(),
        description=dict(given),
        families=tuple(families),
    )


def _axes_of(axes: Any, known: set[str]) -> Any:
    """The axes of fields that a program has; what varies together stays together."""
    if not isinstance(axes, list) or not all(isinstance(entry, dict) for entry in axes):
        return axes
    own = []
    for entry in axes:
        for kind, content in entry.items():
            names = set(content) - {"count", "seed"} if isinstance(content, dict) else set()
            if kind == "grid" and isinstance(content, dict):
                content = {name: values for name, values in content.items() if name in known}
                names = set(content)
            if names and names <= known:
                own.append({kind: content})
    return own


# ---------------------------------------------------------------- checks of a sweep file


def _agents(cls: type, given: Any, settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    if given is None:
        default = next((field.default for field in fields(cls) if field.name == agent_values.FIELD), "agent")
        given = [settings.get(agent_values.FIELD, default)]
    if isinstance(given, list) and all(isinstance(label, str) for label in given):
        distinct("agents", given)
        given = {label: {} for label in given}
    agents = {}
    named = any(field.name == agent_values.FIELD for field in fields(cls))  # else a label is nothing but a label
    for label, own in mapping_of(given, "agents").items():
        own = {name: value for name, value in mapping_of(own, f"agents: {label}").items() if name != PROGRAM}
        stated = settings_of(cls, own, f"agents: {label}")
        agents[label] = {agent_values.FIELD: agent_values.spelled(label), **stated} if named else stated
    if not agents:
        raise UserError("agents must name at least one agent.")
    if isinstance(settings.get("agent_type"), list):
        raise UserError("agent_type belongs in agents, one entry each, not in settings.")
    return agents


def _axes(cls: type, given: Any) -> tuple[Axis, ...]:
    if not isinstance(given, list | None):
        raise UserError(f"axes must be a list of grid, zip and random entries, got {given!r}.")
    axes: list[Axis] = []
    for entry in given or []:
        entry = known_entries(entry, ("grid", "zip", "random"), "an entry of axes")
        for kind, content in entry.items():
            axes.extend({"grid": _grid_axes, "zip": _zip_axes, "random": _random_axes}[kind](cls, content))
    return tuple(axes)


def _grid_axes(cls: type, content: Any) -> list[Axis]:
    values = settings_of(cls, content, "axes: grid")
    return [Axis((name,), tuple((value,) for value in distinct(name, value))) for name, value in values.items()]


def _zip_axes(cls: type, content: Any) -> list[Axis]:
    values = settings_of(cls, content, "axes: zip")
    columns = [value if isinstance(value, list) else [value] for value in values.values()]
    lengths = [len(column) for column in columns]
    if len(set(lengths)) != 1:
        counts = ", ".join(f"{name} {length}" for name, length in zip(values, lengths, strict=True))
        raise UserError(f"axes: zip needs lists of one length, got {counts or 'none'}.")
    return [Axis(tuple(values), tuple(zip(*columns, strict=True)))]


def _random_axes(cls: type, content: Any) -> list[Axis]:
    mapping = mapping_of(content, "axes: random")
    count = whole(mapping.pop("count", None), 1, "axes: random: count")
    seed = whole(mapping.pop("seed", 0), 0, "axes: random: seed", LARGEST_WHOLE)
    space = intervals(cls, mapping, "axes: random")
    if not space:
        raise UserError("axes: random needs at least one name with [low, high].")
    return [random_axis(space, count, seed)]


def _seeds(given: Any) -> Seeds:
    if isinstance(given, int) and not isinstance(given, bool):
        given = {"count": given}
    values = known_entries(given, [field.name for field in dataclasses.fields(Seeds)], "seeds")
    seeds = Seeds(**values)
    whole(seeds.first, 0, "seeds: first", 2**32)
    whole(seeds.count, 1, "seeds: count")
    make_seeds(seeds.first, seeds.count)
    if seeds.select is not None:
        whole(seeds.select, 1, "seeds: select")
        if seeds.select >= seeds.count:
            raise UserError(
                f"seeds: select must leave a seed to report: less than the count {seeds.count}, got {seeds.select}."
            )
    return seeds


def _search(cls: type, given: Any) -> Search:
    values = known_entries(given, [field.name for field in dataclasses.fields(Search)], "search")
    search = Search(**{**values, "space": mapping_of(values.get("space"), "search: space")})
    choice(search.method, METHODS, "search: method")
    choice(search.algorithm, ("cma_es", "open_es"), "search: algorithm")
    for name, least, most in (
        ("samples", 1, MOST),
        ("population", 3, MOST),
        ("generations", 1, MOST),
        ("halving", 0, 30),
        ("finalists", 1, MOST),
        ("interval", 0, LARGEST_WHOLE),
        ("seed", 0, LARGEST_WHOLE),
    ):
        whole(getattr(search, name), least, f"search: {name}", most)
    if search.algorithm == "open_es" and search.population % 2:
        raise UserError(f"search: population must be even for open_es, got {search.population}.")
    if search.method in ("es", "pbt") and search.halving:
        raise UserError(f"halving goes with the search methods grid and random, not with {search.method}.")
    intervals(cls, search.space, "search: space")
    return _with_numbers(search)


def _with_numbers(search: Search) -> Search:
    """Checks what pbt alone has."""
    if search.method == "pbt" and search.population < LEAST:
        raise UserError(f"search: population must be at least {LEAST} for pbt, got {search.population}.")
    fraction, resample = (number_of(getattr(search, name), f"search: {name}") for name in ("fraction", "resample"))
    if not 0 < fraction <= 0.5:
        raise UserError(f"search: fraction must be above 0 and at most 0.5, got {search.fraction!r}.")
    if not 0 <= resample <= 1:
        raise UserError(f"search: resample must be a probability from 0 to 1, got {search.resample!r}.")
    given = search.factors if isinstance(search.factors, list | tuple) else [search.factors]
    factors = tuple(number_of(factor, "search: factors") for factor in given)
    if not factors or min(factors) <= 0:
        raise UserError(f"search: factors must be numbers above 0, got {search.factors!r}.")
    return dataclasses.replace(search, fraction=fraction, resample=resample, factors=factors)

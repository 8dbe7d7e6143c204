"""The plan of a study: its agents with all their settings, and the sub-programs that run them.

Values that are leaves of a configuration become members of one sub-program; values that change the program make
sub-programs of their own.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from purejax_bilevel.configuration import fields, replace, validate
from purejax_bilevel.errors import UserError
from purejax_bilevel.members import Axis, Grid, batch_config, format_value
from purejax_bilevel.program import Configuration, Part, Program
from purejax_bilevel.runtime.schedule import StageSchedule
from purejax_bilevel.studies.intervals import Interval, intervals, random_axis
from purejax_bilevel.studies.population_based import PopulationBased, Selection
from purejax_bilevel.studies.study import Search, Study
from purejax_bilevel.studies.values import distinct


@dataclasses.dataclass(frozen=True)
class Template:
    """One sub-program of an agent, before its members are known.

    Args:
        label: the agent, and what tells this sub-program from its others.
        config: resolved configuration with one value per field.
        static: swept values that made it a sub-program of its own.
        settings: swept values of its members, one entry per setting.
        selection: how its members, populations then, adapt settings (`population_based.py`).
    """

    label: str
    config: Configuration
    static: dict[str, Any]
    settings: tuple[dict[str, Any], ...]
    selection: Selection | None = None

    def program(self, config: Configuration | None = None) -> Program:
        """What its members train, with the array sizes of their configuration."""
        config = config or self.config
        return config.program() if self.selection is None else PopulationBased(config.program(), config, self.selection)

    def part(self, grid: Grid, program: Program | None = None) -> Part:
        """The sub-program with the members of a grid over traced values."""
        batched = batch_config(self.config, grid)
        return Part(program or self.program(batched), batched, grid, self.label)


@dataclasses.dataclass(frozen=True)
class SweptAgent:
    """All settings and seeds of one agent, and the sub-programs that run them.

    Args:
        label: its name in the sweep file.
        grid: every setting and seed, as the results are labelled.
        templates: its sub-programs.
        settings_of: per sub-program the numbers of its settings in `grid`.
        space: what an evolution strategy or a population varies.
    """

    label: str
    grid: Grid
    templates: tuple[Template, ...]
    settings_of: tuple[np.ndarray, ...]
    space: tuple[Interval, ...] = ()

    @property
    def num_settings(self) -> int:
        return len(self.grid) // len(self.grid.seeds)

    def parts(self) -> list[Part]:
        """Its sub-programs with all their members."""
        if len(self.templates) == 1:
            return [self.templates[0].part(self.grid)]
        return [template.part(listed_grid(template.settings, self.grid.seeds)) for template in self.templates]

    def gather(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        """Arrays of the sub-programs, `[members of each, ...]`, as one of all members of `grid`.

        Where sub-programs measure different lengths, shorter ones are filled with NaN.
        """
        if len(arrays) == 1:
            return arrays[0]
        seeds = len(self.grid.seeds)
        shape = np.max([array.shape[1:] for array in arrays], axis=0).astype(int)
        floating = arrays[0].dtype.kind == "f"
        merged = np.full((len(self.grid), *shape), np.nan if floating else 0, arrays[0].dtype)
        for settings, array in zip(self.settings_of, arrays, strict=True):
            members = (settings[:, None] * seeds + np.arange(seeds)).reshape(-1)
            inside: tuple = (members, *(slice(0, length) for length in array.shape[1:]))
            merged[inside] = array
        return merged


def listed_grid(settings: Sequence[dict[str, Any]], seeds: tuple[int, ...]) -> Grid:
    """Settings one by one, all with the same names, times seeds."""
    names = tuple(settings[0])
    if not names:
        return Grid((), seeds)
    return Grid((Axis(names, tuple(tuple(setting[name] for name in names) for setting in settings)),), seeds)


def make_agents(study: Study) -> list[SweptAgent]:
    """The agents of a study with all their settings.

    Raises:
        UserError: a value that is not allowed, or agents that cannot run in one program.
    """
    if study.families:
        made = {agent.label: agent for family in study.families for agent in make_agents(family)}
        _check_tasks(study, list(made.values()))
        return [made[label] for label in study.agents]
    agents = [_make_agent(study, label) for label in study.agents]
    _check_tasks(study, agents)
    schedules = [StageSchedule.of(template.program()) for agent in agents for template in agent.templates]
    for name, words in (("names", "stages"), ("lengths", "number of steps"), ("eval_every", "eval_frequency")):
        found = [" + ".join(map(str, values)) for values in sorted({getattr(schedule, name) for schedule in schedules})]
        if len(found) > 1:
            raise UserError(f"all agents and settings of a sweep need the same {words}, got {', '.join(found)}.")
    if study.search.halving and len(schedules[0].names) > 1:
        stages = " and ".join(schedules[0].names)
        raise UserError(f"halving compares settings within one stage, and this program has {stages}: use es or random.")
    return agents


def _check_tasks(study: Study, agents: Sequence[SweptAgent]) -> None:
    """Scores are compared task by task."""
    declared = [field for family in study.by_program for field in fields(family.config_class)]
    for name in dict.fromkeys(field.name for field in declared if field.metadata.get("task")):
        axes = [[axis for axis in agent.grid.axes if name in axis.names] for agent in agents]
        values = {
            agent.label: [value for axis in own for value in axis.values]
            for agent, own in zip(agents, axes, strict=True)
        }
        if any(len(axis.names) > 1 for own in axes for axis in own):
            raise UserError(f"axes: {name} says what is solved and is no setting: give it in grid, not in zip.")
        if any(values.values()) and study.search.in_rounds:
            raise UserError(f"search: es and halving compare settings on one {name}; give one, not an axis.")
        if len({repr(listed) for listed in values.values()}) > 1:
            raise UserError(f"{name}: agents that are compared need the same ones, in the same order.")


def _make_agent(study: Study, label: str) -> SweptAgent:
    cls, own = study.config_class, study.agents[label]
    single, axes = _values_and_axes(study, own, label)
    static = {field.name for field in fields(cls, is_traced=False)}
    space: tuple[Interval, ...] = ()
    if study.search.method != "grid":
        space = _space(study, single, axes, own, static)
        axes = _without(axes, {interval.name for interval in space})
        if study.search.method == "random" and space:
            axes.append(random_axis(space, study.search.samples, study.search.seed))
        if study.search.method in ("es", "pbt"):
            _check_space(study.search.method, label, space)
        if study.search.method == "es":
            _check_evolution(axes, static)
    together = [axis for axis in axes if len(axis.names) > 1]
    if len(together) > 1:
        named = " and ".join(", ".join(axis.names) for axis in together)
        raise UserError(f"axes: only one axis may vary several fields together, got {named}; give one of them in grid.")
    grid = Grid(tuple(axes), study.all_seeds)
    groups = _groups(grid, static)
    templates = [_template(cls, label, single, grid, numbers, static, space) for numbers in groups]
    if study.search.method == "pbt":
        selection = _selection(study.search, space)
        templates = [dataclasses.replace(template, selection=selection) for template in templates]
    is_searched = study.search.method in ("es", "pbt")
    return SweptAgent(label, grid, tuple(templates), tuple(groups), space if is_searched else ())


def _selection(search: Search, space: tuple[Interval, ...]) -> Selection:
    names = {field.name for field in dataclasses.fields(Selection)} - {"space"}
    return Selection(space, **{name: getattr(search, name) for name in names})


def _values_and_axes(study: Study, own: dict[str, Any], label: str) -> tuple[dict[str, Any], list[Axis]]:
    axes = []
    for axis in study.axes:
        taken = [name for name in axis.names if name in own]
        if taken and len(axis.names) > 1:
            raise UserError(
                f"agents: {label} states {taken[0]}, which varies together with others in axes; remove one."
            )
        if not taken:
            axes.append(axis)
    single: dict[str, Any] = {}
    for name, value in {**study.settings, **own}.items():
        values = distinct(name, value)
        if len(values) > 1:
            axes.append(Axis((name,), tuple((entry,) for entry in values)))
        else:
            single[name] = values[0]
    return single, axes


def _space(
    study: Study, single: dict[str, Any], axes: list[Axis], own: dict[str, Any], static: set[str]
) -> tuple[Interval, ...]:
    """What is searched: the file's space without what the agent fixes, or the range of every axis of numbers."""
    if study.search.space:
        found = intervals(study.config_class, study.search.space, "search: space")
        return tuple(interval for interval in found if interval.name not in own or interval.name not in single)
    ranges = {}
    for axis in axes:
        values = [value for (value,) in axis.values] if len(axis.names) == 1 else []
        if len(values) > 1 and axis.names[0] not in static and min(values) > 0:
            ranges[axis.names[0]] = [min(values), max(values)]
    return intervals(study.config_class, ranges, "axes")


def _without(axes: list[Axis], names: set[str]) -> list[Axis]:
    for axis in axes:
        if len(axis.names) > 1 and names & set(axis.names):
            shared = sorted(names & set(axis.names))[0]
            raise UserError(f"search: space names {shared}, which varies together with others in axes; remove one.")
    return [axis for axis in axes if not names & set(axis.names)]


def _check_space(method: str, label: str, space: tuple[Interval, ...]) -> None:
    if not space:
        raise UserError(
            f"--search {method} has nothing to search for {label}: give search.space in the sweep file, a list such as "
            "lr=1e-4,1e-2, or leave it out with agents=..."
        )


def _check_evolution(axes: list[Axis], static: set[str]) -> None:
    for axis in axes:
        for name in axis.names:
            if name not in static:
                raise UserError(
                    f"--search es needs one value of {name}, which is an axis: give {name}=value or search it too."
                )


def _groups(grid: Grid, static: set[str]) -> list[np.ndarray]:
    """Numbers of the settings that share a program."""
    groups: dict[str, list[int]] = {}
    for setting in range(len(grid) // len(grid.seeds)):
        values = grid.settings(setting * len(grid.seeds))
        groups.setdefault(repr([values[name] for name in values if name in static]), []).append(setting)
    return [np.array(numbers) for numbers in groups.values()]


def _template(
    cls: type,
    label: str,
    single: dict[str, Any],
    grid: Grid,
    numbers: np.ndarray,
    static: set[str],
    space: tuple[Interval, ...],
) -> Template:
    settings = [grid.settings(int(number) * len(grid.seeds)) for number in numbers]
    traced = tuple(
        {name: value for name, value in setting.items() if name not in (*static, "seed")} for setting in settings
    )
    fixed = {name: value for name, value in settings[0].items() if name in static}
    config = cls(**{**single, **fixed, **traced[0]}).resolved()
    sizes: dict[str, list] = {}
    for field in fields(cls, is_traced=True):
        values = {setting[field.name] for setting in traced if field.name in setting}
        ends = [interval.at(end) for interval in space if interval.name == field.name for end in (0.0, 1.0)]
        for value in (*values, *ends):
            validate(replace(config, **{field.name: value}))
        if field.metadata["maximum"]:
            sizes[field.metadata["maximum"]] = [*values, *ends, getattr(config, field.name)]
    # Fixed here, so that other members of the same sub-program never change its array sizes.
    config = replace(config, **{name: max(values) for name, values in sizes.items()})
    words = ", ".join([label, *(f"{name}={format_value(value)}" for name, value in fixed.items())])
    return Template(words, config, fixed, traced)

"""The contract: what a training program offers, and nothing of how it is run.

A program is a few pure functions of one member. Batching over members, sharding, chunks, checkpoints, progress, results
and resume are the same for all programs (`runtime/`); programs/README.md shows three small ones.

    state = init(key, config, shared)
    for stage in stages:                       one after another; most programs have one
        state = begin(state, config, shared)   if it has one
        for t in 0 .. warm_up - 1:             state, metrics = collect(state, config, t, shared)
        for t in warm_up .. num_steps - 1:     state, metrics = update(state, config, t, shared)
        every eval_every steps and after the last: evaluate(state, config, t, is_last, shared), and done(state)?

`t` counts the steps of a stage and is a scalar that all members share. All bounds are decided between blocks of steps,
not in each step: the loop over steps has no branch.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Generic, Literal, Protocol, Self, TypeVar

import jax
import jax.numpy as jnp

from purejax_bilevel.configuration import Settings
from purejax_bilevel.members import Grid

Tree = Any
T = TypeVar("T")
C = TypeVar("C", bound=Settings)
Metrics = dict[str, tuple[jax.Array, jax.Array]]
"""Name -> (sum, count) since the last evaluation; count 0 where there was nothing to measure."""

POPULATION = "population"  # axis name for `jax.lax.psum` and its like, in programs that have a population


@dataclasses.dataclass(frozen=True)
class Measure:
    """Something that a program measures: a metric of its updates or a value of its evaluations.

    Args:
        name: under which update or evaluate returns it; no two stages share one.
        text: what it is, for axes and tables.
        units: physical ones, if it has them.
        better: higher or lower, where one of them is.
        dims: names of its dimensions beside member and step.
        when: "regular": at every evaluation; "end": at the last one of its stage only.
        logged: whether wandb and TensorBoard get it.
        tabled: whether a table of it is printed at the end.
        total_of: name of a metric with a value per step: this is the sum over all steps so far, which the host makes in
            64 bits. The program itself does not return it.
    """

    name: str
    text: str
    units: str = ""
    better: Literal["higher", "lower", ""] = ""
    dims: tuple[str, ...] = ()
    when: Literal["regular", "end"] = "regular"
    logged: bool = True
    tabled: bool = False
    total_of: str = ""


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stretch of a run with one kind of step.

    Args:
        num_steps: its length.
        eval_every: steps between evaluations; 0: only after the last step.
        update: `(state, config, t, shared) -> state, metrics`, one step.
        evaluate: `(state, config, t, is_last, shared) -> {name: array}`, measures without changing anything.
        name: of its dimension in the results; needed where there are several stages.
        warm_up: steps in which `collect` stands for `update`.
        collect: has the arguments of `update` and may leave metrics out.
        begin: `(state, config, shared) -> state`, before the first step.
        done: `state -> bool`, asked at every evaluation: a member that is done idles until all are or the stage ends.
        cycle: what `update` comes to where it is known at which step of a cycle it is, for accelerators, whose loops
            have no branch: pairs of a number of steps in a row and a function like `update`; the first is for t = 0.
        most_block_steps: in one loop of fixed length on an accelerator, where a stop is noticed only after it; 1 where
            a step takes seconds.
        around: `(steps, state, config, t, end, shared) -> state`, the steps t .. end - 1 between two decisions of a
            state that holds several which step side by side. `update`, `collect` and `cycle` are of one of them, and
            `steps(one, its config, sums) -> one, sums` does its steps and adds its metrics up for `evaluate` to report.
    """

    num_steps: int
    eval_every: int
    update: Callable[..., tuple[Tree, Metrics]]
    evaluate: Callable[..., dict[str, jax.Array]]
    name: str = "training"
    warm_up: int = 0
    collect: Callable[..., tuple[Tree, Metrics]] | None = None
    begin: Callable[..., Tree] | None = None
    done: Callable[[Tree], jax.Array] | None = None
    cycle: Sequence[tuple[int, Callable[..., tuple[Tree, Metrics]]]] = ()
    most_block_steps: int = 32
    around: Callable[..., Tree] | None = None

    @property
    def cycle_steps(self) -> int:
        """Steps after which all is as in the first ones; 1 without a cycle."""
        return sum(count for count, _ in self.cycle) or 1


class Program(Generic[C]):
    """What an algorithm offers: pure functions of one member, made from its configuration (`config.program()`).

    Attributes:
        measures: everything it measures.
        headline: name of the measure that the progress bar and the figure show, one of the last stage.
        stages: what is done, in order.
        step_unit: what a step is, in words.
        population: individuals in each member that may be spread over devices; 0: none.
        artefact_kind: what `artefact` gives, in words (`dynamics ensemble`); "": nothing.
        adapts: settings that the state holds values of: those in the configuration do not matter.
        labels: names of the places along dimensions of measures, where they have names.
        figures: module that draws its results, by name, since that is done without jax. It may have
            `write_figures(dataset, folder)` for a run, in place of learning curves, and for reports `FIGURES`, by name
            functions of `{agent: dataset}` and a path; `AXES`, the one setting that may vary in each (None: any); and
            `TABLES`, like `FIGURES`.
    """

    measures: Sequence[Measure]
    headline: str
    stages: Sequence[Stage]
    step_unit: str = "steps"
    population: int = 0
    artefact_kind: str = ""
    adapts: Sequence[str] = ()
    labels: Mapping[str, Sequence[str]] = MappingProxyType({})
    figures: str = ""

    @property
    def name(self) -> str:
        """What results call it."""
        return type(self).__name__

    @property
    def num_steps(self) -> int:
        """Steps of all stages."""
        return sum(stage.num_steps for stage in self.stages)

    @property
    def finals(self) -> list[str]:
        """Names of what is measured at the end only."""
        return [measure.name for measure in self.measures if measure.when == "end"]

    def measure(self, name: str) -> Measure | None:
        """The measure of a name."""
        return next((measure for measure in self.measures if measure.name == name), None)

    def shared(self) -> Tree:
        """Inputs that all members read and none changes, numpy arrays: a dataset, pretrained weights, level sets.

        Every device holds them once; they are in no member's state and in no checkpoint. A run that goes on must be
        given the same ones. Programs that share an array must return the same object.
        """
        return ()

    def init(self, key: jax.Array, config: C, shared: Tree) -> Tree:
        """State of a member before its first step; the same structure in all stages."""
        raise NotImplementedError

    def individuals(self, state: Tree) -> Tree:
        """Which leaves have the population's individuals as first dimension: booleans in the structure of the state."""
        return jax.tree.map(lambda leaf: False, state)

    def artefact(self, state: Tree) -> Tree:
        """What other runs may start from, a tree of arrays; it is saved as `artefact_kind`."""
        return None

    def write(self, states: Tree, members: Sequence[dict[str, Any]], folder: Path) -> None:
        """Writes files of the program's own at the end of a run, such as datasets in formats that others read.

        Args:
            states: of all members, leaves `[members, ...]`.
            members: settings and seed of each.
            folder: that of the run.
        """

    def is_finite(self, state: Tree) -> jax.Array:
        """Whether a member has not diverged."""
        numbers = [leaf for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
        return jnp.all(jnp.array([~jnp.isnan(leaf).any() for leaf in numbers]))


class Wrapper(Program[C]):
    """A program around another one of one stage, whose results go by that one's names.

    Args:
        inner: what is trained.
    """

    def __init__(self, inner: Program):
        self.inner = inner
        self.headline, self.step_unit, self.artefact_kind = inner.headline, inner.step_unit, inner.artefact_kind
        self.labels, self.figures = inner.labels, inner.figures

    @property
    def name(self) -> str:
        return self.inner.name

    def shared(self) -> Tree:
        return self.inner.shared()


class Configuration(Settings, Protocol):
    """All settings of a program; the decorator `configuration` adds `resolved` and `title` where they are missing."""

    def program(self) -> Program: ...

    def resolved(self) -> Self: ...

    @property
    def title(self) -> str: ...


@dataclasses.dataclass(frozen=True)
class Part:
    """A sub-program and its members; `config` has leaves `[members]`; `label` tells it from other parts."""

    program: Program
    config: Configuration
    grid: Grid
    label: str = ""


# --- populations ------------------------------------------------------------------------------------------------------


def own_individuals(population: int) -> jax.Array:
    """Numbers `[individuals here]` of the individuals that this device holds, out of 0 .. population - 1."""
    count = population // jax.lax.axis_size(POPULATION)
    return jax.lax.axis_index(POPULATION) * count + jnp.arange(count)


def population_mean(tree: T) -> T:
    """Mean over all individuals, on whatever devices they are; leaves `[individuals here, ...]`."""
    return jax.tree.map(lambda leaf: jax.lax.pmean(leaf.mean(0), POPULATION), tree)


def population_gather(tree: T) -> T:
    """All individuals on every device, in order; leaves `[individuals here, ...]` become `[population, ...]`."""
    return jax.tree.map(lambda leaf: jax.lax.all_gather(leaf, POPULATION, tiled=True), tree)


def alone(function: Callable[..., T]) -> Callable[..., T]:
    """A function of a program with a population, to be called outside a run: the whole population in one place."""

    def called(*arguments: Any) -> T:
        mapped = jax.vmap(function, in_axes=None, axis_size=1, axis_name=POPULATION)
        return jax.tree.map(lambda leaf: leaf[0], mapped(*arguments))

    return called


def called_outside(program: Program, function: Callable[..., T]) -> Callable[..., T]:
    """A function of a program, to be called outside a run, whether the program has a population or not."""
    return alone(function) if program.population else function

"""Population-based training: a member is a population that trains side by side and shares its settings and states.

Any program of one stage without a population of its own can be wrapped. Its individuals start with settings drawn from
a space. After every `interval` steps, once learning has begun, each is tried by an evaluation of its own; then

    exploit   the worst ones go on from the state and the settings of one of the best ones, if that is better, and so do
              all that failed (truncation selection);
    explore   each setting of such a copy is multiplied by one of `factors`, or sometimes drawn anew from the space.

All this is part of the compiled program: settings are traced, so nothing is compiled again. It is decided between
blocks of steps, never in a step. What is measured is measured on the individual that was best at the latest trial, by
an evaluation that did not choose it.

Source: Jaderberg et al. 2017, "Population Based Training of Neural Networks" (truncation selection, perturb and
resample of section 4.1.1).
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import flax.struct
import jax
import jax.numpy as jnp

from purejax_bilevel import networks
from purejax_bilevel.configuration import fields, replace
from purejax_bilevel.errors import UserError
from purejax_bilevel.program import (
    Configuration,
    Measure,
    Metrics,
    Program,
    Tree,
    Wrapper,
    own_individuals,
    population_gather,
)
from purejax_bilevel.results.dataset import BEST, INDIVIDUAL, PARENT, POPULATIONS, as_plain, of_population
from purejax_bilevel.runtime.steps import means, plain_keys, typed_keys
from purejax_bilevel.studies.intervals import Interval

# Named streams of random numbers; a constant each, so that adding one moves no other.
INDIVIDUALS, SETTINGS, TRIALS, PARENTS, CHANGES, COPIES = range(6)


T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Selection:
    """How a population adapts its settings.

    Args:
        space: the settings, and where they may lie.
        population: individuals.
        interval: steps between two trials of all; 0: as between evaluations.
        fraction: share of the population that is replaced, and that it is replaced by.
        factors: a setting that is copied is multiplied by one of these,
        resample: or with this probability drawn anew.
    """

    space: tuple[Interval, ...]
    population: int = 8
    interval: int = 0
    fraction: float = 0.2
    factors: tuple[float, ...] = (0.8, 1.2)
    resample: float = 0.25


class State(flax.struct.PyTreeNode):
    """A population between two blocks of steps."""

    key: jax.Array  # [], of the member
    inner: Tree  # states of the individuals, leaves [individuals, ...]
    settings: dict[str, jax.Array]  # their values, [individuals] each
    parents: jax.Array  # [individuals], whom each was copied from at the latest exploit; itself where it was not
    fitness: jax.Array  # [individuals] at the latest trial, higher is better; NaN where failed
    best: jax.Array  # [], the best one then
    sums: Metrics  # of the individuals, [individuals] each, since the last evaluation at a multiple of `eval_every`


class PopulationBased(Wrapper[Configuration]):
    """A program whose members are populations of another program's members.

    Args:
        inner: what an individual trains.
        config: of the inner program, resolved; its values of the settings in the space do not matter.
        selection: how settings are adapted.

    Raises:
        UserError: the program has several stages, a population or an end of its own, or the interval does not fit.
    """

    def __init__(self, inner: Program, config: Configuration, selection: Selection):
        _check(inner, config, selection)
        super().__init__(inner)
        (stage,) = inner.stages
        self.selection, self.population = selection, selection.population
        self.measures = (*inner.measures, *_measures(inner, config, selection))
        self.adapts = tuple(interval.name for interval in selection.space)
        self.interval = selection.interval or stage.eval_every
        self._stage = stage
        headline = inner.measure(inner.headline)
        self._sign = -1.0 if headline is not None and headline.better == "lower" else 1.0
        self._at_once = networks.together() or getattr(config, "vectorized", False)
        self._evaluate_one = jax.jit(stage.evaluate, inline=True)  # traced once for trials and reports
        begin = None if stage.begin is None else self._begin
        self.stages = (dataclasses.replace(stage, around=self._around, evaluate=self._evaluate, begin=begin),)
        if hasattr(inner, "episode"):  # else there is no policy to show
            self.episode = self._episode

    def init(self, key: jax.Array, config: Configuration, shared: Tree) -> State:
        """A population before its first step, with settings drawn from the space; the key becomes the member's own."""
        own = own_individuals(self.population)
        drawn = drawn_settings(self.selection, jax.random.fold_in(key, SETTINGS))
        settings = {name: values[own].astype(getattr(config, name).dtype) for name, values in drawn.items()}
        begin = lambda key, values: self.inner.init(key, replace(config, **values), shared)  # noqa: E731
        inner = self._each(begin, _keys(jax.random.fold_in(key, INDIVIDUALS), own), settings)
        one = jax.eval_shape(lambda inner: self._stage.update(_of(inner, 0), config, jnp.int32(0), shared)[1], inner)
        sums = jax.tree.map(lambda leaf: jnp.zeros((*own.shape, *leaf.shape), leaf.dtype), one)
        return State(key, inner, settings, own, jnp.zeros(own.shape), jnp.int32(0), sums)

    def individuals(self, state: State) -> State:
        return jax.tree.map(lambda leaf: True, state).replace(key=False, best=False)

    def artefact(self, state: State) -> Tree:
        """What the best individual leaves."""
        return self.inner.artefact(_of(state.inner, state.best))

    def write(self, states: State, members: Sequence[dict[str, Any]], folder: Path) -> None:
        self.inner.write(jax.vmap(_of)(states.inner, states.best), members, folder)

    def is_finite(self, state: State) -> jax.Array:
        """Whether some individual has not diverged."""
        return population_gather(self._each(self.inner.is_finite, state.inner)).any()

    def _each(self, function: Callable[..., T], *individuals: Tree) -> T:
        """A function of every individual: one after another on a CPU, as members are, else all at once."""
        if self._at_once:
            return jax.vmap(function)(*individuals)
        return jax.lax.map(lambda one: function(*one), individuals)

    def _begin(self, state: State, config: Configuration, shared: Tree) -> State:
        assert self._stage.begin is not None
        begin = lambda one, values: self._stage.begin(one, replace(config, **values), shared)  # noqa: E731
        return state.replace(inner=self._each(begin, state.inner, state.settings))

    def _episode(self, state: State, config: Configuration, t: jax.Array) -> Any:
        """One episode of the best individual, for a video."""
        values = _of(state.settings, state.best)
        return self.inner.episode(_of(state.inner, state.best), replace(config, **values), t)  # type: ignore[attr-defined]

    # --- blocks of steps ----------------------------------------------------------------------------------------------

    def _around(
        self, steps: Callable, state: State, config: Configuration, t: jax.Array, end: jax.Array, shared: Tree
    ) -> State:
        """A block of steps of all individuals, after an exploit and before a trial where these are due."""
        exploited = lambda state: self._exploited(state, t)  # noqa: E731
        state = jax.lax.cond(self._is_due(t), exploited, lambda state: state, state)
        is_new = t % self._stage.eval_every == 0
        sums = jax.tree.map(lambda leaf: jnp.where(is_new, 0, leaf).astype(leaf.dtype), state.sums)
        learn = lambda one, values, sums: steps(one, replace(config, **values), sums)  # noqa: E731
        inner, sums = self._each(learn, state.inner, state.settings, sums)
        state = state.replace(inner=inner, sums=sums)
        tried = lambda state: self._tried(state, config, end - 1, shared)  # noqa: E731
        kept = lambda state: (state.fitness, state.best)  # noqa: E731
        fitness, best = jax.lax.cond(self._is_due(end), tried, kept, state)
        return state.replace(fitness=fitness, best=best)

    def _is_due(self, t: jax.Array) -> jax.Array:
        """Whether all are tried after `t` steps, and copied from before the next one."""
        return (t % self.interval == 0) & (t > self._stage.warm_up)

    def _tried(self, state: State, config: Configuration, t: jax.Array, shared: Tree) -> tuple[jax.Array, jax.Array]:
        """Fitness, from evaluations with random numbers of their own, and the best individual."""
        own = own_individuals(self.population)
        keys = _keys(jax.random.fold_in(jax.random.fold_in(state.key, TRIALS), t), own)

        def trial(one: Tree, values: dict[str, jax.Array], sums: Metrics, key: jax.Array) -> jax.Array:
            found = self._measured(with_own_keys(one, key), values, sums, config, t, jnp.bool_(False), shared)
            fitness = self._sign * found[self.headline].astype(state.fitness.dtype)
            return jnp.where(self.inner.is_finite(one) & jnp.isfinite(fitness), fitness, jnp.nan)

        fitness = self._each(trial, state.inner, state.settings, state.sums, keys)
        best = _failures_last(population_gather(fitness)).argmax()
        return fitness, best.astype(state.best.dtype)

    def _measured(
        self, one: Tree, values: dict[str, jax.Array], sums: Metrics, config: Configuration, *rest: Any
    ) -> dict[str, jax.Array]:
        """All that the inner program measures of an individual."""
        return means(sums) | self._evaluate_one(one, replace(config, **values), *rest)

    def _exploited(self, state: State, t: jax.Array) -> State:
        """The population after exploit and explore, before step `t`."""
        own = own_individuals(self.population)
        parents_key, changes_key, copies_key = (
            jax.random.fold_in(jax.random.fold_in(state.key, stream), t) for stream in (PARENTS, CHANGES, COPIES)
        )
        plain = plain_keys(state.inner)
        fitness, settings, everyone = population_gather((state.fitness, state.settings, plain))
        all_parents = chosen_parents(parents_key, fitness, self.selection.fraction)
        changed = explored(self.selection, changes_key, _of(settings, all_parents))
        parents = all_parents[own]
        is_copy = parents != own
        values = {name: jnp.where(is_copy, changed[name][own], state.settings[name]) for name in settings}
        inner = typed_keys(_of(everyone, parents), state.inner)
        inner = jax.vmap(with_own_keys)(inner, _keys(copies_key, own), is_copy)
        return state.replace(inner=inner, settings=values, parents=parents)

    def _evaluate(
        self, state: State, config: Configuration, t: jax.Array, is_last: jax.Array, shared: Tree
    ) -> dict[str, jax.Array]:
        """What the inner program measures of the best individual, and headline, parent and settings of all."""
        judge = lambda one, values, sums: self._measured(one, values, sums, config, t, is_last, shared)  # noqa: E731
        found = population_gather(self._each(judge, state.inner, state.settings, state.sums))
        settings, parents = population_gather((state.settings, state.parents))
        first = t // self._stage.eval_every * self._stage.eval_every  # step since the previous evaluation
        parents = jnp.where(self._is_due(first), parents, jnp.arange(self.population))
        of_all = {of_population(self.headline): found[self.headline], PARENT: parents}
        of_all |= {of_population(name): values for name, values in settings.items()}
        return {**_of(found, state.best), **of_all, BEST: state.best}


def _check(inner: Program, config: Configuration, selection: Selection) -> None:
    name, stages = type(inner).__name__, inner.stages
    if len(stages) > 1:
        raise UserError(f"search: pbt trains programs of one stage, {name} has {' and '.join(s.name for s in stages)}.")
    if inner.population or stages[0].done is not None or stages[0].around is not None:
        what = "ends by itself" if stages[0].done is not None else "has a population of its own"
        raise UserError(f"search: pbt makes populations of members that train for as long as told, {name} {what}.")
    if wholes := [interval.name for interval in selection.space if interval.whole]:
        raise UserError(f"search: pbt multiplies settings: its space takes no whole numbers, got {', '.join(wholes)}.")
    adapted = getattr(config, "adapt", "").split()
    if twice := [interval.name for interval in selection.space if interval.name in adapted]:
        raise UserError(
            f"search: pbt and --adapt both change {', '.join(twice)}: take it out of the space or of adapt."
        )
    (stage,) = stages
    if stage.eval_every == 0 or selection.interval % stage.eval_every:
        raise UserError(
            f"search: interval must be a multiple of the {stage.eval_every} steps between evaluations "
            f"(eval_frequency), at which lineage and settings are written, got {selection.interval}."
        )
    interval = selection.interval or stage.eval_every
    first = (stage.warm_up // interval + 1) * interval
    if first >= stage.num_steps:
        raise UserError(
            f"search: interval {interval} leaves no exploit: the first would be after step {first} of "
            f"{stage.num_steps}."
        )


def _measures(inner: Program, config: Configuration, selection: Selection) -> list[Measure]:
    helps = {field.name: field.metadata["help"] for field in fields(config)}
    headline = inner.measure(inner.headline)
    assert headline is not None, "a program measures its headline"
    every = (INDIVIDUAL,)
    of_settings = [
        Measure(of_population(interval.name), f"{helps[interval.name]} of each individual", dims=every)
        for interval in selection.space
    ]
    return [
        dataclasses.replace(
            headline, name=of_population(headline.name), text=f"{headline.text} of each individual", dims=every
        ),
        *of_settings,
        Measure(PARENT, "individual that each was copied from since the previous evaluation", dims=every, logged=False),
        Measure(BEST, "individual that was best at the latest trial, of which all else is told", logged=False),
    ]


def about(program: Program) -> dict[str, Any]:
    """Attributes of the results of a program whose members are populations; none of another."""
    if not isinstance(program, PopulationBased):
        return {}
    selection = dataclasses.replace(program.selection, interval=program.interval)
    return {POPULATIONS: as_plain(selection)}


# --- what happens to a population -------------------------------------------------------------------------------------


def chosen_parents(key: jax.Array, fitness: jax.Array, fraction: float) -> jax.Array:
    """Whom each individual goes on from; itself unless it is among the worst or failed, and the other is better.

    Args:
        key: consumed.
        fitness: `[individuals]`, higher is better, NaN where failed.
        fraction: share that counts as the worst, and as the best.

    Returns:
        Numbers `[individuals]`.
    """
    population = len(fitness)
    count = max(1, round(fraction * population))
    known = _failures_last(fitness)
    ranked = jnp.argsort(known, descending=True)
    rank = jnp.argsort(ranked)
    drawn = jax.random.randint(key, (population,), 0, jnp.clip(jnp.isfinite(known).sum(), 1, count))
    candidates = ranked[drawn]
    is_replaced = ((rank >= population - count) | jnp.isnan(fitness)) & (known[candidates] > known)
    return jnp.where(is_replaced, candidates, jnp.arange(population))


def _failures_last(fitness: jax.Array) -> jax.Array:
    return jnp.where(jnp.isnan(fitness), -jnp.inf, fitness)


def drawn_settings(selection: Selection, key: jax.Array) -> dict[str, jax.Array]:
    """Values by setting, `[individuals]` each, uniform on the scales of their intervals; the key is consumed."""
    shape = (selection.population,)
    return {
        interval.name: _at(interval, jax.random.uniform(jax.random.fold_in(key, number), shape))
        for number, interval in enumerate(selection.space)
    }


def _at(interval: Interval, position: jax.Array) -> jax.Array:
    """`Interval.at` of positions in a compiled program."""
    if interval.scale == "log":
        value = interval.low * (interval.high / interval.low) ** position
    else:
        value = interval.low + (interval.high - interval.low) * position
    return jnp.clip(value, interval.low, interval.high)


def explored(selection: Selection, key: jax.Array, settings: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Settings `[individuals]` each, changed: multiplied by one of the factors or drawn anew; the key is consumed."""
    fresh_key, factor_key, choice_key = jax.random.split(key, 3)
    fresh, changed = drawn_settings(selection, fresh_key), {}
    for number, interval in enumerate(selection.space):
        before = settings[interval.name]
        keys = (jax.random.fold_in(each, number) for each in (factor_key, choice_key))
        which = jax.random.randint(next(keys), before.shape, 0, len(selection.factors))
        moved = jnp.clip(before * jnp.asarray(selection.factors)[which], interval.low, interval.high)
        is_fresh = jax.random.bernoulli(next(keys), selection.resample, before.shape)
        changed[interval.name] = jnp.where(is_fresh, fresh[interval.name], moved).astype(before.dtype)
    return changed


def with_own_keys(one: T, key: jax.Array, is_wanted: jax.Array | None = None) -> T:
    """An individual whose every random stream starts from a key, consumed, where that is wanted (None: it is)."""
    leaves, structure = jax.tree.flatten(one)
    for number, leaf in enumerate(leaves):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            own = jax.random.fold_in(key, number)
            fresh = jax.random.split(own, leaf.shape) if leaf.ndim else own
            leaves[number] = fresh if is_wanted is None else jnp.where(is_wanted, fresh, leaf)
    return jax.tree.unflatten(structure, leaves)


def _keys(key: jax.Array, numbers: jax.Array) -> jax.Array:
    """A key for each of some individuals."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, numbers)


def _of(individuals: T, number: jax.Array | int) -> T:
    """One individual, or several."""
    return jax.tree.map(lambda leaf: leaf[number], individuals)

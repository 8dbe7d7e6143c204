"""A search by an evolution strategy: a generation is a round."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from purejax_bilevel.results.statistics import setting_scores
from purejax_bilevel.studies.intervals import Interval
from purejax_bilevel.studies.rounds import Rounds, Setting, Tried
from purejax_bilevel.studies.study import Search


class SettingStrategy:
    """An evolution strategy of evosax in the unit cube of a search space, which it minimises over.

    Args:
        search: population, algorithm and seed.
        space: the intervals.
        start: settings to start from.
        number: of the sub-program, for a stream of random numbers of its own.
    """

    def __init__(self, search: Search, space: Sequence[Interval], start: Setting, number: int):
        from evosax.algorithms import CMA_ES, Open_ES

        self.space, self._key = tuple(space), jax.random.fold_in(jax.random.key(search.seed), number)
        mean = jnp.array([interval.position(start[interval.name]) for interval in self.space], jnp.float32)
        if search.algorithm == "cma_es":
            self._strategy = CMA_ES(search.population, jnp.zeros(len(space)))
            self._parameters = self._strategy.default_params.replace(std_init=jnp.float32(0.25))
        else:
            self._strategy = Open_ES(
                search.population,
                jnp.zeros(len(space)),
                optimizer=optax.adam(0.1),
                std_schedule=optax.exponential_decay(0.2, 1, 0.95),
            )
            self._parameters = self._strategy.default_params
        self._state = self._strategy.init(jax.random.fold_in(self._key, 0), mean, self._parameters)
        self._generation = 0

    def ask(self) -> list[Setting]:
        """Settings of the next generation."""
        self._generation += 1
        key = jax.random.fold_in(self._key, 2 * self._generation)
        population, self._state = self._strategy.ask(key, self._state, self._parameters)
        self._population = jnp.clip(population, 0.0, 1.0)  # told as what was tried: the nearest point inside
        return [
            {interval.name: interval.at(float(x)) for interval, x in zip(self.space, point, strict=True)}
            for point in np.asarray(self._population)
        ]

    def tell(self, quality: np.ndarray) -> None:
        """Quality of these settings, higher is better, NaN for failed ones."""
        worst = np.nanmin(quality) - 1.0 if np.isfinite(quality).any() else 0.0
        fitness = -np.where(np.isfinite(quality), quality, worst)
        key = jax.random.fold_in(self._key, 2 * self._generation + 1)
        self._state, _ = self._strategy.tell(
            key, self._population, jnp.asarray(fitness, jnp.float32), self._state, self._parameters
        )


def evolve(
    rounds: Rounds, search: Search, spaces: Sequence[Sequence[Interval]], seeds: tuple[int, ...]
) -> list[list[Tried]]:
    """Runs all generations; returns every setting tried with its quality, per sub-program.

    The fitness of a setting is the interquartile mean over the same seeds in all generations.
    """
    strategies = []
    for number, (space, template) in enumerate(zip(spaces, rounds.templates, strict=True)):
        start = {interval.name: getattr(template.config, interval.name) for interval in space}
        strategies.append(SettingStrategy(search, space, start, number))
    tried: list[list[Tried]] = [[] for _ in strategies]
    for generation in range(search.generations):
        asked = [strategy.ask() for strategy in strategies]
        members = [[(setting, seed) for setting in settings for seed in seeds] for settings in asked]
        scores = rounds.scores(f"generation-{generation + 1}", members)
        for strategy, settings, part_scores, found in zip(strategies, asked, scores, tried, strict=True):
            quality = setting_scores(part_scores.reshape(-1, len(seeds)), rounds.lower)
            strategy.tell(quality)
            found.extend(zip(settings, quality.tolist(), strict=True))
        rounds.tell_best(f"generation {generation + 1} of {search.generations}", tried)
        rounds.save_history()
    return tried

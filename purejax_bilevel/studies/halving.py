"""A search by successive halving: the better half of the settings trains on, from where it is."""

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from purejax_bilevel.errors import UserError
from purejax_bilevel.results.statistics import ranking, setting_scores
from purejax_bilevel.studies.rounds import Member, Rounds, Setting, Tried
from purejax_bilevel.studies.study import Search


def rung_ends(total: int, eval_frequency: int, halvings: int) -> list[int]:
    """Steps at which each rung ends: total / 2^k, ..., total / 2, total; the earlier ones where an evaluation is due.

    Raises:
        UserError: the first rung would end before the first evaluation.
    """
    if halvings and eval_frequency == 0:
        raise UserError("--halving compares settings at evaluations: eval_frequency must not be 0.")
    ends = [total // 2 ** (halvings - rung) // eval_frequency * eval_frequency for rung in range(halvings)]
    if 0 in ends or len(set(ends)) < len(ends):
        raise UserError(
            f"--halving {halvings} would compare after {total / 2**halvings:.0f} of {total} steps, with evaluations "
            f"only every {eval_frequency}: halve less often or lower eval_frequency."
        )
    return [*ends, total]


def halve(rounds: Rounds, search: Search, seeds: tuple[int, ...]) -> list[list[Tried]]:
    """Runs all rungs; returns the settings of the last one with their quality, per sub-program."""
    ends = rung_ends(rounds.total, rounds.programs[0].stages[-1].eval_every, search.halving)
    alive: list[list[Setting]] = [list(template.settings) for template in rounds.templates]
    homes: dict[tuple[int, str], tuple[str, int]] = {}  # where a setting's state is: round and position
    earlier: dict[str, list[list[Member]]] = {}
    start = 0
    for rung, stop in enumerate(ends):
        tried: list[list[Tried]] = [[] for _ in alive]
        current: dict[str, list[list[Member]]] = {}
        next_homes: dict[tuple[int, str], tuple[str, int]] = {}
        batches = max(
            math.ceil(len(settings) * len(seeds) / places)
            for settings, places in zip(alive, rounds.places, strict=True)
        )
        for batch in range(batches):
            name = f"rung-{rung + 1}-batch-{batch + 1}"
            chosen = [
                _share(settings, places // len(seeds), batch)
                for settings, places in zip(alive, rounds.places, strict=True)
            ]
            # A sub-program with fewer batches than others runs its first settings once more; nobody looks at them.
            members = [
                [(setting, seed) for setting in part or settings[:1] for seed in seeds]
                for part, settings in zip(chosen, alive, strict=True)
            ]
            state = None if rung == 0 else _state_getter(rounds, members, homes, earlier, len(seeds))
            scores = rounds.scores(name, members, start, stop, state, keep=stop < rounds.total)
            current[name] = members
            for number, (part, part_scores) in enumerate(zip(chosen, scores, strict=True)):
                quality = setting_scores(part_scores.reshape(-1, len(seeds)), rounds.lower)[: len(part)]
                tried[number].extend(zip(part, quality.tolist(), strict=True))
                for position, setting in enumerate(part):
                    next_homes[number, repr(setting)] = (name, position)
            rounds.save_history()
        for name in earlier:
            rounds.forget(name)
        homes, earlier, start = next_homes, current, stop
        rounds.tell_best(f"rung {rung + 1} of {len(ends)} ({stop} steps)", tried)
        if not any(np.isfinite(quality) for found in tried for _, quality in found):
            raise UserError(
                f"every setting failed by step {stop} (results are not numbers): try smaller learning rates."
            )
        if rung + 1 < len(ends):
            alive = [_better_half(found) for found in tried]
    return tried


def _share(settings: list[Setting], count: int, batch: int) -> list[Setting]:
    return settings[batch * count : (batch + 1) * count]


def _better_half(tried: list[Tried]) -> list[Setting]:
    order = ranking(np.array([quality for _, quality in tried]))
    kept = sorted(order[: math.ceil(len(tried) / 2)])
    return [tried[number][0] for number in kept]


def _state_getter(
    rounds: Rounds,
    members: list[list[Member]],
    homes: dict[tuple[int, str], tuple[str, int]],
    earlier: dict[str, list[list[Member]]],
    num_seeds: int,
) -> Callable[[], list[Any]]:
    """Collects the states of the given members from the rounds where they were left."""

    def collect() -> list[Any]:
        loaded: dict[str, list[Any]] = {}
        collected = []
        for number, listed in enumerate(members):
            filled = [listed[i % len(listed)] for i in range(rounds.places[number])]
            leaves = []
            for place, (setting, _) in enumerate(filled):
                name, position = homes[number, repr(setting)]
                if name not in loaded:
                    loaded[name] = rounds.state(name, earlier[name])
                index = position * num_seeds + place % len(listed) % num_seeds
                leaves.append(jax.tree.map(lambda leaf, index=index: leaf[index], loaded[name][number]))
            collected.append(jax.tree.map(lambda *rows: np.stack(rows), *leaves))
        return collected

    return collect

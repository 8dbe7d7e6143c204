"""When a run does what: its stages end to end, and the steps after which each is evaluated."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from purejax_bilevel.program import Part, Program


class StageSchedule(NamedTuple):
    """Lengths and evaluation intervals of the stages; steps are counted over all of them."""

    names: tuple[str, ...]
    lengths: tuple[int, ...]
    eval_every: tuple[int, ...]

    @classmethod
    def of(cls, program: Program) -> "StageSchedule":
        stages = program.stages
        return cls(*zip(*((stage.name, stage.num_steps, stage.eval_every) for stage in stages), strict=True))

    @property
    def total(self) -> int:
        """Steps of all stages."""
        return sum(self.lengths)

    @property
    def stages(self) -> range:
        return range(len(self.lengths))

    def start(self, stage: int) -> int:
        """Steps before a stage."""
        return sum(self.lengths[:stage])

    def end(self, stage: int) -> int:
        return self.start(stage) + self.lengths[stage]

    def stage_at(self, step: int) -> int:
        """The stage that does the step after the first `step` ones; the last where there is none."""
        return next((stage for stage in self.stages if step < self.end(stage)), len(self.lengths) - 1)

    def rows(self, stage: int, step: int) -> int:
        """Evaluations of a stage in the first `step` steps of the run."""
        done = min(max(step - self.start(stage), 0), self.lengths[stage])
        return num_rows(done, self.lengths[stage], self.eval_every[stage])

    def row_steps(self, stage: int) -> np.ndarray:
        """Steps of its stage done at each evaluation."""
        return row_steps(self.lengths[stage], self.eval_every[stage])


def common_schedule(parts: Sequence[Part]) -> StageSchedule:
    """The schedule of parts that run together.

    Raises:
        ValueError: they do not have the same.
    """
    found = {StageSchedule.of(part.program) for part in parts}
    if len(found) > 1:
        raise ValueError("the parts of one program must have the same stages, lengths and evaluation intervals")
    return found.pop()


def num_rows(steps: int, total: int, frequency: int) -> int:
    """Evaluations made in the first `steps` of `total` steps: every `frequency` (0: none) and after the last."""
    regular = steps // frequency if frequency else 0
    extra = steps >= total and (frequency == 0 or total % frequency != 0)
    return regular + int(extra)


def row_steps(total: int, frequency: int) -> np.ndarray:
    """Number of steps done at each evaluation of a run."""
    regular = np.arange(frequency, total + 1, frequency) if frequency else np.array([], int)
    return regular if len(regular) and regular[-1] == total else np.append(regular, total)

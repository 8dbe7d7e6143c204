"""Figures of the levels that GROOVE chooses, from a run's results: pictures of the best ones, and how scores spread.

python -m purejax_bilevel.programs.meta_objectives.figures runs/x levels.png scores.png
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import xarray
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from purejax_bilevel.errors import UserError
from purejax_bilevel.programs.meta_objectives.groove import QUANTILES
from purejax_bilevel.results import dataset as datasets
from purejax_bilevel.results import plots
from purejax_bilevel.results.dataset import SEED, STEP

MOST_PICTURES = 9


def best_levels(dataset: xarray.Dataset, path: str | Path, member: int = 0) -> Path:
    """Draws the levels of the highest scores in a member's buffer.

    Args:
        dataset: of a run of groove on a Grid-World mode.
        path: the figure's file.
        member: in the order of the results.

    Returns:
        The path.

    Raises:
        UserError: there is no such member, no level has a score, or the place is not writable.
    """
    numbers, scores, visits = (
        _of_member(dataset, name, member) for name in ("best_level", "best_score", "best_visits")
    )
    chosen = [row for row in zip(numbers, scores, visits, strict=True) if np.isfinite(row[0])][:MOST_PICTURES]
    if not chosen:
        raise UserError(f"member {member} of this run keeps no level with a score.")
    sheet = _pictures(str(dataset.attrs["environment"]), chosen)
    try:
        sheet.save(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be written ({error}).") from error
    return Path(path)


def _pictures(name: str, chosen: Sequence[tuple[float, float, float]]) -> Any:
    import jax  # drawing levels needs it, the other figure does not

    from purejax_bilevel.environments import grid_world
    from purejax_bilevel.environments.grid_world import pictures

    mode = name.removeprefix(grid_world.PREFIX)
    reset = jax.jit(grid_world.GridWorld(mode).reset_env)
    images = []
    for number, score, visits in chosen:
        level = grid_world.numbered(mode, int(number))
        state = jax.tree.map(np.asarray, reset(jax.random.key(int(number)), level)[1])
        lines = [f"{mode} {int(number)}: {int(level.max_steps_in_episode)} steps"]
        lines.append(f"score {score:.2f} after {int(visits)} lives")
        images.append(pictures.level_picture(level, pictures.scene_of_state(state), lines))
    return pictures.sheet(images)


def score_spread(dataset: xarray.Dataset, path: str | Path, member: int = 0) -> Path:
    """Draws the quantiles of the scores in a member's buffer against meta-steps; arguments as of `best_levels`."""
    quantiles = _of_member(dataset, "score_quantile", member)
    steps, middle = dataset[STEP].values, len(QUANTILES) // 2
    with matplotlib.rc_context(plots.STYLE):
        figure = Figure(figsize=(6.4, 4.0), layout="constrained")
        FigureCanvasAgg(figure)
        panel = figure.subplots()
        panel.plot(steps, quantiles[:, middle], color=plots.PALETTE[0], label="median")
        for i in range(middle):
            label = f"{100 * QUANTILES[i]:g} to {100 * QUANTILES[-1 - i]:g} %"
            panel.fill_between(
                steps,
                quantiles[:, i],
                quantiles[:, -1 - i],
                color=plots.PALETTE[0],
                alpha=0.12 + 0.1 * i,
                label=label,
                lw=0,
            )
        panel.set(xlabel="meta-steps", ylabel="scores of the levels in the buffer")
        panel.legend(loc="best")
        return plots._write(figure, path)


def _of_member(dataset: xarray.Dataset, name: str, member: int) -> np.ndarray:
    """A variable of one member, without the dimensions of members."""
    if name not in dataset:
        raise UserError(f"this run measures no {name}: it is none of --agent_type groove.")
    of_members = [SEED, *datasets.setting_dimensions(dataset)]
    values = dataset[name].transpose(*of_members, ...).values
    flat = values.reshape(-1, *values.shape[len(of_members) :])
    if not 0 <= member < len(flat):
        raise UserError(f"--member must be from 0 to {len(flat) - 1}, got {member}.")
    return flat[member]


def main(words: Sequence[str] | None = None) -> int:
    """Reads the command line and draws both figures; returns the exit status: 0 done, 2 bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="folder of a run of groove")
    parser.add_argument("levels", help="file of the pictures")
    parser.add_argument("scores", help="file of the spread of the scores")
    parser.add_argument("--member", type=int, default=0, help="which member, from 0 (default: 0)")
    asked = parser.parse_args(words)
    try:
        dataset = datasets.load(asked.run)
        print(best_levels(dataset, asked.levels, asked.member))
        print(score_spread(dataset, asked.scores, asked.member))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

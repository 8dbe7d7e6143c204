"""Figures that compare agents, each with its best settings: sensitivity, performance profiles, improvement, a search.

Bands and bars are 95 % bootstrap intervals, as in `plots.py`, whose look they share.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.ticker import EngFormatter, MaxNLocator

from purejax_bilevel.results import plots, statistics
from purejax_bilevel.results.analysis import Sensitivity
from purejax_bilevel.results.statistics import stratified_bootstrap_interval

DECADES = 1000.0  # ratio of values from which an axis is logarithmic


def curves(
    series: Sequence[tuple[str, np.ndarray, np.ndarray]],
    step_name: str,
    score_name: str,
    path: Path,
    title: str = "",
) -> Path:
    """Draws each agent's series against the step.

    Args:
        series: per agent its label, its steps `[steps]` and `[seeds, steps, tasks]`; NaN is left out.
        step_name: what a step is.
        score_name: of what was measured.
        path: the figure's file.
        title: above it.
    """
    with matplotlib.rc_context(plots.STYLE):
        figure, (panel,) = plots._panels(1, 1, 1)
        entries = []
        for number, (label, steps, values) in enumerate(series):
            color, dash = _look(number)
            found = stratified_bootstrap_interval(np.moveaxis(values, 1, 0))
            marker = "o" if len(steps) == 1 else None
            panel.plot(steps, found.estimate, color=color, linestyle=dash, marker=marker)
            if len(series) <= plots.MANY_BANDS:
                panel.fill_between(steps, found.low, found.high, color=color, alpha=0.18, linewidth=0)
            entries.append((label, color, dash))
        finite = np.concatenate([values[np.isfinite(values)] for *_, values in series])
        if len(finite) and finite.min() > 0 and finite.max() > DECADES * finite.min():
            panel.set_yscale("log")
        first, last = min(steps[0] for _, steps, _ in series), max(steps[-1] for _, steps, _ in series)
        panel.set_xlim(first, max(last, first + 1))
        panel.xaxis.set_major_formatter(EngFormatter(sep=""))
        plots._label(figure, [panel], step_name, f"{score_name}\nIQM over seeds, 95 % interval")
        plots._legend(figure, [panel], [("", entries)])
        panel.set_title(title, fontsize=11)
        return plots._write(figure, path)


def sensitivity(lines: Sequence[Sensitivity], name: str, score_name: str, path: Path, title: str = "") -> Path:
    """Draws each agent's score against one hyper-parameter.

    Args:
        lines: one per agent.
        name: of the hyper-parameter.
        score_name: of what was measured.
        path: the figure's file.
        title: above it.
    """
    every = list(dict.fromkeys(value for line in lines for value in line.values))
    numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in every)
    ordered = sorted(every) if numeric else every
    with matplotlib.rc_context(plots.STYLE):
        figure, (panel,) = plots._panels(1, 1, 1)
        places = dict(zip(ordered, _scale(panel, ordered, numeric, all(line.joined for line in lines)), strict=True))
        entries, any_failed = [], False
        for number, line in enumerate(lines):
            color, dash = _look(number)
            entries.append((line.label, color, dash))
            rows = np.array([(score.estimate, score.low, score.high) for score in line.scores])
            if not line.values:
                panel.axhline(rows[0, 0], color=color, linestyle=":", zorder=2)
                entries[-1] = (f"{line.label} (does not vary)", color, ":")
                continue
            positions = np.array([places[value] for value in line.values])
            if line.joined and numeric:
                plots._draw_line(panel, positions, rows, color)
            else:
                shift = 0.0 if numeric else 0.08 * (number - (len(lines) - 1) / 2)
                plots._draw_points(panel, positions + shift, rows, color)
            failed = positions[np.isnan(rows[:, 0])]
            base = np.full(len(failed), 0.02 + 0.03 * number)
            panel.plot(failed, base, "x", color=color, transform=panel.get_xaxis_transform(), clip_on=False)
            any_failed |= len(failed) > 0
        if any_failed:
            title = f"{title}\ncrosses: runs failed".lstrip()
        known = any(np.isfinite(score.low) for line in lines for score in line.scores)
        what = f"{score_name}\nIQM over seeds{', 95 % interval' if known else ''}"
        plots._label(figure, [panel], name.replace("_", " "), what)
        plots._legend(figure, [panel], [("", entries)] if len(entries) > 1 else [])
        panel.set_title(title, fontsize=11)
        return plots._write(figure, path)


def _scale(panel: Any, ordered: Sequence[Any], numeric: bool, joined: bool) -> np.ndarray:
    """Positions of values; the points of a random search get the usual ticks instead of one each."""
    if not numeric:
        return plots._value_scale(panel, np.array([plots._text(value) for value in ordered]))
    values = np.array(ordered, float)
    if joined:
        return plots._value_scale(panel, values)
    if values[0] > 0 and values[-1] >= 10 * values[0]:
        panel.set_xscale("log")
    return values


def profiles(scores: Sequence[tuple[str, np.ndarray]], score_name: str, path: Path, lower: bool = False) -> Path:
    """Draws for each agent the fraction of runs that are better than a score, against that score.

    Args:
        scores: per agent its label and the scores `[runs, tasks]` of its best setting.
        score_name: of what was measured.
        path: the figure's file.
        lower: whether lower is better.
    """
    finite = np.concatenate([values[np.isfinite(values)] for _, values in scores])
    low, high = (finite.min(), finite.max()) if len(finite) else (0.0, 1.0)
    margin = 0.05 * (high - low) or max(abs(high), 1.0) * 0.05
    thresholds = np.linspace(low - margin, high + margin, 201)
    with matplotlib.rc_context(plots.STYLE):
        figure, (panel,) = plots._panels(1, 1, 1)
        entries = []
        for number, (label, values) in enumerate(scores):
            color, dash = _look(number)
            sign = -1.0 if lower else 1.0
            found = statistics.performance_profile(sign * values, sign * thresholds)
            panel.step(thresholds, found.estimate, color=color, linestyle=dash, where="mid")
            if len(scores) <= plots.MANY_BANDS:
                panel.fill_between(thresholds, found.low, found.high, color=color, alpha=0.15, linewidth=0, step="mid")
            entries.append((label, color, dash))
        panel.set_ylim(-0.02, 1.02)
        panel.set_xlim(thresholds[0], thresholds[-1])
        side = "below" if lower else "above"
        plots._label(figure, [panel], f"{score_name} τ", f"fraction of runs {side} τ")
        plots._legend(figure, [panel], [("", entries)])
        panel.set_title("Performance profiles of the best settings", fontsize=11)
        return plots._write(figure, path)


def improvement(labels: Sequence[str], probabilities: np.ndarray, path: Path) -> Path:
    """Draws the probability that a run of the row's agent is better than one of the column's.

    Args:
        labels: agents.
        probabilities: `[agents, agents]`, NaN where unknown.
        path: the figure's file.
    """
    count = len(labels)
    with matplotlib.rc_context({**plots.STYLE, "axes.grid": False}):
        figure, (panel,) = plots._panels(1, 1, 1)
        longest = max(len(label) for label in labels)
        figure.set_size_inches(2.0 + 0.75 * count + 0.06 * longest, 1.5 + 0.55 * count)
        shown = np.where(np.eye(count, dtype=bool), np.nan, probabilities)
        image = panel.imshow(shown, cmap="RdBu", vmin=0.0, vmax=1.0, aspect="auto")
        for row, column in np.ndindex(count, count):
            value = shown[row, column]
            if np.isfinite(value):
                color = "white" if abs(value - 0.5) > 0.35 else "black"
                panel.text(column, row, f"{value:.2f}", ha="center", va="center", color=color)
        turned: dict[str, Any] = {"rotation": 30, "ha": "right"} if longest > 8 else {}
        panel.set_xticks(range(count), labels, parse_math=False, **turned)
        panel.set_yticks(range(count), labels, parse_math=False)
        for spine in panel.spines.values():
            spine.set_visible(False)
        panel.tick_params(length=0)
        plots._label(figure, [panel], "Y", "X")
        figure.colorbar(image, ax=panel, label="P(X better than Y)")
        return plots._write(figure, path)


def rounds(history: Sequence[dict[str, Any]], labels: Sequence[str], score_name: str, path: Path, lower: bool) -> Path:
    """Draws every setting of a search in the order it was tried, and the best so far.

    Args:
        history: rounds with `steps` and per sub-program `settings` and `quality` (higher is better).
        labels: sub-programs.
        score_name: of what chose the settings.
        path: the figure's file.
        lower: whether lower is better.
    """
    different = {entry["steps"] for entry in history}
    with matplotlib.rc_context(plots.STYLE):
        figure, (panel,) = plots._panels(1, 1, 1)
        entries = []
        for number, label in enumerate(labels):
            color, dash = _look(number)
            entries.append((label, color, dash))
            offset = 0.1 * (number - (len(labels) - 1) / 2)
            points = [
                (entry["steps"] if len(different) > 1 else index + 1 + offset, quality * (-1 if lower else 1))
                for index, entry in enumerate(history)
                for quality in entry["quality"][number]
                if np.isfinite(quality)
            ]
            if not points:
                continue
            x, y = np.array(points).T
            panel.plot(x, y, "o", color=color, markersize=3, alpha=0.5)
            steps = np.unique(x)
            best = np.array([(y[x == step].min() if lower else y[x == step].max()) for step in steps])
            if len(different) == 1:
                best = np.minimum.accumulate(best) if lower else np.maximum.accumulate(best)
            panel.plot(np.round(steps - offset) if len(different) == 1 else steps, best, color=color, linestyle=dash)
        if len(different) > 1:
            panel.xaxis.set_major_formatter(EngFormatter(sep=""))
        else:
            panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        what = "steps done when compared" if len(different) > 1 else "generation"
        plots._label(figure, [panel], what, f"{score_name}\nIQM over the choosing seeds")
        plots._legend(figure, [panel], [("", entries)] if len(entries) > 1 else [])
        panel.set_title("Settings tried" + ("" if len(different) > 1 else ", line: best so far"), fontsize=11)
        return plots._write(figure, path)


def _look(number: int) -> tuple[Any, Any]:
    """Colour and dash of an agent, the same in all figures."""
    return plots.PALETTE[number % len(plots.PALETTE)], plots.DASHES[number // len(plots.PALETTE) % len(plots.DASHES)]

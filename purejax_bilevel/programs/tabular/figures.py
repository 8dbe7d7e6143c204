"""Figures of the finite MDP studies, from results datasets alone, one per agent: return and value errors against the
model's norm bound, and the cost of inexact inner solutions.

Lines are means over seeds, as in the paper (a few seeds at a misspecified model end in another optimum, and count);
bands are 95 % bootstrap intervals of the mean.
Source: Nikishin et al. 2022, "Control-oriented model-based reinforcement learning with implicit differentiation",
figures of section 4.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import matplotlib
import xarray
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from purejax_bilevel.results import plots, statistics
from purejax_bilevel.results.dataset import SEED, STEP

Datasets = Mapping[str, xarray.Dataset]  # by agent

COLORS = {"omd": plots.PALETTE[1], "mle": plots.PALETTE[0], "exact": plots.PALETTE[1], "identity": plots.PALETTE[2]}
BOUND_LABEL = "bound on the norm of the model's parameters"


def norm_bound(datasets: Datasets, path: str | Path) -> Path:
    """Draws the return in the true MDP against the norm bound, one line per agent, and the optimal return.

    Args:
        datasets: by agent, with the dimension norm_bound.
        path: the figure's file; its ending says the format.

    Returns:
        The path.

    Raises:
        UserError: other hyper-parameters vary too, or the place is not writable.
    """
    with matplotlib.rc_context(plots.STYLE):
        figure, (panel,) = _panels(1)
        for number, (label, dataset) in enumerate(datasets.items()):
            _draw(panel, dataset, "norm_bound", "evaluation_return", _color(label, number), label)
        best = max(float(_optimal_return(dataset)) for dataset in datasets.values())
        panel.axhline(best, color="#404040", linestyle=plots.DASHES[1], linewidth=1.0, label="optimal", zorder=1)
        panel.set(xlabel=BOUND_LABEL, ylabel=_label("return of the model's optimal policy", datasets))
        panel.legend(loc="lower right")
        return plots._write(figure, path)


def value_bounds(datasets: Datasets, path: str | Path) -> Path:
    """Draws the error of the model's optimal Q and the bound that each agent's theory gives, against the norm bound.

    Args:
        datasets: by agent, with the dimension norm_bound; an agent called mle gets the bound by prediction errors, any
            other the one by the Bellman error.
        path: the figure's file; its ending says the format.

    Returns:
        The path.

    Raises:
        UserError: other hyper-parameters vary too, or the place is not writable.
    """
    with matplotlib.rc_context(plots.STYLE):
        figure, (panel,) = _panels(1)
        for number, (label, dataset) in enumerate(datasets.items()):
            bound = "mle_bound" if label == "mle" else "omd_bound"
            color = _color(label, number)
            _draw(panel, dataset, "norm_bound", "q_error", color, f"{label}: error")
            _draw(panel, dataset, "norm_bound", bound, color, f"{label}: bound on it", dashed=True)
        panel.set_yscale("log")
        panel.set(xlabel=BOUND_LABEL, ylabel=_label("largest error of the model's optimal Q", datasets))
        panel.legend(loc="best", ncols=len(datasets))
        return plots._write(figure, path)


def ift_noise(datasets: Datasets, path: str | Path) -> Path:
    """Draws return and Bellman error of the learned model against the noise on the inner solutions it was learned with.

    Args:
        datasets: by way of differentiating, with the dimension inner_noise.
        path: the figure's file; its ending says the format.

    Returns:
        The path.

    Raises:
        UserError: other hyper-parameters vary too, or the place is not writable.
    """
    with matplotlib.rc_context(plots.STYLE):
        figure, panels = _panels(2)
        for number, (label, dataset) in enumerate(datasets.items()):
            for panel, variable in zip(panels, ("evaluation_return", "bellman_error"), strict=True):
                _draw(panel, dataset, "inner_noise", variable, _color(label, number), label)
        panels[0].set(ylabel=_label("return of the model's optimal policy", datasets))
        panels[1].set(ylabel="mean squared Bellman error", yscale="log")
        for panel in panels:
            panel.set(xlabel="standard deviation of the noise on Q", xscale="log")
        panels[0].legend(loc="lower left", title="inverse Jacobian")
        return plots._write(figure, path)


FIGURES: dict[str, Callable[[Datasets, str | Path], Path]] = {
    "norm_bound": norm_bound,
    "value_bounds": value_bounds,
    "ift_noise": ift_noise,
}
AXES = {"norm_bound": "norm_bound", "value_bounds": "norm_bound", "ift_noise": "inner_noise"}  # of the figures


# ---------------------------------------------------------------- parts


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(6.4, 4.0) if count == 1 else (4.4 * count, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, count, squeeze=False).flatten().tolist()


def _color(label: str, number: int) -> str:
    return COLORS.get(label, plots.PALETTE[number % len(plots.PALETTE)])


def _label(text: str, datasets: Datasets) -> str:
    seeds = max(dataset.sizes[SEED] for dataset in datasets.values())
    return f"{text}\nmean over {seeds} seeds, 95 % interval" if seeds > 1 else text


def _draw(
    panel: Axes, dataset: xarray.Dataset, axis: str, variable: str, color: str, label: str, dashed: bool = False
) -> None:
    scores = statistics.member_scores(dataset, variable)
    plots.draw_means(panel, dataset, axis, scores, color, label, dashed=dashed)


def _optimal_return(dataset: xarray.Dataset) -> float:
    last = dataset.isel({STEP: -1})
    return float((last["evaluation_return"] + last["optimality_gap"]).mean())

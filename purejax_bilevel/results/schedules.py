"""Settings that adapted themselves in a run (`--adapt`), from a results dataset alone: their schedules and where they
ended.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
import numpy as np
import xarray
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from purejax_bilevel.configuration import adapted_of
from purejax_bilevel.results import plots, statistics
from purejax_bilevel.results.analysis import AgentResult
from purejax_bilevel.results.dataset import SEED, STEP, setting_dimensions, setting_labels
from purejax_bilevel.results.document import Block, Heading, Paragraph, Picture, Table

FILE_NAME = "schedules.png"
MOST_NAMED = len(plots.PALETTE)  # settings in the legend


def adapted_settings(dataset: xarray.Dataset) -> list[str]:
    """Names of the settings that adapted themselves."""
    return str(dataset.attrs.get("config", {}).get("adapt", "")).split()


def of_setting(dataset: xarray.Dataset, name: str) -> tuple[np.ndarray, np.ndarray]:
    """A setting's first values `[settings]`, and its values at all rows `[settings, seeds, rows]`; NaN where failed."""
    own = setting_dimensions(dataset)
    labels, stated = setting_labels(dataset), dataset.attrs["config"][name]
    array = dataset[adapted_of(name)].where(~dataset["failed"]).transpose(*own, SEED, STEP).values
    firsts = np.array([label.get(name, stated) for label in labels], float)
    return firsts, array.reshape(len(labels), *array.shape[-2:])


def draw(dataset: xarray.Dataset, path: str | Path) -> Path:
    """Draws the schedules of all adapted settings and the headline: thin lines are seeds, thick ones medians.

    Args:
        dataset: with settings that adapted themselves.
        path: the figure's file; its ending says the format.

    Returns:
        The path.
    """
    names = adapted_settings(dataset)
    headline = str(dataset.attrs["headline"])
    steps = dataset[STEP].values
    with matplotlib.rc_context(plots.STYLE):
        figure = Figure(figsize=(6.0, 1.2 + 1.7 * (len(names) + 1)), layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(len(names) + 1, 1, sharex=True, squeeze=False)[:, 0]
        for panel, name in zip(panels, names, strict=False):
            firsts, values = of_setting(dataset, name)
            begun = np.broadcast_to(firsts[:, None, None], (*values.shape[:2], 1))
            _draw(panel, np.append(0, steps), np.concatenate([begun, values], axis=-1))
            near_one = np.nanmedian(values) > 0.5 and np.nanmax(values) < 1  # where what is left to 1 matters
            panel.set_yscale("logit" if near_one else "log")
            panel.set_ylabel(name.replace("_", " "))
        array = statistics.require_variable(dataset, headline).where(~dataset["failed"])
        scores = array.transpose(*setting_dimensions(dataset), SEED, STEP).values
        _draw(panels[-1], steps, scores.reshape(-1, *scores.shape[-2:]))
        panels[-1].set_ylabel(headline.replace("_", " "))
        panels[-1].set_xlabel(str(dataset[STEP].attrs.get("long_name", STEP)))
        panels[-1].set_xlim(0, steps[-1])
        panels[-1].xaxis.set_major_formatter(EngFormatter(sep=""))
        _legend(figure, panels[0], dataset)
        figure.suptitle(str(dataset.attrs["title"]))
        return plots._write(figure, path)


def _draw(panel: Axes, steps: np.ndarray, values: np.ndarray) -> None:
    """Lines of `[settings, seeds, steps]`."""
    for number, own in enumerate(values):
        color = plots.PALETTE[number % MOST_NAMED]
        panel.plot(steps, own.T, color=color, linewidth=0.5, alpha=0.6)
        alive = own[np.isfinite(own).any(1)]
        if len(alive):
            panel.plot(steps, np.nanmedian(alive, axis=0), color=color, linewidth=1.6)


def _legend(figure: Figure, panel: Axes, dataset: xarray.Dataset) -> None:
    labels = setting_labels(dataset)
    if not 1 < len(labels) <= MOST_NAMED:
        return
    for number, label in enumerate(labels):
        words = ", ".join(f"{name} {value:.3g}" for name, value in label.items())
        panel.plot([], [], color=plots.PALETTE[number], linewidth=1.6, label=words)
    figure.legend(loc="outside lower center", ncols=2)


# --- the section of a report ------------------------------------------------------------------------------------------


def blocks(agents: Sequence[AgentResult], place: Callable[[str], Path]) -> list[Block]:
    """What a report says of the agents whose settings adapted themselves.

    Args:
        agents: of a sweep.
        place: the path of a figure by its name.
    """
    found: list[Block] = []
    for number, agent in enumerate(agents):
        if adapted_settings(agent.dataset):
            found += _of_agent(agent, place(f"schedules-{number}.png"))
    return [Heading("Settings that adapted themselves"), *found] if found else []


def _of_agent(agent: AgentResult, path: Path) -> list[Block]:
    dataset, rows = agent.dataset, []
    for number, label in enumerate(setting_labels(dataset)):
        words = ", ".join(f"{name}={value:.4g}" for name, value in label.items() if isinstance(value, float)) or "all"
        for name in adapted_settings(dataset):
            firsts, values = of_setting(dataset, name)
            ends = values[number, :, -1]
            ends = ends[np.isfinite(ends)]
            told = f"{np.median(ends):.3g} ({ends.min():.3g} to {ends.max():.3g})" if len(ends) else "failed"
            rows.append((words, name, f"{firsts[number]:.3g}", told))
    config = dataset.attrs["config"]
    text = (
        f"{agent.label}: hypergradients of the validation loss through {config['adapt_steps']} updates change these "
        "settings. They see no further: what helps later may be worse now, so that rates tend to become too small."
    )
    table = Table(("setting", "adapted", "first value", "median at the end (least to most over seeds)"), rows)
    return [
        Paragraph(text),
        Picture(draw(dataset, path), "Schedules; thin lines are seeds, thick ones medians."),
        table,
    ]

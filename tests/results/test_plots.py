"""Figures: every setting is drawn once and can be told apart, nothing overlaps or is cut off, the numbers are right."""

import itertools

import numpy as np
import pytest
from matplotlib import pyplot
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.image import imread

from purejax_bilevel.errors import UserError
from purejax_bilevel.members import Axis, Grid
from purejax_bilevel.results import dataset as datasets
from purejax_bilevel.results import plots, statistics

STEPS = 1000 * np.arange(1, 13)


def axis(name: str, *values) -> Axis:
    return Axis((name,), tuple((value,) for value in values))


LR = axis("lr", 1e-3, 3e-4, 1e-4, 3e-5)
WIDTH = axis("model_hidden_dim", 2, 3, 4, 8)
TAU = axis("tau", 0.01, 0.1)
AGENT = axis("agent_type", "omd", "funcbo", "mle")
SEARCH = Axis(("lr", "inner_lr"), tuple((10.0**-i, 2.0**-i) for i in range(1, 21)))


def make_dataset(*axes: Axis, seeds: int = 5, failed: int = 0, better: str = "higher"):
    grid = Grid(axes, tuple(range(seeds)))
    random = np.random.default_rng(0)
    level = np.repeat(np.arange(len(grid) // seeds), seeds)[:, None] + random.normal(size=(len(grid), 1))
    series = 100 + level * STEPS / 1000 + random.normal(size=(len(grid), len(STEPS)))
    series[:failed] = np.nan
    attributes = {"program": "omd", "environment": "CartPole-v1", "headline": "final_return"}
    described = {"evaluation_return": {"units": "reward per episode", "better": better}}
    finals = {"final_return": series[:, -3:]}
    layers = {"gradient_norm": np.stack([series, series + 2], -1)}
    return datasets.build_dataset(grid, STEPS, {"evaluation_return": series, **layers}, finals, attributes, described)


@pytest.fixture(autouse=True)
def coarse(monkeypatch) -> None:
    """Small pictures, for speed."""
    monkeypatch.setitem(plots.STYLE, "savefig.dpi", 40)


@pytest.fixture
def drawn(monkeypatch) -> list[Figure]:
    """Figures written during the test, which begins with none open."""
    pyplot.close("all")
    figures, write = [], plots._write
    monkeypatch.setattr(plots, "_write", lambda figure, path: (figures.append(figure), write(figure, path))[1])
    return figures


def assert_readable(figure: Figure) -> None:
    """Titles, labels and legends lie inside the paper and do not overlap panels or each other."""
    figure.canvas.draw()
    texts = [text for text in (figure._suptitle, figure._supxlabel, figure._supylabel) if text]
    for panel in figure.axes:
        texts += [panel.title, panel.xaxis.label, panel.yaxis.label]
    items = [*(text for text in texts if text.get_text()), *figure.legends]
    boxes = [item.get_window_extent() for item in items]
    for box in boxes:
        assert figure.bbox.x0 <= box.x0 <= box.x1 <= figure.bbox.x1
        assert figure.bbox.y0 <= box.y0 <= box.y1 <= figure.bbox.y1
    others = boxes + [panel.get_window_extent() for panel in figure.axes]
    for first, second in itertools.combinations(others, 2):
        across = min(first.x1, second.x1) - max(first.x0, second.x0)
        along = min(first.y1, second.y1) - max(first.y0, second.y0)
        assert min(across, along) < 1.0


CASES = {
    "seeds only": ((), 1, 1),
    "few": ((LR, TAU), 1, 8),
    "sixteen": ((LR, WIDTH), 4, 4),
    "dashed": ((AGENT, WIDTH, TAU), 3, 8),
    "rows of panels": ((LR, WIDTH, axis("alpha", 1, 2, 3)), 12, 4),
    "four axes": ((AGENT, TAU, axis("alpha", 0.1, 1.0), LR), 12, 4),
    "many values": ((axis("lr", *np.geomspace(1e-5, 1, 20).tolist()),), 1, 20),
    "search": ((SEARCH,), 1, 20),
}


@pytest.mark.parametrize("case", CASES)
def test_every_setting_is_drawn_once_and_the_figure_is_readable(case, drawn, tmp_path):
    axes, panels, lines = CASES[case]
    dataset = make_dataset(*axes, failed=2)
    path = plots.learning_curves(dataset, tmp_path / "figure.png")
    (figure,) = drawn
    assert imread(path).shape[2] == 4
    assert len(figure.axes) == panels
    expected = statistics.stratified_bootstrap_interval(
        np.moveaxis(dataset["evaluation_return"].values.reshape(-1, 5, 12), 1, 2)[..., None]
    )
    found = []
    for panel in figure.axes:
        curves = [line for line in panel.lines if line.get_zorder() > 1]
        assert len(curves) == lines
        styles = [(to_hex(line.get_color()), str(line._unscaled_dash_pattern)) for line in curves]
        assert len(set(styles)) == lines or case == "search"
        found += [tuple(line.get_ydata()) for line in curves]
    assert sorted(found) == sorted(map(tuple, expected.estimate))
    title = figure._suptitle.get_text() if panels > 1 else figure.axes[0].get_title()
    assert title == f"omd on CartPole-v1\n2 of {len(expected.low) * 5} members failed and are left out"
    assert_readable(figure)
    assert pyplot.get_fignums() == []


def test_panels_show_the_settings_their_titles_name(drawn, tmp_path):
    dataset = make_dataset(AGENT, TAU, axis("alpha", 0.1, 1.0), LR)
    plots.learning_curves(dataset, tmp_path / "figure.png")
    panel = next(panel for panel in drawn[0].axes if panel.get_title() == "agent_type=mle, lr=0.0003")
    chosen = dataset["evaluation_return"].sel(agent_type="mle", lr=3e-4).values  # [tau, alpha, seed, step]
    expected = statistics.iqm(np.moveaxis(chosen, 2, 3)[..., None]).reshape(4, -1)
    np.testing.assert_allclose([line.get_ydata() for line in panel.lines], expected)
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == [
        "tau",
        "0.01",
        "0.1",
        " ",
        "alpha",
        "0.1",
        "1",
    ]


def test_labels_name_quantity_unit_and_statistic(drawn, tmp_path):
    plots.learning_curves(make_dataset(TAU), tmp_path / "figure.pdf", title="mine")
    (panel,) = drawn[0].axes
    assert panel.get_xlabel() == "environment steps"
    assert panel.get_ylabel() == "evaluation return (reward per episode)\nIQM over 5 seeds, 95 % interval"
    assert panel.get_title() == "mine"
    assert [text.get_text() for text in panel.get_legend().get_texts()] == ["tau=0.01", "tau=0.1"]


def test_band_is_the_bootstrap_interval(drawn, tmp_path):
    dataset = make_dataset(seeds=7)
    plots.learning_curves(dataset, tmp_path / "figure.png")
    (panel,) = drawn[0].axes
    interval = statistics.stratified_bootstrap_interval(dataset["evaluation_return"].values.T[..., None])
    corners = panel.collections[0].get_paths()[0].vertices[:, 1]
    assert corners.max() == pytest.approx(interval.high.max())
    assert corners.min() == pytest.approx(interval.low.min())
    assert sum(line.get_zorder() == 1 for line in panel.lines) == 7  # every member, thin


def test_search_names_the_best_settings(drawn, tmp_path):
    for better, best in (("higher", "lr=1e-20, inner_lr=9.54e-07"), ("lower", "lr=0.1, inner_lr=0.5")):
        plots.learning_curves(make_dataset(SEARCH, better=better), tmp_path / "figure.png")
        texts = [text.get_text() for text in drawn[-1].legends[0].get_texts()]
        assert texts[:2] == ["best 6 of 20 settings", best]
        assert texts[-1] == "the other 14"


def test_layers_are_averaged_and_single_rows_are_visible(drawn, tmp_path):
    dataset = make_dataset(TAU)
    plots.learning_curves(dataset, tmp_path / "figure.png", "gradient_norm")
    values = statistics.iqm(np.moveaxis(dataset["gradient_norm"].values.mean(-1), 1, 2)[..., None])
    np.testing.assert_allclose([line.get_ydata() for line in drawn[0].axes[0].lines], values)
    plots.learning_curves(dataset.isel(step=[0]), tmp_path / "figure.png")
    assert drawn[1].axes[0].lines[0].get_marker() == "o"


def test_errors_are_sentences(tmp_path):
    dataset = make_dataset(LR)
    with pytest.raises(UserError, match="no variable 'reward'"):
        plots.learning_curves(dataset, tmp_path / "figure.png", "reward")
    with pytest.raises(UserError, match="measured once"):
        plots.learning_curves(dataset, tmp_path / "figure.png", "final_return")
    with pytest.raises(UserError, match="the ending has to be one of"):
        plots.learning_curves(dataset, tmp_path / "figure.xyz")

"""The program that fits an ensemble: when it ends, what it keeps, what it leaves, and how well it knows its errors."""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import xarray

from purejax_bilevel import run
from purejax_bilevel.errors import UserError
from purejax_bilevel.programs.offline import KINDS, LEVELS, calibration, ensemble, fitting, termination, toy
from purejax_bilevel.programs.offline.datasets import Dataset
from purejax_bilevel.programs.offline.ensemble import Architecture, Layer, Transitions, fit_normaliser
from purejax_bilevel.programs.offline.ensemble_program import KIND, Config, terminals_of
from purejax_bilevel.runtime import artefacts

CONFIG = Config(
    dataset="sine",
    test_dataset="sine-grid",
    model_networks=3,
    model_hidden_dim=24,
    model_layers=2,
    model_batch_size=64,
    model_epoch_steps=40,
    model_epochs=70,
    model_patience=(2, 60),
    model_lr=3e-3,
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run for all: a member that gives up early and one that does not."""
    folder = tmp_path_factory.mktemp("fit")
    run(CONFIG, folder=folder, quiet=True, devices=1)
    return folder


@pytest.fixture(scope="module")
def results(place: Path) -> xarray.Dataset:
    from purejax_bilevel.results import dataset as datasets

    return datasets.load(place).isel(seed=0)


def test_fitting_ends_when_no_network_improves_and_not_before(results: xarray.Dataset) -> None:
    for patience in (2, 60):
        own = results.sel(model_patience=patience)
        current = own.current_error.values
        done = np.isfinite(current).sum()
        assert np.isfinite(current[:done]).all()
        assert (np.diff(own.validation_error.values[:done]) <= 0).all()
        assert done == len(current) or done > patience
    early = np.isfinite(results.sel(model_patience=2).current_error.values).sum()
    assert 2 < early < 60


def test_patience_counts_epochs_without_enough_improvement_of_any_network() -> None:
    architecture = Architecture(1, 1, networks=2, hidden=(2,), reward_hidden=())
    config = Config(model_patience=2, model_improvement=0.1)
    normaliser = ensemble.no_normaliser(architecture)
    fit = jax.jit(lambda key: fitting.begin(config, architecture, normaliser, key))(jax.random.key(0))
    judge = jax.jit(lambda fit, errors: fitting._judged(config, fit, errors))
    seen = []
    fit = jax.tree.map(np.asarray, fit)
    for epoch, errors in enumerate([[9.0, 9.0], [8.5, 8.5], [9.5, 8.05], [8.6, 8.6], [8.6, 8.01]]):
        networks = jax.tree.map(lambda leaf, epoch=epoch: np.full_like(leaf, epoch), fit.networks)
        fit = judge(fit.replace(networks=networks), np.array(errors, "f"))
        seen.append((int(fit.epochs_since), bool(fit.is_over)))
    # From 9.0 an error must fall below 8.1 to count: it does once; better by less is kept all the same.
    assert seen == [(0, False), (1, False), (0, False), (1, False), (2, True)]
    np.testing.assert_allclose(fit.best_errors, [8.5, 8.01])
    np.testing.assert_array_equal(fit.best.trunks["obs"][0].kernel[:, 0, 0], [1.0, 4.0])
    np.testing.assert_array_equal(fitting.fitted(fit).ranking, [1, 0])


def test_the_artefact_has_the_networks_that_were_best(place: Path, results: xarray.Dataset) -> None:
    architecture, data = fitting.architecture_of(CONFIG, 1, 1), toy.make("sine")
    shared = fitting.shared_rows(data, False)
    order = shared["order"][fitting.split_of(CONFIG, len(data)).learned :]
    rows = Transitions(*(array[order] for array in (data.obs, data.action, data.reward, data.next_obs, data.reward)))
    validated = jax.jit(functools.partial(ensemble.validation_errors, architecture))
    networks = jax.eval_shape(lambda: ensemble.init(architecture, jax.random.key(0)))
    like = fitting.Model(networks, ensemble.no_normaliser(architecture), np.arange(3, dtype=np.int32), np.ones(3, "f"))
    for member, patience in enumerate((2, 60)):
        own = results.sel(model_patience=patience)
        model = artefacts.load(place, KIND).member(member, like)
        errors = np.asarray(validated(model.networks, model.normaliser, rows))
        np.testing.assert_allclose(errors, own.network_error.values, rtol=1e-4)
        np.testing.assert_allclose(np.sort(errors), errors[model.ranking])
        assert np.nanmin(own.current_error.values) >= errors.mean() - 1e-6


def test_the_sine_is_learned_with_its_noise_and_its_gap(results: xarray.Dataset) -> None:
    own = results.sel(model_patience=60)
    x = toy.grid(own.sizes["row"])
    inside, gap = (np.abs(x) > np.pi) & (np.abs(x) < 2 * np.pi), np.abs(x) < np.pi / 2
    std = own.row_reward_std.values.mean(0)
    assert np.corrcoef(std[inside], toy.noise_std(x)[inside])[0, 1] > 0.8
    distance = own.row_uncertainty.values[1, KINDS.index("max_distance")]
    assert distance[gap].mean() > 3 * distance[inside].mean()
    assert np.abs(own.coverage.values[0] - LEVELS).max() < 0.12  # held-out rows
    assert np.abs(own.coverage.values[1] - LEVELS).max() > 0.15  # gap and beyond
    assert own.rank_correlation.values[1, KINDS.index("max_distance")] > 0.5


def test_the_run_leaves_its_figures(place: Path) -> None:
    for name in ("learning_curves.png", "calibration.png", "sine.png"):
        assert (place / name).stat().st_size > 10_000


# --- calibration ------------------------------------------------------------------------------------------------------


def certain_networks(architecture: Architecture, log_var: float) -> ensemble.Networks:
    """Networks that predict no change, reward 0 and one raw log-variance."""
    shapes = jax.eval_shape(lambda: ensemble.init(architecture, jax.random.key(0)))
    trunks = {}
    for name, layers in shapes.trunks.items():
        zero = [Layer(np.zeros(layer.kernel.shape, "f"), np.zeros(layer.bias.shape, "f")) for layer in layers]
        zero[-1].bias[..., zero[-1].bias.shape[-1] // 2 :] = log_var
        trunks[name] = tuple(zero)
    bounds = [np.full(bound.shape, value, "f") for bound, value in zip(shapes.bounds, (0.5, 0.5, -10.0), strict=True)]
    return ensemble.Networks(trunks, ensemble.Bounds(*bounds))


def test_intervals_of_the_right_size_have_the_right_coverage() -> None:
    architecture = Architecture(2, 1, networks=2, hidden=(2,), reward_hidden=())
    random = np.random.default_rng(0)
    obs = random.standard_normal((4000, 2)) * [3.0, 0.2]
    normaliser = fit_normaliser(obs, random.standard_normal((4000, 1)))
    size = float(np.exp(0.5 * ensemble.softly_bounded(-4.0, -10.0, 0.5)))
    noise = random.standard_normal((4000, 3)) * size
    next_obs, zeros = obs + noise[:, :2] * np.asarray(normaliser.std[:2]), np.zeros(4000)
    rows = Transitions(*(jnp.asarray(x, jnp.float32) for x in (obs, zeros[:, None], noise[:, 2], next_obs, zeros)))
    model = fitting.Model(certain_networks(architecture, -4.0), normaliser, jnp.arange(2), jnp.ones(2))
    found = jax.jit(lambda: calibration.calibrate(architecture, model, rows))()
    np.testing.assert_allclose(found.coverage, LEVELS, atol=0.02)
    np.testing.assert_allclose(found.error, np.linalg.norm(noise[:, :2], axis=1), rtol=1e-3, atol=1e-5)
    assert not np.asarray(found.rank_correlation).any()  # no uncertainty varies here
    expected = np.full(4000, size * 2**0.5)
    np.testing.assert_allclose(found.uncertainty[KINDS.index("ensemble_std")], expected, rtol=1e-4)


def test_rank_correlation_is_spearmans() -> None:
    first, second = np.random.default_rng(0).standard_normal((2, 50)).astype(np.float32)
    others = np.stack([first + second, -first, np.ones_like(first)])
    expected = [scipy.stats.spearmanr(first, first + second).statistic, -1.0, 0.0]
    found = jax.jit(calibration.rank_correlations)(first, others)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_statistics_of_uncertainties_are_of_each_row_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "CHUNK", 8)
    architecture = Architecture(2, 1, networks=3, hidden=(4,), reward_hidden=())
    networks = jax.jit(lambda key: ensemble.init(architecture, key))(jax.random.key(1))
    columns = jax.random.normal(jax.random.key(2), (21, 3))
    normaliser = ensemble.no_normaliser(architecture)
    model = fitting.Model(networks, normaliser, jnp.arange(3), jnp.ones(3))
    found = jax.jit(lambda: calibration.uncertainty_statistics(architecture, model, columns[:, :2], columns[:, 2:]))()
    predict = functools.partial(ensemble.predict, architecture, networks, normaliser)
    whole = jax.jit(lambda: calibration._uncertainties(predict(columns[:, :2], columns[:, 2:]), model))()
    whole = np.asarray(whole)
    for numbers, expected in zip(found, (whole.max(1), whole.mean(1), whole.std(1)), strict=True):
        np.testing.assert_allclose(numbers, expected, rtol=1e-5)


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"dataset": ""}, "--dataset is needed.*--agent_type collect"),
        ({"dataset": "nowhere.npz"}, "--dataset nowhere.npz: there is no such file"),
        ({"model_batch_size": 4000}, "sine has 2000 rows, which is too few for --model_batch_size 4000"),
        ({"held_out": 0.0}, "--held_out must be a number above 0 and below 1"),
        ({"model_terminals": "learned"}, "--model_terminals learned: no row of sine is terminal"),
        ({"model_terminals": "rule"}, "--model_terminals rule: when episodes of sine end is not known"),
        ({"agent_type": "omd"}, "--agent_type must be one of ensemble"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        Config(**{"dataset": "sine", **changes}).resolved()


def test_what_ends_imagined_episodes() -> None:
    def data(environment: str, terminal: bool) -> Dataset:
        column, ends = np.zeros((4, 1), np.float32), np.array([False, False, False, terminal])
        return Dataset(column, column, column[:, 0], column, ends, ~ends, environment)

    assert terminals_of(Config(), data("hopper-medium-v2", True)) is termination.hopper
    assert terminals_of(Config(), data("Maze", False)) is termination.never
    assert terminals_of(Config(), data("Maze", True)) is None  # learned
    assert terminals_of(Config(model_terminals="learned"), data("walker2d", True)) is None
    assert terminals_of(Config(model_terminals="never"), data("walker2d", True)) is termination.never
    assert terminals_of(Config(), data("", True), "Pendulum-v1") is termination.never

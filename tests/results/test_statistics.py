"""Statistics against hand-computed values, scipy, and bootstraps written as plain loops."""

import io
import time

import numpy as np
import pytest
import scipy.stats
from rich.console import Console

from purejax_bilevel.errors import UserError
from purejax_bilevel.members import Axis, Grid
from purejax_bilevel.results import dataset as datasets
from purejax_bilevel.results import statistics
from purejax_bilevel.results.statistics import Estimate

RANDOM = np.random.default_rng(0)


def make_dataset(scores: np.ndarray, better: str = "higher", failed: np.ndarray | None = None):
    """Two axes; `scores` is `[settings, seeds]`, and every member evaluates three episodes around its score."""
    grid = Grid((Axis(("lr",), ((1e-3,), (3e-4,))), Axis(("width",), ((2,), (3,)))), tuple(range(scores.shape[1])))
    episodes = scores.reshape(-1, 1) + np.asarray([-1.0, 0.0, 1.0])
    finals = {"final_return": episodes}
    if failed is not None:
        finals["failed"] = failed.reshape(-1)
    series = {"loss": np.stack([scores.reshape(-1) * 2, scores.reshape(-1)], axis=1)}
    return datasets.build_dataset(grid, [1, 2], series, finals, {}, {"final_return": {"better": better}})


# ---------------------------------------------------------------- point values


def test_iqm_by_hand():
    # 8 scores: two are cut at each end; 5 scores: one (a quarter of 5 is 1.25, rounded down).
    assert statistics.iqm(np.asarray([100.0, 1, 2, 3, 4, 5, 6, -50])) == pytest.approx((2 + 3 + 4 + 5) / 4)
    assert statistics.iqm(np.asarray([9.0, 1, 2, 3, 30])) == pytest.approx((2 + 3 + 9) / 3)
    # Runs and tasks are pooled before the cut.
    assert statistics.iqm(np.asarray([[0.0, 8.0], [2.0, 4.0]])) == pytest.approx(3.0)


@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (7, 4), (64, 1)])
def test_iqm_is_the_trimmed_mean_of_scipy(shape):
    scores = RANDOM.normal(size=(5, 2, *shape))
    expected = [[scipy.stats.trim_mean(cell, 0.25, axis=None) for cell in row] for row in scores]
    np.testing.assert_allclose(statistics.iqm(scores), expected, rtol=1e-12)


def test_optimality_gap_by_hand():
    # Shortfalls from 500: 100, 0, 300 and 0 (600 counts as 500).
    assert statistics.optimality_gap(np.asarray([400.0, 500, 200, 600]), 500.0) == pytest.approx(100.0)


def test_probability_of_improvement_by_hand():
    # 3 against 1, 3: better, equal; 5: better twice. (1 + 0.5 + 1 + 1) / 4.
    found = statistics.probability_of_improvement(np.asarray([3.0, 5.0]), np.asarray([1.0, 3.0]))
    assert found.estimate == pytest.approx(3.5 / 4)
    x, y = RANDOM.normal(0.3, size=(12, 2)), RANDOM.normal(size=(9, 2))
    ranks = [scipy.stats.mannwhitneyu(x[:, task], y[:, task]).statistic / (12 * 9) for task in range(2)]
    found = statistics.probability_of_improvement(x, y)
    assert found.estimate == pytest.approx(np.mean(ranks))
    assert found.low < found.estimate < found.high


def test_performance_profile_by_hand():
    scores = np.asarray([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0], [4.0, np.nan]])
    found = statistics.performance_profile(scores, np.asarray([0.0, 2.0, 25.0, 100.0]))
    # Above 2 (strictly): half of the first task, all three runs of the second.
    np.testing.assert_allclose(found.estimate, [1.0, (2 / 4 + 3 / 3) / 2, (0 + 1 / 3) / 2, 0.0])
    assert found.used[0] == 7
    assert found.excluded[0] == 1
    np.testing.assert_array_equal(found.low[[0, 3]], found.estimate[[0, 3]])
    assert found.low[1] < found.estimate[1] < found.high[1]


# ---------------------------------------------------------------- intervals


def plain_iqm(scores: np.ndarray) -> float:
    cut = int(0.25 * len(scores))
    middle = sorted(scores)[cut : len(scores) - cut]
    return sum(middle) / len(middle)


def brute_force(scores: np.ndarray, statistic, reps: int = 4000) -> np.ndarray:
    """Bootstrap values of one cell `[runs, tasks]`, one resample at a time."""
    generator = np.random.default_rng(1)
    columns = [column[np.isfinite(column)] for column in scores.T]
    return np.asarray(
        [statistic(np.concatenate([generator.choice(column, len(column)) for column in columns])) for _ in range(reps)]
    )


def assert_bounds_are_quantiles(low: float, high: float, values: np.ndarray):
    """Compares probabilities, not scores: resampled values have gaps and atoms. 0.01 is three standard errors."""
    for bound, tail in ((low, 0.025), (high, 0.975)):
        assert np.mean(values < bound - 1e-9) < tail + 0.01
        assert np.mean(values <= bound + 1e-9) > tail - 0.01


@pytest.mark.parametrize("runs", [2, 5, 8, 30])
def test_interval_of_one_task_is_the_bootstrap(runs):
    scores = np.random.default_rng(runs).gamma(2.0, size=(3, runs, 1))
    found = statistics.stratified_bootstrap_interval(scores, reps=20000)
    for cell in range(3):
        assert_bounds_are_quantiles(found.low[cell], found.high[cell], brute_force(scores[cell], plain_iqm))


def test_interval_of_several_tasks_is_stratified():
    # Tasks on very different levels: resampling across tasks would widen the interval many times.
    scores = np.random.default_rng(0).normal(size=(2, 10, 3)) + np.asarray([0.0, 100.0, 1000.0])
    scores[1, 3:6, 2] = np.nan
    for statistic, plain in ((statistics.mean, np.mean), (statistics.iqm, plain_iqm)):
        found = statistics.stratified_bootstrap_interval(scores, statistic, reps=20000)
        np.testing.assert_array_equal(found.excluded, [0, 3])
        for cell in range(2):
            assert_bounds_are_quantiles(found.low[cell], found.high[cell], brute_force(scores[cell], plain))


def test_bootstrap_of_two_runs_by_hand():
    # Resamples of {0, 1}: mean 0 (1/4), 1/2 (1/2), 1 (1/4): both 2.5 % tails lie on the ends.
    found = statistics.stratified_bootstrap_interval(np.asarray([0.0, 1.0]))
    assert (found.estimate, found.low, found.high) == (0.5, 0.0, 1.0)
    # With 60 % confidence the tails (20 %) still lie on the ends, with 40 % (30 %) both are in the middle.
    assert statistics.stratified_bootstrap_interval(np.asarray([0.0, 1.0]), confidence=0.6).low == 0.0
    assert statistics.stratified_bootstrap_interval(np.asarray([0.0, 1.0]), confidence=0.4).low == 0.5


def test_interval_agrees_with_scipy_bootstrap_of_the_mean():
    scores = RANDOM.normal(size=15)
    found = statistics.stratified_bootstrap_interval(scores, statistics.mean, reps=20000)
    expected = scipy.stats.bootstrap(
        (scores,), np.mean, n_resamples=20000, method="percentile", rng=1
    ).confidence_interval
    assert found.low == pytest.approx(expected.low, abs=0.02)
    assert found.high == pytest.approx(expected.high, abs=0.02)


def test_interval_covers_the_true_value_about_as_often_as_it_says():
    # 1000 experiments of 20 runs each. The bootstrap of so few runs covers a little less than 95 %.
    scores = RANDOM.normal(size=(1000, 20, 1))
    found = statistics.stratified_bootstrap_interval(scores)
    covered = np.mean((found.low < 0) & (found.high > 0))
    assert 0.88 < covered < 0.98


def test_failed_runs_are_left_out_and_counted():
    whole = RANDOM.normal(size=(4, 6, 1))
    scores = np.concatenate([whole, np.full((4, 2, 1), np.nan)], axis=1)
    scores[2, 6:] = 1.0
    scores[3] = np.nan
    scores[1, 7] = np.inf
    found = statistics.stratified_bootstrap_interval(scores)
    np.testing.assert_array_equal(found.used, [6, 6, 8, 0])
    np.testing.assert_array_equal(found.excluded, [2, 2, 0, 8])
    expected = statistics.stratified_bootstrap_interval(whole[:2])
    np.testing.assert_array_equal(found.low[:2], expected.low)
    np.testing.assert_array_equal(found.high[:2], expected.high)
    assert np.isnan([found.estimate[3], found.low[3], found.high[3]]).all()


def test_one_run_has_no_interval():
    found = statistics.stratified_bootstrap_interval(np.asarray([[[4.0]], [[5.0]]]))
    np.testing.assert_array_equal(found.estimate, [4.0, 5.0])
    assert np.isnan(found.low).all()
    assert np.isnan(found.high).all()


def test_same_seed_same_interval():
    scores = RANDOM.normal(size=(10, 2))
    first, second = (statistics.stratified_bootstrap_interval(scores, seed=3) for _ in range(2))
    other = statistics.stratified_bootstrap_interval(scores, seed=4)
    assert first == second
    assert first.low != other.low


def test_learning_curves_of_many_settings_are_quick():
    scores = RANDOM.normal(size=(64, 200, 8, 1))
    start = time.process_time()  # other programs may share the cores
    found = statistics.stratified_bootstrap_interval(scores, reps=2000)
    assert time.process_time() - start < 2.0  # usually 0.5
    assert found.low.shape == (64, 200)
    assert (found.low <= found.estimate).all()


def test_confidence_outside_its_range_is_refused():
    with pytest.raises(ValueError, match="between 0 and 1"):
        statistics.stratified_bootstrap_interval(np.arange(5.0), confidence=95)


# ---------------------------------------------------------------- tables


SCORES = np.asarray(
    [[1.0, 2, 3, 4, 5, 6, 7, 80], [10, 10, 10, 10, 10, 10, 10, 10], [0, 0, 0, 0, 0, 0, 0, 0], np.arange(8)]
)


def test_summary_has_a_row_per_setting():
    failed = np.zeros((4, 8), bool)
    failed[1, 4] = True
    scores = SCORES.copy()
    scores[3, :2] = np.nan
    rows = statistics.summary_table(make_dataset(scores, failed=failed), "final_return")
    assert [row.label for row in rows] == [
        "lr=0.001, width=2", "lr=0.001, width=3", "lr=0.0003, width=2", "lr=0.0003, width=3",
    ]  # fmt: skip
    assert [row.iqm for row in rows] == pytest.approx([4.5, 10.0, 0.0, 4.5])
    assert [row.runs for row in rows] == [8, 7, 8, 6]
    assert [row.failed for row in rows] == [0, 1, 0, 2]
    assert rows[0].low < 4.5 < rows[0].high
    assert [row.index for row in rows] == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_summary_of_a_series_averages_its_last_steps():
    dataset = make_dataset(SCORES)
    assert statistics.summary_table(dataset, "loss")[0].iqm == pytest.approx(4.5)
    assert statistics.summary_table(dataset, "loss", over=1.0)[0].iqm == pytest.approx(1.5 * 4.5)


def test_summary_of_a_slice_or_of_seeds_only():
    rows = statistics.summary_table(make_dataset(SCORES).sel(lr=1e-3, width=2), "final_return")
    assert [(row.label, row.iqm) for row in rows] == [("all", pytest.approx(4.5))]


def test_rows_without_a_value_do_not_count_and_infinite_ones_fail():
    rows = np.array([[1.0, 2.0, 3.0, np.nan], [1.0, 1.0, 1.0, 5.0], [1.0, 1.0, np.inf, 1.0]])
    failed = np.array([False, False, False])
    np.testing.assert_array_equal(statistics.row_scores(rows, failed), [np.nan, 5.0, 1.0])
    np.testing.assert_array_equal(statistics.row_scores(rows, failed, 0.5), [3.0, 3.0, np.nan])
    np.testing.assert_array_equal(statistics.row_scores(rows, ~failed, 1.0), [np.nan] * 3)
    grid = Grid((), (0, 1, 2))
    dataset = datasets.build_dataset(grid, [1, 2, 3, 4], {"score": rows}, {}, {})
    np.testing.assert_array_equal(statistics.member_scores(dataset, "score", 0.5), [[3.0, 3.0, np.nan]])


def test_a_member_that_was_done_before_the_end_keeps_its_last_value():
    rows = np.array([[1.0, 2.0, 3.0, np.nan], [1.0, 7.0, np.nan, np.nan], [np.nan, np.nan, np.nan, np.nan]])
    scores = {
        ends_early: statistics.member_scores(
            datasets.build_dataset(Grid((), (0, 1, 2)), [1, 2, 3, 4], {"score": rows}, {}, {"ends_early": ends_early}),
            "score",
        )
        for ends_early in (True, False)
    }
    np.testing.assert_array_equal(scores[True], [[3.0, 7.0, np.nan]])
    assert np.isnan(scores[False]).all()


def test_settings_are_chosen_where_no_seed_failed():
    quality = statistics.setting_scores(np.array([[1.0, 3.0], [2.0, np.nan], [5.0, 7.0]]), lower=False)
    np.testing.assert_array_equal(quality, [2.0, np.nan, 6.0])
    assert statistics.ranking(quality).tolist() == [2, 0, 1]
    assert statistics.ranking(statistics.setting_scores(np.array([[1.0], [2.0]]), lower=True)).tolist() == [0, 1]


def test_scores_by_task_keep_settings_and_seeds_apart():
    axes = (Axis(("lr",), ((1,), (2,))), Axis(("env_name",), (("a",), ("b",), ("c",))))
    scores = np.arange(12.0)
    dataset = datasets.build_dataset(Grid(axes, (0, 1)), [1], {"score": scores[:, None]}, {}, {})
    found = statistics.by_task(dataset, statistics.member_scores(dataset, "score"))
    np.testing.assert_array_equal(found, scores.reshape(2, 3, 2).transpose(0, 2, 1))
    assert statistics.settings_without_tasks(dataset) == [{"lr": 1}, {"lr": 2}]
    assert statistics.tasks_of(dataset) == [{"env_name": name} for name in "abc"]


def test_errors_name_what_there_is():
    with pytest.raises(UserError, match="no variable 'reward'; there is loss, final_return"):
        statistics.summary_table(make_dataset(SCORES), "reward")


def rendered(rows, **options) -> str:
    console = Console(file=io.StringIO(), width=100, force_terminal=False)
    statistics.render_table(rows, console, **options)
    return console.file.getvalue()


def test_table_shows_settings_scores_and_failures():
    scores = SCORES.copy()
    scores[3] = np.nan
    text = rendered(statistics.summary_table(make_dataset(scores), "final_return"), title="final return")
    lines = text.splitlines()
    assert "final return" in lines[0]
    assert all(word in text for word in ("lr", "width", "IQM", "95 % interval", "failed", "10.00", "0.0003"))
    last = next(line for line in lines if line.count("│ 8 │") or line.rstrip().endswith("8 │"))
    assert "none" in last
    assert "nan" not in text


def test_table_shows_markup_as_written():
    row = statistics.SettingRow({"[/agent]": "omd [/x]"}, (), 1.0, 0.0, 2.0, 3, 0)
    text = rendered([row], title="score [/b]")
    assert all(word in text for word in ("[/agent]", "omd [/x]", "score [/b]"))


def test_long_table_shows_the_best():
    rows = statistics.summary_table(make_dataset(SCORES), "final_return")
    text = rendered(rows, limit=1)
    assert "10.00" in text
    assert "The best 1 of 4 settings" in text


def test_interval_type_is_public():
    assert isinstance(statistics.stratified_bootstrap_interval(np.arange(4.0)), Estimate)

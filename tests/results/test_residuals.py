"""Linear solvers that did not solve are named after the run, with what to change."""

import numpy as np
import pytest

from purejax_bilevel import RLConfig, configuration, run
from purejax_bilevel.members import Axis, Grid
from purejax_bilevel.results import dataset as datasets
from purejax_bilevel.results import residuals, statistics

STEPS = np.array([10, 20])
CONFIG = {"agent_type": "omd", "with_inv_jac": "cg", "damping": [1e-5, 1e-2], "solver_steps": 100}
DAMPING = Axis(("damping",), ((1e-5,), (1e-2,)))


def make(levels: list, axis: Axis = DAMPING, failed: tuple[int, ...] = (), **attrs):
    """A dataset with the given residuals `[settings, seeds, steps]`."""
    grid = Grid((axis,), (0, 1, 2))
    flags = np.zeros(len(grid), bool)
    flags[list(failed)] = True
    series = {"solver_residual": np.asarray(levels, float).reshape(len(grid), len(STEPS))}
    return datasets.build_dataset(grid, STEPS, series, {"failed": flags}, {"config": CONFIG, **attrs})


def test_a_setting_with_a_large_residual_is_named_with_what_to_change():
    low, high = [[0.01, 0.02]] * 3, [[0.9, np.nan], [0.7, 0.8], [1e9, 0.85]]
    (sentence,) = residuals.warnings(make([high, low], agent="implicit"))
    assert sentence == (
        "implicit, damping=1e-05: the solver cg left a relative residual of 0.85 (median over seeds and evaluations), "
        "so its hypergradients are not those of implicit differentiation; raise --damping (1e-05), since the Hessian "
        "may be indefinite, or --solver_steps (100)."
    )
    assert len(residuals.warnings(make([high, high]))) == 2
    assert residuals.warnings(make([low, low])) == []


def test_what_counts_is_measured_by_members_that_did_not_fail():
    levels = [[[9.0, 9.0], [0.01, 0.01], [9.0, 9.0]], [[np.nan, np.nan]] * 3]
    assert residuals.warnings(make(levels, failed=(0, 2))) == []
    assert len(residuals.warnings(make(levels, failed=(2,)))) == 1
    assert residuals.warnings(make(levels).drop_vars("solver_residual")) == []


def test_advice_follows_the_solver():
    axis = Axis(("with_inv_jac",), (("gmres",), ("neumann",)))
    config = {**CONFIG, "neumann_step_size": 0.1}
    first, second = residuals.warnings(make([[[2.0, 2.0]] * 3] * 2, axis, config=config))
    assert "omd, with_inv_jac=gmres: the solver gmres left" in first
    assert "raise --solver_steps (100), the size of its Krylov space, or --damping (1e-05 0.01)." in first
    assert "--neumann_step_size (0.1)" in second
    assert "lower the step size" in second


def test_programs_of_others_may_measure_a_residual():
    levels = [[[2.0, 2.0]] * 3] * 2
    assert residuals.warnings(make(levels, config={}, program="Mine")) == []
    first, _ = residuals.warnings(make(levels, config={"with_inv_jac": "lu"}, program="Mine"))
    assert first.startswith("Mine, damping=1e-05: the solver lu left a relative residual of 2 ")
    first, _ = residuals.warnings(make(levels, config={"with_inv_jac": "cg"}, program="Mine"))
    assert "--solver_steps (not set)" in first


def test_a_run_says_so_at_its_end(capsys: pytest.CaptureFixture):
    configuration.warn.cache_clear()
    sizes = {"hidden_dim": 3, "model_hidden_dim": 3, "batch_size": 8, "init_steps": 8, "num_train_steps": 16}
    episodes = {"eval_frequency": 8, "eval_episodes": 1, "final_eval_episodes": 1}
    solver = {"with_inv_jac": "neumann", "solver_steps": 1, "neumann_step_size": 1e-3}
    results = run(RLConfig(**sizes, **episodes, **solver), quiet=True, devices=1)
    assert np.nanmin(results.solver_residual) > residuals.LARGE
    assert not statistics.failed_members(results).any()
    assert "warning: omd: the solver neumann left a relative residual of 1 " in capsys.readouterr().err

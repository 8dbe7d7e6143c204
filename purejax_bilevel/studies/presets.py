"""Presets: sweep files of the studies that the original publications made, ready to run and with their figure.

`smoke` takes minutes on two cores and shows the shape of the result; `paper` has the originals' steps and many seeds.

    omd_capacity               return against the model's width: who copes with a model that cannot be right? (OMD)
    omd_inverse_jacobian       the inverse Hessian of implicit differentiation: identity or conjugate gradient (OMD)
    funcbo_cartpole            agents x inner_lr x tau, the best chosen on the return in training (funcBO)
    smoothfbo_nonstationary    smoothing window x beta while the reward drifts (SmoothFBO)
    omd_continuous             continuous control; paper: halfcheetah against the model's width, smoke: Pendulum (OMD)
    regression_agents          agents on a regression whose targets move (SmoothFBO)
    regression_window          how much of the past the inner problem sees, and the smoothing window (SmoothFBO)
    tabular_norm_bound         return on a finite MDP against the bound on the model's norm (OMD)
    tabular_value_bounds       how tight the theory's bounds on the error of Q are (OMD)
    tabular_ift_noise          implicit differentiation of inexact inner solutions (OMD)

The tabular studies take seconds, so that both scales are the original's.
"""

from collections.abc import Callable
from typing import Any

from purejax_bilevel.errors import UserError

SCALES = ("smoke", "paper")
RATES = {"space": {"lr": [1e-4, 1e-2], "inner_lr": [1e-4, 3e-3], "tau": [1e-3, 1e-1]}}  # what --search looks through


def omd_capacity(paper: bool) -> dict[str, Any]:
    return {
        "program": "rl",
        "settings": {"num_train_steps": 200_000 if paper else 25_000},
        "agents": ["omd", "mle", "vep"],
        "axes": [{"grid": {"model_hidden_dim": [1, 2, 3, 4, 6, 8, 16, 32] if paper else [2, 3, 8, 32]}}],
        "seeds": {"count": 10 if paper else 5},
        "search": RATES,
        "report": {
            "variable": "final_return",
            "figures": [{"kind": "sensitivity", "axis": "model_hidden_dim", "title": "Return against model width"}],
        },
    }


def omd_inverse_jacobian(paper: bool) -> dict[str, Any]:
    return {
        "program": "rl",
        "settings": {"num_train_steps": 200_000 if paper else 15_000},
        "agents": {
            "identity": {"agent_type": "omd"},
            "CG": {"agent_type": "omd", "with_inv_jac": "cg", "solver_steps": 100 if paper else 10},
        },
        "axes": [{"grid": {"model_hidden_dim": [3, 32]}}],
        "seeds": {"count": 10 if paper else 4},
        "search": RATES,
        "report": {
            "variable": "final_return",
            "figures": [
                {"kind": "curves", "variable": "evaluation_return", "title": "Identity against inverse Hessian"},
                {"kind": "sensitivity", "axis": "model_hidden_dim"},
            ],
        },
    }


def funcbo_cartpole(paper: bool) -> dict[str, Any]:
    return {
        "program": "rl",
        "settings": {"num_train_steps": 200_000 if paper else 15_000},
        "agents": ["funcbo", "omd", "mle", "vep"],
        "axes": [{"grid": {"inner_lr": [3e-4, 1e-3, 3e-3], "tau": [5e-3, 1e-2]}}],
        "seeds": {"count": 20 if paper else 4},
        "report": {
            "variable": "final_return",
            "select_by": "training_return",
            "select_over": 0.5,
            "figures": [{"kind": "curves", "variable": "evaluation_return", "title": "Best setting of each agent"}],
        },
    }


def smoothfbo_nonstationary(paper: bool) -> dict[str, Any]:
    windows = [10, 100, 1000] if paper else [100, 1000]
    smoothed = {"smoothing": "window", "smoothing_window": windows, "beta": [0.1, 0.3, 0.5] if paper else [0.1, 0.3]}
    return {
        "program": "rl",
        "settings": {"num_train_steps": 200_000 if paper else 20_000, "non_stationary": "drift"},
        "agents": {
            "smoothfbo": {"agent_type": "funcbo", **smoothed},
            "funcbo": {},
            "omd smoothed": {"agent_type": "omd", **smoothed},
            "omd": {},
            "mle": {},
        },
        "seeds": {"count": 10 if paper else 4},
        "report": {
            "variable": "evaluation_return",
            "over": 0.5,
            "figures": [
                {"kind": "curves", "variable": "evaluation_return", "title": "Return while the reward drifts"},
                {"kind": "sensitivity", "axis": "smoothing_window"},
                {"kind": "sensitivity", "axis": "beta"},
            ],
        },
    }


def omd_continuous(paper: bool) -> dict[str, Any]:
    widths = {"model_hidden_dim": [3, 64, 256]} if paper else {"model_hidden_dim": 64}
    length = {"num_train_steps": 200_000, "init_steps": 10_000} if paper else {"hidden_dim": 64}
    figures = [{"kind": "curves", "variable": "evaluation_return", "title": "Continuous control"}]
    return {
        "program": "continuous",
        "settings": {"env_name": "halfcheetah" if paper else "Pendulum-v1", **length},
        "agents": {"sac": {}, "omd": widths, "mle": widths},
        "seeds": {"count": 10 if paper else 5},
        "search": RATES,
        "report": {
            "variable": "final_return",
            "figures": [*figures, {"kind": "sensitivity", "axis": "model_hidden_dim"}] if paper else figures,
        },
    }


def _regression_settings(paper: bool) -> dict[str, Any]:
    # With the original's rates networks and duals learn too slowly to tell the agents apart (README's table).
    return {"T_max": 5000 if paper else 1500, "eval_frequency": 100 if paper else 50, "inner_lr": 1e-3}


DUAL_RATES = {"dual_lr": [1e-3, 1e-2]}  # the smaller one is for long runs: with the larger one they end unstable


def regression_agents(paper: bool) -> dict[str, Any]:
    return {
        "program": "regression",
        "settings": _regression_settings(paper),
        "agents": {
            "funcbo": DUAL_RATES,
            "funcbo_nosmooth": DUAL_RATES,
            "exact": {},
            "aid": {"lambda_reg": 1.0},
            "unroll1": {},
        },
        "axes": [{"grid": {"outer_lr": [1e-3, 1e-2, 1e-1] if paper else [1e-2, 1e-1]}}],
        "seeds": {"count": 10 if paper else 4},
        "report": {
            "variable": "evaluation_mse",
            "over": 0.5,
            "figures": [
                {"kind": "curves", "variable": "evaluation_mse", "title": "Error on all inputs"},
                {"kind": "curves", "variable": "local_regret", "title": "Cumulative local regret"},
            ],
        },
    }


def regression_window(paper: bool) -> dict[str, Any]:
    return {
        "program": "regression",
        "settings": {**_regression_settings(paper), "outer_lr": 1e-3},
        "agents": {"funcbo": {"dual_lr": 1e-2}, "exact": {}},
        "axes": [
            {
                "grid": {
                    "window_size": [10, 30, 60, 120] if paper else [10, 60],
                    "grad_buffer_size": [1, 10, 100, 1000] if paper else [1, 10, 100],
                }
            }
        ],
        "seeds": {"count": 10 if paper else 4},
        "report": {
            "variable": "evaluation_mse",
            "over": 0.5,
            "figures": [
                {"kind": "sensitivity", "axis": "window_size", "title": "Error against the length of the past"},
                {"kind": "sensitivity", "axis": "grad_buffer_size", "title": "Error against the smoothing window"},
            ],
        },
    }


NORM_BOUNDS = [6 * point / 19 for point in range(20)]


def tabular_norm_bound(paper: bool) -> dict[str, Any]:
    return {
        "program": "tabular",
        "agents": ["mle", "omd"],
        "axes": [{"grid": {"norm_bound": NORM_BOUNDS}}],
        "seeds": {"first": 1, "count": 10},
        "report": {
            "variable": "evaluation_return",
            "figures": [{"kind": "tabular", "figure": "norm_bound", "title": "Return against the norm bound"}],
        },
    }


def tabular_value_bounds(paper: bool) -> dict[str, Any]:
    return {
        "program": "tabular",
        "settings": {"outer_objective": "bellman"},
        "agents": ["mle", "omd"],
        "axes": [{"grid": {"norm_bound": NORM_BOUNDS}}],
        "seeds": {"first": 1, "count": 10},
        "report": {
            "variable": "q_error",
            "figures": [{"kind": "tabular", "figure": "value_bounds", "title": "Error of Q and its bounds"}],
        },
    }


def tabular_ift_noise(paper: bool) -> dict[str, Any]:
    return {
        "program": "tabular",
        "settings": {"outer_objective": "bellman"},
        "agents": {label: {"agent_type": "omd", "with_inv_jac": label} for label in ("exact", "identity")},
        "axes": [{"grid": {"inner_noise": [10 ** (-3 + 3.5 * point / 29) for point in range(30)]}}],
        "seeds": {"first": 1, "count": 10},
        "report": {
            "variable": "evaluation_return",
            "figures": [{"kind": "tabular", "figure": "ift_noise", "title": "Noise on the inner solutions"}],
        },
    }


PRESETS: dict[str, Callable[[bool], dict[str, Any]]] = {
    study.__name__: study
    for study in (
        omd_capacity,
        omd_inverse_jacobian,
        funcbo_cartpole,
        smoothfbo_nonstationary,
        omd_continuous,
        regression_agents,
        regression_window,
        tabular_norm_bound,
        tabular_value_bounds,
        tabular_ift_noise,
    )
}


def preset(name: str, scale: str) -> dict[str, Any]:
    """A preset as the content of a sweep file.

    Raises:
        UserError: there is no such preset or scale.
    """
    if name not in PRESETS:
        raise UserError(f"{name!r} is neither a preset ({', '.join(PRESETS)}) nor a sweep file.")
    if scale not in SCALES:
        raise UserError(f"--scale must be one of {', '.join(SCALES)}, got {scale!r}.")
    return {"name": name, **PRESETS[name](scale == "paper")}

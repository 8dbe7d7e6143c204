"""Presets: sweep files of the studies that the original publications made, ready to run and with their figure.

`smoke` takes minutes on two cores and shows the shape of the result; `paper` has the originals' steps and many seeds.

    omd_capacity               return against the model's width: who copes with a model that cannot be right? (OMD)
    omd_inverse_jacobian       the inverse Hessian of implicit differentiation: identity or conjugate gradient (OMD)
    funcbo_cartpole            agents x inner_lr x tau, the best chosen on the return in training (funcBO)
    smoothfbo_nonstationary    smoothing window x beta while the reward drifts (SmoothFBO)
    regression_agents          agents on a regression whose targets move (SmoothFBO)
    regression_window          how much of the past the inner problem sees, and the smoothing window (SmoothFBO)
"""

from collections.abc import Callable
from typing import Any

from purejax_bilevel.errors import UserError

SCALES = ("smoke", "paper")


def omd_capacity(paper: bool) -> dict[str, Any]:
    return {
        "program": "rl",
        "settings": {"num_train_steps": 200_000 if paper else 25_000},
        "agents": ["omd", "mle", "vep"],
        "axes": [{"grid": {"model_hidden_dim": [1, 2, 3, 4, 6, 8, 16, 32] if paper else [2, 3, 8, 32]}}],
        "seeds": {"count": 10 if paper else 5},
        "search": {"space": {"lr": [1e-4, 1e-2], "inner_lr": [1e-4, 3e-3], "tau": [1e-3, 1e-1]}},
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
        "search": {"space": {"lr": [1e-4, 1e-2], "inner_lr": [1e-4, 3e-3], "tau": [1e-3, 1e-1]}},
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


def regression_agents(paper: bool) -> dict[str, Any]:
    return {
        "program": "regression",
        "settings": {"T_max": 5000 if paper else 1500, "eval_frequency": 100 if paper else 50},
        "agents": ["funcbo", "funcbo_nosmooth", "exact", "aid", "unroll1"],
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
        "settings": {"T_max": 5000 if paper else 1500, "eval_frequency": 100 if paper else 50},
        "agents": ["funcbo", "exact"],
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


PRESETS: dict[str, Callable[[bool], dict[str, Any]]] = {
    study.__name__: study
    for study in (
        omd_capacity,
        omd_inverse_jacobian,
        funcbo_cartpole,
        smoothfbo_nonstationary,
        regression_agents,
        regression_window,
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

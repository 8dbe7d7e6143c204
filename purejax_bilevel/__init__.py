"""Bilevel and model-based reinforcement learning: whole ablations as one compiled JAX program.

    from purejax_bilevel import RLConfig, run
    results = run(RLConfig(agent_type="omd", lr=(1e-3, 3e-4), model_hidden_dim=(3, 32)), num_seeds=8)

`purejax_bilevel.bilevel` is usable alone, as a library of hypergradients.
"""

import importlib
from typing import Any

__version__ = "0.1.0"
__all__ = [
    "ContinuousConfig",
    "ObservatoryConfig",
    "PPOConfig",
    "RLConfig",
    "RegressionConfig",
    "RunOptions",
    "TabularConfig",
    "UserError",
    "__version__",
    "evaluate_policy",
    "load_policy",
    "render_policy",
    "run",
]

# Resolved on first use: importing `purejax_bilevel.bilevel` must not load environments and plotting.
_LAZY = {
    "ContinuousConfig": ("purejax_bilevel.programs.control.soft_actor_critic", "Config"),
    "ObservatoryConfig": ("purejax_bilevel.programs.observatory.control", "Config"),
    "PPOConfig": ("purejax_bilevel.programs.learned_optimizers.program", "Config"),
    "RLConfig": ("purejax_bilevel.programs.control.q_learning", "Config"),
    "RegressionConfig": ("purejax_bilevel.programs.regression.program", "Config"),
    "TabularConfig": ("purejax_bilevel.programs.tabular.program", "Config"),
    "RunOptions": ("purejax_bilevel.runtime.options", "RunOptions"),
    "UserError": ("purejax_bilevel.errors", "UserError"),
    "evaluate_policy": ("purejax_bilevel.studies.playing", "evaluate_policy"),
    "load_policy": ("purejax_bilevel.programs.saved_policies", "load_policy"),
    "render_policy": ("purejax_bilevel.studies.playing", "render_policy"),
    "run": ("purejax_bilevel.studies.run", "run"),
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # Before gymnax is imported: its import makes jax choose its devices, and then it is too late to use all cores.
    importlib.import_module("purejax_bilevel.runtime.devices").prepare()
    module, attribute = _LAZY[name]
    return getattr(importlib.import_module(module), attribute)

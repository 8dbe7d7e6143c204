"""Reinforcement learning from a dataset: ensembles of dynamics models, and agents that learn in them or without."""

# Of arrays in results, which are drawn without jax: measures of uncertainty (`uncertainty.py`), and probabilities of
# the intervals whose coverage is measured (`calibration.py`).
KINDS = ("max_distance", "mean_spread", "max_variance", "max_std_norm", "ensemble_std")
LEVELS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)

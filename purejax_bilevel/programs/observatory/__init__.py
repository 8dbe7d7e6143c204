"""How right, how noisy and how dear hypergradients are, at frozen states of a run."""

COSTS = "costs.json"  # beside results.nc; here, for figures need no jax

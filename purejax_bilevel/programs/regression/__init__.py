"""Non-stationary regression with learned weights of past targets."""

# Where approximations of functions of one or two inputs are drawn; here, for figures need no jax.
GRID_LIMIT, GRID_POINTS = 2.5, {1: 64, 2: 24}

"""Non-stationary regression with learned weights of past targets."""

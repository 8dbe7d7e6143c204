"""Meta-learned objectives: an update rule for agents is learned on populations of their lives (LPG)."""

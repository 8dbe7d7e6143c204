"""Reinforcement learning from a dataset: ensembles of dynamics models, and agents that learn in them or without."""

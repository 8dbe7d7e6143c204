"""Reinforcement learning: Q-learning and soft actor-critic, with and without a learned model."""

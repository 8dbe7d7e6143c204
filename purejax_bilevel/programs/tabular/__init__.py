"""Finite MDPs, where every gradient is exact."""

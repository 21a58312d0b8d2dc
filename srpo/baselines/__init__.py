"""Algorithms to compare SRPO with, on the same trainer, data, rewards and logs (docs/baselines.md)."""

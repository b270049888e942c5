"""Reinforcement learning of a policy whose rollout and trainer are quantized: `python -m
experiments.rl`."""

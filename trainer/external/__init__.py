"""Traces of rollouts that other trainers sampled."""

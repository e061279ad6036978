"""Evaluate imported rollouts with a model."""

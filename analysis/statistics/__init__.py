"""Compute estimates, intervals, stages of training, and aggregates."""

"""Estimates, intervals, stages, and aggregates."""

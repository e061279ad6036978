"""Provide fast tensor operations: statistics, packing, attention, norms.

Imports nothing else of the trainer.
"""

"""Pretraining of the embedded base policy."""

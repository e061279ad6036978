"""Manage the folder of a run: manifest, lock, checkpoints, and recording."""

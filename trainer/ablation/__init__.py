"""Grids of runs: arms, presets, and launchers."""

"""Launchers of the runs of a grid: processes of this machine, or tasks of a Ray cluster."""

"""Read traces: SQL, statistics, figures, claims, and reports. Imports no torch; the public names are in ``entrace``."""

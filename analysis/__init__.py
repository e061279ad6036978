"""Read traces with SQL, statistics, figures, claims, and reports.

This package does not import torch. The public names are in ``entrace``.
"""

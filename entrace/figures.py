"""Draw figures of runs: ``from entrace.figures import stage_dynamics``; see ``entrace.analysis.figures``."""

from entrace.analysis.figures import *  # noqa: F403 (one list of figures, which type checkers follow)

"""Draw figures of runs; see ``entrace.analysis.figures``.

Usage: ``from entrace.figures import stage_dynamics``.
"""

from entrace.analysis.figures import *  # noqa: F403 (one list of figures, which type checkers follow)

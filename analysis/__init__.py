"""Answers questions about traces of RL with verifiable rewards: SQL, statistics, claims, figures, a report.

Usage::

    import analysis

    runs = analysis.open_runs("data/runs/study")
    runs.query("entropy_by_sample_sign", stage="rising")
    runs.sql("select step, avg(entropy) from tokens group by all order by step")
    analysis.figures.stage_dynamics(runs)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from analysis import figures
    from analysis.claims import Verdict, judge
    from analysis.report import write_report
    from analysis.runs import Runs, open_runs
    from analysis.trace import InputError, TraceWriter

__all__ = ["InputError", "Runs", "TraceWriter", "Verdict", "figures", "judge", "open_runs", "write_report"]

# Loaded on first use: the command line must answer before DuckDB, polars and matplotlib could be imported.
_HOME = {
    "InputError": "analysis.trace",
    "TraceWriter": "analysis.trace",
    "Runs": "analysis.runs",
    "open_runs": "analysis.runs",
    "Verdict": "analysis.claims",
    "judge": "analysis.claims",
    "write_report": "analysis.report",
}


def __getattr__(name: str) -> Any:
    if name == "figures":
        return import_module("analysis.figures")
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

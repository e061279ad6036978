"""Answers questions about traces of RL with verifiable rewards: SQL, statistics, claims, figures, a report.

Usage::

    import analysis

    runs = analysis.open_runs("data/runs/study")
    runs.query("entropy_by_sample_sign", stage="rising")
    runs.sql("select step, avg(entropy) from tokens group by all order by step")
    analysis.figures.stage_dynamics(runs)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from analysis.lazy import names_from

if TYPE_CHECKING:
    from analysis import compare, figures
    from analysis.claims import Verdict, judge
    from analysis.compare import Comparison
    from analysis.report import write_report
    from analysis.runs import Runs, open_runs
    from analysis.trace import InputError, TraceWriter, Vocabulary

__all__ = [
    "Comparison",
    "InputError",
    "Runs",
    "TraceWriter",
    "Verdict",
    "Vocabulary",
    "compare",
    "figures",
    "judge",
    "open_runs",
    "write_report",
]

__getattr__ = names_from(
    __name__,
    {
        "InputError": "analysis.trace",
        "TraceWriter": "analysis.trace",
        "Vocabulary": "analysis.trace",
        "Runs": "analysis.runs",
        "open_runs": "analysis.runs",
        "Verdict": "analysis.claims",
        "judge": "analysis.claims",
        "Comparison": "analysis.compare",
        "compare": "analysis.compare",
        "write_report": "analysis.report",
        "figures": "analysis.figures",
    },
)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

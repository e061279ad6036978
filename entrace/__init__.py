"""Find out how entropy and performance trade off in RL with verifiable rewards.

Usage::

    import entrace

    runs = entrace.open_runs("data/runs/study")
    runs.query("entropy_by_sample_sign", stage="rising")
    runs.sql("select step, avg(entropy) from tokens group by all order by step")
    entrace.figures.stage_dynamics(runs)

Every name is imported on first use: reading traces never loads torch.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING

from entrace._lazy import names_from

if TYPE_CHECKING:
    from entrace.analysis import figures, trace
    from entrace.analysis.claims import Verdict, judge
    from entrace.analysis.compare import Comparison, compare
    from entrace.analysis.ledger import load_ledger
    from entrace.analysis.queries import Questions
    from entrace.analysis.report import write_report
    from entrace.analysis.runs import Runs, open_runs
    from entrace.analysis.trace import InputError, Recorder, TraceWriter, Vocabulary
    from entrace.trainer.algorithm.method import RolloutView, objective, shaping
    from entrace.trainer.algorithm.objectives import TokenWeights
    from entrace.trainer.config import Config, load_config
    from entrace.trainer.train import train

__version__ = version("entrace")

questions: Questions

__all__ = [
    "Comparison",
    "Config",
    "InputError",
    "Recorder",
    "RolloutView",
    "Runs",
    "TokenWeights",
    "TraceWriter",
    "Verdict",
    "Vocabulary",
    "compare",
    "figures",
    "judge",
    "load_config",
    "load_ledger",
    "objective",
    "open_runs",
    "questions",
    "shaping",
    "trace",
    "train",
    "write_report",
]

__getattr__ = names_from(
    __name__,
    {
        "Comparison": "entrace.analysis.compare",
        "Config": "entrace.trainer.config",
        "InputError": "entrace.analysis.trace.errors",
        "Recorder": "entrace.analysis.trace.recorder",
        "RolloutView": "entrace.trainer.algorithm.method",
        "Runs": "entrace.analysis.runs",
        "TokenWeights": "entrace.trainer.algorithm.objectives",
        "TraceWriter": "entrace.analysis.trace.writer",
        "Verdict": "entrace.analysis.claims",
        "Vocabulary": "entrace.analysis.trace.vocabulary",
        "compare": "entrace.analysis.compare",
        "judge": "entrace.analysis.claims",
        "load_config": "entrace.trainer.config",
        "load_ledger": "entrace.analysis.ledger",
        "objective": "entrace.trainer.algorithm.method",
        "open_runs": "entrace.analysis.runs",
        "questions": "entrace.analysis.queries:BUILT_IN",
        "shaping": "entrace.trainer.algorithm.method",
        "train": "entrace.trainer.train",
        "write_report": "entrace.analysis.report",
    },
    modules={
        "figures": "entrace.figures",
        "trace": "entrace.analysis.trace",
    },
)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

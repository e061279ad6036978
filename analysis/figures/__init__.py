"""Figures, one module a question, named as its SQL file.

``entrace.figures.<stem>(runs, ax=None)`` queries and draws on ``ax`` (a new one if not given), returns the Axes and
saves nothing. Training is drawn for the baseline runs, as the claims judge it; ablations for all runs.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

from entrace.analysis import queries
from entrace.analysis.figures import arms, style
from entrace.analysis.figures.paired_differences import comparison
from entrace.analysis.trace.errors import InputError

if TYPE_CHECKING:
    import polars as pl
    from matplotlib.axes import Axes

    from entrace.analysis.runs import Runs

# In the order of the report: stage, instance, token, ablation.
STEMS = (
    "stage_dynamics",
    "exchange_law",
    "entropy_by_sample_sign",
    "entropy_gap_by_prompt",
    "category_shares",
    "word_changes",
    "defects_over_steps",
    "movement_distribution",
    "movement_concentration",
    "movement_by_entropy",
    "movement_by_category",
    "entropy_gradient_density",
    "correctness_by_ppl",
    "accuracy_by_ppl_decile",
    "high_entropy_by_ppl",
    "robustness_by_ppl",
    "entropy_by_position",
    "u_shape",
    "impact_by_position",
    "potential_by_position",
    "high_entropy_by_position",
    "high_entropy_words",
    "ablation_curves",
    "paired_differences",
    "performance_profile",
    "ablation_final",
    "cost_accuracy",
)
MODULES: dict[str, ModuleType] = {stem: import_module(f"{__name__}.{stem}") for stem in STEMS}
# Their figures average over the seeds of an arm.
ABLATIONS = ("ablation_curves", "performance_profile", "ablation_final", "cost_accuracy")


def query(runs: Runs, stem: str) -> pl.DataFrame:
    """Returns what figure ``stem`` draws: the rows of its query, in an ablation with what compares arms added."""
    module = MODULES[stem]
    if stem == "paired_differences":
        return module.query(runs)
    if stem in ABLATIONS:
        return arms.with_means(runs, runs.query(stem), module.MEAN_OF, module.AT)
    return runs.query(stem, runs=[run for subject in runs.subjects().values() for run in subject])


def is_drawable(frame: pl.DataFrame) -> bool:
    """Whether there is anything to draw: a run without evaluations has a row in an ablation, but no mean."""
    return frame.height > 0 and ("mean" not in frame.columns or frame["mean"].count() > 0)


def size(stem: str, frame: pl.DataFrame) -> tuple[float, float]:
    """Width and height in inches that ``frame`` needs: one column of a page, taller where there are many arms."""
    module = MODULES[stem]
    return module.size(frame) if hasattr(module, "size") else style.SIZE


def _figure(stem: str) -> Callable[..., Axes]:
    def draw(runs: Runs, ax: Axes | None = None) -> Axes:
        frame = query(runs, stem)
        if not is_drawable(frame):
            raise InputError(f"{stem}: {runs.why_empty(queries.need(stem))}")
        return MODULES[stem].draw(frame, ax or style.new_axes(size(stem, frame)))

    draw.__name__ = draw.__qualname__ = stem
    draw.__doc__ = f"Draws {stem}.sql: {MODULES[stem].__doc__}"
    return draw


# Importing a module bound its name here; from now on the name is the function.
globals().update({stem: _figure(stem) for stem in MODULES})

__all__ = ["MODULES", "STEMS", "comparison", "is_drawable", "query", "size", "style"]

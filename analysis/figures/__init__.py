"""Figures, one module a question, named as its SQL file.

``analysis.figures.<stem>(runs, ax=None)`` queries and draws on ``ax`` (a new one if not given), returns the Axes and
saves nothing. Training is drawn for the baseline runs, as the claims judge it; ablations for all runs.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

from analysis import queries
from analysis.figures import style
from analysis.trace.errors import InputError

if TYPE_CHECKING:
    import polars as pl
    from matplotlib.axes import Axes

    from analysis.runs import Runs

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
    "ablation_final",
)
MODULES: dict[str, ModuleType] = {stem: import_module(f"{__name__}.{stem}") for stem in STEMS}
ABLATIONS = ("ablation_curves", "ablation_final")


def query(runs: Runs, stem: str) -> pl.DataFrame:
    """Returns what figure ``stem`` draws."""
    if stem in ABLATIONS:
        return runs.query(stem)
    return runs.query(stem, runs=[run for subject in runs.subjects().values() for run in subject])


def _figure(stem: str) -> Callable[..., Axes]:
    def draw(runs: Runs, ax: Axes | None = None) -> Axes:
        frame = query(runs, stem)
        if frame.is_empty():
            raise InputError(f"{stem}: {runs.why_empty(queries.need(stem))}")
        return MODULES[stem].draw(frame, ax or style.new_axes())

    draw.__name__ = draw.__qualname__ = stem
    draw.__doc__ = f"Draws {stem}.sql: {MODULES[stem].__doc__}"
    return draw


# Importing a module bound its name here; from now on the name is the function.
globals().update({stem: _figure(stem) for stem in MODULES})

__all__ = ["MODULES", "STEMS", "query", "style"]

"""Figures, one module a question, named as its SQL file.

``analysis.figures.<stem>(runs, ax=None)`` queries and draws on ``ax`` (a new one if not given), returns the Axes and
saves nothing. Training is drawn for the baseline runs, as the claims judge it; ablations for all runs.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING

from analysis.figures import ablation_curves as _ablation_curves
from analysis.figures import ablation_final as _ablation_final
from analysis.figures import correctness_by_ppl as _correctness_by_ppl
from analysis.figures import defects_over_steps as _defects_over_steps
from analysis.figures import entropy_by_position as _entropy_by_position
from analysis.figures import entropy_by_sample_sign as _entropy_by_sample_sign
from analysis.figures import stage_dynamics as _stage_dynamics
from analysis.figures import style
from analysis.trace.errors import InputError

if TYPE_CHECKING:
    import polars as pl
    from matplotlib.axes import Axes

    from analysis.runs import Runs

MODULES: dict[str, ModuleType] = {
    "stage_dynamics": _stage_dynamics,
    "entropy_by_sample_sign": _entropy_by_sample_sign,
    "defects_over_steps": _defects_over_steps,
    "correctness_by_ppl": _correctness_by_ppl,
    "entropy_by_position": _entropy_by_position,
    "ablation_curves": _ablation_curves,
    "ablation_final": _ablation_final,
}
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
            raise InputError(f"{stem}: the traces hold no rows to draw")
        return MODULES[stem].draw(frame, ax or style.new_axes())

    draw.__name__ = draw.__qualname__ = stem
    draw.__doc__ = f"Draws {stem}.sql: {MODULES[stem].__doc__}"
    return draw


# Importing a module bound its name here; from now on the name is the function.
stage_dynamics = _figure("stage_dynamics")
entropy_by_sample_sign = _figure("entropy_by_sample_sign")
defects_over_steps = _figure("defects_over_steps")
correctness_by_ppl = _figure("correctness_by_ppl")
entropy_by_position = _figure("entropy_by_position")
ablation_curves = _figure("ablation_curves")
ablation_final = _figure("ablation_final")

__all__ = [
    "MODULES",
    "ablation_curves",
    "ablation_final",
    "correctness_by_ppl",
    "defects_over_steps",
    "entropy_by_position",
    "entropy_by_sample_sign",
    "query",
    "stage_dynamics",
    "style",
]

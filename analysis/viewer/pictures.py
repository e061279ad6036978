"""Draw a figure with the places of its marks, and select responses behind each."""

from __future__ import annotations

import io
import threading
from typing import TYPE_CHECKING, Any

import numpy as np

from entrace.analysis import figures
from entrace.analysis.figures import marks
from entrace.analysis.queries import headers
from entrace.analysis.runs import Runs
from entrace.analysis.sandbox.connection import quote
from entrace.analysis.viewer.cells import columns_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_MARKS = 20_000
# matplotlib draws in one thread at a time.
DRAWING = threading.Lock()


def list_figures(runs: Runs) -> list[dict[str, Any]]:
    """Return name and question of every figure, in the order of the report."""
    return [{"stem": stem, "question": headers(runs.questions.read(stem))["question"]} for stem in figures.stems(runs)]


def draw(runs: Runs, stem: str) -> dict[str, Any]:
    """Draw a figure.

    Returns:
        ``svg``, its ``width`` and ``height`` in points, ``caption``, ``sql``, and ``marks``. These hold, per call that
        drew some, ``left`` and ``top`` (shares of the size), ``x`` and ``y`` (names of columns), the ``columns`` of
        their rows, and the condition that selects the responses behind each, beyond its columns (``where``).
        ``opens`` is false for figures of evaluations, whose responses have no tokens. Without anything to draw,
        ``lacks`` says why.

    Raises:
        InputError: no such figure.
    """
    text = runs.questions.read(stem)
    about = {"stem": stem, "sql": text, "question": headers(text)["question"]}
    frame = figures.query(runs, stem)
    if not figures.is_drawable(frame):
        return {**about, "lacks": runs.why_empty(stem)}
    tables = {need.table for need in runs.questions.needs(stem)}
    shown = _among(runs, frame["run_id"].unique().to_list() if "run_id" in frame.columns else [])
    with DRAWING, figures.drawn(runs, stem, frame) as figure:
        groups = [_group(found, places, shown, tables) for found, places in marks.located(figure)]
        svg = _to_svg(figure)
    width, height = figure.get_size_inches() * 72
    return {
        **about,
        "caption": figures.caption(runs, stem),
        "svg": svg,
        "width": float(width),
        "height": float(height),
        "marks": [group for group in groups if group["left"]],
        "opens": "evals" not in tables,
    }


def _to_svg(figure: Figure) -> str:
    """Return a figure as SVG without its background.

    The figure then stands on the background of the page, in light and in dark colors. The figure was laid out before,
    and ``savefig`` would do so again.
    """
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    figure.set_layout_engine("none")
    for part in (figure, *figure.axes):
        part.patch.set_visible(False)
    out = io.StringIO()
    FigureCanvasSVG(figure).print_svg(out, metadata={"Date": None, "Creator": None})
    return out.getvalue()


def _among(runs: Runs, shown: list[str]) -> str:
    """Return the condition on responses that selects these runs.

    An arm whose runs are all shown is selected by its name. The condition is empty if all runs are shown.
    """
    if len(shown) == len(runs.manifests):
        return ""
    arms: dict[Any, set[str]] = {}
    for run, manifest in runs.manifests.items():
        arms.setdefault(manifest.get("arm"), set()).add(run)
    whole = sorted(arm for arm, members in arms.items() if arm is not None and members <= set(shown))
    single = sorted(run for run in shown if runs.manifests[run].get("arm") not in whole)
    parts = [("arm", whole), ("run_id", single)]
    conditions = [f"{name} in ({', '.join(map(quote, values))})" for name, values in parts if values]
    return f"({' or '.join(conditions)})" if len(conditions) > 1 else "".join(conditions)


def _group(found: marks.Marks, places: np.ndarray, shown: str, tables: set[str]) -> dict[str, Any]:
    rows = np.flatnonzero(np.isfinite(places).all(1))[:MOST_MARKS]
    frame = found.frame[rows]
    return {
        "x": found.x,
        "y": found.y,
        "left": places[rows, 0].round(5).tolist(),
        "top": places[rows, 1].round(5).tolist(),
        "columns": columns_of(frame),
        "where": [_where(row, shown, tables) for row in frame.iter_rows(named=True)],
    }


def _where(row: dict[str, Any], shown: str, tables: set[str]) -> str:
    """Return the condition on responses that a mark implies.

    Columns such as ``step`` and ``stage`` are left out.

    Args:
        row: Row of the mark. Without ``run_id`` and ``arm`` it is a mean over runs.
        shown: Condition that selects the runs of the figure; empty if all are shown.
        tables: Tables that the question reads.
    """
    conditions = []
    tokens = []
    if shown and row.get("run_id") is None and row.get("arm") is None:
        conditions.append(shown)
    if (category := row.get("category")) and "word" not in row and "text" not in row:
        tokens.append("is_reasoning(category)" if category == "reasoning" else f"category = {quote(category)}")
    if "word" in row and "stage" not in row:
        # The question compares both ends of the rising stage.
        conditions.append("phase is not null")
    if word := row.get("word") or row.get("text"):
        tokens.append(
            f"token_id in (select token_id from vocab_words where trim(word) = {quote(str(word).strip())})"
            if "word" in row
            else f"token_id in (select token_id from vocab where text = {quote(word)})"
        )
    tokens += [
        f"{name} between {row[f'{name}_low']:.6g} and {row[f'{name}_high']:.6g}"
        for name in ("entropy", "grad_norm")
        if isinstance(row.get(f"{name}_low"), float) and isinstance(row.get(f"{name}_high"), float)
    ]
    if isinstance(row.get("ppl_low"), float) and isinstance(row.get("ppl_high"), float):
        conditions.append(f"ppl between {row['ppl_low']:.9g} and {row['ppl_high']:.9g}")
    if "interventions" in tables:
        chosen = [
            f"{name} = {str(row[name]).lower()}" for name in ("ppl_tercile", "is_correct") if row.get(name) is not None
        ]
        condition = f" where {' and '.join(chosen)}" if chosen else ""
        conditions.append(f"(run_id, rollout_id) in (select (run_id, rollout_id) from interventions{condition})")
    if tokens:
        conditions.append(
            f"(run_id, rollout_id) in (select (run_id, rollout_id) from tokens where {' and '.join(tokens)})"
        )
    return " and ".join(conditions)

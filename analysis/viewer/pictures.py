"""Draw a figure of the report with the places of its marks, and say which responses are behind each."""

from __future__ import annotations

import io
from typing import Any

import numpy as np

from entrace.analysis import figures
from entrace.analysis.figures import marks
from entrace.analysis.queries import headers
from entrace.analysis.runs import Runs
from entrace.analysis.viewer.cells import columns_of

# Columns of a figure's rows that select responses as they are.
SELECTING = ("run_id", "arm", "seed", "step", "stage", "phase", "sample_sign", "prompt_id", "defect")
MOST_MARKS = 20_000


def list_figures(runs: Runs) -> list[dict[str, Any]]:
    """Return name, question, level, and caption of every figure, in the order of the report."""
    return [
        {
            "stem": stem,
            "question": headers(runs.questions.read(stem))["question"],
            "level": runs.questions[stem].level,
            "claim": runs.questions[stem].claim,
            "file": runs.questions.location(stem),
        }
        for stem in figures.stems(runs)
    ]


def draw(runs: Runs, stem: str) -> dict[str, Any]:
    """Draw a figure.

    Returns:
        ``svg``, its ``width`` and ``height`` in points, ``caption``, ``sql``, and ``marks``. These hold, per call that
        drew some, ``left`` and ``top`` (shares of the size), ``x`` and ``y`` (names of columns), the ``columns`` of
        their rows, and what selects the responses behind each: columns (``by``) and conditions (``where``). Without
        anything to draw, ``lacks`` says why.

    Raises:
        InputError: no such figure.
    """
    text = runs.questions.read(stem)
    about = {"stem": stem, "sql": text, "question": headers(text)["question"]}
    frame = figures.query(runs, stem)
    if not figures.is_drawable(frame):
        return {**about, "lacks": runs.why_empty(stem)}
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    module = figures.figure_module(stem, runs.questions)
    ax = module.draw(frame, figures.style.new_axes(figures.size(runs, stem, frame)))
    figure = ax.get_figure(root=True)
    try:
        with mpl.rc_context(figures.style.RC):
            groups = [_group(found, places) for found, places in marks.located(figure)]
            out = io.StringIO()
            figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    finally:
        plt.close(figure)
    width, height = figure.get_size_inches() * 72
    return {
        **about,
        "caption": figures.caption(runs, stem),
        "svg": out.getvalue(),
        "width": float(width),
        "height": float(height),
        "marks": [group for group in groups if group["left"]],
    }


def _group(found: marks.Marks, places: np.ndarray) -> dict[str, Any]:
    rows = np.flatnonzero(np.isfinite(places).all(1))[:MOST_MARKS]
    frame = found.frame[rows]
    return {
        "x": found.x,
        "y": found.y,
        "left": places[rows, 0].round(5).tolist(),
        "top": places[rows, 1].round(5).tolist(),
        "columns": columns_of(frame),
        "where": [_where(row) for row in frame.iter_rows(named=True)],
        "by": [name for name in SELECTING if name in frame.columns],
    }


def _where(row: dict[str, Any]) -> str:
    """Return the condition on responses that the columns of a row imply beyond ``SELECTING``; often none."""
    conditions = []
    tokens = []
    if (category := row.get("category")) and "word" not in row and "text" not in row:
        tokens.append(f"category = {_quote(category)}")
    if word := row.get("word") or row.get("text"):
        tokens.append(
            f"token_id in (select token_id from vocab_words where trim(word) = {_quote(str(word).strip())})"
            if "word" in row
            else f"token_id in (select token_id from vocab where text = {_quote(word)})"
        )
    tokens += [
        f"{name} between {row[f'{name}_low']:.6g} and {row[f'{name}_high']:.6g}"
        for name in ("entropy", "grad_norm")
        if isinstance(row.get(f"{name}_low"), float) and isinstance(row.get(f"{name}_high"), float)
    ]
    if isinstance(row.get("ppl_low"), float) and isinstance(row.get("ppl_high"), float):
        conditions.append(f"ppl between {row['ppl_low']:.9g} and {row['ppl_high']:.9g}")
    if row.get("ppl_tercile") is not None:
        chosen = f"ppl_tercile = {int(row['ppl_tercile'])}"
        if row.get("is_correct") is not None:
            chosen += f" and is_correct = {str(bool(row['is_correct'])).lower()}"
        conditions.append(f"(run_id, rollout_id) in (select (run_id, rollout_id) from interventions where {chosen})")
    if tokens:
        conditions.append(
            f"(run_id, rollout_id) in (select (run_id, rollout_id) from tokens where {' and '.join(tokens)})"
        )
    return " and ".join(conditions)


def _quote(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"

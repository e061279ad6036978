"""Compare error bars of figures with the truth.

Each of four figures gives one number. Their coverage is counted like that of the scorecard. The truths are plain numpy,
as in ``truth``.
"""

from __future__ import annotations

import numpy as np
import polars as pl

from entrace.analysis.claims import INCONCLUSIVE
from entrace.analysis.runs import Runs
from tests.calibration.simulate import Run, Tokens
from tests.calibration.truth import Truth, at_equal_length, top_share

STAGE = "plateau"
# By figure: the selected row, and the column of the estimate.
ROWS: dict[str, tuple[dict[str, object], str]] = {
    "correctness_by_ppl": ({"ppl_bin": 1}, "accuracy"),
    "entropy_by_position": ({"sample_sign": "positive", "position_bin": 5}, "entropy"),
    "movement_concentration": ({"top": 0.2}, "share"),
    "potential_by_position": ({"sample_sign": "positive", "position_bin": 9}, "movement"),
}


def figure_rows(runs: Runs) -> list[tuple[str, str, str, float | None, float | None, float | None]]:
    """Return the selected row of each figure.

    A row has part, subject, verdict, value, and interval.
    """
    found = []
    for stem, (which, name) in ROWS.items():
        frame = runs.query(stem, stage=STAGE).filter([pl.col(key) == value for key, value in which.items()])
        for run_id, *numbers in frame.select("run_id", name, "low", "high").iter_rows():
            found.append((f"figure/{stem}", run_id, INCONCLUSIVE, *numbers))
    return found


def figure_truth(run: Run) -> Truth:
    """Return the true values of the selected rows in one simulated run.

    The values cover its true plateau.
    """
    in_plateau = run.step > run.world.boundary
    right = run.by_group(run.is_correct)[run.by_group(in_plateau)[..., 0]]
    mixed = right.any(1) & ~right.all(1)
    ordered = np.take_along_axis(right[mixed], at_equal_length(run, in_plateau)[mixed].argsort(1), 1)
    truth = {"figure/correctness_by_ppl": float(ordered[:, : -(-run.world.group // 4)].mean())}
    return truth if run.tokens is None else truth | _of_tokens(run, run.tokens, in_plateau)


def _of_tokens(run: Run, tokens: Tokens, in_plateau: np.ndarray) -> Truth:
    tenth = tokens.position * 10 // run.length[tokens.row]
    positive = (in_plateau & run.is_kept & (run.advantage > 0))[tokens.row]
    truth = {"figure/entropy_by_position": float(tokens.entropy[positive & (tenth == 5)].mean())}
    captured = in_plateau[tokens.row] & np.isfinite(tokens.logprob_after)
    size = np.abs(np.exp(tokens.logprob_after) - np.exp(tokens.logprob))
    if not captured.any() or not size[captured].sum() > 0:
        return truth
    step = run.step[tokens.row]
    shares = [top_share(size[captured & (step == i)]) for i in np.unique(step[captured])]
    return truth | {
        "figure/movement_concentration": float(np.mean(shares)),
        "figure/potential_by_position": float(size[captured & positive & (tenth == 9)].mean()),
    }

"""Summarize simulated outcomes.

The summary has rates of false and missed verdicts, coverage, and missed targets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import beta

from entrace.analysis.claims import CONTRADICTED, NOT_RECORDED, SUPPORTED
from tests.calibration.real_cases import REAL_CASES, false_parts
from tests.calibration.truth import Truth
from tests.calibration.worlds import INCONCLUSIVE, NOT_SUPPORTED, NULL, WORLDS
from tests.markdown import table

# One row per claim/part and subject: verdict, effect, and interval.
Outcome = Sequence[Sequence[Any]]

MAX_FALSE, MAX_FALSE_UPPER = 0.05, 0.08
MIN_COVERAGE, MAX_COVERAGE = 0.92, 0.98
MIN_DETECTED = 0.9
COLUMNS = ["Part", "Expected", "Supported", "Contradicted", "False, upper end", "Truth", "Coverage", "Half width"]
# False verdicts by expectation. With a true effect, only a verdict in the wrong direction is false.
FALSE = {
    NULL: (SUPPORTED, CONTRADICTED),
    INCONCLUSIVE: (SUPPORTED, CONTRADICTED),
    NOT_SUPPORTED: (SUPPORTED,),
    SUPPORTED: (CONTRADICTED,),
    CONTRADICTED: (SUPPORTED,),
}


def rate_interval(hits: int, n: int) -> tuple[float, float]:
    """Return the 95% interval of a rate (Clopper and Pearson, Biometrika 1934)."""
    low = 0.0 if hits == 0 else float(beta.ppf(0.025, hits, n - hits + 1))
    return low, 1.0 if hits == n else float(beta.ppf(0.975, hits + 1, n - hits))


def summarize(
    results: Mapping[str, tuple[Sequence[Outcome], Truth]],
    real: Mapping[str, Sequence[Sequence[Any]]] | None = None,
    former: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Return all worlds with their cells, the real cases, and missed targets.

    The summary is ready for JSON.

    Args:
        results: Outcomes and truth by world.
        real: Rows of verdicts by real case.
        former: An earlier summary, for worlds and real cases that the other arguments lack.
    """
    entries = {world["world"]: world for world in (former or {}).get("worlds", [])}
    entries |= {name: _world(name, *result) for name, result in results.items()}
    worlds = [entries[name] for name in WORLDS if name in entries]
    misses = [f"{world['world']}: {miss}" for world in worlds for miss in world["misses"]]
    misses += [
        f"{world['world']}, {cell['part']}: {miss}"
        for world in worlds
        for cell in world["cells"]
        for miss in cell["misses"]
    ]
    case_of = {case["case"]: case for case in (former or {}).get("real", [])}
    case_of |= {
        name: {"case": name, "about": REAL_CASES[name].about, "false": false_parts(rows), "rows": list(map(list, rows))}
        for name, rows in (real or {}).items()
    }
    cases = [case_of[name] for name in REAL_CASES if name in case_of]
    misses += [f"{case['case']}: a verdict on {', '.join(case['false'])}" for case in cases if case["false"]]
    return {"worlds": worlds, "real": cases, "misses": misses}


def _world(name: str, outcomes: Sequence[Outcome], truth: Truth) -> dict[str, Any]:
    entry = WORLDS[name]
    n = len(outcomes)
    parts = dict.fromkeys(part for outcome in outcomes for part, *_ in outcome)
    cells = [_cell(part, entry.expectation(part), outcomes, truth if entry.is_covered else {}) for part in parts]
    cells = [cell for cell in cells if cell["judged"]]
    false = sum(
        any(verdict in FALSE.get(entry.expectation(part) or "", ()) for part, _, verdict, *_ in outcome)
        for outcome in outcomes
    )
    hits, intervals = (sum(cell[field] for cell in cells) for field in ("covered", "intervals"))
    coverage = hits / intervals if intervals else None
    misses = _false_misses(false, n, "scorecards")
    if coverage is not None and not MIN_COVERAGE <= coverage <= MAX_COVERAGE:
        misses.append(f"coverage {coverage:.1%} over all parts")
    return {
        "world": name,
        "about": entry.about,
        "simulations": n,
        "rows_judged": float(np.mean([sum(row[3] is not None for row in outcome) for outcome in outcomes])),
        "false_scorecards": false / n,
        "false_scorecards_upper": rate_interval(false, n)[1],
        "coverage": coverage,
        "intervals": intervals,
        "misses": misses,
        "cells": cells,
    }


def _cell(part: str, expectation: str | None, outcomes: Sequence[Outcome], truth: Truth) -> dict[str, Any]:
    """Return the rates of one part.

    All arms are simulated alike, so the first one is counted.
    """
    rows = [next(row for row in outcome if row[0] == part) for outcome in outcomes]
    n = len(rows)
    words = [row[2] for row in rows]
    false = sum(word in FALSE.get(expectation or "", ()) for word in words)
    found = words.count(expectation) / n if expectation in (SUPPORTED, CONTRADICTED) else None
    misses = _false_misses(false, n, "verdicts")
    if found is not None and found < MIN_DETECTED:
        misses.append(f"{expectation} in only {found:.1%}")
    ends = np.array([row[4:6] for row in rows if None not in row[3:6]], dtype=float).reshape(-1, 2)
    ends = ends[np.isfinite(ends).all(1)]
    covered = intervals = 0
    if part in truth:
        covered, intervals = int(((ends[:, 0] <= truth[part]) & (truth[part] <= ends[:, 1])).sum()), len(ends)
    coverage = None
    if intervals:
        low, high = rate_interval(covered, intervals)
        coverage = {"rate": covered / intervals, "low": low, "high": high}
        if low > MAX_COVERAGE or high < MIN_COVERAGE:
            misses.append(f"coverage {covered / intervals:.1%} [{low:.1%}, {high:.1%}]")
    return {
        "part": part,
        "expectation": expectation,
        "judged": sum(word != NOT_RECORDED for word in words),
        "supported": words.count(SUPPORTED) / n,
        "contradicted": words.count(CONTRADICTED) / n,
        "false": false / n if expectation else None,
        "false_upper": rate_interval(false, n)[1] if expectation else None,
        "detected": found,
        "truth": truth.get(part),
        "covered": covered,
        "intervals": intervals,
        "coverage": coverage,
        "half_width": float(np.median(ends[:, 1] - ends[:, 0])) / 2 if len(ends) else None,
        "misses": misses,
    }


def _false_misses(false: int, n: int, noun: str) -> list[str]:
    upper = rate_interval(false, n)[1]
    # With few simulations the upper end is uninformative.
    is_met = false / n <= MAX_FALSE and (upper <= MAX_FALSE_UPPER or false == 0)
    return [] if is_met else [f"false {noun} {false / n:.1%}, up to {upper:.1%}"]


def render(summary: dict[str, Any], *, with_cells: bool = True) -> str:
    """Return the page as Markdown.

    Without cells, it has only the table of worlds and the missed targets.
    """
    worlds, misses = summary["worlds"], summary["misses"]
    sizes = sorted({world["simulations"] for world in worlds})
    count = f"{sizes[0]:,}" if len(sizes) == 1 else f"{sizes[0]:,} to {sizes[-1]:,}"
    lines = [
        "# How often verdicts are wrong",
        "",
        f"{count} simulated runs per world, judged by `entrace claims`. `make calibrate` writes this page.",
        "[verdicts.md](verdicts.md) explains the verdicts.",
        "",
        f"Targets: at most {MAX_FALSE:.0%} false verdicts (upper end of the 95% interval {MAX_FALSE_UPPER:.0%}) per",
        f"part and per scorecard. Coverage of {MIN_COVERAGE:.0%} to {MAX_COVERAGE:.0%} over all parts; for a single",
        "part, the 95% interval of the coverage overlaps this range. Planted effects are detected in at least",
        f"{MIN_DETECTED:.0%} of runs.",
        "",
        f"Missed targets: {len(misses)}.",
        "",
        *[f"- {miss}" for miss in misses],
        *([""] if misses else []),
        *table(
            ["World", "Description", "Runs", "Rows judged", "False scorecards", "Upper end", "Coverage"],
            [
                [
                    world["world"],
                    world["about"],
                    world["simulations"],
                    f"{world['rows_judged']:.1f}",
                    _percent(world["false_scorecards"]),
                    _percent(world["false_scorecards_upper"]),
                    _percent(world["coverage"]),
                ]
                for world in worlds
            ],
        ),
    ]
    for case in summary["real"]:
        rows = [
            [part, verdict, "-" if effect is None else f"{_number(effect)} [{_number(low)}, {_number(high)}]"]
            for part, verdict, effect, low, high in case["rows"]
        ]
        lines += ["", f"## {case['case']}", "", case["about"], "", *table(["Part", "Verdict", "Effect"], rows)]
    for world in worlds if with_cells else ():
        lines += ["", f"## {world['world']}", "", world["about"], "", *table(COLUMNS, map(_describe, world["cells"]))]
    return "\n".join(lines) + "\n"


def _describe(cell: dict[str, Any]) -> list[Any]:
    return [
        cell["part"],
        cell["expectation"] or "-",
        _percent(cell["supported"]),
        _percent(cell["contradicted"]),
        _percent(cell["false_upper"]),
        _number(cell["truth"]),
        _percent(cell["coverage"] and cell["coverage"]["rate"]),
        _number(cell["half_width"]),
    ]


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _number(value: float | None) -> str:
    # Truths measured on simulations are not known to more digits.
    return "-" if value is None else f"{round(value, 3) + 0.0:.3g}"

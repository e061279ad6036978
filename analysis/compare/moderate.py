"""Few seeds, many arms: what the spread of all arms over seeds says about the error of each.

Three seeds give an arm two degrees of freedom: among 27 arms judged together its difference would have to be 23 times
its standard error. The runs of the other arms hold the missing knowledge. Per baseline, benchmark and metric:

1. Arms a and seeds s are fitted as y_as = alpha_a + beta_s + e_as, the additive model of randomised blocks: a seed,
   with its prompts, moves all its arms together. The residuals of arm a have variance v_a with d_a degrees of freedom.
2. The v_a are drawn towards each other as far as they agree: v'_a = (d_0 v_0 + d_a v_a) / (d_0 + d_a), with d_0 + d_a
   degrees of freedom, v_0 and d_0 estimated from all v_a (Smyth, Stat. Appl. Genet. Mol. Biol. 3:3, 2004); never more
   degrees of freedom than all residuals have together.
3. The difference of an arm and the baseline over S seeds has variance (v'_a + v'_0) / S, plus the part C of
   ``paired.over_prompts_and_seeds`` that shared prompts add.

With one arm beside the baseline this is the paired t test again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from analysis.compare.paired import Difference
from analysis.compare.rows import Row
from analysis.stats import Estimate, moderated_variances


def moderate(rows: Sequence[Row]) -> list[Row]:
    """The rows with moderated errors, in their order.

    Rows of one seed and those without an error of their own (no difference, or the same one in every seed) stay as
    they are, and take no part.
    """
    families: dict[tuple[str, str, str], list[int]] = {}
    for place, row in enumerate(rows):
        if row.difference and len(row.seeds) > 1 and np.isfinite(row.difference.error) and row.difference.error > 0:
            families.setdefault((row.baseline, row.benchmark, row.metric), []).append(place)
    found = list(rows)
    for places in families.values():
        family = [rows[place] for place in places]
        for place, row, (error, df) in zip(places, family, _moderated_errors(family), strict=True):
            assert row.difference
            found[place] = replace(row, difference=_with_error(row.difference, error, df))
    return found


def _with_error(difference: Difference, error: float, df: float) -> Difference:
    old = difference.estimate
    estimate = Estimate.from_error(old.value, error, df, old.n, old.of)
    return replace(difference, estimate=estimate, error=error, df=df)


def _moderated_errors(family: Sequence[Row]) -> list[tuple[float, float]]:
    """Standard error and degrees of freedom of the difference of every row."""
    differences = [{seed.seed: seed.difference for seed in row.seeds} for row in family]
    # Less the baseline of its seed, which belongs to the block, an arm is its difference and the baseline is 0.
    seeds = sorted(set().union(*differences))
    arms = [dict.fromkeys(seeds, 0.0), *differences]
    variances, df = moderated_variances(*_residual_variances(arms, seeds))
    errors = []
    for place, row in enumerate(family, start=1):
        assert row.difference
        variance = (variances[place] + variances[0]) / len(row.seeds) + row.difference.shared_variance
        errors.append((float(np.sqrt(variance)), float(min(df[place], df[0]))))
    return errors


def _residual_variances(arms: Sequence[dict[int, float]], seeds: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Variance of the residuals of each arm around alpha_a + beta_s, and its degrees of freedom, (A,) each."""
    cells = [(a, seeds.index(seed), value) for a, arm in enumerate(arms) for seed, value in arm.items()]
    of_arm, of_seed = (np.array([cell[i] for cell in cells]) for i in (0, 1))
    values = np.array([cell[2] for cell in cells])
    design = np.hstack([np.eye(len(arms))[of_arm], np.eye(len(seeds))[of_seed]])
    hat = design @ np.linalg.pinv(design)
    df = np.bincount(of_arm, 1 - np.diag(hat))
    squares = np.bincount(of_arm, (values - hat @ values) ** 2)
    return squares / df, df

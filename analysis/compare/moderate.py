"""Shrink the variances of arms over few seeds toward each other.

Three seeds give an arm two degrees of freedom. Among 27 arms judged together, a significant difference would have to
be 23 times its standard error. The other arms hold the missing information. Per baseline, benchmark, and metric:

1. Arms a and seeds s are fitted as y_as = alpha_a + beta_s + e_as, the additive model of randomized blocks: a seed,
   with its prompts, moves all its arms together. The residuals of arm a have variance v_a with d_a degrees of freedom.
2. An arm is *variable* if v_a exceeds the pooled variance of all other arms at the level ``KEEPS_OWN`` (F test). It
   keeps v_a and d_a. If the most variable arm exceeds the others at the level ``LEFT_OUT`` even in a fit without it, it
   is excluded from step 3 and from the fit of the other arms, and the search is repeated.
3. The other v_a are shrunk toward v_0: v'_a = (d_0 v_0 + d_a v_a) / (d_0 + d_a), with d_0 + d_a degrees of freedom, at
   most those of all residuals together. v_0 and d_0 are estimated from all v_a (moderated t-test: Smyth, Stat. Appl.
   Genet. Mol. Biol. 3:3, 2004).
4. The difference of an arm and the baseline over S seeds has variance (v'_a + v'_0) / S, plus the part C of
   ``paired.over_prompts_and_seeds`` that shared prompts add.

``KEEPS_OWN`` is deliberately large. Shrinkage assumes that variances are draws from one distribution, and without step
2 the interval of an arm four times as variable as the rest would cover 70 to 88% instead of 95%. With step 2 it
covers 94 to 97%. The cost is power: of equally variable arms, one in five keeps its own variance by chance.

With a single arm and its baseline, this is the paired t-test.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from entrace.analysis.compare.rows import Row
from entrace.analysis.statistics.estimates import moderated_variances
from entrace.analysis.statistics.shares import NO_ERROR

KEEPS_OWN = 0.2
LEFT_OUT = 0.01

Arm = dict[int, float]


def moderate(rows: Sequence[Row]) -> list[Row]:
    """Return the rows in their order, with moderated errors.

    Rows without spread over seeds (one seed, no difference, or equal differences) are returned unchanged and do not
    affect the others.
    """
    families: dict[tuple[str, str, str], list[int]] = {}
    for place, row in enumerate(rows):
        if row.difference and np.ptp([seed.difference for seed in row.seeds]) > NO_ERROR:
            families.setdefault((row.baseline, row.benchmark, row.metric), []).append(place)
    found = list(rows)
    for places in families.values():
        family = [rows[place] for place in places]
        for place, row, (error, df) in zip(places, family, _moderated_errors(family), strict=True):
            assert row.difference
            found[place] = replace(row, difference=row.difference.with_error(error, df))
    return found


def _moderated_errors(family: Sequence[Row]) -> list[tuple[float, float]]:
    """Return standard error and degrees of freedom of each row's difference."""
    differences = [{seed.seed: seed.difference for seed in row.seeds} for row in family]
    # Subtracting the baseline of each seed only shifts the block: arms become differences, and the baseline 0.
    arms = [dict.fromkeys(sorted(set().union(*differences)), 0.0), *differences]
    variances, df, is_variable = _arm_variances(arms)
    errors = []
    for place, row in enumerate(family, start=1):
        assert row.difference
        both = [place, 0]
        variance = variances[both].sum()
        # Two moderated variances share degrees of freedom. A variable baseline has its own, independent of the arm's
        # (Welch and Satterthwaite).
        own_df = variance**2 / (variances[both] ** 2 / df[both]).sum()
        used_df = own_df if is_variable[0] and not is_variable[place] else df[both].min()
        error = np.sqrt(variance / len(row.seeds) + row.difference.shared_variance)
        errors.append((float(error), float(used_df)))
    return errors


def _arm_variances(arms: Sequence[Arm]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return variance, degrees of freedom, and variability flag of each arm.

    The arrays have shape (A,). The module defines a variable arm.
    """
    kept = np.arange(len(arms))
    own, own_df = _residual_variances(arms)
    while len(kept) > 2:
        candidate = kept[np.argmin(_excess(own[kept], own_df[kept]))]
        others = kept[kept != candidate]
        fitted, fitted_df = _residual_variances([arms[a] for a in others])
        pooled = fitted @ fitted_df / fitted_df.sum()
        if _f_test(own[candidate] / pooled, own_df[candidate], fitted_df.sum()) >= LEFT_OUT:
            break
        kept, own[others], own_df[others] = others, fitted, fitted_df
    variances, df = own.copy(), own_df.copy()
    variances[kept], df[kept] = moderated_variances(own[kept], own_df[kept])
    is_variable = np.ones(len(arms), dtype=bool)
    is_variable[kept] = _excess(own[kept], own_df[kept]) < KEEPS_OWN
    variances[is_variable] = np.maximum(own, variances)[is_variable]
    df[is_variable] = own_df[is_variable]
    return variances, df, is_variable


def _excess(variances: np.ndarray, df: np.ndarray) -> np.ndarray:
    """Return the one-sided p-value of each variance against all others pooled."""
    squares = variances * df
    others = df.sum() - df
    return _f_test(variances / ((squares.sum() - squares) / others), df, others)


def _f_test(ratio: np.ndarray, df: np.ndarray, other_df: np.ndarray) -> np.ndarray:
    from scipy import special

    return special.fdtrc(df, other_df, ratio)


def _residual_variances(arms: Sequence[Arm]) -> tuple[np.ndarray, np.ndarray]:
    """Return the residual variance of each arm, and its degrees of freedom.

    The residuals are around alpha_a + beta_s. Both arrays have shape (A,).
    """
    seeds = sorted(set().union(*arms))
    cells = [(a, seeds.index(seed), value) for a, arm in enumerate(arms) for seed, value in arm.items()]
    of_arm, of_seed = (np.array([cell[i] for cell in cells]) for i in (0, 1))
    values = np.array([cell[2] for cell in cells])
    design = np.hstack([np.eye(len(arms))[of_arm], np.eye(len(seeds))[of_seed]])
    hat = design @ np.linalg.pinv(design)
    df = np.bincount(of_arm, 1 - np.diag(hat))
    squares = np.bincount(of_arm, (values - hat @ values) ** 2)
    return squares / df, df

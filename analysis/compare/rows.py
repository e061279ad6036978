"""Build the rows of the comparison.

A row is the difference of one arm in one metric on one benchmark.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from entrace.analysis.compare.measure import Curve, Measured, first_reached, pass_metrics
from entrace.analysis.compare.paired import Difference, SeedSums, over_prompts_and_seeds, over_seeds
from entrace.analysis.compare.verdict import FORMAL, LENGTH, PRIMARY, STEPS, metric_of

# Smallest rise of the baseline's accuracy that has a midpoint.
SMALLEST_RISE = 0.01


@dataclass(frozen=True)
class SeedValue:
    """Hold the result of a pair of runs.

    The value of a run that never reached the accuracy is None.
    """

    seed: int
    value: float | None
    baseline_value: float | None
    difference: float


@dataclass(frozen=True)
class Row:
    """Hold a difference, or None with the reason in ``note``."""

    arm: str
    baseline: str
    benchmark: str
    metric: str
    unit: str
    seeds: Sequence[SeedValue] = ()
    value: float | None = None
    baseline_value: float | None = None
    difference: Difference | None = None
    num_prompts: int | None = None
    note: str = ""


def metric_names(num_samples: int) -> list[str]:
    """Return all metrics for ``num_samples`` samples per prompt, in table order."""
    accuracies = [PRIMARY, "maj_at_k", *pass_metrics(num_samples)]
    return [*accuracies, "accuracy_auc", STEPS, "entropy", LENGTH, FORMAL]


def evaluation_rows(
    arm: str, baseline: str, benchmark: str, measured: Measured, num_pairs: int, level: float | None
) -> Iterator[Row]:
    """Yield the rows of all metrics of held-out responses.

    ``level`` is the accuracy of steps_to_accuracy.
    """
    for name in metric_names(measured.num_samples):
        unit = metric_of(name).unit + (f", k = {measured.num_samples}" if name in (PRIMARY, "maj_at_k") else "")
        if name == STEPS:
            yield _steps_row(arm, baseline, benchmark, measured.curves, num_pairs, level)
        elif name != FORMAL:
            yield _from_sums(Row(arm, baseline, benchmark, name, unit), measured, num_pairs)


def training_row(arm: str, baseline: str, benchmark: str, measured: Measured, num_pairs: int) -> Row:
    """Return the row of the share of formal-reasoning tokens."""
    return _from_sums(Row(arm, baseline, benchmark, FORMAL, metric_of(FORMAL).unit), measured, num_pairs)


def half_way(curves: Iterable[Curve]) -> float | None:
    """Return the midpoint of the baseline's mean first and last accuracy.

    The midpoint is rounded to .01, and is None if accuracy did not rise.
    """
    by_run = {curve.baseline_run: curve.accuracy[1] for curve in curves}
    if not by_run:
        return None
    first, last = (np.mean([accuracy[i] for accuracy in by_run.values()]) for i in (0, -1))
    return round(float(first + last) / 2, 2) if last - first >= SMALLEST_RISE else None


def _from_sums(empty: Row, measured: Measured, num_pairs: int) -> Row:
    sums: list[SeedSums] = measured.sums.get(empty.metric, [])
    if not sums:
        return replace(empty, note="no pair recorded it in both runs")
    seeds = [SeedValue(pair.seed, float(pair.values[0]), float(pair.values[1]), pair.difference) for pair in sums]
    return replace(
        empty,
        seeds=seeds,
        value=float(np.mean([pair.values[0] for pair in sums])),
        baseline_value=float(np.mean([pair.values[1] for pair in sums])),
        difference=over_prompts_and_seeds(sums, metric_of(empty.metric).bounds),
        num_prompts=len(np.unique(np.concatenate([pair.prompts for pair in sums]))),
        note=_measured_note(len(sums), num_pairs),
    )


def _steps_row(
    arm: str, baseline: str, benchmark: str, curves: Sequence[Curve], num_pairs: int, level: float | None
) -> Row:
    """Compare the steps until the held-out accuracy reaches ``level``.

    Only steps that both runs evaluated count. A run that never reaches ``level`` is censored: its number of steps is
    only known to exceed the last. The run counts as the last common step, so the difference is one of restricted means,
    E[min(T, last)] (Royston and Parmar, BMC Med. Res. Methodol. 13:152, 2013). This is always defined. If one run of a
    pair is censored, the absolute difference of the pair is a lower bound.
    """
    empty = Row(arm, baseline, benchmark, STEPS, f"steps to accuracy {level:g}" if level is not None else "steps")
    if not curves:
        return replace(empty, note="no pair shares two evaluations")
    if level is None:
        return replace(empty, note=f"accuracy of {baseline} did not rise and has no midpoint; set an accuracy")
    reached = np.array([[first_reached(c.steps, accuracy, level) for accuracy in c.accuracy] for c in curves])
    last = np.array([float(curve.steps[-1]) for curve in curves])
    restricted = np.where(np.isnan(reached), last[:, None], reached)
    differences = restricted[:, 0] - restricted[:, 1]
    counts = [int(np.isfinite(side).sum()) for side in reached.T]
    note = f"reached by {counts[0]} of {len(curves)} runs, of {baseline} by {counts[1]} of {len(curves)}"
    if min(counts) < len(curves):
        note += f"; other runs count as the last step, {' or '.join(f'{step:g}' for step in np.unique(last))}"
    row = replace(
        empty,
        seeds=[
            SeedValue(curve.seed, _known(steps[0]), _known(steps[1]), float(difference))
            for curve, steps, difference in zip(curves, reached, differences, strict=True)
        ],
        note="; ".join(filter(None, (_measured_note(len(curves), num_pairs), note))),
    )
    if not any(counts):
        return row
    value, baseline_value = restricted.mean(0)
    bounds = (-float(last.max()), float(last.max()))
    difference = over_seeds(differences, bounds)
    return replace(row, value=float(value), baseline_value=float(baseline_value), difference=difference)


def _measured_note(num_measured: int, num_pairs: int) -> str:
    return "" if num_measured == num_pairs else f"measured for {num_measured} of {num_pairs} seeds"


def _known(step: float) -> float | None:
    return None if np.isnan(step) else float(step)

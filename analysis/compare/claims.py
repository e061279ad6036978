"""Judge the claims about methods from the rows of the comparison."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from entrace.analysis.compare import compare_once, references_of
from entrace.analysis.compare.verdict import FORMAL, LENGTH, PRIMARY, Judged, metric_of
from entrace.analysis.ledger import Ledger
from entrace.analysis.runs import Runs
from entrace.analysis.statistics.estimates import Estimate
from entrace.analysis.trace.errors import InputError, nearest
from entrace.analysis.verdict_rules import CONTRADICTED, INCONCLUSIVE, NOT_RECORDED, SUPPORTED

# Metric of the comparison by part of a claim. Its unit and smallest difference must match the ledger.
PARTS = {"avg@k": PRIMARY, "length": LENGTH, "formal tokens": FORMAL}


@dataclass(frozen=True)
class MethodFinding:
    """Hold the verdict on a part of a claim about a method.

    The verdict is for one arm and one benchmark.

    Attributes:
        claim: Claim id.
        part: Part of the claim.
        subject: Arm, reference, and the benchmark if there are several benchmarks.
        verdict: Supported, contradicted, inconclusive, or not recorded.
        why: Reason, in words.
        estimate: The difference; None if it was not measured.
        p_adjusted: Holm-adjusted p-value; None for a row that cannot earn a verdict.
        num_seeds: Number of paired seeds.
        detectable: Smallest true difference that the design detects with 80% power; nan if unknown.
    """

    claim: str
    part: str
    subject: str
    verdict: str
    why: str
    estimate: Estimate | None = None
    p_adjusted: float | None = None
    num_seeds: int = 0
    detectable: float = math.nan


def judge_methods(runs: Runs, ledger: Ledger) -> list[MethodFinding]:
    """Judge the claims of the ledger that have arms.

    There is one finding per part, arm, and benchmark. Each finding is a row of ``compare``, with its pairs, estimate,
    interval, p-values, and verdict.

    Raises:
        InputError: a part is unknown, or its smallest effect differs from that of ``compare``.
    """
    about_methods = {claim: entry for claim, entry in ledger.items() if "arms" in entry}
    for claim, entry in about_methods.items():
        for part, spec in entry["parts"].items():
            _check(f'claim {claim}, part "{part}"', part, spec)
    comparison = compare_once(runs, references_of(ledger)) if about_methods else None
    judged = comparison.judged if comparison else ()
    return [
        finding
        for claim, entry in about_methods.items()
        for arm in entry["arms"]
        for part, spec in entry["parts"].items()
        for finding in _findings(claim, part, spec["direction"], arm, entry.get("reference", runs.baseline), judged)
    ]


def _check(name: str, part: str, spec: Mapping[str, Any]) -> None:
    if part not in PARTS:
        raise InputError(f"{name}: unknown part{nearest(part, PARTS)}")
    metric = metric_of(PARTS[part])
    if spec["smallest_effect"] != metric.smallest:
        stated = f"smallest_effect is {spec['smallest_effect']:g}"
        raise InputError(f"{name}: {stated}; must be {metric.smallest:g}, as `entrace compare` uses for {PARTS[part]}")


def _findings(
    claim: str, part: str, direction: str, arm: str, reference: str, judged: Sequence[Judged]
) -> Iterator[MethodFinding]:
    found = [j for j in judged if (j.row.arm, j.row.baseline, j.row.metric) == (arm, reference, PARTS[part])]
    subject = f"{arm} vs {reference}"
    if not found:
        reason = f"no complete run of arm {arm} can be paired with one of arm {reference} by seed"
        yield MethodFinding(claim, part, subject, NOT_RECORDED, reason)
    for own in found:
        name = f"{subject}, {own.row.benchmark}" if len(found) > 1 else subject
        if own.row.difference is None or own.outcome is None:
            yield MethodFinding(claim, part, name, NOT_RECORDED, own.why)
            continue
        yield MethodFinding(
            claim,
            part,
            name,
            _word(own, direction),
            own.why,
            own.row.difference.estimate,
            own.p_adjusted,
            len(own.row.seeds),
            own.outcome.detectable,
        )


def _word(judged: Judged, direction: str) -> str:
    """Return the verdict of the claim that follows from a row of the comparison."""
    if not judged.established:
        return INCONCLUSIVE
    return SUPPORTED if judged.established == (-1 if direction == "negative" else 1) else CONTRADICTED

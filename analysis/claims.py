"""The scorecard: what the runs say about each claim of the ledger; reports/verdicts.md explains it."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from analysis import queries
from analysis.effects import methods, training
from analysis.effects.estimate import MIN_RUNS, NoEffectError
from analysis.runs import Runs
from analysis.stats import Estimate, holm

SUPPORTED, CONTRADICTED, INCONCLUSIVE, NOT_RECORDED = "supported", "contradicted", "inconclusive", "not recorded"
MAX_P_VALUE = 0.05


@dataclass(frozen=True)
class Verdict:
    """One line of the scorecard: a part of a claim, judged on one subject (a run, the baseline runs, or an arm)."""

    claim: str
    part: str
    subject: str
    question: str
    statistic: str
    unit: str
    direction: str
    smallest_effect: float
    verdict: str
    effect: float | None
    low: float | None
    high: float | None
    p_value: float | None
    p_adjusted: float | None
    n: int
    of: str
    why: str
    sql: str
    figure: str

    def to_dict(self) -> dict[str, Any]:
        """Fields by name, ready for JSON: six significant digits, null for what is not finite."""
        return {name: _plain(value) if isinstance(value, float) else value for name, value in asdict(self).items()}


@dataclass(frozen=True)
class _Finding:
    """What a part came to before claims are looked at together: an estimate, or why there is none."""

    claim: str
    part: str
    subject: str
    estimate: Estimate | None
    reason: str = ""
    is_recorded: bool = True
    num_seeds: int | None = None


@cache
def load_ledger() -> dict[str, dict[str, Any]]:
    """Claims by id; the file lies beside this module in a wheel and in ``reports/`` of a checkout."""
    here = Path(__file__).parent
    path = next(p for p in (here / "claims.toml", here.parent / "reports" / "claims.toml") if p.is_file())
    return tomllib.loads(path.read_text())


def judge(runs: Runs, seed: int = 0) -> list[Verdict]:
    """Judges every part of every claim.

    Claims about training are judged on the runs of the baseline arm, or on each run where there is none; claims about
    methods on pairs of complete runs, reference and method, of equal seed. P-values are adjusted for all that is
    judged here together (Holm).

    Args:
        runs: The runs.
        seed: Of the bootstraps; each claim has its own stream, so that one does not move another.
    """
    findings = []
    for number, (claim, entry) in enumerate(load_ledger().items()):
        rng = np.random.default_rng([seed, number])
        findings += _about_methods(claim, entry, runs, rng) if "arms" in entry else _about_training(claim, runs, rng)
    estimates = [finding.estimate for finding in findings if finding.estimate]
    adjusted = iter(holm([estimate.p_value for estimate in estimates]))
    return [_verdict(finding, float(next(adjusted)) if finding.estimate else None) for finding in findings]


def overall(verdicts: Sequence[Verdict]) -> dict[str, str]:
    """One word a claim: supported if every part is, contradicted if any part is."""
    words: dict[str, list[str]] = {}
    for verdict in verdicts:
        words.setdefault(verdict.claim, []).append(verdict.verdict)
    return {claim: _combine(found) for claim, found in words.items()}


def decide(estimate: Estimate, p_adjusted: float, direction: str, smallest_effect: float) -> tuple[str, str]:
    """Verdict and reason from an effect, its interval, and the smallest effect that matters.

    - supported: the effect is established (the interval excludes zero, and p, adjusted for all claims judged together,
      is at most .05), goes the expected way and is at least the smallest that matters;
    - contradicted: the same, the other way round;
    - inconclusive: anything else; the reason tells an effect too small to matter from too little data.
    """
    sign = -1.0 if direction == "negative" else 1.0
    low, high = sorted((sign * estimate.low, sign * estimate.high))
    value = sign * estimate.value
    if not (math.isfinite(value) and math.isfinite(low) and math.isfinite(high)):
        return INCONCLUSIVE, "the effect or its interval is not finite"
    way = "the expected way" if value > 0 else "the other way round"
    if low <= 0 <= high:
        if max(-low, high) < smallest_effect:
            return INCONCLUSIVE, f"no effect that matters: the whole interval lies within ±{smallest_effect:g}"
        return INCONCLUSIVE, "the interval holds zero as well as effects that matter"
    if abs(value) < smallest_effect:
        return INCONCLUSIVE, f"{way}, but smaller than {smallest_effect:g}, the smallest effect that matters"
    if p_adjusted > MAX_P_VALUE:
        return INCONCLUSIVE, f"{way}, but not beyond chance among all claims judged together (p = {p_adjusted:.2g})"
    return SUPPORTED if value > 0 else CONTRADICTED, f"{way}, beyond chance, and at least {smallest_effect:g}"


def _about_training(claim: str, runs: Runs, rng: np.random.Generator) -> Iterator[_Finding]:
    for subject, run_ids in (runs.subjects() or {"-": []}).items():
        for part, effect in training.PARTS[claim].items():
            if not run_ids:
                yield _Finding(claim, part, subject, None, "no run has recorded a step", is_recorded=False)
            else:
                yield _find(claim, part, subject, partial(effect, runs, run_ids, rng))


def _about_methods(claim: str, entry: dict[str, Any], runs: Runs, rng: np.random.Generator) -> Iterator[_Finding]:
    reference = entry.get("reference", runs.baseline)
    for arm in entry["arms"]:
        pairs = methods.paired_runs(runs, reference, arm)
        subject = f"{arm} vs {reference}"
        for part, effect in methods.PARTS[claim].items():
            if not pairs:
                reason = f"no complete run of arm {arm} beside one of arm {reference} of equal seed"
                yield _Finding(claim, part, subject, None, reason, is_recorded=False)
            else:
                yield _find(claim, part, subject, partial(effect, runs, pairs, rng), len(pairs))


def _find(
    claim: str, part: str, subject: str, effect: Callable[[], Estimate], num_seeds: int | None = None
) -> _Finding:
    try:
        return _Finding(claim, part, subject, effect(), num_seeds=num_seeds)
    except NoEffectError as reason:
        return _Finding(claim, part, subject, None, str(reason), reason.is_recorded, num_seeds)


def _verdict(finding: _Finding, p_adjusted: float | None) -> Verdict:
    entry = load_ledger()[finding.claim]
    spec = entry["parts"][finding.part]
    estimate = finding.estimate
    if estimate is None or p_adjusted is None:
        word, why = INCONCLUSIVE if finding.is_recorded else NOT_RECORDED, finding.reason
    else:
        word, why = decide(estimate, p_adjusted, spec["direction"], spec["smallest_effect"])
        if finding.num_seeds is not None and finding.num_seeds < MIN_RUNS:
            seeds = "one seed" if finding.num_seeds == 1 else f"{finding.num_seeds} seeds"
            why = (
                f"{seeds} only, a verdict needs {MIN_RUNS}: the interval leaves out how other seeds would turn out. "
                f"For these runs alone: {word}, {why}"
            )
            word = INCONCLUSIVE
    stem = spec.get("figure", entry["figure"])
    return Verdict(
        claim=finding.claim,
        part=finding.part,
        subject=finding.subject,
        question=entry["question"],
        statistic=spec["statistic"],
        unit=spec["unit"],
        direction=spec["direction"],
        smallest_effect=spec["smallest_effect"],
        verdict=word,
        effect=estimate.value if estimate else None,
        low=estimate.low if estimate else None,
        high=estimate.high if estimate else None,
        p_value=estimate.p_value if estimate else None,
        p_adjusted=p_adjusted,
        n=estimate.n if estimate else 0,
        of=estimate.of if estimate else "-",
        why=why,
        sql=queries.location(stem),
        figure=stem,
    )


def _plain(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _combine(words: list[str]) -> str:
    if CONTRADICTED in words:
        return CONTRADICTED
    return words[0] if len(set(words)) == 1 else INCONCLUSIVE

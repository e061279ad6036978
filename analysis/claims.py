"""The scorecard: what the runs say about each claim of the ledger."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from analysis import effects
from analysis.effects import NoEffectError
from analysis.runs import Runs
from analysis.stats import Estimate

SUPPORTED, CONTRADICTED, INCONCLUSIVE, NOT_RECORDED = "supported", "contradicted", "inconclusive", "not recorded"
MIN_SEEDS = 3

ABOUT_TRAINING: dict[str, Callable[[Runs, Sequence[str], np.random.Generator], dict[str, Estimate]]] = {
    "S1": effects.stage_slowdown,
    "S2": effects.entropy_fall_by_sign,
    "S4": effects.defect_fall,
    "I1": effects.accuracy_by_ppl_half,
    "T1": effects.entropy_at_ends,
}
ABOUT_METHODS: dict[str, Callable[[Runs, Sequence[tuple[str, str]], np.random.Generator], dict[str, Estimate]]] = {
    "M1": effects.accuracy_gain,
    "M2": effects.accuracy_gain,
    "M3": effects.style_change,
}


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
    n: int
    of: str
    why: str
    sql: str
    figure: str

    def to_dict(self) -> dict[str, Any]:
        """Fields by name, ready for JSON: six significant digits, null for what is not finite."""
        return {name: _plain(value) if isinstance(value, float) else value for name, value in asdict(self).items()}


@cache
def load_ledger() -> dict[str, dict[str, Any]]:
    """Claims by id; the file lies beside this module in a wheel and in ``reports/`` of a checkout."""
    here = Path(__file__).parent
    path = next(p for p in (here / "claims.toml", here.parent / "reports" / "claims.toml") if p.is_file())
    return tomllib.loads(path.read_text())


def judge(runs: Runs, seed: int = 0) -> list[Verdict]:
    """Judges every part of every claim.

    Claims about training are judged on the runs of the baseline arm, or on each run where there is none; claims about
    methods on pairs of complete runs, baseline and method, of equal seed.

    Args:
        runs: The runs.
        seed: Of the bootstraps; each claim has its own stream, so that one does not move another.
    """
    verdicts = []
    for number, (claim, entry) in enumerate(load_ledger().items()):
        rng = np.random.default_rng([seed, number])
        if claim in ABOUT_TRAINING:
            for subject, run_ids in (runs.subjects() or {"-": []}).items():
                verdicts += _judge_training(claim, entry, subject, runs, run_ids, rng)
        else:
            for arm in entry["arms"]:
                verdicts += _judge_method(claim, entry, arm, runs, rng)
    return verdicts


def overall(verdicts: Sequence[Verdict]) -> dict[str, str]:
    """One word a claim: supported if every part is, contradicted if any part is."""
    words: dict[str, list[str]] = {}
    for verdict in verdicts:
        words.setdefault(verdict.claim, []).append(verdict.verdict)
    return {claim: _combine(found) for claim, found in words.items()}


def decide(estimate: Estimate, direction: str, smallest_effect: float) -> tuple[str, str]:
    """Verdict and reason from an effect's interval and the smallest effect that matters.

    - supported: the whole interval lies beyond zero in the expected direction and the estimate is at least the
      smallest effect that matters;
    - contradicted: the interval excludes effects as large as that in the expected direction, so that whatever effect
      there is, it is negligible or the other way round;
    - inconclusive: anything else.
    """
    sign = -1.0 if direction == "negative" else 1.0
    low, high = sorted((sign * estimate.low, sign * estimate.high))
    value = sign * estimate.value
    if not (math.isfinite(value) and math.isfinite(low) and math.isfinite(high)):
        return INCONCLUSIVE, "the effect or its interval is not finite"
    if low > 0 and value >= smallest_effect:
        return SUPPORTED, f"the whole interval lies beyond zero and the effect is at least {smallest_effect:g}"
    if high < 0:
        return CONTRADICTED, "the whole interval lies on the other side of zero"
    if high < smallest_effect:
        return CONTRADICTED, f"the interval excludes an effect of {smallest_effect:g}, the smallest that matters"
    if low > 0:
        return INCONCLUSIVE, f"beyond zero, but smaller than {smallest_effect:g}, the smallest effect that matters"
    return INCONCLUSIVE, "the interval holds zero as well as effects that matter"


def _judge_training(
    claim: str, entry: dict[str, Any], subject: str, runs: Runs, run_ids: list[str], rng: np.random.Generator
) -> list[Verdict]:
    try:
        if not run_ids:
            raise NoEffectError("no run has recorded a step")
        found = ABOUT_TRAINING[claim](runs, run_ids, rng)
    except NoEffectError as reason:
        return _undecided(claim, entry, subject, reason)
    return [
        _verdict(claim, entry, part, subject, found[part], *decide(found[part], *_expectation(spec)))
        for part, spec in entry["parts"].items()
    ]


def _judge_method(claim: str, entry: dict[str, Any], arm: str, runs: Runs, rng: np.random.Generator) -> list[Verdict]:
    pairs = effects.paired_runs(runs, arm)
    subject = f"{arm} vs {runs.baseline}"
    try:
        if not pairs:
            raise NoEffectError(f"no complete run of arm {arm} beside one of arm {runs.baseline} of equal seed")
        found = ABOUT_METHODS[claim](runs, pairs, rng)
    except NoEffectError as reason:
        return _undecided(claim, entry, subject, reason)
    verdicts = []
    for part, spec in entry["parts"].items():
        word, why = decide(found[part], *_expectation(spec))
        if len(pairs) < MIN_SEEDS:
            seeds = "one seed" if len(pairs) == 1 else f"{len(pairs)} seeds"
            why = (
                f"{seeds} only, a verdict needs {MIN_SEEDS}: the interval leaves out how other seeds would turn out. "
                f"For these runs alone: {word}"
            )
            word = INCONCLUSIVE
        verdicts.append(_verdict(claim, entry, part, subject, found[part], word, why))
    return verdicts


def _undecided(claim: str, entry: dict[str, Any], subject: str, reason: NoEffectError) -> list[Verdict]:
    word = INCONCLUSIVE if reason.is_recorded else NOT_RECORDED
    return [_verdict(claim, entry, part, subject, None, word, str(reason)) for part in entry["parts"]]


def _expectation(spec: dict[str, Any]) -> tuple[str, float]:
    return spec["direction"], spec["smallest_effect"]


def _verdict(
    claim: str, entry: dict[str, Any], part: str, subject: str, estimate: Estimate | None, word: str, why: str
) -> Verdict:
    spec = entry["parts"][part]
    return Verdict(
        claim=claim,
        part=part,
        subject=subject,
        question=entry["question"],
        statistic=spec["statistic"],
        unit=spec["unit"],
        direction=spec["direction"],
        smallest_effect=spec["smallest_effect"],
        verdict=word,
        effect=estimate.value if estimate else None,
        low=estimate.low if estimate else None,
        high=estimate.high if estimate else None,
        n=estimate.n if estimate else 0,
        of=estimate.of if estimate else "-",
        why=why,
        sql=entry["sql"],
        figure=entry["figure"],
    )


def _plain(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _combine(words: list[str]) -> str:
    if CONTRADICTED in words:
        return CONTRADICTED
    return words[0] if len(set(words)) == 1 else INCONCLUSIVE

"""Judge the claims of the ledger on recorded runs: the scorecard.

``reports/verdicts.md`` explains how verdicts are reached.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from entrace.analysis.compare import claims as method_claims
from entrace.analysis.compare.claims import MethodFinding, judge_methods
from entrace.analysis.compare.verdict import FORMAL
from entrace.analysis.effects import training
from entrace.analysis.effects.estimate import NoEffectError
from entrace.analysis.ledger import Ledger, load_ledger
from entrace.analysis.runs import Runs
from entrace.analysis.statistics.combination import MIN_BLOCKS
from entrace.analysis.statistics.estimates import Estimate, holm
from entrace.analysis.trace.arguments import checked
from entrace.analysis.verdict_rules import CONTRADICTED, INCONCLUSIVE, NOT_RECORDED, SUPPORTED, Size, decide

# Words for a positive and a negative effect of a claim that expects a positive one.
WAYS = ("in the expected direction", "in the opposite direction")


@dataclass(frozen=True)
class Verdict:
    """Hold one row of the scorecard: the verdict on a part of a claim.

    Attributes:
        claim: Key of the claim in the ledger, such as S1.
        part: Key of its part.
        subject: Run, arm of the baseline runs, or pair of arms that the verdict is about.
        question: What the claim asks.
        statistic: What is estimated, in words.
        null: What holds if the claim is false.
        unit: Unit of the effect and its interval.
        direction: Sign of the effect that supports the claim.
        smallest_effect: Smallest effect that matters, in ``unit``.
        verdict: supported, contradicted, inconclusive, or not recorded.
        effect: The estimate; None if it is undefined.
        low: Lower end of its 95% interval; None without an interval.
        high: Upper end.
        p_value: p-value of the null; None without a test.
        p_adjusted: The same after Holm's correction over the family.
        detectable: Smallest effect that the runs detect with 80% power; None if unknown.
        n: Number of units that the interval is over.
        of: Name of these units.
        why: Reason of the verdict.
        sql: SQL files whose rows the statistic is computed from, relative to the package, separated by commas.
        figure: Question that shows the effect.
    """

    claim: str
    part: str
    subject: str
    question: str
    statistic: str
    null: str
    unit: str
    direction: str
    smallest_effect: float
    verdict: str
    effect: float | None
    low: float | None
    high: float | None
    p_value: float | None
    p_adjusted: float | None
    detectable: float | None
    n: int
    of: str
    why: str
    sql: str
    figure: str

    def to_dict(self) -> dict[str, Any]:
        """Return the fields by name, ready for JSON.

        Numbers have six significant digits; numbers that are not finite are null.
        """
        return {name: _plain(value) if isinstance(value, float) else value for name, value in asdict(self).items()}


@dataclass(frozen=True)
class _Finding:
    """Hold the estimate for a part of a training claim, or why there is none."""

    claim: str
    part: str
    subject: str
    estimate: Estimate | None
    reason: str = ""
    is_recorded: bool = True

    @property
    def is_judged(self) -> bool:
        """Return True if the finding can earn a verdict.

        A verdict needs a finite interval and at least ``MIN_BLOCKS`` effective steps.
        """
        return self.estimate is not None and self.estimate.is_finite and self.estimate.blocks >= MIN_BLOCKS


def check(runs: Runs, ledger: Ledger) -> None:
    """Refuse claims whose SQL lacks what they read; see ``training.declared``.

    Raises:
        InputError: a column is missing or not a number, the parameter ``$runs`` is missing, or DuckDB rejects the SQL.
    """
    for claim, entry in ledger.items():
        for part, spec in entry["parts"].items():
            if "sql" in spec:
                training.check_declared(runs, spec, f'claim {claim}, part "{part}"')


@checked
def judge(runs: Runs, ledger: Ledger | None = None) -> list[Verdict]:
    """Judge every part of every claim.

    Claims about training are judged on each of ``runs.subjects``. Their p-values are adjusted for all findings of their
    family that can earn a verdict. Claims about methods are judged on each arm by ``compare``, which also adjusts their
    p-values.

    Args:
        runs: The runs.
        ledger: Claims by key, as ``load_ledger`` returns them; None for the built-in claims and those of
            ``runs.questions``.

    Returns:
        One verdict per part of a claim and subject, in the order of the ledger.

    Raises:
        InputError: a claim about methods has a part, or a smallest effect, that ``compare`` does not have; or ``check``
            refuses a claim.
    """
    ledger = load_ledger(questions=runs.questions) if ledger is None else ledger
    check(runs, ledger)
    by_claim: dict[str, list[_Finding | MethodFinding]] = {claim: [] for claim in ledger}
    about_training: list[_Finding] = []
    for claim, entry in ledger.items():
        if "arms" not in entry:
            about_training += _about_training(claim, entry, runs)
    families: dict[str, list[_Finding]] = {}
    for finding in about_training:
        if finding.is_judged:
            families.setdefault(_family(ledger, finding), []).append(finding)
    adjusted: dict[int, float] = {}
    for judged in families.values():
        p_values = holm([finding.estimate.p_value for finding in judged if finding.estimate])
        adjusted |= zip(map(id, judged), map(float, p_values), strict=True)
    for finding in (*about_training, *judge_methods(runs, ledger)):
        by_claim[finding.claim].append(finding)
    return [
        _of_method(runs, ledger, finding)
        if isinstance(finding, MethodFinding)
        else _of_training(
            runs, ledger, finding, adjusted.get(id(finding)), len(families.get(_family(ledger, finding), ()))
        )
        for findings in by_claim.values()
        for finding in findings
    ]


def overall(verdicts: Sequence[Verdict]) -> dict[str, str]:
    """Return one verdict per claim.

    A claim is supported if every part is, and contradicted if any part is.
    """
    words: dict[str, list[str]] = {}
    for verdict in verdicts:
        words.setdefault(verdict.claim, []).append(verdict.verdict)
    return {claim: _combine(found) for claim, found in words.items()}


def scorecard(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Return the verdicts, and one per claim, as ``claims.json`` holds them."""
    return {"overall": overall(verdicts), "verdicts": [verdict.to_dict() for verdict in verdicts]}


def _family(ledger: Ledger, finding: _Finding) -> str:
    """Return the family of the finding's claim for Holm's correction.

    Claims of one family are corrected together. By default the family is empty.
    """
    return str(ledger[finding.claim].get("family", ""))


def _about_training(claim: str, entry: Mapping[str, Any], runs: Runs) -> Iterator[_Finding]:
    for subject, run_ids in (runs.subjects() or {"-": []}).items():
        for part in entry["parts"]:
            if not run_ids:
                yield _Finding(claim, part, subject, None, "no run recorded a step", is_recorded=False)
                continue
            for series, estimate in training.estimators(claim, part, entry["parts"][part], runs, run_ids):
                name = f"{subject}, {series}" if series else subject
                try:
                    yield _Finding(claim, part, name, estimate())
                except NoEffectError as reason:
                    yield _Finding(claim, part, name, None, str(reason), reason.is_recorded)


def _of_training(runs: Runs, ledger: Ledger, finding: _Finding, p_adjusted: float | None, num_tests: int) -> Verdict:
    spec = ledger[finding.claim]["parts"][finding.part]
    estimate = finding.estimate
    found = math.nan
    if estimate is None:
        word, why = INCONCLUSIVE if finding.is_recorded else NOT_RECORDED, finding.reason
    elif p_adjusted is None:
        word = INCONCLUSIVE
        why = "the effect or its interval is not finite"
        if estimate.blocks < MIN_BLOCKS:
            why = (
                f"autocorrelation leaves {estimate.blocks:.1f} effective independent steps; "
                f"a verdict needs {MIN_BLOCKS:g}: record more steps"
            )
    else:
        sign = -1 if spec["direction"] == "negative" else 1
        ways = WAYS if sign > 0 else (WAYS[1], WAYS[0])
        size = Size(estimate.n, spec["limit"])
        outcome = decide(estimate, p_adjusted, spec["smallest_effect"], num_tests=num_tests, size=size, ways=ways)
        word = {1: SUPPORTED, 0: INCONCLUSIVE, -1: CONTRADICTED}[sign * outcome.direction]
        why, found = outcome.why, outcome.detectable
    return _verdict(runs, ledger, finding.claim, finding.part, finding.subject, word, why, estimate, p_adjusted, found)


def _of_method(runs: Runs, ledger: Ledger, finding: MethodFinding) -> Verdict:
    return _verdict(
        runs,
        ledger,
        finding.claim,
        finding.part,
        finding.subject,
        finding.verdict,
        finding.why,
        finding.estimate,
        finding.p_adjusted,
        finding.detectable,
    )


def _verdict(
    runs: Runs,
    ledger: Ledger,
    claim: str,
    part: str,
    subject: str,
    word: str,
    why: str,
    estimate: Estimate | None,
    p_adjusted: float | None,
    detectable: float,
) -> Verdict:
    entry = ledger[claim]
    spec = entry["parts"][part]
    stem = spec.get("figure", entry["figure"])
    if "arms" in entry:
        read = ("formal_sums" if method_claims.PARTS[part] == FORMAL else "eval_outcomes",)
    else:
        read = training.questions_read(claim, part, spec)
    share = next(filter(None, map(runs.token_share, read)), "") if estimate else ""
    return Verdict(
        claim=claim,
        part=part,
        subject=subject,
        question=entry["question"],
        statistic=spec["statistic"],
        null=spec["null"],
        unit=spec["unit"],
        direction=spec["direction"],
        smallest_effect=spec["smallest_effect"],
        verdict=word,
        effect=estimate.value if estimate and math.isfinite(estimate.value) else None,
        low=estimate.low if estimate and estimate.is_finite else None,
        high=estimate.high if estimate and estimate.is_finite else None,
        p_value=estimate.p_value if estimate else None,
        p_adjusted=p_adjusted,
        detectable=detectable if math.isfinite(detectable) else None,
        n=estimate.n if estimate else 0,
        of=estimate.of if estimate else "-",
        why=f"{why}; {share}" if share else why,
        sql=", ".join(map(runs.questions.location, read)),
        figure=stem,
    )


def _plain(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _combine(words: list[str]) -> str:
    if CONTRADICTED in words:
        return CONTRADICTED
    return words[0] if len(set(words)) == 1 else INCONCLUSIVE

"""The scorecard: what the runs say about each claim of the ledger; reports/verdicts.md explains it."""

from __future__ import annotations

import math
import reprlib
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from entrace.analysis import queries
from entrace.analysis.compare.claims import MethodFinding, judge_methods
from entrace.analysis.effects import training
from entrace.analysis.effects.estimate import NoEffectError
from entrace.analysis.runs import Runs
from entrace.analysis.statistics.estimates import Estimate, holm
from entrace.analysis.statistics.intervals import MIN_BLOCKS
from entrace.analysis.trace.errors import InputError, in_one_line, nearest, reason_of
from entrace.analysis.verdict_rules import CONTRADICTED, INCONCLUSIVE, NOT_RECORDED, SUPPORTED, Size, decide

# Keys of every claim and of every part of one.
CLAIM_KEYS = ("question", "test", "figure", "parts")
PART_KEYS = ("statistic", "null", "unit", "direction", "smallest_effect", "limit")

# What an effect of either sign is called where the claim expects a positive one.
WAYS = ("the expected way", "the other way around")

Ledger = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Verdict:
    """One line of the scorecard: a part of a claim, judged on one subject (a run, the baseline runs, or an arm).

    ``detectable`` is the effect that the runs would have found with 80 % power, None where unknown.
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
        """Return the fields by name, ready for JSON: six significant digits, null for what is not finite."""
        return {name: _plain(value) if isinstance(value, float) else value for name, value in asdict(self).items()}


@dataclass(frozen=True)
class _Finding:
    """A part of a claim about training before all are looked at together: an estimate, or why there is none."""

    claim: str
    part: str
    subject: str
    estimate: Estimate | None
    reason: str = ""
    is_recorded: bool = True

    @property
    def is_judged(self) -> bool:
        """Whether the finding could earn a verdict: it has an interval, and enough steps behind it."""
        return (
            self.estimate is not None
            and math.isfinite(self.estimate.low)
            and math.isfinite(self.estimate.high)
            and self.estimate.blocks >= MIN_BLOCKS
        )


def load_ledger(path: Path | None = None) -> dict[str, dict[str, Any]]:
    """Return the claims by id.

    Args:
        path: A ledger; the shipped one if not given, beside this module in a wheel and in ``reports/`` of a checkout.

    Raises:
        InputError: no such file, no TOML, or a claim or part that lacks a key, such as its null.
    """
    return _shipped_ledger() if path is None else _read_ledger(Path(path))


def judge(runs: Runs, ledger: Ledger | None = None) -> list[Verdict]:
    """Judge every part of every claim.

    Claims about training are judged on each of ``runs.subjects``, those about methods on each arm, by ``compare``.
    P-values of the first are adjusted for all of them that could earn a verdict, those of the second as in ``compare``.
    """
    ledger = load_ledger() if ledger is None else ledger
    by_claim: dict[str, list[_Finding | MethodFinding]] = {claim: [] for claim in ledger}
    about_training: list[_Finding] = []
    for claim, entry in ledger.items():
        if "arms" not in entry:
            about_training += _about_training(claim, entry, runs)
    judged = [finding for finding in about_training if finding.is_judged]
    adjusted = dict(
        zip(map(id, judged), map(float, holm([f.estimate.p_value for f in judged if f.estimate])), strict=True)
    )
    for finding in (*about_training, *judge_methods(runs, ledger)):
        by_claim[finding.claim].append(finding)
    return [
        _of_method(ledger, finding)
        if isinstance(finding, MethodFinding)
        else _of_training(ledger, finding, adjusted.get(id(finding)), len(judged))
        for findings in by_claim.values()
        for finding in findings
    ]


def overall(verdicts: Sequence[Verdict]) -> dict[str, str]:
    """Return one word per claim: supported if every part is, contradicted if any part is."""
    words: dict[str, list[str]] = {}
    for verdict in verdicts:
        words.setdefault(verdict.claim, []).append(verdict.verdict)
    return {claim: _combine(found) for claim, found in words.items()}


@cache
def _shipped_ledger() -> dict[str, dict[str, Any]]:
    here = Path(__file__).resolve().parent
    return _read_ledger(next(p for p in (here / "claims.toml", here.parent / "reports" / "claims.toml") if p.is_file()))


def _read_ledger(path: Path) -> dict[str, dict[str, Any]]:
    try:
        ledger = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: {reason_of(error)}") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"{path}: not a ledger ({in_one_line(error)})") from None
    for claim, entry in ledger.items():
        _require(entry, CLAIM_KEYS, f"{path}: claim {claim}")
        _require(entry["parts"], (), f"{path}: claim {claim}, parts")
        known = training.PARTS.get(claim)
        if known is None and "arms" not in entry:
            raise InputError(f'{path}: unknown claim "{claim}"{nearest(claim, training.PARTS)}')
        for part, spec in entry["parts"].items():
            name = f'{path}: claim {claim}, part "{part}"'
            _require(spec, PART_KEYS, name)
            if "arms" not in entry and part not in (known or ()):
                raise InputError(f"{name}: no such part{nearest(part, known or ())}")
    return ledger


def _require(entry: Any, keys: Sequence[str], name: str) -> None:
    if not isinstance(entry, dict):
        expected = f"a table with {', '.join(keys)}" if keys else "a table"
        raise InputError(f"{name}: expected {expected}; found {reprlib.repr(entry)}")
    for key in keys:
        if entry.get(key) in (None, ""):
            hint = "; say what the effect is compared with" if key == "null" else ""
            raise InputError(f'{name}: "{key}" is {"empty" if key in entry else "missing"}{hint}')


def _about_training(claim: str, entry: Mapping[str, Any], runs: Runs) -> Iterator[_Finding]:
    for subject, run_ids in (runs.subjects() or {"-": []}).items():
        for part in entry["parts"]:
            if not run_ids:
                yield _Finding(claim, part, subject, None, "no run has recorded a step", is_recorded=False)
                continue
            for series, judged in training.judges(claim, part, runs, run_ids):
                name = f"{subject}, {series}" if series else subject
                try:
                    yield _Finding(claim, part, name, judged())
                except NoEffectError as reason:
                    yield _Finding(claim, part, name, None, str(reason), reason.is_recorded)


def _of_training(ledger: Ledger, finding: _Finding, p_adjusted: float | None, num_tests: int) -> Verdict:
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
                f"steps depend on each other so much that they are worth {estimate.blocks:.1f} independent ones; "
                f"a verdict needs {MIN_BLOCKS:g}: record more steps"
            )
    else:
        sign = -1 if spec["direction"] == "negative" else 1
        ways = WAYS if sign > 0 else (WAYS[1], WAYS[0])
        size = Size(estimate.n, spec["limit"])
        outcome = decide(estimate, p_adjusted, spec["smallest_effect"], num_tests=num_tests, size=size, ways=ways)
        word = {1: SUPPORTED, 0: INCONCLUSIVE, -1: CONTRADICTED}[sign * outcome.direction]
        why, found = outcome.why, outcome.detectable
    return _verdict(ledger, finding.claim, finding.part, finding.subject, word, why, estimate, p_adjusted, found)


def _of_method(ledger: Ledger, finding: MethodFinding) -> Verdict:
    return _verdict(
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
        effect=estimate.value if estimate else None,
        low=estimate.low if estimate else None,
        high=estimate.high if estimate else None,
        p_value=estimate.p_value if estimate else None,
        p_adjusted=p_adjusted,
        detectable=detectable if math.isfinite(detectable) else None,
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

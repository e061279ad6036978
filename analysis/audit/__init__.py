"""Audit the recorded numbers, groups, and advantages of a trace.

The audit finds the distribution that the numbers describe, and whether groups and advantages agree. ``checks`` needs
nothing but the trace. ``against_model`` compares recorded values with those of the policy that sampled the tokens,
which a teacher-forced pass of ``trainer.external`` provides. A check that lacks data says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from entrace.analysis.audit.against_model import MODEL_CHECKS, without_model
from entrace.analysis.audit.checks import CHECKS
from entrace.analysis.audit.findings import ALARM, OK, UNKNOWN, AlarmError, Finding, LackingError
from entrace.analysis.audit.sample import Reference, Sample
from entrace.analysis.runs import Runs

__all__ = ["ALARM", "OK", "UNKNOWN", "Finding", "Reference", "Sample", "audit", "audit_run"]


def audit(runs: Runs, refer: Callable[[Sample, str], Reference] | None = None) -> list[Finding]:
    """Return the findings of all checks on all runs.

    Args:
        runs: Opened runs.
        refer: Function that returns a model's values for the sample of a run (default: no model is compared).
    """
    findings: list[Finding] = []
    for run_id in runs.manifests:
        sample = Sample.of(runs, run_id)
        findings += audit_run(sample, run_id, refer(sample, run_id) if refer else None)
    return findings


def audit_run(sample: Sample, run_id: str, reference: Reference | None = None) -> Iterator[Finding]:
    """Yield the finding of each check on one run.

    Checks against a model are included if ``reference`` is given.
    """
    checks: dict[str, Callable[[], str]] = {name: partial(check, sample) for name, check in CHECKS.items()}
    if reference is None:
        checks["model"] = partial(without_model, sample)
    else:
        checks |= {name: partial(check, reference) for name, check in MODEL_CHECKS.items()}
    for name, check in checks.items():
        try:
            yield Finding(run_id, name, OK, check())
        except LackingError as lacking:
            yield Finding(run_id, name, UNKNOWN, str(lacking))
        except AlarmError as alarm:
            yield Finding(run_id, name, ALARM, alarm.evidence, alarm.cause)

"""Define the outcome of a check, and how a check reports what it found."""

from __future__ import annotations

from dataclasses import dataclass

OK, ALARM, UNKNOWN = "ok", "alarm", "cannot tell"


@dataclass(frozen=True)
class Finding:
    """Hold the outcome of one check.

    Attributes:
        run_id: The run.
        check: Name of the check.
        state: ``OK``, ``ALARM``, or ``UNKNOWN``.
        evidence: Measured values, in words.
        cause: Likely causes of an alarm, or what is missing; empty if all is well.
    """

    run_id: str
    check: str
    state: str
    evidence: str
    cause: str = ""

    def __str__(self) -> str:
        return f"{self.run_id}: {self.check}: {self.state}: {self.evidence}{'; ' if self.cause else ''}{self.cause}"


class LackingError(Exception):
    """Signal that a check lacks data; the message says which."""


class AlarmError(Exception):
    """Signal a fault: evidence, and likely causes."""

    def __init__(self, evidence: str, cause: str) -> None:
        """Store both."""
        super().__init__(evidence)
        self.evidence, self.cause = evidence, cause

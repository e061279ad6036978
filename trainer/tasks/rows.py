"""Describe malformed rows of prompts and answers."""

from __future__ import annotations

from entrace.analysis.importers.row_files import BadRowError
from entrace.trainer.tasks.math_verifier import EXPECTED


class NoAnswerError(BadRowError):
    """A missing, null, or blank answer."""

    advice = "only your own function (task.verifiers) can judge rows without an answer"


class UnreadableAnswerError(BadRowError):
    """An answer that its verifier cannot parse: no response would be correct."""

    advice = f"math and math_text read {EXPECTED}"

"""Define the settings of an import."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from entrace.analysis.importers.columns import ALIASES
from entrace.analysis.trace.errors import InputError, nearest


@dataclass(frozen=True)
class ImportSettings:
    """Settings of an import.

    Attributes:
        policy: Description of the model of the teacher-forced pass, for ``run.json``; None without a model.
        temperature: Sampling temperature of the rollouts; None if unknown.
        correct_at: Lowest reward of a correct response.
        skip_bad_rows: Skip malformed rows, with the groups that they belong to.
        fields: Key of each field, dotted where nested; an empty key ignores the field.

    Raises:
        InputError: a value is out of range, or a field does not exist.
    """

    policy: Mapping[str, Any] | None = None
    temperature: float | None = None
    correct_at: float = 1.0
    skip_bad_rows: bool = False
    fields: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the values."""
        if self.temperature is not None and not 0 < self.temperature < math.inf:
            raise InputError(f"import: temperature is {self.temperature:g}, expected a number above 0")
        if not math.isfinite(self.correct_at):
            raise InputError(f"import: correct_at is {self.correct_at:g}, expected a finite number")
        for name in self.fields:
            if name not in ALIASES:
                raise InputError(f'import: fields: "{name}" is not a field of a rollout{nearest(name, ALIASES)}')

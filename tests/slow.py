"""Leave repeats of a test to ``make test-slow``."""

from collections.abc import Iterable
from typing import Any

import pytest


def slow_after(count: int, cases: Iterable[Any]) -> list[Any]:
    """Return the parameters of a test, of which all but the first ``count`` are slow."""
    return [pytest.param(case, marks=pytest.mark.slow if i >= count else ()) for i, case in enumerate(cases)]

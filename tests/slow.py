"""Leave repeats of a test to ``make test-slow``.

By default, each mechanism is tested once or a few times.
"""

from collections.abc import Container, Iterable
from typing import Any

import pytest


def slow(*values: Any) -> Any:
    """Return the parameters of a slow case."""
    return pytest.param(*values, marks=pytest.mark.slow)


def slow_except(quick: Container[Any], cases: Iterable[Any]) -> list[Any]:
    """Return cases of one parameter, of which all but those in ``quick`` are slow."""
    return [case if case in quick else slow(case) for case in cases]


def slow_after(count: int, cases: Iterable[Any]) -> list[Any]:
    """Return cases of one parameter, of which all but the first ``count`` are slow."""
    return [case if place < count else slow(case) for place, case in enumerate(cases)]

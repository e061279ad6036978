"""Provide paired timings, and the benchmarks' table of measurements."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import Any

HAS_TRL = find_spec("trl") is not None

AT_MOST, AT_LEAST = "at most", "at least"


@dataclass(frozen=True)
class Measurement:
    """Summarize repeated measurements of one quantity, with an optional target.

    Attributes:
        part: Heading in the report.
        name: Name of the quantity.
        unit: Unit of the values; ``ratio`` for ratios of times of the same round.
        median: Median of the values.
        low: Lower quartile.
        high: Upper quartile.
        bound: ``at most`` or ``at least``; None without a target.
        target: Bound on the median.
    """

    part: str
    name: str
    unit: str
    median: float
    low: float
    high: float
    bound: str | None = None
    target: float | None = None

    @classmethod
    def of(
        cls, part: str, name: str, unit: str, values: Sequence[float], bound: str | None = None, target: Any = None
    ) -> Measurement:
        """Summarize values."""
        low, median, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [*values] * 3
        return cls(part, name, unit, median, low, high, bound, target)

    @property
    def is_met(self) -> bool | None:
        """Return whether the median meets the target; None without one."""
        if self.bound is None or self.target is None:
            return None
        return self.median <= self.target if self.bound == AT_MOST else self.median >= self.target

    @property
    def verdict(self) -> str:
        """``met``, ``**missed**``, or ``undecided`` if the target lies within the quartiles; empty without a target."""
        if self.is_met is None or self.target is None:
            return ""
        if self.low < self.target < self.high:
            return "undecided"
        return "met" if self.is_met else "**missed**"

    def as_json(self) -> dict[str, Any]:
        """Return the entry in the report's JSON."""
        return {**asdict(self), "is_met": self.is_met}


def time_in_rounds(
    works: Mapping[str, Callable[[], Any]],
    rounds: int,
    synchronize: Callable[[], Any] = lambda: None,
    prepare: Callable[[Callable[[], Any]], Any] = lambda work: None,
) -> dict[str, list[float]]:
    """Return the seconds of each work in each round.

    Works alternate in order, after one warm-up round. ``prepare`` is called with each work before timing starts.
    """
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for index in range(-1, rounds):
        for name in list(works) if index % 2 else list(works)[::-1]:
            prepare(works[name])
            synchronize()
            started = time.perf_counter()
            works[name]()
            synchronize()
            if index >= 0:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def quotients(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Return the ratio within each round."""
    return [a / b for a, b in zip(above, below, strict=True)]


def to_markdown(measurements: Sequence[Measurement]) -> str:
    """Return one table per part."""
    lines: list[str] = []
    for part in dict.fromkeys(measurement.part for measurement in measurements):
        lines += [
            f"## {part}",
            "",
            "| | median | quartiles | unit | target | |",
            "| --- | ---: | ---: | --- | --- | --- |",
        ]
        for measurement in measurements:
            if measurement.part == part:
                target = f"{measurement.bound} {_number(measurement.target)}" if measurement.target is not None else ""
                spread = f"{_number(measurement.low)} to {_number(measurement.high)}"
                cells = (
                    measurement.name,
                    _number(measurement.median),
                    spread,
                    measurement.unit,
                    target,
                    measurement.verdict,
                )
                lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"

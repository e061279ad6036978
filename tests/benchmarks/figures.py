"""Paired timings, and the figures that the benchmarks report."""

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
class Figure:
    """Something measured several times, and what it should be.

    Attributes:
        part: The heading it stands under.
        name: What was measured.
        unit: Of the values; ``ratio`` for ratios of times taken in the same turn.
        median: Of the values.
        low: Their lower quartile.
        high: Their upper quartile.
        bound: ``at most`` or ``at least``; None if there is no target.
        target: The number that the median is held against.
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
    ) -> Figure:
        """From the values themselves."""
        low, median, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [*values] * 3
        return cls(part, name, unit, median, low, high, bound, target)

    @property
    def is_met(self) -> bool | None:
        """Whether the median meets the target; None without one."""
        if self.bound is None or self.target is None:
            return None
        return self.median <= self.target if self.bound == AT_MOST else self.median >= self.target

    def as_json(self) -> dict[str, Any]:
        """For the report's JSON."""
        return {**asdict(self), "is_met": self.is_met}


def time_in_turn(
    works: Mapping[str, Callable[[], Any]],
    rounds: int,
    synchronize: Callable[[], Any] = lambda: None,
    prepare: Callable[[Callable[[], Any]], Any] = lambda work: None,
) -> dict[str, list[float]]:
    """Seconds of each work in each of ``rounds`` turns, in alternating order, after one turn that warms up.

    ``prepare`` is called with each work before its time starts.
    """
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(-1, rounds):
        for name in list(works) if turn % 2 else list(works)[::-1]:
            prepare(works[name])
            synchronize()
            started = time.perf_counter()
            works[name]()
            synchronize()
            if turn >= 0:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def quotients(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Ratio within each turn."""
    return [a / b for a, b in zip(above, below, strict=True)]


def to_markdown(figures: Sequence[Figure]) -> str:
    """One table a part."""
    lines: list[str] = []
    for part in dict.fromkeys(figure.part for figure in figures):
        lines += [
            f"## {part}",
            "",
            "| | median | quartiles | unit | target | |",
            "| --- | ---: | ---: | --- | --- | --- |",
        ]
        for figure in figures:
            if figure.part == part:
                target = f"{figure.bound} {_number(figure.target)}" if figure.target is not None else ""
                verdict = {True: "met", False: "**missed**", None: ""}[figure.is_met]
                spread = f"{_number(figure.low)} to {_number(figure.high)}"
                cells = (figure.name, _number(figure.median), spread, figure.unit, target, verdict)
                lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"

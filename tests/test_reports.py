"""Test that the documentation shows the numbers of the committed reports."""

import json
import re
from pathlib import Path

import pytest

from tests.benchmarks import bench_output, bench_queries
from tests.benchmarks.measurements import Measurement, to_markdown
from tests.chaos import chaos, flips

ROOT = Path(__file__).parents[1]


def report(name):
    return json.loads((ROOT / "reports" / name).read_text())


def rows_of(markdown):
    """Return lines of a table, without its title."""
    return "\n".join(line for line in markdown.splitlines() if line.startswith("|"))


NUMBER = r"(−?[\d.]+)"
FINDING = re.compile(rf"{NUMBER}(?P<points> points)?(?: of its movement)? \[{NUMBER}, {NUMBER}\]")


def shown(value, like, scale):
    """Return ``value`` as the page writes numbers.

    It has as many decimals as ``like``, and no zero before the point.
    """
    digits = len(like.partition(".")[2])
    return f"{scale * value:.{digits}f}".replace("-", "−").replace("0.", ".", 1 if abs(scale * value) < 1 else 0)


def test_findings_of_the_readme_have_the_numbers_of_the_scorecard():
    rows = [line.split("|") for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("| ")]
    verdicts = report("tiny-study/claims.json")["verdicts"]
    found = 0
    for claim, finding in ((cells[1].partition(":")[0], cells[3]) for cells in rows if ":" in cells[1]):
        first, _, last = claim.strip().replace(", ", " to ").partition(" to ")
        for match in FINDING.finditer(finding):
            scale = 100 if match["points"] else 1
            written = match.group(1, 3, 4)
            numbers = {
                tuple(shown(v[key], like, scale) for key, like in zip(("effect", "low", "high"), written, strict=True))
                for v in verdicts
                if first <= v["claim"] <= (last or first) and v["low"] is not None
            }
            assert written in numbers, (claim, written, numbers)
            found += 1
    assert found >= 6


def integrity():
    return measurements(report("integrity_benchmarks.json"))


def measurements(entries):
    return [Measurement(**{key: value for key, value in values.items() if key != "is_met"}) for values in entries]


@pytest.mark.parametrize("name", ["benchmarks", "benchmarks_gpu"])
def test_a_page_of_benchmarks_shows_its_numbers(name):
    found = measurements(report(f"{name}.json")["measurements"])
    assert to_markdown(found) in (ROOT / "reports" / f"{name}.md").read_text()


@pytest.mark.parametrize(
    ("page", "text"),
    [
        ("reliability.md", lambda: chaos.render(report("chaos.json"))),
        ("reliability.md", lambda: flips.describe_default(report("chaos.json")["damage"])),
        ("performance.md", lambda: bench_output.to_markdown(report("output_benchmarks.json"))),
        ("performance.md", lambda: bench_queries.to_markdown(report("query_benchmarks.json"))),
        ("performance.md", lambda: rows_of(to_markdown(integrity()))),
    ],
)
def test_a_page_shows_what_was_measured(page, text):
    assert text() in (ROOT / "docs" / page).read_text()


def test_every_fault_was_tried_as_often_as_the_command_does_and_nothing_was_lost():
    result = report("chaos.json")
    assert {kind: count["tried"] for kind, count in result["kinds"].items()} == {
        kind: fault.number for kind, fault in chaos.FAULTS.items()
    }
    assert (result["all"]["silent"], result["all"]["lost"], result["failures"]) == (0, 0, [])

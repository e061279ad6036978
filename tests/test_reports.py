"""Test that the documentation shows the numbers of the committed reports."""

import json
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


def integrity():
    measurements = [{**values} for values in report("integrity_benchmarks.json")]
    for values in measurements:
        values.pop("is_met")
    return [Measurement(**values) for values in measurements]


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

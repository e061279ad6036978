"""The calibration finds what was planted and nothing else; `make calibrate` measures how often."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from analysis.claims import CONTRADICTED, SUPPORTED, load_ledger
from tests.calibration.calibrate import ABSENT, PRESENT, WORLDS, Outcome, simulate, summarize, truths, upper_end

COMMITTED = Path(__file__).parents[1] / "reports" / "calibration.json"


@pytest.fixture(scope="module")
def outcomes() -> dict[str, list[Outcome]]:
    return {world: [simulate(world, 1)] for world in WORLDS}


def parts(worlds: dict[str, str], default: str) -> list[tuple[str, str]]:
    ledger = load_ledger().items()
    return [(worlds.get(claim, default), f"{claim}/{part}") for claim, entry in ledger for part in entry["parts"]]


def test_planted_effects_are_found(outcomes: dict[str, list[Outcome]]):
    found = {key: outcomes[world][0][key][0] for world, key in parts(PRESENT, "planted")}
    assert set(found.values()) == {SUPPORTED}


def test_absent_effects_are_not_found(outcomes: dict[str, list[Outcome]]):
    found = {key: outcomes[world][0][key][0] for world, key in parts(ABSENT, "two stages")}
    assert {SUPPORTED, CONTRADICTED}.isdisjoint(found.values())


def test_summary_compares_with_the_truth(outcomes: dict[str, list[Outcome]], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tests.calibration.calibrate.TRUTH_RUNS", 2)
    rows = summarize(outcomes, truths())
    assert len(rows) == len(parts({}, ""))
    assert all(row["power"] == 1 and row["false_supported"] == row["false_contradicted"] == 0 for row in rows)
    # Two or three intervals a part, 95 % of which hold the truth.
    assert sum(row["coverage"] * row["intervals"] for row in rows) >= 0.85 * sum(row["intervals"] for row in rows)


def test_upper_end_of_a_rate():
    # 1 - 0.025^(1/200) of 200 without a hit.
    assert upper_end(0, 200) == pytest.approx(1 - 0.025 ** (1 / 200))
    assert upper_end(3, 3) == 1


def test_committed_table_keeps_what_is_promised():
    rows = json.loads(COMMITTED.read_text())
    assert {(row["claim"], row["part"]) for row in rows} == {
        (claim, part) for claim, entry in load_ledger().items() for part in entry["parts"]
    }
    for row in rows:
        assert row["simulations"] >= 200
        assert row["false_supported"] + row["false_contradicted"] <= 0.05
        assert row["false_upper"] <= 0.08
        assert row["power"] >= 0.9
        assert 0.92 <= row["coverage"] <= 0.98

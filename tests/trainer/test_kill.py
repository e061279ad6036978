"""A run that is killed loses nothing that was durable, and ends as if nothing had happened; `make chaos` kills more."""

import json
import shutil
import sys

import pytest

from entrace.analysis.trace import write_manifest
from tests.chaos.kills import Harness, play_cases

SEED = 4
NUM_KILLS = 8

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the harness names open folders by /proc")


@pytest.fixture(scope="module")
def harness(tmp_path_factory) -> Harness:
    return Harness(tmp_path_factory.mktemp("chaos"))


def test_the_run_has_what_a_resume_must_restore(harness):
    """Prompts beyond those of a step, and a plateau between the checkpoints."""
    steps = harness.reference.frames["steps"]
    assert steps["is_shaped"].to_list() == [True] * 5 + [False] + [True] * 3
    assert steps["groups_dropped"].sum() > 0


def test_a_killed_run_opens_and_ends_like_one_that_was_left_alone(harness):
    cases = play_cases(harness, SEED, NUM_KILLS)
    assert [failure for case in cases for failure in case.failures()] == []
    moments = [kill.moment for case in cases for kill in case.kills]
    assert {moment.by_event for moment in moments} == {True, False}
    assert any(case.kills[1:] for case in cases), "no resumed run was killed"


def test_what_is_lost_or_left_over_would_be_noticed(harness, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(harness.reference.run_dir, run_dir)
    assert list(harness.reference.final_defects(run_dir)) == []

    weights = max(run_dir.glob("checkpoints/*/policy/model.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    leftover = run_dir / "tokens" / ".part-000009-000009.parquet.tmp"
    leftover.touch()
    found = list(harness.reference.final_defects(run_dir))
    assert found[0].startswith(f"damaged: run run: checkpoints: {weights}: damaged, it differs from checksums.json")
    assert found[1:] == [
        f"files only in one of both: tokens/{leftover.name}",
        f"{weights.relative_to(run_dir / 'checkpoints')}: differs",
    ]

    manifest = json.loads((run_dir / "run.json").read_text())
    write_manifest(run_dir, {**manifest, "last_durable_step": 8})
    assert any("last durable step 8" in defect for defect in harness.reference.defects(run_dir))

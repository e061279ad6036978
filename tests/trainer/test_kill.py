"""Test that no fault loses durable data or makes an answer wrong.

`make chaos` tries each kind of fault more often.
"""

import json
import shutil
import sys

import pytest

from entrace.analysis.trace import write_manifest
from tests.chaos import chaos
from tests.chaos.kills import Harness, play_cases
from tests.chaos.scene import Scene
from tests.chaos.trial import Fault, Outcome, Trial, require
from tests.slow import slow_after

SEED = 4
NUM_KILLS = 6
# Indices of trials: of signals, events, formats, and commands, each index is another one.
TRIALS = {
    "flipped bit": (0, 1, 2, 3),
    "zeroed block": (0, 1),
    "interrupted report": (2,),
    "interrupted import": (1,),
    "interrupted prune": (1, 2),
    "closed pipe": (1,),
    "exhausted memory": (2,),
    "full disk": (1,),
    "second writer": (0,),
    "clock jump": (0,),
}

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the harness names open folders by /proc")


@pytest.fixture(scope="module")
def harness(tmp_path_factory) -> Harness:
    return Harness(tmp_path_factory.mktemp("chaos"))


def test_the_run_has_what_a_resume_must_restore(harness):
    """A resume must restore extra prompts, and a plateau between the checkpoints."""
    steps = harness.reference.frames["steps"]
    assert steps["is_shaped"].to_list() == [True] * 5 + [False] + [True] * 3
    assert steps["groups_dropped"].sum() > 0


@pytest.mark.slow
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


@pytest.fixture(scope="module")
def scene(harness, tmp_path_factory) -> Scene:
    scene = Scene(tmp_path_factory.mktemp("scene"), SEED)
    scene.harness = harness
    scene.flip_trace = scene.trace
    return scene


@pytest.mark.parametrize("kind", slow_after(4, TRIALS))
def test_nothing_is_lost_and_no_answer_is_silently_wrong(scene, kind):
    fault = chaos.FAULTS[kind](scene)
    trials = [fault.play(index) for index in TRIALS[kind]]
    assert [trial.message for trial in trials if trial.outcome in (Outcome.SILENT, Outcome.LOST)] == []
    assert list(scene.folder.glob("*/[0-9]*")) == [], "a trial removes its folder"


def test_every_kind_is_tried():
    assert {*TRIALS, "killed training"} == set(chaos.FAULTS)


class Careless(Fault):
    """Lose data in every second trial, and fail otherwise in every third."""

    name = "careless"
    number = 6

    def attempt(self, index, rng) -> Trial:
        require(index % 2, f"lost {index}")
        if index % 3 == 0:
            raise ValueError("a reader that cannot cope")
        return self.refused(index, "entrace: no")


def test_failures_are_counted_and_a_stopped_command_continues(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(chaos, "FAULTS", {"careless": Careless, "killed training": chaos.FAULTS["killed training"]})
    played = []

    def play(trials, seed, jobs, done):
        faults = chaos.make_faults(tmp_path, seed, ["careless"])
        for kind, index in trials:
            if (kind, index) not in done:
                if len(played) == 4:
                    played.append("stopped")
                    raise KeyboardInterrupt
                played.append(index)
                yield faults[kind].play(index)

    monkeypatch.setattr(chaos, "play_all", play)
    state, out = tmp_path / "state.jsonl", tmp_path / "chaos.json"
    arguments = ["chaos", "--kinds", "careless", "--state", str(state), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(KeyboardInterrupt):
        chaos.main()
    with state.open("a") as file:
        file.write('{"kind": "careless", "ind')
    with pytest.raises(SystemExit, match="1"):
        chaos.main()
    assert played == [0, 1, 2, 3, "stopped", 4, 5]
    result = json.loads(out.read_text())
    assert result["kinds"]["careless"] == {"tried": 6, "survived": 0, "refused": 2, "silent": 0, "lost": 4}
    assert [failure["index"] for failure in result["failures"]] == [0, 2, 3, 4]
    assert "careless:3: lost: ValueError: a reader that cannot cope" in capsys.readouterr().out

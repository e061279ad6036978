"""``entrace ablate`` as typed: bad input, dry runs, Ctrl-C, and resuming."""

import json
import os
import signal
import subprocess
import sys
import time

import pyarrow.parquet as pq
import pytest

from entrace.analysis.trace import read_manifest
from tests.patience import HANG_S, without_progress

from .conftest import SHORT, SMALL

GRID = """
config = "tiny"
baseline = "none"
seeds = [0, 1]
[arms]
none = {}
ppl = {}
"""
SWEEP = '[sweep]\n"optim.lr" = [1e-4, 3e-4]\n'


def write(folder, text):
    path = folder / "grid.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "options", "expected"),
    [
        (GRID.replace("ppl", "ppk"), [], ['arm "ppk"', 'did you mean "ppl"?']),
        (GRID + SWEEP.replace("lr", "lrr"), [], ['unknown key "optim.lrr"', 'did you mean "optim.lr"?']),
        (GRID.replace("[0, 1]", "[1, 1]"), [], ["repeat a seed"]),
        (GRID, ["--seeds", "2,2"], ["repeat a seed"]),
        (GRID, ["--seeds", "two"], ['--seeds "two"']),
        (GRID.replace("[0, 1]", "[]"), [], ["the grid is empty"]),
        (GRID.replace("none = {}\nppl = {}", ""), [], ["the grid is empty"]),
        (GRID.replace("ppl", "none"), [], ["repeats a name", "none = {}"]),
        (GRID, ["seed=1"], ["seed=1", "--seeds"]),
        (GRID, ["--launcher", "slurm"], ["--launcher", "slurm"]),
        (GRID, ["--address", "auto"], ["--address needs --launcher ray"]),
        (GRID, ["--launcher", "ray", "--jobs", "2"], ["--jobs needs --launcher local"]),
        (GRID, ["--launcher", "ray", "--threads", "2"], ["--threads needs --launcher local"]),
        (GRID, ["--launcher", "ray", "--address", "here"], ['--address "here"', "host:port or auto"]),
        (GRID, ["--launcher", "ray", "--address", "127.0.0.1:1"], ["127.0.0.1:1", "no Ray cluster answers"]),
    ],
    ids=lambda value: None if isinstance(value, str) else "_".join(value).replace("[", "").replace("]", ""),
)
@pytest.mark.parametrize("dry", [[], ["--dry-run"]], ids=["run", "dry-run"])
def test_bad_input_is_one_line_and_starts_nothing(call, tmp_path, text, options, expected, dry):
    if any("Ray cluster" in part for part in expected):
        pytest.importorskip("ray")
    grid = write(tmp_path, text)
    code, out, err = call("ablate", grid, "--out", tmp_path / "study", *options, *dry)
    assert (code, out) == (2, "")
    assert err.startswith("entrace: ")
    assert err.count("\n") == 1
    for part in expected:
        assert part in err
    assert [path.name for path in tmp_path.iterdir()] == ["grid.toml"]


def test_a_pilot_is_for_dry_runs_and_must_be_there(call, tmp_path):
    arguments = ["ablate", write(tmp_path, GRID), "--out", tmp_path / "study", "--pilot", tmp_path / "nowhere"]
    assert call(*arguments) == (2, "", "entrace: --pilot needs --dry-run\n")
    assert call(*arguments, "--dry-run") == (2, "", f"entrace: {tmp_path / 'nowhere'}: no such folder\n")


def test_without_ray_the_extra_is_named(call, tmp_path, monkeypatch):
    monkeypatch.setattr("entrace.trainer.ablation.launch.ray.find_spec", lambda name: None)
    code, _, err = call("ablate", write(tmp_path, GRID), "--out", tmp_path / "study", "--launcher", "ray")
    assert (code, err) == (2, "entrace: --launcher ray needs the ray extra: pip install 'entrace[ray]'\n")
    assert not (tmp_path / "study").exists()


def test_a_dry_run_prints_runs_time_and_detectable_difference(call, tmp_path):
    grid = write(tmp_path, GRID + SWEEP)
    code, out, err = call("ablate", grid, "steps=90", "--out", tmp_path / "study", "--dry-run", "--jobs", "3")
    assert (code, err) == (0, "")
    assert not (tmp_path / "study").exists()
    lines = out.splitlines()
    assert lines[0].split() == [
        "none-optim.lr=0.0001-seed0",
        "none",
        "[optim.lr=0.0001]",
        *("seed", "0", "90", "steps", "new"),
    ]
    assert "runs: 8, 720 steps, 720 remaining" in lines
    # Eight runs of 90 steps, three at a time, take as long as three.
    assert json.loads(
        call("ablate", grid, "steps=90", "--out", tmp_path / "study", "--dry-run", "--jobs", "3", "--json")[1]
    )["seconds_left"] == pytest.approx(3 * 90 * planned_seconds())
    assert any(line.startswith("time: about ") and "3 in parallel" in line for line in lines)
    assert any("detectable difference" in line and "with 2" in line and "with 10" in line for line in lines)
    assert any("embedded policy" in line for line in lines)


def test_a_dry_run_checks_what_the_runs_need(call, tmp_path):
    grid = write(tmp_path, GRID)
    arguments = ("ablate", grid, "--out", tmp_path / "study", "--dry-run")
    missing = f"{tmp_path}/nowhere.jsonl"
    # One line, however many runs need the file.
    code, out, err = call(*arguments, f"task.name={missing}", "task.params={}")
    assert (code, err) == (2, f"entrace: {missing}: no such file or directory\n")
    assert "detectable difference" in out
    code, out, err = call(*arguments, "--json", "task.correct_at=2")
    found = json.loads(out)
    assert (code, found["problems"]) == (0, [])
    assert "5 of 5 correct answers of chain_sum are judged incorrect" in found["warnings"][0]


def planned_seconds():
    import tomllib

    from entrace.trainer.resources import resolve_config

    return tomllib.loads(resolve_config("pilot").read_text())["seconds_per_step"]


@pytest.fixture
def small_study(call, tmp_path):
    grid = write(tmp_path, GRID)
    code, out, err = call("ablate", grid, *SHORT, "steps=2", "--out", tmp_path / "study", "--jobs", "2", "--json")
    assert code == 0
    assert "study: 8/8" in err
    return grid, tmp_path / "study", json.loads(out)


def test_a_grid_is_run_measured_and_planned_with(call, small_study):
    grid, out, printed = small_study
    assert [(run["run_id"], run["status"], run["step"]) for run in printed["runs"]] == [
        (run_id, "complete", 2) for run_id in ("none-seed0", "ppl-seed0", "none-seed1", "ppl-seed1")
    ]
    code, text, _ = call(
        *("ablate", grid, *SHORT, "steps=2", "--seeds", "0,1,2", "--out", out, "--dry-run", "--pilot", out, "--json")
    )
    assert code == 0
    plan = json.loads(text)
    assert [run["steps_left"] for run in plan["runs"]] == [0, 0, 0, 0, 2, 2]
    assert [run["status"] for run in plan["runs"]] == ["complete"] * 4 + ["new"] * 2
    assert (plan["num_seeds"], plan["num_tests"]) == (3, 1)

    # The same by hand, from the Parquet files.
    seconds, accuracy = [], {}
    for run in printed["runs"]:
        steps = pq.read_table(out / run["run_id"] / "steps").to_pylist()
        evals = pq.read_table(out / run["run_id"] / "evals").to_pylist()
        sampled = sum(row["rollout_s"] + row["reward_s"] for row in steps) / sum(row["tokens"] for row in steps)
        total = sum(row["rollout_s"] + row["reward_s"] + row["update_s"] + row["record_s"] for row in steps)
        seconds.append((total + sampled * sum(row["response_length"] for row in evals)) / 2)
        last = [row["is_correct"] for row in evals if row["step"] == 2]
        accuracy[run["arm"], run["seed"]] = sum(last) / len(last)
    differences = [accuracy["ppl", seed] - accuracy["none", seed] for seed in (0, 1)]
    assert plan["pilot"]["seconds_per_step"] == pytest.approx(sum(sorted(seconds)[1:3]) / 2, rel=1e-5)
    assert plan["pilot"]["sd_difference"] == pytest.approx(abs(differences[0] - differences[1]) / 2**0.5, abs=1e-9)
    assert plan["seconds_left"] == pytest.approx(4 * plan["pilot"]["seconds_per_step"])

    code, _, err = call("ablate", grid, *SHORT, "steps=2", "--seeds", "0", "--out", out, "--dry-run")
    assert code == 2
    assert "made from another grid: it holds none-seed1" in err


def test_failed_runs_are_named_at_the_end(call, tmp_path):
    grid = write(tmp_path, GRID + 'broken = { optim.lr = 1e30, rollout.when_short = "error" }\n')
    arguments = [
        "ablate",
        grid,
        *SMALL,
        "steps=2",
        "optim.warmup_steps=0",
        "--seeds",
        "0",
        "--jobs",
        "3",
        "--out",
        tmp_path / "study",
    ]
    code, out, err = call(*arguments)
    assert (code, out.strip()) == (1, str(tmp_path / "study"))
    lines = err.splitlines()
    assert lines[-2].startswith("entrace: broken-seed0 failed: ")
    assert "step 2" in lines[-2]
    assert lines[-1] == "entrace: 1 of 3 runs failed; retry them with --retry-failed"
    code, _, err = call(*arguments, "--resume")
    assert (code, without_progress(err)) == (1, lines[-2:])


def interrupt(folder, arguments):
    """Start ``entrace ablate``, and interrupt it once two runs are at work.

    Its process group receives SIGINT, as from a terminal.
    """
    command = [sys.executable, "-m", "entrace", *map(str, arguments)]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A process that was started in the background may have been told to ignore it, and hands that on.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + HANG_S
    while len(list(folder.glob("*/checkpoints/step-*"))) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=HANG_S)
    return process.returncode, out, err


def test_ctrl_c_stops_cleanly_and_resume_equals_an_uninterrupted_grid(call, tmp_path):
    grid = write(tmp_path, GRID)
    out = tmp_path / "study"
    arguments = ["ablate", grid, *SHORT, "steps=6", "record.checkpoint_every=1", "--jobs", "2", "--seeds", "0"]
    code, printed, err = interrupt(out, [*arguments, "--out", out])
    assert (code, printed) == (130, "")
    assert err.splitlines()[-1] == f"entrace: stopped; the same command with --resume continues in {out}"
    assert "Traceback" not in err
    states = {path.parent.name: read_manifest(path.parent) for path in out.glob("*/run.json")}
    assert {state["status"] for state in states.values()} == {"running"}
    assert all(0 < state["last_durable_step"] < 6 for state in states.values())

    code, _, err = call(*arguments, "--out", out)
    assert (code, err.count("\n")) == (2, 1)
    assert call(*arguments, "--out", out, "--resume")[0] == 0
    assert call(*arguments, "--out", tmp_path / "whole")[0] == 0
    for run_id in ("none-seed0", "ppl-seed0"):
        assert read_manifest(out / run_id)["status"] == "complete"
        for table in ("tokens", "rollouts", "evals", "prompts"):
            found, wanted = (pq.read_table(folder / run_id / table) for folder in (out, tmp_path / "whole"))
            assert found.equals(wanted), (run_id, table)
        found, wanted = (pq.read_table(folder / run_id / "steps") for folder in (out, tmp_path / "whole"))
        seconds = ["rollout_s", "reward_s", "update_s", "record_s"]
        assert found.drop_columns(seconds).equals(wanted.drop_columns(seconds))

import json
import os
import shutil
import subprocess
import sys
import time
import types
from dataclasses import replace

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest

from entrace.analysis.trace import InputError, read_manifest, write_manifest
from entrace.analysis.trace.manifest import count_cores
from entrace.trainer.ablation.grid import load_grid
from entrace.trainer.ablation.launch.job import Job, describe_exit, execute, settle
from entrace.trainer.ablation.launch.local import LocalLauncher
from entrace.trainer.ablation.runner import run_grid
from entrace.trainer.config import load_config
from entrace.trainer.train import train
from tests.patience import HANG_S

from .conftest import SHORT, SMALL

GRID = """
config = "tiny"
baseline = "none"
seeds = [0]

[arms]
none = {}
late = { shaping.method = "position", shaping.position.start_step = 2 }
"""
DIVERGING = '\n[arms.diverging]\noptim.lr = 1e30\nrollout.when_short = "error"\n'


class Seen:
    """Keep the events of a listener."""

    def __init__(self):
        self.updates, self.ended = [], {}

    def update(self, run_id, done, **metrics):
        self.updates.append((run_id, done))

    def end(self, run_id, error):
        self.ended[run_id] = error


@pytest.fixture
def grid(tmp_path):
    path = tmp_path / "grid.toml"
    path.write_text(GRID)
    return path


def one_thread_each():
    """Sums are rounded as in this process, which also has one thread."""
    return LocalLauncher(count_cores(), threads=1)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Return a study that holds the complete run of arm none.

    Tests copy it before they change it.
    """
    folder = tmp_path_factory.mktemp("finished")
    (folder / "grid.toml").write_text(GRID)
    specs = load_grid(str(folder / "grid.toml"), SHORT)[:1]
    assert run_grid(specs, folder / "study", one_thread_each(), train) == {}
    return folder / "study"


def steps_of(run_dir):
    return pq.read_table(run_dir / "steps").sort_by("step")


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_threads_of_a_run():
    embedded, smollm = load_config("tiny"), load_config("tiny", ["policy.path=smollm2-135m"])
    assert [LocalLauncher(jobs).threads_of(embedded) for jobs in (1, 2)] == [1, 1]
    assert LocalLauncher(1).threads_of(smollm) == count_cores()
    assert LocalLauncher(2 * count_cores()).threads_of(smollm) == 1
    assert LocalLauncher(1, threads=3).threads_of(embedded) == LocalLauncher(8, threads=3).threads_of(smollm) == 3


def test_the_number_of_concurrent_runs_does_not_change_a_run(grid, tmp_path):
    specs = load_grid(str(grid), [*SHORT, "steps=2"])[:2]
    for jobs in (1, 2):
        assert run_grid(specs, tmp_path / str(jobs), LocalLauncher(jobs), train) == {}
    for spec in specs:
        alone, beside = (tmp_path / jobs / spec.run_id for jobs in "12")
        assert read_manifest(alone)["num_threads"] == read_manifest(beside)["num_threads"] == 1
        for table in ("tokens", "rollouts", "evals"):
            assert pq.read_table(alone / table).equals(pq.read_table(beside / table))
        [first, second] = (sorted(run.glob("checkpoints/*/policy/model.safetensors"))[-1] for run in (alone, beside))
        assert first.read_bytes() == second.read_bytes()


def test_failed_runs_stay_until_they_are_retried(grid, tmp_path):
    """One arm diverges by construction, and later calls leave all runs alone.

    The other arms are trained and kept.
    """
    grid.write_text(GRID + DIVERGING)
    specs = load_grid(str(grid), [*SMALL, "optim.warmup_steps=0"])
    out, seen = tmp_path / "study", Seen()
    failed = run_grid(specs, out, one_thread_each(), train, listener=seen)
    assert list(failed) == ["diverging-seed0"]
    assert "step 2" in failed["diverging-seed0"]
    assert [done for run_id, done in seen.updates if run_id == "late-seed0"] == [0, 1, 2, 3, 4]
    assert seen.ended == {"none-seed0": None, "late-seed0": None, **failed}
    manifests = {spec.arm: read_manifest(out / spec.run_id) for spec in specs}
    statuses = {"none": "complete", "late": "complete", "diverging": "failed"}
    assert {arm: m["status"] for arm, m in manifests.items()} == statuses
    assert {m["num_threads"] for m in manifests.values()} == {manifests["none"]["num_threads"]}
    assert {(m["study"], m["baseline"], str(m["axes"])) for m in manifests.values()} == {("study", "none", "{}")}
    assert len({json.dumps(m["common_random_numbers"]) for m in manifests.values()}) == 1

    with pytest.raises(InputError, match="--resume"):
        run_grid(specs, out, one_thread_each(), train)
    before, seen = contents(out), Seen()
    assert run_grid(specs, out, one_thread_each(), train, resume=True, listener=seen) == failed
    assert contents(out) == before
    assert (seen.updates, seen.ended) == ([], {"none-seed0": None, "late-seed0": None, **failed})

    seen = Seen()
    assert list(run_grid(specs, out, one_thread_each(), train, retry_failed=True, listener=seen)) == ["diverging-seed0"]
    assert {run_id for run_id, _ in seen.updates} == {"diverging-seed0"}
    assert {spec.arm: read_manifest(out / spec.run_id)["status"] for spec in specs} == statuses
    changed = {path for path, data in contents(out).items() if before.get(path) != data}
    assert {path.relative_to(out).parts[0] for path in changed} == {"diverging-seed0"}


def test_a_failed_run_is_completed_by_a_retry(grid, finished, tmp_path):
    """The cause of the failure is gone; the run resumes from its checkpoint.

    The result equals a run that never failed.
    """
    spec = load_grid(str(grid), SHORT)[0]
    out = tmp_path / "study"

    def fail(done, **metrics):
        if done == 3:
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        train(spec.config, out / spec.run_id, spec.labels(out), on_step=fail)
    assert run_grid([spec], out, one_thread_each(), train, resume=True) == {spec.run_id: "OSError: disk full"}
    seen = Seen()
    assert run_grid([spec], out, one_thread_each(), train, retry_failed=True, listener=seen) == {}
    assert [done for _, done in seen.updates] == [0, 3, 4]
    assert "error" not in read_manifest(out / spec.run_id)
    whole, found = (steps_of(folder / spec.run_id) for folder in (finished, out))
    # The first steps are from this process, whose memory other tests have used: sums may be rounded otherwise.
    for column in ("step", "loss", "entropy_token_mean", "grad_norm"):
        np.testing.assert_allclose(found[column], whole[column], rtol=1e-4, atol=1e-6)


def test_a_run_that_cannot_begin_is_recorded_as_failed(grid, tmp_path):
    specs = load_grid(str(grid), [*SHORT, "policy.path=/nowhere"])[:1]
    failed = run_grid(specs, tmp_path / "study", one_thread_each(), train)
    assert "no model folder at /nowhere" in failed["none-seed0"]
    manifest = json.loads((tmp_path / "study" / "none-seed0" / "run.json").read_text())
    assert (manifest["status"], manifest["arm"], manifest["last_durable_step"]) == ("failed", "none", 0)
    assert manifest["common_random_numbers"]["base_policy"] is None


class KillsItsRun(Seen):
    """Kill the process of a run, as a machine out of memory does."""

    def update(self, run_id, done, **metrics):
        super().update(run_id, done, **metrics)
        if (run_id, done) == ("none-seed0", 3):
            # Runs are children of the server that forks them; verifiers have children, too.
            servers = [child for child in psutil.Process().children() if "forkserver" in " ".join(child.cmdline())]
            (run,) = (run for server in servers for run in server.children())
            run.kill()


def test_a_run_whose_process_dies_without_a_word_has_failed(grid, tmp_path):
    specs = load_grid(str(grid), [*SHORT, "steps=20"])[:1]
    out, seen = tmp_path / "study", KillsItsRun()
    failed = run_grid(specs, out, one_thread_each(), train, listener=seen)
    reason = "the process was killed by signal 9 (SIGKILL), often for lack of memory"
    assert failed == seen.ended == {"none-seed0": reason}
    assert read_manifest(out / "none-seed0")["status"] == "failed"
    assert 1 <= read_manifest(out / "none-seed0")["last_durable_step"] < 20


def print_and_exit(config, run_dir, labels, **_):
    """Stand for a library that ends the process."""
    for number in range(9):
        print("line", number)
    os.write(2, b"terminate called\nbad_alloc")
    os._exit(3)


def test_a_run_that_ends_without_an_error_says_how_and_what_it_printed_last(grid, tmp_path, capsys):
    specs = load_grid(str(grid), SHORT)[:1]
    failed = run_grid(specs, tmp_path / "study", one_thread_each(), print_and_exit)
    last = "line 8 | terminate called | bad_alloc"
    assert failed == {"none-seed0": f"the process ended with exit code 3; its last output: {last}"}
    printed = [f"none-seed0: line {number}" for number in range(9)]
    assert capsys.readouterr().err.splitlines() == [*printed, "none-seed0: terminate called", "none-seed0: bad_alloc"]


def test_a_module_that_the_worker_cannot_import_is_named(grid, tmp_path):
    module = types.ModuleType("only_in_this_process")
    exec("def train(*arguments, **options): pass", vars(module))
    sys.modules[module.__name__] = module
    try:
        specs = load_grid(str(grid), SHORT)[:1]
        failed = run_grid(specs, tmp_path / "study", one_thread_each(), module.train)
    finally:
        del sys.modules[module.__name__]
    assert failed == {"none-seed0": "ModuleNotFoundError: No module named 'only_in_this_process'"}


BROKEN_IN_WORKERS = """
import sys
from pathlib import Path
if "forkserver" in " ".join(sys.orig_argv):
    raise ImportError("libcudart.so.12: cannot open shared object")
path = sys.path[:]
sys.path.remove(str(Path(__file__).parents[1]))
del sys.modules["torch"]
import torch
sys.path[:] = path
"""


def test_an_import_that_fails_in_the_worker_is_reported(grid, tmp_path):
    (tmp_path / "path" / "torch").mkdir(parents=True)
    (tmp_path / "path" / "torch" / "__init__.py").write_text(BROKEN_IN_WORKERS)
    path = os.pathsep.join([str(tmp_path / "path"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "entrace", "ablate", str(grid), *SHORT, "--out", str(tmp_path / "study")]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    error = "ImportError: libcudart.so.12: cannot open shared object"
    assert read_manifest(tmp_path / "study" / "none-seed0")["error"] == error
    assert f"entrace: none-seed0 failed: {error}\n" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_error_before_training_is_reported_as_itself(grid, tmp_path, monkeypatch):
    """If the failure cannot be recorded either, the process ends with it."""
    spec = load_grid(str(grid), SHORT)[0]
    monkeypatch.setattr("torch.set_num_threads", lambda threads: (_ for _ in ()).throw(RuntimeError("no threads")))
    job = Job(spec.config, tmp_path / "study" / spec.run_id, spec.labels(tmp_path / "study"), train)
    execute(job, 1, lambda done, **metrics: None)
    assert settle(job, "unknown") == "RuntimeError: no threads"
    (tmp_path / "file").touch()
    with pytest.raises(RuntimeError, match="no threads"):
        execute(replace(job, run_dir=tmp_path / "file" / "run"), 1, lambda done, **metrics: None)


@pytest.mark.parametrize(
    ("code", "text"),
    [
        (-9, "the process was killed by signal 9 (SIGKILL), often for lack of memory"),
        (-11, "the process was killed by signal 11 (SIGSEGV)"),
        (-64, "the process was killed by signal 64 (SIGRTMAX)"),
        (1, "the process ended with exit code 1"),
        (143, "the process ended with exit code 143 (SIGTERM)"),
        (255, "the process ended with exit code 255"),
    ],
)
def test_an_exit_code_is_described(code, text):
    assert describe_exit(code) == text


def test_a_grid_may_grow_but_not_change(grid, finished, tmp_path):
    out = shutil.copytree(finished, tmp_path / "study")
    before = contents(out)

    def refused(path, overrides=(), seeds=None):
        with pytest.raises(InputError) as error:
            run_grid(load_grid(str(path), [*SHORT, *overrides], seeds), out, one_thread_each(), train, resume=True)
        assert contents(out) == before
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "made from another grid: of none-seed0, steps is 4 there, 3 here" in refused(grid, ["steps=3"])
    assert 'it holds none-seed0 (arm "none", seed 0), this grid does not' in refused(grid, seeds=[1])
    grid.write_text(GRID.replace('baseline = "none"', 'baseline = "late"'))
    assert 'of none-seed0, baseline is "none" there, "late" here' in refused(grid)
    grid.write_text(GRID + "[sweep]\noptim.lr = [1e-4]\n")
    assert "it holds none-seed0" in refused(grid)

    grid.write_text(GRID)
    seen = Seen()
    assert run_grid(load_grid(str(grid), SHORT), out, one_thread_each(), train, resume=True, listener=seen) == {}
    assert {run_id for run_id, _ in seen.updates} == {"late-seed0"}
    assert {path: data for path, data in contents(out).items() if path in before} == before


def test_a_finished_grid_is_extended(grid, finished, tmp_path):
    out = shutil.copytree(finished, tmp_path / "study")
    seen = Seen()
    longer = load_grid(str(grid), [*SHORT, "steps=6"])[:1]
    assert run_grid(longer, out, one_thread_each(), train, resume=True, listener=seen) == {}
    assert [done for _, done in seen.updates if done] == [5, 6]
    manifest = read_manifest(out / "none-seed0")
    assert (manifest["status"], manifest["last_durable_step"], manifest["total_steps"]) == ("complete", 6, 6)
    # Refused by its settings, however few steps it has.
    falling = [*SHORT, "optim.schedule=linear", "steps=2"]
    assert run_grid(load_grid(str(grid), falling)[:1], tmp_path / "falling", one_thread_each(), train) == {}
    with pytest.raises(InputError, match=r"cannot be extended from 2 to 6 steps, .* needs optim\.schedule_steps"):
        run_grid(
            load_grid(str(grid), [*falling, "steps=6"])[:1], tmp_path / "falling", one_thread_each(), train, resume=True
        )


def test_a_config_key_that_is_newer_than_a_run_counts_as_its_default(grid, finished, tmp_path):
    out = shutil.copytree(finished, tmp_path / "study")
    spec = load_grid(str(grid), SHORT)[0]
    manifest = read_manifest(out / spec.run_id)
    del manifest["config"]["loss"]["normalize_std"]
    write_manifest(out / spec.run_id, manifest)
    assert run_grid([spec], out, one_thread_each(), train, resume=True) == {}
    del manifest["config"]["steps"]
    write_manifest(out / spec.run_id, manifest)
    with pytest.raises(InputError, match="steps is 120 there, 4 here"):
        run_grid([spec], out, one_thread_each(), train, resume=True)


@pytest.mark.slow
def test_runs_end_with_whoever_started_them(grid, tmp_path):
    """SIGKILL ends the grid at once; its runs notice, and keep what they have."""
    out = tmp_path / "study"
    script = (
        "from pathlib import Path\nfrom entrace.trainer.ablation.grid import load_grid\n"
        "from entrace.trainer.ablation.runner import run_grid\n"
        "from entrace.trainer.ablation.launch.local import LocalLauncher\nfrom entrace.trainer.train import train\n"
        "if __name__ == '__main__':\n"
        f"    specs = load_grid({str(grid)!r}, {[*SHORT, 'steps=100000', 'rollout.prompts_per_step=2']!r}, [0])\n"
        f"    run_grid(specs, Path({str(out)!r}), LocalLauncher(2), train)\n"
    )
    (tmp_path / "main.py").write_text(script)
    parent = psutil.Popen([sys.executable, str(tmp_path / "main.py")])
    deadline = time.monotonic() + HANG_S
    while not list(out.glob("*/tokens/*.parquet")) and time.monotonic() < deadline:
        time.sleep(0.5)
    children = parent.children(recursive=True)
    parent.kill()
    parent.wait()
    _, alive = psutil.wait_procs(children, timeout=HANG_S)
    assert len(children) >= 2
    assert not alive
    manifest = read_manifest(next(out.glob("none-seed0")))
    assert manifest["status"] == "running"
    assert manifest["last_durable_step"] > 0

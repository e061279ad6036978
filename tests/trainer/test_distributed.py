"""Test several processes on one machine, over gloo.

Results equal those of one process, and all processes end together. ``accelerate launch`` starts some of them, as a user
would; the others are forked, which saves their imports.
"""

import errno
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.torch import load_file

from entrace import open_runs
from entrace.analysis.trace import read_manifest
from entrace.trainer import cli, resources
from entrace.trainer import train as train_module
from entrace.trainer.config import load_config
from entrace.trainer.parallel.ranks import ALONE, Ranks, _Failure
from entrace.trainer.train import train
from tests.patience import HANG_S, without_progress
from tests.slow import slow

from .conftest import SHORT

LABELS = {"study": "test", "arm": "none"}
TABLES = ("tokens", "rollouts", "prompts", "vocab", "evals", "steps")
KEYS = ["step", "rollout_id", "position", "prompt_id", "sample_index", "token_id"]
CONFIG = [*SHORT, "steps=3", "record.checkpoint_every=1"]
SHARDED = (pytest.mark.slow, pytest.mark.sharded)
# After two or three steps, results differ by the summation order only.
ROUNDING = {"rtol": 1e-4, "atol": 1e-5}

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are looked up in /proc")


def read(run_dir, table):
    frame = pl.read_parquet(run_dir / table / "*.parquet").drop("run_id")
    return frame.drop([name for name in frame.columns if name.endswith("_s")]).sort(
        [name for name in KEYS if name in frame.columns]
    )


def assert_same_run(found_dir, wanted_dir):
    for table in TABLES:
        found, wanted = read(found_dir, table), read(wanted_dir, table)
        assert found.shape == wanted.shape, table
        for name in wanted.columns:
            if not wanted[name].dtype.is_float():
                assert found[name].equals(wanted[name], null_equal=True), (table, name)
            # Divided by the group's spread, which may be that of two almost equal responses.
            elif name != "ppl_z":
                np.testing.assert_allclose(found[name], wanted[name], **ROUNDING, err_msg=f"{table}.{name}")
    losses = [read(run_dir, "steps")["loss"] for run_dir in (found_dir, wanted_dir)]
    np.testing.assert_allclose(*losses, rtol=0, atol=1e-5)
    weights = [
        load_file(max(run_dir.glob("checkpoints/*/policy/model.safetensors"))) for run_dir in (found_dir, wanted_dir)
    ]
    for name, wanted in weights[1].items():
        # AdamW turns the rounding error of an almost zero gradient into a whole step.
        assert ((weights[0][name] - wanted).abs() < 1e-5).float().mean() > 0.99, name


def fork(context, num_processes, arguments, tmp_path, before=None):
    """Run the command in forked processes with the environment of a launcher.

    Returns the processes and their logs.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    logs = [tmp_path / f"rank-{rank}.log" for rank in range(num_processes)]
    processes = []
    for rank, log in enumerate(logs):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_processes, "MASTER_PORT": port}
        environment = {name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"}
        # Without OMP_NUM_THREADS, accelerate would set one thread per core.
        environment |= {"LOCAL_WORLD_SIZE": str(num_processes), "OMP_NUM_THREADS": "1"}
        process = context.Process(target=run_forked, args=(environment, list(map(str, arguments)), log, before))
        process.start()
        processes.append(process)
    return processes, logs


def run_forked(environment, arguments, log, before):
    os.environ.update(environment)
    torch.set_num_threads(1)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT)
    for number in (1, 2):
        os.dup2(descriptor, number)
    if before:
        before(int(environment["RANK"]))
    sys.argv = ["entrace", *arguments]
    cli.main()


def end(processes):
    """Wait for all processes and return their exit codes."""
    deadline = time.monotonic() + HANG_S
    for process in processes:
        process.join(max(0, deadline - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return codes


def said(logs):
    """Return the lines of all processes, without progress."""
    return [line for log in logs for line in without_progress(log.read_text())]


@pytest.fixture(scope="module")
def context():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["entrace.trainer.train", "accelerate", "pandas", "reasoning_gym"])
    return context


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "alone"
    train(load_config("tiny", CONFIG), run_dir, LABELS)
    return run_dir


def launch(arguments, log, sharing="ddp"):
    """Start two processes beside a stranger's ``trainer.py``, in the log's folder."""
    (log.parent / "trainer.py").write_text("raise SystemExit('the user\\'s own trainer was imported')\n")
    config = resources.CONFIGS / "accelerate" / f"{sharing}.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config, "--num_processes", 2]
    command += ["-m", "entrace", *arguments]
    with open(log, "w") as file:
        return subprocess.Popen(
            list(map(str, command)),
            stdout=file,
            stderr=file,
            cwd=log.parent,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )


@pytest.mark.parametrize("sharing", ["ddp", pytest.param("fsdp", marks=SHARDED)])
def test_two_processes_reproduce_the_run_of_one(alone, tmp_path, sharing):
    out, log = tmp_path / "two", tmp_path / "log.txt"
    assert launch(["train", "tiny", *CONFIG, "--out", out], log, sharing).wait(HANG_S) == 0
    assert said([log]) == [str(out)]
    # One process tells the progress. How many steps it names depends on how long they take.
    steps = [line.partition(" reward")[0] for line in log.read_text().splitlines() if " reward " in line]
    assert steps[-1] == "two: 3/3"
    assert len(set(steps)) == len(steps)
    assert_same_run(out, alone)
    for table in ("tokens", "rollouts"):
        parts = [pl.read_parquet(path) for path in sorted((out / table).glob("*-000002.*parquet"))]
        assert len(parts) == 2
        assert not set(parts[0]["rollout_id"]) & set(parts[1]["rollout_id"])
    assert read_manifest(out)["num_processes"] == 2
    runs = open_runs(out)
    assert runs.notes == {}
    assert runs.sql("select count(*) from tokens").item() == len(read(alone, "tokens"))


@pytest.mark.slow
@pytest.mark.parametrize("sharing", ["ddp", pytest.param("fsdp", marks=SHARDED)])
def test_a_killed_process_ends_all_with_one_line_and_the_run_can_resume(alone, tmp_path, sharing):
    out, log = tmp_path / "killed", tmp_path / "log.txt"
    launcher = launch(["train", "tiny", *CONFIG, "--out", out], log, sharing)
    wait_for(out / "checkpoints" / "step-000001")
    os.kill(next(pid for pid in children(launcher.pid) if environment(pid)["RANK"] == "1"), signal.SIGKILL)
    assert launcher.wait(HANG_S) == 1
    lines = [line for line in log.read_text().splitlines() if line.startswith("entrace:")]
    last = read_manifest(out)["last_durable_step"]
    recorded = f"recorded up to step {last}: resume with --resume"
    assert lines == [f"entrace: TrainingError: {out}: another process of the run has ended; {recorded}"]
    assert open_runs(out).sql("select max(step) from tokens").item() == last
    # Any number of processes can resume, one included.
    train(load_config("tiny", CONFIG), out, LABELS, resume=True)
    assert_same_run(out, alone)
    assert read_manifest(out)["num_processes"] == 1


def wait_for(path):
    deadline = time.monotonic() + HANG_S
    while not path.exists():
        assert time.monotonic() < deadline, f"no {path}"
        time.sleep(0.01)


def children(pid):
    return map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())


def environment(pid):
    pairs = Path(f"/proc/{pid}/environ").read_text().split("\0")
    return dict(pair.split("=", 1) for pair in pairs if pair)


def shard_weights(rank):
    os.environ["ACCELERATE_USE_FSDP"] = "true"


@pytest.mark.slow
@pytest.mark.sharded
@pytest.mark.parametrize("overrides", [[], ["policy.gradient_checkpointing=true", "optim.micro_batch_tokens=200"]])
def test_sharded_processes_resume_from_a_checkpoint_of_one(context, tmp_path, overrides):
    config = [*CONFIG, *overrides, "loss.kl_coef=0.01"]
    wanted, out = tmp_path / "wanted", tmp_path / "cut"
    train(load_config("tiny", config), wanted, LABELS)

    def stop(done, **figures):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(load_config("tiny", config), out, LABELS, on_step=stop)
    arguments = ["train", "tiny", *config, "--resume", "--out", out]
    processes, logs = fork(context, 2, arguments, tmp_path, shard_weights)
    assert end(processes) == [0, 0], [log.read_text() for log in logs]
    assert_same_run(out, wanted)
    found, moments = (load_file(run / "checkpoints" / "step-000003" / "optimizer.safetensors") for run in (out, wanted))
    assert {name: value.shape for name, value in found.items()} == {name: v.shape for name, v in moments.items()}
    for name, value in moments.items():
        torch.testing.assert_close(found[name], value, rtol=1e-2, atol=1e-6)


@pytest.mark.slow
def test_an_adapter_cannot_be_sharded(context, tmp_path):
    arguments = ["train", "tiny", *CONFIG, "policy.lora={r=2}", "--out", tmp_path / "run"]
    processes, logs = fork(context, 2, arguments, tmp_path, shard_weights)
    assert end(processes) == [2, 2]
    assert "".join(log.read_text() for log in logs).count("policy.lora: an adapter cannot be sharded (FSDP)") == 1


@pytest.mark.parametrize(
    "overrides",
    [
        ["optim.mini_batches=2", "optim.epochs=2", "loss.kl_coef=0.1", "loss.method=entropy_mask"],
        # Two processes have no prompt, and one has no row to learn from.
        slow(["rollout.prompts_per_step=1", "rollout.group_size=2", "rollout.max_refills=4"]),
    ],
)
def test_statistics_of_the_batch_include_all_processes(context, tmp_path, overrides):
    config = [*CONFIG, "steps=1", "shaping.method=ppl", "loss.aggregation=sequence_mean", *overrides]
    train(load_config("tiny", config), tmp_path / "alone", LABELS)
    processes, logs = fork(context, 3, ["train", "tiny", *config, "--out", tmp_path / "three"], tmp_path)
    assert end(processes) == [0, 0, 0], said(logs)
    assert_same_run(tmp_path / "three", tmp_path / "alone")
    assert (read(tmp_path / "three", "steps")["groups_kept"] > 0).all()


def fill_the_disk(rank):
    """Fill the second process's disk when it first writes step 2.

    After a restart the disk has room again.
    """
    if rank == 1:
        write = train_module.TraceWriter.flush

        def flush(writer, step=None):
            if writer.manifest["last_durable_step"] == 1:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(writer.run_dir / "tokens"))
            write(writer, step)

        train_module.TraceWriter.flush = flush


def test_an_error_of_one_process_ends_all(context, alone, tmp_path):
    out = tmp_path / "full"
    processes, logs = fork(context, 2, ["train", "tiny", *CONFIG, "--out", out], tmp_path, fill_the_disk)
    assert end(processes) == [1, 1]
    reason = f"TrainingError: {out}: no space left on device; recorded up to step 1: free some space and resume with"
    assert said(logs) == [f"entrace: {reason} --resume"]
    manifest = read_manifest(out)
    assert (manifest["status"], manifest["last_durable_step"]) == ("failed", 1)
    assert manifest["error"] == f"{reason} --resume"
    assert open_runs(out).sql("select max(step) from tokens").item() == 1
    processes, logs = fork(context, 2, ["train", "tiny", *CONFIG, "--out", out, "--resume"], tmp_path)
    assert end(processes) == [0, 0], said(logs)
    assert_same_run(out, alone)


def test_a_signal_to_one_process_stops_all_at_the_next_exchange(context, alone, tmp_path):
    out = tmp_path / "stopped"
    processes, logs = fork(context, 2, ["train", "tiny", *CONFIG, "--out", out], tmp_path)
    wait_for(out / "checkpoints" / "step-000001")
    os.kill(processes[1].pid, signal.SIGTERM)
    assert end(processes) == [130, 130]
    assert said(logs) == [f"entrace: stopped; the same command with --resume continues in {out}"]
    train(load_config("tiny", CONFIG), out, LABELS, resume=True)
    assert_same_run(out, alone)


@pytest.mark.slow
def test_without_rank_0_another_reports(context, tmp_path):
    out = tmp_path / "headless"
    processes, logs = fork(context, 2, ["train", "tiny", *CONFIG, "--out", out], tmp_path)
    wait_for(out / "checkpoints" / "step-000001")
    processes[0].kill()
    assert end(processes) == [-signal.SIGKILL, 1]
    # Without a launcher, rank 0 hosts the store that picks the reporting process.
    assert any("another process of the run has ended; recorded up to step" in line for line in said(logs))
    assert json.loads((out / "run.json").read_text())["status"] == "running"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["train", "tiny", "optim.lr=much", "--out"], "optim.lr: expected a valid number"),
        (["train", "tiny", "policy.path=nowhere", "--out"], "policy.path: no model folder at nowhere"),
        (["report", "--out"], "only `entrace train` can run in several processes"),
    ],
)
def test_bad_input_is_reported_once(context, tmp_path, arguments, line):
    processes, logs = fork(context, 2, [*arguments, tmp_path / "run"], tmp_path)
    assert end(processes) == [2, 2]
    assert len(said(logs)) == 1
    assert line in said(logs)[0]
    assert not (tmp_path / "run").exists()


def test_slices_of_all_ranks_cover_everything_in_order():
    for count in (0, 1, 5, 6, 8):
        parts = [Ranks(rank, 3).shard(count) for rank in range(3)]
        assert [place for part in parts for place in range(count)[part]] == list(range(count))
        sizes = [len(range(count)[part]) for part in parts]
        assert max(sizes) - min(sizes) <= 1


def test_alone_every_exchange_is_the_identity():
    tensor = torch.tensor([1.0])
    ALONE.all_reduce([tensor])
    assert (tensor.item(), ALONE.shard(7), ALONE.is_main) == (1.0, slice(0, 7), True)
    assert ALONE.all_gather_object(tensor) == [tensor]
    assert ALONE.broadcast(lambda: 3) == 3


def test_an_error_that_cannot_be_pickled_is_sent_as_text():
    class LocalError(Exception):
        pass

    assert str(_Failure.of(LocalError("of a library")).error) == "LocalError: of a library"
    assert isinstance(_Failure.of(OSError(errno.ENOSPC, "full", "file")).error, OSError)

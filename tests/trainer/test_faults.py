"""Test real faults of the machine: messages, remains, and that runs can resume.

A worker that dies inside a grid is in ``test_ablate``, a process killed at any moment in ``test_kill``, and a loss that
is NaN or infinite in ``test_train``.
"""

import functools
import io
import itertools
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import traceback
import weakref
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path

import polars as pl
import pyarrow.parquet as pq
import pytest
import torch

import entrace
from entrace.analysis.trace import InputError, manifest, read_manifest
from entrace.trainer import cli
from entrace.trainer import rollouts as batch
from entrace.trainer import train as train_module
from entrace.trainer.config import PolicyConfig, load_config
from entrace.trainer.faults import TrainingError, explain_fault, memory_advice
from entrace.trainer.learner import Learner
from entrace.trainer.model import policy as policy_module
from entrace.trainer.model.policy import Policy
from entrace.trainer.resources import find_base_policy
from entrace.trainer.runs.run_folder import is_complete
from entrace.trainer.train import train
from tests.patience import HANG_S
from tests.slow import slow

from .conftest import SHORT, cut_short, flip_a_bit

LABELS = {"study": "test", "arm": "none"}
OVERRIDES = [*SHORT, "steps=6"]
SECONDS = ("rollout_s", "reward_s", "update_s", "record_s")
TABLES = ("tokens", "rollouts", "prompts", "vocab", "evals", "steps")
BLOCK = 4096


class Interrupted(BaseException):
    """Stand for the loss of the machine."""


def assert_same_run(one, other):
    for table in TABLES:
        found, wanted = (
            pl.read_parquet(run / table / "*.parquet").drop("run_id", *SECONDS, strict=False) for run in (one, other)
        )
        assert found.equals(wanted), table
    for name in ("policy/model.safetensors", "optimizer.safetensors"):
        found, wanted = (run / "checkpoints" / "step-000006" / name for run in (one, other))
        assert found.read_bytes() == wanted.read_bytes(), name
    assert read_manifest(one)["status"] == "complete"


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def resume(run_dir):
    train(load_config("tiny", OVERRIDES), run_dir, LABELS, resume=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Train a run of six steps, with checkpoints of steps 2, 4, and 6.

    The last two checkpoints are kept.
    """
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    train(load_config("tiny", OVERRIDES), run_dir, LABELS)
    return run_dir


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """Train a run and interrupt it in step 6.

    The trace holds five steps, and checkpoints are of steps 2 and 4.
    """

    def stop(done, **metrics):
        if done == 5:
            raise Interrupted

    run_dir = tmp_path_factory.mktemp("runs") / "run"
    with pytest.raises(Interrupted):
        train(load_config("tiny", OVERRIDES), run_dir, LABELS, on_step=stop)
    return run_dir


@pytest.fixture
def run_dir(interrupted, tmp_path):
    return shutil.copytree(interrupted, tmp_path / "run")


def drop_a_column(path):
    rows = pq.read_table(path)
    pq.write_table(rows.drop_columns(["response_length"]), path)


def test_a_damaged_checkpoint_is_passed_over(run_dir, whole, caplog):
    flip_a_bit(run_dir / "checkpoints" / "step-000004" / "optimizer.safetensors")
    resume(run_dir)
    damaged = "checkpoint of step 4 is damaged (optimizer.safetensors: checksum differs)"
    assert caplog.messages == [f"{run_dir}: {damaged}; continuing from step 2"]
    assert_same_run(run_dir, whole)


def test_nothing_is_touched_where_no_checkpoint_is_whole(run_dir, call):
    for step in (2, 4):
        cut_short(run_dir / "checkpoints" / f"step-00000{step}" / "state.json")
    before = contents(run_dir)
    code, _, err = call("train", "tiny", *OVERRIDES, "--out", run_dir, "--resume")
    lines = err.splitlines()
    assert code == 2
    assert lines[-1].startswith(
        f"entrace: {run_dir}: no checkpoint to resume from: checkpoint of step 4 is damaged (st"
    )
    assert "nothing was changed" in lines[-1]
    assert contents(run_dir) == before


@pytest.mark.parametrize(
    ("table", "damage", "reason"),
    [
        ("tokens", cut_short, "damaged or truncated Parquet file"),
        slow("rollouts", drop_a_column, "column response_length (int32) is missing"),
        slow("evals", Path.unlink, "missing"),
    ],
)
def test_a_damaged_trace_goes_back_to_the_checkpoint_before(run_dir, whole, call, caplog, table, damage, reason):
    path = run_dir / table / "part-000004-000004.parquet"
    damage(path)
    code, _, err = call("sql", run_dir, "select max(step) from steps")
    lines = err.splitlines()
    assert (code, len(lines)) == (2, 1)
    assert lines[0].startswith(f"entrace: {path}: {reason}")
    resume(run_dir)
    beyond = "checkpoint of step 4 is beyond the trace, which is complete up to step 3"
    assert f"{run_dir}: {beyond}; continuing from step 2" in caplog.messages
    assert [message.partition(": ")[0] for message in caplog.messages] == [str(path), str(run_dir)]
    assert_same_run(run_dir, whole)


def test_a_trace_damaged_before_its_first_checkpoint_is_not_touched(run_dir, call, caplog):
    path = run_dir / "tokens" / "part-000001-000001.parquet"
    cut_short(path)
    before = contents(run_dir)
    code, _, err = call("train", "tiny", *OVERRIDES, "--out", run_dir, "--resume")
    lines = err.splitlines()
    assert code == 2
    assert "checkpoint of step 2 is beyond the trace, which is complete up to step 0" in lines[-1]
    assert "nothing was changed" in lines[-1]
    assert any(message.startswith(f"{path}: damaged") for message in caplog.messages), "which file to restore"
    assert contents(run_dir) == before


def test_a_run_killed_in_its_first_manifest_has_not_begun(tmp_path):
    (tmp_path / "digests.jsonl").touch()
    (tmp_path / ".run.json.tmp").touch()
    assert not is_complete(load_config("tiny", OVERRIDES), tmp_path)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(InputError, match=r"not a trace \(no run.json\)"):
        is_complete(load_config("tiny", OVERRIDES), tmp_path)


@pytest.mark.slow
def test_a_clock_that_goes_backwards_changes_nothing(tmp_path, whole, monkeypatch):
    class Backwards(manifest.datetime):
        hours = iter(range(10**6, 0, -1))

        @classmethod
        def now(cls, tz=None):
            return cls.fromtimestamp(next(cls.hours) * 3600, tz)

    def stop(done, **metrics):
        if done == 3:
            raise Interrupted

    monkeypatch.setattr(manifest, "datetime", Backwards)
    monkeypatch.setattr("time.time", lambda: Backwards.now().timestamp())
    run_dir = tmp_path / "run"
    with pytest.raises(Interrupted):
        train(load_config("tiny", OVERRIDES), run_dir, LABELS, on_step=stop)
    resume(run_dir)
    assert_same_run(run_dir, whole)
    state = read_manifest(run_dir)
    assert state["finished_at"] < state["started_at"]
    runs = entrace.open_runs(run_dir)
    seconds = runs.sql(f"select {', '.join(SECONDS)} from steps")
    assert (seconds.to_numpy() >= 0).all()
    assert runs.query("cost_accuracy")["seconds"].item() == pytest.approx(seconds.to_numpy().sum(), rel=1e-5)


def run_child(function, *arguments, **environment):
    """Return what a function of this file prints as JSON in a process of its own."""
    code = f"from {__name__} import {function.__name__} as run; import sys; run(*sys.argv[1:])"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        command, cwd=root, env={**os.environ, **environment}, capture_output=True, text=True, timeout=HANG_S
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# Out of memory


def out_of_memory(out):
    """Let the allocator fail in a call of each of three functions.

    Errors are printed by name of run.
    """
    torch.set_num_threads(1)
    # What the process keeps would be enough.
    policy_module.keep_freed_memory = lambda: None
    for run_id, owner, name, overrides, call in (
        ("sampling", batch, "_sample_part", ["rollout.group_size=16", "rollout.dynamic_sampling=false"], 2),
        ("updating", Learner, "update", [], 2),
        ("evaluating", train_module, "evaluate", ["eval.samples=16"], 2),
    ):
        if os.fork() == 0:
            _starve(owner, name, call)
            with pytest.raises(TrainingError) as caught:
                train(load_config("tiny", [*OVERRIDES, *overrides]), Path(out) / run_id, LABELS)
            (Path(out) / f"{run_id}.json").write_text(json.dumps([str(caught.value), str(caught.value.__cause__)]))
            os._exit(0)
        assert os.wait()[1] == 0
    print(json.dumps({path.stem: json.loads(path.read_text()) for path in Path(out).glob("*.json")}))


def _starve(owner, name, call):
    """Let the system refuse memory in the ``call``-th call."""
    function, calls = getattr(owner, name), itertools.count(1)

    @functools.wraps(function)
    def starved(*arguments, **named):
        if next(calls) != call:
            return function(*arguments, **named)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize(), resource.RLIM_INFINITY))
        try:
            return function(*arguments, **named)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    setattr(owner, name, starved)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is measured and limited as Linux does")
def test_out_of_memory_names_the_setting_to_lower(tmp_path, whole):
    # Of the C library's: one heap, none kept in reserve, and larger blocks go back to the system once they are free.
    found = run_child(out_of_memory, tmp_path, MALLOC_ARENA_MAX="1", MALLOC_MMAP_THRESHOLD_="16384")
    assert {run_id: error for run_id, (error, _) in found.items()} == {
        "sampling": "out of memory while sampling at step 2; lower rollout.cache_tokens (1048576 now)",
        "updating": "out of memory while updating at step 2; lower optim.micro_batch_tokens (16384 now)",
        "evaluating": "out of memory while evaluating; lower rollout.cache_tokens (1048576 now)",
    }
    for run_id, (error, cause) in found.items():
        assert "allocate" in cause, "the allocator itself has failed"
        state = read_manifest(tmp_path / run_id)
        assert (state["status"], state["last_durable_step"]) == ("failed", 1)
        assert error in state["error"]
    first = pl.col("step") == 1
    found, wanted = (
        pl.read_parquet(run / "tokens" / "*.parquet").filter(first) for run in (tmp_path / "updating", whole)
    )
    assert found.drop("run_id").equals(wanted.drop("run_id"))


def test_memory_is_free_again_when_the_error_is_handled(small_config):
    class Activations:
        """Stand for the tensors that filled the memory."""

    def fill():
        activations = Activations()
        seen.append(weakref.ref(activations))
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has 1 GiB free.")

    seen = []
    with pytest.raises(TrainingError) as caught, memory_advice(small_config, "at it", "steps"):
        fill()
    assert str(caught.value) == "out of memory while at it; lower steps (4 now)"
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)
    assert seen[0]() is None


def test_other_errors_pass_the_advice_on_memory(small_config):
    with pytest.raises(RuntimeError, match="shapes differ"), memory_advice(small_config, "at it", "steps"):
        raise RuntimeError("shapes differ")


# Disks


def serve_mounts():
    """Call functions of this file in forks, and print their exit codes.

    Modules are imported once.
    """
    for line in sys.stdin:
        name, *arguments, output = json.loads(line)
        if os.fork() == 0:
            # Errors go to the file, too.
            descriptor = os.open(output, os.O_WRONLY | os.O_CREAT)
            for number in (1, 2):
                os.dup2(descriptor, number)
            try:
                globals()[name](*arguments)
                sys.stdout.flush()
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        print(os.wait()[1], flush=True)


@pytest.fixture(scope="module")
def mounts():
    """Start a process that may mount file systems of its own; see ``serve_mounts``."""
    code = f"from {__name__} import serve_mounts; serve_mounts()"
    process = subprocess.Popen(
        [*own_mounts(), sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        yield process
        process.stdin.close()


@pytest.fixture
def run_mounted(mounts, tmp_path):
    """Return a function that runs another where it may mount file systems.

    The other is a function of this file, whose last printed line is parsed as JSON.
    """

    def run(function, *arguments):
        output = tmp_path / "output.txt"
        print(json.dumps([function.__name__, *map(str, arguments), str(output)]), file=mounts.stdin, flush=True)
        assert mounts.stdout.readline() == "0\n", output.read_text()
        return json.loads(output.read_text().splitlines()[-1])

    return run


@functools.cache
def own_mounts():
    """Return a command prefix under which a process may mount its own file systems.

    None if the system allows no process to do so.
    """
    for prefix in (("unshare", "-Urm"), ("unshare", "-m")):
        probe = [*prefix, "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
        if shutil.which("unshare") and subprocess.run(probe, capture_output=True).returncode == 0:
            return prefix
    return None


needs_mounts = pytest.mark.skipif(own_mounts() is None, reason="no file system can be mounted here (unshare, mount)")


def _mount(folder, options):
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=True)


def _entrace(*arguments, line=-1):
    """Return exit code and a line of output of an ``entrace`` command.

    The command runs in this process, and the last line is the default.
    """
    sys.argv = ["entrace", *map(str, arguments)]
    with io.TextIOWrapper(io.BytesIO(), write_through=True) as said:
        with redirect_stdout(said), redirect_stderr(said), pytest.raises(SystemExit) as stopped:
            cli.main()
        return stopped.value.code, said.buffer.getvalue().decode().splitlines()[line]


def full_disk(folder, out, *rooms):
    """Train on a disk with given bytes of room, then with enough.

    Each time, the output and the remaining files are printed.
    """
    torch.set_num_threads(1)
    told = []
    for room in rooms:
        _mount(folder, f"size={room}")
        run_dir = Path(folder) / "run"
        arguments = ["train", "tiny", *OVERRIDES, "--out", run_dir]
        said = _entrace(*arguments)
        state = read_manifest(run_dir)
        steps = entrace.open_runs(run_dir).sql("select step from steps order by step")["step"].to_list()
        hidden = [path.name for path in (run_dir / "checkpoints").glob(".*")]
        _mount(folder, "remount,size=64m")
        resumed = _entrace(*arguments, "--resume")
        shutil.copytree(run_dir, Path(out) / room)
        subprocess.run(["umount", folder], check=True)
        told.append([said, state, steps, hidden, resumed[0]])
    print(json.dumps(told))


def room_for(run_dir, step, checkpoints):
    """Return the bytes of the trace up to ``step`` with that many checkpoints."""
    parts = [path for path in run_dir.glob("*/*.parquet") if int(path.stem.split("-")[1]) <= step]
    checkpoint = [path for path in (run_dir / "checkpoints" / "step-000006").rglob("*") if path.is_file()]
    files = [run_dir / "run.json", *parts, *checkpoint * checkpoints]
    return sum(-(-path.stat().st_size // BLOCK) * BLOCK for path in files)


# In the trace of step 3; in weights and tokenizer of the second checkpoint, which other libraries write.
PLACES = {"trace": 2, "weights": 4, "tokenizer": 4}


@needs_mounts
@pytest.mark.parametrize("places", [("trace", "weights"), slow(("tokenizer",))], ids=",".join)
def test_a_full_disk(tmp_path, whole, run_mounted, places):
    model = (whole / "checkpoints" / "step-000006" / "policy" / "model.safetensors").stat().st_size
    sizes = {
        "trace": room_for(whole, 2, 1) + 7 * BLOCK,
        "weights": room_for(whole, 4, 1) + model // 2,
        "tokenizer": room_for(whole, 4, 1) + model + 6 * BLOCK,
    }
    rooms = [sizes[place] for place in places]
    (tmp_path / "disk").mkdir()
    told = run_mounted(full_disk, tmp_path / "disk", tmp_path, *rooms)
    for place, room, ((code, line), state, steps, hidden, resumed) in zip(places, rooms, told, strict=True):
        recorded = PLACES[place]
        advice = f"recorded up to step {recorded}: free some space and resume with --resume"
        assert (code, line) == (
            1,
            f"entrace: TrainingError: {tmp_path / 'disk/run'}: no space left on device; {advice}",
        )
        assert state["last_durable_step"] == recorded
        assert steps == list(range(1, recorded + 1))
        assert hidden == []
        assert resumed == 0
        assert_same_run(tmp_path / str(room), whole)


def locked_disk(folder, out):
    """Make the disk read-only after three steps, then writable again.

    Messages are printed.
    """
    torch.set_num_threads(1)
    _mount(folder, "size=64m")
    run_dir = Path(folder) / "run"

    def lock(done, **metrics):
        if done == 3:
            _mount(folder, "remount,ro")

    with pytest.raises(TrainingError) as caught:
        train(load_config("tiny", OVERRIDES), run_dir, LABELS, on_step=lock)
    arguments = ["train", "tiny", *OVERRIDES, "--out"]
    told = [
        str(caught.value),
        _entrace(*arguments, run_dir, "--resume"),
        _entrace(*arguments, Path(folder) / "new"),
        entrace.open_runs(run_dir).sql("select max(step) from steps").item(),
    ]
    _mount(folder, "remount,rw")
    told.append(_entrace(*arguments, run_dir, "--resume")[0])
    shutil.copytree(run_dir, Path(out) / "resumed")
    print(json.dumps(told))


@pytest.mark.slow
@needs_mounts
def test_a_disk_that_becomes_read_only(tmp_path, whole, run_mounted):
    (tmp_path / "disk").mkdir()
    told = run_mounted(locked_disk, tmp_path / "disk", tmp_path)
    text, (code, again), (new_code, new), last, resumed = told
    recorded = "recorded up to step {}: make it writable and resume with --resume"
    run_dir = tmp_path / "disk/run"
    assert text == f"{run_dir}: read-only file system; {recorded.format(3)}"
    assert (code, again) == (1, f"entrace: TrainingError: {text}")
    fault = f"{tmp_path / 'disk/new'}: read-only file system; {recorded.format(0)}"
    assert (new_code, new) == (1, f"entrace: TrainingError: {fault}")
    assert (last, resumed) == (3, 0)
    assert_same_run(tmp_path / "resumed", whole)


def unwritable_disk(folder, run_dir, recipe, condition):
    """Call every command that writes, on a disk that is full or read-only.

    The last message of each is printed.
    """
    torch.set_num_threads(1)
    folder = Path(folder)
    _mount(folder, "size=64m")
    shutil.copytree(run_dir, folder / "trained")
    rows = Path(recipe).with_name("rows.jsonl")
    rows.write_text('{"prompt": "1 + 1", "response": "2", "reward": 1}\n')
    if condition == "full":
        with suppress(OSError), open(folder / "fill", "wb") as file:
            while True:
                file.write(bytes(BLOCK))
    else:
        _mount(folder, "remount,ro")
    grid = ["ablate", "tiny-study", *OVERRIDES, "--seeds", "0"]
    told = {
        "report": _entrace("report", run_dir, "--out", folder / "report"),
        "import": _entrace("import", rows, "--model", "embedded", "--out", folder / "imported"),
        "intervene": _entrace("intervene", folder / "trained", "--budget", "100"),
        "pretrain": _entrace("pretrain", recipe, "--out", folder / "model"),
        "ablate": _entrace(*grid, "--out", folder / "study", line=-3),
        "left": sorted(path.name for path in folder.rglob(".entrace-partial")),
    }
    print(json.dumps(told))


@pytest.mark.slow
@needs_mounts
@pytest.mark.parametrize(
    ("condition", "reason", "remedy"),
    [
        ("full", "no space left on device", "free some space"),
        ("read-only", "read-only file system", "make it writable"),
    ],
)
def test_every_command_names_an_unwritable_disk_and_a_remedy(
    tmp_path, whole, small_recipe, run_mounted, condition, reason, remedy
):
    disk = tmp_path / "disk"
    disk.mkdir()
    told = run_mounted(unwritable_disk, disk, whole, small_recipe, condition)
    of_run = told.pop("ablate")
    assert of_run[0] == 1
    assert re.match(rf"entrace: \S+ failed: .*{disk}/study\S*: {reason}; .*{remedy}", of_run[1])
    # A read-only disk fails where the folder of the file is made.
    part = "interventions/step-000006-seed-0-000000.parquet" if condition == "full" else "interventions"
    resumed = f"recorded up to step 0: {remedy} and resume with --resume"
    assert told == {
        "report": [1, f"entrace: {disk}/report: {reason}; {remedy}"],
        "import": [1, f"entrace: TrainingError: {disk}/imported: {reason}; {resumed}"],
        "intervene": [1, f"entrace: {disk}/trained/{part}: {reason}; {remedy}"],
        "pretrain": [1, f"entrace: {disk}/model: {reason}; {remedy}"],
        "left": [],
    }


def full_temporary_folder(folder, run_dir):
    """Let a query spill more than its temporary folder can hold."""
    _mount(folder, "size=2m")
    tempfile.tempdir = folder
    text = (
        "select sum(length(x) + r) from (select repeat(md5(i::varchar), 20) as x, row_number() over (order by x) as r"
    )
    print(json.dumps(_entrace("sql", run_dir, f"{text} from range(900000) as t(i))", "--memory", "200MiB")))


@pytest.mark.slow
@needs_mounts
def test_a_query_that_fills_the_temporary_folder_has_a_remedy(tmp_path, whole, run_mounted):
    (tmp_path / "disk").mkdir()
    code, line = run_mounted(full_temporary_folder, tmp_path / "disk", whole)
    assert code == 1
    assert line.startswith(f"entrace: {tmp_path / 'disk'}/entrace-")
    remedy = "free some space, or set TMPDIR to a writable folder with free space"
    assert line.endswith(f": no space left on device; {remedy}")


def test_faults_elsewhere_are_not_blamed_on_the_run(tmp_path):
    for error in (
        PermissionError(13, "Permission denied", "/etc/shadow"),
        OSError("disk full"),
        ValueError("no space"),
    ):
        assert explain_fault(error, tmp_path) is error
    inside = explain_fault(PermissionError(13, "Permission denied", str(tmp_path / "steps")), tmp_path)
    assert str(inside).startswith(f"{tmp_path}: permission denied; recorded up to step 0: change its permissions")
    quota = explain_fault(RuntimeError("I/O error: Disk quota exceeded (os error 122)"), tmp_path)
    assert str(quota).startswith(f"{tmp_path}: disk quota exceeded; recorded up to step 0: free some space")


# Models that would run code


def copy_policy(tmp_path, *left_out):
    return shutil.copytree(find_base_policy(), tmp_path / "model", ignore=shutil.ignore_patterns(*left_out))


class Bomb:
    """Run code when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "last.ckpt"])
@pytest.mark.parametrize("is_folder", [True, False])
def test_pickled_weights_are_refused(tmp_path, name, is_folder):
    model = copy_policy(tmp_path, "model.safetensors")
    torch.save(Bomb(tmp_path / "exploded"), model / name)
    path = model if is_folder else model / name
    with pytest.raises(InputError) as caught:
        Policy.load(PolicyConfig(path=str(path)))
    assert f"{path}: no usable model ({name} is a pickle, which can run code when it is read" in str(caught.value)
    assert "safetensors" in str(caught.value)
    assert not (tmp_path / "exploded").exists()


def test_pickles_beside_safetensors_are_not_read(tmp_path):
    model = copy_policy(tmp_path)
    for name in ("pytorch_model.bin", "training_args.bin"):
        torch.save(Bomb(tmp_path / "exploded"), model / name)
    assert Policy.load(PolicyConfig(path=str(model))).vocab_size == 512
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    ("name", "key", "module"),
    [
        ("config.json", "AutoModelForCausalLM", "modeling_x.Model"),
        ("config.json", "AutoConfig", "modeling_x.Config"),
        ("tokenizer_config.json", "AutoTokenizer", ["modeling_x.Tokenizer", None]),
    ],
)
def test_code_that_comes_with_a_model_is_never_run(tmp_path, name, key, module):
    model = copy_policy(tmp_path)
    (model / "modeling_x.py").write_text(f"open({str(tmp_path / 'exploded')!r}, 'w')\n")
    settings = json.loads((model / name).read_text())
    (model / name).write_text(json.dumps({**settings, "auto_map": {key: module}}))
    with pytest.raises(InputError, match=rf"model: no usable model \(auto_map in {name} asks for code"):
        Policy.load(PolicyConfig(path=str(model)))
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("text", ["null", "3", "[]", "no JSON", "\ufeff{"])
def test_a_config_that_is_no_table_is_one_line(tmp_path, text):
    model = copy_policy(tmp_path)
    (model / "config.json").write_text(text)
    with pytest.raises(InputError, match="no usable model"):
        Policy.load(PolicyConfig(path=str(model)))

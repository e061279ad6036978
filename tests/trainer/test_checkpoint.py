"""Test that checkpoints restore to the bit.

Damage must be noticed, and unfinished checkpoints must not count.
"""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from entrace.analysis.trace import InputError
from entrace.trainer.config import load_config
from entrace.trainer.learner import Learner
from entrace.trainer.model.policy import Policy
from entrace.trainer.runs import checkpoint as checkpoint_module
from entrace.trainer.runs.checkpoint import (
    RunState,
    find_checkpoint,
    find_damage,
    find_intact,
    list_checkpoints,
    load_checkpoint,
    read_state,
    remove_unfinished,
    save_checkpoint,
)

from .conftest import SHORT, cut_short, flip_a_bit

FILES = {
    "checksums.json",
    "optimizer.safetensors",
    "policy/chat_template.jinja",
    "policy/config.json",
    "policy/generation_config.json",
    "policy/model.safetensors",
    "policy/tokenizer.json",
    "policy/tokenizer_config.json",
    "state.json",
}


def new_learner():
    config = load_config("tiny", [*SHORT, "policy.device=cpu"])
    return Learner(config, Policy.load(config.policy))


def learn(learner, updates):
    for seed in range(updates):
        ids = torch.randint(0, 500, (2, 9), generator=torch.Generator().manual_seed(seed))
        learner.optimizer.zero_grad()
        learner.policy.model(ids).logits.square().mean().backward()
        learner.optimizer.step()


def tensors(learner):
    parameters = dict(learner.policy.model.named_parameters())
    state = learner.optimizer.state
    moments = {(name, key): value for name, p in parameters.items() for key, value in state.get(p, {}).items()}
    return {**parameters, **moments}


def assert_equal_bits(one, other):
    found, wanted = tensors(one), tensors(other)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name
        assert found[name].dtype == value.dtype, name


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def steps(run_dir):
    return [checkpoint_module.checkpoint_step(path) for path in list_checkpoints(run_dir)]


@pytest.fixture(scope="module")
def learner():
    """Return a learner after three updates."""
    learner = new_learner()
    learn(learner, 3)
    return learner


@pytest.fixture(scope="module")
def saved(learner, tmp_path_factory):
    """Train a run with checkpoints of steps 40 and 80, for tests to copy."""
    run_dir = tmp_path_factory.mktemp("runs") / "run"
    for step in (40, 80):
        save_checkpoint(run_dir, learner, RunState(step, 7, 8, [(1.5, 0.25), (1.25, 0.5)]))
    return run_dir


@pytest.fixture
def run_dir(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "run")


def test_weights_and_optimizer_come_back_to_the_bit(learner, run_dir):
    restored = new_learner()
    checkpoint = find_checkpoint(run_dir)
    assert load_checkpoint(checkpoint, restored) == RunState(80, 7, 8, [(1.5, 0.25), (1.25, 0.5)])
    assert len(tensors(restored)) == 4 * len(dict(learner.policy.model.named_parameters()))
    assert_equal_bits(restored, learner)
    # The next update needs nothing of the files, and comes out the same.
    shutil.rmtree(run_dir)
    again = new_learner()
    learn(again, 3)
    learn(again, 1)
    learn(restored, 1)
    assert_equal_bits(restored, again)


def test_loading_forgets_what_the_learner_had_learnt(tmp_path):
    save_checkpoint(tmp_path, new_learner(), RunState(step=1))
    other = new_learner()
    learn(other, 1)
    load_checkpoint(find_checkpoint(tmp_path), other)
    assert_equal_bits(other, new_learner())


def test_weights_in_shards_are_loaded(learner, run_dir):
    policy = find_checkpoint(run_dir) / "policy"
    (policy / "model.safetensors").unlink()
    learner.policy.model.save_pretrained(policy, max_shard_size="500KB")
    assert len(list(policy.glob("model-*-of-*.safetensors"))) > 1
    restored = new_learner()
    load_checkpoint(policy.parent, restored)
    assert_equal_bits(restored, learner)


def test_every_file_is_listed_and_none_is_a_pickle(saved):
    found = contents(find_checkpoint(saved))
    assert found.keys() == FILES
    assert json.loads(found["checksums.json"]).keys() == FILES - {"checksums.json"}
    for name, data in found.items():
        assert not data.startswith((b"\x80", b"PK")), f"{name} is a pickle, or an archive that may hold one"


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="names of open files are looked up in /proc")
def test_all_is_on_disk_before_it_gets_its_name(learner, tmp_path, monkeypatch):
    events = []
    fsync, rename = os.fsync, Path.rename
    monkeypatch.setattr(os, "fsync", lambda fd: (fsync(fd), events.append(os.readlink(f"/proc/self/fd/{fd}")))[0])
    monkeypatch.setattr(Path, "rename", lambda self, to: (events.append("renamed"), rename(self, to))[1])
    save_checkpoint(tmp_path, learner, RunState(step=2))
    before, after = events[: events.index("renamed")], events[events.index("renamed") + 1 :]
    temporary = str(tmp_path / "checkpoints" / ".step-000002.tmp")
    assert {temporary, f"{temporary}/policy", *(f"{temporary}/{name}" for name in FILES)} <= set(before)
    assert after == [str(tmp_path / "checkpoints")]


def test_the_latest_two_are_kept_and_none_of_a_future_that_is_made_again(learner, run_dir):
    save_checkpoint(run_dir, learner, RunState(step=20))
    assert steps(run_dir) == [20]
    for step in (40, 60, 80):
        save_checkpoint(run_dir, learner, RunState(step=step))
    assert steps(run_dir) == [60, 80]
    save_checkpoint(run_dir, learner, RunState(step=80, prompt_position=9))
    assert steps(run_dir) == [60, 80]
    assert read_state(find_checkpoint(run_dir)).prompt_position == 9
    assert not list((run_dir / "checkpoints").glob(".*"))


def test_more_than_a_million_steps_are_in_order(learner, tmp_path):
    for step in (999_999, 1_000_000):
        save_checkpoint(tmp_path, learner, RunState(step=step))
    assert steps(tmp_path) == [999_999, 1_000_000]
    assert read_state(find_checkpoint(tmp_path)).step == 1_000_000


class Killed(BaseException):
    """Stand for the end of the process at that point."""


@pytest.mark.parametrize("place", ["save_file", "_seal", "sha256_of"])
def test_an_interrupted_save_does_not_count(learner, run_dir, monkeypatch, place):
    def die(*arguments):
        raise Killed

    before = contents(run_dir)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module, place, die)
        with pytest.raises(Killed):
            save_checkpoint(run_dir, learner, RunState(step=120))
    assert contents(run_dir).keys() > before.keys()
    assert steps(run_dir) == [40, 80]
    assert read_state(find_checkpoint(run_dir)).step == 80
    remove_unfinished(run_dir)
    assert contents(run_dir) == before


def test_an_interrupted_removal_leaves_no_half_checkpoint(learner, run_dir, monkeypatch):
    def remove_one_file(folder):
        next(path for path in folder.rglob("*") if path.is_file()).unlink()
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", remove_one_file)
        with pytest.raises(Killed):
            save_checkpoint(run_dir, learner, RunState(step=120))
    assert steps(run_dir) == [80, 120]
    assert [find_damage(path) for path in list_checkpoints(run_dir)] == [None, None]
    remove_unfinished(run_dir)
    assert [path.name for path in sorted((run_dir / "checkpoints").iterdir())] == ["step-000080", "step-000120"]


def test_a_save_that_fails_takes_no_room_and_leaves_the_others(learner, run_dir, monkeypatch):
    def fail(folder):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = contents(run_dir)
    monkeypatch.setattr(checkpoint_module, "_seal", fail)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(run_dir, learner, RunState(step=80))
    assert contents(run_dir) == before


DAMAGE = [
    ("policy/model.safetensors", flip_a_bit, "policy/model.safetensors: checksum differs"),
    ("policy/model.safetensors", cut_short, "policy/model.safetensors: checksum differs"),
    ("policy/tokenizer.json", flip_a_bit, "policy/tokenizer.json: checksum differs"),
    ("optimizer.safetensors", flip_a_bit, "optimizer.safetensors: checksum differs"),
    ("optimizer.safetensors", Path.unlink, "optimizer.safetensors is missing"),
    ("state.json", lambda path: path.write_bytes(b""), "state.json: checksum differs"),
    ("state.json", lambda path: (path.unlink(), path.mkdir()), "state.json: is a directory; name a file"),
    ("checksums.json", Path.unlink, "checksums.json is missing"),
    ("checksums.json", cut_short, "checksums.json: not JSON"),
    ("checksums.json", lambda path: path.write_bytes(b"\xff\xfe"), "checksums.json: not JSON"),
    ("checksums.json", lambda path: path.write_text("[" * 100_000), "checksums.json: not JSON"),
    ("checksums.json", lambda path: path.write_text("{}"), "checksums.json: expected the checksum of every file"),
    ("checksums.json", lambda path: path.write_text("[]"), "checksums.json: expected the checksum of every file"),
]


@pytest.mark.parametrize(("name", "damage", "reason"), DAMAGE)
def test_damage_is_named(run_dir, caplog, name, damage, reason):
    checkpoint = find_checkpoint(run_dir, 80)
    assert find_damage(checkpoint) is None
    damage(checkpoint / name)
    assert find_damage(checkpoint) == reason
    with pytest.raises(
        InputError, match=r"checkpoint of step 80 is damaged \(.*\); restore it or choose another"
    ) as caught:
        find_checkpoint(run_dir, 80)
    assert f"({reason})" in str(caught.value)
    assert caplog.messages == []
    assert find_checkpoint(run_dir) == find_checkpoint(run_dir, 40)
    assert caplog.messages == [f"{run_dir}: checkpoint of step 80 is damaged ({reason}); continuing from step 40"]


def test_nothing_is_touched_if_no_checkpoint_is_whole(run_dir):
    cut_short(run_dir / "checkpoints" / "step-000080" / "state.json")
    (run_dir / "checkpoints" / "step-000040" / "state.json").unlink()
    before = contents(run_dir)
    for find in (find_intact, find_checkpoint):
        with pytest.raises(InputError) as caught:
            find(run_dir)
        assert str(caught.value) == (
            f"{run_dir}: no checkpoint to resume from: "
            "checkpoint of step 80 is damaged (state.json: checksum differs), "
            "checkpoint of step 40 is damaged (state.json is missing); "
            "restore the files, or remove the folder to start again; nothing was changed"
        )
    assert contents(run_dir) == before


def test_checkpoints_beyond_the_trace_do_not_count(run_dir, caplog):
    assert find_intact(run_dir, at_most=80) == find_checkpoint(run_dir, 80)
    assert caplog.messages == []
    assert find_intact(run_dir, at_most=79) == find_checkpoint(run_dir, 40)
    assert caplog.messages == [
        f"{run_dir}: checkpoint of step 80 is beyond the trace, which is complete up to step 79; "
        "continuing from step 40"
    ]
    with pytest.raises(InputError, match="checkpoint of step 40 is beyond the trace, which is complete up to step 39"):
        find_intact(run_dir, at_most=39)


def test_a_run_without_checkpoints(tmp_path, run_dir):
    assert find_intact(tmp_path / "none") is None
    remove_unfinished(tmp_path / "none")
    with pytest.raises(InputError, match="none: this run has no checkpoint"):
        find_checkpoint(tmp_path / "none")
    with pytest.raises(InputError, match="none: no checkpoint of step 3 or any other"):
        find_checkpoint(tmp_path / "none", 3)
    with pytest.raises(InputError, match="run: no checkpoint of step 3; available: 40, 80"):
        find_checkpoint(run_dir, 3)

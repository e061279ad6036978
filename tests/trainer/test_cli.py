"""Test wrong commands: one clear line on stderr, exit 2, nothing written."""

import json
import shutil
import subprocess
import sys

import pytest

import entrace
from entrace.trainer.resources import find_base_policy

from .conftest import SHORT, SMALL


@pytest.fixture
def folders(tmp_path):
    """Write models without tokenizer, without weights, and with pickled weights.

    A config that is not TOML is also written.
    """
    policy = find_base_policy()
    for name, left_out in {
        "no-tokenizer": ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"],
        "no-weights": ["model.safetensors"],
        "pickled": ["model.safetensors"],
    }.items():
        shutil.copytree(policy, tmp_path / name, ignore=shutil.ignore_patterns(*left_out))
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    (tmp_path / "bad.toml").write_text("steps = [\n")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["train", "tiny", "--out", "{}/run", "policy.path={}/nowhere"], ["policy.path", "no model folder", "nowhere"]),
        (
            ["train", "tiny", "--out", "{}/run", "policy.path={}/no-tokenizer"],
            ["no-tokenizer", "no usable tokenizer (", "one of: (1)", "(3)"],
        ),
        (["train", "tiny", "--out", "{}/run", "policy.path={}/no-weights"], ["no-weights", "no usable model"]),
        (["train", "tiny", "--out", "{}/run", "policy.path={}/pickled"], ["pickled", "no usable model", "safetensors"]),
        (["train", "{}/bad.toml", "--out", "{}/run"], ["bad.toml", "not TOML", "line"]),
        (["train", "{}/missing.toml", "--out", "{}/run"], ["missing.toml", "no such file"]),
        (["train", "tiny", "--out", "{}/run", "task.name=chain_summ"], ["chain_summ", 'did you mean "chain_sum"']),
        (["train", "tiny", "--out", "{}/run", "optim.lrr=1"], ['"optim.lrr"', 'did you mean "lr"']),
        (["train", "tiny", "--out", "{}/run", "optim.lr=fast"], ["optim.lr", "'fast'"]),
        (["train", "tiny", "--out", "{}/full"], ["full", "already holds files", "--resume"]),
        (["train", "tiny", "--out", "{}/bad.toml"], ["bad.toml: is a file; name a folder"]),
        (["train", "tiny", "--out", "{}/bad.toml/run"], ["bad.toml: is a file; name a folder"]),
        (["train", "tiny"], ["--out"]),
        (["trian", "tiny"], ["trian", "train"]),
        (["ablate", "{}/bad.toml", "--out", "{}/run"], ["bad.toml", "not TOML"]),
        (["ablate", "tiny-study", "--out", "{}/run", "--seeds", "0,x"], ["--seeds", "0,x"]),
        (["ablate", "tiny-study", "--out", "{}/run", "--seeds", "1,1"], ["repeat a seed"]),
        (["ablate", "tiny-study", "--out", "{}/full"], ["full", "already holds files"]),
        (["ablate", "tiny-study", "--out", "{}/bad.toml"], ["bad.toml: is a file; name a folder"]),
        (["pretrain", "base-policy", "--out", "{}/bad.toml"], ["bad.toml", "is a file"]),
        (["eval", "{}/nowhere"], ["no model folder", "nowhere"]),
        (["pretrain", "{}/bad.toml", "--out", "{}/run"], ["bad.toml", "not TOML"]),
        (["pretrain", "base-policy", "--out", "{}/full"], ["full", "not empty"]),
    ],
)
def test_bad_input_is_one_line(folders, call, arguments, expected):
    code, out, err = call(*(argument.replace("{}", str(folders)) for argument in arguments))
    assert code == 2
    assert out == ""
    assert err.startswith("entrace: ")
    assert err.count("\n") == 1
    for part in expected:
        assert part in err
    assert not (folders / "run").exists()
    assert [path.name for path in (folders / "full").iterdir()] == ["notes.txt"]


def test_a_failing_run_exits_with_one(tmp_path, call):
    arguments = [*SMALL, "optim.lr=1e30", "optim.warmup_steps=0", "rollout.when_short=error"]
    code, _, err = call("train", "tiny", *arguments, "--out", tmp_path / "run")
    assert code == 1
    assert "step 2" in err.splitlines()[-1]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"


def test_a_run_can_be_trained_evaluated_and_queried(tmp_path, call):
    run_dir = tmp_path / "study" / "first"
    code, out, err = call("train", "tiny", *SHORT, "--out", run_dir)
    assert (code, out.strip()) == (0, str(run_dir))
    assert "first: 4/4" in err
    code, out, _ = call("eval", run_dir, "--json")
    (metrics,) = json.loads(out)[str(run_dir)].values()
    assert code == 0
    assert set(metrics) == {"avg@2", "maj@2", "pass@2", "n"}
    assert metrics["n"] == 6
    value, low, high = metrics["avg@2"]
    # All of a few prompts agree here, which leaves an interval with a width.
    assert 0 <= low <= value <= high <= 1
    assert low < high
    code, out, _ = call("sql", run_dir, "select max(step) as last from tokens", "--format", "json")
    assert json.loads(out) == [{"last": 4}]


def test_start_up_imports_nothing_heavy():
    script = (
        "import sys, entrace.trainer.cli\n"
        "print({'torch', 'transformers', 'duckdb', 'polars', 'matplotlib'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_methods_are_listed(call):
    code, output, _ = call("methods")
    assert code == 0
    assert "entropy_advantage: bonus for uncertainty" in output
    assert "shaping.reweighting: alpha = 0.2" in output
    code, output, _ = call("methods", "--json")
    assert json.loads(output)["nsr"]["source"] == "arXiv 2506.01347"


def test_a_misspelt_method_is_met_with_the_nearest(call, tmp_path):
    code, _, error = call("train", "tiny", "shaping.method=ppl_permutd", "--out", tmp_path / "run")
    assert code == 2
    assert 'did you mean "ppl_permuted"?' in error


@pytest.mark.parametrize("command", [["-m", "entrace"], ["-c", "from entrace.trainer.cli import main; main()"]])
def test_the_version_is_printed(command):
    done = subprocess.run([sys.executable, *command, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"entrace {entrace.__version__}"

"""Test the user's own methods, from a module of the working directory.

The commands are train, ablate, resume, eval, and methods.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from entrace.analysis.trace import InputError, read_manifest
from entrace.trainer.algorithm.method import check_result, find_method
from tests.patience import HANG_S

from .conftest import SHORT

ENTRACE = Path(sys.executable).with_name("entrace")
MODULE = '''
"""Methods of this test."""

from entrace.trainer.algorithm.objectives import TokenWeights


def confident(advantages, rollouts, beta: float = 0.5):
    """A' = A p_t^beta: confident tokens count more (this test)."""
    return advantages * (beta * rollouts.logprobs).exp()


def early(advantages, rollouts, most: int = 10):
    """w_t = 1 if t <= most else 0: the first tokens only (this test)."""
    selected = rollouts.response_mask & (rollouts.response_mask.cumsum(1) <= most)
    return TokenWeights(selected.to(advantages.dtype), selected)


def late(advantages, rollouts, least: int = 2) -> TokenWeights:
    """w_t = 1 if t >= least else 0: all but the first tokens (this test)."""
    selected = rollouts.response_mask & (rollouts.response_mask.cumsum(1) >= least)
    return TokenWeights(selected.to(advantages.dtype), selected)


def too_few(advantages):
    return advantages


def ppl(advantages, rollouts, strength: float = 1.0):
    return strength * advantages


def windowed(advantages, rollouts, start_step: int = 3):
    return advantages


def untyped(advantages, rollouts, values: "Unknown" = 1):
    return advantages


def scalar(advantages, rollouts):
    return advantages.mean()


def flat(advantages, rollouts) -> TokenWeights:
    return TokenWeights(advantages[:, 0], rollouts.response_mask)


def listed(advantages, rollouts) -> TokenWeights:
    return TokenWeights([1.0], rollouts.response_mask)


def raising(advantages, rollouts):
    raise RuntimeError("no such luck")


def leaving(advantages, rollouts):
    raise SystemExit(0)


def erasing(advantages, rollouts):
    rollouts.logprobs.zero_()
    return advantages


def doubling(advantages, rollouts):
    advantages *= 2
    return advantages


not_callable = 3
'''
GRID = """
config = "tiny"
baseline = "none"
seeds = [0]
[base]
shaping.confident.beta = 1.5
[arms]
none = {}
shaped = { method = ["ppl", "MODULE:confident"] }
strong = { method = ["ppl", "MODULE:confident"], shaping.confident.beta = 3.0 }
late = { method = "MODULE:late", loss.late.least = 3 }
early = { loss.method = "MODULE:early", loss.early.most = 5 }
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Return the name of a module that only the working directory holds.

    Python keeps one module per name.
    """
    name = f"methods_{tmp_path.name.replace('-', '_')}"
    work = tmp_path / "work"
    work.mkdir()
    (work / f"{name}.py").write_text(MODULE)
    monkeypatch.chdir(work)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return name


def write_grid(module, text=GRID):
    Path("grid.toml").write_text(text.replace("MODULE", module))
    return "grid.toml"


def tokens_of(run):
    return pl.read_parquet(run / "tokens" / "*.parquet").sort("rollout_id", "position")


def check_confident(run, beta):
    """A' / A = clamp(1 - 0.01 z_i, 0.8, 1.2) p_t^beta, from the recorded rows."""
    rollouts = pl.read_parquet(run / "rollouts" / "*.parquet").select("rollout_id", "ppl_z")
    tokens = tokens_of(run).join(rollouts, on="rollout_id").filter(pl.col("advantage") != 0)
    factor = tokens["shaped_advantage"].to_numpy() / tokens["advantage"].to_numpy()
    by_response = np.clip(1 - 0.01 * tokens["ppl_z"].to_numpy(), 0.8, 1.2)
    assert len(factor) > 100
    np.testing.assert_allclose(factor, by_response * np.exp(beta * tokens["logprob"].to_numpy()), rtol=1e-4)


def test_a_shaping_is_composed_trained_resumed_and_evaluated(module, call, tmp_path):
    arguments = [f'shaping.method=["ppl", "{module}:confident"]', "shaping.confident.beta=2.0", *SHORT, "steps=2"]
    run, whole = tmp_path / "runs" / "cut", tmp_path / "runs" / "whole"
    assert call("train", "tiny", *arguments, "--out", run)[0] == 0
    config = read_manifest(run)["config"]
    assert config["shaping"]["method"] == f"ppl+{module}:confident"
    assert config["shaping"]["confident"] == {"start_step": 1, "end_step": None, "beta": 2.0}
    check_confident(run, 2.0)

    longer = [*arguments, "steps=4", "optim.lr=3e-4"]
    code, _, err = call("train", "tiny", *longer, "shaping.confident.beta=2.5", "--out", run, "--resume")
    assert (code, "shaping.confident.beta is 2.0 there, 2.5 here" in err) == (2, True)
    assert call("train", "tiny", *longer, "--out", run, "--resume")[0] == 0
    assert call("train", "tiny", *longer, "--out", whole)[0] == 0
    check_confident(run, 2.0)
    assert tokens_of(run).drop("run_id").equals(tokens_of(whole).drop("run_id"))

    # An evaluation samples, and needs no module of the training run.
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    done = subprocess.run(
        [ENTRACE, "eval", run, "--json"], cwd=elsewhere, capture_output=True, text=True, check=False, timeout=HANG_S
    )
    assert (done.returncode, list(json.loads(done.stdout))) == (0, [str(run)]), done.stderr


def test_a_grid_of_own_methods_is_run_in_other_processes_and_resumed(module, tmp_path):
    """Train a grid beside a stranger's ``trainer.py`` and ``analysis/``.

    No process may import them.
    """
    write_grid(module)
    Path("trainer.py").write_text("raise SystemExit('the user\\'s own trainer was imported')\n")
    Path("analysis").mkdir()
    Path("analysis/__init__.py").write_text("raise SystemExit('the user\\'s own analysis was imported')\n")
    out = tmp_path / "study"
    arguments = ["ablate", "grid.toml", *SHORT, "steps=2", "--out", out, "--jobs", "2", "--json"]
    command = [sys.executable, "-m", "entrace", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=HANG_S)
    assert done.returncode == 0, done.stderr
    runs = {run["arm"]: run for run in json.loads(done.stdout)["runs"]}
    assert {arm: run["status"] for arm, run in runs.items()} == dict.fromkeys(
        ("none", "shaped", "strong", "late", "early"), "complete"
    )
    check_confident(out / "shaped-seed0", 1.5)
    check_confident(out / "strong-seed0", 3.0)
    configs = {arm: read_manifest(out / f"{arm}-seed0")["config"] for arm in runs}
    assert "confident" not in configs["none"]["shaping"]
    assert (configs["late"]["loss"]["method"], configs["late"]["loss"]["late"]) == (f"{module}:late", {"least": 3})
    assert (configs["early"]["loss"]["method"], configs["early"]["loss"]["early"]) == (f"{module}:early", {"most": 5})
    # Before the first update all arms are equal; the losses then count other tokens.
    first = {
        arm: pl.read_parquet(out / f"{arm}-seed0" / "steps" / "*.parquet").sort("step").row(0, named=True)
        for arm in ("none", "late", "early")
    }
    assert first["none"]["entropy_token_mean"] == first["late"]["entropy_token_mean"]
    assert len({row["grad_norm"] for row in first.values()}) == 3

    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    again = subprocess.run([*command, "--resume"], capture_output=True, text=True, check=False, timeout=HANG_S)
    assert again.returncode == 0, again.stderr
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()} == before


def test_a_parameter_of_an_own_method_can_be_swept(module, call, tmp_path):
    grid = write_grid(module, GRID + '[sweep]\n"shaping.confident.beta" = [1.0, 2.0]\n')
    code, out, err = call("ablate", grid, "--out", tmp_path / "study", "--dry-run", "--json")
    assert (code, err) == (0, "")
    assert {run["run_id"] for run in json.loads(out)["runs"]} >= {
        "none-shaping.confident.beta=1.0-seed0",
        "shaped-shaping.confident.beta=2.0-seed0",
    }
    grid = write_grid(module, GRID + '[sweep]\n"shaping.confident.betta" = [1.0, 2.0]\n')
    code, _, err = call("ablate", grid, "--out", tmp_path / "study")
    assert (code, err.count("\n")) == (2, 1)
    assert 'unknown key "shaping.confident.betta"; did you mean "shaping.confident.beta"?' in err


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("shaping.confident.betta=1", 'unknown key "shaping.confident.betta"; did you mean "beta"?'),
        ("shaping.confident.x=1", 'unknown key "shaping.confident.x"; valid: beta, end_step, start_step'),
        ("shaping.confidnt.beta=1", 'unknown key "shaping.confidnt"; did you mean "confident"?'),
        ("loss.early.moost=1", 'unknown key "loss.early.moost"; did you mean "most"?'),
        ("shaping.position.gama=1", 'unknown key "shaping.position.gama"; did you mean "gamma"?'),
    ],
)
def test_an_unknown_key_of_an_own_method_names_the_keys_of_its_section(module, call, tmp_path, override, message):
    methods = [f"shaping.method={module}:confident", f"loss.method={module}:early"]
    code, _, err = call("train", "tiny", *methods, override, "--out", tmp_path / "out")
    assert (code, err.count("\n")) == (2, 1)
    assert err.rstrip().endswith(message)


WRONG = {
    "shaping:confidnt": ('no function "confidnt" in MODULE; did you mean "confident"?',),
    "shaping:too_few": ("expected (advantages, rollouts, parameter=default, ...), found (advantages)",),
    "shaping:not_callable": ('no function "not_callable"',),
    "shaping:windowed": ("start_step and end_step are keys of every shaping section",),
    "shaping:untyped": ("a parameter has no type that TOML can hold", "Unknown"),
    "shaping:ppl": ("section shaping.ppl already exists with other keys; rename the function",),
    "shaping:late": ("it is a loss method; name it in loss.method",),
    "loss:too_few": ("expected (advantages, rollouts, parameter=default, ...), found (advantages)",),
    "loss:erly": ('no function "erly" in MODULE; did you mean "early"?',),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("command", ["train", "ablate"])
def test_a_method_that_cannot_be_one_is_refused_before_any_run_starts(module, call, tmp_path, command, name):
    kind, _, function = name.partition(":")
    if command == "train":
        arguments = ["train", "tiny", f"{kind}.method={module}:{function}"]
    else:
        grid = GRID.replace("none = {}", f'none = {{}}\nwrong = {{ {kind}.method = "MODULE:{function}" }}')
        arguments = ["ablate", write_grid(module, grid)]
    code, out, err = call(*arguments, *SHORT, "--out", tmp_path / "out")
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert err.startswith("entrace: ")
    for part in WRONG[name]:
        assert part.replace("MODULE", module) in err
    assert not (tmp_path / "out").exists()


def test_an_arm_named_after_a_missing_module_is_refused(module, call, tmp_path):
    grid = write_grid(module, GRID + '"nowhere_to_be_found:f" = { optim.lr = 1e-4 }\n')
    code, _, err = call("ablate", grid, "--out", tmp_path / "out")
    assert (code, err.count("\n")) == (2, 1)
    assert 'arm "nowhere_to_be_found:f": method nowhere_to_be_found:f: no module "nowhere_to_be_found"' in err


def test_results_are_numbers_without_gradients():
    spec, advantages = find_method("ppl", "shaping"), torch.tensor([[1.0, -0.5]])
    for result in (advantages.clone().requires_grad_(), advantages.double()):
        found = check_result(spec, result, advantages)
        assert (found.requires_grad, found.dtype, found.tolist()) == (False, torch.float32, advantages.tolist())
    assert check_result(spec, torch.tensor([[2, 3]]), advantages).tolist() == [[2.0, 3.0]]
    for result in (advantages > 0, advantages + 1j):
        with pytest.raises(InputError, match=f"returned {result.dtype}, expected real numbers"):
            check_result(spec, result, advantages)
    with pytest.raises(InputError, match="returned NaN or infinity"):
        check_result(spec, advantages.double() * 1e300, advantages)


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("shaping.method={}:scalar", "shaping method {}:scalar returned shape (), expected shape"),
        ("loss.method={}:scalar", "loss method {}:scalar returned Tensor, expected TokenWeights"),
        ("loss.method={}:flat", "loss method {}:flat returned token_weights of shape ("),
        ("loss.method={}:listed", "TokenWeights: token_weights: expected Tensor, found [1.0]"),
        ("shaping.method={}:raising", "shaping method {}:raising failed (RuntimeError: no such luck)"),
        ("loss.method={}:raising", "loss method {}:raising failed (RuntimeError: no such luck)"),
        ("shaping.method={}:leaving", "shaping method {}:leaving failed (SystemExit: 0)"),
        ("shaping.method={}:erasing", "shaping method {}:erasing changed logprobs in place; return a new tensor"),
        ("shaping.method={}:doubling", "shaping method {}:doubling failed (RuntimeError: unsupported operation"),
    ],
)
def test_a_wrong_result_ends_the_run_with_one_line(module, call, tmp_path, setting, expected):
    code, _, err = call("train", "tiny", setting.format(module), *SHORT, "--out", tmp_path / "run")
    assert code == 2
    assert expected.format(module) in err.splitlines()[-1]
    assert read_manifest(tmp_path / "run")["status"] == "failed"


def test_methods_lists_those_named_and_those_of_a_file(module, call):
    built_in = json.loads(call("methods", "--json")[1])
    code, out, err = call("methods", f"{module}:confident", write_grid(module), "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert {name: found[name] for name in built_in} == built_in
    own = {name.partition(":")[2]: found[name] for name in found if name not in built_in}
    assert set(own) == {"confident", "late", "early"}
    assert own["confident"] == {
        "kind": "shaping",
        "equation": "A' = A p_t^beta",
        "summary": "confident tokens count more",
        "source": "this test",
        "parameters": {"beta": 0.5},
        "section": "shaping.confident",
        "settings": [f'shaping.method="{module}:confident"'],
    }
    # The file names it in loss.method, which nothing in the function says.
    assert (own["early"]["kind"], own["early"]["settings"]) == ("loss", [f'loss.method="{module}:early"'])
    Path("run.toml").write_text(f'[shaping]\nmethod = ["ppl", "{module}:confident"]\n')
    assert f"{module}:confident: confident tokens count more" in call("methods", "run.toml")[1]


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("pppl", 'unknown method "pppl"; did you mean "ppl"? (see `entrace methods`)'),
        ("MODULE:confidnt", 'no function "confidnt" in MODULE; did you mean "confident"?'),
        ("MODULE:too_few", "expected (advantages, rollouts, parameter=default, ...), found (advantages)"),
        ("nowhere.toml", "nowhere.toml: no such file or directory"),
    ],
)
def test_methods_refuses_unknown_names_with_one_line(module, call, argument, expected):
    code, out, err = call("methods", argument.replace("MODULE", module))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert expected.replace("MODULE", module) in err


def test_a_module_that_exits_is_one_line(module, call):
    Path(f"{module}_leaving.py").write_text("import sys\nsys.exit(0)\n")
    expected = f"method {module}_leaving:f: cannot be imported (SystemExit: 0)\n"
    assert call("methods", f"{module}_leaving:f") == (2, "", f"entrace: {expected}")
    code, _, err = call("train", "tiny", f"shaping.method={module}_leaving:f", *SHORT, "--out", "run")
    assert (code, err.count("\n")) == (2, 1)
    assert expected in err


def test_methods_is_listed_without_loading_torch():
    """Torch alone takes seconds to load."""
    script = (
        "import atexit, sys; sys.argv = ['entrace', 'methods']\n"
        "atexit.register(lambda: print('torch._C' in sys.modules, 'transformers' in sys.modules))\n"
        "from entrace.trainer.cli import main; main()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "entropy_advantage: " in done.stdout
    assert done.stdout.splitlines()[-1] == "False False"

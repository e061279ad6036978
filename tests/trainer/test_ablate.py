import json
import sys
import time

import psutil
import pytest

from analysis.trace import InputError, read_manifest
from trainer.ablate import load_grid, run_grid

from .conftest import SMALL

GRID = """
config = "tiny"
baseline = "none"
seeds = [0, 1]

[arms.none]
shaping.method = "none"

[arms.late]
shaping.method = "position"
shaping.position.start_step = 2
"""


@pytest.fixture
def grid(tmp_path):
    path = tmp_path / "grid.toml"
    path.write_text(GRID)
    return path


def test_a_grid_is_arms_times_seeds(grid):
    specs = load_grid(str(grid), ["steps=7"])
    assert [spec.run_id for spec in specs] == ["none-seed0", "late-seed0", "none-seed1", "late-seed1"]
    assert [spec.config.seed for spec in specs] == [0, 0, 1, 1]
    assert {spec.config.steps for spec in specs} == {7}
    assert specs[1].config.shaping.position.start_step == 2


def test_seeds_can_be_replaced(grid):
    assert [spec.config.seed for spec in load_grid(str(grid), [], seeds=[5])] == [5, 5]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seeds = [0, 1]", "seeds = [0, 0]", "a seed is given twice"),
        ("seeds = [0, 1]", "seeds = []", "seeds"),
        ("seeds = [0, 1]", "", 'key "seeds" is missing'),
        ('baseline = "none"', 'baseline = "nine"', 'baseline "nine" is no arm; arms: none, late'),
        ("shaping.method", "shapping.method", 'arm none: unknown key "shapping"; did you mean "shaping"'),
        ('config = "tiny"', 'config = "tyni"', "tyni: no such file"),
        ("seeds", "sedes", 'unknown key "sedes"; did you mean "seeds"'),
        ("start_step = 2", "start_step = 0", "shaping.position.start_step"),
    ],
)
def test_a_bad_grid_is_one_line_and_starts_nothing(grid, old, new, message):
    grid.write_text(GRID.replace(old, new, 1))
    with pytest.raises(InputError) as error:
        load_grid(str(grid))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_failed_runs_stay_and_resume_completes_the_rest(grid, tmp_path):
    """One arm diverges by construction; the others are trained, kept, and left alone by a second call."""
    grid.write_text(GRID.replace("seeds = [0, 1]", "seeds = [0]") + "\n[arms.diverging]\noptim.lr = 1e30\n")
    specs = load_grid(str(grid), [*SMALL, "optim.warmup_steps=0"])
    out = tmp_path / "study"
    seen = {}
    failed = run_grid(specs, out, jobs=2, on_step=lambda run_id, done, **figures: seen.update({run_id: done}))
    assert list(failed) == ["diverging-seed0"]
    assert "step 2" in failed["diverging-seed0"]
    assert seen["none-seed0"] == seen["late-seed0"] == 4
    manifests = {spec.arm: read_manifest(out / spec.run_id) for spec in specs}
    assert {arm: m["status"] for arm, m in manifests.items()} == {
        "none": "complete",
        "late": "complete",
        "diverging": "failed",
    }
    assert {m["num_threads"] for m in manifests.values()} == {manifests["none"]["num_threads"]}
    assert {m["study"] for m in manifests.values()} == {"study"}

    with pytest.raises(InputError, match="--resume"):
        run_grid(specs, out)
    before = (out / "none-seed0" / "run.json").read_bytes()
    assert list(run_grid(specs, out, resume=True)) == ["diverging-seed0"]
    assert (out / "none-seed0" / "run.json").read_bytes() == before


def test_a_run_that_cannot_begin_is_recorded_as_failed(grid, tmp_path):
    specs = load_grid(str(grid), [*SMALL, "policy.path=/nowhere"], seeds=[0])[:1]
    failed = run_grid(specs, tmp_path / "study")
    assert "no model folder at /nowhere" in failed["none-seed0"]
    manifest = json.loads((tmp_path / "study" / "none-seed0" / "run.json").read_text())
    assert (manifest["status"], manifest["arm"], manifest["last_durable_step"]) == ("failed", "none", 0)


@pytest.mark.slow
def test_runs_end_with_whoever_started_them(grid, tmp_path):
    """SIGKILL gives the grid no chance to say goodbye; its runs notice, and keep what they have."""
    out = tmp_path / "study"
    script = (
        "from pathlib import Path; from trainer.ablate import load_grid, run_grid\n"
        "if __name__ == '__main__':\n"
        f"    specs = load_grid({str(grid)!r}, {[*SMALL, 'steps=100000', 'rollout.prompts_per_step=2']!r}, [0])\n"
        f"    run_grid(specs, Path({str(out)!r}), jobs=2)\n"
    )
    (tmp_path / "main.py").write_text(script)
    parent = psutil.Popen([sys.executable, str(tmp_path / "main.py")])
    deadline = time.monotonic() + 120
    while not list(out.glob("*/tokens/*.parquet")) and time.monotonic() < deadline:
        time.sleep(0.5)
    children = parent.children(recursive=True)
    parent.kill()
    parent.wait()
    _, alive = psutil.wait_procs(children, timeout=60)
    assert len(children) >= 2
    assert not alive
    manifest = read_manifest(next(out.glob("none-seed0")))
    assert manifest["status"] == "running"
    assert manifest["last_durable_step"] > 0

"""Test grids as files: runs, precedence of keys, and refused input."""

import hashlib
from pathlib import Path

import pytest

from entrace.analysis.trace import InputError
from entrace.trainer.ablation.grid import load_grid
from entrace.trainer.resources import find_base_policy
from entrace.trainer.runs.run_folder import common_random_numbers

GRID = """
config = "tiny"
baseline = "none"
seeds = [0, 1]

[base]
optim.mini_batches = 4

[arms]
none = {}
ppl = { seeds = [1, 2] }
masked = { method = "entropy_mask", loss.entropy_mask.denominator = "all" }

[arms.late]
shaping.method = "position"
shaping.position.start_step = 2
"""
SWEEP = """
[sweep]
"optim.lr" = [1e-4, 3e-4]
rollout.dynamic_sampling = [true, false]
"""


@pytest.fixture
def grid(tmp_path):
    path = tmp_path / "grid.toml"
    path.write_text(GRID)
    return path


def test_a_grid_is_arms_times_seeds(grid):
    """All arms of a seed come before the next seed; an arm may have seeds of its own."""
    specs = load_grid(str(grid), ["steps=7"])
    assert [spec.run_id for spec in specs] == [
        *("none-seed0", "masked-seed0", "late-seed0"),
        *("none-seed1", "ppl-seed1", "masked-seed1", "late-seed1"),
        "ppl-seed2",
    ]
    assert [spec.config.seed for spec in specs] == [0, 0, 0, 1, 1, 1, 1, 2]
    assert {spec.config.steps for spec in specs} == {7}
    assert {spec.config.optim.mini_batches for spec in specs} == {4}
    assert {(spec.arm, spec.baseline) for spec in specs} == {(arm, "none") for arm in ("none", "ppl", "masked", "late")}
    by_arm = {spec.arm: spec.config for spec in specs}
    assert [by_arm[arm].shaping.method for arm in ("none", "ppl", "masked", "late")] == [
        *("none", "ppl", "none", "position")
    ]
    assert (by_arm["masked"].loss.method, by_arm["masked"].loss.entropy_mask.denominator) == ("entropy_mask", "all")
    assert by_arm["none"].loss.method == "grpo"
    assert by_arm["late"].shaping.position.start_step == 2


def test_seeds_can_be_replaced(grid):
    assert [spec.run_id for spec in load_grid(str(grid), [], seeds=[5])] == [
        *("none-seed5", "ppl-seed5", "masked-seed5", "late-seed5")
    ]


def test_a_sweep_multiplies_every_arm_and_names_its_values(grid):
    grid.write_text(GRID + SWEEP)
    specs = load_grid(str(grid), seeds=[3])
    assert len(specs) == 4 * 4
    spec = specs[5]
    assert spec.run_id == "ppl-optim.lr=0.0001-rollout.dynamic_sampling=false-seed3"
    assert spec.arm == "ppl [optim.lr=0.0001, rollout.dynamic_sampling=false]"
    assert spec.baseline == "none [optim.lr=0.0001, rollout.dynamic_sampling=false]"
    assert spec.axes == {"optim.lr": 1e-4, "rollout.dynamic_sampling": False}
    assert (spec.config.optim.lr, spec.config.rollout.dynamic_sampling) == (1e-4, False)
    assert {spec.baseline for spec in specs} <= {spec.arm for spec in specs}
    labels = spec.labels(Path("data/mine"))
    assert (labels["study"], labels["axes"]) == ("mine", spec.axes)


def test_what_is_more_special_wins(grid):
    """config < [base] < method < the arm's own < sweep < command line."""
    grid.write_text(
        """
config = "tiny"
baseline = "none"
seeds = [0]
[base]
loss.entropy_mask.top_frac = 0.3
loss.method = "clip_cov"
optim.lr = 1.0
optim.weight_decay = 0.5
[arms]
none = { loss.method = "grpo", optim.lr = 2.0 }
entropy_mask = { optim.lr = 2.0, optim.weight_decay = 0.6 }
[sweep]
optim.lr = [3.0]
"""
    )
    config = load_grid(str(grid), ["optim.grad_clip=9"])[1].config
    assert config.loss.method == "entropy_mask"
    assert config.loss.entropy_mask.top_frac == 0.3
    assert (config.optim.lr, config.optim.weight_decay, config.optim.grad_clip) == (3.0, 0.6, 9)


def test_the_shipped_grid_has_three_seeds_of_three_arms():
    specs = load_grid("tiny-study")
    arms = ["none", "ppl", "position"]
    assert [spec.run_id for spec in specs] == [f"{arm}-seed{seed}" for seed in range(3) for arm in arms]
    assert [spec.config.shaping.method for spec in specs] == 3 * arms


def replaced(old, new):
    return GRID.replace(old, new, 1)


BAD = {
    "a seed twice": (replaced("seeds = [0, 1]", "seeds = [0, 0]"), "seeds [0, 0] repeat a seed"),
    "an arm's seed twice": (replaced("[1, 2]", "[2, 2]"), "arm ppl: seeds [2, 2] repeat a seed"),
    "no seeds": (replaced("seeds = [0, 1]", "seeds = []"), "the grid is empty; add seeds"),
    "seeds missing": (replaced("seeds = [0, 1]", ""), 'key "seeds" is missing'),
    "no arms": (GRID[: GRID.index("[arms]")] + "[arms]\n", "the grid is empty; add arms under [arms]"),
    "unknown baseline": (
        replaced('baseline = "none"', 'baseline = "nine"'),
        'baseline: unknown arm "nine"; did you mean "none"?',
    ),
    "unknown arm": (replaced("ppl = {", "ppk = {"), 'arm "ppk": unknown method "ppk"; did you mean "ppl"?'),
    "unknown method": (replaced('"entropy_mask"', '"entropy_msk"'), 'arm "masked": unknown method "entropy_msk"; did'),
    "unknown key": (replaced("shaping.method", "shapping.method"), 'arm late: unknown key "shapping"; did you mean'),
    "unknown config": (replaced('"tiny"', '"tyni"'), "tyni: no such file"),
    "unknown top key": (replaced("seeds", "sedes"), 'unknown key "sedes"; did you mean "seeds"'),
    "bad value": (replaced("start_step = 2", "start_step = 0"), "arm late: shaping.position.start_step"),
    "arm is not a table": (replaced("none = {}", "none = 1"), "arms.none"),
    "seed as a key": (GRID + "seed = 3\n", "arm late: a grid takes its seeds from seeds = [...] or --seeds"),
    "seed in base": (replaced("[base]", "[base]\nseed = 3"), "[base]: a grid takes its seeds from"),
    "two arms of one name": (replaced("none = {}", "none = {}\nnone = {}"), "line 11 repeats a name defined above"),
    "an arm's table twice": (GRID + "[arms.late]\n", "repeats a name defined above it: [arms.late]"),
    "one folder for two": (
        GRID + '[arms."ppl/1"]\nsteps=2\n[arms."ppl 1"]\nsteps=3\n',
        "would both write to the folder ppl_1",
    ),
    "unknown axis": (GRID + "[sweep]\noptim.lrr = [1]\n", '[sweep]: unknown key "optim.lrr"; did you mean "optim.lr"?'),
    "axis without section": (GRID + "[sweep]\nlr = [1]\n", '[sweep]: unknown key "lr"; did you mean "optim.lr"?'),
    "section as axis": (GRID + "[sweep]\noptim = [1]\n", '"optim" is a section; name one of its keys, such as "optim'),
    "seed as axis": (GRID + "[sweep]\nseed = [1]\n", "[sweep] seed: seeds are not an axis; list them in seeds = [...]"),
    "axis without values": (GRID + "[sweep]\noptim.lr = []\n", "optim.lr: the grid is empty; add values to this axis"),
    "axis of one value": (GRID + "[sweep]\noptim.lr = 1\n", "[sweep] optim.lr: expected a list of values, found 1"),
    "axis of lists": (GRID + "[sweep]\nshaping.ppl.clip = [[1, 2]]\n", "shaping.ppl.clip: expected single numbers"),
    "axis value twice": (GRID + "[sweep]\noptim.lr = [1, 1.0]\n", "[sweep] optim.lr: 1 is repeated"),
    "bad axis value": (GRID + "[sweep]\noptim.lr = [-1]\n", "arm none [optim.lr=-1]: optim.lr: expected"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_grid_is_one_line(grid, name):
    text, message = BAD[name]
    grid.write_text(text)
    with pytest.raises(InputError) as error:
        load_grid(str(grid))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_overrides_that_the_grid_decides_are_refused(grid):
    grid.write_text(GRID + SWEEP)
    with pytest.raises(InputError, match=r'override "seed=3": a grid takes its seeds from'):
        load_grid(str(grid), ["seed=3"])
    with pytest.raises(
        InputError, match=r'override "optim.lr=1": the grid already sweeps optim.lr; remove one of them'
    ):
        load_grid(str(grid), ["optim.lr=1"])


def test_free_keys_of_the_task_can_be_swept(grid):
    grid.write_text(GRID + "[sweep]\ntask.params.max_terms = [3, 4]\n")
    specs = load_grid(str(grid), seeds=[0])
    assert [spec.config.task.params["max_terms"] for spec in specs] == [3] * 4 + [4] * 4
    assert specs[0].config.task.params["min_terms"] == 3


def test_fingerprints_are_equal_where_runs_share_and_differ_where_they_do_not(grid):
    grid.write_text(GRID + "[sweep]\neval.temperature = [1.0, 0.5]\n")
    specs = load_grid(str(grid))
    common = {spec.run_id: common_random_numbers(spec.config) for spec in specs}
    first = common["none-eval.temperature=1.0-seed1"]
    assert common["ppl-eval.temperature=1.0-seed1"] == first
    weights = (find_base_policy() / "model.safetensors").read_bytes()
    assert first["base_policy"] == hashlib.sha256(hashlib.sha256(weights).digest()).hexdigest()[:16]

    def differs(other):
        return {key for key in first if first[key] != other[key]}

    assert differs(common["ppl-eval.temperature=0.5-seed1"]) == {"evaluation"}
    assert differs(common["ppl-eval.temperature=1.0-seed2"]) == {"prompts", "evaluation"}
    config = next(spec.config for spec in specs if spec.run_id == "none-eval.temperature=1.0-seed1")
    changes = {
        "task": ({"num_heldout": 7}, {"prompts", "evaluation"}),
        "eval": ({"every": 3}, set()),
        "rollout": ({"group_size": 3}, set()),
        "policy": ({"path": "/nowhere"}, {"base_policy"}),
    }
    for section, (change, expected) in changes.items():
        changed = config.model_copy(update={section: getattr(config, section).model_copy(update=change)})
        assert differs(common_random_numbers(changed)) == expected, section
    longer = config.rollout.model_copy(update={"max_response_tokens": 70})
    assert differs(common_random_numbers(config.model_copy(update={"rollout": longer}))) == {"evaluation"}

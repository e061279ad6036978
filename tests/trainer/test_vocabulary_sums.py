"""Test sums over the vocabulary, recorded on request.

One more forward pass before the update computes them.
"""

import math

import polars as pl
import pyarrow.parquet as pq
import pytest
import torch

from entrace.trainer.config import PolicyConfig, load_config
from entrace.trainer.dry_run import make_plan
from entrace.trainer.model.policy import Policy
from entrace.trainer.train import train

from .conftest import SHORT

NAMES = ["sum_p2_others", "sum_p2_logp_others"]
OPTIONS = [*SHORT, "rollout.temperature=0.8", "optim.micro_batch_tokens=300", "record.token_responses=0.6"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Return the folders of equal runs with and without the sums."""
    folder = tmp_path_factory.mktemp("runs")
    for name, value in (("with", "true"), ("without", "false")):
        train(load_config("tiny", [*OPTIONS, f"record.vocabulary_sums={value}"]), folder / name, {})
    return folder


def read(run_dir, table):
    return pl.read_parquet(run_dir / table / "*.parquet")


def test_nothing_else_changes(runs):
    for table in ("tokens", "rollouts", "steps", "evals"):
        timed = [] if table != "steps" else ["rollout_s", "reward_s", "update_s", "record_s"]
        with_sums, without = (read(runs / name, table).drop("run_id", *timed) for name in ("with", "without"))
        assert with_sums.drop(NAMES if table == "tokens" else []).equals(without), table


def test_files_without_the_sums_have_no_column_for_them(runs):
    for name, expected in (("with", NAMES), ("without", [])):
        for path in (runs / name / "tokens").glob("*.parquet"):
            assert [column for column in pq.read_schema(path).names if column in NAMES] == expected


def test_every_stored_token_has_the_sums_of_a_float64_loop(runs):
    tokens = read(runs / "with", "tokens").filter(step=1)
    assert tokens.select(NAMES).null_count().row(0) == (0, 0)
    model = Policy.load(PolicyConfig(device="cpu")).model.double()
    policy = Policy.load(PolicyConfig(device="cpu"))
    prompts = dict(read(runs / "with", "prompts").select("prompt_id", "prompt").rows())
    found = 0
    for (rollout_id,), rows in tokens.sort("rollout_id", "position").group_by("rollout_id", maintain_order=True):
        prompt = policy.encode_prompt(prompts[rows["prompt_id"][0]])
        response = torch.tensor(rows["token_id"].to_list())
        with torch.no_grad():
            logits = model(torch.cat((torch.tensor(prompt), response))[None]).logits[0, len(prompt) - 1 : -1] / 0.8
        logp = torch.log_softmax(logits, -1)
        for place, token in enumerate(response.tolist()):
            others = torch.cat((logp[place, :token], logp[place, token + 1 :])).tolist()
            expected = [sum(math.exp(2 * v) for v in others), sum(v * math.exp(2 * v) for v in others)]
            assert rows.select(NAMES).row(place) == pytest.approx(expected, rel=1e-3, abs=1e-9), (rollout_id, place)
        found += len(response)
    assert found == len(tokens) > 100


def test_a_dry_run_adds_their_bytes_per_stored_token(runs):
    plans = {
        value: make_plan(load_config("tiny", [*OPTIONS, f"record.vocabulary_sums={value}"]))
        for value in ("true", "false")
    }
    added = [a - b for a, b in zip(plans["true"].trace_bytes, plans["false"].trace_bytes, strict=True)]
    stored = plans["true"].tokens_per_step * plans["true"].steps * 0.6
    # Without the footers, which weigh on so short a run.
    groups = [pq.ParquetFile(path).metadata.row_group(0) for path in (runs / "with" / "tokens").iterdir()]
    chunks = [group.column(i) for group in groups for i in range(group.num_columns)]
    size = sum(chunk.total_compressed_size for chunk in chunks if chunk.path_in_schema in NAMES)
    measured = size / sum(group.num_rows for group in groups)
    assert added[0] / stored <= measured * 1.05
    assert measured <= added[1] / stored * 1.05

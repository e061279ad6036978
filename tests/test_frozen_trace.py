"""Test a real trace of schema version 1, which must stay readable.

The trace was written once and kept. Its checkpoints were removed. The command was ``entrace train tiny steps=30
rollout.prompts_per_step=4 rollout.group_size=4 task.num_heldout=8 eval.samples=4 eval.every=15 --out
tests/fixtures/frozen/none-seed0``.
"""

import json
from pathlib import Path

import pandas as pd
import polars as pl
import pytest

from entrace import judge, open_runs
from entrace.analysis.trace import TABLES
from entrace.analysis.trace.schema import OLDEST_VERSION

FROZEN = Path(__file__).parent / "fixtures" / "frozen" / "none-seed0"
SUMS = json.loads(FROZEN.with_name("sums.json").read_text())


def test_it_has_the_oldest_version_that_is_read():
    assert json.loads((FROZEN / "run.json").read_text())["schema_version"] == OLDEST_VERSION


# Interventions are made after training, by a command of their own.
@pytest.mark.parametrize("table", [name for name in TABLES if name != "interventions"])
def test_plain_readers_see_every_column_of_its_version(table):
    parts = sorted((FROZEN / table).glob("*.parquet"))
    names = [column.name for column in TABLES[table].columns if column.since <= OLDEST_VERSION]
    assert list(pl.read_parquet(parts).columns) == names
    assert list(pd.concat(pd.read_parquet(part) for part in parts).columns) == names


def test_sums_are_what_they_were():
    runs = open_runs(FROZEN)
    found = runs.sql(
        "select count(*) as tokens, sum(entropy::double) as entropy, sum(logprob::double) as logprob,"
        " sum(grad_norm::double) as grad_norm, sum(token_id)::bigint as token_ids from tokens"
    ).to_dicts()[0]
    assert found == pytest.approx(SUMS)


def test_its_claims_can_be_judged():
    verdicts = {(v.claim, v.part): v for v in judge(open_runs(FROZEN))}
    assert verdicts["S4", "any defect"].n > 0
    assert verdicts["M1", "avg@k"].verdict == "not recorded"

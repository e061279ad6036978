"""Test that context enters no statistic of the policy.

Context is tokens that the policy did not generate.
"""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from polars.testing import assert_frame_equal

from entrace import open_runs
from entrace.analysis import queries
from entrace.analysis.trace.verify import accept_edits
from tests.analysis.synthetic import write_run

# Of each context token, as a trainer might record it.
NOISE = {"logprob": -20.0, "entropy": 50.0, "grad_norm": 40.0, "advantage": 30.0, "shaped_advantage": 30.0}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("context") / "run", steps=24, groups=3)


def with_context(plain: Path, copy: Path) -> Path:
    """Copy a run, and add a token of context at the end of every response."""
    for path in sorted(plain.rglob("*")):
        (copy / path.relative_to(plain)).parent.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            (copy / path.relative_to(plain)).write_bytes(path.read_bytes())
    for path in (copy / "tokens").glob("*.parquet"):
        rows = pq.read_table(path)
        last = rows.filter(pc.equal(rows["position"], pc.subtract(rows["response_length"], 1)))
        changed = {
            **{name: pa.array([value] * len(last), pa.float32()) for name, value in NOISE.items()},
            "position": pc.add(last["position"], 1),
            "loss_mask": pa.array([False] * len(last)),
            "is_kept": pa.array([True] * len(last)),
        }
        for name, column in changed.items():
            i = last.schema.get_field_index(name)
            last = last.set_column(i, last.schema.field(i), column.cast(last.schema.field(i).type))
        order = [("step", "ascending"), ("rollout_id", "ascending"), ("position", "ascending")]
        both = pa.concat_tables([rows, last]).sort_by(order)
        pq.write_table(both, path)
    manifest = (copy / "run.json").read_text()
    for path in (copy / "tokens").glob("*.parquet"):
        found = pq.read_metadata(path).num_rows
        before = pq.read_metadata(plain / "tokens" / path.name).num_rows
        manifest = manifest.replace(f'"{path.name}": {before}', f'"{path.name}": {found}')
    (copy / "run.json").write_text(manifest)
    accept_edits(copy)
    return copy


@pytest.mark.slow
def test_no_answer_changes(plain: Path, tmp_path: Path):
    found, expected = open_runs(with_context(plain, tmp_path / "run")), open_runs(plain)
    for stem in queries.BUILT_IN.paths:
        assert_frame_equal(found.ask(stem), expected.ask(stem))


def test_the_view_of_all_tokens_has_it(plain: Path, tmp_path: Path):
    runs = open_runs(with_context(plain, tmp_path / "run"))
    responses = runs.sql("select count(*) from rollouts").item()
    tokens, all_tokens = (runs.sql(f"select count(*) from {name}").item() for name in ("tokens", "response_tokens"))
    assert tokens == open_runs(plain).sql("select count(*) from tokens").item()
    assert all_tokens == tokens + responses
    found = runs.sql("select count(*) as n, min(entropy) as low from response_tokens where not loss_mask")
    assert found.row(0) == (responses, 50.0)


def test_a_run_without_context_is_read_without_a_filter(plain: Path, tmp_path: Path):
    explain = "explain select sum(entropy) from tokens"
    assert "loss_mask" not in str(open_runs(plain).sql(explain).rows())
    assert "loss_mask" in str(open_runs(with_context(plain, tmp_path / "run")).sql(explain).rows())
    assert open_runs(plain).sql("select count(*) from response_tokens").item() > 0

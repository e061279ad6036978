"""Rounding of measured values: against a naive reference, through the writer, and the evidence for the default."""

from __future__ import annotations

import inspect
import json
import math
import tomllib
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.trace import MANIFEST, TABLES, InputError, TraceWriter, read_manifest
from analysis.trace.precision import round_mantissa
from tests.analysis.conftest import VOCAB, step_row
from tests.benchmarks import measure_precision

ROOT = Path(__file__).parents[2]
MEASURED = {"logprob", "entropy", "grad_norm", "logprob_after", "entropy_after"}
SMALLEST_NORMAL = 2.0**-126
BITS = st.integers(1, 23)


def reference(value: float, bits: int) -> float:
    """Nearest multiple of the last bit's worth, computed in float64."""
    if not math.isfinite(value):
        return value
    exponent = max(math.frexp(value)[1] - 1, -126)
    unit = 2.0 ** (exponent - bits)
    largest = (2 - 2.0**-bits) * 2.0**127
    return math.copysign(min(round(abs(value) / unit) * unit, largest), value)


@st.composite
def codes(draw: st.DrawFn, bits: int) -> np.ndarray:
    """Float32 of every kind by their codes, many of them exactly half way between two neighbours, or next to it."""
    some = np.array(draw(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=60)), dtype=np.uint32)
    shift = 23 - bits
    half_way = (some >> shift << shift) + np.uint32(1 << shift >> 1)
    return np.concatenate((some, half_way, half_way - np.uint32(1), half_way + np.uint32(1)))


@settings(max_examples=300, deadline=None)
@given(data=st.data(), bits=BITS)
def test_rounding_is_to_nearest_even(data: st.DataObject, bits: int):
    given_codes = data.draw(codes(bits))
    values = given_codes.view(np.float32)
    rounded = round_mantissa(values, bits)
    is_nan = np.isnan(values)
    np.testing.assert_array_equal(rounded.view(np.uint32)[is_nan], given_codes[is_nan])
    expected = np.array([reference(float(value), bits) for value in values[~is_nan]])
    # As codes, so that the sign of zero counts too.
    np.testing.assert_array_equal(rounded.view(np.uint32)[~is_nan], expected.astype(np.float32).view(np.uint32))


@settings(max_examples=300, deadline=None)
@given(data=st.data(), bits=BITS)
def test_rounding_keeps_order_and_its_bound(data: st.DataObject, bits: int):
    values = data.draw(codes(bits)).view(np.float32)
    values = np.sort(values[np.isfinite(values)])
    rounded = round_mantissa(values, bits)
    assert (rounded[1:] >= rounded[:-1]).all()
    is_normal = np.abs(values) >= SMALLEST_NORMAL
    exact = values[is_normal].astype(float)
    assert (np.abs(rounded[is_normal] - exact) <= 2.0 ** -(bits + 1) * np.abs(exact)).all()


@pytest.mark.parametrize(
    ("value", "bits", "expected"),
    [
        (1.25, 1, 1.0),
        (1.75, 1, 2.0),
        (-1.2500001, 1, -1.5),
        (np.float32(0.1), 23, np.float32(0.1)),
        (2.0**-149, 22, 0.0),
        (3 * 2.0**-149, 22, 4 * 2.0**-149),
        (np.finfo(np.float32).max, 1, 1.5 * 2.0**127),
        (-np.inf, 1, -np.inf),
    ],
)
def test_rounding_by_hand(value: float, bits: int, expected: float):
    assert round_mantissa(np.array([value], dtype=np.float32), bits)[0] == np.float32(expected)


def append_tokens(writer: TraceWriter, step: int, values: np.ndarray, after: list[float | None]) -> None:
    fixed = {"step": step, "prompt_id": "a", "rollout_id": step, "is_correct": True}
    same = dict.fromkeys(["logprob", "entropy", "grad_norm", "advantage", "shaped_advantage"], values)
    place = {"position": np.arange(len(values)), "response_length": len(values), "token_id": [1] * len(values)}
    writer.append("tokens", {**fixed, **same, **place, "logprob_after": after})
    writer.append("steps", step_row(step, entropy=float(values[0]), accuracy=float(values[1])))
    writer.flush(step)


def test_a_trace_keeps_to_its_bits_when_it_is_resumed(tmp_path: Path):
    values = np.random.default_rng(0).normal(size=6).astype(np.float32)
    after = [None, *values[1:].tolist()]
    writer = TraceWriter.create(tmp_path / "run", {"run_id": "r"}, VOCAB, mantissa_bits=7)
    append_tokens(writer, 1, values, after)
    append_tokens(TraceWriter.resume(tmp_path / "run", 1), 2, values, after)
    assert read_manifest(tmp_path / "run")["mantissa_bits"] == 7
    rounded = [reference(float(value), 7) for value in values]
    assert rounded != values.tolist()
    tokens = pl.read_parquet(tmp_path / "run" / "tokens" / "*.parquet")
    for step in (1, 2):
        part = tokens.filter(step=step)
        for name in ("logprob", "entropy", "grad_norm"):
            assert part[name].to_list() == rounded
        assert part["logprob_after"].to_list() == [None, *rounded[1:]]
        assert part["entropy_after"].null_count() == len(values)
        # Equal to those of rollouts, which are exact.
        assert part["advantage"].to_list() == part["shaped_advantage"].to_list() == values.tolist()
    steps = pl.read_parquet(tmp_path / "run" / "steps" / "*.parquet")
    assert steps["entropy_token_mean"].to_list() == [values[0]] * 2


def test_each_file_says_which_columns_are_rounded_and_how(tmp_path: Path):
    writer = TraceWriter.create(tmp_path / "run", {"run_id": "r"}, VOCAB, mantissa_bits=12)
    append_tokens(writer, 1, np.ones(2, dtype=np.float32), [1.0, 1.0])
    for table in ("tokens", "steps"):
        schema = pq.read_schema(next((tmp_path / "run" / table).iterdir()))
        stated = {field.name: field.metadata.get(b"mantissa_bits") for field in schema}
        assert {name for name, bits in stated.items() if bits} == (MEASURED if table == "tokens" else set())
        assert set(stated.values()) <= {None, b"12"}
    assert {column.name for column in TABLES["tokens"].columns if column.is_measured} == MEASURED


@pytest.mark.parametrize("bits", [0, 24])
def test_bits_that_float32_lacks_are_refused(tmp_path: Path, bits: int):
    with pytest.raises(InputError, match=f"mantissa_bits: expected 1 to 23, found {bits}"):
        TraceWriter.create(tmp_path / "run", {"run_id": "r"}, VOCAB, mantissa_bits=bits)
    assert not (tmp_path / "run").exists()


def test_a_trace_of_before_goes_on_exactly(tmp_path: Path):
    TraceWriter.create(tmp_path / "run", {"run_id": "r"}, VOCAB, mantissa_bits=3).flush(0)
    manifest = read_manifest(tmp_path / "run")
    del manifest["mantissa_bits"]
    (tmp_path / "run" / MANIFEST).write_text(json.dumps(manifest))
    values = np.array([0.1, 0.2], dtype=np.float32)
    append_tokens(TraceWriter.resume(tmp_path / "run", 0), 1, values, values.tolist())
    assert pl.read_parquet(tmp_path / "run" / "tokens" / "*.parquet")["entropy"].to_list() == values.tolist()


def test_what_is_measured_is_what_is_derived(tiny_path: Path, tmp_path: Path):
    """At 23 bits nothing changes but the order of sums; at 2, entropies of 1.1 nats and the like show."""
    exact = measure_precision.derive([tiny_path])
    worst = {}
    for bits in (23, 2):
        copy = tmp_path / str(bits) / tiny_path.name
        size = measure_precision.Size()
        measure_precision.copy_run(tiny_path, copy, bits, size)
        files = list((copy / "tokens").iterdir())
        assert size.bytes == sum(path.stat().st_size for path in files)
        assert size.records == sum(pq.read_metadata(path).num_rows for path in files)
        changes = measure_precision.compare(exact, measure_precision.derive([copy]))
        worst[bits] = changes[0].change if changes else 0.0
    assert worst[23] < 1e-9
    assert worst[2] > 0.01


CHANGES = [
    (2.0, 2.5, 0.25),
    (-4, -3, 0.25),
    (1e-30, 3e-30, 2.0),
    (1.0, 0.0, 1.0),
    (0, 0.0, 0.0),
    (0.0, 1e-30, math.inf),
    (None, 1.0, math.inf),
    (1.0, None, math.inf),
    (math.nan, math.nan, 0.0),
    (1.0, math.nan, math.inf),
    (math.inf, 1.0, math.inf),
    ("a", "a", 0.0),
    ("a", "b", math.inf),
]


@pytest.mark.parametrize(("exact", "rounded", "change"), CHANGES)
def test_changes_are_relative_to_the_number_itself(exact: object, rounded: object, change: float):
    assert measure_precision.change_of(exact, rounded) == pytest.approx(change)


def test_the_default_is_what_the_evidence_chose():
    evidence = json.loads((ROOT / "reports" / "precision.json").read_text())
    chosen = next(level for level in evidence["levels"] if level["bits"] == evidence["chosen"])
    assert chosen["worst"]["change"] <= 1e-3
    assert chosen["bytes_per_record"] <= 8
    assert inspect.signature(TraceWriter.create).parameters["mantissa_bits"].default == chosen["bits"]
    shipped = tomllib.loads((ROOT / "trainer" / "configs" / "tiny.toml").read_text())
    assert shipped["record"]["mantissa_bits"] == chosen["bits"]

"""Test that reading any file gives a result or an error of one line.

The line says what is wrong with the file.
"""

from __future__ import annotations

import json
import random
import re
import resource
import shutil
import string
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from entrace.analysis.figures import query
from entrace.analysis.plan import measure_pilot
from entrace.analysis.report import _provenance
from entrace.analysis.runs import open_runs
from entrace.analysis.trace import TABLES, InputError, Lexicon
from entrace.trainer.ablation.grid import RunSpec, load_grid
from entrace.trainer.config import Config, load_config
from entrace.trainer.pretraining.pretrain import load_recipe
from entrace.trainer.resources import CONFIGS
from tests.analysis.conftest import write_tiny

CODE = Path(__file__).parent.parent
# What reads TOML, and a file that it takes.
READERS: dict[str, tuple[Callable[[Path], Any], Path]] = {
    "config": (lambda path: load_config(str(path)), CONFIGS / "tiny.toml"),
    "grid": (lambda path: load_grid(str(path)), CONFIGS / "tiny-ablation.toml"),
    "recipe": (load_recipe, CONFIGS / "base-policy.toml"),
    "lexicon": (Lexicon.load, CODE / "analysis" / "trace" / "lexicon.toml"),
}
SHIPPED = {name: path.read_text(encoding="utf-8") for name, (_, path) in READERS.items()}
KEYS = sorted({key for text in SHIPPED.values() for key in re.findall(r"^[a-z_.]+(?= =)", text, re.MULTILINE)})
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
SIGNS = st.text(st.sampled_from("[]{}=.,\"'#\n\\ 09eE+-_:TZabinf\x00\u202e"), max_size=12)
SCALARS = st.one_of(
    st.sampled_from(["nan", "-inf", "1979-05-27T07:32:00Z", "07:32:00", "true", "9" * 5000, "1e400", "2147483648"]),
    st.integers().map(str),
    st.floats(allow_nan=False, allow_infinity=False).map(repr),
    ANY_TEXT.map(json.dumps),
)
NAMES = st.one_of(st.sampled_from(KEYS), st.text(string.printable, max_size=6).map(json.dumps))
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(lambda items: f"[{', '.join(items)}]"),
        st.lists(st.tuples(NAMES, inner).map(" = ".join), max_size=3).map(lambda pairs: f"{{{', '.join(pairs)}}}"),
    ),
    max_leaves=6,
)
LINES = st.one_of(SIGNS, st.tuples(NAMES, VALUES).map(" = ".join), NAMES.map("[{}]".format), st.just(""))
DEEP = ["[" * 5000, "[" * 50_000 + "]" * 50_000, "{a = " * 5000 + "1" + "}" * 5000]
QUICK = settings(max_examples=60, deadline=None, derandomize=True, database=None)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from([10**400, 2**31]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4) | st.just("steps"), inner, max_size=3)
    ),
    max_leaves=6,
)
TYPES = [pa.int8(), pa.int64(), pa.uint64(), pa.float16(), pa.float64(), pa.string(), pa.large_string(), pa.binary()]
TYPES += [pa.bool_(), pa.list_(pa.int32()), pa.dictionary(pa.int32(), pa.string()), pa.date32(), pa.decimal128(10, 2)]
NUM_DAMAGED = 24


def read(name: str, text: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "file.toml")
        path.write_text(text, encoding="utf-8")
        assert_result_or_one_line(lambda: READERS[name][0](path))


def attempt(work: Callable[[], Any]) -> tuple[Any, str]:
    """Return the result of ``work``, or the one line of its error."""
    try:
        return work(), ""
    except InputError as error:
        return None, str(error)


def assert_result_or_one_line(work: Callable[[], Any]) -> None:
    result, refusal = attempt(work)
    assert "\n" not in refusal
    for part in result if isinstance(result, list) else [result]:
        config = part.config if isinstance(part, RunSpec) else part
        if isinstance(config, Config):
            json.dumps(config.model_dump(mode="json"), allow_nan=False)


@QUICK
@given(st.sampled_from(sorted(READERS)), st.one_of(ANY_TEXT, SIGNS, LINES))
def test_any_text(name: str, text: str):
    read(name, text)


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("value", DEEP)
def test_deep_nests(name: str, value: str):
    read(name, f"{SHIPPED[name]}\nx = {value}")


@QUICK
@given(st.sampled_from(sorted(READERS)), st.data())
def test_changed_lines_of_shipped_files(name: str, data: st.DataObject):
    lines = SHIPPED[name].splitlines()
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(lines) - 1))
        key = lines[place].partition("=")[0]
        value = VALUES.map(f"{key} = {{}}".format) if "=" in lines[place] and "{" not in key else LINES
        lines[place] = data.draw(st.one_of(value, LINES, LINES.map(f"{lines[place]}\n".__add__)))
    read(name, "\n".join(lines))


@QUICK
@given(st.lists(st.one_of(ANY_TEXT, st.tuples(st.sampled_from(KEYS), VALUES | SIGNS).map("=".join)), max_size=2))
def test_overrides(overrides: list[str]):
    assert_result_or_one_line(lambda: load_config("tiny", overrides))
    assert_result_or_one_line(lambda: load_grid("tiny-study", overrides))


@pytest.mark.parametrize("path", ["\0", "", "x" * 5000, "/", "tiny\n", "tiny.toml/x", "/dev/null/x"])
def test_paths(path: str):
    with pytest.raises(InputError):
        load_config(path)
    with pytest.raises(InputError):
        load_grid(path)
    with pytest.raises(InputError):
        open_runs(path)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_tiny(tmp_path_factory.mktemp("fuzz") / "tiny")
    # Every change would differ from its digest, and no other check would be reached.
    (path / "digests.jsonl").unlink()
    return path


def use(run: Path) -> None:
    """Run the queries that depend on the manifest."""
    runs = open_runs(run)
    runs.sql("select * from runs, stages")
    query(runs, "ablation_final")
    _provenance(runs)
    attempt(lambda: measure_pilot(run))


@pytest.mark.slow
def test_any_manifest(run: Path):
    path = run / "run.json"
    good = json.loads(path.read_text())
    keys = [*good, "config", "arm", "baseline", "error", "hardware", "versions", "model", "files", "path", "axes"]

    @settings(QUICK, max_examples=20)
    @given(st.one_of(JSON, st.dictionaries(st.sampled_from(keys), JSON, min_size=1, max_size=2).map(good.__or__)))
    def check(manifest: Any) -> None:
        path.write_text(json.dumps(manifest))
        assert_result_or_one_line(lambda: use(run))

    check()
    for text in [b"", b"\xff", b"[" * 100_000, b'{"a":' * 100_000, b"1" * 5000, b'"\\ud800"', b"{}"]:
        path.write_bytes(text)
        with pytest.raises(InputError):
            open_runs(run)
    path.write_text(json.dumps({**good, "files": {"no table": {"part-000001-000002.parquet": 1}}}))
    assert_result_or_one_line(lambda: use(run))
    for key in good:
        path.write_text(json.dumps({name: value for name, value in good.items() if name != key}))
        assert_result_or_one_line(lambda: use(run))
    path.write_text(json.dumps(good))


@pytest.mark.slow
def test_damaged_parquet(run: Path):
    """Read in another process with little memory, because a crash would end this one."""
    script = f"from tests.test_fuzz import damage_and_read; damage_and_read({str(run)!r})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=CODE)
    assert done.returncode == 0, done.stderr
    outcomes = json.loads(done.stdout)
    assert sum(outcomes.values()) == NUM_DAMAGED
    assert min(outcomes["read"], outcomes["refused"]) > 3


def damage_and_read(run: str) -> None:
    """Damage copies of ``run`` in many ways, and read each.

    The counts of successful and refused reads are printed.
    """
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
    outcomes: Counter[str] = Counter()
    for seed in range(NUM_DAMAGED):
        rng = random.Random(seed)
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(shutil.copytree(run, Path(folder, "run")))
            damage(rng, rng.choice(sorted(copy.glob("*/*.parquet"))))
            if rng.random() < 0.5:
                forget_rows(copy / "run.json")
            _, refusal = attempt(lambda copy=copy: read_tables(copy))
            assert "\n" not in refusal
            outcomes["refused" if refusal else "read"] += 1
    print(json.dumps(outcomes))


def read_tables(run: Path) -> None:
    runs = open_runs(run)
    for table in TABLES:
        runs.sql(f"select * from {table}")
    for stem in ("entropy_by_position", "stage_dynamics", "ablation_final", "defects_over_steps"):
        runs.query(stem)


def forget_rows(path: Path) -> None:
    """Remove the key ``files`` from a manifest."""
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != "files"}))


def damage(rng: random.Random, path: Path) -> None:
    """Change bytes of a Parquet file or parts of its table.

    The parts are columns, types, values, and metadata.
    """
    data = bytearray(path.read_bytes())
    if rng.random() < 0.4:
        footer = len(data) - int.from_bytes(data[-8:-4], "little") - 8
        for _ in range(rng.choice([1, 3, 20])):
            data[rng.randrange(rng.choice([0, footer]), len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
    elif rng.random() < 0.2:
        place = rng.randrange(len(data))
        path.write_bytes(rng.choice([data[:place], data[place:], data + data[:place]]))
    else:
        pq.write_table(change_table(rng, pq.read_table(path)), path)


def change_table(rng: random.Random, table: pa.Table) -> pa.Table:
    """Change one column of ``table``, its rows, or its metadata."""
    i = rng.randrange(table.num_columns)
    field = table.schema.field(i)
    number = rng.choice([float("nan"), float("inf"), -3.4e38, 0.0])
    values: list[Any] = [number if pa.types.is_floating(field.type) else -(2**31)] * table.num_rows
    kind = rng.choice(TYPES)
    changes: list[Callable[[], pa.Table]] = [
        lambda: table.remove_column(i),
        lambda: table.rename_columns([f"{name}\0" if j == i else name for j, name in enumerate(table.column_names)]),
        lambda: table.set_column(i, field.name, pa.nulls(table.num_rows, kind)),
        lambda: table.set_column(i, field.name, table[i].cast(kind)),
        lambda: table.set_column(i, field.name, pa.nulls(table.num_rows, field.type)),
        lambda: table.set_column(i, field.name, pa.array(values, field.type)),
        lambda: table.append_column(field.name, table[i]),
        lambda: table.slice(0, 0),
        lambda: table.replace_schema_metadata({b"entrace_schema_version": rng.choice([b"\xff", b"2"])}),
    ]
    try:
        return rng.choice(changes)()
    except pa.ArrowException:
        return table

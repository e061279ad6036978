"""Test digests of a run's files, their check on opening, and ``entrace verify``."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from zlib import crc32

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from entrace import open_runs
from entrace.analysis import cli
from entrace.analysis.trace import InputError, TraceWriter, digests, read_manifest, write_manifest
from entrace.analysis.trace.digests import DIGESTS, END_BYTES, Digest
from entrace.analysis.trace.parts import check_whole, last_whole_step, read_part
from entrace.analysis.trace.schema import TABLES
from entrace.analysis.trace.verify import accept_edits, verify_run
from entrace.analysis.trace.writer import write_part
from tests.analysis.conftest import VOCAB, step_row, write_tiny

FROZEN = Path(__file__).parents[1] / "fixtures" / "frozen" / "none-seed0"
# ``write_tiny`` writes no prompts.
WRITTEN = [name for name in TABLES if name != "prompts"]
ONE, TWO = Digest("1" * 64, 1, "00000001"), Digest("2" * 64, 2)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return write_tiny(tmp_path / "tiny")


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """Write a run whose file of tokens is too large to be read when it is opened."""
    writer = TraceWriter.create(tmp_path / "large", {"run_id": "large", "total_steps": 1}, VOCAB)
    rows, rng = 40_000, np.random.default_rng(0)
    writer.append("steps", step_row(1, entropy=1.0, accuracy=0.5))
    floats = {
        column.name: rng.random(rows, np.float32) for column in TABLES["tokens"].columns if column.type == pa.float32()
    }
    ids = {"rollout_id": np.arange(rows) // 100, "position": np.arange(rows) % 100, "prompt_id": "p"}
    columns = {"step": 1, "response_length": 100, "token_id": 0, "is_correct": True, "is_kept": True}
    writer.append("tokens", {**columns, **ids, **floats})
    writer.flush(1)
    writer.finish()
    assert part(tmp_path / "large", "tokens").stat().st_size > 2 * END_BYTES
    return tmp_path / "large"


def part(run_dir: Path, table: str) -> Path:
    return next((run_dir / table).glob("*.parquet"))


def flip(path: Path, offset: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1 << bit
    path.write_bytes(data)


def states(run_dir: Path) -> list[tuple[str, str]]:
    return [(finding.state, finding.file) for finding in verify_run(run_dir).findings]


def test_a_line_is_json_with_the_sha256_of_the_file(run_dir: Path):
    entries = [json.loads(line) for line in (run_dir / DIGESTS).read_text().splitlines()]
    names = {path.relative_to(run_dir).as_posix() for path in run_dir.glob("*/*.parquet")}
    assert {entry["file"] for entry in entries} == {*names, "run.json"}
    for entry in entries:
        if entry["file"] != "run.json":
            data = (run_dir / entry["file"]).read_bytes()
            footer = data[-8 - int.from_bytes(data[-8:-4], "little") :]
            assert (entry["size"], entry["sha256"]) == (len(data), sha256(data).hexdigest())
            assert entry["footer"] == f"{crc32(footer):08x}"
    assert entries[-1]["sha256"] == sha256((run_dir / "run.json").read_bytes()).hexdigest()


def test_any_digest_since_the_last_removal_counts(tmp_path: Path):
    digests.append(tmp_path, {"a": ONE, "b": ONE})
    digests.append(tmp_path, {"a": TWO, "b": None})
    assert digests.read(tmp_path).files == {"a": (ONE, TWO), "b": ()}
    assert digests.read(tmp_path).is_removed("b")
    digests.append(tmp_path, {"b": TWO})
    assert digests.read(tmp_path).of("b") == (TWO,)
    assert digests.read(tmp_path).of("c") == ()


def test_every_torn_last_line_is_ignored_and_removed_by_the_next_append(tmp_path: Path):
    digests.append(tmp_path, {"a": ONE})
    first = (tmp_path / DIGESTS).read_bytes()
    digests.append(tmp_path, {"b": ONE})
    whole = (tmp_path / DIGESTS).read_bytes()
    for length in range(len(first), len(whole)):
        (tmp_path / DIGESTS).write_bytes(whole[:length])
        assert digests.read(tmp_path) == digests.Recorded({"a": (ONE,)})
        digests.append(tmp_path, {"b": ONE})
        assert (tmp_path / DIGESTS).read_bytes() == whole


def test_every_flipped_bit_of_the_digests_is_noticed(tmp_path: Path):
    digests.append(tmp_path, {"a": ONE, "b": TWO})
    whole = (tmp_path / DIGESTS).read_bytes()
    for offset in range(len(whole)):
        for bit in range(8):
            (tmp_path / DIGESTS).write_bytes(whole)
            flip(tmp_path / DIGESTS, offset, bit)
            recorded = digests.read(tmp_path)
            assert recorded.damage, (offset, bit)
            assert recorded.of("a") == recorded.of("b") == ()
    digests.append(tmp_path, {"c": ONE})
    assert digests.read(tmp_path).damage == "1 damaged of 3 lines, the first is line 2"


def test_damaged_digests_are_reported_and_do_not_stop_a_reader(run_dir: Path):
    lines = (run_dir / DIGESTS).read_bytes().splitlines(keepends=True)
    (run_dir / DIGESTS).write_bytes(b"".join(lines[:2]) + bytes(len(lines[2])) + b"".join(lines[3:]))
    runs = open_runs(run_dir)
    assert runs.sql("select count(*) from tokens").item() > 0
    assert runs.notes["tiny"].endswith(f"digests.jsonl is damaged; see entrace verify {run_dir}")
    assert states(run_dir) == [("damaged", DIGESTS)]
    assert verify_run(run_dir).without_digest == 6


def test_an_intact_run_verifies(run_dir: Path):
    found = verify_run(run_dir)
    assert (found.run, found.findings, found.without_digest) == ("tiny", [], 0)
    assert found.files == len(list(run_dir.glob("*/*.parquet"))) + 2
    assert open_runs(run_dir, verify=True).sql("select count(*) from steps").item() > 0


@pytest.mark.parametrize("table", WRITTEN)
def test_opening_notices_every_change_of_a_small_file(run_dir: Path, table: str):
    path = part(run_dir, table)
    assert path.stat().st_size <= END_BYTES
    for offset in range(8, path.stat().st_size, path.stat().st_size // 25):
        flip(path, offset)
        for verify in (False, True):
            with pytest.raises(InputError, match=rf"tiny/{table}/part-.*; (restore|remove) it") as caught:
                open_runs(run_dir, verify=verify)
            assert "\n" not in str(caught.value)
        flip(path, offset)
    open_runs(run_dir, verify=True)


def test_opening_notices_the_footer_and_the_size_of_a_large_file(large: Path):
    path = part(large, "tokens")
    data = path.read_bytes()
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    for offset in range(footer, len(data), 97):
        flip(path, offset)
        with pytest.raises(InputError, match=r"large/tokens/part-.*; restore it"):
            open_runs(large)
        flip(path, offset)
    path.write_bytes(data[:100] + data[116:])
    with pytest.raises(InputError, match=r"it differs from its digest in digests\.jsonl"):
        open_runs(large)


def test_duckdb_does_not_verify_page_checksums_and_pyarrow_does(large: Path):
    """If this fails, DuckDB has learned to, and docs/reliability.md should say so."""
    path = part(large, "tokens")
    column = pq.ParquetFile(path).metadata.row_group(0).column(TABLES["tokens"].arrow_schema.names.index("entropy"))
    scan = f"select sum(entropy) from read_parquet('{path}')"
    before = duckdb.sql(scan).fetchall()
    # Within the values of the last page: measured floats hardly compress, so the page still decompresses.
    found = []
    for step in range(1, 40):
        offset = (column.data_page_offset or 0) + column.total_compressed_size - 40 * step
        flip(path, offset)
        try:
            found.append(duckdb.sql(scan).fetchall() == before)
        except duckdb.Error:
            found.append(None)
        with pytest.raises(InputError, match=r"damaged or truncated Parquet file .*CRC checksum verification failed"):
            read_part(path, ["entropy"])
        flip(path, offset)
    assert found.count(False) > 10


def test_verification_notices_what_opening_cannot(large: Path):
    path = part(large, "tokens")
    flip(path, path.stat().st_size // 2)
    open_runs(large)
    assert states(large) == [("damaged", f"tokens/{path.name}")]
    with pytest.raises(
        InputError, match=r"^damaged: run large: table tokens: .*part-.*: damaged, .*; restore it, or go"
    ):
        open_runs(large, verify=True)
    assert last_whole_step(large, read_manifest(large))[0] == 0
    (large / DIGESTS).unlink()
    with pytest.raises(InputError, match="CRC checksum verification failed"):
        check_whole(path, TABLES["tokens"])


def test_nan_from_damage_names_the_file(large: Path):
    path = part(large, "tokens")
    runs = open_runs(large)
    rows = pq.read_table(path)
    at = rows.column_names.index("entropy")
    pq.write_table(rows.set_column(at, rows.schema.field(at), pa.array(np.full(len(rows), np.nan, np.float32))), path)
    with pytest.raises(InputError, match=r"tokens/part-.*: damaged, or edited by hand .*; restore it, or go back to"):
        runs.sql("select avg(entropy) from tokens")


def test_a_query_that_fails_on_damage_names_the_file(large: Path):
    path = part(large, "tokens")
    data = bytearray(path.read_bytes())
    data[4:-20_000] = bytes(len(data) - 20_004)
    path.write_bytes(data)
    runs = open_runs(large)
    with pytest.raises(InputError, match=rf"^{path}: damaged, .*; restore it, or go back to the checkpoint before it"):
        runs.sql("select * from tokens")
    with pytest.raises(InputError, match=r"^sql: .*no_such_column"):
        runs.sql("select no_such_column from steps")


def test_a_damaged_or_edited_manifest_is_refused_until_the_edit_is_accepted(run_dir: Path):
    path = run_dir / "run.json"
    text = path.read_text()
    path.write_text(text.replace('"seed": 0', '"seed": 1'))
    with pytest.raises(InputError, match=r"tiny/run.json: damaged, or edited by hand .*; restore it"):
        open_runs(run_dir)
    assert states(run_dir) == [("damaged", "run.json")]
    assert accept_edits(run_dir) == ["run.json"]
    assert open_runs(run_dir, verify=True).sql("select seed from runs").item() == 1
    path.write_text(text)
    assert verify_run(run_dir).findings == []


def test_an_edited_table_is_accepted_and_a_damaged_one_is_not(large: Path):
    path = part(large, "tokens")
    flip(path, path.stat().st_size // 2)
    with pytest.raises(InputError, match="CRC checksum verification failed"):
        accept_edits(large)
    rows = pq.read_table(path)
    pq.write_table(rows, path)
    with pytest.raises(InputError, match="edited by hand"):
        open_runs(large)
    assert accept_edits(large) == [f"tokens/{path.name}"]
    open_runs(large, verify=True)


FINDINGS: dict[str, tuple[Callable[[Path], object], list[tuple[str, str]]]] = {
    "lost file": (lambda run: part(run, "evals").unlink(), [("missing", "evals/{evals}")]),
    "lost intervention": (
        lambda run: part(run, "interventions").unlink(),
        [("missing", "interventions/{interventions}")],
    ),
    "folder removed": (lambda run: shutil.rmtree(run / "interventions"), [("removed", "interventions")]),
    "table removed": (lambda run: shutil.rmtree(run / "tokens"), [("removed", "tokens")]),
    "leftover": (
        lambda run: (run / "steps" / "part-000099-000099.parquet").touch(),
        [("unlisted", "steps/part-000099-000099.parquet")],
    ),
    "notes": (lambda run: (run / "notes.txt").touch(), [("unlisted", "notes.txt")]),
    "temporary file": (lambda run: (run / "steps" / ".part-000099-000099.parquet.tmp").touch(), []),
}


@pytest.mark.parametrize("case", FINDINGS)
def test_what_is_absent_or_additional_is_listed(run_dir: Path, case: str):
    change, expected = FINDINGS[case]
    names = {table: part(run_dir, table).name for table in WRITTEN}
    change(run_dir)
    assert states(run_dir) == [(state, file.format(**names)) for state, file in expected]


def test_a_file_that_was_removed_on_purpose_is_accepted(run_dir: Path):
    """Only files that no step needs are accepted; listed files stay missing."""
    name = f"interventions/{write_interventions(run_dir).name}"
    (run_dir / name).unlink()
    [finding] = verify_run(run_dir).findings
    assert (finding.state, finding.file) == ("missing", name)
    assert finding.message.endswith(
        "missing; repeat the command that made it, or accept that it was removed with entrace verify --accept-edits"
    )
    assert accept_edits(run_dir) == [name]
    [finding] = verify_run(run_dir).findings
    assert (finding.state, finding.table, finding.is_fault) == ("removed", "interventions", False)
    assert accept_edits(run_dir) == []
    assert write_interventions(run_dir).name in name
    assert verify_run(run_dir).findings == []
    part(run_dir, "tokens").unlink()
    assert accept_edits(run_dir) == []
    assert [state for state, _ in states(run_dir)] == ["missing"]


def write_interventions(run_dir: Path) -> Path:
    path = run_dir / "interventions" / "later.parquet"
    write_part(path, "interventions", pq.read_table(part(run_dir, "interventions")).to_pydict(), {})
    return path


def test_a_file_may_be_replaced_after_its_new_digest_is_recorded(run_dir: Path, tmp_path: Path):
    """A process killed between the two steps leaves an intact run.

    See ``digests.append``.
    """
    path = part(run_dir, "tokens")
    pq.write_table(pq.read_table(path), tmp_path / "new.parquet")
    digests.append(run_dir, {f"tokens/{path.name}": digests.digest_of(tmp_path / "new.parquet")})
    open_runs(run_dir, verify=True)
    os.replace(tmp_path / "new.parquet", path)
    open_runs(run_dir, verify=True)


def test_a_file_written_later_has_a_digest(run_dir: Path):
    rows = pq.read_table(part(run_dir, "interventions")).to_pydict()
    write_part(run_dir / "interventions" / "later.parquet", "interventions", rows, {})
    assert len(digests.read(run_dir).of("interventions/later.parquet")) == 1
    flip(run_dir / "interventions" / "later.parquet", 100)
    assert states(run_dir) == [("damaged", "interventions/later.parquet")]


def test_a_manifest_may_be_written_again(run_dir: Path):
    write_manifest(run_dir, {**read_manifest(run_dir), "arm": "ppl"})
    assert verify_run(run_dir).findings == []


def test_checkpoints_are_checked_by_their_checksums(run_dir: Path):
    folder = run_dir / "checkpoints" / "step-000002"
    (folder / "policy").mkdir(parents=True)
    files = {"state.json": b"{}", "policy/model.safetensors": b"weights"}
    for name, data in files.items():
        (folder / name).write_bytes(data)
    checksums = {name: sha256(data).hexdigest() for name, data in files.items()}
    (folder / "checksums.json").write_text(json.dumps(checksums))
    assert states(run_dir) == []
    flip(folder / "policy" / "model.safetensors", 3)
    (folder / "state.json").unlink()
    place = "checkpoints/step-000002"
    assert states(run_dir) == [("damaged", f"{place}/policy/model.safetensors"), ("missing", f"{place}/state.json")]
    (folder / "checksums.json").write_text("[")
    assert ("damaged", f"{place}/checksums.json") in states(run_dir)
    shutil.rmtree(folder)
    assert states(run_dir) == []


def test_files_of_older_traces_are_decoded(tmp_path: Path):
    run = shutil.copytree(FROZEN, tmp_path / "run")
    found = verify_run(run)
    assert (found.faults, found.without_digest) == ([], len(list(run.glob("*/*.parquet"))))
    assert f"{found.without_digest} of them without a digest" in found.summary
    path = part(run, "tokens")
    path.write_bytes(path.read_bytes()[:200] + bytes(5000) + path.read_bytes()[5200:])
    assert states(run) == [("damaged", f"tokens/{path.name}")]


def call(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object
) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["entrace", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        cli.run(cli.app)
    said = capsys.readouterr()
    return int(stopped.value.code or 0), said.out, said.err


def test_the_command(run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    code, out, _ = call(monkeypatch, capsys, "verify", run_dir)
    assert (code, out) == (0, "run tiny: intact; read 8 files\n")
    path = part(run_dir, "rollouts")
    flip(path, 50)
    code, out, _ = call(monkeypatch, capsys, "verify", run_dir)
    assert code == 1
    assert out.splitlines()[0].startswith(f"damaged: run tiny: table rollouts: {path}: ")
    assert out.splitlines()[1] == "run tiny: 1 damaged or missing; read 7 files"
    code, out, _ = call(monkeypatch, capsys, "verify", run_dir, "--json")
    result = json.loads(out)
    assert (code, result["is_intact"], result["runs"][0]["findings"][0]["file"]) == (1, False, f"rollouts/{path.name}")
    code, _, err = call(monkeypatch, capsys, "verify", run_dir / "nowhere")
    assert (code, err.count("\n")) == (2, 1)

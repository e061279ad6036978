"""Test that error messages are one complete line with a useful hint.

This includes errors of libraries.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from entrace.analysis.claims import load_ledger
from entrace.analysis.trace import TABLES, InputError, Lexicon, TraceWriter, in_one_line, nearest, read_manifest
from entrace.analysis.trace.errors import with_kind
from entrace.analysis.trace.parts import check_part
from entrace.analysis.trace.schema import check_version


def undecodable(data: bytes) -> UnicodeDecodeError:
    with pytest.raises(UnicodeDecodeError) as caught:
        data.decode()
    return caught.value


@pytest.mark.parametrize(
    ("error", "kind", "line"),
    [
        (ValueError("bad"), "ValueError: ", "bad"),
        (ValueError("\n bad \nmore"), "ValueError: ", "bad"),
        (MemoryError(), "", "MemoryError"),
        (KeyError("model_type"), "KeyError: ", "no key 'model_type'"),
        (ValueError("one of:\n (1) a file,\n (2) a class"), "ValueError: ", "one of: (1) a file, (2) a class"),
        (ValueError("nothing follows:\n"), "ValueError: ", "nothing follows"),
        (undecodable(b"ok \xf0"), "UnicodeDecodeError: ", "byte 0xf0 at offset 3 is not UTF-8"),
    ],
)
def test_a_library_error_becomes_one_complete_line(error: Exception, kind: str, line: str):
    assert in_one_line(error) == line
    assert with_kind(error) == f"{kind}{line}"


def test_an_announced_list_is_cut_in_its_middle():
    line = in_one_line(ValueError("sizes differ:\n" + "\n".join(f"weight {i}" for i in range(500))))
    assert len(line) == 500
    assert line.startswith("sizes differ: weight 0 weight 1 ")
    assert line.endswith(" weight 499")


def test_a_hint_without_options_is_empty():
    assert nearest("x", []) == ""
    assert nearest("stag", ["stage", "runs"]) == '; did you mean "stage"?'
    assert nearest("x", ["stage", "runs"]) == "; valid: runs, stage"
    assert nearest("x", ["stage", "runs"], "found") == "; found: runs, stage"
    assert nearest("reward", ["accuracy_reward", "prob"]) == '; did you mean "accuracy_reward"?'
    assert nearest("prompt", ["prob_delta", "step"]) == "; valid: prob_delta, step"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff{}", "run.json: not JSON (byte 0xff at offset 0 is not UTF-8)"),
        (b"[1]", "run.json: expected an object, found [1]; not the manifest of a trace"),
        (b"{}", "run.json: schema_version is missing; not the manifest of a trace"),
        (b'{"schema_version": null}', "run.json: schema_version is null; not the manifest of a trace"),
        (b'{"schema_version": "two"}', "run.json: schema_version two, this version of entrace reads 1 to 2"),
        (b'{"schema_version": 3}', "reads 1 to 2; upgrade entrace to read newer traces"),
    ],
)
def test_a_manifest_that_cannot_be_read(tmp_path: Path, content: bytes, message: str):
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_manifest(tmp_path)
    assert str(caught.value).endswith(message)


def test_an_upgrade_is_advised_where_it_helps():
    with pytest.raises(InputError, match=r"^x 0, this version of entrace reads 1 to 2$"):
        check_version("x", 0)


@pytest.mark.parametrize(("manifest", "state"), [({}, "missing"), ({"run_id": None}, "null")])
def test_a_writer_needs_a_run_id(tmp_path: Path, manifest: dict[str, Any], state: str):
    with pytest.raises(InputError, match=f"^manifest: run_id is {state}; name the run$"):
        TraceWriter.create(tmp_path / "run", manifest, ["a"])


CLAIM = '[S4]\nquestion = "q"\ntest = "t"\nfigure = "f"\n'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("S4 = 1", "claim S4: expected a table with question, test, figure, parts; found 1"),
        (CLAIM, 'claim S4: "parts" is missing'),
        (CLAIM + 'parts = "all"', "claim S4, parts: expected a table; found 'all'"),
        (CLAIM.replace('"q"', '""') + "[S4.parts]", 'claim S4: "question" is empty'),
        (CLAIM.replace("S4", "S44") + "[S44.parts]", 'unknown claim "S44"; did you mean "S4"?'),
        ("\xff", "not a ledger (byte 0xff at offset 0 is not UTF-8)"),
    ],
)
def test_a_ledger_that_cannot_be_read(tmp_path: Path, content: str, message: str):
    path = tmp_path / "ledger.toml"
    path.write_text(content, encoding="latin-1")
    with pytest.raises(InputError) as caught:
        load_ledger(path)
    assert str(caught.value) == f"{path}: {message}"


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda path: path.mkdir(), "is a directory; name a file"),
        (lambda path: path.write_bytes(b"\xff"), "not TOML (byte 0xff at offset 0 is not UTF-8)"),
        (lambda path: path.write_text("special = 'a'"), "special is 'a', expected a list of words"),
    ],
)
def test_a_lexicon_that_cannot_be_read(tmp_path: Path, prepare: Callable[[Path], None], message: str):
    path = tmp_path / "lexicon.toml"
    prepare(path)
    with pytest.raises(InputError) as caught:
        Lexicon.load(path)
    assert str(caught.value) == f"{path}: {message}"


def test_a_file_without_a_schema_version_is_named(tiny_path: Path, tmp_path: Path):
    path = tmp_path / "steps" / "part-000001-000024.parquet"
    path.parent.mkdir()
    pq.write_table(pq.read_table(next((tiny_path / "steps").iterdir())).replace_schema_metadata(None), path)
    with pytest.raises(InputError, match=r"no schema version in its metadata \(entrace_schema_version\)"):
        check_part(path, TABLES["steps"])

"""Import dumps into a temporary folder."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from entrace.analysis.importers import run
from entrace.analysis.importers.collect import collect
from entrace.analysis.importers.dump import Dump
from entrace.analysis.importers.settings import ImportSettings
from entrace.analysis.importers.tokenizer import TokenizerFile
from entrace.analysis.trace.errors import TEMPORARY
from entrace.analysis.trace.places import reaching, to_place


@contextmanager
def as_traces(
    dumps: list[str], format_name: str | None = None, tokenizer: Path | None = None
) -> Iterator[tuple[list[Path], list[str]]]:
    """Yield the folders of traces with the recorded values of dumps, each imported alone, and remarks about them.

    Args:
        dumps: Folders, files, or URLs.
        format_name: Format of all dumps (default: detected).
        tokenizer: ``tokenizer.json`` or its folder (default: texts that the dumps hold).

    Raises:
        InputError: a dump cannot be imported.
    """
    settings = ImportSettings()
    codec = TokenizerFile(tokenizer) if tokenizer else None
    folders, remarks = [], []
    with tempfile.TemporaryDirectory(prefix=TEMPORARY) as temporary:
        for i, dump in enumerate(dumps):
            with reaching(dump):
                found = Dump.find([to_place(dump)], format_name)
                name = to_place(dump).stem or "dump"
                folder = Path(temporary, f"{name}-{i}" if i else name)
                with collect(found, settings, codec) as read:
                    run.record(read, settings, folder, codec=codec)
                    remarks += [f"{dump}: {remark}" for remark in read.remarks]
            folders.append(folder)
        yield folders, remarks

"""Import dumps into a temporary folder."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path

from entrace.analysis.importers import run
from entrace.analysis.importers.codec import Codec
from entrace.analysis.importers.collect import Collected, OnRead, collect
from entrace.analysis.importers.dump import Dump
from entrace.analysis.importers.settings import ImportSettings
from entrace.analysis.trace.errors import TEMPORARY
from entrace.analysis.trace.places import reaching, to_place


@contextmanager
def as_traces(
    dumps: list[str],
    format_name: str | None = None,
    codec: Codec | None = None,
    *,
    keep: Callable[[str, Collected, str], None] | None = None,
    reading: Callable[[str], AbstractContextManager[OnRead]] = lambda name: nullcontext(lambda share, rows: None),
) -> Iterator[tuple[list[Path], list[str]]]:
    """Yield the trace folders of dumps, each imported alone, and remarks.

    The traces hold the recorded values of the dumps.

    Args:
        dumps: Folders, files, or URLs.
        format_name: Format of all dumps (default: detected).
        codec: Tokenizer (default: texts that the dumps hold).
        keep: Called with the run id, the rollouts, and the dump, for a model that will read the prompts.
        reading: Show the progress of one dump; see ``terminal.progress.reading``.

    Raises:
        InputError: a dump cannot be imported.
    """
    settings = ImportSettings()
    folders, remarks = [], []
    with tempfile.TemporaryDirectory(prefix=TEMPORARY) as temporary:
        for i, dump in enumerate(dumps):
            with reaching(dump):
                found = Dump.find([to_place(dump)], format_name)
                name = to_place(dump).stem or "dump"
                folder = Path(temporary, f"{name}-{i}" if i else name)
                with ExitStack() as stack:
                    with reading(name) as on_read:
                        read = stack.enter_context(
                            collect(found, settings, codec, has_model=keep is not None, on_read=on_read)
                        )
                    if keep:
                        keep(folder.name, read, dump)
                    run.record(read, settings, folder, codec=codec)
                    remarks += [f"{dump}: {remark}" for remark in read.remarks]
            folders.append(folder)
        yield folders, remarks

"""Define and write traces, without importing torch or the trainer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from entrace._lazy import names_from

if TYPE_CHECKING:
    from entrace.analysis.trace.defects import find_defects
    from entrace.analysis.trace.errors import InputError, in_one_line, nearest, reason_of
    from entrace.analysis.trace.lexicon import CATEGORIES, Lexicon
    from entrace.analysis.trace.manifest import MANIFEST, describe_machine, flatten, read_manifest, write_manifest
    from entrace.analysis.trace.recorder import Recorder
    from entrace.analysis.trace.schema import SCHEMA_VERSION, TABLES, Column, Table
    from entrace.analysis.trace.vocabulary import Vocabulary
    from entrace.analysis.trace.writer import TraceWriter

__all__ = [
    "CATEGORIES",
    "MANIFEST",
    "SCHEMA_VERSION",
    "TABLES",
    "Column",
    "InputError",
    "Lexicon",
    "Recorder",
    "Table",
    "TraceWriter",
    "Vocabulary",
    "describe_machine",
    "find_defects",
    "flatten",
    "in_one_line",
    "nearest",
    "read_manifest",
    "reason_of",
    "write_manifest",
]

__getattr__ = names_from(
    __name__,
    {
        "find_defects": "entrace.analysis.trace.defects",
        "InputError": "entrace.analysis.trace.errors",
        "in_one_line": "entrace.analysis.trace.errors",
        "nearest": "entrace.analysis.trace.errors",
        "reason_of": "entrace.analysis.trace.errors",
        "CATEGORIES": "entrace.analysis.trace.lexicon",
        "Lexicon": "entrace.analysis.trace.lexicon",
        "MANIFEST": "entrace.analysis.trace.manifest",
        "describe_machine": "entrace.analysis.trace.manifest",
        "flatten": "entrace.analysis.trace.manifest",
        "read_manifest": "entrace.analysis.trace.manifest",
        "write_manifest": "entrace.analysis.trace.manifest",
        "Recorder": "entrace.analysis.trace.recorder",
        "SCHEMA_VERSION": "entrace.analysis.trace.schema",
        "TABLES": "entrace.analysis.trace.schema",
        "Column": "entrace.analysis.trace.schema",
        "Table": "entrace.analysis.trace.schema",
        "Vocabulary": "entrace.analysis.trace.vocabulary",
        "TraceWriter": "entrace.analysis.trace.writer",
    },
)

"""The trace contract and its writer. Imports neither torch nor anything of the trainer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from analysis.lazy import names_from

if TYPE_CHECKING:
    from analysis.trace.defects import find_defects
    from analysis.trace.errors import InputError, in_one_line, nearest, reason_of
    from analysis.trace.lexicon import CATEGORIES, Lexicon
    from analysis.trace.manifest import MANIFEST, describe_machine, flatten, read_manifest, write_manifest
    from analysis.trace.schema import SCHEMA_VERSION, TABLES, Column, Table
    from analysis.trace.vocabulary import Vocabulary
    from analysis.trace.writer import TraceWriter

__all__ = [
    "CATEGORIES",
    "MANIFEST",
    "SCHEMA_VERSION",
    "TABLES",
    "Column",
    "InputError",
    "Lexicon",
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
        "find_defects": "analysis.trace.defects",
        "InputError": "analysis.trace.errors",
        "in_one_line": "analysis.trace.errors",
        "nearest": "analysis.trace.errors",
        "reason_of": "analysis.trace.errors",
        "CATEGORIES": "analysis.trace.lexicon",
        "Lexicon": "analysis.trace.lexicon",
        "MANIFEST": "analysis.trace.manifest",
        "describe_machine": "analysis.trace.manifest",
        "flatten": "analysis.trace.manifest",
        "read_manifest": "analysis.trace.manifest",
        "write_manifest": "analysis.trace.manifest",
        "SCHEMA_VERSION": "analysis.trace.schema",
        "TABLES": "analysis.trace.schema",
        "Column": "analysis.trace.schema",
        "Table": "analysis.trace.schema",
        "Vocabulary": "analysis.trace.vocabulary",
        "TraceWriter": "analysis.trace.writer",
    },
)

"""The trace contract and its writer. Imports neither torch nor anything of the trainer."""

from analysis.trace.defects import find_defects
from analysis.trace.errors import InputError, nearest
from analysis.trace.lexicon import CATEGORIES, Lexicon
from analysis.trace.manifest import MANIFEST, describe_machine, read_manifest, write_manifest
from analysis.trace.schema import SCHEMA_VERSION, TABLES, Column, Table
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
    "describe_machine",
    "find_defects",
    "nearest",
    "read_manifest",
    "write_manifest",
]

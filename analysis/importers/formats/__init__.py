"""List the formats of dumps, the more specific ones first."""

from __future__ import annotations

from entrace.analysis.importers.formats import (
    exports,
    nemo_rl,
    open_instruct,
    openai,
    rows,
    swift,
    traces,
    trl,
    verl,
)

FORMATS = {
    module.FORMAT.name: module.FORMAT
    for module in (exports, traces, nemo_rl, open_instruct, swift, trl, verl, openai, rows)
}

"""End a chaos command: print its tally, write it, and exit with 1 if anything failed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, NoReturn


def conclude(result: dict[str, Any], table: str, out: Path | None) -> NoReturn:
    """Print ``table``, write ``result`` to the JSON file ``out``, and exit.

    Args:
        result: The tally; its entry ``failures`` is empty if all went well.
        table: The tally as text.
        out: File to write, or None.
    """
    print(table)
    if out:
        out.write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(1 if result["failures"] else 0)

"""Let tests pass on slow machines."""

import re

# Ends a test that hangs. It does not measure speed: other tests share the cores.
HANG_S = 300.0
# A line of ``Progress``. How many there are depends on how long the work takes.
PROGRESS = re.compile(r".+: \d+/\d+ .*left (\d+:\d\d|\?)")


def without_progress(text: str) -> list[str]:
    """Return the lines of an output, without progress."""
    return [line for line in text.splitlines() if not PROGRESS.fullmatch(line)]

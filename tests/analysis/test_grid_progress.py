import io
import re

import pytest
from rich.console import Console

from entrace.analysis.terminal import grid_progress
from entrace.analysis.terminal.grid_progress import GridProgress, clock, makespan

RUNS = {"none-0": ("none", 10), "ppl-0": ("ppl", 10), "none-1": ("none", 10), "ppl-1": ("ppl", 10)}


@pytest.fixture
def at(monkeypatch):
    """Return a function that sets the time in seconds."""
    seconds = [0.0]
    monkeypatch.setattr(grid_progress.time, "monotonic", lambda: seconds[0])
    return lambda value: seconds.__setitem__(0, value)


def rows(progress):
    text = io.StringIO()
    Console(width=100, file=text).print(progress.table())
    return [re.split(r"\s{2,}", line.strip()) for line in text.getvalue().splitlines() if line.strip()]


def test_the_table_has_one_row_per_arm(at):
    progress = GridProgress("study", RUNS)
    for seconds in range(6):
        at(100 + 2 * seconds)
        progress.update("none-0", seconds, accuracy=0.1 * seconds)
        progress.update("ppl-0", seconds, accuracy=0.3)
    progress.end("ppl-0", "out of memory")
    progress.update("none-1", 0)
    table = rows(progress)
    assert table[0] == ["study"]
    assert table[2] == ["none", "2", "5/10 0/10", "0.500"]
    assert table[3] == ["ppl", "1", "1", "0.300"]
    # At 2 s per step, none-0 (5 steps left) and none-1 (10) use two slots; ppl-1 (10) follows in the first free one.
    assert table[4] == ["time left 0:30"]


def test_time_left_uses_the_pace_of_observed_steps(at):
    """A resumed run counts from its first new step; runs that were kept do not count."""
    progress = GridProgress("study", RUNS)
    progress.end("none-0", None)
    progress.update("ppl-0", 0)
    assert progress.seconds_left() is None
    at(50)
    progress.update("ppl-0", 6)
    at(53)
    progress.update("ppl-0", 7)
    assert progress.seconds_left() == pytest.approx(3 * (3 + 10 + 10))
    progress.end("none-1", "killed")
    assert progress.seconds_left() == pytest.approx(3 * (3 + 10))


def test_without_a_terminal_progress_is_plain_lines(at, capsys):
    with GridProgress("study", RUNS) as progress:
        progress.end("none-0", None)
        at(1)
        progress.update("ppl-0", 1, accuracy=0.5)
        at(21)
        progress.update("ppl-0", 2, accuracy=0.5)
    assert capsys.readouterr().err == "study: 12/40 ppl-0 step 2 accuracy 0.500 left 9:20\n"


def test_on_a_terminal_the_table_is_drawn(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with GridProgress("study", RUNS) as progress:
        assert capsys.readouterr().err == ""
        progress.update("ppl-0", 3, accuracy=0.25)
    assert re.search(r"ppl +1 +1 +3/10 +0.250", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("seconds", "slots", "expected"),
    [([], 3, 0), ([5], 3, 5), ([5, 5, 5, 5], 1, 20), ([5, 5, 5], 2, 10), ([9, 2, 3, 4], 2, 9), ([1, 1, 9], 2, 10)],
)
def test_makespan_fills_the_first_free_slot(seconds, slots, expected):
    assert makespan(seconds, slots) == expected


def test_clock():
    assert [clock(59.9), clock(61), clock(3723)] == ["0:59", "1:01", "1:02:03"]

import os
import shutil
import signal
import sys

import pytest

from entrace.analysis import figures
from entrace.analysis.cli import run
from entrace.trainer.cli import app

# Modules that take longest, the longest first: a long module that starts last leaves the other processes idle.
LONG = (
    "pages",
    "ablate_command",
    "distributed",
    "report",
    "methods",
    "server",
    "ablate",
    "train",
    "storage",
    "kill",
    "own_methods",
    "docs",
    "faults",
    "sandbox",
    "trl",
    "claims",
    "calibration",
    "hostile",
    "update",
    "cli",
    "audit_model",
    "runs",
    "figures",
    "import",
    "compare",
    "sampling",
    "trace_nulls",
    "trace_values",
    "entropy_laws",
    "layering",
    "tasks_verifiers",
    "step_graph",
    "policy",
    "capture",
    "batched",
)

# Triton asks once, when it is imported: without a GPU, its kernels are interpreted.
if not shutil.which("nvidia-smi"):
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ranks = {f"test_{name}": rank for rank, name in enumerate(LONG)}
    items.sort(key=lambda item: ranks.get(item.path.stem, len(LONG)))


@pytest.fixture
def heard_ctrl_c():
    """Handle Ctrl-C, which background processes may inherit as ignored."""
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, former)


@pytest.fixture
def few_figures(monkeypatch: pytest.MonkeyPatch):
    """Let a report hold three figures, for tests of something else than figures."""
    monkeypatch.setattr(figures, "STEMS", ["stage_dynamics", "entropy_by_position", "paired_differences"])


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]):
    """Return a function that runs ``entrace ARGS`` in this process.

    The function returns exit code, stdout bytes, and stderr text.
    """

    def call(*args: str) -> tuple[int, bytes, str]:
        monkeypatch.setattr(sys, "argv", ["entrace", *args])
        with pytest.raises(SystemExit) as stop:
            run(app)
        captured = capfdbinary.readouterr()
        code = stop.value.code
        return code if isinstance(code, int) else -1, captured.out, captured.err.decode()

    return call

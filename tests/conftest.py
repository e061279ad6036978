import sys

import pytest

from analysis.cli import app, run


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]):
    """Runs ``entrace ARGS`` in this process; returns exit code, stdout bytes and stderr text."""

    def call(*args: str) -> tuple[int, bytes, str]:
        monkeypatch.setattr(sys, "argv", ["entrace", *args])
        with pytest.raises(SystemExit) as stop:
            run(app)
        captured = capfdbinary.readouterr()
        code = stop.value.code
        return code if isinstance(code, int) else -1, captured.out, captured.err.decode()

    return call

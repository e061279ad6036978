"""Test that a folder is filled completely or not at all.

The process may die at any time, and the same command then fills the folder.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from entrace.analysis.trace.staging import PARTIAL, is_interrupted, staged

EVENTS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.listdir", "os.scandir"}
EARLIER = {"a": "0", "b": "0", "c": "0", "page": "0", "README": "mine"}
NEW = {"a": "1", "b": "1", "d": "1", "page": "1"}


def fill(out: Path) -> None:
    with staged(out, last="page", replaces=["a", "b", "c", "d"]) as folder:
        for name, text in NEW.items():
            (folder / name).write_text(text)


def contents(out: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in out.iterdir() if path.is_file()}


def kill_at_every_event(folder: str, has_earlier: str) -> None:
    """Fill one folder per file-system event, and kill the process at this event.

    Prints the number of events.
    """
    for event in range(1, 200):
        out = Path(folder) / str(event)
        if has_earlier == "True":
            out.mkdir()
            for name, text in EARLIER.items():
                (out / name).write_text(text)
        if (child := os.fork()) == 0:
            seen = 0

            def watch(name: str, arguments: tuple) -> None:
                nonlocal seen
                if name in EVENTS and folder in str(arguments[0]):
                    seen += 1
                    if seen == event:  # noqa: B023
                        os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(watch)
            fill(out)
            os._exit(0)
        if os.waitpid(child, 0)[1] == 0:
            print(event - 1)
            return


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
@pytest.mark.parametrize("has_earlier", [False, True])
def test_a_folder_is_complete_or_marked_at_every_moment(tmp_path: Path, has_earlier: bool):
    code = "from tests.analysis.test_staging import kill_at_every_event as run; import sys; run(*sys.argv[1:])"
    command = [sys.executable, "-c", code, str(tmp_path), str(has_earlier)]
    num_events = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert num_events > 10
    before, after = (EARLIER, NEW | {"README": "mine"}) if has_earlier else ({}, NEW)
    for out in (tmp_path / str(event) for event in range(1, num_events + 1)):
        found = contents(out) if out.exists() else {}
        assert found in (before, after) or is_interrupted(out)
        # The page of the new files shows that all of them are there.
        assert found.get("page") != "1" or found == after
        fill(out)
        assert contents(out) == after
        assert not is_interrupted(out)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_the_folder_as_it_was(tmp_path: Path, error: type[BaseException]):
    def write_half(out: Path) -> None:
        with staged(out, last="page", replaces=["a"]) as folder:
            (folder / "a").write_text("half")
            (folder / "sub").mkdir()
            raise error

    def fail(out: Path) -> None:
        with pytest.raises(error):
            write_half(out)

    fail(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    fill(tmp_path / "out")
    fail(tmp_path / "out")
    assert contents(tmp_path / "out") == NEW
    assert not is_interrupted(tmp_path / "out")
    # What a killed attempt left stays marked.
    (tmp_path / "out" / "page").unlink()
    (tmp_path / "out" / PARTIAL).mkdir()
    fail(tmp_path / "out")
    assert is_interrupted(tmp_path / "out")


def test_ctrl_c_while_files_move_ends_after_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    replace, calls = Path.replace, []

    def interrupted(self: Path, target: Path) -> Path:
        calls.append(self.name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fill(tmp_path / "out")
    assert contents(tmp_path / "out") == NEW
    assert not is_interrupted(tmp_path / "out")


@pytest.mark.skipif(not shutil.which("bash"), reason="bash limits the size of files")
def test_a_fault_names_the_folder_the_reason_and_a_remedy(tmp_path: Path):
    code = (
        "import sys; from pathlib import Path; from entrace.analysis.trace.errors import describe_fault\n"
        "from entrace.analysis.trace.staging import staged\n"
        f"out = Path({str(tmp_path / 'out')!r})\n"
        "try:\n    with staged(out, last='page') as folder: (folder / 'page').write_bytes(bytes(100_000))\n"
        "except OSError as error: print(describe_fault(error))\n"
    )
    command = ["bash", "-c", 'ulimit -f 8; "$@"', "bash", sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"{tmp_path / 'out'}: file too large; allow larger files (ulimit -f)\n"
    assert not (tmp_path / "out").exists()

"""Test runs and reports in remote storages.

The storages are fsspec's memory, and S3 as a local server of moto.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

import entrace
from entrace.analysis.trace import InputError
from entrace.analysis.trace.connection import guard
from entrace.analysis.trace.errors import StorageError
from entrace.analysis.trace.lock import acquire_lock
from entrace.analysis.trace.places import to_place
from entrace.analysis.trace.verify import check_run
from tests.patience import HANG_S
from tests.slow import slow_after

FROZEN = Path(__file__).parents[1] / "fixtures" / "frozen" / "none-seed0"


def upload(folder: Path, url: str) -> str:
    """Copy a folder to a URL, and return the URL."""
    for path in folder.rglob("*"):
        if path.is_file():
            place = to_place(f"{url}/{path.relative_to(folder)}")
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(path.read_bytes())
    return url


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """Start a server of S3 on loopback, and return a URL of a bucket."""
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        fsspec.filesystem("s3").mkdir("bucket")
        yield "s3://bucket"
    server.stop()
    fsspec.filesystem("s3").clear_instance_cache()


@pytest.fixture(scope="module", params=slow_after(1, ["s3", "memory"]))
def storage(request: pytest.FixtureRequest) -> str:
    return request.getfixturevalue("s3") if request.param == "s3" else "memory:/"


@pytest.fixture
def root(storage: str) -> str:
    return f"{storage}/{uuid.uuid4().hex}"


@pytest.fixture(scope="module")
def study(storage: str) -> str:
    """Store a study for tests that only read it."""
    upload(FROZEN, f"{storage}/shared/study/none-seed0")
    return f"{storage}/shared/study"


@pytest.fixture
def url(study: str) -> str:
    return f"{study}/none-seed0"


def test_a_remote_run_gives_the_answers_of_a_local_one(url: str, study: str):
    local = entrace.open_runs(FROZEN)
    parent = study.removesuffix("/study")
    for path in (url, study, f"{parent}/stud*", f"{parent}/*/none-*"):
        runs = entrace.open_runs(path)
        assert list(runs.manifests) == list(local.manifests)
    assert runs.query("entropy_by_position").equals(local.query("entropy_by_position"))
    text = "select step, sum(entropy) from tokens group by step order by step"
    assert runs.sql(text).equals(local.sql(text))


def test_a_local_and_a_remote_run_open_together(url: str, tiny_path: Path):
    runs = entrace.open_runs([url, tiny_path])
    assert runs.sql("select count(distinct run_id) from tokens").item() == 2


@pytest.mark.parametrize("query", slow_after(1, ["select * from read_text('{}')", "select * from read_parquet('{}')"]))
def test_queries_reach_no_other_file_of_the_storage(url: str, root: str, query: str):
    other = upload(FROZEN / "steps", f"{root}/other")
    runs = entrace.open_runs(url)
    for path in (f"{other}/part-000001-000010.parquet", f"{other}/*"):
        with pytest.raises(InputError, match=r"disabled by configuration|not allowed|can read|only the tables"):
            runs.sql(query.format(path))


def test_damage_is_found_in_a_remote_file(url: str, root: str, tiny_path: Path):
    check_run(to_place(upload(tiny_path, f"{root}/tiny")))
    place = next(iter(to_place(f"{root}/tiny/tokens").glob("*.parquet")))
    data = bytearray(place.read_bytes())
    data[100] ^= 1
    place.write_bytes(bytes(data))
    with pytest.raises(InputError, match=r"tokens/part-.*digest"):
        entrace.open_runs(f"{root}/tiny")


@pytest.mark.usefixtures("few_figures")
def test_a_report_is_written_to_a_storage_and_replaced(root: str, command: Callable, tmp_path: Path):
    from tests.analysis.conftest import write_steps

    run = write_steps(tmp_path / "run")
    for _ in range(2):
        code, out, err = command("report", str(run), "--out", f"{root}/report")
        assert (code, out.decode()) == (0, f"report: {root}/report/report.html\n"), err
    names = {place.name for place in to_place(f"{root}/report").iterdir()}
    assert {"report.html", "claims.json", "stage_dynamics.png"} <= names
    assert "none" in to_place(f"{root}/report/report.html").read_text()
    upload(FROZEN / "steps", f"{root}/other")
    code, _, err = command("report", str(run), "--out", f"{root}/other")
    assert (code, err.count("\n"), "other than a report" in err) == (2, 1, True)


def test_what_cannot_be_reached_is_one_line(s3: str, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(InputError, match=r"^s3://no-such-bucket/run: (no such|not a trace)"):
        entrace.open_runs("s3://no-such-bucket/run")
    with pytest.raises(InputError, match=r'^nowhere://x: no storage is called "nowhere"'):
        entrace.open_runs("nowhere://x")
    with pytest.raises(InputError, match=r"^memory://nothing: no such folder$"):
        entrace.open_runs("memory://nothing")
    with pytest.raises(InputError, match=r"^gs://bucket/run: .*pip install 'entrace\[remote\]'$"):
        entrace.open_runs("gs://bucket/run")


def test_credentials_and_connections_are_one_line(s3: str):
    """Use another process, because s3fs keeps its configuration."""

    def run(**environment: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "entrace", "sql", "s3://bucket/run", "select 1"]
        base = {"PATH": "/usr/bin", "AWS_EC2_METADATA_DISABLED": "true", "AWS_CONFIG_FILE": "/nowhere"}
        return subprocess.run(command, env={**base, **environment}, capture_output=True, text=True, timeout=HANG_S)

    done = run(AWS_ENDPOINT_URL="http://127.0.0.1:9")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("entrace: s3://bucket/run: no credentials; set those of the storage")
    keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_MAX_ATTEMPTS": "1"}
    done = run(AWS_ENDPOINT_URL="http://127.0.0.1:9", **keys)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "Could not connect" in done.stderr


class Breaking(MemoryFileSystem):
    """A storage in memory whose connection breaks after a number of requests."""

    protocol = "breaking"
    store: ClassVar[dict] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    requests, left = 0, sys.maxsize
    error: Exception = ConnectionError("connection reset by peer")

    @classmethod
    def _strip_protocol(cls, path):
        return MemoryFileSystem._strip_protocol(str(path).replace("breaking://", "memory://"))

    def unstrip_protocol(self, name):
        return f"breaking://{name.lstrip('/')}"

    def _ask(self, name, *args, **options):
        cls = type(self)
        cls.requests, cls.left = cls.requests + 1, cls.left - 1
        if cls.left < 0:
            raise cls.error
        return getattr(super(), name)(*args, **options)

    def _open(self, *args, **options):
        return self._ask("_open", *args, **options)

    def info(self, *args, **options):
        return self._ask("info", *args, **options)

    def ls(self, *args, **options):
        return self._ask("ls", *args, **options)

    def mv(self, *args, **options):
        return self._ask("mv", *args, **options)

    def rm(self, *args, **options):
        return self._ask("rm", *args, **options)


@pytest.fixture(scope="module")
def breaking() -> str:
    fsspec.register_implementation("breaking", Breaking, clobber=True)
    upload(FROZEN, "breaking://bucket/run")
    to_place("breaking://bucket/dump.jsonl").write_text(
        "".join(
            json.dumps({"prompt": str(n), "response_ids": [n, 1], "logprob": [-1.5, -0.1], "reward": n % 2}) + "\n"
            for n in range(600)
        )
    )
    return "breaking://bucket"


@pytest.mark.filterwarnings("ignore:UPath")
@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("verify", ConnectionError("connection reset by peer")),
        ("audit", OSError("read timed out")),
        ("import", TimeoutError()),
    ],
)
def test_a_connection_that_breaks_midway_is_one_line(breaking, name, error, command, tmp_path, monkeypatch):
    """The error must not blame a missing or damaged file."""
    arguments = {
        "verify": ["verify", f"{breaking}/run"],
        "audit": ["audit", f"{breaking}/dump.jsonl"],
        "import": ["import", f"{breaking}/dump.jsonl", "--out", str(tmp_path / "run")],
    }[name]
    monkeypatch.setattr(Breaking, "error", error)
    monkeypatch.setattr(Breaking, "requests", 0)
    assert command(*arguments)[0] in (0, 1)
    total = Breaking.requests
    assert total > 10
    for share in (0, 0.2, 0.5, 0.8, 0.95):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        with monkeypatch.context() as broken:
            broken.setattr(Breaking, "left", int(share * total))
            code, out, err = command(*arguments)
        *before, last = err.splitlines()
        assert (code, out) == (2, b""), (share, err)
        assert last.startswith("entrace: breaking://"), err
        assert not [line for line in before if "damaged" in line or "no such" in line]


@pytest.mark.filterwarnings("ignore:UPath")
@pytest.mark.usefixtures("few_figures")
def test_a_connection_that_breaks_while_writing_keeps_the_earlier_report(breaking, command, tmp_path, monkeypatch):
    from tests.analysis.conftest import write_steps

    run, report = write_steps(tmp_path / "run"), f"{breaking}/report"
    monkeypatch.setattr(Breaking, "requests", 0)
    assert command("report", str(run), "--out", report)[0] == 0
    total = Breaking.requests

    def contents() -> dict[str, bytes]:
        """Leave out the mark of a report that is being written."""
        places = [place for place in to_place(report).iterdir() if place.is_file() and not place.name.startswith(".")]
        return {place.name: place.read_bytes() for place in places}

    before = contents()
    for share in (0.1, 0.4):
        with monkeypatch.context() as broken:
            broken.setattr(Breaking, "left", int(share * total))
            code, _, err = command("report", str(run), "--out", report)
        assert (code, err.splitlines()[-1].startswith("entrace: breaking://bucket")) == (2, True), err
        assert contents() == before
    assert command("report", str(run), "--out", report)[0] == 0


def test_a_server_that_stops_while_a_run_is_open_is_one_line():
    """The client of S3 gives up after its own retries."""
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    options = {"endpoint_url": f"http://{host}:{port}", "key": "key", "secret": "secret"}
    storage = fsspec.filesystem(
        "s3", skip_instance_cache=True, **options, config_kwargs={"retries": {"max_attempts": 1}}
    )
    storage.retries = 1
    guard(storage)
    storage.mkdir("stopped")
    storage.pipe_file("stopped/file", b"content" * 1000)
    with storage.open("stopped/file", "rb", block_size=64) as file:
        assert file.read(7) == b"content"
        server.stop()
        with pytest.raises(StorageError, match=r"^s3://stopped/file: "):
            file.read()
    with pytest.raises(StorageError, match=r"^s3://stopped/file: "):
        storage.exists("stopped/file")


def test_recording_refuses_a_remote_folder():
    with pytest.raises(InputError, match=r"^memory://run: a run is recorded and changed on a local disk only"):
        acquire_lock(Path("memory://run"), waits=False)


@pytest.mark.parametrize(
    "arguments", [("prune", "URL", "--token-steps", "2"), ("prune", "URL", "--token-steps", "2", "--dry-run")]
)
def test_a_remote_run_is_not_changed(arguments: tuple[str, ...], command: Callable, tiny_path: Path):
    url = upload(tiny_path, f"memory://unchanged-{arguments[0]}{len(arguments)}/tiny")
    code, _, err = command(*(url if word == "URL" else word for word in arguments))
    assert (code, err) == (
        2,
        f"entrace: {url}: a run is recorded and changed on a local disk only; copy it there or from there\n",
    )

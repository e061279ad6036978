"""Test that public functions refuse arguments of wrong types in one clear line."""

import inspect
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import pandas as pd
import polars as pl
import pytest

import entrace
from entrace.analysis.queries import Questions
from entrace.analysis.trace.arguments import checked

FROZEN = Path(__file__).parent / "fixtures" / "frozen" / "none-seed0"
FUNCTIONS = [
    entrace.open_runs,
    entrace.Runs.sql,
    entrace.Runs.stream,
    entrace.Runs.query,
    entrace.Runs.why_no_rows,
    entrace.Runs.view,
    Questions,
    entrace.figures.draw,
    entrace.judge,
    entrace.load_ledger,
    entrace.compare,
    entrace.write_report,
    entrace.Recorder,
    entrace.Recorder.record,
    entrace.Recorder.record_eval,
    entrace.Recorder.has_eval,
    entrace.Recorder.close,
    entrace.TraceWriter.create,
    entrace.TraceWriter.resume,
    entrace.TraceWriter.append,
    entrace.TraceWriter.end_step,
    entrace.TraceWriter.flush,
    entrace.TraceWriter.finish,
    entrace.Vocabulary,
    entrace.Vocabulary.of,
    entrace.TokenWeights,
    entrace.load_config,
    entrace.train,
    entrace.shaping,
    entrace.objective,
]
TYPED = [
    (function, name)
    for function in FUNCTIONS
    for name, parameter in inspect.signature(function).parameters.items()
    if parameter.annotation not in ("Any", parameter.empty) and parameter.kind not in (parameter.VAR_KEYWORD,)
]


class Other:
    """A value of none of the types that public functions take."""


@pytest.mark.parametrize(("function", "name"), TYPED, ids=lambda value: getattr(value, "__qualname__", value))
def test_every_typed_parameter_is_checked(function, name):
    if inspect.signature(function).parameters[name].kind is inspect.Parameter.POSITIONAL_ONLY:
        given, named = (Other(),), {}
    else:
        given, named = (), {name: Other()}
    place = function.__qualname__
    with pytest.raises(entrace.InputError, match=rf"^{place}: {name}: expected .+, found a value of type Other"):
        function(*given, **named)


@pytest.fixture(scope="module")
def runs():
    return entrace.open_runs(FROZEN)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda runs: entrace.open_runs(3), "open_runs: paths: expected str | Path | Iterable[str | Path], found 3"),
        (lambda runs: entrace.open_runs([FROZEN, None]), "found [PosixPath("),
        (lambda runs: entrace.open_runs(""), "open_runs: paths: expected str | Path | Iterable[str | Path], found ''"),
        (lambda runs: entrace.open_runs(FROZEN, questions=""), "questions: expected str | Path | None, found ''"),
        (lambda runs: entrace.open_runs(FROZEN, buffers="1GB"), "buffers: expected int, found '1GB'"),
        (lambda runs: runs.sql(None), "Runs.sql: text: expected str, found None"),
        (lambda runs: runs.sql("select 1", "a"), "params: expected Mapping[str, Any] | None, found 'a'"),
        (lambda runs: runs.sql("select 1", timeout="soon"), "timeout: expected float | None, found 'soon'"),
        (lambda runs: runs.query(["entropy_laws"]), "stem: expected str, found ['entropy_laws']"),
        (lambda runs: runs.view("tall"), "Runs.view: height: expected int, found 'tall'"),
        (
            lambda runs: entrace.judge("path"),
            "judge: runs: expected Runs, found 'path'; open runs with entrace.open_runs",
        ),
        (lambda runs: entrace.judge(runs, "claims.toml"), "ledger: expected Ledger | None, found 'claims.toml'"),
        (lambda runs: entrace.compare([runs]), "compare: runs: expected Runs, found [Runs("),
        (lambda runs: entrace.compare(runs, True), "compare: accuracy: expected float | None, found True"),
        (lambda runs: entrace.figures.stage_dynamics("path"), "draw: runs: expected Runs, found 'path'"),
        (lambda runs: entrace.figures.stage_dynamics(runs, 3), "draw: ax: expected Axes | None, found 3"),
        (lambda runs: entrace.write_report(runs, ""), "write_report: out: expected str | Path, found ''"),
        (lambda runs: entrace.write_report(runs, "out", 3), "on_step: expected Callable[[int, str], None] | None"),
        (lambda runs: entrace.load_config("tiny", "steps=3"), "overrides: expected Sequence[str], found 'steps=3'"),
        (lambda runs: entrace.load_config("tiny", "steps=3"), "; write ['steps=3']"),
        (
            lambda runs: entrace.load_config("tiny", {"steps": 3}),
            "overrides: expected Sequence[str], found {'steps': 3}",
        ),
        (lambda runs: entrace.load_config("tiny", [3]), "overrides: expected Sequence[str], found [3]"),
        (lambda runs: entrace.load_config(None), "load_config: path: expected str | Path, found None"),
        (lambda runs: entrace.load_config(""), "load_config: path: expected str | Path, found ''"),
        (lambda runs: entrace.load_ledger(3), "load_ledger: path: expected str | Path | None, found 3"),
        (lambda runs: entrace.train("tiny", "out"), "config: expected Config, found 'tiny'; read a config with"),
        (lambda runs: entrace.Recorder("", ["a"]), "Recorder: run_dir: expected Path | str, found ''"),
        (lambda runs: entrace.Recorder("run", 3), "Recorder: vocab: expected"),
        (lambda runs: entrace.Recorder("run", "abc"), "Recorder: vocab: expected"),
        (lambda runs: entrace.Recorder("run", ["a"], flush_every=2.5), "flush_every: expected int, found 2.5"),
        (lambda runs: entrace.Recorder("run", ["a"], entropy_kind="exakt"), "entropy_kind: expected Literal"),
        (lambda runs: entrace.TraceWriter.create("", {}, []), "TraceWriter.create: run_dir: expected"),
        (lambda runs: entrace.Vocabulary("abc"), "Vocabulary: texts: expected list[str], found 'abc'"),
        (lambda runs: entrace.shaping(3), "shaping: function: expected Callable[..., Any] | None, found 3"),
        (lambda runs: runs.questions[3], 'unknown question "3"'),
        (lambda runs: entrace.figures.draw("stage_dynamic", runs), 'unknown figure "stage_dynamic"; did you mean'),
    ],
)
def test_a_wrong_argument_is_one_line(runs, tmp_path, monkeypatch, call, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(entrace.InputError) as raised:
        call(runs)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not any(tmp_path.iterdir())


def test_numbers_and_arrays_of_libraries_are_taken():
    @checked
    def take(
        whole: "int" = 0,
        real: "float" = 0.0,
        flag: "bool" = False,
        texts: "Sequence[str]" = (),
        paths: "str | Path | Iterable[str | Path]" = "",
    ) -> "list[object]":
        return [whole, real, flag, texts, paths]

    for whole in (1, np.int64(1)):
        assert take(whole)[0] == 1
    for real in (1, 1.5, np.float32(1.5)):
        assert take(real=real)[1] == real
    assert take(flag=np.bool_(True))[2]
    for texts in (["a", "b"], ("a", "b"), np.array(["a", "b"]), pl.Series(["a", "b"]), pd.Series(["a", "b"])):
        assert list(take(texts=texts)[3]) == ["a", "b"]
        assert list(take(paths=texts)[4]) == ["a", "b"]
    # What can be read only once is left unread.
    assert list(take(paths=iter(["a", "b"]))[4]) == ["a", "b"]
    for wrong in (
        {"whole": 1.5},
        {"whole": True},
        {"real": "1"},
        {"flag": 1},
        {"texts": "a"},
        {"texts": [1]},
        {"paths": ""},
    ):
        with pytest.raises(entrace.InputError, match="take: "):
            take(**wrong)


class Forwarding:
    """Has the members of what it holds."""

    def __init__(self, held):
        self.held = held

    def __getattr__(self, name):
        return getattr(self.held, name)


class Decodes(Protocol):
    def decode(self): ...


def test_a_member_of_a_protocol_may_be_forwarded():
    @checked
    def take(given: "Decodes | int") -> "object":
        return given

    for given in (b"text", Forwarding(b"text"), 1):
        assert take(given) is given
    for wrong in ("text", Forwarding("text")):
        with pytest.raises(entrace.InputError, match=r"take: given: expected Decodes \| int"):
            take(wrong)


def test_a_size_of_memory_may_be_a_float(runs):
    assert runs.sql("select 1 as one", memory=1e9)["one"].to_list() == [1]
    for memory in (float("nan"), float("inf")):
        with pytest.raises(entrace.InputError, match=f"memory: {memory} is not a size"):
            runs.sql("select 1", memory=memory)


def test_a_missing_argument_is_the_error_of_python():
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'paths'"):
        entrace.open_runs()
    with pytest.raises(TypeError, match="unexpected keyword argument 'path'"):
        entrace.open_runs(path="run")

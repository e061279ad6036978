"""Write a report on one page that opens offline.

The page has figures with their data, the scorecard, and provenance.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
from collections import deque
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from entrace.analysis import claims, figures, queries
from entrace.analysis.compare import compare_once
from entrace.analysis.runs import Runs
from entrace.analysis.terminal.export import to_csv_digits, to_json, to_report_csv
from entrace.analysis.terminal.interrupt import POLL_INTERVAL_S
from entrace.analysis.trace.arguments import checked
from entrace.analysis.trace.errors import InputError
from entrace.analysis.trace.manifest import flatten
from entrace.analysis.trace.places import check_folder, reaching, to_place
from entrace.analysis.trace.plain import plain
from entrace.analysis.trace.staging import is_interrupted, staged

if TYPE_CHECKING:
    import polars as pl
    from markupsafe import Markup
    from matplotlib.figure import Figure

    from entrace.analysis.statistics.stages import StageFit

PAGE, CLAIMS = "report.html", "claims.json"
MARK = '<meta name="generator" content="entrace report">'
TEMPLATES = Path(__file__).with_name("templates")
SCRIPT = "report.js"
METRICS = ("avg_at_k", "maj_at_k", "pass_at_k", "response_length", "entropy")
# CSV file of each frame of a comparison.
COMPARED = {
    "differences": "comparison.csv",
    "by_seed": "comparison_by_seed.csv",
    "aggregates": "comparison_aggregates.csv",
}
# Facts of a run that the page shows beside its configuration.
FACTS = ("study", "model", "task", "git_commit", "hardware", "versions", "token_sampling")
# Tables with more runs are folded.
FEW = 12
# Longest name or error, and longest text of several lines, in characters.
CELL_LENGTH, SOURCE_LENGTH = 1000, 20_000
# Palette size of a picture.
COLORS = 64
# Entries to leave out, so that equal data give equal bytes.
STAMPS: dict[str, dict[str, Any]] = {"png": {"Software": None}, "pdf": {"CreationDate": None, "Producer": None}}
# A picture is compressed once, after its palette is known.
SAVE_OPTIONS: dict[str, dict[str, Any]] = {"png": {"pil_kwargs": {"compress_level": 0}}}
LAYOUT_TABLES = ("GSUB", "GPOS", "GDEF", "kern", "BASE", "JSTF", "MATH")


@checked
def write_report(runs: Runs, out: str | Path, on_step: Callable[[int, str], None] | None = None) -> Path:
    """Write a report: a page, figures with their data, and the scorecard.

    The files are ``report.html``, figures (PNG, PDF) with their CSV files, ``claims.json``, and the comparison.

    Args:
        runs: Runs to report on.
        out: Folder that is new, empty, or holds an earlier report, which is replaced.
        on_step: Called with the number of finished parts (of ``num_parts``) and the name of the last part.

    Returns:
        Path of the page.

    Raises:
        InputError: ``out`` holds something other than a report.
    """
    out = to_place(out)
    with reaching(out):
        check_target(out, PAGE, MARK)
    check_questions(runs)
    stems = _stems(runs)
    replaces = [f"{stem}.{form}" for stem in stems for form in STAMPS] + list(COMPARED.values())
    with staged(out, last=PAGE, replaces=replaces) as folder:
        _write_parts(runs, stems, folder, on_step or (lambda done, name: None))
    return out / PAGE


def check_questions(runs: Runs) -> None:
    """Refuse faults of a user's folder that show without rows of the traces.

    Raises:
        InputError: DuckDB rejects the SQL, CSV cannot represent a column, a figure cannot be imported, or a claim names
            a column that its SQL lacks.
    """
    for stem in runs.questions.own:
        schema = runs.columns(stem)
        with runs.questions.named(stem):
            to_report_csv(schema.to_frame().clear(1))
    for stem in runs.questions.figures:
        figures.figure_module(stem, runs.questions)
    claims.check(runs, claims.load_ledger(questions=runs.questions))


def _stems(runs: Runs) -> list[str]:
    """Return the questions of the report; those of the user's folder come last."""
    return [*figures.STEMS, *runs.questions.own]


def _write_parts(runs: Runs, stems: list[str], out: Path, on_step: Callable[[int, str], None]) -> None:
    done = count(1)
    sections: dict[str, dict[str, Any]] = {}

    def write(stems: Collection[str]) -> None:
        with _asked_ahead(runs, stems) as frames:
            for stem, frame in zip(stems, frames, strict=True):
                sections[stem] = _write_section(runs, stem, frame, out)
                on_step(next(done), stem)

    # The user's own SQL and figures may fail, so they precede the long work.
    write(runs.questions.own)
    scorecard = claims.scorecard(claims.judge(runs))
    (out / CLAIMS).write_text(to_json(scorecard) + "\n", encoding="utf-8")
    on_step(next(done), CLAIMS)
    comparison = _write_comparison(runs, out)
    on_step(next(done), COMPARED["differences"])
    write(figures.STEMS)
    page = render(
        "report.html.jinja",
        mark=MARK,
        title=f"entrace report: {_title(runs)}",
        num_runs=len(runs.manifests),
        comparison=comparison,
        provenance=_provenance(runs),
        final=_final_table(runs.ask("ablation_final")),
        scorecard=scorecard,
        sections=[sections[stem] for stem in stems],
    )
    (out / PAGE).write_text(page, encoding="utf-8")
    on_step(num_parts(runs), PAGE)


def num_parts(runs: Runs) -> int:
    """Return the number of parts: questions, claims, comparison, and page."""
    return len(_stems(runs)) + 3


def check_target(out: Path, page: str = PAGE, mark: str = MARK) -> None:
    """Refuse a target that holds something other than a report, or an unfinished one.

    Args:
        out: The folder.
        page: Name of the page of an earlier report.
        mark: Text that the page holds.

    Raises:
        InputError: ``out`` is a file or lies below one, or is a folder with other files.
    """
    check_folder(out)
    found = out / page
    if is_interrupted(out):
        return
    if out.exists() and any(out.iterdir()) and not (found.is_file() and mark.encode() in found.read_bytes()):
        kind = "a report" if page == PAGE else f"an {Path(page).stem}"
        raise InputError(f"{out}: holds files other than {kind}; choose a new or an empty folder")


@contextmanager
def _asked_ahead(runs: Runs, stems: Collection[str]) -> Iterator[Iterator[pl.DataFrame]]:
    """Yield the rows of each question.

    While the caller draws one figure, the next questions are answered.
    """
    with ThreadPoolExecutor(1) as pool:
        asked = deque(pool.submit(_rows, runs, stem) for stem in stems)

        def frames() -> Iterator[pl.DataFrame]:
            while asked:
                # A signal that the other thread receives does not end a wait, hence the polls.
                while not asked[0].done():
                    wait(asked, POLL_INTERVAL_S, FIRST_COMPLETED)
                yield asked.popleft().result()

        try:
            yield frames()
        finally:
            while running := [future for future in asked if not (future.cancel() or future.done())]:
                # An interrupt between two batches of rows has no effect, hence the repetition.
                runs.stop()
                wait(running, POLL_INTERVAL_S)


def _rows(runs: Runs, stem: str) -> pl.DataFrame:
    """Return the rows of a question, with those that only its figure has."""
    return figures.query(runs, stem) if stem in figures.stems(runs) else figures.rows(runs, stem)


def _write_section(runs: Runs, stem: str, frame: pl.DataFrame, out: Path) -> dict[str, Any]:
    """Write the rows and the figure of a question, and return its page section.

    The rows are a CSV file, and the figure has all formats. A user's question may have no figure.
    """
    has_figure = stem in figures.stems(runs)
    (out / f"{stem}.csv").write_text(to_report_csv(frame), encoding="utf-8")
    image = None
    if has_figure and figures.is_drawable(frame):
        # Sums over threads differ in their last digits, and equal data must give equal bytes.
        for form, data in picture_files(figures.drawn(runs, stem, to_csv_digits(frame))).items():
            (out / f"{stem}.{form}").write_bytes(data)
            image = base64.b64encode(data).decode() if form == "png" else image
    text = runs.questions.read(stem)
    return {
        "stem": stem,
        "file": runs.questions.location(stem),
        "question": queries.headers(text)["question"],
        "caption": figures.caption(runs, stem),
        "image": image,
        "lacks": runs.why_empty(stem) if has_figure or frame.is_empty() else f"the folder has no figure {stem}.py",
        "sql": text,
    }


def picture_files(drawn: AbstractContextManager[Figure]) -> dict[str, bytes]:
    """Return the bytes of a figure by format; ``drawn`` is from ``figures.drawn``."""
    import matplotlib as mpl

    files = {}
    with drawn as figure, _without_layout_tables():
        # All formats have the layout of the picture: a layout takes longer than a drawing.
        if layout := figure.get_layout_engine():
            layout.execute(figure)
        mpl.rcParams["figure.constrained_layout.use"] = False
        figure.set_layout_engine(None)
        for form, stamps in STAMPS.items():
            buffer = io.BytesIO()
            figure.savefig(buffer, format=form, metadata=stamps, **SAVE_OPTIONS.get(form, {}))
            files[form] = _shrink(buffer) if form == "png" else buffer.getvalue()
    return files


@contextmanager
def _without_layout_tables() -> Iterator[None]:
    """Embed fonts without the tables that place glyphs.

    PDF viewers ignore these tables, and subsetting them is slow.
    """
    from fontTools import subset

    load_font = subset.load_font

    def load_without(*arguments: Any, **options: Any) -> Any:
        font = load_font(*arguments, **options)
        for table in LAYOUT_TABLES:
            if table in font:
                del font[table]
        return font

    subset.load_font = load_without
    try:
        yield
    finally:
        subset.load_font = load_font


def _shrink(png: io.BytesIO) -> bytes:
    """Return the picture with a palette, at a quarter of the bytes."""
    from PIL import Image

    smaller = io.BytesIO()
    Image.open(png).convert("RGB").quantize(COLORS, dither=Image.Dither.NONE).save(smaller, "PNG", optimize=True)
    return smaller.getvalue()


def _final_table(frame: pl.DataFrame) -> list[dict[str, Any]]:
    """Return one row per run and benchmark, failed runs included."""
    rows: dict[tuple[str, str | None], dict[str, Any]] = {}
    for entry in frame.iter_rows(named=True):
        row = rows.setdefault((entry["run_id"], entry["benchmark"]), {**entry, "metrics": dict.fromkeys(METRICS)})
        if entry["metric"]:
            row["metrics"][entry["metric"]] = (entry["value"], entry["low"], entry["high"])
    return list(rows.values())


def _write_comparison(runs: Runs, out: Path) -> dict[str, Any] | None:
    """Write the CSV files of the comparison and return its rows.

    The result is None without a baseline or another arm.
    """
    comparison = compare_once(runs)
    for frame, name in COMPARED.items():
        if comparison is not None:
            (out / name).write_text(to_report_csv(getattr(comparison, frame)), encoding="utf-8")
    if comparison is None:
        return None
    return {
        "primary": comparison.differences.filter(is_primary=True).to_dicts(),
        "further": comparison.differences.filter(is_primary=False).to_dicts(),
        "aggregates": comparison.aggregates.to_dicts(),
        "unpaired": comparison.unpaired.to_dicts(),
        "files": list(COMPARED.values()),
    }


def _provenance(runs: Runs) -> dict[str, Any]:
    """Return how the runs were made.

    One run of the baseline is described in full, and every other run by its differences.
    """
    manifests = runs.manifests
    of_baseline = (run for run, manifest in manifests.items() if manifest.get("arm") == runs.baseline)
    first = next(of_baseline, next(iter(manifests)))
    facts = {run: {name: manifest.get(name) for name in FACTS} for run, manifest in manifests.items()}
    # A fact that a failed run did not record is not a difference.
    recorded = {
        run: {name: value for name, value in facts[run].items() if value is not None}
        | flatten(manifest.get("config") or {})
        for run, manifest in manifests.items()
    }
    return {
        "run_id": first,
        **facts[first],
        "config": json.dumps(manifests[first].get("config", {}), indent=2, sort_keys=True),
        "unknown": [f"{name}: {reason}" for name, reason in (manifests[first].get("unknown") or {}).items()],
        "runs": [
            {
                **{name: manifest.get(name) for name in ("arm", "seed", "status", "error", "total_steps")},
                **{name: manifest.get(name) for name in ("started_at", "finished_at")},
                "run_id": run,
                "steps": manifest.get("last_durable_step"),
                "fit": runs.stage_fits.get(run),
                "online": _describe_online(manifest, runs.stage_fits.get(run)),
                "changes": _changes(recorded[first], recorded[run]) if manifest.get("config") else [],
            }
            for run, manifest in manifests.items()
        ],
    }


def _describe_online(manifest: dict[str, Any], fit: StageFit | None) -> str:
    """Describe the result of the trainer's plateau detector.

    The text says whether the fitted boundary agrees, and is empty if no detector ran.
    """
    if "plateau_step" not in manifest:
        return ""
    found = manifest["plateau_step"]
    if found is None:
        return "while training, no plateau was detected"
    text = f"while training, the plateau was detected at step {found}"
    if fit is None or fit.boundary is None or fit.low is None or fit.high is None:
        return text
    agrees = fit.low <= found - 1 <= fit.high
    return f"{text}, {'within' if agrees else 'outside'} the interval of the boundary"


def _changes(reference: dict[str, Any], own: dict[str, Any]) -> list[tuple[str, str]]:
    """Return names and values in ``own`` that differ from ``reference``.

    The seed is left out because it has a separate column.
    """
    names = [name for name in {**reference, **own} if name != "seed" and own.get(name) != reference.get(name)]
    return [(name, json.dumps(own[name], ensure_ascii=False) if name in own else "left out") for name in names]


def _title(runs: Runs) -> str:
    names = list(runs.manifests)
    return ", ".join(names) if len(names) <= FEW else f"{len(names)} runs, {names[0]} to {names[-1]}"


def _pairs(value: Any) -> str:
    return ", ".join(f"{name} {entry}" for name, entry in value.items()) if isinstance(value, dict) else str(value)


def _script() -> dict[str, str]:
    """Return the inline script and its hash, the only script that the page allows."""
    text = (TEMPLATES / SCRIPT).read_text(encoding="utf-8")
    return {"script": text, "script_hash": base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}


def render(template: str, **content: Any) -> str:
    """Return a page with the style and the script of all pages."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        finalize=_cell,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": _number, "pairs": _pairs, "source": _source}
    return environment.get_template(template).render(few=FEW, **_script(), **content)


def _cell(value: Any) -> Any:
    """Return a value as the page shows it; markup stays."""
    return plain(value, CELL_LENGTH) if type(value) is str else value


def _source(text: str) -> Markup:
    """Return code or settings, escaped, with their lines."""
    from markupsafe import escape

    lines = text[:SOURCE_LENGTH].split("\n")
    return escape("\n".join(map(plain, lines)) + "…" * (len(text) > SOURCE_LENGTH))


def _number(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"

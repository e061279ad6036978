"""The report: figures, the data behind them, the scorecard and the provenance, on one page that opens offline."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis import claims, figures, queries
from analysis.export import to_report_csv
from analysis.runs import Runs
from analysis.trace.errors import InputError

if TYPE_CHECKING:
    import polars as pl

PAGE, CLAIMS = "report.html", "claims.json"
MARK = '<meta name="generator" content="entrace report">'
TEMPLATES = Path(__file__).with_name("templates")
METRICS = ("avg_at_k", "maj_at_k", "pass_at_k", "response_length", "entropy")
# Without these entries, equal data give equal bytes.
STAMPS: dict[str, dict[str, Any]] = {"png": {"Software": None}, "pdf": {"CreationDate": None, "Producer": None}}
NUM_PARTS = len(figures.MODULES) + 2


def write_report(runs: Runs, out: str | Path, on_step: Callable[[int, str], None] | None = None) -> Path:
    """Writes figures (PNG, PDF), the CSV behind each, ``claims.json`` and ``report.html``.

    Args:
        runs: What to report on.
        out: Folder; new, empty, or holding an earlier report, which is replaced.
        on_step: Called with the number of finished parts (of ``NUM_PARTS``) and the name of the last one.

    Returns:
        The page.

    Raises:
        InputError: ``out`` holds something that is no report.
    """
    out = Path(out)
    _check_target(out)
    out.mkdir(parents=True, exist_ok=True)
    on_step = on_step or (lambda done, name: None)
    verdicts = claims.judge(runs)
    scorecard = {"overall": claims.overall(verdicts), "verdicts": [verdict.to_dict() for verdict in verdicts]}
    (out / CLAIMS).write_text(json.dumps(scorecard, indent=1) + "\n")
    on_step(1, CLAIMS)
    sections = []
    for done, stem in enumerate(figures.MODULES, start=2):
        sections.append(_write_section(runs, stem, out, scorecard))
        on_step(done, stem)
    page = _render(
        mark=MARK,
        runs=[_provenance(runs, run_id) for run_id in runs.manifests],
        final=_final_table(runs.query("ablation_final")),
        scorecard=scorecard,
        sections=sections,
    )
    (out / PAGE).write_text(page, encoding="utf-8")
    on_step(NUM_PARTS, PAGE)
    return out / PAGE


def _check_target(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: is a file; --out names a folder")
    page = out / PAGE
    if out.exists() and any(out.iterdir()) and not (page.is_file() and MARK in page.read_text(encoding="utf-8")):
        raise InputError(f"{out}: holds files that are no report; choose another folder")


def _write_section(runs: Runs, stem: str, out: Path, scorecard: dict[str, Any]) -> dict[str, Any]:
    """Writes one figure in its formats with its CSV, and returns what the page says of it."""
    frame = figures.query(runs, stem)
    (out / f"{stem}.csv").write_text(to_report_csv(frame), encoding="utf-8")
    image = None
    for form in STAMPS:
        (out / f"{stem}.{form}").unlink(missing_ok=True)
    # A run without evaluations has a row in the final table, but nothing to draw.
    drawable = frame.drop_nulls("metric") if "metric" in frame.columns else frame
    if drawable.height:
        for form, data in _draw(stem, drawable).items():
            (out / f"{stem}.{form}").write_bytes(data)
            image = base64.b64encode(data).decode() if form == "png" else image
    text = queries.read(stem)
    return {
        "stem": stem,
        "file": queries.location(stem),
        "question": queries.headers(text)["question"],
        "caption": figures.MODULES[stem].CAPTION,
        "image": image,
        "lacks": "" if image else runs.why_empty(queries.need(stem)),
        "sql": text,
        "verdicts": [verdict for verdict in scorecard["verdicts"] if verdict["figure"] == stem],
    }


def _draw(stem: str, frame: pl.DataFrame) -> dict[str, bytes]:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    files = {}
    with mpl.rc_context(figures.style.RC):
        figure = Figure(figsize=figures.style.SIZE)
        figures.MODULES[stem].draw(frame, figure.subplots())
        for form, stamps in STAMPS.items():
            buffer = io.BytesIO()
            figure.savefig(buffer, format=form, metadata=stamps)
            files[form] = _shrink(buffer) if form == "png" else buffer.getvalue()
    return files


def _shrink(png: io.BytesIO) -> bytes:
    """The same picture with a palette of its own, a third of the size."""
    from PIL import Image

    smaller = io.BytesIO()
    Image.open(png).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(smaller, "PNG", optimize=True)
    return smaller.getvalue()


def _final_table(frame: pl.DataFrame) -> list[dict[str, Any]]:
    """One row per run and benchmark, failed runs included."""
    rows: dict[tuple[str, str | None], dict[str, Any]] = {}
    for entry in frame.iter_rows(named=True):
        row = rows.setdefault((entry["run_id"], entry["benchmark"]), {**entry, "metrics": dict.fromkeys(METRICS)})
        if entry["metric"]:
            row["metrics"][entry["metric"]] = (entry["value"], entry["low"], entry["high"])
    return list(rows.values())


def _provenance(runs: Runs, run_id: str) -> dict[str, Any]:
    manifest = runs.manifests[run_id]
    fit = runs.stage_fits.get(run_id)
    return {
        **{name: manifest.get(name) for name in ("arm", "seed", "study", "status", "error", "model", "task")},
        **{name: manifest.get(name) for name in ("git_commit", "started_at", "finished_at", "total_steps")},
        "run_id": run_id,
        "steps": manifest.get("last_durable_step"),
        "hardware": _pairs(manifest.get("hardware")),
        "versions": _pairs(manifest.get("versions")),
        "config": json.dumps(manifest.get("config", {}), indent=2, sort_keys=True),
        "fit": fit,
    }


def _pairs(value: Any) -> str:
    return ", ".join(f"{name} {entry}" for name, entry in value.items()) if isinstance(value, dict) else str(value)


def _render(**content: Any) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = _number
    return environment.get_template("report.html.jinja").render(content)


def _number(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"

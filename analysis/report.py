"""The report: figures, the data behind them, the scorecard and the provenance, on one page that opens offline."""

from __future__ import annotations

import base64
import io
import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from entrace import figures
from entrace.analysis import claims, queries
from entrace.analysis.runs import Runs
from entrace.analysis.terminal.export import to_json, to_report_csv
from entrace.analysis.trace.errors import InputError
from entrace.analysis.trace.manifest import flatten
from entrace.analysis.trace.plain import plain

if TYPE_CHECKING:
    import polars as pl
    from markupsafe import Markup

    from entrace.analysis.statistics.stages import StageFit

PAGE, CLAIMS = "report.html", "claims.json"
MARK = '<meta name="generator" content="entrace report">'
TEMPLATES = Path(__file__).with_name("templates")
METRICS = ("avg_at_k", "maj_at_k", "pass_at_k", "response_length", "entropy")
# CSV files of a comparison by its frame.
COMPARED = {
    "differences": "comparison.csv",
    "by_seed": "comparison_by_seed.csv",
    "aggregates": "comparison_aggregates.csv",
}
# What is shown of a run apart from its configuration.
FACTS = ("study", "model", "task", "git_commit", "hardware", "versions")
# Tables of more runs are folded.
FEW = 12
# Characters of a name or an error on the page, and of a text with lines of its own.
CELL_LENGTH, SOURCE_LENGTH = 1000, 20_000
# Of a picture's palette.
COLORS = 64
# Without these entries, equal data give equal bytes.
STAMPS: dict[str, dict[str, Any]] = {"png": {"Software": None}, "pdf": {"CreationDate": None, "Producer": None}}
NUM_PARTS = len(figures.MODULES) + 3


def write_report(runs: Runs, out: str | Path, on_step: Callable[[int, str], None] | None = None) -> Path:
    """Writes figures (PNG, PDF), the CSV behind each, ``claims.json``, the comparison of arms and ``report.html``.

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
    (out / CLAIMS).write_text(to_json(scorecard) + "\n", encoding="utf-8")
    on_step(1, CLAIMS)
    comparison = _write_comparison(runs, out)
    on_step(2, COMPARED["differences"])
    sections = []
    for done, stem in enumerate(figures.MODULES, start=3):
        sections.append(_write_section(runs, stem, out, scorecard))
        on_step(done, stem)
    page = _render(
        mark=MARK,
        title=_title(runs),
        num_runs=len(runs.manifests),
        comparison=comparison,
        provenance=_provenance(runs),
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
    if out.exists() and any(out.iterdir()) and not (page.is_file() and MARK.encode() in page.read_bytes()):
        raise InputError(f"{out}: holds files other than a report; choose another folder")


def _write_section(runs: Runs, stem: str, out: Path, scorecard: dict[str, Any]) -> dict[str, Any]:
    """Writes one figure in its formats with its CSV, and returns what the page says of it."""
    frame = figures.query(runs, stem)
    (out / f"{stem}.csv").write_text(to_report_csv(frame), encoding="utf-8")
    image = None
    for form in STAMPS:
        (out / f"{stem}.{form}").unlink(missing_ok=True)
    if figures.is_drawable(frame):
        for form, data in _draw(stem, frame).items():
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
    with mpl.rc_context(figures.style.RC), warnings.catch_warnings():
        # Words and names may hold signs that the font lacks; a box stands for each.
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from font", UserWarning)
        figure = Figure(figsize=figures.size(stem, frame))
        figures.MODULES[stem].draw(frame, figure.subplots())
        for form, stamps in STAMPS.items():
            buffer = io.BytesIO()
            figure.savefig(buffer, format=form, metadata=stamps)
            files[form] = _shrink(buffer) if form == "png" else buffer.getvalue()
    return files


def _shrink(png: io.BytesIO) -> bytes:
    """The same picture with a palette of its own, a quarter of the size."""
    from PIL import Image

    smaller = io.BytesIO()
    Image.open(png).convert("RGB").quantize(COLORS, dither=Image.Dither.NONE).save(smaller, "PNG", optimize=True)
    return smaller.getvalue()


def _final_table(frame: pl.DataFrame) -> list[dict[str, Any]]:
    """One row per run and benchmark, failed runs included."""
    rows: dict[tuple[str, str | None], dict[str, Any]] = {}
    for entry in frame.iter_rows(named=True):
        row = rows.setdefault((entry["run_id"], entry["benchmark"]), {**entry, "metrics": dict.fromkeys(METRICS)})
        if entry["metric"]:
            row["metrics"][entry["metric"]] = (entry["value"], entry["low"], entry["high"])
    return list(rows.values())


def _write_comparison(runs: Runs, out: Path) -> dict[str, Any] | None:
    """Writes the CSV files of the comparison and returns its rows; None if there is no baseline or no other arm."""
    comparison = figures.comparison(runs)
    for frame, name in COMPARED.items():
        (out / name).unlink(missing_ok=True)
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
    """How the runs were made: one of the baseline in full, of every other run only what differs from it."""
    manifests = runs.manifests
    of_baseline = (run for run, manifest in manifests.items() if manifest.get("arm") == runs.baseline)
    first = next(of_baseline, next(iter(manifests)))
    facts = {run: {name: manifest.get(name) for name in FACTS} for run, manifest in manifests.items()}
    # What a run did not live to record is not set otherwise.
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
    """Return what the trainer's own detector found while training, and whether the fitted boundary agrees."""
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
    """Names and values of what ``own`` holds otherwise than ``reference``; the seed has a column of its own."""
    names = [name for name in {**reference, **own} if name != "seed" and own.get(name) != reference.get(name)]
    return [(name, json.dumps(own[name], ensure_ascii=False) if name in own else "left out") for name in names]


def _title(runs: Runs) -> str:
    names = list(runs.manifests)
    return ", ".join(names) if len(names) <= FEW else f"{len(names)} runs, {names[0]} to {names[-1]}"


def _pairs(value: Any) -> str:
    return ", ".join(f"{name} {entry}" for name, entry in value.items()) if isinstance(value, dict) else str(value)


def _render(**content: Any) -> str:
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
    return environment.get_template("report.html.jinja").render(few=FEW, **content)


def _cell(value: Any) -> Any:
    """What the page shows of a value; what is markup already stays."""
    return plain(value, CELL_LENGTH) if type(value) is str else value


def _source(text: str) -> Markup:
    """Code or settings as they stand, with their lines."""
    from markupsafe import escape

    lines = text[:SOURCE_LENGTH].split("\n")
    return escape("\n".join(map(plain, lines)) + "…" * (len(text) > SOURCE_LENGTH))


def _number(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"

"""Fill the generated parts of the site.

Links to files of the repository are resolved.

A line ``<!-- generated: NAME -->`` is replaced by the output of ``GENERATORS[NAME]``. Links to files in ``PUBLISHED``
lead to their copies on the site; links to other files outside ``docs`` become plain text, since the site is built
offline and knows no address of the repository.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from entrace.analysis import queries
from entrace.analysis.trace import TABLES
from entrace.trainer.ablation.arms import describe_methods
from entrace.trainer.cli import app
from entrace.trainer.config import Config
from entrace.trainer.settings import MAX_INT

ROOT = Path(__file__).resolve().parents[1]
# Files outside docs that the site shows, and where.
PAGES = {
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    **{
        f"reports/{name}.md": f"reports/{name}.md"
        for name in ("verdicts", "calibration", "ablation-powered", "benchmarks", "benchmarks_gpu")
    },
}
ASSETS = ("reports/tiny-study/*.png", "reports/*/paired_differences.png", "reports/*/stage_dynamics.png")
REPORTS = ("reports/*/report.html", "reports/*/*/report.html")

MARKER = re.compile(r"^<!-- generated: ([\w ]+) -->$", re.MULTILINE)
FENCE = re.compile(r"^```(\w+)((?: [a-z]+)*)((?: title=\"[^\"]+\")?) *$", re.MULTILINE)
FENCED = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^\]]*)\]\((?P<target>[^)#\s]*)(?P<anchor>#[^)\s]*)?\)")


def published() -> dict[str, str]:
    """Return the place of each published file, relative to the site's root.

    Keys are relative to the root of the repository.
    """
    found = (path.relative_to(ROOT).as_posix() for glob in (*ASSETS, *REPORTS) for path in ROOT.glob(glob))
    return {**PAGES, **{name: name for name in found}}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the published files that lie outside ``docs``."""
    for source, place in published().items():
        files.append(File.generated(config, place, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Insert generated parts, drop the test tags of code blocks, and resolve links."""
    del config, files
    text = MARKER.sub(lambda match: GENERATORS[match[1]](), markdown)
    text = FENCE.sub(r"```\1\3", text)
    source = Path(page.file.abs_src_path or "").resolve().relative_to(ROOT).as_posix()
    parts = FENCED.split(text)
    parts[::2] = [resolve_links(part, source, page.file.src_uri) for part in parts[::2]]
    return "".join(parts)


def resolve_links(text: str, source: str, place: str) -> str:
    """Return ``text`` with links that work on the site.

    Args:
        text: Markdown without code blocks.
        source: File of the page, relative to the repository.
        place: Its place on the site.
    """
    places = published()

    def resolve(match: re.Match[str]) -> str:
        target = match["target"]
        if not target or ":" in target:
            return match[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if path.startswith("docs/"):
            found = path.removeprefix("docs/")
        elif path in places:
            found = places[path]
        else:
            return match["text"]
        link = posixpath.relpath(found, posixpath.dirname(place) or ".")
        return f"{match['image']}[{match['text']}]({link}{match['anchor'] or ''})"

    return LINK.sub(resolve, text)


def table(header: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table; bars in cells are escaped."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def data_dictionary() -> str:
    """Return every table of a trace with the unit and meaning of every column."""
    sections = []
    for entry in TABLES.values():
        rows = [
            [f"`{c.name}`", str(c.type), c.unit.replace("<", "&lt;"), "yes" if c.nullable else "", c.meaning]
            for c in entry.columns
        ]
        key = ", ".join(f"`{name}`" for name in ("run_id", *entry.sort_by))
        columns = table(["Column", "Type", "Unit", "Nullable", "Meaning"], rows)
        sections.append(f"## {entry.name}\n\n{entry.grain[:1].upper()}{entry.grain[1:]}. Key: {key}.\n\n{columns}")
    return "\n\n".join(sections)


def methods() -> str:
    """Return the page of built-in methods.

    Each has its equation, parameters, source, and the settings that select it.
    """
    titles = {"preset": "Presets", "shaping": "Advantage shaping", "loss": "Loss variants"}
    found = describe_methods()
    sections = []
    for kind, title in titles.items():
        sections.append(f"## {title}")
        for name, method in found.items():
            if method["kind"] != kind:
                continue
            lines = [f"### {name}", f"`{method['equation']}`", f"{method['summary']} ({method['source']})."]
            if method["parameters"]:
                parameters = ", ".join(f"`{key} = {_toml(value)}`" for key, value in method["parameters"].items())
                lines.append(f"Parameters{_section(method['section'])}: {parameters}.")
            lines.append(f"Selected by `{' '.join(method['settings'])}`.")
            sections.append("\n\n".join(lines))
    return "\n\n".join(sections)


def _section(name: str) -> str:
    return f" in `[{name}]`" if name else ""


def _toml(value: Any) -> str:
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_toml, value))}]"
    return str(value).lower() if isinstance(value, bool) else f'"{value}"' if isinstance(value, str) else str(value)


def questions() -> str:
    """Return the page of shipped questions.

    Each has its figure, grain, parameters, units, and SQL.
    """
    sections = []
    for stem, path in queries.BUILT_IN.paths.items():
        if path.parent.name == "claims":
            continue
        text = path.read_text(encoding="utf-8")
        header = queries.headers(text)
        sql = "\n".join(f"    {line}".rstrip() for line in text.splitlines())
        figure = f"![{stem}](../reports/tiny-study/{stem}.png)"
        facts = [f"- {key}: {header[key]}" for key in ("grain", "params", "units", "needs")]
        sections.append(
            f"### {stem}\n\n{header['question']}\n\n{figure}\n\n"
            + "\n".join(facts)
            + f'\n\n<details markdown="1"><summary>SQL</summary>\n\n    :::sql\n{sql}\n\n</details>'
        )
    return "\n\n".join(sections)


def commands() -> str:
    """Return the help text of every command."""
    root: Any = typer.main.get_command(app)
    sections = []
    for name, command in root.commands.items():
        context = type(root.make_context("entrace", [], resilient_parsing=True))(
            command, info_name=f"entrace {name}", terminal_width=100, max_content_width=100
        )
        sections.append(f"## {name}\n\n```text\n{command.get_help(context)}\n```")
    return "\n\n".join(sections)


def configuration() -> str:
    """Return the shipped config ``tiny``."""
    return f"```toml\n{(ROOT / 'trainer/configs/tiny.toml').read_text(encoding='utf-8')}```"


def configuration_keys() -> str:
    """Return a table of all keys with their values and defaults."""
    schema = Config.model_json_schema()
    rows = [[f"`{key}`", _values(found), _default(found)] for key, found in _keys(schema, schema["$defs"])]
    return table(["Key", "Values", "Default"], rows)


def shipped_configs() -> str:
    """Return a table of the shipped configs and grids.

    The content is the first sentence of each file.
    """
    rows = []
    for path in sorted((ROOT / "trainer/configs").glob("*.toml")):
        if path.stem == "pilot":  # read by --dry-run, not by name
            continue
        comment = re.match(r"(?:#.*\n)+", path.read_text(encoding="utf-8"))
        if comment is None:
            raise ValueError(f"{path}: no comment at the beginning")
        text = re.sub(r"\s*\n# ?", " ", comment[0].removeprefix("# ")).strip()
        rows.append([f"`{path.stem}`", re.split(r"\.$|\. |: `|(?<=\?) ", text)[0]])
    return table(["Name", "Content"], rows)


def needs() -> str:
    """Return a table of the names that the header ``needs`` of a question accepts."""
    rows = [
        [f"`{name}`", f"`{need.table}`", f"`{need.column}`" if need.column else ""]
        for name, need in queries.NEEDS.items()
    ]
    return table(["Name", "Table", "Column"], rows)


def _keys(schema: Mapping[str, Any], defs: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the dotted name and the JSON schema of each key, sections in place."""
    for name, found in schema["properties"].items():
        options = [option["$ref"].rpartition("/")[2] for option in found.get("anyOf", [found]) if "$ref" in option]
        if options:
            yield from _keys(defs[options[0]], defs, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", found


def _values(schema: Mapping[str, Any]) -> str:
    """Return the values that a JSON schema allows, in words."""
    if "anyOf" in schema:
        return " or ".join(_values(option) for option in schema["anyOf"] if option.get("type") != "null")
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{_toml(value)}`" for value in schema.get("enum", [schema.get("const")]))
    kind = {"object": "table", "array": "list"}.get(schema["type"], schema["type"])
    signs = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
    bounds = [f"{sign} {schema[key]:g}" for key, sign in signs.items() if key in schema and schema[key] != MAX_INT]
    return " ".join([kind, ", ".join(bounds)]).strip()


def _default(schema: Mapping[str, Any]) -> str:
    value = schema.get("default")
    return "none" if value is None else f"`{_toml(value)}`"


GENERATORS: dict[str, Callable[[], str]] = {
    "data dictionary": data_dictionary,
    "methods": methods,
    "questions": questions,
    "commands": commands,
    "configuration": configuration,
    "configuration keys": configuration_keys,
    "shipped configs": shipped_configs,
    "needs": needs,
}

"""Test that every code block of the documentation runs or is checked.

The documentation includes README and CONTRIBUTING. A block that cannot run here is checked. Blocks of a page run in
order, in a folder with a small study in ``data/runs/study``. Commands run in this process; runs that they train are
small (``TINY``), and reports draw ``few_figures``. A block with ``title="FILE"`` is also saved as that file. Every
other block can be pasted as it stands into a shell or into Python.
"""

from __future__ import annotations

import codeop
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest
import torch
import typer
from markdown.extensions.toc import slugify

import entrace
from entrace.analysis import queries
from entrace.trainer import cli
from entrace.trainer.ablation.grid import load_grid
from entrace.trainer.config import load_config
from entrace.trainer.train import train
from tests.patience import HANG_S
from tests.trainer.conftest import SMALL

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# More pages whose links are checked.
LINKED = [*PAGES, ROOT / "CHANGELOG.md", ROOT / "data/README.md", *sorted((ROOT / "reports").glob("*.md"))]
# Reasons for which a block is checked and not run.
TAGS = {"gpu", "hub", "cluster", "long"}
CODE = {"sh", "python", "toml", "json", "sql"}

BLOCK = re.compile(
    r"^```(?P<language>\w+)(?P<tags>(?: [a-z]+)*)(?: title=\"(?P<title>[^\"]+)\")? *\n(?P<text>.*?)^``` *$",
    re.MULTILINE | re.DOTALL,
)
LINK = re.compile(r"!?\[[^\]]*\]\((?P<target>[^)\s]+)\)")
HEADING = re.compile(r"^#+ (?P<title>.+)$", re.MULTILINE)
OVERRIDE = re.compile(r"[\w.]+=")
QUOTED = re.compile(r"'[^']*'|\"[^\"!$`\\]*\"")
# Outside quotes: comments, which zsh reads as words, patterns, prompts, placeholders such as RUN or <run>, ellipses.
NOT_PASTABLE = re.compile(r"[#*?\[\]{}<>|;&()!~^$`'\"…]|\.\.\.|(?<![\w/.-])[A-Z]{2,}(?![\w=])")
TINY = [*SMALL, "rollout.max_response_tokens=24", "rollout.max_refills=0"]


# test_report.py draws all of them.


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    language: str
    tags: frozenset[str]
    title: str | None
    text: str

    @property
    def name(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(
            page,
            text.count("\n", 0, match.start()) + 1,
            match["language"],
            frozenset(match["tags"].split()),
            match["title"],
            match["text"],
        )
        for match in BLOCK.finditer(text)
    ]


ALL_BLOCKS = [block for page in PAGES for block in blocks_of(page) if block.language in CODE]
TAGGED = [block for block in ALL_BLOCKS if block.tags]
WITH_BLOCKS = [page for page in PAGES if any(block.page == page for block in ALL_BLOCKS)]


def commands_of(block: Block) -> list[list[str]]:
    """Return the words of each command.

    A command ends with its line unless a quotation or a backslash continues it.
    """
    commands, pending = [], ""
    for line in block.text.splitlines():
        pending += line
        if pending.endswith("\\"):
            pending = pending.removesuffix("\\")
            continue
        try:
            words = shlex.split(pending, comments=True)
        except ValueError:
            pending += "\n"
            continue
        pending = ""
        if words:
            commands.append(words)
    assert not pending, f"{block.name}: a command has no end"
    return commands


@cache
def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def check_command(words: list[str]) -> None:
    """Raise for an unknown command, option, config key, make target, or extra."""
    program, *rest = words
    if program == "make":
        assert {word for word in rest if "=" not in word} <= make_targets()
    elif program == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        for extra in re.findall(r"\[([\w,]+)\]", " ".join(rest)):
            assert set(extra.split(",")) <= set(extras)
    elif program == ".":
        assert rest == [".venv/bin/activate"]
    elif program == "accelerate":
        assert (ROOT / rest[rest.index("--config_file") + 1]).is_file()
        at = rest.index("-m")
        assert rest[at + 1] == "entrace"
        check_entrace(rest[at + 2 :])
    else:
        assert program == "entrace", f"unknown program {program}"
        check_entrace(rest)


def check_entrace(arguments: list[str]) -> None:
    root: Any = typer.main.get_command(cli.app)
    name, *rest = arguments
    context = root.commands[name].make_context(name, list(rest))
    overrides = context.params.get("overrides") or []
    if name == "train":
        load_config(context.params["config"], overrides)
    elif name == "ablate" and not context.params["grid"].endswith(".toml"):
        load_grid(context.params["grid"], overrides)


def run_entrace(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a command line in this process, with small settings where it trains."""
    if arguments[0] in ("train", "ablate"):
        overrides = [word for word in arguments[2:] if OVERRIDE.match(word)]
        options = [word for word in arguments[2:] if not OVERRIDE.match(word)]
        arguments = [*arguments[:2], *overrides, *TINY, *options]
    monkeypatch.setattr(sys, "argv", ["entrace", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 0


def check_data(block: Block) -> None:
    """Check that a block parses, and that its config keys exist.

    The block is neither shell nor Python.
    """
    if block.language == "json":
        for line in block.text.splitlines():
            json.loads(line)
    elif block.language == "sql":
        assert set(queries.headers(block.text)) == set(queries.HEADERS)
    elif block.language == "toml":
        values = tomllib.loads(block.text)
        if "arms" in values:
            Path("grid.toml").write_text(block.text)
            load_grid("grid.toml")
        elif block.title is None:
            Path("config.toml").write_text(block.text)
            load_config("config.toml")


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run a small version of the default study, with one seed per arm."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("runs") / "study"
    for spec in load_grid("tiny-study", TINY, seeds=[0]):
        train(spec.config, out / spec.run_id, spec.labels(out))
    return out


@pytest.fixture
def folder(study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, few_figures: None) -> Path:
    """Return a working directory like the repository with the study in it."""
    for name in ("trainer", "analysis", "data/base-policy"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(ROOT / name)
    shutil.copytree(study, tmp_path / "data/runs/study")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


# What a new user tries first runs in the default tests; of the other pages, they check commands, options, and keys.
FIRST = ("README.md", "quick-start.md")


def follow(page: Path, folder: Path, run: Callable[[list[str]], None] | None = None) -> None:
    """Check the blocks of a page; if ``run`` is given, run those that can run."""
    for block in (block for block in ALL_BLOCKS if block.page == page):
        if block.title:
            path = folder / block.title
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text)
        if block.tags or block.language == "sh":
            for words in commands_of(block):
                check_command(words)
                if not block.tags:
                    assert words[0] == "entrace", f"{block.name}: only entrace runs; tag the block"
                    if run:
                        run(words[1:])
        elif block.language != "python":
            check_data(block)
        elif run:
            exec(compile(block.text, block.name, "exec"), {"__name__": "__main__"})


def test_every_public_name_is_in_the_reference():
    text = (ROOT / "docs/api.md").read_text()
    shown = {line.rpartition(".")[2] for line in text.splitlines() if line.startswith("::: ")}
    # Objects of many names, which the text explains.
    assert set(entrace.__all__) - shown == {"questions", "trace"}
    for name in entrace.__all__:
        assert getattr(entrace, name) is not None


@pytest.mark.parametrize("page", WITH_BLOCKS, ids=lambda page: page.name)
def test_every_command_of_a_page_is_valid(page: Path, folder: Path):
    follow(page, folder)


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=() if page.name in FIRST else pytest.mark.slow) for page in WITH_BLOCKS],
    ids=lambda page: page.name,
)
def test_every_block_of_a_page_runs(page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch):
    follow(page, folder, lambda arguments: run_entrace(arguments, monkeypatch))
    plt.close("all")


SHELL = [block for block in ALL_BLOCKS if block.language == "sh"]
PYTHON = [block for block in ALL_BLOCKS if block.language == "python" and not block.title]


@pytest.mark.parametrize("block", SHELL, ids=lambda block: block.name)
def test_a_shell_block_can_be_pasted(block: Block):
    """sh, bash, and zsh read the block in the same way.

    Comments and patterns differ between these shells.
    """
    assert not NOT_PASTABLE.findall(QUOTED.sub("", block.text).replace("\\\n", "")), block.text
    for shell in ("sh", "bash", "zsh"):
        if shutil.which(shell):
            subprocess.run([shell, "-n"], input=block.text, text=True, check=True)


@pytest.mark.parametrize("block", PYTHON, ids=lambda block: block.name)
def test_a_python_block_can_be_pasted_line_by_line(block: Block):
    """Python's prompt ends a statement at the next unindented or blank line."""
    pending: list[str] = []
    for line in [*block.text.splitlines(), ""]:
        pending.append(line)
        if codeop.compile_command("\n".join(pending), block.name, "single") is not None:
            pending = []
    assert not pending


def test_no_two_pages_write_the_same_folder():
    """A command refuses a folder that holds other files.

    The blocks of all pages can therefore be run in any order.
    """
    homes: dict[Path, str] = {Path("data/runs/study"): "the default study"}
    for block in SHELL:
        for words in commands_of(block):
            if words[:2] and words[1] in ("train", "ablate", "import", "pretrain") and "--resume" not in words:
                out = Path(words[words.index("--out") + 1]) if "--out" in words else None
                near = [home for home in homes if out and (home in (out, *out.parents) or out in home.parents)]
                assert not near, f"{block.name}: {words[1]} writes {out}, and {homes[near[0]]} writes {near[0]}"
                if out and "--dry-run" not in words:
                    homes[out] = block.name


def test_every_block_has_a_known_language_and_tags():
    for page in PAGES:
        for block in blocks_of(page):
            assert block.language in {*CODE, "text"}, block.name
            assert block.tags <= TAGS, block.name
    opened = sum(page.read_text().count("```") for page in PAGES)
    assert opened == 2 * sum(len(blocks_of(page)) for page in PAGES) + indented_fences()


def indented_fences() -> int:
    return sum(len(re.findall(r"^.+```", page.read_text(), re.MULTILINE)) for page in PAGES)


def test_at_most_a_third_of_the_blocks_do_not_run():
    assert 3 * len(TAGGED) <= len(ALL_BLOCKS)


def run_module(*arguments: str) -> None:
    """Run a program of the environment, which must succeed."""
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"}
    command = [sys.executable, "-m", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=HANG_S)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_python_blocks_pass_pyright(tmp_path: Path):
    for page in WITH_BLOCKS:
        blocks = [block for block in ALL_BLOCKS if block.page == page and block.language == "python"]
        for block in blocks:
            name = block.title.replace("/", "_") if block.title else f"{page.stem.replace('-', '_')}_page.py"
            with (tmp_path / name).open("a") as file:
                file.write(block.text)
    settings = {"extraPaths": [str(ROOT)], "typeCheckingMode": "standard", "pythonVersion": "3.11"}
    # TRL exports its classes without saying so.
    settings["reportPrivateImportUsage"] = "none"
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    run_module("pyright", "--project", str(tmp_path), "--pythonpath", sys.executable)


def anchors_of(text: str) -> set[str]:
    """Return the anchors of a page's headings.

    A repeated title gets a number, as on the site.
    """
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    found: set[str] = set()
    for match in HEADING.finditer(prose):
        slug = base = slugify(re.sub(r"[`*]", "", match["title"]), "-")
        number = 1
        while slug in found:
            slug, number = f"{base}_{number}", number + 1
        found.add(slug)
    return found


@pytest.mark.parametrize("page", LINKED, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page: Path):
    prose = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for match in LINK.finditer(prose):
        target, _, anchor = match["target"].partition("#")
        if "://" in target:
            continue
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), f"{page.name}: {match[0]}"
        if anchor:
            assert anchor in anchors_of(path.read_text(encoding="utf-8")), f"{page.name}: {match[0]}"


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().split()) < 2000


def test_every_question_is_listed():
    listed = (ROOT / "docs/questions.md").read_text()
    for stem, path in queries.BUILT_IN.paths.items():
        assert path.parent.name == "claims" or f"| `{stem}` |" in listed


def test_the_site_builds_without_warnings(tmp_path: Path):
    site = tmp_path / "site"
    run_module("mkdocs", "build", "--strict", "--quiet", "--site-dir", str(site))
    dictionary = (site / "data-dictionary/index.html").read_text()
    methods = (site / "methods/index.html").read_text()
    assert "shaped_advantage" in dictionary
    assert "ppl_permuted" in methods
    for page in site.rglob("*.html"):
        if "reports/" not in str(page.relative_to(site)):
            assert not re.search(r"<(?:script|link|img)[^>]+(?:src|href)=\"?https?:", page.read_text())

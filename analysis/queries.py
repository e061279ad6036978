"""Find questions: one SQL file per question, built in or in a user's folder.

A file begins with the headers ``-- question:``, ``-- grain:``, ``-- params:``, ``-- units:``, and ``-- needs:``.
Built-in questions are in ``sql/``, one folder per level. A user's folder holds ``<stem>.sql`` and, optionally, figures
``<stem>.py`` and ``claims.toml``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from entrace.analysis.sandbox.statements import EXPLAIN, query_parameters
from entrace.analysis.trace.arguments import checked
from entrace.analysis.trace.errors import InputError, nearest, reason_of
from entrace.analysis.trace.parts import true_in
from entrace.analysis.trace.schema import RESPONSE_TOKENS, TABLES

if TYPE_CHECKING:
    import polars as pl

SQL_ROOT = Path(__file__).with_name("sql")
LEVELS = ("stage", "instance", "token", "ablation", "claims")
# Level of the questions in a user's folder.
OWN = "own"
# Ordered so that each file builds on earlier ones only.
STAGING = (
    "macros",
    "staged_steps",
    "token_steps",
    "staged_responses",
    "staged_tokens",
    "staged_movements",
    "entropy_predictions",
    "entropy_law_sums",
    "responses_at_length",
    "response_fifths",
    "entropy_thresholds",
    "eval_prompts",
    "vocab_words",
)
# Tables that ``Runs`` fills when a query first reads them.
COMPUTED = {"stages", "token_coverage"}
# Small views of one pass over the tokens, whose rows ``Runs`` keeps, run by run.
# Ordered so that each view builds on earlier ones only.
KEPT = ("entropy_bins", "update_batches", "update_predictions", "fifths_by_prompt", "entropy_law_sums")
HEADERS = ("question", "grain", "params", "units", "needs")
CONTINUATION = "--   "
LEDGER = "claims.toml"
WORD = re.compile(r"\w+")
CLAIMS = re.compile(r"(?P<claim>[A-Z]\w*\d(?:, [A-Z]\w*\d)*)\. ")
COMMENT_LINE = re.compile(r"^\s*--.*$", re.MULTILINE)
CREATED = re.compile(r"^create (?:view|macro) (\w+)", re.MULTILINE)


class Need(NamedTuple):
    """Data that a question reads.

    Attributes:
        table: Table that must have rows.
        column: Column that must have a value; empty if rows suffice.
        remedy: What to do, or what is the case, if there are none.
        is_true: The value must be true.
    """

    table: str
    column: str
    remedy: str
    is_true: bool = False

    @property
    def value(self) -> str:
        """Return what ``columns_with_values`` must name; empty if rows suffice."""
        return true_in(self.column) if self.is_true else self.column

    @property
    def place(self) -> str:
        """Return the table or column for which ``unknown`` in run.json may give a reason."""
        return f"{self.table}.{self.column}" if self.column else self.table


# What the header "needs" may name, separated by commas.
NEEDS = {
    "steps": Need("steps", "", "no step is durable yet"),
    "responses": Need("rollouts", "", "no response is durable yet"),
    "tokens": Need("tokens", "", "no token is durable yet"),
    "evaluations": Need("evals", "", "no held-out evaluation was recorded"),
    "evaluation entropies": Need("evals", "entropy_mean", "no entropies of evaluations were recorded"),
    "interventions": Need("interventions", "", "no interventions were recorded; run `entrace intervene RUN`"),
    "after-update values": Need(
        "tokens",
        "logprob_after",
        "no after-update values were recorded; train with record.after_update_every from 1 to the number of steps",
    ),
    "after-update entropies": Need(
        "tokens",
        "entropy_after",
        "no after-update entropies were recorded; train with record.after_update_every from 1 to the number of steps",
    ),
    "clipped tokens": Need(
        "tokens",
        "is_clipped",
        "no token was clipped; with one mini-batch per step, every ratio is 1: train with optim.mini_batches=4",
        is_true=True,
    ),
    "token categories": Need("tokens", "category", "the texts of tokens are unknown"),
    "entropies": Need("tokens", "entropy", "no entropies of tokens were recorded"),
    "log-probabilities": Need("tokens", "logprob", "no log-probabilities of tokens were recorded"),
    "engine log-probabilities": Need(
        "tokens", "sampling_logprob", "no log-probabilities of the inference engine were recorded beside the trainer's"
    ),
    "reference entropies": Need(
        "tokens",
        "reference_entropy",
        "no entropies of the reference policy were recorded; train with record.reference=true, or import with "
        "--reference",
    ),
    "gradient norms": Need("tokens", "grad_norm", "no gradient norms of tokens were recorded"),
    "token advantages": Need("tokens", "advantage", "no advantages of tokens were recorded"),
    "advantages": Need("rollouts", "advantage", "no advantages were recorded"),
    "correctness": Need("rollouts", "is_correct", "no correctness of responses was recorded"),
    "response entropies": Need("rollouts", "entropy_mean", "no entropies of responses were recorded"),
    "perplexities": Need("rollouts", "ppl", "no perplexities of responses were recorded"),
    "step entropies": Need("steps", "entropy_token_mean", "no entropies of steps were recorded"),
    "accuracies": Need("steps", "accuracy", "no accuracies of steps were recorded"),
}


@dataclass(frozen=True)
class Question:
    """Hold one question: the SQL file and its headers.

    Attributes:
        stem: Name of the question, of its SQL file, and of its figure.
        level: Folder of the SQL file (``LEVELS``), or ``OWN`` for a question of the user's.
        question: The question, in words.
        claim: Ids of the claims that it belongs to, as in ``S6, T3``; None if it names none.
        grain: Meaning of one row.
        params: Parameters with kind, meaning, and default; see ``parameters``.
        units: Units of the columns.
        needs: Data that a trace must hold, keys of ``NEEDS`` separated by commas.
        sql: Text of the SQL file, with its headers.
    """

    stem: str
    level: str
    question: str
    claim: str | None
    grain: str
    params: str
    units: str
    needs: str
    sql: str

    def __str__(self) -> str:
        return f"{self.stem} ({self.level})\n\n{self.sql}"

    __repr__ = __str__

    def _repr_markdown_(self) -> str:
        """Return the question as a notebook displays it."""
        facts = "\n".join(f"- {name}: {getattr(self, name)}" for name in ("claim", *HEADERS[1:]) if getattr(self, name))
        return f"### {self.stem}\n\n{self.question}\n\n{facts}\n\n```sql\n{self.sql}```\n"


@checked
@dataclass(frozen=True, repr=False)
class Questions:
    """Hold the built-in questions about runs, and those in the user's folder.

    ``questions["stage_dynamics"]`` shows one question, ``list(questions)`` their names, and ``questions.table()`` all.

    Attributes:
        folder: The user's folder, or None.
    """

    folder: Path | None = None

    def __post_init__(self) -> None:
        """Check the user's files.

        Raises:
            InputError: no such folder, a folder without questions, a file without the headers, SQL that is not one
                query, or EXPLAIN of one, a figure without SQL, or a stem that is taken.
        """
        if self.folder is None:
            return
        if not self.folder.is_dir():
            raise InputError(f"{self.folder}: no such folder of questions")
        if not self.own and not self.ledger:
            raise InputError(f"{self.folder}: holds no question; expected files such as <name>.sql, or {LEDGER}")
        for path in sorted(self.folder.glob("[!_]*.py")):
            if path.stem not in self.own:
                raise InputError(f"{path}: a figure needs {path.stem}.sql beside it{nearest(path.stem, self.own)}")
        for stem, path in self.own.items():
            if stem in _built_in():
                raise InputError(f'{path}: "{stem}" is a built-in question; rename the file')
            found = headers(_read_text(path))
            for name in HEADERS:
                if not found.get(name):
                    raise InputError(f'{path}: expected "-- {name}: ..." among the first lines')
            if unknown := next((name for name in _names(found["needs"]) if name not in NEEDS), None):
                raise InputError(f'{path}: needs: unknown value "{unknown}"{nearest(unknown, NEEDS)}')
            self.parameter_names(stem)
            if EXPLAIN.match(self.read(stem)):
                raise InputError(f"{path}: EXPLAIN describes a query; a question needs the query itself")

    def __getitem__(self, stem: str) -> Question:
        """Return one question.

        Raises:
            InputError: no such question.
        """
        text = self.read(stem)
        found = headers(text)
        claims = CLAIMS.match(found["question"])
        question = found["question"][claims.end() :] if claims else found["question"]
        level = OWN if stem in self.own else self.paths[stem].parent.name
        rest = (found[name] for name in HEADERS[1:])
        return Question(stem, level, question, claims["claim"] if claims else None, *rest, sql=text)

    def __iter__(self) -> Iterator[str]:
        return iter(self.paths)

    def __len__(self) -> int:
        return len(self.paths)

    def __repr__(self) -> str:
        rows = [self[stem] for stem in self]
        width = max(len(row.stem) for row in rows)
        lines = [f"{row.level:<8}  {row.stem:<{width}}  {row.claim or '-':<10}  {row.question}" for row in rows]
        return "\n".join([f"{len(self)} questions; questions[name] shows one, with its parameters and SQL", *lines])

    def _ipython_key_completions_(self) -> list[str]:
        return list(self)

    def table(self) -> pl.DataFrame:
        """Return a table with one row per question.

        The columns are stem, level, question, claim, params, units, and needs.
        """
        import polars as pl

        columns = ("stem", "level", "question", "claim", "params", "units", "needs")
        rows = [[getattr(self[stem], name) for name in columns] for stem in self]
        return pl.DataFrame(rows, dict.fromkeys(columns, pl.String), orient="row")

    @cached_property
    def paths(self) -> dict[str, Path]:
        """SQL file of each question, by stem."""
        return {**_built_in(), **self.own}

    @cached_property
    def figures(self) -> dict[str, Path]:
        """Return the Python file of each figure in the user's folder, by sorted stem."""
        return {stem: path.with_suffix(".py") for stem, path in self.own.items() if path.with_suffix(".py").is_file()}

    @property
    def ledger(self) -> Path | None:
        """The user's claims, if there are any."""
        path = self.folder / LEDGER if self.folder else None
        return path if path and path.is_file() else None

    @cached_property
    def own(self) -> dict[str, Path]:
        """Return the SQL file of each question in the user's folder, by sorted stem."""
        return {path.stem: path for path in sorted(self.folder.glob("*.sql"))} if self.folder else {}

    def read(self, stem: str) -> str:
        """Return the SQL of a question.

        Raises:
            InputError: no such question.
        """
        if stem not in self.paths:
            raise InputError(f'unknown question "{stem}"{nearest(str(stem), self.paths)}')
        return _read_text(self.paths[stem])

    def parameter_names(self, stem: str) -> frozenset[str]:
        """Return the names of the parameters of a question.

        Raises:
            InputError: the SQL is not a single query, or cannot be parsed.
        """
        with self.named(stem):
            return query_parameters(self.read(stem))

    @contextmanager
    def named(self, stem: str) -> Iterator[None]:
        """Begin errors about a question of the user's with the path of its SQL file."""
        try:
            yield
        except InputError as error:
            if stem in self.own:
                error.args = (f"{self.own[stem]}: {error}",)
            raise

    def location(self, stem: str) -> str:
        """Return the path of a question's file.

        A built-in question gives a path such as ``analysis/sql/stage/stage_dynamics.sql``.
        """
        return str(self.own.get(stem) or f"analysis/sql/{self.paths[stem].parent.name}/{stem}.sql")

    def needs(self, stem: str) -> list[Need]:
        """Return what a trace must hold for a question to have rows."""
        return [NEEDS[name] for name in _names(self[stem].needs)]


BUILT_IN = Questions()


@cache
def _built_in() -> dict[str, Path]:
    return {path.stem: path for level in LEVELS for path in sorted((SQL_ROOT / level).glob("*.sql"))}


def _names(needs: str) -> list[str]:
    return [name.strip() for name in needs.split(",")]


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: {reason_of(error)}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not text in UTF-8") from None


def headers(text: str) -> dict[str, str]:
    """Return the header lines ``-- key: value`` of a query.

    An indented comment continues the line above it.
    """
    found: dict[str, str] = {}
    for line in text.splitlines():
        if not line.startswith("-- "):
            break
        if found and line.startswith(CONTINUATION):
            found[next(reversed(found))] += f" {line.removeprefix(CONTINUATION)}"
        else:
            key, _, value = line[3:].partition(": ")
            found[key] = value
    return found


def staging() -> list[str]:
    """Return the SQL of the shared views and macros, in dependency order."""
    return [(SQL_ROOT / "staging" / f"{name}.sql").read_text() for name in STAGING]


def tables_in(text: str) -> set[str]:
    """Return the tables of the trace that a query may read.

    The query may read them directly or through the shared views and macros.
    """
    return _sources_in(text) & TABLES.keys()


def computed_tables_in(text: str) -> set[str]:
    """Return the members of ``COMPUTED`` that a query may read; see ``tables_in``."""
    return _sources_in(text) & COMPUTED


def kept_views_in(text: str) -> list[str]:
    """Return the members of ``KEPT`` that a query may read; see ``tables_in``."""
    sources = _sources_in(text)
    return [view for view in KEPT if view in sources]


def _sources_in(text: str) -> set[str]:
    return _union(_sources_behind(), COMMENT_LINE.sub("", text).lower())


def _union(behind: Mapping[str, set[str]], text: str) -> set[str]:
    return set().union(*(behind.get(word, ()) for word in WORD.findall(text)))


@cache
def _sources_behind() -> dict[str, set[str]]:
    """Return the tables that each table, shared view, and macro reads, by name."""
    behind = {name: {name} for name in (*TABLES, *COMPUTED)} | {RESPONSE_TOKENS: {"tokens"}}
    for text in (COMMENT_LINE.sub("", text) for text in staging()):
        created = CREATED.findall(text)
        behind |= dict.fromkeys(created, set(created) & set(KEPT) | _union(behind, text))
    return behind

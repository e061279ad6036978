"""Find responses and read one of them down to its tokens."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from entrace.analysis.queries import SQL_ROOT
from entrace.analysis.runs import Runs
from entrace.analysis.sandbox.connection import quote
from entrace.analysis.sandbox.process import LimitError
from entrace.analysis.sandbox.statements import SQL_POSITION, parameter_names
from entrace.analysis.trace.errors import InputError, nearest
from entrace.analysis.viewer.cells import columns_of

if TYPE_CHECKING:
    import polars as pl

PAGE_ROWS = 50
# Limits of one query.
TIMEOUT_S, MEMORY = 60.0, "1GiB"
# Responses whose text is searched at a time.
SEARCHED_ROWS = 10_000
# Most responses to one prompt that are listed.
MOST_OF_PROMPT = 2000
# Characters of a response in the list.
EXCERPT = 280
# Columns of the list, and those by which it can be sorted.
LISTED = (
    *("run_id", "arm", "seed", "step", "stage", "sample_sign", "prompt_id", "group_id", "rollout_id", "is_correct"),
    *("reward", "advantage", "ppl", "ppl_z", "entropy_mean", "response_length", "defects", "is_truncated", "is_kept"),
    *("drop_reason", "answer"),
)
# Filters that compare a column with one value.
EQUAL = ("run_id", "arm", "seed", "stage", "phase", "sample_sign", "prompt_id", "group_id", "is_correct", "is_kept")
INTEGERS = {"seed", "group_id", "step_from", "step_to", "step", "rollout_id"}
BOOLEANS = {"true": True, "false": False}
# Further filters: name in the address -> condition.
CONDITIONS = {
    "step": "step = $step",
    "step_from": "step >= $step_from",
    "step_to": "step <= $step_to",
    "defect": "if($defect = 'any', len(defects) > 0, list_contains(defects, $defect))",
    "turns": "(run_id, rollout_id) in (select (run_id, rollout_id) from response_tokens where turn >= $turns::integer)",
}
# All parameters of the list; the page itself reads the last two.
NAMES = (*EQUAL, *CONDITIONS, "text", "where", "sort", "page", "at", "r")
# Columns of measured_tokens.sql that have a mean and a band per stage.
QUANTITIES = (
    *("entropy", "logprob", "surprisal", "advantage", "shaped_advantage", "advantage_change", "grad_norm"),
    *("dp", "dlogprob", "dentropy", "mismatch", "reference_gap"),
)
# Longest responses, in tokens, that are aligned token by token.
ALIGNED_TOKENS = 6000
# Shorter runs of equal tokens do not anchor an alignment.
ANCHOR = 4


def _read(runs: Runs, text: str, params: Mapping[str, Any] | None = None) -> pl.DataFrame:
    try:
        return runs.read(text, params, memory=MEMORY, timeout=TIMEOUT_S)
    except LimitError as error:
        raise InputError(f"{error.fact}; narrow the filters or the condition") from None


@cache
def _read_sql(name: str) -> str:
    return (SQL_ROOT / "viewer" / f"{name}.sql").read_text(encoding="utf-8")


def find_responses(runs: Runs, given: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """Yield a page of responses as far as it is known; the last one is whole.

    Texts may lie in every file of a trace, so the rows come first without them. A search for text yields what it has
    found after each part of the trace.

    Args:
        runs: Where to look.
        given: Filters by name (``EQUAL``, ``CONDITIONS``, ``text``, and ``where``), ``sort`` (a column, with ``-`` in
            front for descending), and ``page``, from 1.

    Yields:
        ``columns``, ``num_rows`` that match in all, ``page``, ``page_rows``, and ``searched``, the share of the
        responses whose text was searched.

    Raises:
        InputError: a name is unknown, a filter has an impossible value, or DuckDB rejects ``where``.
    """
    import polars as pl

    check_names(given, NAMES)
    sort = given.get("sort") or "step"
    column, is_descending = sort.removeprefix("-"), sort.startswith("-")
    if column not in LISTED:
        raise InputError(f'sort: unknown column "{column}"{nearest(column, LISTED)}')
    page = to_integer("page", given.get("page") or "1")
    if page < 1:
        raise InputError(f"page: {page} is not a page, expected 1 or more")
    check_where(runs, given.get("where") or "")
    source, params = _filtered(given)
    selected = f"select run_id, rollout_id, step, {column} as sort_key from {source}"
    order = f"order by sort_key {'desc' if is_descending else 'asc'} nulls last, run_id, rollout_id"
    offset = PAGE_ROWS * (page - 1)
    about = {"page": page, "page_rows": PAGE_ROWS}
    if text := given.get("text"):
        matched = _read(runs, f"select run_id, rollout_id, step from ({selected}) {order}", params)
        known = _listed(runs, matched.clear())
        for found, searched in _search(runs, matched, text, is_reversed=sort == "-step"):
            keys = found[offset : offset + PAGE_ROWS]
            if len(new := keys.join(known, on=["run_id", "rollout_id"], how="anti")):
                known = pl.concat([known, _listed(runs, new)])
            columns = columns_of(_in_order(keys, known))
            yield {**about, "columns": columns, "num_rows": found.height, "searched": searched}
        return
    keys = _read(
        runs,
        f"""with matched as materialized ({selected})
        select run_id, rollout_id, step, (select count(*) from matched) as num_rows from matched
        {order} limit {PAGE_ROWS} offset {offset}""",
        params,
    )
    num_rows = int(keys["num_rows"][0] if len(keys) else _read(runs, f"select count(*) from {source}", params).item())
    about |= {"num_rows": num_rows, "searched": 1.0}
    rows = _listed(runs, keys, has_text=False)
    yield {**about, "columns": columns_of(rows)}
    yield {**about, "columns": columns_of(rows.with_columns(_texts(runs, keys)["completion"]))}


def _search(runs: Runs, matched: pl.DataFrame, text: str, *, is_reversed: bool) -> Iterator[tuple[pl.DataFrame, float]]:
    """Yield the rows of ``matched`` found so far, and the share searched.

    The rows are in the order of ``matched``, and the share is of its rows. Parts of neighboring steps are searched one
    after another, from the first step on, or from the last.
    """
    import polars as pl

    matched = matched.with_row_index("rank")
    chosen = matched["run_id"].unique().to_list()
    among = "" if len(chosen) == len(runs.manifests) else f"run_id in ({', '.join(map(quote, chosen)) or 'null'}) and"
    found, searched = matched.clear(), 0
    counts = matched.group_by("step").len().sort("step", descending=is_reversed)
    counts = counts.with_columns(part=(pl.col("len").cum_sum() - 1) // SEARCHED_ROWS)
    for part in counts.partition_by("part", maintain_order=True):
        hits = _read(
            runs,
            f"""select run_id, rollout_id from rollouts
            where {among} step between {part["step"].min()} and {part["step"].max()}
            and regexp_matches(completion, regexp_escape($text), 'i')""",
            {"text": text},
        )
        found = pl.concat([found, matched.join(hits, on=["run_id", "rollout_id"], how="semi")]).sort("rank")
        searched += int(part["len"].sum())
        yield found, searched / matched.height
    if not searched:
        yield found, 1.0


def _listed(runs: Runs, keys: pl.DataFrame, *, has_text: bool = True) -> pl.DataFrame:
    """Return the columns of the list for responses, in order.

    ``keys`` holds the ``run_id``, ``rollout_id``, and ``step`` of each response.
    """
    names = f"{', '.join(LISTED)}{f', left(completion, {EXCERPT}) as completion' if has_text else ''}"
    return _in_order(keys, _read(runs, f"select {names} from ({_read_sql('responses')}) {_where_keys(keys)}"))


def _texts(runs: Runs, keys: pl.DataFrame) -> pl.DataFrame:
    """Return the beginnings of the texts of responses, in order."""
    wanted = f"select run_id, rollout_id, left(completion, {EXCERPT}) as completion from rollouts {_where_keys(keys)}"
    return _in_order(keys, _read(runs, wanted))


def _where_keys(keys: pl.DataFrame) -> str:
    """Return a condition that holds for responses.

    Its literal numbers let DuckDB skip parts of the files.
    """
    rollouts, steps = (", ".join(map(str, keys[name].unique())) or "null" for name in ("rollout_id", "step"))
    return f"where rollout_id in ({rollouts}) and step in ({steps})"


def _in_order(keys: pl.DataFrame, rows: pl.DataFrame) -> pl.DataFrame:
    import polars as pl

    order = keys.select("run_id", "rollout_id").with_columns(pl.col("rollout_id").cast(rows.schema["rollout_id"]))
    return order.join(rows, on=["run_id", "rollout_id"], how="left", maintain_order="left").select(rows.columns)


def check_names(given: Iterable[str], names: Sequence[str]) -> None:
    """Check the names of the parameters of an address.

    Raises:
        InputError: one is unknown.
    """
    if unknown := next((name for name in given if name not in names), None):
        raise InputError(f'unknown parameter "{unknown}" in the address{nearest(unknown, names)}')


def check_where(runs: Runs, where: str) -> None:
    """Check a condition on responses without evaluating it.

    Raises:
        InputError: DuckDB rejects it, or it is not true or false.
    """
    if not where.strip():
        return
    _check_condition(where)
    source, params = _filtered({"where": where})
    found = _read(runs, f"describe select ({where}\n) as condition from {source}", params)
    kind = found["column_type"][0]
    if kind not in ("BOOLEAN", '"NULL"'):
        raise InputError(f"where: expected a condition that is true or false, such as ppl > 1.5; found {kind}")


def _filtered(given: Mapping[str, str]) -> tuple[str, dict[str, Any]]:
    """Return a parenthesized query for the filtered responses, and its parameters."""
    conditions, params = [], {}
    for name in EQUAL:
        if value := given.get(name):
            if value == "null":
                conditions.append(f"{name} is null")
            else:
                conditions.append(f"{name} = ${name}")
                params[name] = _value(name, value)
    for name, condition in CONDITIONS.items():
        if value := given.get(name):
            conditions.append(condition)
            params[name] = _value(name, value)
    if where := (given.get("where") or "").strip():
        conditions.append(f"({where}\n)")
    condition = f" where {' and '.join(conditions)}" if conditions else ""
    return f"(select * from ({_read_sql('responses')}){condition})", params


def _check_condition(where: str) -> None:
    """Refuse text that is not one expression, such as ``1) or (1``.

    Such text would leave its parentheses. Brackets accept what parentheses accept, and close only with brackets. A line
    break ends a comment.
    """
    import duckdb

    try:
        names = [
            name for opened, closed in ("()", "[]") for name in parameter_names(f"select {opened}{where}\n{closed}")
        ]
    except duckdb.Error as error:
        raise InputError(f"where: {SQL_POSITION.sub('', str(error))}") from None
    if names:
        raise InputError(f"where: ${names[0]} has no value")


def _value(name: str, value: str) -> Any:
    if name in INTEGERS:
        return to_integer(name, value)
    if name.startswith("is_"):
        if value not in BOOLEANS:
            raise InputError(f'{name}: "{value}" is neither true, false, nor null')
        return BOOLEANS[value]
    return value


def to_integer(name: str, value: str) -> int:
    """Return the integer that a text holds.

    Raises:
        InputError: it holds none.
    """
    try:
        return int(value)
    except ValueError:
        raise InputError(f'{name}: "{value}" is not an integer') from None


def read_response(runs: Runs, run_id: str, rollout_id: str) -> dict[str, Any]:
    """Return one response with its prompt, its tokens, and its neighbors.

    Raises:
        InputError: no such run or response.
    """
    if run_id not in runs.manifests:
        raise InputError(f'no run "{run_id}"{nearest(run_id, runs.manifests)}')
    key = {"run": run_id, "rollout": to_integer("rollout_id", rollout_id)}
    rows = _read(
        runs,
        f"""select responses.*, prompts.prompt, prompts.task, prompts.ground_truth
        from ({_read_sql("responses")}) as responses
        left join prompts on prompts.run_id = responses.run_id and prompts.prompt_id = responses.prompt_id
        where responses.run_id = $run and responses.rollout_id = $rollout""",
        key,
    )
    if rows.is_empty():
        raise InputError(f"run {run_id} has no response {rollout_id}")
    response = {name: values[0] for name, values in columns_of(rows, whole=True).items()}
    measured, wanted = _read_sql("measured_tokens"), _read_sql("response_tokens")
    text = f"with measured as ({measured}) select * from ({wanted}) order by position"
    tokens = _read(runs, text, {**key, "step": response["step"]})
    return {
        "response": response,
        "tokens": columns_of(tokens),
        "neighbors": _neighbors(runs, key, response),
    }


def _neighbors(runs: Runs, key: Mapping[str, Any], response: Mapping[str, Any]) -> dict[str, int | None]:
    """Return the neighbors of a response in its run and among those to its prompt.

    ``previous`` and ``next`` are in its run; ``earlier`` and ``later`` answer its prompt in other steps. ``opposite``
    is a correct response for a wrong one, and the reverse: of the nearest step, its own group first.
    """
    row = _read(
        runs,
        """select
          max(rollout_id) filter (where rollout_id < $rollout) as previous,
          min(rollout_id) filter (where rollout_id > $rollout) as next,
          arg_max(rollout_id, (step, -rollout_id)) filter (where prompt_id = $prompt and step < $step) as earlier,
          arg_min(rollout_id, (step, rollout_id)) filter (where prompt_id = $prompt and step > $step) as later,
          arg_min(rollout_id, (abs(step - $step), abs(rollout_id - $rollout), rollout_id))
            filter (where prompt_id = $prompt and is_correct = not $is_correct) as opposite
        from rollouts where run_id = $run""",
        {**key, "prompt": response["prompt_id"], "step": response["step"], "is_correct": response["is_correct"]},
    )
    return row.row(0, named=True)


def read_band(runs: Runs, run_id: str, stage: str, quantity: str) -> dict[str, list[Any]]:
    """Return the mean and outer deciles of a quantity along responses of a stage.

    There is one mean, first decile, and last decile per twentieth of a response.

    Raises:
        InputError: no such quantity.
    """
    if quantity not in QUANTITIES:
        raise InputError(f'no quantity "{quantity}"{nearest(quantity, QUANTITIES)}')
    source = f"""select position / response_length as relative_position, {quantity} as quantity
        from ({_read_sql("measured_tokens")}) join staged_steps using (run_id, step)
        where run_id = $run and stage = $stage and loss_mask is not false"""
    text = f"with measured as ({source}) {_read_sql('band')}"
    return columns_of(_read(runs, text, {"run": run_id, "stage": stage}))


def read_prompts(runs: Runs, prompt_id: str, run_id: str | None = None) -> dict[str, Any]:
    """Return all responses to one prompt, over steps and runs.

    A prompt is identified by its text and its id.

    Args:
        runs: Where to look.
        prompt_id: The id, which may stand for other texts in runs of other seeds.
        run_id: Run that determines the text (default: the first with the id).

    Raises:
        InputError: no such prompt.
    """
    prompts = _read(
        runs,
        "select run_id, prompt, task, ground_truth from prompts where prompt_id = $prompt order by run_id",
        {"prompt": prompt_id},
    )
    chosen = next((row for row in prompts.iter_rows(named=True) if run_id in (None, row["run_id"])), None)
    alike = [row["run_id"] for row in prompts.iter_rows(named=True) if chosen and row["prompt"] == chosen["prompt"]]
    source, params = _filtered({"prompt_id": prompt_id})
    if alike:
        source = f"(select * from {source} where list_contains($alike, run_id))"
        params["alike"] = alike
    keys = _read(
        runs,
        f"select run_id, rollout_id, step from {source} order by step, arm, seed, rollout_id limit {MOST_OF_PROMPT}",
        params,
    )
    rows = _listed(runs, keys)
    if rows.is_empty():
        raise InputError(f'no response to a prompt "{prompt_id}"')
    shown = {name: chosen[name] for name in ("prompt", "task", "ground_truth")} if chosen else {}
    others = len(prompts) - len(alike)
    return {"prompt": shown, "num_other_runs": others, "columns": columns_of(rows)}


def align(first: list[int], second: list[int]) -> list[tuple[int, int, int, int, bool]]:
    """Return aligned spans of two responses: ``(start, end, start, end, is_equal)``.

    The spans are in order. Runs of fewer than ``ANCHOR`` equal tokens count as different, so that chance matches do not
    chop the text. Beyond ``ALIGNED_TOKENS`` only the common beginning is aligned.
    """
    if max(len(first), len(second)) > ALIGNED_TOKENS:
        same = next(
            (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
        )
        blocks = [(0, 0, same)]
    else:
        matcher = difflib.SequenceMatcher(None, first, second, autojunk=False)
        blocks = [block for block in matcher.get_matching_blocks() if block.size >= ANCHOR or block.a == block.b == 0]
    spans, i, j = [], 0, 0
    for a, b, size in [*blocks, (len(first), len(second), 0)]:
        if a > i or b > j:
            spans.append((i, a, j, b, False))
        if size:
            spans.append((a, a + size, b, b + size, True))
        i, j = a + size, b + size
    return spans


def compare(runs: Runs, keys: list[tuple[str, str]]) -> dict[str, Any]:
    """Return several responses, each aligned with the first.

    Raises:
        InputError: no such response.
    """
    found = [read_response(runs, *key) for key in keys]
    ids = [part["tokens"]["token_id"] for part in found]
    return {"responses": found, "spans": [align(ids[0], other) for other in ids[1:]]}


def find_opposite(runs: Runs, run_id: str, rollout_id: str) -> tuple[str, str]:
    """Return run and response of the ``opposite`` of a response; see ``_neighbors``.

    Raises:
        InputError: no such response, or none to its prompt has the other verdict.
    """
    found = read_response(runs, run_id, rollout_id)
    if (opposite := found["neighbors"]["opposite"]) is None:
        is_correct = found["response"]["is_correct"]
        wanted = "judged" if is_correct is None else "wrong" if is_correct else "correct"
        raise InputError(f"run {run_id} has no {wanted} response to the prompt of response {rollout_id}")
    return run_id, str(opposite)

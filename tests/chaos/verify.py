"""Check a run after a kill, and once it was resumed to its end."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import polars as pl

import entrace
from entrace.analysis.trace.verify import verify_run
from entrace.trainer.config import load_config

from .victim import CONFIG

TABLES = ("tokens", "rollouts", "prompts", "vocab", "steps", "evals")
# Of run.json: what a run has for itself.
OWN = {"started_at", "finished_at", "git_commit"}
SECONDS = ("rollout_s", "reward_s", "update_s", "record_s")

# Each counts violations; $durable is the last durable step, $prompts and $samples what an evaluation is made of.
INVARIANTS = {
    "a step up to the last durable one is missing, twice or beyond it": """
        select count(*) from (select unnest(range(1, $durable + 1)) as step)
        full join (select step, count(*) as n from steps group by all) using (step)
        full join (select distinct step, true as has_rollouts from rollouts) using (step)
        full join (select distinct step, true as has_tokens from tokens) using (step)
        where n is distinct from 1 or not coalesce(has_rollouts and has_tokens and step <= $durable, false)""",
    "a response is there twice": """
        select count(*) from (select 1 from rollouts group by step, rollout_id having count(*) > 1)""",
    "a token is there twice": """
        select count(*) from (select 1 from tokens group by step, rollout_id, position having count(*) > 1)""",
    "a step's tokens are not as many as its row says": """
        select count(*) from (select step, tokens as n from steps)
        full join (select step, count(*) as found from tokens group by all) using (step)
        where n is distinct from found""",
    "a response's tokens are not as many as its length": """
        select count(*) from (select rollout_id, response_length as n from rollouts)
        full join (select rollout_id, count(*) as found from tokens group by all) using (rollout_id)
        where n is distinct from found""",
    "an evaluation is not complete": """
        select count(*) from (
            select count(*) as n, count(distinct (prompt_id, sample_index)) as found from evals group by step
        ) where n != $prompts * $samples or found != n""",
    "a prompt is missing or there twice": """
        select count(*) from (select prompt_id, count(*) as n from prompts group by all)
        full join (select prompt_id from rollouts union select prompt_id from evals) using (prompt_id)
        where n is distinct from 1""",
}


class Reference:
    """Hold the run that was never interrupted.

    The rows are in order; the manifest and the checkpoints are included.
    """

    def __init__(self, run_dir: Path) -> None:
        """Read the finished run in ``run_dir``."""
        self.run_dir = run_dir
        self.config = load_config("tiny", CONFIG)
        runs = entrace.open_runs(run_dir)
        self.frames = {table: _read(runs, table) for table in TABLES}
        self.files = _list_files(run_dir)
        if defects := list(self.defects(run_dir)):
            raise AssertionError(f"the uninterrupted run: {'; '.join(defects)}")

    def defects(self, run_dir: Path) -> Iterator[str]:
        """Yield defects of a run as a reader sees it, after a kill or at its end."""
        yield from map(str, verify_run(run_dir).faults)
        runs = entrace.open_runs(run_dir)
        durable = next(iter(runs.manifests.values()))["last_durable_step"]
        sizes = {"durable": durable, "prompts": self.config.task.num_heldout, "samples": self.config.eval.samples}
        for name, text in INVARIANTS.items():
            count = runs.sql(text, {key: value for key, value in sizes.items() if f"${key}" in text}).item()
            if count:
                yield f"{name} ({count} cases, last durable step {durable})"
        for table in TABLES:
            found, expected = _read(runs, table), self._until(table, durable)
            # What belongs to no step is durable with the first that is.
            if not (equal(found, expected) or (durable == 0 and found.is_empty())):
                yield f"{table}: {len(found)} rows that are not the {len(expected)} up to step {durable}"

    def final_defects(self, run_dir: Path) -> Iterator[str]:
        """Return where a run that was resumed to its end differs from this one."""
        yield from self.defects(run_dir)
        ours, theirs = (json.loads((folder / "run.json").read_text()) for folder in (self.run_dir, run_dir))
        if changed := [key for key in sorted(ours | theirs) if key not in OWN and ours.get(key) != theirs.get(key)]:
            yield f"run.json differs in {', '.join(changed)}"
        if difference := _list_files(run_dir) ^ self.files:
            yield f"files only in one of both: {', '.join(map(str, sorted(difference)))}"
        for name in sorted(_list_files(run_dir / "checkpoints")):
            one, other = (folder / "checkpoints" / name for folder in (self.run_dir, run_dir))
            if other.is_file() and not (one.is_file() and one.read_bytes() == other.read_bytes()):
                yield f"{name}: differs"

    def _until(self, table: str, durable: int) -> pl.DataFrame:
        frame = self.frames[table]
        if "step" in frame.columns:
            return frame.filter(pl.col("step") <= durable)
        if table == "prompts":
            used = pl.concat(self._until(of, durable)["prompt_id"] for of in ("evals", "rollouts"))
            return frame.filter(pl.col("prompt_id").is_in(used.unique().implode()))
        return frame


def _read(runs: entrace.Runs, table: str) -> pl.DataFrame:
    return runs.sql(f"select * from {table}").drop(SECONDS, strict=False)


def equal(one: pl.DataFrame, other: pl.DataFrame) -> bool:
    """Return True if two frames hold equal values in equal order.

    Floats must be equal to the bit.
    """
    floats = [name for name, kind in one.schema.items() if kind.is_float()]
    return one.equals(other) and all(
        one[name].to_numpy().tobytes() == other[name].to_numpy().tobytes() for name in floats
    )


def _list_files(run_dir: Path) -> set[Path]:
    return {path.relative_to(run_dir) for path in run_dir.rglob("*")}

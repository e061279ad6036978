"""Test that injected faults raise their check's alarm, and clean traces none."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from entrace import open_runs
from entrace.analysis.audit import ALARM, UNKNOWN, Finding, Sample, audit_run
from entrace.analysis.trace import InputError

FROZEN = Path(__file__).parents[1] / "fixtures" / "frozen" / "none-seed0"
RUNS = sorted(path.parent for path in FROZEN.parent.glob("*/run.json"))
NUM_CLEAN = 20


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return [Sample.of(open_runs(run), run.name) for run in RUNS]


@pytest.fixture(scope="module")
def clean(samples: list[Sample]) -> Sample:
    """Return about 10,000 tokens of a real run."""
    return part(samples[0], lambda steps: steps[: len(steps) // 2])


def part(sample: Sample, choose: Callable[[np.ndarray], np.ndarray]) -> Sample:
    steps = choose(sample.responses["step"].unique().sort().to_numpy()).tolist()
    tokens, responses = (frame.filter(pl.col("step").is_in(steps)) for frame in (sample.tokens, sample.responses))
    return replace(sample, tokens=tokens, responses=responses)


def alarms(sample: Sample) -> dict[str, Finding]:
    return {finding.check: finding for finding in audit_run(sample, "run") if finding.state == ALARM}


def with_tokens(sample: Sample, *columns: pl.Expr | pl.Series) -> Sample:
    return replace(sample, tokens=sample.tokens.with_columns(*columns))


def test_clean_traces_raise_no_alarm(samples: list[Sample]):
    """Draw twenty samples of steps of real runs, with 5,000 to 15,000 tokens each."""
    rng = np.random.default_rng(0)
    for number in range(NUM_CLEAN):
        sample = samples[number % len(samples)]
        chosen = part(sample, lambda steps: np.sort(rng.choice(steps, len(steps) // 2, replace=False)))
        assert alarms(chosen) == {}


def test_a_clean_engine_raises_no_alarm(clean: Sample):
    noise = np.random.default_rng(0).normal(0, 0.01, clean.tokens.height)
    assert alarms(with_tokens(clean, (pl.col("logprob") + noise).clip(None, 0).alias("sampling_logprob"))) == {}


def at_temperature(sample: Sample, temperature: float) -> Sample:
    """Record values of a two-way choice at a temperature other than that of sampling.

    A token of probability p is one of two; the other one has the rest.
    """
    p = np.exp(np.minimum(sample.tokens["logprob"].to_numpy(), -1e-6))
    entropy = -(p * np.log(p) + (1 - p) * np.log1p(-p))
    # Keep the expectation: replace each token by a draw with its own two probabilities.
    rng = np.random.default_rng(0)
    p = np.where(rng.random(len(p)) < p, p, 1 - p)
    q = p**temperature / (p**temperature + (1 - p) ** temperature)
    recorded = -(q * np.log(q) + (1 - q) * np.log1p(-q))
    values = {"logprob": np.log(q), "entropy": recorded if temperature != 1 else entropy}
    return replace(sample, tokens=sample.tokens.with_columns(**{name: pl.Series(v) for name, v in values.items()}))


def shifted(sample: Sample) -> Sample:
    both = [pl.col(name).shift(-1).over("rollout_id").fill_null(0.0) for name in ("logprob", "entropy")]
    return with_tokens(sample, *both)


def off_by_one(sample: Sample) -> Sample:
    """Record each token's log-probability at the distribution of the next position."""
    rng = np.random.default_rng(0)
    return with_tokens(sample, pl.Series("logprob", -rng.exponential(6, sample.tokens.height)))


def permuted(sample: Sample) -> Sample:
    order = np.random.default_rng(0).permutation(sample.tokens.height)
    return with_tokens(sample, pl.Series("entropy", sample.tokens["entropy"].to_numpy()[order]))


def with_tool_output(sample: Sample) -> Sample:
    """Count ten tokens per third response that the policy did not sample.

    The tokens are in the middle of the response.
    """
    inside = (pl.col("rollout_id") % 3 == 0) & pl.col("position").is_between(5, 14)
    return with_tokens(sample, pl.when(inside).then(-9.0).otherwise(pl.col("logprob")).alias("logprob"))


def padded(sample: Sample) -> Sample:
    """Append four more end tokens to every tenth finished response."""
    last = sample.tokens.group_by("rollout_id", maintain_order=True).last().select(sample.tokens.columns)
    ends = last.filter(pl.col("rollout_id") % 10 == 0)
    rows = [sample.tokens, *(ends.with_columns(pl.col("position") + i) for i in range(1, 5))]
    return replace(sample, tokens=pl.concat(rows).sort("rollout_id", "position"))


def with_responses(sample: Sample, *columns: pl.Expr) -> Sample:
    return replace(sample, responses=sample.responses.with_columns(*columns))


FAULTS: dict[str, tuple[Callable[[Sample], Sample], str, str]] = {
    "probabilities": (lambda s: with_tokens(s, pl.col("logprob").exp()), "range", "above 0"),
    "wrong sign": (lambda s: with_tokens(s, -pl.col("logprob")), "range", "above 0"),
    "entropy in bits, large": (lambda s: with_tokens(s, pl.col("entropy") * 40), "range", "above ln"),
    "surprisal as entropy": (lambda s: with_tokens(s, (-pl.col("logprob")).alias("entropy")), "entropy", "surprisal"),
    "temperature .7 not applied": (lambda s: at_temperature(s, 0.7), "balance", "temperature"),
    "temperature 1.4 not applied": (lambda s: at_temperature(s, 1.4), "balance", "temperature"),
    "top-p renormalized on one side": (
        lambda s: with_tokens(s, (pl.col("logprob") * 0.8).alias("logprob")),
        "balance",
        "top-p",
    ),
    "logits off by one": (off_by_one, "balance", "off by one"),
    "values of the next position": (shifted, "prefixes", "shifted"),
    "permuted mask": (permuted, "alignment", "different positions"),
    "tool output": (with_tool_output, "balance", "tool output"),
    "padding": (padded, "ends", "padding"),
    "four decimals": (lambda s: with_tokens(s, pl.col("logprob").round(4)), "rounding", "rounded"),
    "bfloat16": (
        lambda s: with_tokens(s, pl.Series("logprob", bf16(s.tokens["logprob"].to_numpy()))),
        "rounding",
        "bfloat16",
    ),
    "cut responses": (lambda s: replace(s, tokens=s.tokens.filter(pl.col("position") < 8)), "lengths", "cut"),
    "groups of one": (
        lambda s: with_responses(s, pl.col("rollout_id").alias("group_id")),
        "groups",
        "id of each response",
    ),
    "advantages of other responses": (
        lambda s: with_responses(s, pl.col("advantage").reverse()),
        "advantages",
        "other responses",
    ),
    "engine renormalized over top-p": (
        lambda s: with_tokens(s, pl.Series("sampling_logprob", s.tokens["logprob"].to_numpy() - kept_mass(s))),
        "engine",
        "renormalized over 9",
    ),
    "engine with other weights": (
        lambda s: with_tokens(s, (pl.col("logprob") * 1.4).alias("sampling_logprob")),
        "engine",
        "other weights",
    ),
}


def kept_mass(sample: Sample) -> np.ndarray:
    """Return the log of the mass that top-p keeps at each token.

    Confident tokens need not lose mass.
    """
    entropy = sample.tokens["entropy"].to_numpy()
    return np.log(1 - np.minimum(0.2, entropy) * np.random.default_rng(0).random(len(entropy)))


def bf16(values: np.ndarray) -> np.ndarray:
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x8000) & 0xFFFF0000).astype(np.uint32).view(np.float32).astype(float)


def test_the_simulated_choice_is_balanced_at_the_right_temperature(clean: Sample):
    assert "balance" not in alarms(at_temperature(clean, 1.0))


@pytest.mark.parametrize("name", FAULTS)
def test_an_injected_fault_raises_its_alarm(clean: Sample, name: str):
    inject, check, cause = FAULTS[name]
    found = alarms(inject(clean))
    assert check in found
    assert cause in found[check].evidence + found[check].cause


def test_what_is_not_recorded_is_said(clean: Sample):
    lacking = with_tokens(clean, pl.lit(None, pl.Float64).alias("entropy"))
    states = {finding.check: finding for finding in audit_run(lacking, "run")}
    assert states["balance"].state == UNKNOWN
    assert states["balance"].evidence == "0 tokens have logprob and entropy; 1,000 are needed"
    assert states["groups"].state == "ok"
    assert states["model"].state == UNKNOWN
    assert states["model"].evidence.startswith("needs --model: temperature, top-p, top-k, logits off by one")
    recorded = {finding.check: finding for finding in audit_run(clean, "run")}["model"]
    assert recorded.evidence.startswith("needs --model: values of another policy version, text tokenized again")


def test_the_command_prints_findings_and_exits_with_1_on_an_alarm(command, tmp_path: Path, tiny_path: Path):
    code, out, _ = command("audit", str(FROZEN), "--json")
    found = json.loads(out)
    assert (code, found["alarms"]) == (0, 0)
    assert {"run_id", "check", "state", "evidence", "cause"} == set(found["findings"][0])
    code, out, _ = command("audit", str(FROZEN))
    assert code == 0
    assert out.decode().splitlines()[-1] == "1 runs, 13 checks, 0 alarms"
    assert command("audit", str(tmp_path / "none"))[0] == 2
    with pytest.raises(InputError):
        open_runs(tmp_path / "none")


def dump_of(sample: Sample, folder: Path, **changes: Callable[[list[float]], list[float]]) -> Path:
    """Write the rollouts of a sample as rows, with changed values."""
    rows = []
    for (rollout,), tokens in sample.tokens.group_by("rollout_id", maintain_order=True):
        response = sample.responses.row(by_predicate=pl.col("rollout_id") == rollout, named=True)
        values = {name: tokens[name].to_list() for name in ("logprob", "entropy")}
        rows.append(
            {
                "prompt_ids": [3, response["group_id"] % 300 + 5],
                "response_ids": tokens["token_id"].to_list(),
                **{name: response[name] for name in ("step", "reward", "advantage")},
                "is_truncated": tokens["is_truncated"][0],
                "group": f"g{response['group_id']}",
                **{name: changes.get(name, list)(value) for name, value in values.items()},
            }
        )
    path = folder / "dump.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_dump_is_audited_as_it_is(command, clean: Sample, tmp_path: Path):
    code, out, err = command("audit", str(dump_of(clean, tmp_path)), "--json")
    states = {finding["check"]: finding["state"] for finding in json.loads(out)["findings"]}
    assert (code, states["balance"], states["prefixes"], states["advantages"]) == (0, "ok", "ok", "ok"), err
    spoilt = dump_of(clean, tmp_path, logprob=lambda values: [1.3 * value for value in values])
    code, out, _ = command("audit", str(spoilt))
    assert code == 1
    assert "dump: balance: alarm: " in out.decode()
    assert not list(tmp_path.glob("*/run.json"))

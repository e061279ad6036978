"""Audit dumps against the policy that sampled them, with injected faults.

The dumps were written by TRL and by the classes of verifiers.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from trl import GRPOTrainer

import entrace
from entrace.analysis.audit import ALARM, Finding, Reference, Sample, audit_run
from entrace.analysis.audit.fits import fit_logprobs
from entrace.analysis.audit.sample import read_responses
from entrace.analysis.importers.temporary import as_traces
from entrace.trainer.cli.audit_model import Comparison
from entrace.trainer.config import load_config
from entrace.trainer.resources import find_base_policy
from entrace.trainer.train import train as run_training
from entrace.trl import Traced
from tests.slow import slow, slow_after

from .conftest import SMALL
from .trl_runs import build, load_policy

VERIFIERS = Path(__file__).parents[1] / "fixtures" / "dumps" / "verifiers" / "traces.jsonl.zst"
TEMPERATURE = 0.7
# 12 prompts in one step: about 10,000 tokens.
SIZES = {"per_device_train_batch_size": 96, "gradient_accumulation_steps": 4, "num_generations": 32, "max_steps": 1}


class TracedGRPO(Traced, GRPOTrainer):
    pass


@dataclass
class Case:
    """A dump with its model.

    ``values`` are those of an independent pass in float64. ``column`` holds the logprobs.
    """

    comparison: Comparison
    sample: Sample
    reference: Reference
    prompts: dict[int, list[int]]
    all_tokens: pl.DataFrame
    logits: np.ndarray

    def values(
        self, temperature: float = TEMPERATURE, logits: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return log-probabilities of all vocabulary entries, and entropies."""
        scaled = (self.logits if logits is None else logits) / temperature
        logp = (
            scaled
            - np.log(np.exp(scaled - scaled.max(1, keepdims=True)).sum(1, keepdims=True))
            - scaled.max(1, keepdims=True)
        )
        return logp, -(np.exp(logp) * logp).sum(1)

    @property
    def ids(self) -> np.ndarray:
        return self.reference.tokens["token_id"].to_numpy()

    def own(self, logp: np.ndarray) -> np.ndarray:
        return logp[np.arange(len(self.ids)), self.ids]

    def alarms(self, **columns: np.ndarray) -> dict[str, Finding]:
        """Replace recorded values, and return the alarms."""
        tokens = self.reference.tokens.with_columns(
            **{name: pl.Series(v, dtype=pl.Float64) for name, v in columns.items()}
        )
        joined = self.sample.tokens.drop(*columns).join(
            tokens.select("rollout_id", "position", *columns), on=["rollout_id", "position"], how="left"
        )
        reference = replace(self.reference, tokens=tokens)
        # The same tokens.
        vars(reference)["sampling"] = self.reference.sampling
        return alarms(replace(self.sample, tokens=joined), reference)


def alarms(sample: Sample, reference: Reference) -> dict[str, Finding]:
    return {finding.check: finding for finding in audit_run(sample, "run", reference) if finding.state == ALARM}


@torch.no_grad()
def logits_of(reference: Reference, prompts: dict[int, list[int]], tokens: pl.DataFrame, model=None) -> np.ndarray:
    """Return logits of the generated tokens in float64, from transformers alone.

    Each response has its own pass.
    """
    model = (model or load_policy()).eval()
    found = {}
    for (rollout,), rows in tokens.group_by("rollout_id", maintain_order=True):
        prompt, ids = prompts[rollout], rows["token_id"].to_list()
        logits = model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1].double().numpy()
        found[rollout] = logits[rows["is_generated"].to_numpy()]
    return np.concatenate([found[rollout] for rollout in dict.fromkeys(reference.responses.tolist())])


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    torch.set_num_threads(1)
    return Comparison.load("embedded", None, 8192)


@pytest.fixture(scope="module")
def trl_run(tmp_path_factory) -> Path:
    """Record a TRL step at temperature 0.7, and keep TRL's own completions."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("audit")
    traced = {"trace": out / "run", "correct": "is_right"}
    build(TracedGRPO, out, traced=traced, temperature=TEMPERATURE, log_completions=True, **SIZES).train()
    return out


@pytest.fixture(scope="module")
def trl(comparison, trl_run) -> Case:
    return case_of(comparison, entrace.open_runs(trl_run / "run"))


@pytest.fixture(scope="module")
def verifiers(comparison) -> Case:
    with as_traces([str(VERIFIERS)], None, comparison.codec, keep=comparison.keep) as (folders, _):
        return case_of(comparison, entrace.open_runs(folders))


def case_of(comparison: Comparison, runs) -> Case:
    [run_id] = runs.manifests
    sample = Sample.of(runs, run_id)
    prompts, _ = comparison.choose(runs, sample, run_id)
    reference = comparison.refer(runs, sample, run_id)
    tokens = read_responses(runs, run_id, prompts)
    return Case(comparison, sample, reference, prompts, tokens, logits_of(reference, prompts, tokens))


@pytest.fixture(params=["trl", pytest.param("verifiers", marks=pytest.mark.slow)])
def case(request) -> Case:
    return request.getfixturevalue(request.param)


def test_clean_dumps_raise_no_alarm(case: Case):
    assert len(case.reference.model) > 9000
    assert alarms(case.sample, case.reference) == {}


@pytest.mark.slow
def test_no_part_of_a_clean_dump_raises_an_alarm(case: Case):
    """Ten random halves of the responses of each dump raise no alarm.

    The checks without a model are included.
    """
    rng = np.random.default_rng(0)
    rollouts = np.unique(case.reference.responses)
    for _ in range(10):
        chosen = rng.choice(rollouts, len(rollouts) // 2, replace=False).tolist()
        rows = case.reference.tokens["rollout_id"].is_in(chosen).to_numpy()
        part = replace(case.reference, tokens=case.reference.tokens.filter(rows), model=case.reference.model.take(rows))
        # Half a group would have advantages that are not centered.
        tokens = case.sample.tokens.filter(pl.col("rollout_id").is_in(chosen))
        assert alarms(replace(case.sample, tokens=tokens), part) == {}


def test_the_kept_sums_reproduce_values_of_any_temperature_and_truncation(trl: Case):
    model = trl.reference.model
    for temperature in (0.3, 0.7, 0.77, 1.0, 1.3, 3.1):
        logp, entropy = trl.values(temperature)
        x = -np.log(temperature)
        np.testing.assert_allclose(model.logprob(x), trl.own(logp), atol=1e-3)
        np.testing.assert_allclose(model.entropy(x), entropy, atol=1e-3)
        fit = fit_logprobs(model, trl.own(logp), trl.reference.responses)
        assert fit.interval[0] - 1e-6 <= temperature <= fit.interval[1] + 1e-6
        assert fit.interval[1] / fit.interval[0] < 1.01


def truncated(case: Case, temperature: float, kind: str, limit: float) -> np.ndarray:
    """Return log-probabilities renormalized over the entries that truncation keeps."""
    logp, _ = case.values(temperature)
    p = -np.sort(-np.exp(logp), 1)
    if kind == "top-k":
        kept = p[:, : int(limit)].sum(1)
    elif kind == "min-p":
        kept = np.where(p >= limit * p[:, :1], p, 0).sum(1)
    else:
        kept = np.where(p.cumsum(1) - p < limit, p, 0).sum(1)
    return case.own(logp) - np.log(kept)


@pytest.mark.parametrize(("kind", "limit"), [("top-p", 0.9), slow("top-k", 5), slow("min-p", 0.1)])
@pytest.mark.parametrize("temperature", slow_after(1, [TEMPERATURE, 1.0]))
def test_a_truncation_is_estimated(trl: Case, kind: str, limit: float, temperature: float):
    values = truncated(trl, temperature, kind, limit)
    fit = fit_logprobs(trl.reference.model, values, trl.reference.responses)
    assert fit.truncation
    assert fit.truncation.kind == kind
    assert fit.limits[0] - 0.01 <= limit <= fit.limits[1] + 0.01
    assert fit.temperature == pytest.approx(temperature, abs=0.01)


def shifted(values: np.ndarray, responses: np.ndarray, by: int) -> np.ndarray:
    moved = np.roll(values, by)
    return np.where(np.roll(responses, by) == responses, moved, 0.0)


def off_by_one(case: Case) -> np.ndarray:
    """Return each token's log-probability in the next token's distribution."""
    logp, _ = case.values()
    following = np.roll(logp, -1, 0)[np.arange(len(case.ids)), case.ids]
    responses = case.reference.responses
    return np.where(np.roll(responses, -1) == responses, following, 0.0)


def permuted(case: Case, values: np.ndarray) -> np.ndarray:
    """Permute values within each response, equally in all columns."""
    rng = np.random.default_rng(0)
    order = np.lexsort((rng.random(len(values)), case.reference.responses))
    return values[order]


def of_other_responses(case: Case, values: np.ndarray) -> np.ndarray:
    """Swap the values of responses of equal length."""
    frame = pl.DataFrame({"response": case.reference.responses, "row": np.arange(len(values))})
    parts = frame.group_by("response", maintain_order=True).agg("row")["row"].to_list()
    found = values.copy()
    by_length: dict[int, list[list[int]]] = {}
    for part in parts:
        by_length.setdefault(len(part), []).append(part)
    for same in by_length.values():
        for part, other in zip(same, same[1:] + same[:1], strict=True):
            found[part] = values[other]
    return found


def noisy_policy(scale: float):
    """Return the policy with weights changed at random, by a share of their spread."""
    torch.manual_seed(1)
    model = load_policy()
    with torch.no_grad():
        for weight in model.parameters():
            weight += scale * weight.std() * torch.randn_like(weight)
    return model


def other_version(case: Case, scale: float) -> np.ndarray:
    logits = logits_of(case.reference, case.prompts, case.all_tokens, noisy_policy(scale))
    return case.own(case.values(logits=logits)[0])


FAULTS: dict[str, tuple[Callable[[Case], np.ndarray], str]] = {
    "temperature not applied": (lambda c: c.own(c.values(1.0)[0]), "was not applied to the values"),
    "temperature applied twice": (lambda c: c.own(c.values(0.49)[0]), "was applied twice"),
    "temperature multiplied": (lambda c: c.own(c.values(1 / 0.7)[0]), "multiplied by the temperature"),
    "top-p renormalized": (lambda c: truncated(c, TEMPERATURE, "top-p", 0.9), "renormalized over top-p 0.9"),
    "top-k renormalized": (lambda c: truncated(c, TEMPERATURE, "top-k", 4), "renormalized over top-k 4"),
    "logits off by one": (off_by_one, "logits off by one: each token in the distribution of the next one"),
    "values of the next position": (
        lambda c: shifted(c.own(c.values()[0]), c.reference.responses, -1),
        "values of the next token, shifted",
    ),
    "permuted mask": (lambda c: permuted(c, c.own(c.values()[0])), "in another order, as by a permuted mask"),
    "other responses": (lambda c: of_other_responses(c, c.own(c.values()[0])), "those of other responses"),
    "bits": (lambda c: c.own(c.values()[0]) / np.log(2), "in bits, not in nats"),
    "masked with 0": (
        lambda c: np.where(c.reference.tokens["position"] % 4 == 0, 0.0, c.own(c.values()[0])),
        "have the value 0, as of masked",
    ),
}


@pytest.mark.parametrize("name", slow_after(3, FAULTS))
def test_a_fault_of_log_probabilities_is_found(case: Case, name: str):
    inject, cause = FAULTS[name]
    found = case.alarms(logprob=inject(case))
    assert cause in found["model logprob"].cause, found["model logprob"]
    assert "model tokens" not in found


@pytest.mark.parametrize("name", slow_after(1, ["temperature not applied", "top-p renormalized", "logits off by one"]))
def test_a_fault_of_the_engine_beside_a_trainer_is_found(trl: Case, name: str):
    inject, cause = FAULTS[name]
    found = trl.alarms(sampling_logprob=inject(trl))
    assert cause in found["model engine logprob"].cause
    assert "model logprob" not in found


ENTROPIES: dict[str, tuple[Callable[[Case], np.ndarray], str]] = {
    "surprisal": (lambda c: -c.own(c.values()[0]), "the surprisal was recorded as entropy"),
    "another temperature": (lambda c: c.values(1.0)[1], "was not applied to the values"),
    "bits": (lambda c: c.values()[1] / np.log(2), "in bits"),
    "share of the largest": (lambda c: c.values()[1] / np.log(512), "divided by ln of the vocabulary"),
    "next position": (lambda c: shifted(c.values()[1], c.reference.responses, -1), "entropies of the next token"),
    "permuted": (lambda c: permuted(c, c.values()[1]), "in another order"),
}


@pytest.mark.parametrize("name", ENTROPIES)
def test_a_fault_of_entropies_is_found(trl: Case, name: str):
    inject, cause = ENTROPIES[name]
    assert cause in trl.alarms(entropy=inject(trl))["model entropy"].cause


@pytest.mark.slow
def test_another_version_of_the_policy_is_not_told_from_another_model(case: Case):
    found = case.alarms(logprob=other_version(case, 0.15))["model logprob"]
    assert "another version of the policy or another model, which cannot be told apart" in found.cause


def reread(case: Case, tokens: pl.DataFrame) -> dict[str, Finding]:
    """Return the alarms of edited tokens.

    Missing log-probabilities and entropies are filled in from the model.
    """
    numbered = tokens.with_columns(position=pl.int_range(pl.len()).over("rollout_id"))
    reference = case.comparison.read(numbered, case.prompts, "edited")
    model, x = reference.model, -np.log(TEMPERATURE)
    honest = {"logprob": model.logprob(x), "entropy": model.entropy(x)}
    filled = reference.tokens.with_columns(pl.coalesce(name, pl.Series(v)).alias(name) for name, v in honest.items())
    reference = replace(reference, tokens=filled)
    lengths = case.sample.responses.select("rollout_id", "group_id")
    as_sampled = filled.join(lengths, on="rollout_id", how="left").with_columns(
        turn=None, generated_length=None, response_length=None, is_truncated=pl.lit(False)
    )
    return alarms(replace(case.sample, tokens=as_sampled), reference)


def insert(rows: pl.DataFrame, at: int, ids: list[int]) -> pl.DataFrame:
    """Insert tokens without values into a response."""
    fresh = rows.head(1).drop("token_id", "logprob", "entropy", "sampling_logprob", "is_generated")
    fresh = fresh.join(pl.DataFrame({"token_id": ids}, schema={"token_id": pl.Int32}), how="cross")
    fresh = fresh.with_columns(is_generated=True)
    return pl.concat([rows[:at], fresh, rows[at:]], how="diagonal")


def edited(case: Case, edit: Callable[[pl.DataFrame], pl.DataFrame], every: int) -> pl.DataFrame:
    frames = case.all_tokens.partition_by("rollout_id", maintain_order=True)
    return pl.concat([edit(rows) if n % every == 0 else rows for n, rows in enumerate(frames)], how="diagonal_relaxed")


def split_tokens(case: Case, rows: pl.DataFrame) -> pl.DataFrame:
    """Tokenize part of a response byte by byte.

    Values of the new tokens are the model's.
    """
    tokenizer = case.comparison.policy.tokenizer
    ids = rows["token_id"].to_list()
    middle = [i for token in ids[5:9] for text in tokenizer.decode([token]) for i in tokenizer.encode(text)]
    kept = rows.filter(~pl.int_range(pl.len()).is_between(5, 8))
    return insert(kept, 5, middle)


# " weather river garden total town music coffee train"
TOOL_OUTPUT = [477, 483, 458, 417, 460, 474, 468, 472]

TOKENS: dict[str, tuple[Callable[[Case], pl.DataFrame], str]] = {
    "tool output counted": (
        lambda c: edited(c, lambda rows: insert(rows, 6, TOOL_OUTPUT), 3),
        "tool output or user turns",
    ),
    "padding counted": (lambda c: edited(c, lambda rows: insert(rows, rows.height, [1] * 8), 5), "padding was counted"),
    "text tokenized again": (lambda c: edited(c, lambda rows: split_tokens(c, rows), 4), "text tokenized again"),
}


@pytest.mark.parametrize("name", slow_after(1, TOKENS))
def test_tokens_that_were_not_sampled_are_found(case: Case, name: str):
    edit, cause = TOKENS[name]
    found = reread(case, edit(case))
    assert cause in found["model tokens"].cause, found["model tokens"]


@pytest.mark.slow
def test_values_of_other_token_ids_are_found(trl: Case):
    """Token ids come from the text tokenized again, values from the sampled tokens."""

    def retokenize(rows: pl.DataFrame) -> pl.DataFrame:
        found = split_tokens(trl, rows)
        values = rows["logprob"].to_list()
        values += [-0.5] * (found.height - len(values))
        return found.with_columns(logprob=pl.Series(values[: found.height]))

    found = reread(trl, edited(trl, retokenize, 3))
    assert "as of text tokenized again" in found["model logprob"].cause, found


def test_a_model_of_other_weights_did_not_sample_the_tokens(trl: Case, comparison: Comparison):
    """A model that is not the policy shows in the tokens, not only in values."""
    model = comparison.policy.model
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    try:
        model.load_state_dict(noisy_policy(0.3).state_dict())
        found = alarms(trl.sample, comparison.read(trl.all_tokens, trl.prompts, "step 1"))
    finally:
        model.load_state_dict(before)
    assert "did not sample these tokens: another version of the policy or another model" in found["model tokens"].cause
    assert "model logprob" in found


def test_completions_of_trl_hold_groups_and_advantages_but_no_values(trl_run: Path, command, tmp_path: Path):
    """TRL's own file shows faults of groups and advantages.

    Everything else is reported as missing.
    """
    source = trl_run / "completions" / "completions_00001.parquet"
    arguments = ("--tokenizer", str(find_base_policy()), "--json")

    def run(name: str, rows: pl.DataFrame) -> dict[str, dict]:
        path = tmp_path / name / "completions_00001.parquet"
        path.parent.mkdir()
        rows.write_parquet(path)
        _, out, _ = command("audit", str(path), *arguments)
        return {finding["check"]: finding for finding in json.loads(out)["findings"]}

    rows = pl.read_parquet(source)
    clean = run("clean", rows)
    assert not [finding for finding in clean.values() if finding["state"] == ALARM]
    assert clean["advantages"]["state"] == clean["groups"]["state"] == "ok"
    assert "neither log-probabilities nor entropies are recorded" in clean["model"]["evidence"]
    wrong = run("advantages", rows.with_columns(pl.col("advantage").reverse()))
    assert wrong["advantages"]["state"] == ALARM
    numbered = pl.format("{} {}", pl.int_range(pl.len()), pl.col("prompt").list.first().struct.field("content"))
    alone = rows.with_columns(prompt=numbered)
    assert run("groups", alone)["groups"]["state"] == ALARM


def test_the_command_compares_what_the_model_sampled(trl_run: Path, call):
    status, out, _ = call("audit", trl_run / "run", "--model", "embedded")
    assert status == 0
    assert "tokens of step 1 (sampled by the starting policy) were sampled at temperature 0." in out
    assert "values of logprob fit temperature 0.700 [0.700, 0.700] at 100.0% of the tokens" in out
    status, out, _ = call("audit", trl_run / "completions", "--model", "embedded")
    assert status == 0
    assert "tokens of the dump (token ids of 384 responses from text) were sampled at" in out


@pytest.fixture(scope="module")
def native_run(tmp_path_factory) -> Path:
    """Train three steps with a large learning rate.

    Checkpoints exist after steps 2 and 3.
    """
    out = tmp_path_factory.mktemp("native") / "run"
    changes = ["steps=3", "rollout.prompts_per_step=12", "optim.lr=3e-3", "optim.warmup_steps=0", "eval.every=3"]
    run_training(load_config("tiny", [*SMALL, *changes, "record.checkpoint_every=1"]), out, {})
    return out


def test_a_policy_is_compared_with_the_step_that_it_sampled(native_run: Path, call):
    checkpoint = native_run / "checkpoints" / "step-000002" / "policy"
    for model, about in (
        ("embedded", "step 1 (sampled by the starting policy)"),
        (checkpoint, "step 3 (sampled by checkpoint step-000002)"),
    ):
        status, out, err = call("audit", native_run, "--model", model)
        assert (status, f"tokens of {about} were sampled at temperature" in out) == (0, True), out + err
    # The last checkpoint sampled no recorded response.
    status, _, err = call("audit", native_run, "--model", native_run / "checkpoints" / "step-000003" / "policy")
    assert (status, err.count("no response was sampled after 3 updates")) == (2, 1)


@pytest.mark.slow
def test_a_policy_that_is_not_known_to_have_sampled_is_refused(native_run: Path, call, tmp_path: Path):
    copy = shutil.copytree(native_run / "checkpoints" / "step-000002" / "policy", tmp_path / "policy")
    status, _, err = call("audit", native_run, "--model", copy)
    assert status == 2
    assert "is neither its starting policy nor one of its checkpoints; name the step that it sampled with" in err
    status, out, _ = call("audit", native_run, "--model", copy, "--model-step", "3")
    assert (status, "tokens of step 3 were sampled" in out) == (0, True)
    # Another version of the policy.
    status, out, _ = call("audit", native_run, "--model", copy, "--model-step", "1")
    assert (status, "another version of the policy or another model, which cannot be told apart" in out) == (1, True)
    assert call("audit", native_run, "--model", copy, "--model-step", "9")[0] == 2
    assert call("audit", native_run, "--model", copy, "--model-step", "last")[0] == 2
    assert call("audit", native_run, "--model-step", "1")[0] == 2


def test_a_dump_of_several_steps_needs_the_step_of_the_model(call, tmp_path: Path):
    rows = [
        {"step": step, "prompt": f"{n} + 1 =", "response_ids": [300 + n, 1], "logprob": [-1.0, -0.1], "reward": n % 2}
        for step in (1, 2)
        for n in range(8)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    status, _, err = call("audit", path, "--model", "embedded")
    assert (status, "holds 2 steps, and embedded sampled at most one of them; name it with --model-step" in err) == (
        2,
        True,
    )
    _, out, _ = call("audit", path, "--model", "embedded", "--model-step", "2")
    assert "16 tokens were compared with the model; 1,000 are needed" in out

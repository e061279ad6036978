"""Test log-probability and entropy of the base policy at each stored token.

Both values are recorded on request.
"""

import polars as pl
import pytest
import torch

from entrace.analysis.runs import open_runs
from entrace.trainer.config import PolicyConfig, load_config
from entrace.trainer.learner import Learner
from entrace.trainer.model.policy import Policy
from entrace.trainer.train import train

from .conftest import SHORT

NAMES = ["reference_logprob", "reference_entropy"]
OPTIONS = [*SHORT, "rollout.temperature=0.8", "optim.micro_batch_tokens=300", "optim.lr=3e-3", "optim.warmup_steps=0"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Return the folders of equal runs with and without the reference policy."""
    folder = tmp_path_factory.mktemp("runs")
    for name, value in (("with", "true"), ("without", "false")):
        train(load_config("tiny", [*OPTIONS, f"record.reference={value}"]), folder / name, {})
    return folder


def read(run_dir, table):
    return pl.read_parquet(run_dir / table / "*.parquet")


def test_nothing_else_changes(runs):
    with_reference, without = (read(runs / name, "tokens").drop("run_id") for name in ("with", "without"))
    assert with_reference.drop(NAMES).equals(without.drop("reference_logprob"))
    assert "reference_entropy" not in without.columns
    assert without["reference_logprob"].null_count() == len(without)
    assert read(runs / "with", "steps")["kl"].null_count() == 4, "a reference policy without KL term adds no KL"


def test_values_are_those_of_the_base_policy_in_float64(runs):
    tokens = read(runs / "with", "tokens").sort("rollout_id", "position")
    assert tokens.select(NAMES).null_count().row(0) == (0, 0)
    first, last = tokens.filter(step=1), tokens.filter(step=4)
    assert first.select((pl.col("entropy") - pl.col("reference_entropy")).abs().max()).item() < 1e-4
    assert last.select((pl.col("entropy") - pl.col("reference_entropy")).abs().max()).item() > 0.05
    policy, model = Policy.load(PolicyConfig(device="cpu")), Policy.load(PolicyConfig(device="cpu")).model.double()
    prompts = dict(read(runs / "with", "prompts").select("prompt_id", "prompt").rows())
    for _, rows in last.group_by("rollout_id", maintain_order=True):
        prompt = policy.encode_prompt(prompts[rows["prompt_id"][0]])
        response = torch.tensor(rows["token_id"].to_list())
        with torch.no_grad():
            logits = model(torch.cat((torch.tensor(prompt), response))[None]).logits[0, len(prompt) - 1 : -1] / 0.8
        logp = torch.log_softmax(logits, -1)
        wanted = (logp.gather(1, response[:, None]).squeeze(1), -(logp.exp() * logp).sum(-1))
        for name, values in zip(NAMES, wanted, strict=True):
            torch.testing.assert_close(torch.tensor(rows[name]).double(), values, rtol=1e-4, atol=2e-5)


def test_high_entropy_tokens_are_those_of_the_base_policy_before_the_first_update(runs):
    found = open_runs(runs / "with").query("entropy_persistence")
    assert found["step"].to_list() == [1, 2, 3, 4]
    assert found["share"][0] > 0.99
    assert found["share"][3] < 1
    assert (found["independent"] - 0.2).abs().max() < 0.03
    without = open_runs(runs / "without")
    assert without.ask("entropy_persistence").is_empty()
    why = without.why_empty("entropy_persistence")
    assert why.endswith("train with record.reference=true, or import with --reference")


@pytest.mark.parametrize(
    ("options", "loads"),
    [
        ((), 0),
        (("record.reference=true",), 1),
        (("loss.kl_coef=0.1",), 1),
        (("record.reference=true", "loss.kl_coef=0.1"), 1),
    ],
)
def test_loss_and_recording_share_one_reference_policy(policy, monkeypatch, options, loads):
    loaded = []
    monkeypatch.setattr(type(policy), "load", lambda config: loaded.append(policy) or policy)
    learner = Learner(load_config("tiny", [*OPTIONS, *options]), policy)
    assert len(loaded) == loads
    assert (learner.reference is not None) == bool(loads)

"""Test that every method can be selected by name, and acts as named.

The released no-op changes nothing.
"""

from functools import cache

import polars as pl
import pytest

from entrace.analysis.trace import InputError
from entrace.trainer.ablation.arms import describe_methods, list_methods, method_settings
from entrace.trainer.config import build_config, load_config
from entrace.trainer.resources import resolve_config
from entrace.trainer.settings import merge, parse_override, read_toml
from entrace.trainer.train import train
from tests.slow import slow_except

from .conftest import SHORT

# Several updates a step, so that bounds, ratios and penalties on the ratio have something to act on.
BUSY = [
    *SHORT,
    "task.num_heldout=1",
    "eval.samples=1",
    "steps=2",
    "optim.mini_batches=3",
    "optim.lr=1e-3",
    "optim.warmup_steps=0",
    "rollout.max_refills=1",
]
ACTIVE = {
    "position": ["shaping.position.start_step=1"],
    "position_reversed": ["shaping.position.start_step=1"],
    # Bounds that so few tokens reach; the defaults are tested against a loop.
    "clip_cov": ["loss.clip_cov.low=0.01", "loss.clip_cov.frac=0.2"],
    "kl_cov": ["loss.kl_cov.frac=0.5"],
    "no_clip_higher": ["optim.epochs=4"],
    "no_overlong_penalty": ["rollout.max_response_tokens=40"],
    "scale_matched": ["shaping.scale_matched.mirrors=weighted_reinforce"],
    "pass_at_k": ["shaping.pass_at_k.k=2"],
    "ce_gppo": ["optim.epochs=4"],
    "cispo": ["optim.epochs=4"],
    "dcpo": ["optim.epochs=4"],
    # The entropy of step 1 decides on the bonus of step 2, which step 3 sees.
    "adaptive_entropy": ["loss.adaptive_entropy.target=9", "loss.adaptive_entropy.initial=0.01", "steps=3"],
}
METHODS = list_methods()
UNCHANGED = {"none", "released_noop"}
# One or two of every kind; the others are slow, and released_noop has a stronger test below.
QUICK = {"none", "ppl", "kl_cov", "cispo", "pass_at_k", "no_dynamic_sampling"}


def config_of(name, *overrides):
    values = read_toml(resolve_config("tiny"))
    for override in [*BUSY, *ACTIVE.get(name, ()), *overrides]:
        values = merge(values, parse_override(override))
    return build_config(merge(values, method_settings(name)), source=name)


def test_all_methods_are_there():
    assert set(METHODS) == {
        *("none", "ppl", "position", "entropy_advantage", "reweighting", "psr", "nsr", "weighted_reinforce"),
        *("no_clip_higher", "no_token_mean", "no_dynamic_sampling", "no_overlong_penalty", "dr_grpo", "gspo"),
        *("entropy_mask", "clip_cov", "kl_cov", "low_ppl_only", "high_ppl_only"),
        *("quantile_advantage", "pass_at_k", "unlikeliness", "steer", "ce_gppo", "cispo", "dcpo", "erc", "lopti"),
        "adaptive_entropy",
        *("ppl_high", "ppl_permuted", "position_reversed", "scale_matched", "released_noop"),
    }


def tokens_of(config, out):
    train(config, out, {})
    return pl.read_parquet(out / "tokens" / "*.parquet").sort("rollout_id", "position")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Return the tokens of plain GRPO, trained once per setting."""

    @cache
    def run(*overrides):
        return tokens_of(config_of("none", *overrides), tmp_path_factory.mktemp("plain") / "run")

    return run


@pytest.mark.parametrize("name", [*slow_except(QUICK, METHODS), "ppl+position"])
def test_a_method_changes_the_run_unless_it_changes_nothing(name, plain, tmp_path):
    """Responses of step 1 are those of plain GRPO; later weights differ.

    Responses of the last step come from other weights.
    """
    shared = [override for override in ACTIVE.get(name, ()) if override.startswith(("optim.", "rollout.", "steps"))]
    both = plain(*shared), tokens_of(config_of(name), tmp_path / "run")
    exact = [frame.filter(step=frame["step"].max()).select("token_id", "logprob", "shaped_advantage") for frame in both]
    assert exact[0].equals(exact[1]) == (name in UNCHANGED)
    first = [frame.filter(step=1).head(1000)["logprob"].to_list() for frame in both]
    if name != "no_overlong_penalty" and name != "no_dynamic_sampling":
        assert first[0] == first[1]


def test_released_noop_equals_none_bit_for_bit(tmp_path):
    """Compare tokens, statistics, losses, and evaluations of a run.

    The run has several updates per step.
    """
    for name in UNCHANGED:
        train(config_of(name), tmp_path / name, {})
    for table, skipped in {
        "tokens": ["run_id"],
        "evals": ["run_id"],
        "steps": ["run_id", "is_shaped", *(f"{phase}_s" for phase in ("rollout", "reward", "update", "record"))],
    }.items():
        frames = [pl.read_parquet(tmp_path / name / table / "*.parquet").drop(skipped) for name in sorted(UNCHANGED)]
        assert frames[0].equals(frames[1]), table


def test_shaping_composes_and_other_kinds_do_not():
    assert method_settings("ppl+position") == {"shaping": {"method": "ppl+position"}}
    assert method_settings("clip_cov") == {"loss": {"clip_low": 1.0, "clip_high": 1.0, "method": "clip_cov"}}
    with pytest.raises(InputError, match="only shaping methods can be joined"):
        method_settings("gspo+ppl")
    with pytest.raises(InputError, match='unknown method "pppl"; did you mean "ppl"'):
        method_settings("position+pppl")


def test_overrides_in_the_description_select_the_method():
    for name, entry in describe_methods().items():
        assert load_config("tiny", entry["settings"]) == build_config(
            merge(read_toml(resolve_config("tiny")), method_settings(name)), source=name
        )
        assert entry["equation"]
        assert entry["source"]

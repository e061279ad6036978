"""Check what must hold for recorded values of any policy, without a model.

- The mean surprisal of tokens equals their mean entropy if both belong to the distribution that the tokens were
  sampled from. The sum of the differences over a response is a martingale, so its error follows from the scatter of
  responses.
- Responses to one prompt that begin with the same tokens have the same distribution at the next token.
- Advantages increase linearly with the reward, within a group or within a step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from entrace.analysis.audit.findings import AlarmError, LackingError
from entrace.analysis.audit.sample import MIN_RESPONSES, Sample

if TYPE_CHECKING:
    import polars as pl

MIN_GROUPS = 5
# Standard errors, and relative size, from which a difference between surprisal and entropy counts.
MAX_Z, MAX_EXCESS = 4.0, 0.02
# Nats by which values of one distribution may differ, as in bfloat16.
TOLERANCE = 0.05
# Share of tokens, groups, or responses that may be exceptions.
MAX_SHARE = 0.02
MAX_KL, MAX_FAR = 0.01, 0.01
# Mass that a mismatch of rounding may miss.
MAX_MISSING = 0.005
MIN_CORRELATION = 0.999
# Decimals that a format writes by default.
WRITTEN_DECIMALS = {"verifiers": 4}
# Tokens over which stretches of unlikely tokens are looked for, and their surprisal in excess of the entropy, in nats.
WINDOW, UNLIKELY = 5, 3.0


def check_range(sample: Sample) -> str:
    """Check that log-probabilities and entropies are possible.

    They must be those of some distribution over the vocabulary.
    """
    tokens = sample.tokens.select("logprob", "entropy", "sampling_logprob")
    if not any(tokens[name].count() for name in tokens.columns):
        raise LackingError("no log-probabilities and no entropies were recorded")
    largest = np.log(max(sample.num_entries, 2))
    outside = {
        "log-probabilities above 0": _count(tokens["logprob"] > 1e-4) + _count(tokens["sampling_logprob"] > 1e-4),
        "entropies below 0": _count(tokens["entropy"] < -1e-4),
        f"entropies above ln {sample.num_entries:,}": _count(tokens["entropy"] > largest + 0.01),
    }
    if found := [f"{number:,} {name}" for name, number in outside.items() if number]:
        raise AlarmError(", ".join(found), "not the logarithm of a probability, in other units, or with the wrong sign")
    return f"{tokens.height:,} tokens"


def check_entropy(sample: Sample) -> str:
    """Check that the entropy is not the surprisal of the sampled token."""
    tokens = sample.known("logprob", "entropy")
    share = _share((tokens["entropy"] + tokens["logprob"]).abs() < 1e-3)
    uncertain = tokens.filter(tokens["entropy"] > 0.1)
    equal = _share((uncertain["entropy"] + uncertain["logprob"]).abs() < 1e-3)
    if uncertain.height and equal > 0.9:
        raise AlarmError(f"entropy = -logprob in {share:.0%} of the tokens", "the surprisal was recorded as entropy")
    return f"entropy = -logprob in {share:.1%} of the tokens"


def check_balance(sample: Sample) -> str:
    """Check that mean surprisal and mean entropy are equal; see the module."""
    tokens = sample.known("logprob", "entropy")
    return _balance(tokens, "logprob")


def check_engine_balance(sample: Sample) -> str:
    """Check that the engine's mean surprisal equals the mean entropy."""
    return _balance(sample.known("sampling_logprob", "entropy"), "sampling_logprob")


def _balance(tokens: pl.DataFrame, column: str) -> str:
    import polars as pl

    tokens = tokens.with_columns(excess=-pl.col(column) - pl.col("entropy"))
    sums = tokens.group_by("rollout_id", maintain_order=True).agg(pl.col("excess").sum())["excess"].to_numpy()
    if len(sums) < MIN_RESPONSES:
        raise LackingError(f"{len(sums)} responses; {MIN_RESPONSES} are needed")
    surprisal, entropy = -tokens[column].to_numpy().mean(), tokens["entropy"].to_numpy().mean()
    z = float(sums.sum() / max(np.sqrt((sums**2).sum()), 1e-12))
    evidence = f"mean surprisal {surprisal:.4f}, mean entropy {entropy:.4f} nats (z = {z:+.1f})"
    # A few tokens that the policy hardly ever samples scatter so much that z stays small.
    stretches = _share_in_stretches(tokens)
    is_far = abs(surprisal - entropy) > MAX_EXCESS * max(entropy, 0.05)
    if surprisal > entropy + 1 and stretches < 0.5:
        raise AlarmError(
            evidence, "log-probabilities of other tokens, such as logits off by one, or text tokenized again"
        )
    if surprisal > entropy and is_far and stretches > 0.5:
        raise AlarmError(evidence, "tokens that the policy did not sample, such as tool output, user turns, or padding")
    if abs(z) > MAX_Z and is_far:
        way = ("flatter", "above 1") if z > 0 else ("sharper", "below 1, top-p, top-k, or min-p")
        raise AlarmError(
            evidence, f"sampled from a {way[0]} distribution: a temperature {way[1]} was not applied to the values"
        )
    return evidence


def _share_in_stretches(tokens: pl.DataFrame) -> float:
    """Return the share of excess surprisal in stretches of unlikely tokens.

    Such a stretch is unlikely throughout.
    """
    import polars as pl

    mean = pl.col("excess").rolling_mean(WINDOW).over("rollout_id")
    inside = tokens.with_columns(mean=mean).filter(pl.col("mean") > UNLIKELY)
    covered = inside.height / tokens.height
    total = float(tokens["excess"].clip(0).sum())
    return float(inside["excess"].clip(0).sum()) / total if total and covered < 0.5 else 0.0


def check_prefixes(sample: Sample) -> str:
    """Check that responses of a group have equal values where they begin alike."""
    import polars as pl

    tokens = sample.known("entropy", "group_id")
    prefixes = _prefixes(tokens["rollout_id"].to_numpy(), tokens["token_id"].to_numpy())
    spread = (
        tokens.with_columns(prefix=pl.Series(prefixes))
        .group_by("step", "group_id", "position", "prefix")
        .agg(pl.len(), spread=pl.col("entropy").max() - pl.col("entropy").min())
        .filter(pl.col("len") > 1)
    )
    if spread.height < MIN_GROUPS:
        raise LackingError(f"{spread.height} prefixes are shared by two responses of a group; {MIN_GROUPS} are needed")
    share = _share(spread["spread"] > TOLERANCE)
    evidence = (
        f"{spread.height:,} prefixes are shared; entropies differ by more than {TOLERANCE} at {share:.1%} of them"
    )
    if share > 0.1:
        raise AlarmError(evidence, "values of other positions: shifted, permuted, masked wrongly, or of other prompts")
    return evidence


def _prefixes(responses: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Return a hash of the tokens before each token of its response, shape ``(N,)``."""
    hashes = np.zeros(len(ids), np.int64)
    for i in range(1, len(ids)):
        if responses[i] == responses[i - 1]:
            hashes[i] = hash((int(hashes[i - 1]), int(ids[i - 1])))
    return hashes


def check_alignment(sample: Sample) -> str:
    """Check that surprisal rises with entropy from token to token."""
    tokens = sample.known("logprob", "entropy")
    entropy, surprisal = tokens["entropy"].to_numpy(), -tokens["logprob"].to_numpy()
    if entropy.std() < 0.05:
        raise LackingError("the entropy hardly varies")
    ranks = [np.argsort(np.argsort(values)) for values in (entropy, surprisal)]
    correlation = float(np.corrcoef(ranks[0], ranks[1])[0, 1])
    if correlation < 0.2:
        cause = "entropies and log-probabilities of different positions, such as a permuted mask"
        raise AlarmError(f"rank correlation of surprisal and entropy is {correlation:.2f}", cause)
    return f"rank correlation of surprisal and entropy is {correlation:.2f}"


def check_rounding(sample: Sample) -> str:
    """Check that log-probabilities have the precision of float32."""
    tokens = sample.tokens
    column = next((name for name in ("logprob", "sampling_logprob", "entropy") if tokens[name].count() >= 100), None)
    if column is None:
        raise LackingError("no log-probabilities and no entropies were recorded")
    values = tokens[column].drop_nulls().to_numpy()
    values = np.abs(values[np.abs(values) > 0.01])
    if len(values) < 50:
        raise LackingError(f"{len(values)} values of {column} differ from 0")
    for decimals in range(1, 6):
        scaled = values * 10**decimals
        # float32 stores decimals with a relative error of 6e-8.
        if (np.abs(scaled - np.round(scaled)) < 2e-6 * scaled + 1e-9).mean() > 0.99:
            if WRITTEN_DECIMALS.get(sample.form) == decimals:
                return f"{column} has {decimals} decimals, as {sample.form} writes it by default"
            raise AlarmError(f"{column} has {decimals} decimals", "rounded when it was stored")
    for bits, kind in ((8, "bfloat16"), (11, "float16")):
        mantissa = np.frexp(values)[0] * 2**bits
        if (mantissa == np.round(mantissa)).mean() > 0.99:
            raise AlarmError(f"{column} has the {bits}-bit mantissa of {kind}", f"computed or stored in {kind}")
    return f"{column} of {len(values):,} tokens is not rounded"


def check_ends(sample: Sample) -> str:
    """Check that nothing follows the end of a response."""
    import polars as pl

    tokens = sample.tokens.filter(pl.col("turn").is_null() | (pl.col("turn") == 0))
    tokens = tokens.filter(pl.col("generated_length") == pl.col("response_length"))
    last = tokens.group_by("rollout_id", maintain_order=True).agg(
        pl.col("token_id").last(), pl.col("is_truncated").first()
    )
    finished = last.filter(~pl.col("is_truncated").fill_null(False))
    if finished.height < MIN_RESPONSES:
        raise LackingError(f"{finished.height} responses of one turn ended by themselves; {MIN_RESPONSES} are needed")
    [(end, number)] = finished["token_id"].value_counts(sort=True).head(1).iter_rows()
    after = tokens.filter((pl.col("token_id") == end).cast(pl.Int32).cum_sum().over("rollout_id") > 1)
    share = after["rollout_id"].n_unique() / last.height
    evidence = f"{number:,} of {finished.height:,} finished responses end with token {end}"
    if share > MAX_SHARE:
        raise AlarmError(f"{share:.0%} of the responses continue after token {end}", "padding was counted as generated")
    return evidence


def check_lengths(sample: Sample) -> str:
    """Check that each response has as many tokens as its length says."""
    import polars as pl

    counted = sample.tokens.group_by("rollout_id").agg(pl.len(), pl.col("generated_length").first())
    counted = counted.drop_nulls()
    if counted.is_empty():
        raise LackingError("no tokens were recorded")
    wrong = counted.filter(pl.col("len") != pl.col("generated_length")).height
    if wrong:
        raise AlarmError(
            f"{wrong:,} of {counted.height:,} responses have another number of tokens than recorded", "cut tokens"
        )
    return f"{counted.height:,} responses"


def check_groups(sample: Sample) -> str:
    """Check that groups have several responses."""
    sizes = sample.responses["group_id"].value_counts()["count"]
    if sizes.is_empty():
        raise LackingError("no responses were recorded")
    if sizes.len() >= MIN_GROUPS and _share(sizes == 1) > 0.9:
        cause = "an id of each response was taken for the id of its group; no advantage within a group exists"
        raise AlarmError(f"{_count(sizes == 1):,} of {sizes.len():,} groups have one response", cause)
    return f"{sizes.len():,} groups of {sizes.min()} to {sizes.max()} responses"


def check_advantages(sample: Sample) -> str:
    """Check that advantages rise linearly with reward, per group or per step."""
    import polars as pl

    known = sample.responses.drop_nulls(["reward", "advantage"])
    # Left out of the update, or without a baseline.
    known = known.filter((pl.col("advantage") != 0).any().over("group_id"))
    varied = known.filter((pl.col("reward").max() - pl.col("reward").min() > 1e-6).over("group_id"))
    if varied["group_id"].n_unique() < MIN_GROUPS:
        raise LackingError(f"{varied['group_id'].n_unique()} groups have rewards that differ, and advantages")
    found = varied.group_by("group_id", maintain_order=True).agg(
        correlation=pl.corr("reward", "advantage"), mean=pl.col("advantage").mean(), std=pl.col("advantage").std()
    )
    is_linear = pl.col("correlation") > MIN_CORRELATION
    wrong = float(found.select((~(is_linear & pl.col("correlation").is_finite())).mean()).item())
    off_center = float(found.select((pl.col("mean").abs() > 0.05 * pl.col("std")).mean()).item())
    uniform = known.join(varied.select("group_id").unique(), on="group_id", how="anti")
    # A baseline of the whole step, as in REINFORCE, gives groups a mean.
    per_step = known.group_by("step").agg(correlation=pl.corr("reward", "advantage"))["correlation"].drop_nans()
    is_step_wise = _share(per_step > MIN_CORRELATION) == 1
    evidence = f"{found.height:,} groups with different rewards; advantages of {wrong:.0%} are not linear in the reward"
    if wrong > MAX_SHARE:
        raise AlarmError(evidence, "advantages of other responses, of other rewards, or after shaping")
    if not is_step_wise and off_center > MAX_SHARE:
        raise AlarmError(
            f"{evidence}, and of {off_center:.0%} are not centered", "normalized over other responses than the group"
        )
    if not is_step_wise and uniform.height:
        number = uniform["group_id"].n_unique()
        raise AlarmError(
            f"{number:,} groups with equal rewards have advantages", "rewards are not those of the advantages"
        )
    return evidence


def check_engine(sample: Sample) -> str:
    """Check that engine and trainer give sampled tokens the same probabilities.

    The mean ratio p trainer / p engine over sampled tokens is the trainer's mass on the tokens that the engine could
    sample: 1, unless the engine's values are renormalized over a part of the vocabulary.
    """
    tokens = sample.known("logprob", "sampling_logprob")
    difference = (tokens["logprob"] - tokens["sampling_logprob"]).to_numpy()
    kl = float((np.expm1(difference) - difference).mean())
    far = float((np.abs(difference) > np.log(2)).mean())
    ratio = np.exp(difference)
    z = float((ratio.mean() - 1) / max(ratio.std() / np.sqrt(len(ratio)), 1e-12))
    evidence = (
        f"KL(engine, trainer) = {kl:.5f} nats per token, mean ratio {ratio.mean():.3f} (z = {z:+.1f}), "
        f"outside [1/2, 2] at {far:.2%} of the tokens"
    )
    if z < -MAX_Z and ratio.mean() < 1 - MAX_MISSING:
        kept = f"renormalized over {ratio.mean():.1%} of the mass, as by top-p, top-k, or min-p"
        raise AlarmError(evidence, f"the engine's values are {kept}, or of a lower temperature than it sampled at")
    if kl > MAX_KL or far > MAX_FAR:
        raise AlarmError(evidence, "other weights, precision, temperature, or tokens; see question engine_mismatch")
    return evidence


CHECKS: dict[str, Callable[[Sample], str]] = {
    "range": check_range,
    "entropy": check_entropy,
    "balance": check_balance,
    "engine balance": check_engine_balance,
    "alignment": check_alignment,
    "prefixes": check_prefixes,
    "rounding": check_rounding,
    "ends": check_ends,
    "lengths": check_lengths,
    "groups": check_groups,
    "advantages": check_advantages,
    "engine": check_engine,
}


def _share(mask: Any) -> float:
    return float(mask.to_numpy().mean()) if len(mask) else 0.0


def _count(mask: Any) -> int:
    return int(mask.sum() or 0)

"""Compare recorded values with the distributions of the sampling model.

The recorded values are explained by a temperature and a truncation, and so are the sampled tokens; see ``fits``. Values
that no distribution of the model explains are compared with those of other positions, tokens, and responses.

One model cannot tell another version of the policy from another model: both are distributions that are not the model's.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np

from entrace.analysis.audit.checks import MAX_KL, UNLIKELY, WINDOW
from entrace.analysis.audit.distributions import Distributions
from entrace.analysis.audit.findings import AlarmError, LackingError
from entrace.analysis.audit.fits import (
    MAX_UNLIKELY,
    UNCERTAIN,
    Fit,
    fit_entropies,
    fit_logprobs,
    fit_values,
    is_unlikely,
)
from entrace.analysis.audit.sample import MIN_TOKENS, Reference, Sample

# Nats within which a value counts as the model's, and the share of tokens that may be farther off.
TOLERANCE, MAX_SHARE = 0.05, 0.02
# Share of tokens that an alternative has to explain, and share of exact values from which the rest is of another kind.
MIN_EXPLAINED, MIN_PART = 0.9, 0.3
# Nats by which values of four decimals or of another order of summation differ.
ROUNDING = 2e-3
# Standard errors and relative size from which two temperatures differ.
MAX_Z, MAX_GAP = 5.0, 0.03
# Standard errors and share from which the most likely token is sampled too often or too seldom.
MAX_CALIBRATION_Z, MAX_CALIBRATION = 5.0, 0.02
BINS = (0.0, 0.3, 0.5, 0.7, 0.9, 1.0)
OTHER_POLICY = "another version of the policy or another model, which cannot be told apart; or other prompts"


def without_model(sample: Sample) -> str:
    """Say which faults only a model can show.

    Raises:
        LackingError: always.
    """
    tokens = sample.tokens
    names = [name for name in ("logprob", "sampling_logprob", "entropy") if tokens[name].count()]
    if not names:
        raise LackingError(
            "neither log-probabilities nor entropies are recorded; the sampling temperature needs --model"
        )
    faults = ["values of another policy version", "text tokenized again", "values permuted together"]
    if "entropy" not in names or len(names) < 2:
        faults = ["temperature", "top-p", "top-k", "logits off by one", "tool output or padding", *faults]
    raise LackingError(f"needs --model: {', '.join(faults)}")


def check_sampling(reference: Reference) -> str:
    """Check that tokens are model samples at some temperature and truncation."""
    model = reference.model
    if len(model) < MIN_TOKENS:
        raise LackingError(f"{len(model):,} tokens were compared with the model; {MIN_TOKENS:,} are needed")
    fit = reference.sampling
    evidence = f"{len(model):,} tokens of {reference.about} were sampled at {fit}"
    unlikely = is_unlikely(model)
    if unlikely.mean() > MAX_UNLIKELY:
        evidence = f"{evidence}; {reference.name} hardly ever samples {unlikely.mean():.1%} of them"
        raise AlarmError(evidence, _padding(reference) or _why_unlikely(reference, unlikely))
    if largest := _miscalibration(reference):
        cause = _padding(reference) or f"{reference.name} did not sample these tokens: {OTHER_POLICY}"
        raise AlarmError(f"{evidence}; {largest}", cause)
    recorded = reference.tokens["temperature"].drop_nulls().unique().to_list()
    gap = [value for value in recorded if value > 0 and _differs(fit, -np.log(value), 0.0)]
    if gap:
        raise AlarmError(evidence, f"the recorded temperature is {gap[0]:g}")
    return evidence


def _why_unlikely(reference: Reference, unlikely: np.ndarray) -> str:
    """Return the likely cause of tokens that the model hardly ever samples."""
    responses = reference.responses
    is_canonical = reference.is_canonical
    touched = np.isin(responses, responses[unlikely])
    if is_canonical is not None and (~is_canonical)[touched].mean() > 0.8 and is_canonical[~touched].mean() > 0.8:
        share = len(np.unique(responses[touched])) / len(np.unique(responses))
        return (
            f"text tokenized again: the token ids of {share:.0%} of the responses are not those that the policy samples"
        )
    excess = -reference.model.logprob(0.0) - reference.model.entropy(0.0)
    if _in_stretches(excess, responses)[unlikely].mean() <= 0.5:
        return f"text tokenized again, so that the token ids are not those that were sampled; or {OTHER_POLICY}"
    if len(np.unique(responses[touched])) > 0.9 * len(np.unique(responses)):
        return f"{reference.name} did not sample these tokens: {OTHER_POLICY}"
    return "tokens that the policy did not sample, such as tool output or user turns"


def _padding(reference: Reference) -> str:
    """Describe repeated end tokens of many responses; empty if there are none."""
    responses, ids = reference.responses, reference.tokens["token_id"].to_numpy()
    last = np.flatnonzero(np.concatenate([responses[1:] != responses[:-1], [True]]))
    last = last[last >= 2]
    repeats = np.logical_and.reduce(
        [(ids[last - i] == ids[last]) & (responses[last - i] == responses[last]) for i in (1, 2)]
    )
    ends = ids[last][repeats]
    if len(ends) > MAX_SHARE * len(last) and (ends == np.bincount(ends).argmax()).mean() > 0.5:
        return f"padding was counted as generated: {len(ends):,} responses end with one token several times"
    return ""


def _in_stretches(excess: np.ndarray, responses: np.ndarray) -> np.ndarray:
    """Return which tokens lie in a stretch that is unlikely on average, (N,).

    A stretch has ``WINDOW`` tokens.
    """
    inside = np.zeros(len(excess), bool)
    sums = np.concatenate([[0.0], np.minimum(excess, 20).cumsum()])
    for start in range(len(excess) - WINDOW + 1):
        end = start + WINDOW
        if responses[start] == responses[end - 1] and (sums[end] - sums[start]) / WINDOW > UNLIKELY:
            inside[start:end] = True
    return inside


def _miscalibration(reference: Reference) -> str:
    """Compare how often the likeliest token was sampled with its probability.

    The text is empty if the two agree.
    """
    model, fit = reference.model, reference.sampling
    log_mass = 0.0 if fit.truncation is None else np.nan_to_num(model.log_mass(fit.x, fit.truncation))
    p = np.minimum(np.exp(-model.log_sums(fit.x) - log_mass), 1.0)
    is_top = model.rank == 0
    for low, high in pairwise(BINS):
        inside = (p > low) & (p <= high)
        error = np.sqrt(max(float((p * (1 - p))[inside].sum()), 1e-12))
        excess = float((is_top - p)[inside].sum())
        number = int(inside.sum())
        if number and abs(excess) > MAX_CALIBRATION_Z * error and abs(excess) / number > MAX_CALIBRATION:
            return (
                f"the likeliest token has a mean probability of {p[inside].mean():.1%} at {number:,} of them, and is "
                f"sampled at {is_top[inside].mean():.1%}"
            )
    return ""


def check_logprob(reference: Reference) -> str:
    """Check recorded log-probabilities against the distribution sampled from."""
    return _check_logprobs(reference, "logprob")


def check_engine_logprob(reference: Reference) -> str:
    """Check the engine's log-probabilities against the distribution sampled from."""
    return _check_logprobs(reference, "sampling_logprob")


def _check_logprobs(reference: Reference, column: str) -> str:
    known = reference.known(column)
    values = known.tokens[column].to_numpy()
    fit = fit_logprobs(known.model, values, known.responses)
    difference = values - fit.logprob(known.model)
    is_explained = np.abs(difference) < TOLERANCE
    evidence = _evidence(column, fit, difference, is_explained)
    if is_explained.mean() < 1 - MAX_SHARE:
        raise AlarmError(evidence, _why_unexplained(known, values, fit, is_explained))
    if cause := _other_distribution(reference, fit):
        raise AlarmError(f"{evidence}; the tokens were sampled at {reference.sampling}", cause)
    kl = float((np.expm1(-difference) + difference)[is_explained].mean())
    if kl > MAX_KL:
        raise AlarmError(evidence, "other weights or precision")
    return evidence


def _evidence(column: str, fit: Fit, difference: np.ndarray, is_explained: np.ndarray) -> str:
    near = np.abs(difference[is_explained])
    mean = f", {near.mean():.1g} nats off on average" if len(near) else ""
    return f"{len(difference):,} values of {column} fit {fit} at {is_explained.mean():.1%} of the tokens{mean}"


def _differs(fit: Fit, x: float, error: float) -> bool:
    gap = abs(fit.x - x)
    return gap > MAX_Z * float(np.hypot(fit.error, error)) and gap > MAX_GAP


def _other_distribution(reference: Reference, fit: Fit) -> str:
    """Return how recorded values and tokens differ in temperature or truncation.

    The text is empty if they do not differ.
    """
    sampled = reference.sampling
    if _differs(sampled, fit.x, fit.error):
        if abs(fit.x) < MAX_GAP:
            return f"the sampling temperature of about {sampled.temperature:.2f} was not applied to the values"
        if not _differs(sampled, fit.x / 2, fit.error):
            return f"the sampling temperature of about {sampled.temperature:.2f} was applied twice"
        if not _differs(sampled, -fit.x, fit.error):
            return "the values were multiplied by the temperature instead of divided"
        return "the values are of another temperature than the tokens"
    if sampled.truncation and not fit.truncation:
        return f"sampled with {sampled.truncation}, and the values are normalized over the whole vocabulary"
    if fit.truncation and not sampled.truncation:
        return f"the values are renormalized over {fit.truncation}, and the tokens were sampled without it"
    return ""


def _why_unexplained(known: Reference, values: np.ndarray, fit: Fit, is_explained: np.ndarray) -> str:
    """Return the likely cause of log-probabilities that the model cannot explain."""
    model, responses = known.model, known.responses
    for cause, predict in _alternatives(model, responses).items():
        other = fit_values(predict, None, values, responses)
        difference = np.abs(values - predict(other.x))
        is_near = difference[~np.isnan(difference)] < TOLERANCE
        if is_near.mean() > max(MIN_EXPLAINED, is_explained.mean()):
            return cause
    for unit, scale in (("bits", np.log(2)), ("decimal digits (log10)", np.log(10))):
        other = fit_values(model.logprob, model.slope, values * scale, responses)
        if (np.abs(values * scale - other.logprob(model)) < TOLERANCE).mean() > MIN_EXPLAINED:
            return f"the values are in {unit}, not in nats"
    x = known.expected
    plain = model.logprob(x)
    if cause := _permuted(known, values, plain):
        return cause
    if _is_exact(model.logprob(fit.x) - values, known, is_explained):
        return _part(known, values, ~is_explained)
    if np.corrcoef(values, plain)[0, 1] > 0.95:
        return f"engine and trainer differ, as with another precision; or {OTHER_POLICY}"
    return f"not values of {known.name}: {OTHER_POLICY}"


def _is_exact(difference: np.ndarray, known: Reference, is_explained: np.ndarray) -> bool:
    """Return whether many uncertain tokens have the model's values.

    The other tokens are then of another kind.
    """
    uncertain = np.abs(difference[known.model.entropy(0.0) > UNCERTAIN])
    return is_explained.mean() > MIN_PART and bool((uncertain < ROUNDING).mean() > MIN_PART)


def _alternatives(model: Distributions, responses: np.ndarray) -> dict[str, Callable[[float], np.ndarray]]:
    """Return functions that give the values of other positions, by cause.

    Each is a function of x = ln b and returns (N,) values, NaN where there is none.
    """

    def following(x: float) -> np.ndarray:
        return np.exp(x) * model.following - _shift(model.log_sums(x), responses, -1)

    def preceding(x: float) -> np.ndarray:
        return np.exp(x) * model.preceding - _shift(model.log_sums(x), responses, 1)

    return {
        "logits off by one: each token in the distribution of the next one": following,
        "logits off by one: each token in the distribution of the one before": preceding,
        "values of the next token, shifted by one position": lambda x: _shift(model.logprob(x), responses, -1),
        "values of the token before, shifted by one position": lambda x: _shift(model.logprob(x), responses, 1),
    }


def _shift(values: np.ndarray, responses: np.ndarray, by: int) -> np.ndarray:
    """Return the value ``by`` positions before, within each response, (N,).

    The value is NaN where there is none.
    """
    moved = np.roll(values, by).astype(float)
    is_inside = np.roll(responses, by) == responses
    is_inside[0 if by > 0 else -1] = False
    return np.where(is_inside, moved, np.nan)


def _permuted(known: Reference, values: np.ndarray, expected: np.ndarray) -> str:
    """Return how the values are those of other positions or responses.

    The text is empty if they are not.
    """
    starts = np.flatnonzero(np.concatenate([[True], known.responses[1:] != known.responses[:-1]]))
    given, wanted = np.split(values, starts[1:]), np.split(expected, starts[1:])

    def agree(a: np.ndarray, b: np.ndarray) -> bool:
        return len(a) == len(b) and bool((np.abs(a - b) < TOLERANCE).mean() > MIN_EXPLAINED)

    wrong = [i for i in range(len(given)) if not agree(given[i], wanted[i])]
    if not wrong:
        return ""
    shuffled = [agree(np.sort(given[i]), np.sort(wanted[i])) for i in wrong]
    if np.mean(shuffled) > 0.7:
        return f"the values of {len(wrong):,} of {len(given):,} responses are in another order, as by a permuted mask"
    by_length: dict[int, list[int]] = {}
    for i, part in enumerate(wanted):
        by_length.setdefault(len(part), []).append(i)
    swapped = [any(j != i and agree(given[i], wanted[j]) for j in by_length[len(given[i])]) for i in wrong]
    if np.mean(swapped) > 0.7:
        return f"the values of {len(wrong):,} of {len(given):,} responses are those of other responses"
    return ""


def _part(known: Reference, values: np.ndarray, is_wrong: np.ndarray) -> str:
    """Return the likely cause if the model explains a part of the tokens."""
    import polars as pl

    wrong = values[is_wrong]
    [value, number] = max(zip(*np.unique(wrong, return_counts=True), strict=True), key=lambda pair: pair[1])
    if number > 0.9 * len(wrong):
        return f"{number:,} tokens have the value {value:g}, as of masked, padded, or clipped tokens"
    frame = pl.DataFrame({"response": known.responses, "wrong": is_wrong}).with_columns(
        after=pl.col("wrong").cum_max().over("response")
    )
    shares = frame.group_by("response", maintain_order=True).agg(pl.col("wrong").mean(), pl.col("after").mean())
    touched = shares.filter(pl.col("wrong") > 0)
    is_whole = (touched["wrong"] > 0.5).to_numpy()
    if is_whole.mean() > 0.8 and (touched["after"] > 0.97).to_numpy().mean() > 0.6:
        whole = f"the values of {touched.height:,} of {shares.height:,} responses are not the model's"
        return f"{whole}: {OTHER_POLICY}"
    inside = frame.filter(pl.col("after"))
    if inside["wrong"].to_numpy().mean() > 0.4 and inside.height < frame.height:
        return (
            f"in {touched.height:,} of {shares.height:,} responses, the values depart from the model's at one token "
            "and stay apart: the token ids are not those that were sampled, as of text tokenized again"
        )
    return f"{is_wrong.mean():.1%} of the tokens have values of another distribution, such as other token ids"


def check_entropies(reference: Reference) -> str:
    """Check recorded entropies against the distribution sampled from."""
    known = reference.known("entropy")
    values, model, responses = known.tokens["entropy"].to_numpy(), known.model, known.responses
    fit = fit_entropies(model, values, responses, reference.sampling.truncation)
    difference = values - fit.entropy(model)
    is_explained = np.abs(difference) < TOLERANCE
    evidence = _evidence("entropy", fit, difference, is_explained)
    if is_explained.mean() < 1 - MAX_SHARE:
        raise AlarmError(evidence, _why_entropies(known, values, is_explained))
    if cause := _other_distribution(reference, fit):
        if reference.sampling.truncation and not fit.truncation:
            # Over the whole vocabulary, as most trainers record it.
            return f"{evidence}, over the whole vocabulary"
        raise AlarmError(f"{evidence}; the tokens were sampled at {reference.sampling}", cause)
    return evidence


def _why_entropies(known: Reference, values: np.ndarray, is_explained: np.ndarray) -> str:
    """Return the likely cause of entropies that the model cannot explain."""
    model, responses, x = known.model, known.responses, known.expected
    exact = model.entropy(x)
    logprobs = [known.tokens[name].to_numpy() for name in ("logprob", "sampling_logprob")]
    for surprisal in (*(-column for column in logprobs), -model.logprob(x), -model.logprob(0.0)):
        if (np.abs(values - surprisal) < TOLERANCE).mean() > max(MIN_EXPLAINED, is_explained.mean()):
            return "the surprisal was recorded as entropy"
    for cause, by in (("next token", -1), ("token before", 1)):
        near = np.abs(values - _shift(exact, responses, by)) < TOLERANCE
        if near.mean() > max(MIN_EXPLAINED - 0.1, is_explained.mean()):
            return f"entropies of the {cause}, shifted by one position"
    size = np.log(model.num_entries)
    for unit, scale in (("in bits, not in nats", np.log(2)), ("divided by ln of the vocabulary", size)):
        scaled = fit_values(model.entropy, None, values * scale, responses)
        if (np.abs(values * scale - scaled.entropy(model)) < TOLERANCE).mean() > 1 - MAX_SHARE:
            return f"the entropies are {unit}"
    if cause := _permuted(known, values, exact):
        return cause
    if _is_exact(exact - values, known, is_explained):
        return _part(known, values, ~is_explained)
    if np.corrcoef(values, exact)[0, 1] > 0.95:
        return f"over a part of the vocabulary, such as the entries that an engine reports; or {OTHER_POLICY}"
    return f"not entropies of {known.name}: {OTHER_POLICY}"


MODEL_CHECKS: dict[str, Callable[[Reference], str]] = {
    "model tokens": check_sampling,
    "model logprob": check_logprob,
    "model engine logprob": check_engine_logprob,
    "model entropy": check_entropies,
}

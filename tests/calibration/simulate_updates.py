"""Simulate runs of a policy whose updates change its entropy.

The public ``TraceWriter`` writes the runs. The policy is a table of logits by context. A response is a row of contexts
with one sampled token each, and is correct with a probability that depends on its tokens. Held-out prompts share the
contexts, so that updates also change their entropy. The world decides what an update does to the logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.special import expit, log_softmax

from entrace.analysis.trace import TraceWriter
from tests.calibration.parameters import UpdateWorld
from tests.calibration.simulate import append, append_steps

VOCAB_SIZE, CONTEXTS, LENGTH = 12, 40, 6
HELDOUT, SAMPLES = 60, 4
# Standard deviations of the initial logits, of the effect of a token on the logit of success, and of a prompt's.
LOGIT, REWARD, DIFFICULTY = 1.5, 0.8, 1.0


@dataclass
class UpdateRun:
    """Hold the records of a simulated run of T steps.

    Tokens have shape ``(T, prompts, group, LENGTH)``.

    Attributes:
        world: Parameters of the run.
        token: Sampled tokens.
        logprob: Their log-probabilities.
        entropy: Entropies of their distributions.
        is_correct: Correctness of responses, ``(T, prompts, group)``.
        advantage: Advantages of responses; 0 in uniform groups, which are dropped.
        rate: Learning rates, ``(T,)``.
        heldout: Mean entropy of each held-out response before training and after each step, ``(T + 1, responses)``.
    """

    world: UpdateWorld
    token: np.ndarray
    logprob: np.ndarray
    entropy: np.ndarray
    is_correct: np.ndarray
    advantage: np.ndarray
    rate: np.ndarray
    heldout: np.ndarray


def simulate_updates(world: UpdateWorld, rng: np.random.Generator) -> UpdateRun:
    """Draw all steps of one run."""
    shape = (world.prompts, world.group, LENGTH)
    logits = rng.normal(0, LOGIT, (CONTEXTS, VOCAB_SIZE))
    reward = rng.normal(0, REWARD, (CONTEXTS, VOCAB_SIZE))
    reward -= (np.exp(log_softmax(logits, 1)) * reward).sum(1, keepdims=True)
    prompts = rng.integers(0, CONTEXTS, (HELDOUT, LENGTH)).repeat(SAMPLES, 0)
    rate = world.rate * np.exp(-world.decay * np.arange(world.steps) / world.steps)
    heldout = [_evaluate(world, logits, prompts, rng)]
    found: dict[str, list[np.ndarray]] = {
        name: [] for name in ("token", "logprob", "entropy", "is_correct", "advantage")
    }
    for step in range(world.steps):
        logp = log_softmax(logits, 1)
        p = np.exp(logp)
        context = np.broadcast_to(rng.integers(0, CONTEXTS, (world.prompts, 1, LENGTH)), shape)
        token = (p.cumsum(1)[context] < rng.random(shape)[..., None]).sum(-1).clip(max=VOCAB_SIZE - 1)
        ease = rng.normal(0, DIFFICULTY, (world.prompts, 1))
        is_correct = rng.random(shape[:2]) < expit(reward[context, token].sum(2) + ease)
        share = is_correct.mean(1, keepdims=True)
        is_mixed = (share > 0) & (share < 1)
        with np.errstate(invalid="ignore"):
            advantage = np.where(is_mixed, (is_correct - share) / np.sqrt(share * (1 - share)), 0.0)
        measured = (token, logp[context, token], -(p * logp).sum(1)[context], is_correct, advantage)
        for values, value in zip(found.values(), measured, strict=True):
            values.append(value)
        logits = logits + _change(world, logits, p, context, token, advantage, rate[step], step, rng)
        heldout.append(_evaluate(world, logits, prompts, rng))
    return UpdateRun(
        world,
        **{name: np.stack(values) for name, values in found.items()},
        rate=rate,
        heldout=np.stack(heldout),
    )


def _change(
    world: UpdateWorld,
    logits: np.ndarray,
    p: np.ndarray,
    context: np.ndarray,
    token: np.ndarray,
    advantage: np.ndarray,
    rate: float,
    step: int,
    rng: np.random.Generator,
) -> np.ndarray:
    """Return the change of all logits by the update of a step."""
    if world.update == "none":
        return np.zeros_like(logits)
    if world.update == "random":
        # Without a pull to their mean, random logits would drift apart forever.
        return rate * (rng.normal(0, 0.05, logits.shape) - 0.002 * logits)
    if world.update in ("sharpen", "sharpen by size"):
        size = 1.0 if world.update == "sharpen" else 1.5 * np.abs(advantage).mean()
        return rate * size * rng.lognormal(0, 0.2) * 0.01 * np.exp(-3 * step / world.steps) * logits
    push = np.broadcast_to(advantage[..., None], token.shape)
    gradient = np.zeros_like(logits)
    np.add.at(gradient, (context, token), push)
    by_context = np.bincount(context.ravel(), weights=push.ravel(), minlength=CONTEXTS)
    gradient -= by_context[:, None] * p
    gradient /= max((advantage != 0).sum() * LENGTH, 1)
    noise = rng.normal(0, world.noise, logits.shape)
    return rate * ((1 if world.update == "gradient" else -1) * 20 * gradient + noise)


def _evaluate(world: UpdateWorld, logits: np.ndarray, prompts: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    logp = log_softmax(logits, 1)
    means = -(np.exp(logp) * logp).sum(1)[prompts].mean(1)
    return means * rng.lognormal(0, world.eval_noise, len(means))


def write_updates(folder: Path, run: UpdateRun, seed: int = 0) -> Path:
    """Record a simulated run."""
    world = run.world
    manifest = {"run_id": folder.name, "arm": "none", "seed": seed, "total_steps": world.steps}
    writer = TraceWriter.create(folder, manifest, [f"w{i}" for i in range(VOCAB_SIZE)])
    size = world.steps * world.prompts * world.group
    row = np.arange(size)
    step = 1 + row // (world.prompts * world.group)
    is_kept = run.advantage.ravel() != 0
    prompt = np.char.add("p", (row // world.group).astype(str))
    common = {"step": step, "prompt_id": prompt, "group_id": row // world.group, "rollout_id": row}
    common |= {"is_correct": run.is_correct.ravel(), "advantage": run.advantage.ravel(), "is_kept": is_kept}
    tokens = {name: values.repeat(LENGTH) for name, values in common.items()}
    tokens |= {"position": np.tile(np.arange(LENGTH), size), "response_length": LENGTH, "token_id": run.token.ravel()}
    tokens |= {"logprob": run.logprob.ravel(), "entropy": run.entropy.ravel(), "grad_norm": 0.0}
    append(writer, "tokens", {**tokens, "shaped_advantage": tokens["advantage"]})
    surprisal = -run.logprob.mean(-1).ravel()
    responses = {"sample_index": row % world.group, "completion": "w0", "reward": common["is_correct"].astype(float)}
    responses |= {"has_answer": True, "defects": [[]] * size, "response_length": LENGTH, "is_truncated": False}
    responses |= {"entropy_mean": run.entropy.mean(-1).ravel(), "surprisal_mean": surprisal, "ppl": np.exp(surprisal)}
    responses |= {"ppl_z": 0.0, "temperature": 1.0, "entropy_kind": "exact", "policy_step": step - 1}
    append(writer, "rollouts", {**common, **responses})
    by_step = (world.steps, -1)
    entropy, accuracy = (values.reshape(by_step).mean(1) for values in (run.entropy, run.is_correct))
    append_steps(writer, entropy, accuracy, world.prompts, run.rate)
    for at in range(0, world.steps + 1, world.eval_every):
        columns = {"step": at, "benchmark": "held", "entropy_mean": run.heldout[at], "temperature": 1.0}
        columns |= {"prompt_id": np.char.add("h", np.arange(HELDOUT).repeat(SAMPLES).astype(str))}
        columns |= {"sample_index": np.tile(np.arange(SAMPLES), HELDOUT), "is_correct": True, "response_length": LENGTH}
        append(writer, "evals", columns)
    writer.flush(world.steps)
    writer.finish()
    return folder

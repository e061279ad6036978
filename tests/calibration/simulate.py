"""Simulate runs with known truth and realistic nesting.

The public ``TraceWriter`` writes them. Tokens share the entropy level of their response, responses the difficulty of
their prompt, and all prompts of a step the state of the policy, a first-order autoregression. A next-token distribution
has one favorite token and a uniform tail. Its entropy is drawn from a heavy-tailed distribution and determines the
sampled token, its logprob, and its gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from scipy.signal import lfilter
from scipy.special import expit

from entrace.analysis.trace import TABLES, TraceWriter
from tests.calibration.parameters import LENGTHS, World, curve

VOCAB = ["<eos>", "1", "+", " so", " then", " wait", " the", " dog", " sun", " of"]
NUM_REASONING, NUM_SEMANTIC = 5, 4
SPECIAL_SHARE = 0.05
# Scale of the movement of each vocabulary entry; reasoning tokens and other words have equal averages.
KIND_SCALES = np.exp([0.0, -0.5, 0.5, -0.2, 0.2, 0.0, 0.5, -0.5, 0.2, -0.2])
# Standard deviation of each state of the policy: a logit, a logarithm, a share, or a relative logit change.
STATE_SCALES = {
    "accuracy": 0.05,
    "entropy": 0.02,
    "gap": 0.03,
    "reasoning": 0.01,
    "reasoning_by_ppl": 0.01,
    "defects": 0.02,
    "ends": 0.05,
    "movement": 0.2,
    "focus": 0.1,
    "end_movement": 0.05,
    "end_gradient": 0.05,
    "direction": 0.05,
}
NUM_INTERVENTIONS, CONTINUATIONS = 800, 8
TAIL = 300
# Entropy by the probability of the tail, up to the uniform distribution.
_REST = np.concatenate((np.geomspace(1e-12, 0.05, 1500), np.linspace(0.05, TAIL / (TAIL + 1), 1500)[1:]))
_ENTROPY = -(1 - _REST) * np.log1p(-_REST) - _REST * np.log(_REST / TAIL)
# Quadrature nodes and weights of a normal distribution, for the mean accuracy over prompts.
_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(61)
_LOGITS = np.linspace(-12, 12, 2401)


@dataclass
class Tokens:
    """Hold all tokens of a run in the order of recording, shape ``(N,)``.

    Attributes:
        row: Index of the response.
        position: Position in the response, from 0.
        word: Vocabulary entry.
        entropy: Entropy of the next-token distribution, nats.
        logprob: Log-probability of the sampled token.
        grad_norm: Gradient norm.
        logprob_after: Log-probability after the update; nan if not captured.
        entropy_after: Entropy after the update; nan if not captured.
    """

    row: np.ndarray
    position: np.ndarray
    word: np.ndarray
    entropy: np.ndarray
    logprob: np.ndarray
    grad_norm: np.ndarray
    logprob_after: np.ndarray
    entropy_after: np.ndarray

    @property
    def is_reasoning(self) -> np.ndarray:
        """Return a mask of reasoning tokens."""
        return (self.word > 0) & (self.word <= NUM_REASONING)


@dataclass
class Run:
    """Hold all responses of a run in the order of recording, shape ``(R,)``.

    Tokens are included if simulated.
    """

    world: World
    step: np.ndarray
    group: np.ndarray
    prompt: np.ndarray
    is_correct: np.ndarray
    is_kept: np.ndarray
    advantage: np.ndarray
    length: np.ndarray
    entropy: np.ndarray
    surprisal: np.ndarray
    tercile: np.ndarray
    is_defective: np.ndarray
    tokens: Tokens | None

    def by_group(self, values: np.ndarray) -> np.ndarray:
        """Reshape values of responses to ``(steps, groups, responses)``."""
        return values.reshape(self.world.steps, self.world.groups, self.world.group)


def simulate_run(world: World, rng: np.random.Generator) -> Run:
    """Draw all steps of one run."""
    shape = (world.steps, world.groups, world.group)
    state = {name: world.drift * size * _autoregression(world, rng) for name, size in STATE_SCALES.items()}
    prompt, difficulty = _draw_prompts(world, rng)
    mean = {name: curve(getattr(world, name), world) for name in ("negative_entropy", "positive_entropy")}
    accuracy = curve(world.accuracy, world, world.accuracy_course or world.course)
    ability = _center(accuracy, world.difficulty) + state["accuracy"]
    is_correct = rng.random(shape) < expit(ability[:, None] - world.difficulty * difficulty)[..., None]
    share = is_correct.mean(2, keepdims=True)
    is_kept = (share > 0) & (share < 1)
    with np.errstate(invalid="ignore"):
        advantage = np.where(is_kept, (is_correct - share) / np.sqrt(share * (1 - share)), 0.0)
    progress = (np.arange(world.steps) / (world.steps - 1))[:, None, None]
    length = rng.choice(LENGTHS, shape) * (1 + world.growth * progress) * (1 + world.wrong_length * ~is_correct)
    length = length.round().astype(int)
    gap = np.exp(state["gap"] / 2)[:, None, None]
    level = np.where(
        is_correct,
        mean["positive_entropy"][:, None, None] / gap,
        mean["negative_entropy"][:, None, None] * gap,
    )
    level = level * np.exp(state["entropy"])[:, None, None] * _mean_one(world, rng, shape)
    level *= np.exp(world.hard_entropy * difficulty - world.hard_entropy**2 / 2)[..., None]
    level *= (length / LENGTHS.mean()) ** world.length_entropy
    step = np.arange(1, world.steps + 1).repeat(world.groups * world.group)
    size = len(step)
    kept = np.broadcast_to(is_kept, shape).ravel()
    flat = {"advantage": advantage.ravel(), "is_kept": kept, "length": length.ravel(), "step": step}
    tokens = None
    if world.has_tokens:
        draft = _draw_entropies(world, flat["length"], level.ravel(), step, state["ends"], rng)
        entropy, surprisal = (
            np.bincount(draft["row"], weights=values, minlength=size) / flat["length"]
            for values in (draft["entropy"], -draft["logprob"])
        )
        tercile = terciles(surprisal.reshape(shape))
        tokens = _finish_tokens(world, draft, flat, tercile, state, rng)
    else:
        entropy = level.ravel() * _mean_of_tokens(flat["length"], rng)
        noise = rng.normal(size=size) * np.sqrt(entropy / flat["length"])
        surprisal = np.maximum(entropy + noise, 0.2 * entropy)
        tercile = terciles(surprisal.reshape(shape))
    defects = curve(world.defects, world) + state["defects"]
    defects = np.clip(defects[:, None] + rng.uniform(-0.1, 0.1, shape[:2]), 0, 1)
    return Run(
        world=world,
        step=step,
        group=np.arange(world.steps * world.groups).repeat(world.group),
        prompt=prompt.ravel().repeat(world.group),
        is_correct=is_correct.ravel(),
        is_kept=kept,
        advantage=flat["advantage"],
        length=flat["length"],
        entropy=entropy,
        surprisal=surprisal,
        tercile=tercile,
        is_defective=(rng.random(shape) < defects[..., None]).ravel(),
        tokens=tokens,
    )


def _autoregression(world: World, rng: np.random.Generator) -> np.ndarray:
    """Draw an AR(1) process with mean 0 and variance 1, shape ``(steps,)``."""
    noise = rng.normal(size=world.steps)
    noise[1:] *= np.sqrt(1 - world.rho**2)
    return np.asarray(lfilter([1.0], [1.0, -world.rho], noise))


def _draw_prompts(world: World, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw the prompt and the difficulty of each group, ``(steps, groups)``.

    Without a pool, all prompts are new.
    """
    shape = (world.steps, world.groups)
    if world.pool is None:
        return np.arange(world.steps * world.groups).reshape(shape), rng.normal(size=shape)
    prompt = rng.permuted(np.tile(np.arange(world.pool), (world.steps, 1)), axis=1)[:, : world.groups]
    return prompt, rng.normal(size=world.pool)[prompt]


def _center(accuracy: np.ndarray, spread: float) -> np.ndarray:
    """Return mean logits that give these accuracies.

    Logits have standard deviation ``spread``.
    """
    expected = expit(_LOGITS[:, None] + spread * _NODES) @ _WEIGHTS / _WEIGHTS.sum()
    return np.interp(accuracy, expected, _LOGITS)


def _mean_one(world: World, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    if world.is_heavy_tailed:
        return np.clip(1 + 0.2 * rng.standard_t(3, shape) / np.sqrt(3), 0.1, 3)
    return rng.lognormal(-0.02, 0.2, shape)


def _mean_of_tokens(length: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return rng.gamma(0.4 * length, 1 / (0.4 * length))


def terciles(surprisal: np.ndarray) -> np.ndarray:
    """Return each response's tercile in its group, as ``ntile(3)``; shape ``(R,)``."""
    group = surprisal.shape[2]
    sizes = [group // 3 + (i < group % 3) for i in range(3)]
    return np.repeat([1, 2, 3], sizes)[surprisal.argsort(2).argsort(2)].ravel()


def _draw_entropies(
    world: World,
    length: np.ndarray,
    level: np.ndarray,
    step: np.ndarray,
    ends: np.ndarray,
    rng: np.random.Generator,
) -> dict[str, np.ndarray]:
    """Draw entropy, sampled token, and logprob of every token."""
    row = np.arange(len(length)).repeat(length)
    position = np.arange(len(row)) - (np.cumsum(length) - length)[row]
    fifth = position * 5 // length[row]
    shape = np.array([world.ends[0], 1.0, 1.0, 1.0, world.ends[1]])[fifth]
    shape *= np.where((fifth == 0) | (fifth == 4), np.exp(ends[step - 1])[row], 1.0)
    shape /= (np.bincount(row, weights=shape) / length)[row]
    shape *= np.exp(world.position_entropy * (position / LENGTHS.mean() - 0.5))
    if world.is_heavy_tailed:
        noise = rng.gamma(0.5, 2.0, len(row)) * np.abs(rng.standard_t(3, len(row))) * np.pi / (2 * np.sqrt(3))
    else:
        noise = rng.gamma(0.4, 2.5, len(row))
    entropy = np.clip(level[row] * shape * noise, _ENTROPY[0], _ENTROPY[-1])
    rest = np.exp(np.interp(np.log(entropy), np.log(_ENTROPY), np.log(_REST)))
    logprob = np.where(rng.random(len(row)) < rest, np.log(rest / TAIL), np.log1p(-rest))
    return {"row": row, "position": position, "entropy": entropy, "rest": rest, "logprob": logprob}


def _finish_tokens(
    world: World,
    draft: dict[str, np.ndarray],
    response: dict[str, np.ndarray],
    tercile: np.ndarray,
    state: dict[str, np.ndarray],
    rng: np.random.Generator,
) -> Tokens:
    """Draw word, gradient, and update of tokens with given distributions."""
    row, position, rest, logprob = (draft[name] for name in ("row", "position", "rest", "logprob"))
    step = response["step"] - 1
    group = rng.uniform(-0.1, 0.1, (world.steps * world.groups, 1)).repeat(world.group, axis=1).ravel()
    by_ppl = (world.reasoning_by_ppl + state["reasoning_by_ppl"][step]) / 2 * (2 - tercile)
    reasoning = (curve(world.reasoning, world) + state["reasoning"])[step] + group + by_ppl
    share = reasoning[row] + world.position_reasoning * (position / LENGTHS.mean() - 0.5)
    word = rng.integers(1 + NUM_REASONING, 1 + NUM_REASONING + NUM_SEMANTIC, len(row))
    word[rng.random(len(row)) < SPECIAL_SHARE] = 0
    word = np.where(rng.random(len(row)) < share, rng.integers(1, 1 + NUM_REASONING, len(row)), word)
    is_end = position * 5 >= 4 * response["length"][row]
    squares = (1 - rest) ** 2 + rest**2 / TAIL
    grad_norm = np.abs(response["advantage"])[row] * np.sqrt(np.maximum(1 - 2 * np.exp(logprob) + squares, 0))
    grad_norm *= 10 * rng.lognormal(0, 0.1, len(row))
    grad_norm[is_end] *= world.end_gradient * np.exp(state["end_gradient"])[step[row[is_end]]]
    after = np.full(len(row), np.nan)
    is_captured = (response["step"] % world.capture_every == 0) & response["is_kept"]
    captured = np.flatnonzero(is_captured[row])
    before, after[captured] = _update(
        world,
        logprob[captured],
        draft["entropy"][captured],
        KIND_SCALES[word[captured]],
        row[captured],
        step[row[captured]],
        response["advantage"][row[captured]],
        is_end[captured],
        state,
        rng,
    )
    entropy_after = np.full(len(row), np.nan)
    entropy_after[captured] = _entropy_after(draft["entropy"][captured], before, after[captured])
    logprob = logprob.copy()
    logprob[captured] = before
    return Tokens(row, position, word, draft["entropy"], logprob, grad_norm, after, entropy_after)


def _update(
    world: World,
    logprob: np.ndarray,
    entropy: np.ndarray,
    kind: np.ndarray,
    row: np.ndarray,
    step: np.ndarray,
    advantage: np.ndarray,
    is_end: np.ndarray,
    state: dict[str, np.ndarray],
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the recorded logprobs before and after the update of their step."""
    if world.update == "none":
        return logprob, logprob
    odds = logprob - np.log(-np.expm1(logprob))
    if world.update == "float32":
        # The log-softmax of logits near 20 is a multiple of their last digit.
        noisy = [logprob + rng.normal(0, 2e-6, len(row)) for _ in range(2)]
        before, after = (np.minimum(np.round(values * 2**20) / 2**20, 0.0) for values in noisy)
        return before, after
    if world.update == "bf16":
        before, after = (_to_bfloat16(_log_expit(odds + rng.normal(0, 20 / 2**9, len(row)))) for _ in range(2))
        return before, after
    noise = rng.standard_t(3, len(row)) / np.sqrt(3) if world.is_heavy_tailed else rng.normal(size=len(row))
    shared = rng.normal(size=(2, len(row) and row.max() + 1))
    noise = np.sqrt(0.8) * noise + np.sqrt(0.1) * shared[0][row] + np.sqrt(0.1) * shared[1][step]
    is_high = entropy >= np.quantile(entropy, 0.8) if len(row) else np.zeros(0, dtype=bool)
    scale = np.exp(state["movement"][step] + state["focus"][step] * is_high + state["end_movement"][step] * is_end)
    sign = np.sign(advantage)
    push = (world.push + state["direction"][step]) * sign
    if world.update == "random":
        push = push + world.law * advantage
        return logprob, _log_expit(odds + world.update_size * scale * (kind * noise + push))
    scale = scale * np.where(is_end, world.end_movement, 1.0)
    if world.update == "learned":
        is_mover = rng.random(len(row)) < np.where(is_high, 0.5, 0.05)
        moved = scale * np.where(is_mover, kind * noise + push, 0.03 * noise)
        return logprob, _log_expit(odds + moved)
    # "even": all probabilities move equally, including near-certain tokens, and against the sign of the advantage.
    size = 0.02 * scale * np.exp(0.3 * noise)
    way = np.where(rng.random(len(row)) < 0.5 + 0.4 * np.abs(world.push), np.sign(world.push) * sign, -sign)
    p = np.exp(logprob)
    way = np.where(p > 0.97, -1.0, np.where(p < 0.03, 1.0, way))
    return logprob, np.log(np.clip(p + way * size, 1e-6, 1 - 1e-6))


def _entropy_after(entropy: np.ndarray, before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Return the entropy after a change of the sampled token's logit.

    The change keeps the proportions of all other tokens.

    H = h(p) + (1 - p) H_others, with h the entropy of being sampled or not, and H_others unchanged.
    """
    others = np.clip((entropy - _binary_entropy(before)) / np.maximum(-np.expm1(before), 1e-12), 0, np.log(TAIL))
    moved = _binary_entropy(after) - np.expm1(after) * others
    return np.where(after == before, entropy, moved)


def _binary_entropy(logprob: np.ndarray) -> np.ndarray:
    """Return -p ln p - (1 - p) ln (1 - p)."""
    rest = -np.expm1(logprob)
    return -np.exp(logprob) * logprob - rest * np.log(np.maximum(rest, 1e-300))


def _log_expit(x: np.ndarray) -> np.ndarray:
    return -np.logaddexp(0, -x)


def _to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Round to the nearest number with eight significant bits."""
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x8000) & 0xFFFF0000).astype(np.uint32).view(np.float32).astype(float)


def write_run(folder: Path, run: Run, rng: np.random.Generator, seed: int = 0) -> Path:
    """Record a simulated run, with any interventions of its world.

    Interventions are on the last ten steps.
    """
    world = run.world
    manifest = {"run_id": folder.name, "arm": "none", "seed": seed, "total_steps": world.steps}
    writer = TraceWriter.create(folder, manifest, VOCAB)
    if world.has_tokens:
        _append_tokens(writer, run)
    if world.has_responses:
        _append_rollouts(writer, run)
    append_steps(writer, *step_means(run), world.groups)
    if world.has_interventions:
        _append_interventions(writer, run, rng)
    writer.flush(world.steps)
    writer.finish()
    return folder


def step_means(run: Run) -> tuple[np.ndarray, np.ndarray]:
    """Return mean token entropy and accuracy of each step."""
    total = run.by_group(run.entropy * run.length).sum((1, 2))
    return total / run.by_group(run.length).sum((1, 2)), run.by_group(run.is_correct).mean((1, 2))


def append(writer: TraceWriter, table: str, columns: Mapping[str, Any]) -> None:
    """Append the columns that the schema has."""
    known = {column.name for column in TABLES[table].columns}
    writer.append(table, {name: values for name, values in columns.items() if name in known})


def append_steps(
    writer: TraceWriter, entropy: np.ndarray, accuracy: np.ndarray, groups: int, rate: np.ndarray | float = 0.0
) -> None:
    """Append rows of table steps; columns that no claim reads are 0."""
    zeros = ("loss", "clip_frac_low", "clip_frac_high", "grad_norm", "rollout_s", "reward_s", "update_s")
    append(
        writer,
        "steps",
        {
            **dict.fromkeys((*zeros, "record_s"), 0.0),
            "step": np.arange(1, len(entropy) + 1),
            "lr": rate,
            "reward_mean": accuracy,
            "accuracy": accuracy,
            "format_rate": 1.0,
            "entropy_token_mean": entropy,
            "tokens": 0,
            "groups_kept": groups,
            "groups_dropped": 0,
            "is_shaped": False,
        },
    )


def names(prefix: str, numbers: np.ndarray) -> pa.Array:
    """Return one text per number."""
    return pa.array([f"{prefix}{i}" for i in range(int(numbers.max()) + 1)]).take(pa.array(numbers))


def _append_tokens(writer: TraceWriter, run: Run) -> None:
    tokens = run.tokens
    assert tokens is not None
    row = tokens.row
    is_missing = np.isnan(tokens.logprob_after)
    append(
        writer,
        "tokens",
        {
            "step": run.step[row],
            "prompt_id": names("p", run.prompt).take(pa.array(row)),
            "group_id": run.group[row],
            "rollout_id": row,
            "position": tokens.position,
            "response_length": run.length[row],
            "token_id": tokens.word,
            "logprob": tokens.logprob,
            "entropy": tokens.entropy,
            "advantage": run.advantage[row],
            "shaped_advantage": run.advantage[row],
            "grad_norm": tokens.grad_norm,
            "is_correct": run.is_correct[row],
            "is_kept": run.is_kept[row],
            "logprob_after": pa.array(tokens.logprob_after, mask=is_missing),
            "entropy_after": pa.array(tokens.entropy_after, mask=is_missing),
            "is_clipped": pa.array(np.zeros(len(row), dtype=bool), mask=is_missing),
        },
    )


def _append_rollouts(writer: TraceWriter, run: Run) -> None:
    size = len(run.step)
    append(
        writer,
        "rollouts",
        {
            "step": run.step,
            "prompt_id": names("p", run.prompt),
            "group_id": run.group,
            "rollout_id": np.arange(size),
            "sample_index": np.arange(size) % run.world.group,
            "completion": "so 1 + 1 = 2",
            "reward": run.is_correct.astype(float),
            "is_correct": run.is_correct,
            "has_answer": ~run.is_defective,
            "defects": [["format_violation"] if bad else [] for bad in run.is_defective.tolist()],
            "response_length": run.length,
            "is_truncated": False,
            "is_kept": run.is_kept,
            "entropy_mean": run.entropy,
            "surprisal_mean": run.surprisal,
            "ppl": np.exp(run.surprisal),
            "ppl_z": 0.0,
            "advantage": run.advantage,
            "temperature": 1.0,
            "entropy_kind": "exact",
            "policy_step": run.step - 1,
        },
    )


def _append_interventions(writer: TraceWriter, run: Run, rng: np.random.Generator) -> None:
    """Append interventions at random positions of responses.

    Positions are uniform; responses are those of the last ten steps.
    """
    world = run.world
    candidates = np.flatnonzero(run.step > world.steps - 10)
    rows = np.sort(rng.choice(candidates, min(NUM_INTERVENTIONS, len(candidates)), replace=False))
    position = rng.integers(0, run.length[rows])
    ease = rng.uniform(-0.1, 0.1, run.prompt.max() + 1)[run.prompt[rows]]
    right = np.where(run.is_correct[rows], 0.85, 0.4) + ease
    loss = 0.3 + world.impact_by_ppl / 2 * (run.tercile[rows] - 2)
    loss = loss + world.impact_slope * (position / run.length[rows] - 0.5)
    original = rng.binomial(CONTINUATIONS, np.clip(right, 0, 1)) / CONTINUATIONS
    alternative = rng.binomial(CONTINUATIONS, np.clip(right - loss, 0, 1)) / CONTINUATIONS
    append(
        writer,
        "interventions",
        {
            "checkpoint_step": world.steps,
            "seed": 0,
            "selection": "random",
            "temperature": 1.0,
            "step": run.step[rows],
            "prompt_id": names("p", run.prompt).take(pa.array(rows)),
            "rollout_id": rows,
            "position": position,
            "response_length": run.length[rows],
            "token_id": 1,
            "category": "formal_reasoning",
            "alternative_id": 2,
            "logprob": -0.5,
            "entropy": 0.5,
            "ppl": np.exp(run.surprisal[rows]),
            "ppl_tercile": run.tercile[rows],
            "is_correct": run.is_correct[rows],
            "num_continuations": CONTINUATIONS,
            "accuracy_original": original,
            "accuracy_alternative": alternative,
            "impact": original - alternative,
            "tokens": 0,
        },
    )

"""Log-probability, entropy and sum p² of tokens at large vocabularies, against plain torch and TRL, paired.

Three ways to the same tokens' statistics:

- entrace: all three statistics;
- plain: ``log_softmax`` of all logits in float32 and a gather, which gives the log-probability alone;
- trl: ``selective_log_softmax`` and ``entropy_from_logits``, which gives log-probability and entropy.

Two readings of each: "head" starts from hidden states and includes the matrix product with the LM head, "logits" from
logits that are there already, so that nothing but the statistics is timed. All run in turn, in alternating order;
figures are medians of the ratios within a turn. Peak memory is what the allocator held at most over what was there
before, less the gradients of the hidden states and of the head that the backward pass leaves.

Run with ``make bench-token-stats``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from allocator import peak_bytes
from torch import Tensor
from trl.trainer.utils import entropy_from_logits, selective_log_softmax

from trainer.token_stats import LMHead, compute_stats, compute_token_stats

# Vocabulary and width of SmolLM2-135M and of Qwen2.5-0.5B.
SHAPES = {"49k": (49152, 576), "152k": (151936, 896)}
SEQUENCES = 4
PEERS = ("plain", "trl")


@dataclass
class Case:
    """Hidden states (N, H), a head that gives them logits of a spread as in language models, and targets."""

    hidden: Tensor
    head: LMHead
    targets: Tensor

    @classmethod
    def draw(cls, shape: tuple[int, int], num_tokens: int, dtype: torch.dtype) -> Case:
        """Weights in float32, hidden states in ``dtype``."""
        vocab, width = shape
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(num_tokens, width, generator=generator).to(dtype).requires_grad_()
        weight = (torch.randn(vocab, width, generator=generator) * 3 / width**0.5).requires_grad_()
        return cls(hidden, LMHead(weight, None), torch.randint(vocab, (num_tokens,), generator=generator))

    def logits(self) -> Tensor:
        """As a model returns them, in the dtype of the hidden states."""
        return torch.nn.functional.linear(self.hidden, self.head.weight.to(self.hidden.dtype))

    def grad_bytes(self) -> int:
        """Memory of the gradients that are there, which are then dropped."""
        leaves = (self.hidden, self.head.weight)
        total = sum(leaf.grad.nbytes for leaf in leaves if leaf.grad is not None)
        self.hidden.grad = self.head.weight.grad = None
        return total


def plain(logits: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    """Log-probabilities (N,)."""
    return (torch.log_softmax(logits.float(), dim=-1).gather(1, targets[:, None]).squeeze(1),)


def trl(logits: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    """Log-probabilities and entropies, (sequences, N / sequences), as TRL's trainer calls its functions."""
    logits, targets = logits.view(SEQUENCES, -1, logits.shape[-1]), targets.view(SEQUENCES, -1)
    return selective_log_softmax(logits, targets), entropy_from_logits(logits)


def entrace(case: Case) -> tuple[Tensor, ...]:
    """Log-probabilities and entropies, (N,); sums of squares besides."""
    stats = compute_token_stats(case.hidden, case.head, case.targets)
    return stats.logprob, stats.entropy


def from_logits(case: Case) -> dict[str, Callable[[], Any]]:
    """The statistics alone."""
    with torch.no_grad():
        logits = case.logits()
    return {
        "entrace": lambda: compute_stats(logits, case.targets),
        "plain": lambda: plain(logits, case.targets),
        "trl": lambda: trl(logits, case.targets),
    }


def from_hidden(case: Case) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """Matrix product and statistics."""
    return {
        "entrace": lambda: entrace(case),
        "plain": lambda: plain(case.logits(), case.targets),
        "trl": lambda: trl(case.logits(), case.targets),
    }


def without_grad(work: Callable[[], Any]) -> Callable[[], Any]:
    """The forward pass alone."""
    return torch.no_grad()(work)


def with_backward(work: Callable[[], tuple[Tensor, ...]], case: Case) -> Callable[[], Any]:
    """The forward pass and the gradient of the sum of what it returns."""

    def both() -> None:
        sum(values.sum() for values in work()).backward()  # type: ignore[union-attr]
        case.grad_bytes()

    return both


def compare(works: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Medians of the seconds of entrace and of its ratios to the others."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(-1, rounds):
        for name in list(works) if turn % 2 else list(works)[::-1]:
            started = time.perf_counter()
            works[name]()
            if turn >= 0:
                seconds[name].append(time.perf_counter() - started)
    ours = seconds["entrace"]
    ratios = {
        f"entrace / {peer}": statistics.median(a / b for a, b in zip(ours, seconds[peer], strict=True))
        for peer in PEERS
    }
    return {"seconds": round(statistics.median(ours), 4), **{name: round(ratio, 3) for name, ratio in ratios.items()}}


def measure_memory(shape: tuple[int, int], num_tokens: int, names: list[str]) -> dict[str, dict[str, float]]:
    """Peak megabytes beyond arguments and gradients of forward, and of forward and backward; bfloat16 hidden states."""
    found: dict[str, dict[str, float]] = {}
    for name in names:
        case = Case.draw(shape, num_tokens, torch.bfloat16)
        work = from_hidden(case)[name]

        def backward(work: Callable[[], tuple[Tensor, ...]] = work) -> None:
            sum(values.sum() for values in work()).backward()  # type: ignore[union-attr]

        found[name] = {"forward": round(peak_bytes(without_grad(work)) / 1e6)}
        if name == "entrace":
            found[name]["forward_backward"] = round((peak_bytes(backward) - case.grad_bytes()) / 1e6)
    return found


def main() -> None:
    """Prints the result as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="measured rounds (default 9)")
    parser.add_argument("--tokens", type=int, default=256, help="tokens timed (default 256)")
    parser.add_argument(
        "--memory-tokens", type=int, nargs="*", default=[512, 1024, 2048], help="tokens whose memory is measured"
    )
    parser.add_argument("--out", type=Path, help="file to write the result to as well")
    arguments = parser.parse_args()
    result: dict[str, Any] = {
        "tokens": arguments.tokens,
        "threads": torch.get_num_threads(),
        "time": {},
        "memory_mb": {},
    }
    for name, shape in SHAPES.items():
        for dtype in (torch.float32, torch.bfloat16):
            case = Case.draw(shape, arguments.tokens, dtype)
            logits, hidden = from_logits(case), from_hidden(case)
            works = {
                "logits": {key: without_grad(work) for key, work in logits.items()},
                "head": {key: without_grad(work) for key, work in hidden.items()},
            }
            if dtype == torch.float32:
                works["head, with backward"] = {key: with_backward(work, case) for key, work in hidden.items()}
            for reading, arms in works.items():
                key = f"{name}, {str(dtype).removeprefix('torch.')}, from {reading}"
                result["time"][key] = compare(arms, arguments.rounds)
                print(key, result["time"][key], flush=True)
        for count in arguments.memory_tokens:
            names = ["entrace", "plain"] if count == min(arguments.memory_tokens) else ["entrace"]
            key = f"{name}, {count} tokens"
            result["memory_mb"][key] = measure_memory(shape, count, names)
            print(key, result["memory_mb"][key], flush=True)
    text = json.dumps(result, indent=2)
    if arguments.out:
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()

"""Log-probability, entropy and sum p² of tokens at large vocabularies, against plain torch and TRL, paired.

Three ways to the same tokens' statistics:

- entrace: all three statistics;
- plain: ``log_softmax`` of all logits in float32 and a gather, which gives the log-probability alone;
- trl: ``selective_log_softmax`` and ``entropy_from_logits``, which gives log-probability and entropy.

Two readings of each: "head" starts from hidden states and includes the matrix product with the LM head, "logits" from
logits that are there already, so that nothing but the statistics is timed. "product" is the product alone. TRL's
functions are given logits: from hidden states, the target holds for what each adds to the product. Products of bfloat16
are left out: on CPUs without instructions for them they take up to a hundred times longer than the statistics. Extra
memory is what the allocator held at most over what was there before, less the gradients of the hidden states and of the
head, which are the model's own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from entrace.trainer.kernels.allocator import keep_freed_memory
from entrace.trainer.kernels.token_stats import LMHead, compute_stats, compute_token_stats
from tests.benchmarks.allocator import give_back_memory, peak_bytes
from tests.benchmarks.figures import AT_MOST, HAS_TRL, Figure, quotients, time_in_turn

PART = "Statistics of tokens"
# Vocabulary and width of SmolLM2-135M and of Qwen2.5-0.5B.
SHAPES = {"49k": (49152, 576), "152k": (151936, 896)}
TOY_SHAPES = {"1k": (1024, 16)}
SEQUENCES = 4
TARGETS = {"plain": 1.3, "trl": 0.7}
FULL_TOKENS = 8 * 2048
MAX_EXTRA_GB = 1.5


@dataclass
class Case:
    """Hidden states (N, H), a head that gives them logits of a spread as in language models, and targets."""

    hidden: Tensor
    head: LMHead
    targets: Tensor

    @classmethod
    def draw(cls, shape: tuple[int, int], num_tokens: int, dtype: torch.dtype, device: str = "cpu") -> Case:
        """The head in float32 as master weights are, hidden states in ``dtype``."""
        vocab, width = shape
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(num_tokens, width, generator=generator).to(device, dtype).requires_grad_()
        weight = (torch.randn(vocab, width, generator=generator) * 3 / width**0.5).to(device).requires_grad_()
        return cls(hidden, LMHead(weight, None), torch.randint(vocab, (num_tokens,), generator=generator).to(device))

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
    from trl.trainer.utils import entropy_from_logits, selective_log_softmax

    logits, targets = logits.view(SEQUENCES, -1, logits.shape[-1]), targets.view(SEQUENCES, -1)
    return selective_log_softmax(logits, targets), entropy_from_logits(logits)


PEERS = {"plain": plain, **({"trl": trl} if HAS_TRL else {})}


def from_logits(case: Case) -> dict[str, Callable[[], Any]]:
    """The statistics alone."""
    with torch.no_grad():
        logits = case.logits()
    peers = {name: lambda peer=peer: peer(logits, case.targets) for name, peer in PEERS.items()}
    return {"entrace": lambda: compute_stats(logits, case.targets), **peers}


def from_hidden(case: Case) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """Matrix product and statistics."""

    def entrace() -> tuple[Tensor, ...]:
        stats = compute_token_stats(case.hidden, case.head, case.targets)
        return stats.logprob, stats.entropy

    peers = {name: lambda peer=peer: peer(case.logits(), case.targets) for name, peer in PEERS.items()}
    return {"entrace": entrace, **peers, "product": lambda: (case.logits(),)}


def backward(work: Callable[[], tuple[Tensor, ...]]) -> None:
    """The forward pass and the gradient of the sum of what it returns."""
    torch.stack([values.sum() for values in work()]).sum().backward()


def settle(work: Callable[[], Any]) -> None:
    """Brings memory into the state in which ``work`` finds it if it runs again and again, and nothing else does."""
    give_back_memory()
    # The second time, it may come to lie elsewhere than the first time.
    for _ in range(2):
        work()


def compare(
    name: str, works: dict[str, Callable[[], Any]], rounds: int, targets: dict[str, float], added: float | None = None
) -> list[Figure]:
    """Ratios of the seconds of entrace to those of the others, paired, and the seconds themselves.

    ``targets`` are those of the ratios by peer, ``added`` that of what is added to the product, against TRL.
    """
    seconds = time_in_turn(works, rounds, prepare=settle)
    ratios = [
        Figure.of(
            PART,
            f"{name}: entrace / {peer}",
            "ratio",
            quotients(seconds["entrace"], values),
            AT_MOST,
            targets.get(peer),
        )
        for peer, values in seconds.items()
        if peer != "entrace"
    ]
    if {"product", "trl"} <= seconds.keys():
        values = quotients_of_added(seconds)
        ratios.append(Figure.of(PART, f"{name}: added to the product, entrace / trl", "ratio", values, AT_MOST, added))
    return [*ratios, Figure.of(PART, f"{name}: entrace", "s", seconds["entrace"])]


def quotients_of_added(seconds: dict[str, list[float]]) -> list[float]:
    """What entrace adds to the product relative to what TRL adds: medians of turns drawn with replacement.

    Within a turn, the product's own seconds vary by more than either adds.
    """
    entrace, peer, product = (np.array(seconds[key]) for key in ("entrace", "trl", "product"))
    drawn = np.random.default_rng(0).integers(0, len(product), (1000, len(product)))
    return np.divide(*(np.median((values - product)[drawn], axis=1) for values in (entrace, peer))).tolist()


def measure_time(name: str, shape: tuple[int, int], num_tokens: int, rounds: int) -> list[Figure]:
    """Both readings of the forward pass, and the one that has gradients with the backward pass."""
    figures = []
    for dtype in (torch.float32, torch.bfloat16):
        case = Case.draw(shape, num_tokens, dtype)
        works = {key: torch.no_grad()(work) for key, work in from_logits(case).items()}
        label = f"{name}, {str(dtype).removeprefix('torch.')}"
        figures += compare(f"{label}, from logits", works, rounds, TARGETS)
    case = Case.draw(shape, num_tokens, torch.float32)
    hidden = from_hidden(case)
    works = {key: torch.no_grad()(work) for key, work in hidden.items()}
    targets = {"plain": TARGETS["plain"]}
    figures += compare(f"{name}, float32, from hidden states", works, 3 * rounds, targets, TARGETS["trl"])

    def both(work: Callable[[], tuple[Tensor, ...]]) -> None:
        backward(work)
        case.grad_bytes()

    works = {key: lambda work=work: both(work) for key, work in hidden.items()}
    return figures + compare(f"{name}, float32, from hidden states, with backward", works, rounds, {})


def measure_memory(name: str, shape: tuple[int, int], counts: list[int]) -> list[Figure]:
    """Extra memory of the forward pass against the plain one, and of both passes at several numbers of tokens."""
    case = Case.draw(shape, counts[0], torch.bfloat16)
    works = from_hidden(case)
    peaks = {key: peak_bytes(torch.no_grad()(works[key])) for key in ("entrace", "plain")}
    key = f"{name}, bfloat16, {counts[0]:,} tokens: extra memory, entrace / plain"
    figures = [Figure.of(PART, key, "ratio", [peaks["entrace"] / peaks["plain"]], AT_MOST, 1)]
    for count in counts:
        case = Case.draw(shape, count, torch.bfloat16)
        work = from_hidden(case)["entrace"]
        extra = peak_bytes(lambda work=work: backward(work)) - case.grad_bytes()
        key = f"{name}, bfloat16, {count:,} tokens: extra memory, both passes"
        figures.append(Figure.of(PART, key, "GB", [extra / 1e9], AT_MOST, MAX_EXTRA_GB))
    return figures


def measure(quick: bool) -> list[Figure]:
    """All figures, at toy size if ``quick``."""
    shapes, tokens, rounds = (TOY_SHAPES, 64, 2) if quick else (SHAPES, 256, 9)
    counts = [512, 1024] if quick else [512, 2048]
    figures = []
    # As the trainer does; all that is compared has the benefit.
    keep_freed_memory()
    for name, shape in shapes.items():
        figures += measure_time(name, shape, tokens, rounds)
        # The whole batch of a training step once, at the larger vocabulary.
        full = [FULL_TOKENS] if name == "152k" else []
        figures += measure_memory(name, shape, counts + full)
    return figures

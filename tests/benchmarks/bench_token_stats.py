"""Time token statistics at large vocabularies, against plain torch and TRL.

The statistics are log-probability, entropy, and sum of p². The comparison is paired. Three programs compute them for
the same tokens:

- entrace: all three statistics;
- plain: ``log_softmax`` of all logits in float32 and a gather, which gives the log-probability only;
- trl: ``selective_log_softmax`` and ``entropy_from_logits``, which give log-probability and entropy.

Each is timed from hidden states, including the product with the LM head, and from existing logits, which times the
statistics only. "product" is the product alone, without statistics. Bfloat16 products are excluded: CPUs without
instructions for them need up to 100 times longer for the product than for the statistics. Extra memory is the
allocator's peak above its initial state, without the gradients of hidden states and head, which belong to the model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from entrace.trainer.kernels.allocator import keep_freed_memory
from entrace.trainer.kernels.blocked_stats import compute_token_stats
from entrace.trainer.kernels.token_stats import LMHead
from tests.benchmarks.allocator import give_back_memory, peak_bytes
from tests.benchmarks.logit_stats import stats_of_logits
from tests.benchmarks.measurements import AT_MOST, HAS_TRL, Measurement, quotients, time_in_rounds

PART = "Token statistics"
# Vocabulary and width of SmolLM2-135M and of Qwen2.5-0.5B.
SHAPES = {"49k": (49152, 576), "152k": (151936, 896)}
TOY_SHAPES = {"1k": (1024, 16)}
SEQUENCES = 4
TARGETS = {"plain": 1.3, "trl": 0.7}
FULL_TOKENS = 8 * 2048
MAX_EXTRA_GB = 1.5


@dataclass
class Case:
    """Hold hidden states (N, H), an LM head, and targets.

    Logits of the head vary as in language models.
    """

    hidden: Tensor
    head: LMHead
    targets: Tensor

    @classmethod
    def draw(cls, shape: tuple[int, int], num_tokens: int, dtype: torch.dtype, device: str = "cpu") -> Case:
        """Draw a case with a float32 head, and hidden states in ``dtype``.

        Master weights are float32, too.
        """
        vocab, width = shape
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(num_tokens, width, generator=generator).to(device, dtype).requires_grad_()
        weight = (torch.randn(vocab, width, generator=generator) * 3 / width**0.5).to(device).requires_grad_()
        return cls(hidden, LMHead(weight, None), torch.randint(vocab, (num_tokens,), generator=generator).to(device))

    def logits(self) -> Tensor:
        """Return logits as a model does, in the dtype of the hidden states."""
        return torch.nn.functional.linear(self.hidden, self.head.weight.to(self.hidden.dtype))

    def grad_bytes(self) -> int:
        """Return the memory of the gradients in bytes, and drop them."""
        leaves = (self.hidden, self.head.weight)
        total = sum(leaf.grad.nbytes for leaf in leaves if leaf.grad is not None)
        self.hidden.grad = self.head.weight.grad = None
        return total


def plain(logits: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    """Return log-probabilities (N,)."""
    return (torch.log_softmax(logits.float(), dim=-1).gather(1, targets[:, None]).squeeze(1),)


def trl(logits: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    """Return log-probabilities and entropies as TRL's trainer computes them.

    Shape (sequences, N / sequences).
    """
    from trl.trainer.utils import entropy_from_logits, selective_log_softmax

    logits, targets = logits.view(SEQUENCES, -1, logits.shape[-1]), targets.view(SEQUENCES, -1)
    return selective_log_softmax(logits, targets), entropy_from_logits(logits)


PEERS = {"plain": plain, **({"trl": trl} if HAS_TRL else {})}


def from_logits(case: Case) -> dict[str, Callable[[], Any]]:
    """Return the programs that start from logits."""
    with torch.no_grad():
        logits = case.logits()
    peers = {name: lambda peer=peer: peer(logits, case.targets) for name, peer in PEERS.items()}
    return {"entrace": lambda: stats_of_logits(logits, case.targets), **peers}


def from_hidden(case: Case) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """Return the programs that start from hidden states."""

    def entrace() -> tuple[Tensor, ...]:
        stats = compute_token_stats(case.hidden, case.head, case.targets)
        return stats.logprob, stats.entropy

    peers = {name: lambda peer=peer: peer(case.logits(), case.targets) for name, peer in PEERS.items()}
    return {"entrace": entrace, **peers, "product": lambda: (case.logits(),)}


def backward(work: Callable[[], tuple[Tensor, ...]]) -> None:
    """Run the forward pass and the backward pass of the sum of its results."""
    torch.stack([values.sum() for values in work()]).sum().backward()


def settle(work: Callable[[], Any]) -> None:
    """Bring memory into the state in which ``work`` finds it when run repeatedly.

    No other work runs.
    """
    give_back_memory()
    # Twice, since the second run may get other memory than the first.
    for _ in range(2):
        work()


def compare(
    name: str, works: dict[str, Callable[[], Any]], rounds: int, targets: dict[str, float]
) -> list[Measurement]:
    """Measure entrace's seconds, and paired ratios of them to each peer's.

    Args:
        name: Name of the case.
        works: Programs by name.
        rounds: Number of rounds.
        targets: Target of the ratio, by peer.
    """
    seconds = time_in_rounds(works, rounds, prepare=settle)
    ratios = [
        Measurement.of(
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
    return [*ratios, Measurement.of(PART, f"{name}: entrace", "s", seconds["entrace"])]


def measure_time(name: str, shape: tuple[int, int], num_tokens: int, rounds: int) -> list[Measurement]:
    """Measure the forward and the backward pass.

    The forward pass is timed from logits and from hidden states, the backward pass from hidden states.
    """
    measurements = []
    for dtype in (torch.float32, torch.bfloat16):
        case = Case.draw(shape, num_tokens, dtype)
        works = {key: torch.no_grad()(work) for key, work in from_logits(case).items()}
        label = f"{name}, {str(dtype).removeprefix('torch.')}"
        measurements += compare(f"{label}, from logits", works, rounds, TARGETS)
    case = Case.draw(shape, num_tokens, torch.float32)
    hidden = from_hidden(case)
    works = {key: torch.no_grad()(work) for key, work in hidden.items()}
    targets = {"plain": TARGETS["plain"]}
    measurements += compare(f"{name}, float32, from hidden states", works, 3 * rounds, targets)

    def both(work: Callable[[], tuple[Tensor, ...]]) -> None:
        backward(work)
        case.grad_bytes()

    works = {key: lambda work=work: both(work) for key, work in hidden.items()}
    return measurements + compare(f"{name}, float32, from hidden states, with backward", works, rounds, {})


def measure_memory(name: str, shape: tuple[int, int], counts: list[int]) -> list[Measurement]:
    """Measure extra memory of the forward pass against plain.

    Both passes together are measured by number of tokens.
    """
    case = Case.draw(shape, counts[0], torch.bfloat16)
    works = from_hidden(case)
    peaks = {key: peak_bytes(torch.no_grad()(works[key])) for key in ("entrace", "plain")}
    key = f"{name}, bfloat16, {counts[0]:,} tokens: extra memory, entrace / plain"
    measurements = [Measurement.of(PART, key, "ratio", [peaks["entrace"] / peaks["plain"]], AT_MOST, 1)]
    for count in counts:
        case = Case.draw(shape, count, torch.bfloat16)
        work = from_hidden(case)["entrace"]
        extra = peak_bytes(lambda work=work: backward(work)) - case.grad_bytes()
        key = f"{name}, bfloat16, {count:,} tokens: extra memory, both passes"
        measurements.append(Measurement.of(PART, key, "GB", [extra / 1e9], AT_MOST, MAX_EXTRA_GB))
    return measurements


def measure(quick: bool) -> list[Measurement]:
    """Return all measurements, at toy size if ``quick``."""
    shapes, tokens, rounds = (TOY_SHAPES, 64, 2) if quick else (SHAPES, 256, 9)
    counts = [512, 1024] if quick else [512, 2048]
    measurements = []
    # As in training; all programs benefit.
    keep_freed_memory()
    for name, shape in shapes.items():
        measurements += measure_time(name, shape, tokens, rounds)
        # The batch of a whole training step, once, at the larger vocabulary.
        full = [FULL_TOKENS] if name == "152k" else []
        measurements += measure_memory(name, shape, counts + full)
    return measurements

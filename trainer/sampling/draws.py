"""Draw tokens on the device, without synchronizing with the host.

Random numbers, stop tokens, and statistics stay on the device until the host looks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from entrace.trainer.kernels.token_stats import WHOLE, LMHead, Softmax, Sums, TokenStats, triton_kernels
from entrace.trainer.sampling.samples import SamplingParams
from entrace.trainer.sampling.token_sampler import invert_cdf

# Fields of ``Sums``, and the norm of the LM head's input.
NUM_STATS = 6


@dataclass
class Draws:
    """Hold the responses of a batch, one per slot.

    The last slot is empty and receives values to discard.

    Attributes:
        uniforms: Random numbers in [0, 1), (slots, T) float32.
        limits: Length limits, (slots,) int64.
        stop_ids: Tokens that end a response.
        tokens: Last token of each slot, (slots,) int64.
        lengths: Tokens drawn so far, (slots,) int64; 1 in the last slot.
        is_open: Slots that continue, (slots,) int8.
        has_stopped: Slots ended by a stop token, (slots,) int8.
        ids: Tokens, (slots, T) int64.
        stats: The fields of ``Sums`` and the norm of the LM head's input, (6, slots, T) float32.
    """

    uniforms: Tensor
    limits: Tensor
    stop_ids: Tensor
    tokens: Tensor
    lengths: Tensor
    is_open: Tensor
    has_stopped: Tensor
    ids: Tensor
    stats: Tensor

    @classmethod
    def empty(cls, num_slots: int, num_places: int, num_stop: int, device: torch.device) -> Draws:
        """Allocate ``num_slots`` slots of ``num_places`` tokens, the last one included."""
        shape, whole = (num_slots, num_places), {"dtype": torch.int64, "device": device}
        return cls(
            uniforms=torch.zeros(shape, device=device),
            limits=torch.zeros(num_slots, **whole),
            stop_ids=torch.zeros(num_stop, **whole),
            tokens=torch.zeros(num_slots, **whole),
            lengths=torch.zeros(num_slots, **whole),
            is_open=torch.zeros(num_slots, dtype=torch.int8, device=device),
            has_stopped=torch.zeros(num_slots, dtype=torch.int8, device=device),
            ids=torch.zeros(shape, **whole),
            stats=torch.zeros(NUM_STATS, *shape, device=device),
        )

    def begin(self, uniforms: Tensor, limits: Tensor, stop_ids: Tensor) -> None:
        """Start responses in the first slots.

        ``uniforms`` has shape (B, T), ``limits`` (B,).
        """
        count, places = uniforms.shape
        self.uniforms[:count, :places] = uniforms
        self.limits[:count] = limits
        self.stop_ids[:] = stop_ids
        self.lengths.zero_()
        self.lengths[-1] = 1
        self.has_stopped.zero_()
        self.is_open.zero_()
        self.is_open[:count] = 1

    def draw(self, hidden: Tensor, norms: Tensor, slots: Tensor, head: LMHead, params: SamplingParams) -> None:
        """Draw and record a token, with its statistics, for each open slot in ``slots``.

        Args:
            hidden: Inputs of the LM head, (R, H).
            norms: Their norms, (R,) float32.
            slots: Slot of each row, (R,); only the last slot may repeat.
            head: The LM head, in the dtype of products.
            params: Temperature and truncation.
        """
        if triton_kernels(hidden.device):
            from entrace.trainer.kernels import decoding_triton

            logits = torch.nn.functional.linear(hidden, head.weight, head.bias)
            if params.truncation != WHOLE:
                logits = params.truncation.apply(logits.float(), params.temperature).contiguous()
            decoding_triton.draw(logits, norms, slots, self, params.temperature)
            return
        softmax = Softmax.of(params.truncation.apply(head.logits(hidden), params.temperature), params.temperature)
        is_drawn = self.is_open[slots].bool()
        targets = slots.where(is_drawn, len(self.lengths) - 1)
        places = self.lengths[slots].where(is_drawn, 0)
        order = torch.arange(len(slots), device=slots.device)
        tokens = invert_cdf(softmax.weights, order, self.uniforms[targets, places])
        sums = softmax.sums(tokens)
        self.ids[targets, places] = tokens
        self.stats[:, targets, places] = torch.stack((*vars(sums).values(), norms))
        is_end = (tokens[:, None] == self.stop_ids).any(1)
        self.tokens[targets] = tokens
        self.lengths[targets] = places + 1
        self.is_open[targets] = (is_drawn & ~is_end & (places + 1 < self.limits[targets])).to(torch.int8)
        self.has_stopped[targets] = is_end.to(torch.int8)

    def end(self, slots: Tensor, lengths: Tensor) -> None:
        """End responses at given lengths, as a stop token would.

        ``slots`` are distinct; both arguments have shape (n,).
        """
        self.lengths[slots] = lengths
        self.is_open[slots] = 0
        self.has_stopped[slots] = 1

    def token_stats(self, mask: Tensor, temperature: float) -> tuple[TokenStats, Tensor]:
        """Return statistics of tokens, and norms of the LM head's inputs, (N,) each.

        The tokens are those in ``mask``, (B, T).
        """
        *sums, norms = self.stats[:, : len(mask), : mask.shape[1]][:, mask]
        return Sums(*sums).stats(temperature), norms

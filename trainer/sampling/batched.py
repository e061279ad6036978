"""Sample on a GPU, where all responses grow together.

The host looks at them only every few tokens. A decoding step, the draw of the next tokens, their statistics, and the
test for stop tokens are one CUDA graph. The graph is replayed ``CHECK_EVERY`` times before the host looks which
responses have ended. When half of them have, the others continue in a smaller graph. Keys and values never move: rows
refer to them by slot.

The algorithm is the same on any device; without CUDA, the step runs without a graph.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from entrace.analysis.trace import in_one_line
from entrace.trainer.kernels.decoding import LayerCache, Rows, tile_size
from entrace.trainer.kernels.token_stats import WHOLE, Truncation, uses_triton
from entrace.trainer.model.policy import Policy
from entrace.trainer.sampling.cuda_graph import CudaGraph
from entrace.trainer.sampling.draws import Draws
from entrace.trainer.sampling.fused_model import FusedModel
from entrace.trainer.sampling.samples import Rollouts, SamplingParams
from entrace.trainer.sampling.token_sampler import ends_response

log = logging.getLogger("entrace")

# Tokens between two looks of the host, and the granularity of lengths and of numbers of rows.
CHECK_EVERY = 16
PLACES, ROWS = 64, 8
# Most prompt tokens per pass, with padding.
PREFILL_TOKENS = 1 << 14
# Share of free GPU memory that a batch may take; a batch and weights of less than ``KEPT`` of all memory are kept.
USABLE, KEPT = 0.85, 0.02


@dataclass
class _Memory:
    """Hold keys, values, and draws of a batch, and the CUDA graphs captured on them.

    Attributes:
        caches: Keys and values of each layer.
        draws: The responses.
        prompts: As in ``Rows``.
        prompt_lengths: As in ``Rows``.
        rows: The rows of each number of rows.
        graphs: The graph of each number of rows, number of places, temperature, and truncation.
    """

    caches: list[LayerCache]
    draws: Draws
    prompts: Tensor
    prompt_lengths: Tensor
    rows: dict[int, Rows] = field(default_factory=dict)
    graphs: dict[tuple[int, int, float, Truncation], CudaGraph] = field(default_factory=dict)

    @classmethod
    def allocate(
        cls,
        model: FusedModel,
        shape: tuple[int, int, int, int],
        num_stop: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> _Memory:
        """Allocate memory for ``shape``: prompts, places of each, slots, places of each."""
        num_prompts, prompt_places, num_slots, places = shape
        of_prompts = (num_prompts, model.key_heads, prompt_places, model.width)
        of_slots = (num_slots, model.key_heads, places, model.width)
        # Zeros: unwritten places are multiplied by a weight of 0, and must not be NaN.
        caches = [
            LayerCache(*(torch.zeros(size, dtype=dtype, device=device) for size in (of_prompts,) * 2 + (of_slots,) * 2))
            for _ in range(model.layers)
        ]
        prompts, lengths = (torch.zeros(n, dtype=torch.int64, device=device) for n in (num_slots, num_prompts))
        return cls(caches, Draws.empty(num_slots, places, num_stop, device), prompts, lengths)

    def fits(self, shape: tuple[int, int, int, int], num_stop: int) -> bool:
        """Return whether a batch of this shape fits."""
        cache, draws = self.caches[0], self.draws
        there = (len(self.prompt_lengths), cache.prompt_keys.shape[2], *draws.ids.shape)
        return all(a >= b for a, b in zip(there, shape, strict=True)) and len(draws.stop_ids) == num_stop

    def nbytes(self) -> int:
        """Return the size of keys and values."""
        return sum(tensor.nbytes for cache in self.caches for tensor in vars(cache).values())


class BatchedSampler:
    """Sample responses with given random numbers; see ``sampler.sample_at``."""

    def __init__(self, policy: Policy, *, captures: bool, compiles: bool, note: Callable[[str], None]) -> None:
        """Find the parts of the model.

        Args:
            policy: The model.
            captures: Capture the step in a CUDA graph.
            compiles: Fuse norms and activations with ``torch.compile``.
            note: Called with the reason if a capture fails; the step then runs without graph.

        Raises:
            ValueError: the model has other parts than a Llama-like one.
        """
        # Backends are kept by policy, and must not keep it.
        self._policy, self._compiles = weakref.proxy(policy), compiles
        self._model = FusedModel(self._policy, compiles=compiles)
        self.captures, self._note = captures, note
        self._memory: _Memory | None = None

    @torch.no_grad()
    def sample_at(
        self, prompts: list[list[int]], uniforms: np.ndarray, limits: list[int], params: SamplingParams
    ) -> Rollouts:
        """Sample in as many batches as memory needs.

        Arguments and result are those of ``sampler.sample_at``.

        Raises:
            torch.OutOfMemoryError: one response does not fit.
        """
        num_samples = len(uniforms) // len(prompts)
        widest = _up(max(map(len, prompts)), PLACES)
        size = self._batch_size(len(uniforms), num_samples, widest, params)
        of_rows, of_prompts = np.arange(len(uniforms)) // num_samples, np.array(limits)
        parts, start = [Rollouts.empty([], params.max_tokens)], 0
        while start < len(uniforms):
            rows = slice(start, start + size)
            own = of_rows[rows]
            some = prompts[own[0] : own[-1] + 1]
            try:
                parts.append(self._sample(some, widest, own - own[0], uniforms[rows], of_prompts[own], params))
                start += size
                continue
            except torch.OutOfMemoryError:
                self._memory = None
                if size == 1:
                    raise
            # Outside the handler, whose traceback would keep the memory occupied.
            size = -(-min(size, len(uniforms)) // 2)
            log.warning("out of memory while sampling; continuing with %d responses at once", size)
            if self._policy.device.type == "cuda":
                torch.cuda.empty_cache()
        if self._memory and self._memory.nbytes() + self._model.nbytes() > KEPT * _total_bytes(self._policy.device):
            # An update needs the memory.
            self._memory = None
            self._model = FusedModel(self._policy, compiles=self._compiles)
        return Rollouts.concatenate(parts)

    def _batch_size(self, count: int, num_samples: int, widest: int, params: SamplingParams) -> int:
        """Return the most responses that fit, at least 1.

        The limits are memory and ``params.cache_tokens``.
        """
        policy, model = self._policy, self._model
        token = 2 * model.layers * model.key_heads * model.width * policy.dtype.itemsize
        places = _up(params.max_tokens, PLACES)
        # Tokens of a response, with its share of the prompt's.
        tokens = places + widest / num_samples
        # Logits, in the dtype of products; truncation sorts them in float32.
        logits = policy.vocab_size * (2 * policy.dtype.itemsize + (params.truncation != WHOLE) * 32)
        most = _free_bytes(policy.device, self._memory) * USABLE / (tokens * token + logits + places * 40)
        return max(1, int(min(count, most, params.cache_tokens / (params.max_tokens + widest / num_samples))))

    def _sample(
        self,
        prompts: list[list[int]],
        widest: int,
        of_rows: np.ndarray,
        uniforms: np.ndarray,
        limits: np.ndarray,
        params: SamplingParams,
    ) -> Rollouts:
        """Sample one batch; ``of_rows`` (B,) is the prompt of each response, ascending."""
        policy, count = self._policy, len(uniforms)
        device, stop_ids = policy.device, policy.stop_ids.to(policy.device)
        memory = self._memory_for((len(prompts), widest, count + 1, _up(params.max_tokens, PLACES)), len(stop_ids))
        draws = memory.draws
        draws.begin(torch.from_numpy(uniforms).to(device), torch.from_numpy(limits).to(device), stop_ids)
        memory.prompts[:count] = torch.from_numpy(of_rows).to(device)
        hidden = self._prefill(prompts, memory)
        size, rows = self._arrange(np.arange(count), of_rows, memory)
        hidden = hidden[memory.prompts[rows.slots]]
        draws.draw(hidden, hidden.float().norm(dim=-1), rows.slots, self._model.head, params)
        watch = _StopTexts(policy, params.stop, count)
        done, longest = 1, int(limits.max())
        is_open = watch.update(draws)
        while done < longest and is_open.any():
            left = np.flatnonzero(is_open)
            if 2 * len(left) <= size:
                size, rows = self._arrange(left, of_rows, memory)
            steps = min(CHECK_EVERY, longest - done)
            for _ in range(steps):
                self._extend(rows, _up(done + steps, PLACES), memory, params)
            done += steps
            is_open = watch.update(draws)
        return self._finish([prompts[i] for i in of_rows], draws, params)

    def _memory_for(self, shape: tuple[int, int, int, int], num_stop: int) -> _Memory:
        """Return memory for a batch, with current weights.

        Memory of the last batch is reused where possible.
        """
        moved = self._model.refresh(shape[1] + shape[3])
        if self._memory is None or moved or not self._memory.fits(shape, num_stop):
            # Freed before the next is allocated.
            self._memory = None
            policy = self._policy
            self._memory = _Memory.allocate(self._model, shape, num_stop, policy.dtype, policy.device)
        return self._memory

    def _prefill(self, prompts: list[list[int]], memory: _Memory) -> Tensor:
        """Read each prompt once; return the LM head's inputs, (P, H)."""
        device = self._policy.device
        lengths = torch.tensor([len(prompt) for prompt in prompts]).to(device)
        memory.prompt_lengths[: len(prompts)] = lengths
        size = max(1, PREFILL_TOKENS // max(map(len, prompts)))
        found = []
        for start in range(0, len(prompts), size):
            some = slice(start, start + size)
            ids = pad_sequence([torch.tensor(prompt) for prompt in prompts[some]], batch_first=True)
            found.append(self._model.read(ids.to(device), lengths[some], memory.caches, start))
        return torch.cat(found)

    def _arrange(self, slots: np.ndarray, of_rows: np.ndarray, memory: _Memory) -> tuple[int, Rows]:
        """Return the number of rows, and rows with the given slots, ascending.

        Rows beyond the given slots refer to the last slot.
        """
        size, device, draws = _up(len(slots), ROWS), self._policy.device, memory.draws
        width = tile_size(self._model.group)
        if size not in memory.rows:
            whole = {"dtype": torch.int64, "device": device}
            slots_of, tiles = torch.zeros(size, **whole), torch.zeros(size, width, **whole)
            memory.rows[size] = Rows(slots_of, tiles, memory.prompts, memory.prompt_lengths, draws.lengths)
        rows = memory.rows[size]
        padded = np.full(size, len(draws.lengths) - 1)
        padded[: len(slots)] = slots
        rows.slots.copy_(torch.from_numpy(padded))
        rows.tiles.copy_(torch.from_numpy(tile_rows(of_rows[slots], size, width)))
        return size, rows

    def _extend(self, rows: Rows, places: int, memory: _Memory, params: SamplingParams) -> None:
        """Extend each row by one token; all work is on the device."""

        def work() -> Tensor:
            hidden, norms = self._model.step(memory.draws.tokens, rows, memory.caches, places)
            memory.draws.draw(hidden, norms, rows.slots, self._model.head, params)
            return hidden

        if self.captures:
            # The kernel for attention reads used places only, so that one graph serves all lengths.
            key = (
                len(rows.slots),
                places * (not uses_triton(self._policy.device)),
                params.temperature,
                params.truncation,
            )
            graph = memory.graphs.setdefault(key, CudaGraph())
            try:
                graph(work)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                # Nothing ran: a capture records work without executing it.
                self.captures = False
                reason = in_one_line(error)
                log.warning("CUDA graph: off from here on (%s); sampling is slower", reason)
                self._note(reason)
            else:
                return
        work()

    def _finish(self, prompts: list[list[int]], draws: Draws, params: SamplingParams) -> Rollouts:
        rollouts = Rollouts.empty(prompts, params.max_tokens)
        count, places = rollouts.response_ids.shape
        lengths = draws.lengths[:count, None]
        mask = torch.arange(places, device=lengths.device) < lengths
        stats, norms = draws.token_stats(mask, params.temperature)
        rollouts.response_mask[:] = mask.cpu()
        for name, values in vars(stats).items():
            getattr(rollouts.stats, name)[rollouts.response_mask] = values.cpu()
        rollouts.hidden_norm[rollouts.response_mask] = norms.cpu()
        rollouts.response_ids[rollouts.response_mask] = draws.ids[:count, :places][mask].cpu()
        rollouts.is_truncated[:] = draws.has_stopped[:count].cpu() == 0
        return rollouts


class _StopTexts:
    """End responses at the token that completes a stop text.

    The device only knows stop tokens.
    """

    def __init__(self, policy: Policy, stop: tuple[str, ...], count: int) -> None:
        self._policy, self._stop = policy, stop
        self._seen = torch.zeros(count, dtype=torch.int64)

    def update(self, draws: Draws) -> np.ndarray:
        """Look at newly drawn tokens; return the responses that continue, (B,) bool."""
        count = len(self._seen)
        if self._stop:
            lengths, ids = draws.lengths[:count].cpu(), draws.ids[:count].cpu()
            rows, ended = torch.nonzero(self._seen < lengths).squeeze(1), []
            while len(rows):
                is_end = ends_response(self._policy, ids, rows, self._seen[rows], self._stop)
                self._seen[rows] += 1
                ended.append(rows[is_end])
                rows = rows[~is_end & (self._seen[rows] < lengths[rows])]
            if ended:
                found = torch.cat(ended)
                draws.end(found.to(draws.lengths.device), self._seen[found].to(draws.lengths.device))
        return draws.is_open[:count].cpu().bool().numpy()


def tile_rows(prompts: np.ndarray, size: int, width: int) -> np.ndarray:
    """Divide rows into tiles of up to ``width`` rows of one prompt.

    Args:
        prompts: Prompt of each row, ascending, (n,).
        size: Number of tiles, at least n.
        width: Rows per tile.

    Returns:
        Rows of each tile, (size, width); -1 where there is none.
    """
    tiles = np.full((size, width), -1)
    if len(prompts):
        rows = np.arange(len(prompts))
        is_first = np.concatenate(([True], prompts[1:] != prompts[:-1]))
        within = rows - np.maximum.accumulate(np.where(is_first, rows, 0))
        tile = (within % width == 0).cumsum() - 1
        tiles[tile, within % width] = rows
    return tiles


def _up(count: int, unit: int) -> int:
    return -(-count // unit) * unit


def _free_bytes(device: torch.device, kept: _Memory | None) -> float:
    """Return the GPU memory that a batch may take, in bytes; infinite on a CPU.

    Memory of the last batch is included.
    """
    if device.type != "cuda":
        return float("inf")
    free = torch.cuda.mem_get_info(device)[0]
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free + unused + (kept.nbytes() if kept else 0)


def _total_bytes(device: torch.device) -> float:
    return torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else float("inf")

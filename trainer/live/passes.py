"""Take statistics of tokens from TRL's forward passes, or from extra ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from entrace.trainer.live.generation import Generation, Pass
from entrace.trainer.live.head_probe import HeadProbe, ask_reference_for_entropy
from entrace.trainer.live.recording import Notices
from entrace.trainer.seeding import Stream, generator

CLIPPING_LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo")


class Passes:
    """Follow the forward passes of a trainer.

    Attributes:
        has_dropout: A pass in training mode draws random numbers.
        probe: Captures the inputs of gradient norms; None if that is impossible.
        has_reference_entropy: TRL computes entropies of the reference model.
    """

    def __init__(self, trainer: Any, notices: Notices) -> None:
        """Patch the LM heads of the policy and of the reference model."""
        self._trainer, self._notices = trainer, notices
        self.has_dropout = _has_dropout(trainer.model)
        self.probe = HeadProbe.attach(trainer)
        self.has_reference_entropy = ask_reference_for_entropy(trainer)
        # Passes of the running block, and the consumer of the pass inside the running loss; None outside.
        self._collected: list[tuple[Any, Pass]] | None = None
        self._in_loss: Callable[[Pass], None] | None = None

    # TRL's passes

    @contextmanager
    def collecting(self) -> Iterator[list[tuple[Any, Pass]]]:
        """Collect the passes in the block.

        Each comes with the log-probabilities that TRL receives, which identify it.
        """
        found: list[tuple[Any, Pass]] = []
        self._collected = found
        try:
            yield found
        finally:
            self._collected = None

    @contextmanager
    def in_loss(self, take: Callable[[Pass], None]) -> Iterator[None]:
        """Call ``take`` with the pass of the loss that the block computes.

        The call precedes the loss's use of advantages, so that it can shape them.
        """
        self._in_loss = take
        try:
            yield
        finally:
            self._in_loss = None

    @contextmanager
    def following(self, model: Any, arguments: dict[str, Any]) -> Iterator[list[Any]]:
        """Keep the log-probabilities and entropies that TRL computes in the block.

        Passes of the policy and of the reference policy count.
        """
        kept: list[Any] = []
        if self._collected is None and self._in_loss is None:
            yield kept
            return
        is_policy = self._in_loss is not None or model is self._trainer.model
        if is_policy or (self.has_reference_entropy and model is self._trainer.ref_model):
            # TRL computes it in any case, and returns it only if asked.
            arguments["compute_entropy"] = True
        with self.probe.listening() if self.probe and is_policy else nullcontext([]) as heard:
            yield kept
        logprob, entropy = kept
        sums = norms = None
        if heard:
            sums, norms = (torch.cat(part)[:, -logprob.shape[1] :] for part in zip(*heard, strict=True))
        found = Pass(logprob.detach(), None if entropy is None else entropy.detach(), sums, norms)
        if self._in_loss is not None:
            self._in_loss(found)
        elif self._collected is not None:
            self._collected.append((logprob, found))

    def take(self, batch: Generation, output: Mapping[str, Any], passes: list[tuple[Any, Pass]]) -> None:
        """Keep the statistics of TRL's passes over sampling and reference policies."""
        old, reference = output.get("old_per_token_logps"), output.get("ref_per_token_logps")
        own = [found for logprob, found in passes if logprob is old]
        if "old_logps" in output and passes:
            # RLOO keeps the sum per response; its first pass is that of the policy, its second that of the reference.
            own = [passes[0][1]]
            if len(passes) > 1 and reference is None:
                reference = passes[1][0]
                batch.token["reference_logprob"] = passes[1][1].logprob.float().cpu()
        for logprob, found in passes:
            if logprob is reference and found.entropy is not None:
                batch.token["reference_entropy"] = found.entropy.float().cpu()
        if own and not self.has_dropout:
            batch.add_own(own[0], torch.arange(len(batch.ids)))

    # Extra passes

    def complete(self, batch: Generation, *, is_early: bool) -> None:
        """Run an extra pass over responses for which TRL's own passes are unusable.

        ``is_early``: shaping needs the batch before its first slice.
        """
        if self.has_dropout:
            rows, reason = np.arange(len(batch.ids)), "dropout is on, which is random in TRL's own passes"
        elif is_early and not batch.known.all():
            rows = np.flatnonzero(~batch.known)
            reason = "shaping needs the whole generation batch before its first slice"
        else:
            rows = np.flatnonzero(batch.is_masked & ~batch.known)
            reason = "mask_truncated_completions hides truncated responses from TRL's own passes"
        if not any(gather_object([len(rows) > 0])):
            return
        if not batch.can_score:
            self._notices.say(f"images: no extra forward pass is made, although {reason}; the values are null")
            return
        self._notices.say(f"an extra forward pass is made where {reason}")
        found = self._score(batch, rows)
        if len(rows):
            batch.add(found, torch.from_numpy(rows))

    def capture_after(self, batch: Generation, wanted: int) -> None:
        """Evaluate about ``wanted`` sampled responses again under the updated weights.

        Every process takes an equal number of its own responses.
        """
        accelerator = self._trainer.accelerator
        number = -(-wanted // accelerator.num_processes)
        drawn = generator(self._trainer.args.seed, Stream.CAPTURE, batch.step, accelerator.process_index)
        candidates = np.flatnonzero(batch.in_loss & ~batch.is_masked)
        rows = np.sort(drawn.permutation(candidates)[:number])
        if not batch.can_score or not any(gather_object([len(rows) > 0])):
            return
        found = self._score(batch, rows)
        if len(rows):
            batch.add_after(found, torch.from_numpy(rows))

    @torch.no_grad()
    def _score(self, batch: Generation, rows: np.ndarray) -> Pass:
        """Return the statistics of responses under the present weights, without dropout."""
        trainer = self._trainer
        size = trainer.args.per_device_train_batch_size
        chunks = [rows[i : i + size] for i in range(0, len(rows), size)]
        # Sharded weights are gathered by all processes together: one that has finished repeats a response.
        num_chunks = max(gather_object([len(chunks)]))
        chunks += [rows[:1] if len(rows) else np.array([0])] * (num_chunks - len(chunks))
        found: list[Pass] = []
        model = trainer.model
        width = batch.tensors["completion_ids"].shape[1]
        was_training = model.training
        model.eval()
        try:
            for chunk in chunks:
                index = torch.from_numpy(chunk).to(batch.tensors["completion_ids"].device)
                ids = torch.cat([batch.tensors["prompt_ids"][index], batch.tensors["completion_ids"][index]], 1)
                prompt_mask = batch.tensors["prompt_mask"][index]
                attention = torch.cat([prompt_mask, batch.is_token[chunk].to(prompt_mask)], 1)
                with self.collecting() as passes:
                    logprob, _, *_ = trainer._get_per_token_logps_and_entropies(model, ids, attention, width)
                found.append(next(kept for own, kept in passes if own is logprob))
        finally:
            model.train(was_training)
        return Pass.join(found).take(torch.arange(len(rows)))


def take_clipping(trainer: Any, batch: Generation, inputs: Any, rows: Tensor, found: Pass) -> None:
    """Keep the tokens of ``rows`` whose gradient the ratio clip removes.

    They stay unknown for losses that clip otherwise.
    """
    is_token_level = getattr(trainer, "importance_sampling_level", None) == "token"
    if not is_token_level or getattr(trainer, "loss_type", None) not in CLIPPING_LOSSES:
        return
    if batch.is_clipped is None:
        batch.is_clipped = torch.zeros_like(batch.loss_mask)
    old = inputs.get("old_per_token_logps")
    if old is None:
        return
    ratio = (found.logprob - old).exp()
    advantage = inputs["advantages"]
    advantage = advantage[:, None] if advantage.dim() == 1 else advantage
    low = (ratio < 1 - trainer.epsilon_low) & (advantage < 0)
    high = (ratio > 1 + trainer.epsilon_high) & (advantage > 0)
    batch.is_clipped[rows] |= (low | high).cpu() & batch.loss_mask[rows]


def _has_dropout(model: Any) -> bool:
    """Return whether a forward pass in training mode draws random numbers."""
    if any(isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0 for m in model.modules()):
        return True
    config = model.config.get_text_config()
    return any("attention_dropout" in name and value for name, value in vars(config).items())

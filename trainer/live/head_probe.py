"""Capture the inputs of per-token gradient norms from TRL's forward passes."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

# Settings of a model whose logits are not hidden states times the LM head alone.
SCALED_LOGITS = (
    "final_logit_softcapping",
    "logit_scale",
    "output_multiplier",
    "lm_head_multiplier",
    "logits_scaling",
)


def ask_reference_for_entropy(trainer: Any) -> bool:
    """Let TRL's fused LM head of the reference model compute entropies.

    The entropies do not enter the loss.

    Returns:
        False if there is no reference model, or if this version of TRL does not allow it. With an adapter, the policy
        itself is the reference, and its LM head computes entropies anyway.
    """
    try:
        from trl.trainer.utils import add_fused_lm_head
    except ImportError:
        return False
    if getattr(trainer, "ref_model", None) is None or "outputs" not in inspect.signature(add_fused_lm_head).parameters:
        return False
    model = trainer.accelerator.unwrap_model(trainer.ref_model)
    if "forward" not in vars(model):
        return False
    add_fused_lm_head(
        model,
        temperature=trainer.temperature,
        cast_lm_head_to_fp32=getattr(trainer.args, "cast_lm_head_to_fp32", False),
        outputs=("log_probs", "entropy"),
    )
    return True


class HeadProbe:
    """Capture ln sum p^2 and |h| from TRL's forward passes."""

    def __init__(self) -> None:
        self._heard: list[tuple[Tensor, Tensor]] | None = None
        self._norms: Tensor | None = None

    @classmethod
    def attach(cls, trainer: Any) -> HeadProbe | None:
        """Patch the policy's forward pass.

        The result is None if this version of TRL or the model does not allow patching. TRL's fused LM head can return
        ln sum p^2, which does not enter the loss.
        """
        try:
            from trl.trainer.utils import add_fused_lm_head
        except ImportError:
            return None
        model = trainer.accelerator.unwrap_model(trainer.model)
        model = model.get_base_model() if hasattr(model, "get_base_model") else model
        config = model.config.get_text_config()
        is_scaled = any(getattr(config, name, None) not in (None, 1, 1.0) for name in SCALED_LOGITS)
        backbone = getattr(model, "base_model", None)
        is_compiled = getattr(trainer.args, "torch_compile", False)
        can_listen = "outputs" in inspect.signature(add_fused_lm_head).parameters and "forward" in vars(model)
        if is_scaled or is_compiled or not can_listen or backbone is None:
            return None
        add_fused_lm_head(
            model,
            temperature=trainer.temperature,
            cast_lm_head_to_fp32=getattr(trainer.args, "cast_lm_head_to_fp32", False),
            outputs=("log_probs", "entropy", "log_sum_sq_probs"),
        )
        probe = cls()
        backbone.register_forward_hook(probe._on_hidden)
        inner = model.forward

        # The signature stays, because `generate` checks its arguments against it.
        @functools.wraps(inner)
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            found = inner(*args, **kwargs)
            probe._on_output(found)
            return found

        model.forward = types.MethodType(forward, model)
        return probe

    @contextmanager
    def listening(self) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """Collect ln sum p^2 and |h| of the forward passes in the block.

        Shape (B, T) each; T spans prompt and response.
        """
        heard: list[tuple[Tensor, Tensor]] = []
        self._heard = heard
        try:
            yield heard
        finally:
            self._heard = self._norms = None

    @torch.no_grad()
    def _on_hidden(self, module: nn.Module, args: Any, output: Any) -> None:
        hidden = getattr(output, "last_hidden_state", None)
        if self._heard is not None and hidden is not None:
            self._norms = torch.linalg.vector_norm(hidden.detach(), dim=-1, dtype=torch.float32)[:, :-1]

    def _on_output(self, output: Any) -> None:
        sums = getattr(output, "log_sum_sq_probs", None)
        if self._heard is not None and sums is not None and self._norms is not None:
            self._heard.append((sums.detach(), self._norms))

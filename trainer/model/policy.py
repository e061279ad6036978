"""Load, prompt, evaluate, and save a causal language model with its tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jinja2 import TemplateError
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_layers import GradientCheckpointingLayer

from entrace.analysis.importers.chat import Question, as_chat, as_text
from entrace.analysis.importers.codec import after_response, opening_of, probe_turns, with_opening
from entrace.analysis.trace import InputError, Vocabulary, in_one_line
from entrace.analysis.trace.plain import plain
from entrace.trainer.config import PolicyConfig
from entrace.trainer.kernels import attention
from entrace.trainer.kernels.allocator import keep_freed_memory
from entrace.trainer.kernels.blocked_stats import compute_token_stats, compute_vocabulary_sums
from entrace.trainer.kernels.norms import replace_norms
from entrace.trainer.kernels.packing import Packing, Pairs, Sequences, take_rows
from entrace.trainer.kernels.token_stats import WHOLE, LMHead, TokenStats, Truncation, VocabularySums
from entrace.trainer.model import lora as adapters
from entrace.trainer.model.loading import load_model, load_pretrained
from entrace.trainer.model.packing_choice import why_padded
from entrace.trainer.parallel.sharding import (
    full_state_dict,
    full_tensor,
    gathered,
    is_sharded,
    load_full_state_dict,
    shard,
)

if TYPE_CHECKING:
    from peft import PeftModel

TOLERANCE = 1e-2


@dataclass(eq=False)
class Policy:
    """Hold a model with float32 master weights.

    Computation runs in ``dtype``, under autocast.

    Attributes:
        model: Always in evaluation mode: with dropout, the updated policy would differ from the sampled one.
        tokenizer: The model's tokenizer.
        device: Device of the weights and of computation.
        dtype: Data type of computation.
        name: Where the model was loaded from, for messages.
        template: Text of a prompt with placeholder ``{question}``; replaces the chat template.
        adapter: The LoRA adapter, if only that is trained.
        why_unpacked: Why sequence packing is off; empty if it is on, see ``kernels.packing``.
        why_plain_norms: Why ``kernels.norms`` is off; empty if it is on.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    dtype: torch.dtype
    name: str
    template: str | None = None
    adapter: PeftModel | None = None
    why_unpacked: str = "not tried"
    why_plain_norms: str = "not tried"
    _whole_head: LMHead | None = field(default=None, init=False, repr=False)

    @classmethod
    def load(cls, config: PolicyConfig) -> Policy:
        """Load the model that ``config.path`` names.

        The name is a folder, a GGUF file, or a model of the hub or a package. A folder with a LoRA adapter stands for
        its base model with the adapter. The adapter is trained further if ``config.lora`` is set, and merged otherwise.

        Raises:
            InputError: no usable model or tokenizer; or the LM head is not one linear map, which the closed-form
                statistics need; or ``config.attention`` or ``config.gradient_checkpointing`` does not fit the model.
        """
        model, tokenizer, adapter = load_pretrained(config)
        device = _pick_device(config.device)
        if config.attention in ("auto", "packed") and model.config._attn_implementation == "sdpa":
            model.set_attn_implementation(attention.NAME)
        if device.type == "cpu":
            keep_freed_memory()
        automatic = "bfloat16" if device.type == "cuda" else "float32"
        dtype = getattr(torch, automatic if config.dtype == "auto" else config.dtype)
        torch.nn.Module.to(model, device)
        takes_norms = device.type == "cpu" and dtype == torch.float32 and attention.is_ours(model)
        why_plain_norms = replace_norms(model) if takes_norms else "only with packed attention on a CPU in float32"
        policy = cls(model.eval(), tokenizer, device, dtype, config.path, config.template, adapter)
        policy.why_plain_norms = why_plain_norms
        policy._check_head()
        policy.why_unpacked = policy._find_why_unpacked()
        if config.attention == "auto" and policy.uses_packing and device.type == "cuda":
            policy.why_unpacked = why_padded(policy)
        if config.attention == "packed" and not policy.uses_packing:
            kind = type(model).__name__
            raise InputError(
                f'policy.attention = "packed": {kind} cannot use sequence packing ({policy.why_unpacked}); set "auto"'
            )
        if config.gradient_checkpointing:
            policy.checkpoint_layers()
        return policy

    @property
    def uses_packing(self) -> bool:
        """Return whether given responses are packed instead of padded."""
        return not self.why_unpacked

    @property
    def head(self) -> LMHead:
        """Return the LM head's current weights."""
        if self._whole_head:
            return self._whole_head
        linear: Any = self.model.get_output_embeddings()
        bias = getattr(linear, "bias", None)
        return LMHead(full_tensor(linear.weight), None if bias is None else full_tensor(bias))

    @property
    def vocab_size(self) -> int:
        """Return the number of rows of the LM head.

        The number may exceed that of the tokenizer's entries.
        """
        linear: Any = self.model.get_output_embeddings()
        return len(linear.weight)

    @property
    def is_sharded(self) -> bool:
        """Return whether the weights are sharded over the processes of the run."""
        return is_sharded(self.model)

    @cached_property
    def stop_ids(self) -> Tensor:
        """Return the token ids that end a response, ascending."""
        configured: Any = getattr(self.model.generation_config, "eos_token_id", None)
        ids = configured if isinstance(configured, list) else [configured]
        found = {i for i in [*ids, self.tokenizer.eos_token_id] if i is not None}
        return torch.tensor(sorted(found), dtype=torch.int64)

    @cached_property
    def turn_end(self) -> int | None:
        """Return the stop token that ends a response, or None if unknown.

        It is the stop token that the chat template writes after a response. If there is none, it is the only stop
        token, or the tokenizer's end of sequence.
        """
        stop_ids = self.stop_ids.tolist()
        written = (i for i in self._after_response() if i in stop_ids)
        otherwise: Any = stop_ids[0] if len(stop_ids) == 1 else self.tokenizer.eos_token_id
        return next(written, otherwise)

    @cached_property
    def opening(self) -> list[int]:
        """Return the special tokens that the tokenizer puts before a text.

        One such token is a beginning of sequence.
        """
        bare, whole = (self.tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
        return opening_of(bare, whole)

    def autocast(self) -> AbstractContextManager[Any]:
        """Return a context in which computation runs in ``dtype``."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def encode_prompt(self, question: Question) -> list[int]:
        """Return the token ids of a question in ``template`` or the chat template.

        The chat template is used if ``template`` is not set. Text in ``template`` gets the tokenizer's beginning of
        sequence unless it starts with it.

        Raises:
            InputError: the chat template rejects the question's turns.
        """
        if self.template or self.tokenizer.chat_template is None:
            text = (self.template or "{question}").replace("{question}", as_text(question))
            # Without the end of sequence that some tokenizers append.
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            return with_opening(ids, self.opening)
        try:
            rendered: Any = self.tokenizer.apply_chat_template(
                as_chat(question), add_generation_prompt=True, tokenize=False
            )
        except TemplateError as error:
            reason = f"{in_one_line(error)}: {plain(as_text(question), 60)!r}"
            raise InputError(
                f"{self.name}: the chat template rejects a prompt ({reason}); set policy.template to replace it"
            ) from None
        # The template writes the special tokens itself.
        return self.tokenizer(rendered, add_special_tokens=False)["input_ids"]

    def decode(self, responses: list[list[int]]) -> list[str]:
        """Return the texts of responses, without special tokens."""
        # The tokenizer would treat an empty list as one response.
        return self.tokenizer.batch_decode(responses, skip_special_tokens=True) if responses else []

    def vocab(self) -> Vocabulary:
        """Return the tokenizer's vocabulary, one entry per row of the LM head."""
        return Vocabulary.of(self.tokenizer, self.vocab_size)

    def hidden_states(self, input_ids: Tensor, **inputs: Any) -> Tensor:
        """Return the inputs of the LM head, (B, L, H), for tokens (B, L).

        ``inputs`` are passed to the model.
        """
        with self.autocast():
            return self.model.base_model(input_ids=input_ids, **inputs).last_hidden_state.to(self.dtype)

    def token_stats(
        self,
        prompts: Sequence[list[int]],
        responses: Sequence[Tensor],
        temperature: float,
        truncation: Truncation = WHOLE,
    ) -> TokenStats:
        """Return statistics of given responses under the current weights.

        The result has a gradient. Responses are concatenated.

        Args:
            prompts: Prompt tokens of each response, B lists.
            responses: Response tokens, B tensors, none empty.
            temperature: Sampling temperature.
            truncation: Truncation in sampling.

        Returns:
            ``TokenStats`` of shape (sum of response lengths,).
        """
        hidden, targets, index = self.forward_unique(prompts, responses)
        return compute_token_stats(hidden, self.head, targets, temperature, truncation).take(index)

    def vocabulary_sums(
        self,
        prompts: Sequence[list[int]],
        responses: Sequence[Tensor],
        temperature: float,
        truncation: Truncation = WHOLE,
    ) -> VocabularySums:
        """Return sums over the vocabulary of given responses, without gradient.

        Arguments are as in ``token_stats``.
        """
        hidden, targets, index = self.forward_unique(prompts, responses)
        return compute_vocabulary_sums(hidden, self.head, targets, temperature, truncation).take(index)

    def forward_unique(
        self, prompts: Sequence[list[int]], responses: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the LM head's inputs for the tokens of responses.

        Each distinct prefix and next token is included once. With sequence packing, padding is not computed and shared
        prefixes are computed once.

        Args:
            prompts: As in ``token_stats``.
            responses: As in ``token_stats``.

        Returns:
            Inputs of the LM head, (C, H); the token that each predicts, (C,); and for each token of the concatenated
            responses, its index among these, (N,).
        """
        sequences = Sequences.of(prompts, responses)
        if self.uses_packing:
            packing = Packing.of(sequences)
            ids, positions, layout = (x.to(self.device) for x in (packing.ids, packing.positions, packing.layout))
            # Transformers passes a four-dimensional mask to every layer unchanged.
            hidden = self.hidden_states(ids, position_ids=positions, attention_mask=layout, use_cache=False)
            predictors = packing.predictors
        else:
            hidden = self.hidden_states(sequences.ids.to(self.device), use_cache=False)
            predictors = torch.nonzero(sequences.predicts.flatten()).squeeze(1)
        distinct = Pairs.of(predictors, sequences.targets)
        first, targets, index = (x.to(self.device) for x in vars(distinct).values())
        return take_rows(hidden.flatten(0, 1), first), targets, index

    def shard(self) -> None:
        """Shard the weights over all processes, which must hold equal weights.

        See ``parallel.sharding``.

        Raises:
            InputError: only an adapter is trained.
        """
        if self.adapter:
            raise InputError(
                "policy.lora: an adapter cannot be sharded (FSDP); launch with ddp.yaml or unset policy.lora"
            )
        shard(self.model)

    @contextmanager
    def unsharded(self) -> Iterator[None]:
        """Gather sharded weights inside the block, without gradients.

        Each process can then compute at its own pace.
        """
        if not self.is_sharded:
            yield
            return
        with torch.no_grad():
            self._whole_head = self.head
        try:
            with gathered(self.model):
                yield
        finally:
            self._whole_head = None

    def weights(self) -> dict[str, Tensor] | None:
        """Return the full weights that ``save`` needs if they are sharded, else None.

        All processes must call this together.
        """
        return full_state_dict(self.model) if self.is_sharded else None

    def save(self, folder: Path, weights: dict[str, Tensor] | None = None) -> None:
        """Write a folder that ``load`` accepts.

        The folder has the whole model, or the adapter if only that is trained.
        """
        if self.adapter:
            adapters.save_adapter(self.adapter, folder)
        else:
            self.model.save_pretrained(folder, state_dict=weights)
        self.tokenizer.save_pretrained(folder)

    @torch.no_grad()
    def restore(self, folder: Path) -> None:
        """Restore the weights that ``save`` wrote, bit for bit."""
        if self.adapter:
            adapters.restore_adapter(self.adapter, folder)
            return
        # Read by transformers, which resolves file shards, tied weights, and names that differ from those in the file.
        load_full_state_dict(self.model, load_model(folder).state_dict())

    def checkpoint_layers(self) -> None:
        """Save only the inputs of layers for the backward pass, and recompute the rest.

        This is gradient checkpointing. ``gradient_checkpointing_enable`` of transformers has no effect in evaluation
        mode.

        Raises:
            InputError: the model has no layers that support it.
        """
        layers = [module for module in self.model.modules() if isinstance(module, GradientCheckpointingLayer)]
        if not layers:
            kind = type(self.model).__name__
            raise InputError(f"policy.gradient_checkpointing: {kind} has no layers that support it; set it to false")
        for layer in layers:
            layer.forward = partial(_recompute, layer.forward)

    def _after_response(self) -> list[int]:
        """Return the tokens that the chat template writes after a response.

        There are none if it cannot render a response.
        """
        if self.tokenizer.chat_template is None:
            return []
        try:
            rendered: Any = self.tokenizer.apply_chat_template(probe_turns(), tokenize=False)
        except TemplateError:
            return []
        return self.tokenizer(after_response(rendered), add_special_tokens=False)["input_ids"]

    @torch.no_grad()
    def _check_head(self) -> None:
        # In float32 on both sides, so that rounding is not mistaken for a difference.
        kind = type(self.model).__name__
        if not isinstance(self.model.get_output_embeddings(), torch.nn.Linear):
            raise InputError(
                f"{self.name}: the LM head of {kind} is not one linear map, which the token statistics need"
            )
        probe = torch.arange(min(4, self.vocab_size), device=self.device)[None]
        expected = self.model(probe, use_cache=False).logits[0]
        found = self.head.logits(self.model.base_model(probe, use_cache=False).last_hidden_state[0])
        if not is_close(found, expected):
            raise InputError(
                f"{self.name}: {kind} scales or caps its logits after the LM head, which the token statistics exclude"
            )

    @torch.no_grad()
    def _find_why_unpacked(self) -> str:
        """Return why sequences cannot be packed, or an empty string.

        Three texts are tried, two of them with the same prompt.
        """
        if not attention.is_ours(self.model):
            return "policy.attention is not packed"
        if any(DynamicCache(config=self.model.config).is_sliding):
            return "the model attends to a sliding window"
        prompts = [[i % self.vocab_size for i in start] for start in ((1, 2, 3), (1, 2, 3), (4, 5))]
        responses = [torch.tensor([i % self.vocab_size for i in end]) for end in ((6, 7, 8), (9, 10), (11, 12, 13, 14))]
        padded, packed = (
            replace(self, dtype=torch.float32, why_unpacked=reason) for reason in ("compared with padding", "")
        )
        try:
            (found, _, which), (expected, _, where) = (p.forward_unique(prompts, responses) for p in (packed, padded))
        except Exception as error:
            return in_one_line(error)
        return "" if is_close(found[which], expected[where]) else "results differ from those with padding"


def is_close(found: Tensor, expected: Tensor) -> bool:
    """Return whether hidden states or logits agree up to rounding."""
    return torch.allclose(found, expected, rtol=TOLERANCE, atol=TOLERANCE * float(expected.std()))


def _recompute(forward: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Run a layer, saving only its inputs for the backward pass.

    Without gradients, nothing is saved.
    """
    if not torch.is_grad_enabled():
        return forward(*arguments, **options)
    return checkpoint(forward, *arguments, use_reentrant=False, **options)


def _pick_device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError('policy.device = "cuda", but torch finds no GPU; set "cpu" or "auto"')
    return torch.device("cuda" if name == "auto" and torch.cuda.is_available() else name.replace("auto", "cpu"))

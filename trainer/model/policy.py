"""A causal language model with its tokenizer: how it is loaded, asked, scored and saved."""

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

from entrace.analysis.trace import InputError, Vocabulary, in_one_line
from entrace.analysis.trace.plain import plain
from entrace.trainer.config import PolicyConfig
from entrace.trainer.kernels import attention
from entrace.trainer.kernels.allocator import keep_freed_memory
from entrace.trainer.kernels.norms import replace_norms
from entrace.trainer.kernels.packing import Packing, Pairs, Sequences, take_rows
from entrace.trainer.kernels.token_stats import WHOLE, LMHead, TokenStats, Truncation, compute_token_stats
from entrace.trainer.model import lora as adapters
from entrace.trainer.model.loading import load_model, load_pretrained
from entrace.trainer.parallel.sharding import distribute_like, full_state_dict, full_tensor, gathered, is_sharded, shard
from entrace.trainer.tasks.prompt import Question, as_chat, as_text

if TYPE_CHECKING:
    from peft import PeftModel

TOLERANCE = 1e-2
# Stands for a response, to see what the chat template writes after it.
PROBE = "entrace"


@dataclass(eq=False)
class Policy:
    """The model in float32 master weights; its arithmetic runs in ``dtype``, under autocast.

    Attributes:
        model: In evaluation mode always: with dropout, the policy that is updated would not be the one sampled from.
        tokenizer: Its tokenizer.
        device: Where it computes.
        dtype: In what it computes.
        name: Where it came from, for messages.
        template: Text of a prompt, ``{question}`` standing for its question, in place of the chat template.
        adapter: What is trained of the model, if not all of it.
        why_unpacked: Why given responses are read with padding; empty if they are packed, see ``kernels.packing``.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    dtype: torch.dtype
    name: str
    template: str | None = None
    adapter: PeftModel | None = None
    why_unpacked: str = "not tried"
    _whole_head: LMHead | None = field(default=None, init=False, repr=False)

    @classmethod
    def load(cls, config: PolicyConfig) -> Policy:
        """Loads the model that ``config.path`` names: a folder, a GGUF file, a model of the hub, or one that ships.

        A folder that holds a LoRA adapter stands for its base model with the adapter, which is trained on if
        ``config.lora`` is set, and merged otherwise.

        Raises:
            InputError: no usable model or tokenizer there; or the model has no head that is one linear map, which the
                closed-form statistics need, or does not go on from a cache as it reads a whole text.
        """
        model, tokenizer, adapter = load_pretrained(config)
        device = _pick_device(config.device)
        wants_ours = config.attention == "packed" or (config.attention == "auto" and device.type == "cpu")
        if wants_ours and model.config._attn_implementation == "sdpa":
            model.set_attn_implementation(attention.NAME)
        if device.type == "cpu":
            keep_freed_memory()
        automatic = "bfloat16" if device.type == "cuda" else "float32"
        dtype = getattr(torch, automatic if config.dtype == "auto" else config.dtype)
        torch.nn.Module.to(model, device)
        if device.type == "cpu" and dtype == torch.float32 and attention.is_ours(model):
            replace_norms(model)
        policy = cls(model.eval(), tokenizer, device, dtype, config.path, config.template, adapter)
        policy._check_head()
        policy.why_unpacked = policy._find_why_unpacked()
        if config.attention == "packed" and not policy.uses_packing:
            kind = type(model).__name__
            raise InputError(
                f'policy.attention = "packed": {kind} cannot read packed sequences ({policy.why_unpacked}); set "auto"'
            )
        if config.gradient_checkpointing:
            policy.checkpoint_layers()
        return policy

    @property
    def uses_packing(self) -> bool:
        """Whether given responses are read without padding."""
        return not self.why_unpacked

    @property
    def head(self) -> LMHead:
        """The LM head's current weights."""
        if self._whole_head:
            return self._whole_head
        linear: Any = self.model.get_output_embeddings()
        bias = getattr(linear, "bias", None)
        return LMHead(full_tensor(linear.weight), None if bias is None else full_tensor(bias))

    @property
    def vocab_size(self) -> int:
        """Rows of the LM head, which may exceed the tokenizer's entries."""
        linear: Any = self.model.get_output_embeddings()
        return len(linear.weight)

    @property
    def is_sharded(self) -> bool:
        """Whether the processes of the run hold a part of every weight each."""
        return is_sharded(self.model)

    @cached_property
    def stop_ids(self) -> Tensor:
        """Token ids that end a response."""
        configured: Any = getattr(self.model.generation_config, "eos_token_id", None)
        ids = configured if isinstance(configured, list) else [configured]
        found = {i for i in [*ids, self.tokenizer.eos_token_id] if i is not None}
        return torch.tensor(sorted(found), dtype=torch.int64)

    @cached_property
    def turn_end(self) -> int | None:
        """The stop token that a response ends with, None if unknown.

        It is the one that the chat template writes after a response; without one, the tokenizer's end of sequence, or
        the only stop token that there is.
        """
        stop_ids = self.stop_ids.tolist()
        written = (i for i in self._after_response() if i in stop_ids)
        otherwise: Any = stop_ids[0] if len(stop_ids) == 1 else self.tokenizer.eos_token_id
        return next(written, otherwise)

    @cached_property
    def opening(self) -> list[int]:
        """Special tokens that the tokenizer puts before a text, such as a beginning of sequence."""
        bare, whole = (self.tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
        return whole[: next((n for n in range(len(whole)) if whole[n : n + len(bare)] == bare), 0)]

    def autocast(self) -> AbstractContextManager[Any]:
        """Arithmetic in ``dtype``."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def encode_prompt(self, question: Question) -> list[int]:
        """Return the token ids of a question in ``template``, or in the chat template if the tokenizer has one.

        A text in ``template`` is preceded by the tokenizer's beginning of sequence unless it begins with it.

        Raises:
            InputError: the template refuses the question's turns.
        """
        if self.template or self.tokenizer.chat_template is None:
            text = (self.template or "{question}").replace("{question}", as_text(question))
            # Without the end of sequence that some tokenizers append, which would end the prompt.
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            return ids if ids[: len(self.opening)] == self.opening else [*self.opening, *ids]
        try:
            rendered: Any = self.tokenizer.apply_chat_template(
                as_chat(question), add_generation_prompt=True, tokenize=False
            )
        except TemplateError as error:
            reason = f"{in_one_line(error)}: {plain(as_text(question), 60)!r}"
            raise InputError(
                f"{self.name}: the chat template refuses a prompt ({reason}); policy.template takes its place"
            ) from None
        # The template writes the special tokens itself.
        return self.tokenizer(rendered, add_special_tokens=False)["input_ids"]

    def decode(self, responses: list[list[int]]) -> list[str]:
        """Texts of responses, special tokens left out."""
        # The tokenizer would take an empty list for one response.
        return self.tokenizer.batch_decode(responses, skip_special_tokens=True) if responses else []

    def vocab(self) -> Vocabulary:
        """Return the tokenizer's vocabulary, one entry per row of the LM head."""
        return Vocabulary.of(self.tokenizer, self.vocab_size)

    def hidden_states(self, input_ids: Tensor, **inputs: Any) -> Tensor:
        """Inputs of the LM head, (B, L) -> (B, L, H); further arguments as the model takes them."""
        with self.autocast():
            return self.model.base_model(input_ids=input_ids, **inputs).last_hidden_state.to(self.dtype)

    def token_stats(
        self,
        prompts: Sequence[list[int]],
        responses: Sequence[Tensor],
        temperature: float,
        truncation: Truncation = WHOLE,
    ) -> TokenStats:
        """Statistics of given responses under the current weights, with gradient, the responses end to end.

        Args:
            prompts: Prompt tokens of each response, B lists.
            responses: Response tokens, B tensors, none empty.
            temperature: As in sampling.
            truncation: As in sampling.

        Returns:
            ``TokenStats`` of shape (sum of response lengths,).
        """
        hidden, targets, index = self.forward_unique(prompts, responses)
        return compute_token_stats(hidden, self.head, targets, temperature, truncation).take(index)

    def forward_unique(
        self, prompts: Sequence[list[int]], responses: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What predicts the tokens of responses, each token with the same before it once.

        Where the model allows it, neither padding nor what several sequences begin with is computed more than needed.

        Args:
            prompts: As in ``token_stats``.
            responses: As in ``token_stats``.

        Returns:
            Inputs of the LM head, (C, H); the token that each predicts, (C,); and which of these each token of the
            responses is, end to end, (N,).
        """
        sequences = Sequences.of(prompts, responses)
        if self.uses_packing:
            packing = Packing.of(sequences)
            ids, positions, layout = (x.to(self.device) for x in (packing.ids, packing.positions, packing.layout))
            # A mask of four dimensions reaches the attention of every layer as it is.
            hidden = self.hidden_states(ids, position_ids=positions, attention_mask=layout, use_cache=False)
            predictors = packing.predictors
        else:
            hidden = self.hidden_states(sequences.ids.to(self.device), use_cache=False)
            predictors = torch.nonzero(sequences.predicts.flatten()).squeeze(1)
        distinct = Pairs.of(predictors, sequences.targets)
        first, targets, index = (x.to(self.device) for x in vars(distinct).values())
        return take_rows(hidden.flatten(0, 1), first), targets, index

    def shard(self) -> None:
        """Shares the weights out to all processes, which hold the same now; see ``parallel.sharding``.

        Raises:
            InputError: only an adapter is trained.
        """
        if self.adapter:
            raise InputError("policy.lora: an adapter is not shared out (FSDP); launch with ddp.yaml, or without it")
        shard(self.model)

    @contextmanager
    def unsharded(self) -> Iterator[None]:
        """Within, weights that are shared out are whole, and each process may read and sample at its own pace."""
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
        """What ``save`` needs of weights that are shared out, gathered by all processes together."""
        return full_state_dict(dict(self.model.named_parameters())) if self.is_sharded else None

    def save(self, folder: Path, weights: dict[str, Tensor] | None = None) -> None:
        """Writes a folder that ``load`` takes: the whole model, or the adapter if only that is trained."""
        if self.adapter:
            adapters.save_adapter(self.adapter, folder)
        else:
            self.model.save_pretrained(folder, state_dict=weights)
        self.tokenizer.save_pretrained(folder)

    @torch.no_grad()
    def restore(self, folder: Path) -> None:
        """Takes over the weights that ``save`` wrote, bit for bit."""
        if self.adapter:
            adapters.restore_adapter(self.adapter, folder)
            return
        # The library's own way, which knows of shards, tied weights, and names that differ from those in the file.
        saved = load_model(folder).state_dict()
        for name, value in self.model.state_dict().items():
            value.copy_(distribute_like(saved[name], value))

    def checkpoint_layers(self) -> None:
        """Layers keep their inputs alone for the backward pass, and compute the rest again.

        What transformers does about this hangs on training mode, which would turn dropout on.

        Raises:
            InputError: the model has no layers made for it.
        """
        layers = [module for module in self.model.modules() if isinstance(module, GradientCheckpointingLayer)]
        if not layers:
            kind = type(self.model).__name__
            raise InputError(f"policy.gradient_checkpointing: {kind} has no layers made for it; set it to false")
        for layer in layers:
            layer.forward = partial(_recompute, layer.forward)

    def _after_response(self) -> list[int]:
        """Return the tokens that the chat template writes after a response; none if it has no say."""
        if self.tokenizer.chat_template is None:
            return []
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": PROBE}]
        try:
            rendered: Any = self.tokenizer.apply_chat_template(turns, tokenize=False)
        except TemplateError:
            return []
        _, found, rest = rendered.rpartition(PROBE)
        return self.tokenizer(rest, add_special_tokens=False)["input_ids"] if found else []

    @torch.no_grad()
    def _check_head(self) -> None:
        # In float32 on both sides: rounding must not pass for a difference.
        kind = type(self.model).__name__
        if not isinstance(self.model.get_output_embeddings(), torch.nn.Linear):
            raise InputError(f"{self.name}: {kind} has no LM head that is one linear map")
        probe = torch.arange(min(4, self.vocab_size), device=self.device)[None]
        expected = self.model(probe, use_cache=False).logits[0]
        found = self.head.logits(self.model.base_model(probe, use_cache=False).last_hidden_state[0])
        if not is_close(found, expected):
            raise InputError(f"{self.name}: {kind} scales or caps its logits after the LM head")

    @torch.no_grad()
    def _find_why_unpacked(self) -> str:
        """Return why sequences cannot be packed, or an empty string; tried on three texts, two with one prompt."""
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
    """Runs a layer without keeping what is inside it for the backward pass, if there will be one."""
    if not torch.is_grad_enabled():
        return forward(*arguments, **options)
    return checkpoint(forward, *arguments, use_reentrant=False, **options)


def _pick_device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError('policy.device = "cuda", but torch finds no GPU; set "cpu" or "auto"')
    return torch.device("cuda" if name == "auto" and torch.cuda.is_available() else name.replace("auto", "cpu"))

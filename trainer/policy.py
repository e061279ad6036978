"""A causal language model with its tokenizer, loaded from any Hugging Face folder."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from analysis.trace import InputError
from trainer import attention
from trainer.config import PolicyConfig
from trainer.resources import EMBEDDED, find_base_policy
from trainer.token_stats import LMHead, TokenStats, compute_token_stats

HEAD_TOLERANCE = 1e-2
PICKLES = {".bin", ".pt", ".pth", ".ckpt"}

# Its bars for reading and writing weights would tear the run's own apart.
disable_progress_bar()


@dataclass
class Policy:
    """The model in float32 master weights; on a GPU its arithmetic runs in ``dtype`` under autocast."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    dtype: torch.dtype
    name: str

    @classmethod
    def load(cls, config: PolicyConfig) -> Policy:
        """Loads a folder in Hugging Face layout; ``embedded`` names the shipped base policy.

        Raises:
            InputError: no such folder, no model or tokenizer in it, no safetensors, code of its own, or a head that is
                not one linear map, which the closed-form statistics need.
        """
        path = find_base_policy() if config.path == EMBEDDED else Path(config.path)
        _refuse_code(path)
        if not path.is_dir():
            raise InputError(f"policy.path: no model folder at {path}")
        device = _pick_device(config.device)
        dtype = {"auto": torch.bfloat16 if device.type == "cuda" else torch.float32}.get(config.dtype)
        model = _load_part(AutoModelForCausalLM, path, "model", dtype=torch.float32, use_safetensors=True)
        if device.type == "cpu" and model.config._attn_implementation == "sdpa":
            model.set_attn_implementation(attention.NAME)
        tokenizer = _load_part(AutoTokenizer, path, "tokenizer")
        policy = cls(model.to(device).eval(), tokenizer, device, dtype or getattr(torch, config.dtype), str(path))
        policy._check_head()
        return policy

    @property
    def head(self) -> LMHead:
        """The LM head's current weights."""
        linear: Any = self.model.get_output_embeddings()
        return LMHead(linear.weight, getattr(linear, "bias", None))

    @property
    def vocab_size(self) -> int:
        """Rows of the LM head, which may exceed the tokenizer's entries."""
        return len(self.head.weight)

    @property
    def stop_ids(self) -> Tensor:
        """Token ids that end a response."""
        configured: Any = getattr(self.model.generation_config, "eos_token_id", None)
        ids = configured if isinstance(configured, list) else [configured]
        return torch.tensor(sorted({i for i in [*ids, self.tokenizer.eos_token_id] if i is not None}))

    def autocast(self) -> AbstractContextManager[Any]:
        """Arithmetic in ``dtype``."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids of a question, through the chat template if the tokenizer has one."""
        if self.tokenizer.chat_template is None:
            return self.tokenizer(text)["input_ids"]
        messages = [{"role": "user", "content": text}]
        rendered: Any = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        # The template writes the special tokens itself.
        return self.tokenizer(rendered, add_special_tokens=False)["input_ids"]

    def decode(self, responses: list[list[int]]) -> list[str]:
        """Texts of responses, special tokens left out."""
        return self.tokenizer.batch_decode(responses, skip_special_tokens=True)

    def vocab(self) -> list[str]:
        """Text of every vocabulary entry, decoded alone; empty for rows of the head that the tokenizer lacks."""
        known = min(len(self.tokenizer), self.vocab_size)
        return self.tokenizer.batch_decode([[i] for i in range(known)]) + [""] * (self.vocab_size - known)

    def hidden_states(self, input_ids: Tensor, **inputs: Any) -> Tensor:
        """Inputs of the LM head, (B, L) -> (B, L, H); further arguments as the model takes them."""
        with self.autocast():
            return self.model.base_model(input_ids=input_ids, **inputs).last_hidden_state

    def score(self, prompts: list[list[int]], responses: list[Tensor], temperature: float) -> TokenStats:
        """Statistics of given responses under the current weights, with gradient, the responses end to end.

        Sequences are padded on the right, where causal attention never looks, so that no mask is needed.

        Args:
            prompts: Prompt tokens of each response, B lists.
            responses: Response tokens, B tensors, none empty.
            temperature: As in sampling.

        Returns:
            ``TokenStats`` of shape (sum of response lengths,).
        """
        sequences = [torch.cat((torch.tensor(p), r)) for p, r in zip(prompts, responses, strict=True)]
        padded = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True).to(self.device)
        starts = torch.tensor([len(p) for p in prompts])
        ends = torch.tensor([len(s) for s in sequences])
        places = torch.arange(padded.shape[1])
        is_response = ((places >= starts[:, None]) & (places < ends[:, None])).to(self.device)
        hidden = self.hidden_states(padded[:, :-1], use_cache=False)
        return compute_token_stats(hidden[is_response[:, 1:]], self.head, padded[is_response], temperature)

    @torch.no_grad()
    def _check_head(self) -> None:
        # In float32 on both sides: rounding must not pass for a difference.
        probe = torch.arange(min(4, self.vocab_size), device=self.device)[None]
        expected = self.model(probe, use_cache=False).logits[0]
        found = self.head.logits(self.model.base_model(probe, use_cache=False).last_hidden_state[0])
        if not torch.allclose(found, expected, rtol=HEAD_TOLERANCE, atol=HEAD_TOLERANCE * float(expected.std())):
            raise InputError(f"{self.name}: {type(self.model).__name__} scales or caps its logits after the LM head")


def _pick_device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError('policy.device = "cuda", but torch finds no GPU')
    return torch.device("cuda" if name == "auto" and torch.cuda.is_available() else name.replace("auto", "cpu"))


def _refuse_code(path: Path) -> None:
    """Loading a model must not run code that came with it: neither pickles nor modules."""
    files = sorted(path.iterdir()) if path.is_dir() else [path] * path.is_file()
    suffixes = {file.suffix for file in files}
    if pickles := [file for file in files if file.suffix in PICKLES and ".safetensors" not in suffixes]:
        raise InputError(
            f"{path}: no usable model ({pickles[0].name} is a pickle, which can run code when it is read; if you trust "
            "it, make a folder of safetensors: AutoModelForCausalLM.from_pretrained(OLD).save_pretrained(NEW))"
        )
    for name in ("config.json", "tokenizer_config.json"):
        with suppress(OSError, ValueError, TypeError):
            if "auto_map" in json.loads((path / name).read_text(encoding="utf-8")):
                raise InputError(
                    f"{path}: no usable model (auto_map in {name} asks for code that came with it, which is never run; "
                    "remove that key if transformers knows the architecture by itself)"
                )


def _load_part(loader: Any, path: Path, part: str, **arguments: Any) -> Any:
    try:
        return loader.from_pretrained(path, local_files_only=True, trust_remote_code=False, **arguments)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise InputError(f"{path}: no usable {part} ({reason})") from None

"""Load models and tokenizers from safetensors or GGUF.

Safetensors are in Hugging Face layout. Pickles and model code are never loaded.
"""

from __future__ import annotations

import io
import json
from contextlib import redirect_stderr, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from entrace.analysis.trace import InputError, in_one_line
from entrace.trainer.config import PolicyConfig
from entrace.trainer.model import lora as adapters
from entrace.trainer.resources import find_model, find_tokenizer

if TYPE_CHECKING:
    from peft import PeftModel

PICKLES = {".bin", ".pt", ".pth", ".ckpt"}
TOKENIZER = "tokenizer_config.json"

# Progress bars of transformers would break up the run's own.
disable_progress_bar()


def load_pretrained(config: PolicyConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, PeftModel | None]:
    """Load the model, its tokenizer, and the adapter inside the model.

    The adapter is None unless ``config.lora`` is set. A folder with a LoRA adapter stands for its base model with that
    adapter, merged unless it is trained further.

    Raises:
        InputError: no usable model or tokenizer.
    """
    path = find_model(config.path)
    base = adapters.read_base(path)
    base_path = find_model(base) if base else path
    model = load_model(base_path, config.attention)
    tokenizer = _load(AutoTokenizer, base_path if base and not (path / TOKENIZER).is_file() else path, "tokenizer")
    if base:
        adapter = adapters.load_adapter(model, path)
        if not config.lora:
            return adapter.merge_and_unload().requires_grad_(), tokenizer, None
        adapters.check_settings(adapter, config.lora, path)
    elif config.lora:
        # A relative path would not resolve from another folder.
        base = str(path.resolve()) if Path(config.path).exists() else config.path
        adapter = adapters.add_adapter(model, config.lora, base)
    else:
        adapter = None
    return model, tokenizer, adapter


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of the model that ``policy.path`` names, without weights.

    Raises:
        InputError: no usable tokenizer.
    """
    path = find_tokenizer(name)
    base = adapters.read_base(path)
    if base and not (path / TOKENIZER).is_file():
        return load_tokenizer(base)
    return _load(AutoTokenizer, path, "tokenizer")


def load_model(path: Path, attention: str = "auto") -> PreTrainedModel:
    """Load weights in float32; quantized weights of a GGUF file are dequantized.

    Args:
        path: A folder or a GGUF file.
        attention: An attention implementation of transformers; ``auto`` and ``packed`` select its default.

    Raises:
        InputError: no usable model.
    """
    _refuse_code(path)
    if path.is_file() and path.suffix != ".gguf":
        raise InputError(f"policy.path: expected a model folder or a .gguf file, found {path}")
    chosen = {} if attention in ("auto", "packed") else {"attn_implementation": attention}
    return _load(AutoModelForCausalLM, path, "model", dtype=torch.float32, use_safetensors=True, **chosen)


def _load(loader: Any, path: Path, part: str, **arguments: Any) -> Any:
    try:
        if path.is_dir():
            return loader.from_pretrained(path, local_files_only=True, trust_remote_code=False, **arguments)
        return _load_gguf(loader, path, **arguments)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        reason = in_one_line(error)
        raise InputError(f"{path}: no usable {part} ({reason})") from None


def _load_gguf(loader: Any, path: Path, **arguments: Any) -> Any:
    try:
        import gguf  # noqa: F401
        from transformers import GgufConfig
    except ImportError:
        raise ImportError("GGUF needs gguf and transformers>=5.17: pip install gguf 'transformers>=5.17'") from None
    if loader is AutoModelForCausalLM:
        # Quantized weights can be neither trained nor saved.
        arguments["quantization_config"] = GgufConfig(dequantize=True)
    # Its progress bar cannot be disabled.
    with redirect_stderr(io.StringIO()):
        return loader.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True, **arguments)


def _refuse_code(path: Path) -> None:
    """Raise if loading could run code that came with the model: pickles or modules."""
    files = sorted(path.iterdir()) if path.is_dir() else [path] * path.is_file()
    suffixes = {file.suffix for file in files}
    if pickles := [file for file in files if file.suffix in PICKLES and ".safetensors" not in suffixes]:
        raise InputError(
            f"{path}: no usable model ({pickles[0].name} is a pickle, which can run code when it is read; if you trust "
            "it, convert it to safetensors: AutoModelForCausalLM.from_pretrained(OLD).save_pretrained(NEW))"
        )
    for name in ("config.json", TOKENIZER):
        with suppress(OSError, ValueError, TypeError):
            if "auto_map" in json.loads((path / name).read_text(encoding="utf-8")):
                raise InputError(
                    f"{path}: no usable model (auto_map in {name} asks for code that came with it, which is never run; "
                    "remove that key if transformers supports the architecture)"
                )

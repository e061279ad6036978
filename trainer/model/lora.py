"""Low-rank adapters (LoRA, arXiv 2106.09685) with ``peft``, stored in its format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from entrace.analysis.trace import InputError, in_one_line
from entrace.trainer.config import LoraConfig

if TYPE_CHECKING:
    from peft import PeftModel

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


def read_base(folder: Path) -> str | None:
    """Return ``policy.path`` of the base model of a folder's adapter, or None.

    The result is None if the folder has no adapter.

    Raises:
        InputError: the adapter is not a LoRA adapter, or its weights are not in safetensors.
    """
    if not (folder / CONFIG).is_file():
        return None
    found = _read_config(folder)
    if found.get("peft_type") != "LORA" or not found.get("base_model_name_or_path"):
        raise InputError(f"{folder}: {CONFIG} must have peft_type = LORA and name base_model_name_or_path")
    if not (folder / WEIGHTS).is_file():
        raise InputError(f"{folder}: no {WEIGHTS} beside {CONFIG}")
    return found["base_model_name_or_path"]


def add_adapter(model: PreTrainedModel, config: LoraConfig, base: str) -> PeftModel:
    """Add a new adapter, initialized to the identity; only the adapter is trained.

    Args:
        model: The base model, changed in place.
        config: Rank, scale, and target modules.
        base: ``policy.path`` of the base model.

    Raises:
        InputError: ``peft`` is missing, or ``config.target_modules`` does not fit the model.
    """
    peft = _import_peft()
    named = config.target_modules
    modules = named if isinstance(named, str) else list(named)
    settings = peft.LoraConfig(r=config.r, lora_alpha=config.alpha, target_modules=modules, task_type="CAUSAL_LM")
    settings.base_model_name_or_path = base
    try:
        adapter = peft.PeftModel(model, settings)
    except ValueError as error:
        raise InputError(f"policy.lora.target_modules: {in_one_line(error)}") from None
    head: Any = model.get_output_embeddings()
    if hasattr(head, "base_layer"):
        raise InputError(
            "policy.lora.target_modules names the LM head, which must stay one linear map for the token statistics"
        )
    return adapter


def load_adapter(model: PreTrainedModel, folder: Path) -> PeftModel:
    """Add the adapter of a folder to its base model, to be trained further or merged.

    Raises:
        InputError: ``peft`` is missing, or the adapter belongs to other modules.
    """
    peft = _import_peft()
    settings = peft.LoraConfig.from_pretrained(str(folder))
    settings.inference_mode = False
    adapter = peft.PeftModel(model, settings)
    restore_adapter(adapter, folder)
    return adapter


def check_settings(adapter: PeftModel, config: LoraConfig, folder: Path) -> None:
    """Check that an adapter has the rank and scale of the configuration.

    Raises:
        InputError: rank or scale differ.
    """
    found: Any = adapter.peft_config["default"]
    if (found.r, found.lora_alpha) != (config.r, config.alpha):
        raise InputError(
            f"policy.lora has r = {config.r}, alpha = {config.alpha:g}, but the adapter in {folder} has r = {found.r}, "
            f"alpha = {found.lora_alpha:g}; set these, or unset policy.lora to merge it and train all weights"
        )


def save_adapter(adapter: PeftModel, folder: Path) -> None:
    """Write the weights and settings of an adapter to a folder."""
    adapter.save_pretrained(str(folder), save_embedding_layers=False)


def restore_adapter(adapter: PeftModel, folder: Path) -> None:
    """Restore the weights of an adapter from a folder, bit for bit.

    Raises:
        InputError: the weights belong to other modules.
    """
    result = _import_peft().set_peft_model_state_dict(adapter, load_file(folder / WEIGHTS))
    missing = [name for name in result.missing_keys if "lora_" in name]
    if missing or result.unexpected_keys:
        names = ", ".join([*missing, *result.unexpected_keys][:2])
        raise InputError(f"{folder}: {WEIGHTS} and the adapter have different modules, such as {names}")


def merged_weight(linear: Any) -> Tensor:
    """Return the weight of a linear layer, plus its adapter's part if it has one."""
    if not hasattr(linear, "base_layer"):
        return linear.weight
    weight = linear.base_layer.weight
    for name in linear.active_adapters:
        weight = weight + linear.get_delta_weight(name)
    return weight


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except ValueError:
        raise InputError(f"{folder}: {CONFIG} is not JSON") from None


def _import_peft() -> Any:
    try:
        import peft
    except ImportError:
        raise InputError("policy.lora and adapters need peft: pip install 'entrace[lora]'") from None
    return peft

"""Weights, gradients and AdamW's moments cut into as many parts as there are processes (FSDP, arXiv 2304.11277).

Each process keeps one part of every tensor, and gathers a layer's weights when it computes the layer. The arithmetic is
that of whole weights, for these are gathered as they are, in float32; gradients are added up, not averaged.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Partial, distribute_tensor
from transformers import PreTrainedModel


def shard(model: PreTrainedModel) -> None:
    """Cuts the model's parameters into parts, in place; all processes hold the same model before.

    Layers are gathered one by one. The LM head is no layer of its own here: what reads its weight gathers it, by
    ``whole``, and so it is where the head shares the input embedding's.
    """
    mesh = init_device_mesh(model.device.type, (torch.distributed.get_world_size(),))
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    is_tied = head.weight is embedding.weight
    body: Any = model.base_model
    for layer in blocks(model):
        fully_shard(layer, mesh=mesh)
    fully_shard(body, mesh=mesh)
    if is_tied:
        head.weight = embedding.weight
    else:
        fully_shard(head, mesh=mesh)
    for module in _sharded_modules(model):
        module.set_gradient_divide_factor(1.0)
        # Sums, for not every network that processes talk over can scale them on the way.
        module.set_force_sum_reduction_for_comms(True)


def blocks(model: PreTrainedModel) -> list[torch.nn.Module]:
    """The model's layers: its longest list of modules."""
    lists = [list(module) for module in model.base_model.modules() if isinstance(module, torch.nn.ModuleList)]
    return max(lists, key=len)


def is_sharded(model: PreTrainedModel) -> bool:
    """Whether ``shard`` has been here."""
    return isinstance(model.base_model, FSDPModule)


def full_tensor(tensor: Tensor) -> Tensor:
    """A tensor, gathered if it is in parts, which all processes must do together; differentiable."""
    return tensor.full_tensor(grad_placements=[Partial()]) if isinstance(tensor, DTensor) else tensor


def distribute_like(value: Tensor, parameter: Tensor) -> Tensor:
    """A copy of a whole tensor, which all processes have, on the device of ``parameter`` and cut up as that is."""
    value = value.to(parameter.device, copy=True)
    if isinstance(parameter, DTensor) and value.shape == parameter.shape:
        return distribute_tensor(value, parameter.device_mesh, parameter.placements)
    return value


def full_state_dict(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors, which all processes gather one by one; of those in parts only rank 0 keeps any, on the CPU."""
    found = {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, DTensor):
            found[name] = tensor
            continue
        full = full_tensor(tensor.detach())
        if torch.distributed.get_rank() == 0:
            found[name] = full.cpu()
    return found


@contextmanager
def gathered(model: PreTrainedModel) -> Iterator[None]:
    """Holds all layers whole within, so that processes can go through them each at its own pace.

    Without gradients; the LM head's weight is for the caller to gather.
    """
    modules = _sharded_modules(model)
    for module in modules:
        module.unshard()
        module.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for module in modules:
            module.set_reshard_after_forward(True, recurse=False)
            module.reshard()


def _sharded_modules(model: PreTrainedModel) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]

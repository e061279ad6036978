"""Shard weights, gradients, and AdamW's moments over processes.

The method is FSDP (arXiv 2304.11277). Each process holds one shard of every tensor and gathers the weights of a layer
to compute it. The arithmetic is that of unsharded weights: they are gathered in float32, and gradients are summed, not
averaged.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Partial, distribute_tensor
from transformers import PreTrainedModel


def shard(model: PreTrainedModel) -> None:
    """Shard the model's parameters in place; all processes must hold equal models.

    Each block is gathered separately. A separate LM head is its own unit; a head tied to the input embedding belongs to
    the body. Code that reads the head's weight gathers it with ``full_tensor``.
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
        # Not every communication backend can scale while it reduces.
        module.set_force_sum_reduction_for_comms(True)


def blocks(model: PreTrainedModel) -> list[nn.Module]:
    """Return the model's blocks.

    These are the modules that transformers declares as units not to be split over devices.
    """
    names = model._no_split_modules or ()
    return [module for module in model.modules() if type(module).__name__ in names]


def is_sharded(model: PreTrainedModel) -> bool:
    """Return whether ``shard`` was applied to the model."""
    return isinstance(model.base_model, FSDPModule)


def full_tensor(tensor: Tensor) -> Tensor:
    """Return a tensor, gathered if it is sharded; differentiable.

    All processes must call this together.
    """
    return tensor.full_tensor(grad_placements=[Partial()]) if isinstance(tensor, DTensor) else tensor


def distribute_like(value: Tensor, parameter: Tensor) -> Tensor:
    """Return a copy of a tensor, on the device of ``parameter`` and sharded like it.

    All processes must hold the full tensor. If the shapes differ, the copy is not sharded.
    """
    value = value.to(parameter.device, copy=True)
    if isinstance(parameter, DTensor) and value.shape == parameter.shape:
        return distribute_tensor(value, parameter.device_mesh, parameter.placements)
    return value


def full_state_dict(model: PreTrainedModel) -> dict[str, Tensor]:
    """Gather the state of a sharded model.

    Rank 0 receives it on the CPU, the others an empty dictionary.
    """
    state: Any = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return state


def load_full_state_dict(model: PreTrainedModel, state: Mapping[str, Tensor]) -> None:
    """Load full tensors, known to all processes, into a model, sharded or not."""
    set_model_state_dict(model, dict(state), options=StateDictOptions(full_state_dict=True))


def full_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gather tensors one by one.

    Rank 0 keeps sharded tensors in full, on the CPU. Other ranks keep only tensors that are not sharded.

    For AdamW's moments: torch's own ``get_optimizer_state_dict`` takes a step to fill an optimizer without state, which
    would change the run.
    """
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
    """Keep all blocks gathered, so that processes can run them at their own pace.

    The blocks run without gradients. The caller gathers the LM head's weight.
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

"""Sum gradients over all processes."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from entrace.trainer.parallel.ranks import Ranks


def sum_gradients(parameters: Iterable[nn.Parameter], sums: Tensor, ranks: Ranks, *, is_sharded: bool) -> Tensor:
    """Sum the gradients of all processes in place; return the sum of their ``sums``.

    Args:
        parameters: The same parameters in every process. A gradient that only some processes have counts as 0 in the
            others.
        sums: This process's values, of the same shape in every process.
        ranks: The processes.
        is_sharded: The backward pass has summed the gradients already (FSDP).
    """
    parameters = list(parameters)
    answers = ranks.all_gather_object((sums, [parameter.grad is not None for parameter in parameters]))
    for parameter, *has_grad in zip(parameters, *(has_grad for _, has_grad in answers), strict=True):
        if parameter.grad is None and any(has_grad):
            parameter.grad = torch.zeros_like(parameter)
    if not is_sharded:
        ranks.all_reduce(parameter.grad for parameter in parameters if parameter.grad is not None)
    return torch.stack([sums for sums, _ in answers]).sum(0)

import pytest
import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from entrace.trainer.kernels import attention
from entrace.trainer.kernels.attention import short_attention

LAYER = nn.Module()
LAYER.num_key_value_groups = 2  # type: ignore[assignment]
LAYER.is_causal = True  # type: ignore[assignment]


def make(length, keys):
    generator = torch.Generator().manual_seed(length * 100 + keys)
    shapes = [(3, 4, length, 8), (3, 2, keys, 8), (3, 2, keys, 8)]
    return [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]


def left_padding(length, keys):
    """Return a causal mask with 0, 1, and 2 padded keys.

    A query without keys attends to itself.
    """
    mask = torch.ones(length, keys, dtype=torch.bool).tril(keys - length).expand(3, 1, length, keys).clone()
    for row in range(3):
        mask[row, :, :, :row] = False
    return mask | torch.eye(keys, dtype=torch.bool)[-length:]


# Without a mask, the fused kernel aligns queries with the first keys; (3, 7) therefore needs a mask.
CASES = [((1, 7), "none"), ((7, 7), "none")]
CASES += [(shape, kind) for shape in ((1, 7), (7, 7), (3, 7)) for kind in ("bool", "additive")]


@pytest.mark.parametrize(("shape", "kind"), CASES)
def test_equals_the_fused_kernel_with_gradients(shape, kind):
    length, keys = shape
    mask = None if kind == "none" else left_padding(length, keys)
    if kind == "additive":
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    found, expected = make(length, keys), make(length, keys)
    for tensors, function in ((found, short_attention), (expected, sdpa_attention_forward)):
        output, _ = function(LAYER, *tensors, mask, scaling=0.3)
        output.square().sum().backward()
        tensors.append(output)
    for a, b in zip(found[:3], expected[:3], strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[3], expected[3], rtol=1e-4, atol=1e-6)


def test_output_of_a_query_without_keys_is_finite():
    output, _ = short_attention(LAYER, *make(2, 2), torch.zeros(3, 1, 2, 2, dtype=torch.bool))
    assert output.isfinite().all()


def test_long_sequences_use_the_fused_kernel(monkeypatch):
    monkeypatch.setattr(attention, "MAX_KEYS", 4)
    monkeypatch.setattr(attention, "sdpa_attention_forward", lambda *a, **k: "fused")
    assert short_attention(LAYER, *make(5, 5), None) == "fused"
    assert short_attention(LAYER, *make(4, 4), None) != "fused"

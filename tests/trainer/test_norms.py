import copy

import pytest
import torch
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from entrace.trainer.kernels.norms import replace_norms, rms_norm
from tests.trainer.test_policy import ARCHITECTURES, load, write_model


def test_gradients_are_those_of_finite_differences():
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((2, 3, 5), (5,)))
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-3), (x.requires_grad_(), weight.requires_grad_()))


@pytest.mark.parametrize("shape", [(7, 24), (1, 5, 24), (2, 3, 4, 24)])
@pytest.mark.parametrize("trains_weight", [True, False])
def test_equals_the_layer_that_it_replaces(shape, trains_weight):
    torch.manual_seed(0)
    layer = LlamaRMSNorm(24, eps=1e-2)
    layer.weight.data.uniform_(-1, 2)
    layer.weight.requires_grad_(trains_weight)
    fast = copy.deepcopy(layer)
    replace_norms(fast)
    assert "forward" in vars(fast)
    x, grad = torch.randn(shape), torch.randn(shape)
    results = []
    for module in (layer, fast):
        with torch.no_grad():
            alone = module(x)
        leaf = x.clone().requires_grad_()
        out = module(leaf)
        out.backward(grad)
        torch.testing.assert_close(alone, out.detach())
        results.append((out, leaf.grad, module.weight.grad if trains_weight else torch.zeros(())))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_layer_that_does_something_else_is_left_alone():
    layer = Gemma3RMSNorm(8)
    layer.variance_epsilon = layer.eps
    replace_norms(layer)
    assert "forward" not in vars(layer)


@pytest.mark.parametrize(("dtype", "replaced"), [("float32", True), ("bfloat16", False)])
def test_only_arithmetic_in_float32_is_replaced(tmp_path, dtype, replaced):
    policy = load(write_model(tmp_path, *ARCHITECTURES["qwen3"]), dtype=dtype)
    norms = [module for module in policy.model.modules() if "RMSNorm" in type(module).__name__]
    # Two a layer and one at the end, and one each for queries and keys.
    assert len(norms) == 9
    assert {"forward" in vars(norm) for norm in norms} == {replaced}

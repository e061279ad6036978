"""Run a decoding step of Llama-like models with few GPU operations.

The step reads a copy of the weights in the dtype of products. Eight operations per layer: a norm, the product for
queries, keys, and values, attention (``kernels.decoding``), the output product, a norm, the product for gate and up,
their activation, and the down product. Residuals and norms stay in float32, as under autocast. ``sampling.backend``
compares the step with the model before it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from entrace.trainer.kernels.decoding import LayerCache, Rows, attend, rotate
from entrace.trainer.kernels.token_stats import LMHead
from entrace.trainer.model.lora import merged_weight
from entrace.trainer.model.policy import Policy

# Names of transformers' Llama.
BODY = ("embed_tokens", "layers", "norm", "rotary_emb")
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
# Norms of queries and keys, as in Qwen3.
HEAD_NORMS = ("q_norm", "k_norm")
NOT_LIKE_LLAMA = "needs the layers of a Llama-like model"
ROTARY_TYPES = {"default", "linear", "llama3", "yarn"}


@dataclass
class _Product:
    """Hold linear maps of one input, stacked, as a copy of their weights."""

    sources: list[Any]
    weight: Tensor
    bias: Tensor | None

    @classmethod
    def of(cls, sources: list[Any], dtype: torch.dtype) -> _Product:
        empty = sources[0].weight.new_empty(0, dtype=dtype, requires_grad=False)
        is_biased = any(source.bias is not None for source in sources)
        return cls(sources, empty, empty if is_biased else None)

    def allocate(self) -> None:
        """Allocate the copy, at addresses that stay."""
        rows, width = sum(source.out_features for source in self.sources), self.sources[0].in_features
        self.weight = self.weight.new_empty(rows, width)
        if self.bias is not None:
            self.bias = self.weight.new_zeros(rows)

    def copies(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the parts of the copy, each with the current weights that belong there."""
        sizes = [source.out_features for source in self.sources]
        for source, weight in zip(self.sources, self.weight.split(sizes), strict=True):
            yield weight, merged_weight(source)
        if self.bias is not None:
            for source, bias in zip(self.sources, self.bias.split(sizes), strict=True):
                if source.bias is not None:
                    yield bias, source.bias

    def __call__(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


@dataclass
class _Layer:
    first_norm: Any
    queries_keys_values: _Product
    output: _Product
    second_norm: Any
    gate_up: _Product
    down: _Product
    scale: float
    head_norms: list[Any]

    def products(self) -> tuple[_Product, ...]:
        return self.queries_keys_values, self.output, self.gate_up, self.down


class FusedModel:
    """Compute decoding steps of a policy; the weights are copied by ``refresh``.

    Attributes:
        layers: Number of layers.
        key_heads: Heads of keys and values.
        width: Size of a head.
        group: Query heads per key head.
    """

    def __init__(self, policy: Policy, *, compiles: bool = False) -> None:
        """Find the parts of the model.

        Args:
            policy: The model.
            compiles: Fuse norms and activations with ``torch.compile``.

        Raises:
            ValueError: the model has other parts than a Llama-like one.
        """
        body: Any = policy.model.base_model
        cache = DynamicCache(config=policy.model.config)
        if any(cache.is_sliding) or any(type(layer) is not DynamicLayer for layer in cache.layers):
            raise ValueError("needs a plain KV cache without a sliding window")
        if any(not hasattr(body, name) for name in BODY):
            raise ValueError(NOT_LIKE_LLAMA)
        rotary = body.rotary_emb
        if getattr(rotary, "rope_type", None) not in ROTARY_TYPES:
            raise ValueError("needs rotary positions that do not depend on length")
        self._policy, self._rotary = policy, rotary
        self._embedding, self._norm = body.embed_tokens, body.norm
        self._layers = [_parts_of(layer, policy.dtype) for layer in body.layers]
        self._activation = body.layers[0].mlp.act_fn
        attention = body.layers[0].self_attn
        self.layers, self.width = len(self._layers), attention.head_dim
        self.key_heads = attention.k_proj.out_features // self.width
        self.group = attention.q_proj.out_features // self.width // self.key_heads
        self._head, self._is_allocated = policy.head, False
        self._angles = torch.empty(2, 0, self.width, device=policy.device)
        wrap: Callable[[Any], Any] = torch.compile if compiles else lambda function: function
        self._add_norm, self._gate, self._norm_heads = wrap(_add_norm), wrap(_gate), wrap(_norm_heads)

    @property
    def head(self) -> LMHead:
        """Return the copy of the LM head."""
        return self._head

    @torch.no_grad()
    def refresh(self, num_positions: int) -> bool:
        """Copy the current weights, and extend the rotary angles.

        Returns True if memory addresses changed.
        """
        products = [product for layer in self._layers for product in layer.products()]
        current = self._policy.head
        if not self._is_allocated:
            self._head, self._is_allocated = current.for_hidden(self._policy.dtype), True
            for product in products:
                product.allocate()
        copies = [pair for product in products for pair in product.copies()]
        # In float32, the head is not a copy.
        if self._head.weight is not current.weight:
            copies.append((self._head.weight, current.weight))
            if self._head.bias is not None and current.bias is not None:
                copies.append((self._head.bias, current.bias))
        targets, sources = map(list, zip(*copies, strict=True))
        # One launch for many tensors; the function is missing from torch's type stubs.
        functions: Any = torch
        functions._foreach_copy_(targets, sources)
        if self._angles.shape[1] >= num_positions:
            return False
        positions = torch.arange(num_positions, device=self._angles.device)[None]
        self._angles = torch.cat(self._rotary(self._angles, positions))
        return True

    def nbytes(self) -> int:
        """Return the size of the copied weights."""
        products = (product for layer in self._layers for product in layer.products())
        return self._head.weight.nbytes + sum(product.weight.nbytes for product in products)

    def step(self, tokens: Tensor, rows: Rows, caches: list[LayerCache], places: int) -> tuple[Tensor, Tensor]:
        """Extend rows by their last token.

        Args:
            tokens: Last token of each slot, (slots,).
            rows: The responses.
            caches: Keys and values of each layer, extended in place.
            places: As in ``kernels.decoding.attend``.

        Returns:
            The LM head's input, (R, H), and its norm, (R,) float32.
        """
        cos, sin = self._angles.unbind(0)

        def attention(qkv: Tensor, layer: _Layer, cache: LayerCache) -> Tensor:
            return attend(qkv, cos, sin, rows, cache, layer.scale, places)

        return self._run(tokens, rows.slots, caches, attention)

    def read(self, ids: Tensor, lengths: Tensor, caches: list[LayerCache], first: int) -> Tensor:
        """Read right-padded prompts (P, L); causal attention never reaches the padding.

        Args:
            ids: Token ids.
            lengths: Tokens of each prompt.
            caches: Keys and values of each layer, filled in from prompt ``first``.
            first: Index of the first prompt in the caches.

        Returns:
            The LM head's input at the last token of each prompt, (P, H).
        """
        count, longest = ids.shape
        cos, sin = (angle[:longest] for angle in self._angles.unbind(0))
        positions = torch.arange(ids.numel(), device=ids.device)

        def attention(qkv: Tensor, layer: _Layer, cache: LayerCache) -> Tensor:
            heads = qkv.view(count, longest, -1, self.width).transpose(1, 2)
            rotated, values = heads.split((heads.shape[1] - self.key_heads, self.key_heads), 1)
            rotated = rotate(rotated, cos, sin)
            queries, keys = rotated.split((rotated.shape[1] - self.key_heads, self.key_heads), 1)
            cache.prompt_keys[first : first + count, :, :longest] = keys
            cache.prompt_values[first : first + count, :, :longest] = values
            attended = scaled_dot_product_attention(
                queries, keys, values, is_causal=True, scale=layer.scale, enable_gqa=self.group > 1
            )
            return attended.transpose(1, 2).reshape(ids.numel(), -1)

        hidden, _ = self._run(ids.flatten(), positions, caches, attention)
        return hidden.view(count, longest, -1)[positions[:count], lengths - 1]

    def _run(
        self, tokens: Tensor, index: Tensor, caches: list[LayerCache], attention: Callable[..., Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Compute the LM head's inputs of ``tokens[index]``, and their norms.

        Each layer calls ``attention``.
        """
        x = self._embedding.weight[tokens[index]].float()
        dtype, added = self._policy.dtype, None
        for layer, cache in zip(self._layers, caches, strict=True):
            x, normed = self._add_norm(x, added, layer.first_norm.weight, layer.first_norm.variance_epsilon, dtype)
            qkv = layer.queries_keys_values(normed)
            if layer.head_norms:
                of_queries, of_keys = layer.head_norms
                eps = of_keys.variance_epsilon
                qkv = self._norm_heads(qkv, of_queries.weight, of_keys.weight, eps, self.key_heads)
            added = layer.output(attention(qkv, layer, cache))
            x, normed = self._add_norm(x, added, layer.second_norm.weight, layer.second_norm.variance_epsilon, dtype)
            added = layer.down(self._gate(layer.gate_up(normed), self._activation))
        _, normed = self._add_norm(x, added, self._norm.weight, self._norm.variance_epsilon, dtype)
        return normed, normed.float().norm(dim=-1)


def _parts_of(layer: Any, dtype: torch.dtype) -> _Layer:
    """Return the parts of a layer."""
    attention, mlp = layer.self_attn, layer.mlp
    children = {name for name, _ in attention.named_children()}
    if children - {"rotary_fn", *HEAD_NORMS} != ATTENTION or not hasattr(mlp, "gate_proj"):
        raise ValueError(NOT_LIKE_LLAMA)
    head_norms = [getattr(attention, name) for name in HEAD_NORMS if name in children]
    norms = (layer.input_layernorm, layer.post_attention_layernorm, *head_norms)
    if any(not hasattr(norm, "variance_epsilon") for norm in norms):
        raise ValueError("needs RMSNorm layers with variance_epsilon")
    return _Layer(
        layer.input_layernorm,
        _Product.of([attention.q_proj, attention.k_proj, attention.v_proj], dtype),
        _Product.of([attention.o_proj], dtype),
        layer.post_attention_layernorm,
        _Product.of([mlp.gate_proj, mlp.up_proj], dtype),
        _Product.of([mlp.down_proj], dtype),
        attention.scaling,
        head_norms,
    )


def _add_norm(x: Tensor, added: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    if added is not None:
        x = x + added
    return x, (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight).to(dtype)


def _norm_heads(qkv: Tensor, of_queries: Tensor, of_keys: Tensor, eps: float, key_heads: int) -> Tensor:
    heads = qkv.view(len(qkv), -1, len(of_keys))
    sizes = (heads.shape[1] - 2 * key_heads, key_heads, key_heads)
    *normed, values = heads.split(sizes, 1)
    parts = [
        _add_norm(x.float(), None, w, eps, qkv.dtype)[1] for x, w in zip(normed, (of_queries, of_keys), strict=True)
    ]
    return torch.cat((*parts, values), 1).view_as(qkv)


def _gate(gate_up: Tensor, activation: nn.Module) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return activation(gate) * up

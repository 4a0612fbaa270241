"""A model on a CPU in, the same one with its linear layers in oneDNN's layout out.

A product with few rows takes a half to a third of the time so. In float32 each row comes out the same to the bit however many
others go with it, but for few shapes, which makes the logits that verify a draft those of plain decoding, but for attention.
Layers of one input, such as those of queries, keys and values, are one product in the families that are known here.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP
from transformers.models.mistral.modeling_mistral import MistralAttention, MistralMLP
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, Qwen2MLP
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3MLP

from specdecode.backends import grouped
from specdecode.backends.kv_cache import RowCache

# The layout is chosen for products of so many rows; it is quicker than the plain one for one row as for hundreds.
_NUM_ROWS = 4

# One forward pass is all of these families': norms of queries and keys or none, biases or none.
_ATTENTIONS = (LlamaAttention, MistralAttention, Qwen2Attention, Qwen3Attention)
_MLPS = (LlamaMLP, MistralMLP, Qwen2MLP, Qwen3MLP)


class Product:
    """What linear layers of one input compute, one after the other, from a copy of their weights; it holds no gradient."""

    def __init__(self, *layers: nn.Linear) -> None:
        weight = torch.cat([layer.weight.detach() for layer in layers])
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, _NUM_ROWS)
        self._bias = None if layers[0].bias is None else torch.cat([layer.bias.detach() for layer in layers])
        self._multiply = torch.ops.mkldnn._linear_pointwise.default

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] to [..., out of all layers]."""
        return self._multiply(x, self._weight, self._bias, "none", [], "")


class PackedAttention:
    """An attention layer whose queries, keys and values are one product, and are turned to their positions together."""

    def __init__(self, module: Any) -> None:
        self._module = module
        self._inputs = Product(module.q_proj, module.k_proj, module.v_proj)
        self._output = Product(module.o_proj)
        self._num_heads, self._num_kv_heads = (
            layer.out_features // module.head_dim for layer in (module.q_proj, module.k_proj)
        )
        self._norms = (module.q_norm, module.k_norm) if hasattr(module, "q_norm") else None

    def __call__(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        **options: Any,
    ) -> tuple[torch.Tensor, None]:
        """Attends as the module does.

        Args:
            hidden_states: [rows, num_new, width].
            position_embeddings: cosines and sines, [rows, num_new, head_dim] each.
            attention_mask: see `grouped.attend`.
            past_key_values: takes the new keys and values, and gives those of the whole text.
            options: what transformers passes on besides.
        """
        states = self._inputs(hidden_states).unflatten(-1, (-1, self._module.head_dim))  # [rows, num_new, heads, head_dim]
        num_heads, num_kv_heads = self._num_heads, self._num_kv_heads
        turned, value = states.split([num_heads + num_kv_heads, num_kv_heads], 2)
        if self._norms is not None:
            both = turned.split([num_heads, num_kv_heads], 2)
            turned = torch.cat([norm(part) for norm, part in zip(self._norms, both, strict=True)], 2)
        turned = _turn(turned, *position_embeddings)
        query, key, value = (part.transpose(1, 2) for part in (*turned.split([num_heads, num_kv_heads], 2), value))
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self._module.layer_idx)
        spans = past_key_values.spans if isinstance(past_key_values, RowCache) else ()
        attended, _ = grouped.attend(
            self._module, query, key, value, attention_mask, scaling=self._module.scaling, spans=spans, **options
        )
        return self._output(attended.flatten(2)), None


class PackedMLP:
    """The two inner layers as one product, and the outer one."""

    def __init__(self, module: Any) -> None:
        self._inner = Product(module.gate_proj, module.up_proj)
        self._activate = module.act_fn
        self._outer = Product(module.down_proj)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[..., width] to [..., width]."""
        gate, up = self._inner(x).chunk(2, -1)
        return self._outer(self._activate(gate) * up)


def pack(model: Any) -> None:
    """Packs the layers of a model whose weights do not change from now on, where that is of use; see `_is_packable`."""
    if not torch.backends.mkldnn.is_available():
        return
    for module, layers in _parts(model):
        if all(layer.weight.device.type == "cpu" for layer in layers):
            module.forward = _packed(module)


def num_packed_bytes(model: Any) -> int:
    """What the copies take of a model that is on a CPU, or is to be."""
    return sum(layer.weight.nbytes for _, layers in _parts(model) for layer in layers)


@contextmanager
def unpacked(*models: Any) -> Iterator[None]:
    """The models as transformers has them, for as long as it lasts."""
    taken = [
        (module, module.__dict__.pop("forward"))
        for model in models
        for module in model.modules()
        if isinstance(module.__dict__.get("forward"), (Product, PackedAttention, PackedMLP))
    ]
    try:
        yield
    finally:
        for module, packed in taken:
            module.forward = packed


def _packed(module: Any) -> Product | PackedAttention | PackedMLP:
    if isinstance(module, nn.Linear):
        return Product(module)
    return PackedMLP(module) if isinstance(module, _MLPS) else PackedAttention(module)


def _parts(module: Any) -> Iterator[tuple[Any, Sequence[nn.Linear]]]:
    """What is packed as one, with the linear layers that it has."""
    if _is_packable(module):
        yield module, [module]
    elif _is_known(module) and all(map(_is_packable, layers := _layers(module))):
        yield module, layers
    else:
        for child in module.children():
            yield from _parts(child)


def _is_known(module: Any) -> bool:
    if type(module) in _ATTENTIONS:
        return bool(module.config._attn_implementation == grouped.NAME)
    return type(module) in _MLPS


def _layers(module: Any) -> list[Any]:
    names = ("q_proj", "k_proj", "v_proj", "o_proj") if type(module) in _ATTENTIONS else ("gate_proj", "up_proj", "down_proj")
    return [getattr(module, name) for name in names]


def _is_packable(layer: nn.Module) -> bool:
    """Whether it is a plain linear layer in a dtype that the processor multiplies: float32, and bfloat16 where it has that."""
    if type(layer) is not nn.Linear:
        return False
    if layer.weight.dtype == torch.bfloat16:  # torch asks the processor, oneDNN what it is allowed to use of it
        return bool(torch.cpu._is_avx512_bf16_supported() and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return layer.weight.dtype == torch.float32


def _turn(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates [rows, num_new, heads, head_dim] by positions (RoPE, arXiv 2104.09864), halves of a head as pairs."""
    one, other = states.chunk(2, -1)
    return states * cos.unsqueeze(2) + torch.cat((-other, one), -1) * sin.unsqueeze(2)

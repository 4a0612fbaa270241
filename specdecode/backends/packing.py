"""A float32 model on a CPU in, the same one with its linear layers in oneDNN's layout out.

A product with few rows takes a half to a third of the time so. And each row comes out the same to the bit however many
others go with it, which makes the logits that verify a draft those of plain decoding, but for attention.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

# The layout is chosen for products of so many rows; it is quicker than the plain one for one row as for hundreds.
_NUM_ROWS = 4


class PackedLinear:
    """What a linear layer computes, from a copy of its weights; it holds no gradient."""

    def __init__(self, layer: torch.nn.Linear) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), _NUM_ROWS)
        self._bias = None if layer.bias is None else layer.bias.detach()
        self._multiply = torch.ops.mkldnn._linear_pointwise.default

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] to [..., out]."""
        return self._multiply(x, self._weight, self._bias, "none", [], "")


def pack(model: Any) -> None:
    """Packs the layers of a model whose weights do not change from now on, where that is of use: float32 on an x86 CPU."""
    if not torch.backends.mkldnn.is_available():
        return
    for layer in _packable(model):
        if layer.weight.device.type == "cpu":
            layer.forward = PackedLinear(layer)  # type: ignore[method-assign, assignment]


def num_packed_bytes(model: Any) -> int:
    """What the copies take of a model that is on a CPU, or is to be."""
    return sum(layer.weight.nbytes for layer in _packable(model))


@contextmanager
def unpacked(*models: Any) -> Iterator[None]:
    """The models as transformers has them, for as long as it lasts."""
    taken = [
        (layer, layer.__dict__.pop("forward"))
        for model in models
        for layer in model.modules()
        if isinstance(layer.__dict__.get("forward"), PackedLinear)
    ]
    try:
        yield
    finally:
        for layer, packed in taken:
            layer.forward = packed


def _packable(model: Any) -> list[torch.nn.Linear]:
    return [layer for layer in model.modules() if type(layer) is torch.nn.Linear and layer.weight.dtype == torch.float32]

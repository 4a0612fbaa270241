"""A float32 model on a CPU in, the same one with its linear layers in oneDNN's layout out.

A product with few rows takes a half to a third of the time so. And each row comes out the same to the bit however many
others go with it, which makes the logits that verify a draft those of plain decoding, but for attention. Layers of one input,
such as those of queries, keys and values, are one product.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

# The layout is chosen for products of so many rows; it is quicker than the plain one for one row as for hundreds.
_NUM_ROWS = 4


# Layers beside each other in a module that transformers' models call one after the other with the same input.
_SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class Product:
    """What linear layers of one input compute, from a copy of their weights; it holds no gradient.

    The first of them to be called computes for all, and the others take what is theirs. One that is called with anything else
    computes anew, so that the result never depends on who calls which of them, and when.
    """

    def __init__(self, layers: Sequence[torch.nn.Linear]) -> None:
        weight = torch.cat([layer.weight.detach() for layer in layers])
        self._widths = [layer.out_features for layer in layers]
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, _NUM_ROWS)
        self._bias = None if layers[0].bias is None else torch.cat([layer.bias.detach() for layer in layers])
        self._multiply = torch.ops.mkldnn._linear_pointwise.default
        self._input: torch.Tensor | None = None
        self._parts: list[torch.Tensor | None] = []

    def part(self, number: int, x: torch.Tensor) -> torch.Tensor:
        """[..., in] to [..., out] of layer `number`."""
        if x is not self._input or self._parts[number] is None:
            self._parts = list(self._multiply(x, self._weight, self._bias, "none", [], "").split(self._widths, -1))
            self._input = x
        taken, self._parts[number] = self._parts[number], None
        if all(part is None for part in self._parts):
            self._input = None  # nothing is kept beyond its use
        assert taken is not None
        return taken


class PackedLinear:
    """A linear layer's part of a product."""

    def __init__(self, product: Product, number: int) -> None:
        self._product = product
        self._number = number

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] to [..., out]."""
        return self._product.part(self._number, x)


def pack(model: Any) -> None:
    """Packs the layers of a model whose weights do not change from now on, where that is of use: float32 on an x86 CPU."""
    if not torch.backends.mkldnn.is_available():
        return
    for layers in _siblings(model):
        if layers[0].weight.device.type == "cpu":
            product = Product(layers)
            for number, layer in enumerate(layers):
                layer.forward = PackedLinear(product, number)  # type: ignore[method-assign, assignment]


def num_packed_bytes(model: Any) -> int:
    """What the copies take of a model that is on a CPU, or is to be."""
    return sum(layer.weight.nbytes for layers in _siblings(model) for layer in layers)


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


def _siblings(model: Any) -> Iterator[list[torch.nn.Linear]]:
    """Every layer that can be packed, together with those that are given the same input."""
    for module in model.modules():
        layers = {name: layer for name, layer in module.named_children() if _is_packable(layer)}
        for names in _SIBLINGS:
            found = [layers[name] for name in names if name in layers]
            if len(found) == len(names) and len({(layer.in_features, layer.bias is None) for layer in found}) == 1:
                yield [layers.pop(name) for name in names]
        yield from ([layer] for layer in layers.values())


def _is_packable(layer: torch.nn.Module) -> bool:
    return type(layer) is torch.nn.Linear and layer.weight.dtype == torch.float32

"""Queries and the rows of the cache in, attention out: the flash-attn package's kernel for caches, for `attn_implementation`.

It reads rows of unequal length without a mask: new tokens are aligned to the right and each row's end is known, so that the
last new token sees all of its row and those before it one token less each.
"""

import importlib.util
from typing import Any

import torch
from transformers import AttentionInterface

from specdecode.errors import ModelError

NAME = "cached_rows"  # among transformers' attention implementations


def enable(device: torch.device) -> str:
    """Makes the kernel known to transformers, and returns its name there.

    Raises:
        ModelError: it cannot run here.
    """
    if device.type != "cuda":
        raise ModelError(f"attn_implementation 'flash_attention_2' needs a GPU, and the device is {device}: expected auto")
    if importlib.util.find_spec("flash_attn") is None:
        raise ModelError(
            "attn_implementation 'flash_attention_2' needs the package flash-attn: pip install 'specdecode[flash]'"
        )
    AttentionInterface.register(NAME, attend)
    return NAME


def row_ends(ends: list[int], device: torch.device) -> torch.Tensor:
    """Where each row ends, in place of a mask: [rows, 1, 1, 1], which transformers passes on as it does a finished mask."""
    return torch.tensor(ends, dtype=torch.int32, device=device)[:, None, None, None]


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attends as transformers' attention functions do.

    Args:
        module: the attention layer.
        query: [rows, num_heads, num_new, head_dim].
        key, value: [rows, num_kv_heads, length, head_dim], views of the cache.
        attention_mask: of `row_ends`.
        scaling: of the scores.
        sliding_window: how many tokens each sees, itself included; all if None.
        softcap: the bound of the scores, if they are bounded.

    Returns:
        [rows, num_new, num_heads, head_dim], and no weights.
    """
    from flash_attn import flash_attn_with_kvcache  # built for a GPU, and not everyone's

    del module
    attended = flash_attn_with_kvcache(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        cache_seqlens=attention_mask.flatten(),
        softmax_scale=scaling,
        causal=True,
        window_size=(-1, -1) if sliding_window is None else (sliding_window - 1, 0),
        softcap=softcap or 0.0,
    )
    return attended, None

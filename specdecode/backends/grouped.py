"""Queries and the rows of the cache in, attention out: torch's sdpa, heads that share keys as one head with more queries.

With more than one new token transformers copies the keys and values of all tokens for each head that reads them: in a long
context that takes longer than to attend.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from specdecode.backends.kv_cache import Span

NAME = "grouped_sdpa"  # among transformers' attention implementations

AttentionMaskInterface.register(NAME, sdpa_mask)


def enable(model: Any) -> None:
    """Lets a model that attends by sdpa attend so; one whose attention cannot be chosen stays as it is."""
    if _implementation(model) == "sdpa" and model._supports_attention_backend:
        model.set_attn_implementation(NAME)


@contextmanager
def ungrouped(*models: Any) -> Iterator[None]:
    """The models as transformers has them, for as long as it lasts."""
    changed = [model for model in models if _implementation(model) == NAME]
    for model in changed:
        model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        for model in changed:
            model.set_attn_implementation(NAME)


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    spans: Sequence[Span] = (),
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attends as transformers' attention functions do; without a mask, or with more than that, it is transformers' own.

    Args:
        module: the attention layer.
        query: [rows, num_heads, num_new, head_dim].
        key, value: [rows, num_kv_heads, length, head_dim], views of the cache.
        attention_mask: [rows, 1, num_new, length], what is added to the scores, or whether a place is seen.
        scaling: of the scores.
        spans: all rows, by how far they are to be read, beyond which they see nothing; all to the end if there are none.
        options: what transformers passes on besides.

    Returns:
        [rows, num_new, num_heads, head_dim], and no weights.
    """
    if attention_mask is None or any(options.get(name) is not None for name in ("position_bias", "softcap")):
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    num_rows, num_heads, num_new, _ = query.shape
    group = num_heads // key.shape[1]
    mask = attention_mask[:, :, None].expand(-1, -1, group, -1, -1).flatten(2, 3)  # [rows, 1, group * num_new, length]
    # Of heads that share keys the queries lie one after the other.
    queries = query.reshape(num_rows, key.shape[1], group * num_new, -1)
    parts = [
        scaled_dot_product_attention(
            queries[first:last],
            key[first:last, :, :end],
            value[first:last, :, :end],
            mask[first:last, ..., :end],
            scale=scaling,
        )
        for first, last, end in [(span.first, span.last, span.length) for span in spans] or [(0, num_rows, key.shape[2])]
    ]
    attended = parts[0] if len(parts) == 1 else torch.cat(parts)
    return attended.reshape(num_rows, num_heads, num_new, -1).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, attend)


def _implementation(model: Any) -> str | None:
    found: str | None = model.config.get_text_config()._attn_implementation
    return found

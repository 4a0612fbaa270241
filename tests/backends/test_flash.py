"""Attention by the flash-attn package's kernel for caches. The kernel needs a GPU: here its documented function stands in."""

import random
import sys
from types import ModuleType

import pytest
import torch
from transformers import Gemma2Config, Gemma3TextConfig, GPT2Config, LlamaConfig, MistralConfig, Qwen2Config

from specdecode.backends import flash
from specdecode.backends.backend import Row
from specdecode.backends.huggingface import HuggingFaceBackend
from specdecode.errors import ModelError
from tests.backends.recomputing import random_tokens
from tests.backends.test_huggingface import GROUPED

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


def flash_attn_with_kvcache(q, k_cache, v_cache, *, cache_seqlens, softmax_scale, causal, window_size, softcap):
    """What flash-attn says that it does: each row ends at its length, and queries are aligned with that end."""
    assert causal
    num_new, group = q.shape[1], q.shape[2] // k_cache.shape[2]
    k, v = (states.repeat_interleave(group, dim=2) for states in (k_cache, v_cache))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * softmax_scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    position = cache_seqlens[:, None] - num_new + torch.arange(num_new)  # [rows, num_new]
    distance = position[:, :, None] - torch.arange(k.shape[1])
    visible = distance >= 0
    if window_size[0] >= 0:
        visible &= distance <= window_size[0]
    p = scores.masked_fill(~visible[:, None], -torch.inf).softmax(-1).nan_to_num()
    return torch.einsum("bhqk,bkhd->bqhd", p, v)


@pytest.fixture
def kernel(monkeypatch):
    package = ModuleType("flash_attn")
    package.flash_attn_with_kvcache = flash_attn_with_kvcache
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setattr(flash.importlib.util, "find_spec", lambda name: name)
    enable = flash.enable
    monkeypatch.setattr(flash, "enable", lambda device: enable(CUDA if device == CPU else device))


FAMILIES = {
    "llama": LlamaConfig(**GROUPED),
    "qwen2": Qwen2Config(**GROUPED),
    "mistral": MistralConfig(**GROUPED, sliding_window=9),
    "gemma2": Gemma2Config(**GROUPED, sliding_window=9, attn_logit_softcapping=5.0),
    "gemma3": Gemma3TextConfig(**GROUPED, sliding_window=9),
    "gpt2": GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=512),
}


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("family", FAMILIES)
def test_ragged_rows_have_the_logits_that_they_have_without_it(family, save_model):
    folder = save_model(FAMILIES[family], 0)
    plain, fast = HuggingFaceBackend(folder), HuggingFaceBackend(folder, attn_implementation="flash_attention_2")
    rng = random.Random(0)
    sequences = [random_tokens(rng, length) for length in (30, 1, 17)]
    for _ in range(4):
        rows = [Row(str(place), tokens, min(3, len(tokens))) for place, tokens in enumerate(sequences)]
        torch.testing.assert_close(fast.logits(rows), plain.logits(rows), atol=2e-5, rtol=0)
        sequences = [tokens + random_tokens(rng, rng.randint(1, 5)) for tokens in sequences]


def test_without_a_gpu_or_the_package_it_is_refused_in_one_line():
    with pytest.raises(ModelError, match=r"needs a GPU, and the device is cpu: expected auto$"):
        flash.enable(CPU)
    with pytest.raises(ModelError, match=r"needs the package flash-attn: pip install 'specdecode\[flash\]'$"):
        flash.enable(CUDA)

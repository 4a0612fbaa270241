"""The name of a well-known pair in, both models in their true shapes out, with random weights: for speed without a checkpoint.

How fast a pass is depends on shapes alone. What such a pair says means nothing, and it hardly ever agrees.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen2Config

from specdecode.backends.huggingface import HuggingFaceBackend
from specdecode.backends.loading import resolve_device

PresetName = Literal["qwen2.5-7b-0.5b", "qwen2.5-14b-0.5b", "llama-3-8b-1b"]


@dataclass(frozen=True)
class Shape:
    """What a model's checkpoint on the Hub says of it; `head_dim` is the hidden size by the heads unless it is given."""

    family: Literal["qwen2", "llama"]
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int
    max_length: int
    is_tied: bool

    def config(self) -> PreTrainedConfig:
        """As transformers takes it."""
        kind = Qwen2Config if self.family == "qwen2" else LlamaConfig
        return kind(
            num_hidden_layers=self.num_layers,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_kv_heads,
            vocab_size=self.vocab_size,
            max_position_embeddings=self.max_length,
            tie_word_embeddings=self.is_tied,
            bos_token_id=None,
            eos_token_id=None,
        )


SHAPES = {
    "qwen2.5-0.5b": Shape("qwen2", 24, 896, 4864, 14, 2, 151_936, 32_768, is_tied=True),
    "qwen2.5-7b": Shape("qwen2", 28, 3584, 18_944, 28, 4, 152_064, 32_768, is_tied=False),
    "qwen2.5-14b": Shape("qwen2", 48, 5120, 13_824, 40, 8, 152_064, 32_768, is_tied=False),
    "llama-3.2-1b": Shape("llama", 16, 2048, 8192, 32, 8, 128_256, 131_072, is_tied=True),
    "llama-3-8b": Shape("llama", 32, 4096, 14_336, 32, 8, 128_256, 8192, is_tied=False),
}
PRESETS: dict[PresetName, tuple[str, str]] = {
    "qwen2.5-7b-0.5b": ("qwen2.5-7b", "qwen2.5-0.5b"),
    "qwen2.5-14b-0.5b": ("qwen2.5-14b", "qwen2.5-0.5b"),
    "llama-3-8b-1b": ("llama-3-8b", "llama-3.2-1b"),
}


def make_preset(
    name: PresetName, device: str = "auto", dtype: str = "bfloat16"
) -> tuple[HuggingFaceBackend, HuggingFaceBackend]:
    """Makes a target and its draft on a device; nothing is read or saved.

    Raises:
        ModelError: this machine does not have the device.
    """
    target, draft = (
        make_backend(part, SHAPES[part].config(), resolve_device(device), getattr(torch, dtype)) for part in PRESETS[name]
    )
    return target, draft


def make_backend(name: str, config: PreTrainedConfig, device: torch.device, dtype: torch.dtype) -> HuggingFaceBackend:
    """A backend over a model of random weights."""
    return HuggingFaceBackend(name, device=str(device), model=make_model(config, device, dtype))


def make_model(config: PreTrainedConfig, device: torch.device, dtype: torch.dtype) -> Any:
    """A model of random weights, drawn where they are to be; on the meta device it has shapes and no memory."""
    with torch.random.fork_rng(devices=[]), torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()

"""Tokens in, logits out: the one seam to any model, and the function that opens a model by its name.

Nothing here knows of drafts, acceptance or requests.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import torch
from pydantic import Field, model_validator

from specdecode.config import StrictModel
from specdecode.errors import ModelError

if TYPE_CHECKING:
    from specdecode.backends.kv_cache import RowCache  # with transformers, which takes seconds to import


@dataclass(frozen=True)
class Row:
    """One sequence of a ragged batch.

    Attributes:
        id: names the sequence from call to call, so that a backend may remember what it computed for it.
        tokens: the whole sequence, never only its new part.
        num_scored: how many trailing positions to return logits for; 0 only warms the backend's memory.
    """

    id: str
    tokens: list[int]
    num_scored: int


@runtime_checkable
class ModelBackend(Protocol):
    """A causal language model as a function from token sequences to next-token logits.

    Whatever a backend remembers between calls is a memo: dropping it may cost time and never changes a result.

    Attributes:
        name: what the model was opened as.
        vocab_size: the width of the logits.
        max_length: the longest sequence, in tokens, that the model takes.
        eos_token_ids: tokens that end a generation.
    """

    name: str
    vocab_size: int
    max_length: int
    eos_token_ids: frozenset[int]

    @property
    def vocabulary_id(self) -> str:
        """Equal for two models exactly if the same id means the same token in both."""
        ...

    def logits(self, rows: Sequence[Row]) -> torch.Tensor:
        """Scores the last `num_scored` positions of each row; the logits at a position are those of the token after it.

        Returns:
            [sum(num_scored), vocab_size], the rows' positions one after the other.
        """
        ...

    def num_remembered(self, tokens: list[int]) -> int:
        """How many leading tokens of a new sequence need not be computed, as things stand."""
        ...


@runtime_checkable
class CachingBackend(ModelBackend, Protocol):
    """A backend that remembers sequences in rows of a cache, and may be one of several processes that have the model.

    Attributes:
        cache: the rows.
    """

    cache: "RowCache"

    def check_cache(self) -> None:
        """Asserts that the cache agrees with itself."""
        ...

    def check(self) -> None:
        """Raises a `ModelError` if a pass has failed that other processes took part in; the model is then of no more use."""
        ...

    def follow(self) -> None:
        """Makes every pass that the first of the model's processes makes, until that ends; for the others."""
        ...


def forget(*backends: ModelBackend) -> None:
    """Empties the caches of those that have one, so that what comes next is read whole."""
    for backend in backends:
        if isinstance(backend, CachingBackend):
            backend.cache.clear()


class ModelConfig(StrictModel):
    """How a model is opened."""

    model: str = Field(description="a Hugging Face name, a local checkpoint folder, or an embedded model such as tiny/target")
    dtype: str = Field(
        default="auto",
        pattern="^(auto|float32|float16|bfloat16)$",
        description="auto: as stored on a GPU, float32 on a CPU",
    )
    device: str = Field(default="auto", description="auto, cpu, cuda or cuda:N")
    device_map: str | dict[str, int | str] | None = Field(
        default=None,
        description="over several GPUs, one layer after the other: auto, balanced, balanced_low_0, sequential, or the GPU's "
        "number for each module, as accelerate takes it",
    )
    tp: int = Field(
        default=1, gt=0, description="of a target: over so many GPUs, each with a part of every layer and its own process"
    )
    attn_implementation: Literal["auto", "sdpa", "eager", "flash_attention_2"] = Field(
        default="auto", description="auto: sdpa, and eager for models that sdpa would change; flash_attention_2 on a GPU"
    )
    compile: bool = Field(default=False, description="compile the forward pass: slow first calls, faster ones after")
    quantization: dict[str, Any] | None = Field(
        default=None, description="a transformers quantization config, such as {quant_method: bitsandbytes, load_in_4bit: true}"
    )
    adapter: str | None = Field(default=None, description="a PEFT adapter's folder, merged into the weights")
    max_length: int | None = Field(
        default=None, gt=0, description="the longest sequence in tokens; the model's own limit if unset"
    )
    max_rows: int = Field(default=64, gt=0, description="how many sequences the key-value cache remembers at the most")
    prefill_chunk: int = Field(default=512, gt=0, description="how many prompt tokens one forward pass takes at the most")
    preallocate: bool = Field(default=False, description="take the cache's whole memory at load, not as it fills")

    @model_validator(mode="after")
    def _check_devices(self) -> "ModelConfig":
        check_devices(self.device, self.device_map, self.tp, self.compile, self.quantization, self.adapter)
        return self


def check_devices(
    device: str,
    device_map: str | dict[str, int | str] | None,
    tp: int,
    compile: bool,
    quantization: dict[str, Any] | None,
    adapter: str | None,
) -> None:
    """Raises a `ModelError` if options say different things of where the model is to be."""
    if tp < 1:
        raise ModelError(f"tp: expected at least 1, got {tp}")
    beside: dict[str, Any] = {"device": None if device == "auto" else device}
    if tp > 1:
        beside |= {"device_map": device_map, "compile": compile or None, "quantization": quantization, "adapter": adapter}
    if tp > 1 or device_map is not None:
        for name, value in beside.items():
            if value is not None:
                raise ModelError(f"{'tp' if tp > 1 else 'device_map'}: expected no {name} beside it, got {name} {value!r}")


def create_backend(
    name_or_path: str | Path,
    dtype: str | torch.dtype = "auto",
    device: str = "auto",
    *,
    device_map: str | dict[str, int | str] | None = None,
    tp: int = 1,
    attn_implementation: str = "auto",
    compile: bool = False,
    quantization: dict[str, Any] | None = None,
    adapter: str | None = None,
    max_length: int | None = None,
    max_rows: int = 64,
    prefill_chunk: int = 512,
    preallocate: bool = False,
) -> ModelBackend:
    """Opens a Hugging Face causal language model by its hub name, a checkpoint folder, or an embedded model's name.

    Args:
        name_or_path: such as "Qwen/Qwen2.5-7B", "checkpoints/draft-code/best" or "tiny/target".
        dtype: "float32", "bfloat16" or "float16"; "auto" is the stored one on a GPU and float32 on a CPU.
        device: "cpu", "cuda", "cuda:1"; "auto" is the first GPU if there is one.
        device_map: spreads the layers over several GPUs in place of `device`: "auto", "balanced", "balanced_low_0" or
            "sequential", or {module: GPU} as accelerate takes it, such as {"model.layers.0": 0, ...}.
        tp: the degree of tensor parallelism: this is one of so many processes, which torch.distributed connects, each with a
            GPU and a part of every layer. While the first one calls `logits`, the others must `follow`.
        attn_implementation: "sdpa", "eager" or, on a GPU, "flash_attention_2"; "auto" is sdpa, and eager for models that sdpa
            would change, such as Gemma 2.
        compile: compiles the forward pass, which makes the first calls slow and those after faster.
        quantization: a transformers quantization config, such as {"quant_method": "bitsandbytes", "load_in_4bit": True}.
        adapter: the folder of a PEFT adapter to merge into the weights.
        max_length: the longest sequence, in tokens; the model's own limit if None.
        max_rows: how many sequences the key-value cache remembers at the most.
        prefill_chunk: how many prompt tokens one forward pass takes at the most.
        preallocate: takes the cache's whole memory, `max_rows` times `max_length`, now and not as it fills.

    Raises:
        ModelError: there is no such model, it is none that can be decoded, or an option does not fit it.
    """
    from specdecode.backends.huggingface import HuggingFaceBackend  # transformers takes seconds to import

    return HuggingFaceBackend(
        str(name_or_path),
        dtype=dtype if isinstance(dtype, str) else str(dtype).removeprefix("torch."),
        device=device,
        device_map=device_map,
        tp=tp,
        attn_implementation=attn_implementation,
        compile=compile,
        quantization=quantization,
        adapter=adapter,
        max_length=max_length,
        max_rows=max_rows,
        prefill_chunk=prefill_chunk,
        preallocate=preallocate,
    )


def open_model(config: ModelConfig) -> ModelBackend:
    """Opens the model that `config` describes."""
    options = config.model_dump()
    return create_backend(options.pop("model"), **options)

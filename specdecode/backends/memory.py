"""A model's config in, the bytes of its weights and of its cache out. Loads no weights and takes none of the memory."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from specdecode.backends.backend import ModelConfig
from specdecode.backends.kv_cache import RowCache
from specdecode.backends.loading import mask_kinds, model_errors, parse_devices, read_config, resolve_dtype, resolve_length
from specdecode.backends.packing import num_packed_bytes


@dataclass(frozen=True)
class MemoryEstimate:
    """What a model takes once its cache is full.

    Attributes:
        num_weight_bytes: the parameters, tied ones once.
        num_kv_bytes: keys and values of all rows at full length, with one position more in each row for padding.
        rows: how many sequences the cache remembers.
        length: the longest sequence, in tokens.
        num_kv_bytes_per_token: keys and values of one token in all layers.
        num_packed_bytes: the copies of weights that `packing` makes.
    """

    num_weight_bytes: int
    num_kv_bytes: int
    rows: int
    length: int
    num_kv_bytes_per_token: int
    num_packed_bytes: int = 0

    def describe(self) -> str:
        """Says in one line what takes how much."""
        packed = f" + packed {readable_bytes(self.num_packed_bytes)}" if self.num_packed_bytes else ""
        whole = self.num_weight_bytes + self.num_packed_bytes + self.num_kv_bytes
        return (
            f"weights {readable_bytes(self.num_weight_bytes)}{packed} + cache {self.rows} rows x {self.length} tokens x "
            f"{readable_bytes(self.num_kv_bytes_per_token)} = {readable_bytes(whole)}"
        )


def estimate_memory(config: ModelConfig) -> MemoryEstimate:
    """Counts the bytes that the model takes with a full cache on all its devices, from its checkpoint's config alone.

    What the forward pass takes besides is not counted. Quantized weights are counted as if they were not, so that for them
    the estimate is an upper bound; the few weights that some models keep in float32 are counted in the dtype of the others.

    Raises:
        ModelError: there is no such model, it is none that can be decoded, or an option does not fit it.
    """
    model_config = read_config(config.model)
    text_config = model_config.get_text_config()
    mask_kinds(text_config, config.model)
    length = resolve_length(config.max_length, text_config, config.model)
    device = parse_devices(config.device, config.device_map)[0]
    dtype = resolve_dtype(config.dtype, device)
    if isinstance(dtype, str):
        dtype = model_config.dtype or text_config.dtype or torch.float32  # as transformers finds it
    with model_errors(config.model), torch.device("meta"):
        # A mixture's other implementations choose by a tensor's value or take one dtype alone; here no tensor has a value.
        model = AutoModelForCausalLM.from_config(model_config, dtype=dtype, experts_implementation="batched_mm").eval()
        cache = RowCache(text_config.num_hidden_layers, config.max_rows, length)
        shape_cache(cache, model)
    return MemoryEstimate(
        num_weight_bytes=sum(weights.nbytes for weights in model.parameters()),
        num_kv_bytes=cache.num_bytes_reserved(),
        rows=config.max_rows,
        length=length,
        num_kv_bytes_per_token=cache.num_bytes_per_token(),
        num_packed_bytes=num_packed_bytes(model) if device.type == "cpu" and not config.compile else 0,
    )


@torch.no_grad()
def shape_cache(cache: RowCache, model: Any) -> None:
    """Shows each layer of the cache the shapes of its keys and values, by one token that is then forgotten.

    The config does not tell them: families differ in what they call their heads, how wide keys and values are, and which
    layers have any.
    """
    cache.seat(["one token"], [[0]])
    cache.open(0, 1, [0], [1], model.device)
    zero = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    model(input_ids=zero, position_ids=zero, past_key_values=cache, use_cache=True)
    cache.forget()


def readable_bytes(num_bytes: int) -> str:
    """Writes a number of bytes with three digits and a unit, such as 13.6 MB."""
    value, units = float(num_bytes), iter(("B", "KB", "MB", "GB", "TB"))
    unit = next(units)
    while value >= 999.5 and unit != "TB":
        value, unit = value / 1000, next(units)
    return f"{value:.{max(0, 3 - len(str(int(value))))}f} {unit}" if unit != "B" else f"{num_bytes} B"

"""A model's name and options in, a transformers model ready to run out. Knows no cache, no row and no token."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.distributed import DistributedConfig
from transformers.quantizers.auto import AutoQuantizationConfig

from specdecode.backends import flash
from specdecode.embedded import resolve_model
from specdecode.errors import ModelError

_MASKED_KINDS = {"full_attention", "sliding_attention"}
_DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")  # accelerate's
_STATEFUL_TYPES = {"rwkv", "xlstm"}  # recurrent throughout, and their configs do not list the layers' kinds


def read_config(name: str) -> Any:
    """Reads the config of the checkpoint `name`."""
    with _quiet_loading(), model_errors(name):
        return AutoConfig.from_pretrained(resolve_model(name))


def load_model(
    name: str,
    config: Any,
    *,
    dtype: str,
    device: torch.device,
    device_map: str | dict[str, int | str] | None,
    tp: int,
    attn_implementation: str,
    quantization: dict[str, Any] | None,
    adapter: str | None,
) -> Any:
    """Loads the weights onto the device, or this process's part of them; see `create_backend` for the arguments.

    Raises:
        ModelError: the checkpoint is broken, or an option does not fit it.
    """
    options: dict[str, Any] = {
        "dtype": resolve_dtype(dtype, device),
        "attn_implementation": resolve_attention(attn_implementation, config.get_text_config(), name, device),
    }
    if quantization is not None:
        options["quantization_config"] = _quantization_config(quantization)
    if tp > 1:
        check_divides(tp, config.get_text_config(), name)
        options["distributed_config"] = DistributedConfig(tp_size=tp)
    elif device_map is not None:
        options["device_map"] = device_map
    elif quantization is not None or getattr(config, "quantization_config", None):
        options["device_map"] = {"": device}  # quantized weights go to their device at once, and some cannot move later
    with _quiet_loading(), model_errors(name):
        model = AutoModelForCausalLM.from_pretrained(resolve_model(name), config=config, **options)
        model = model if tp > 1 or "device_map" in options else model.to(device)
        _check_nothing_is_offloaded(model)
    return (model if adapter is None else _merge_adapter(model, adapter, device)).eval()


def check_divides(tp: int, config: Any, name: str) -> None:
    """Raises a `ModelError` unless `tp` processes can share the model's layers."""
    if not config.base_model_tp_plan:
        raise ModelError(f"tp {tp}: model {name!r} has no plan for it in transformers: expected 1")
    for heads in ("num_attention_heads", "num_key_value_heads"):
        number = getattr(config, heads, None) or tp
        if number % tp != 0:
            raise ModelError(f"tp {tp}: expected a divisor of the {heads} of model {name!r}, which is {number}")


def resolve_device(device: str, device_map: str | dict[str, int | str] | None = None) -> torch.device:
    """Finds the device, or the first one of the map, and refuses what this machine does not have."""
    devices = parse_devices(device, device_map)
    for resolved in devices:
        if resolved.type == "cuda" and not torch.cuda.is_available():
            raise ModelError(f"device {str(resolved) if device_map else device!r}: this machine has no CUDA device")
    return devices[0]


def parse_devices(device: str, device_map: str | dict[str, int | str] | None) -> list[torch.device]:
    """Reads the names of the devices, of this machine or another; one for the maps that accelerate makes."""
    if device_map is None:
        return [parse_device(device)]
    if isinstance(device_map, str):
        if device_map not in _DEVICE_MAPS:
            raise ModelError(f"device_map {device_map!r}: expected a mapping, or one of {', '.join(_DEVICE_MAPS)}")
        return [parse_device("auto")]
    if not device_map:
        raise ModelError("device_map: expected a device for each module, got none")
    return [parse_device(f"cuda:{place}" if isinstance(place, int) else place) for place in device_map.values()]


def parse_device(device: str) -> torch.device:
    """Reads a device's name, of this machine or another; "auto" is this one's first GPU if there is one."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise ModelError(f"device {device!r}: expected auto, cpu, cuda or cuda:N") from error
    if resolved.type not in ("cpu", "cuda"):
        raise ModelError(f"device {device!r}: expected auto, cpu, cuda or cuda:N")
    return resolved


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype | str:
    """Finds the dtype of the weights; "auto" is the stored one on a GPU, which transformers knows, and float32 on a CPU."""
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    resolved = getattr(torch, dtype, None)
    if not isinstance(resolved, torch.dtype) or not resolved.is_floating_point:
        raise ModelError(f"dtype {dtype!r}: expected auto, float32, bfloat16 or float16")
    return resolved


def resolve_attention(attn_implementation: str, config: Any, name: str, device: torch.device) -> str | None:
    """Finds the attention implementation; None leaves it to transformers: sdpa where the model has it, else eager."""
    if attn_implementation not in ("auto", "sdpa", "eager", "flash_attention_2"):
        raise ModelError(f"attn_implementation {attn_implementation!r}: expected auto, sdpa, eager or flash_attention_2")
    if attn_implementation == "flash_attention_2":
        return flash.enable(device)
    is_capped = getattr(config, "attn_logit_softcapping", None) is not None
    if is_capped and attn_implementation == "sdpa":
        raise ModelError(
            f"attn_implementation 'sdpa': model {name!r} caps its attention logits, which sdpa drops: expected auto or eager"
        )
    if attn_implementation == "auto":
        return "eager" if is_capped else None
    return attn_implementation


def resolve_length(max_length: int | None, config: Any, name: str) -> int:
    """Finds the longest sequence, in tokens, that the model is to take."""
    limit: int | None = getattr(config, "max_position_embeddings", None)
    if max_length is not None and max_length < 1:
        raise ModelError(f"max_length: expected at least 1, got {max_length}")
    if limit is None and max_length is None:
        raise ModelError(f"model {name!r} states no context length: give max_length")
    if limit is not None and max_length is not None and max_length > limit:
        raise ModelError(f"max_length {max_length}: model {name!r} takes at most {limit} tokens")
    return max_length or limit or 0


def eos_token_ids(generation_config: GenerationConfig, config: Any) -> frozenset[int]:
    """Finds the tokens that end a generation."""
    ids = generation_config.eos_token_id if generation_config.eos_token_id is not None else config.eos_token_id
    return frozenset([ids] if isinstance(ids, int) else ids or [])


def mask_kinds(config: Any, name: str) -> list[str]:
    """Finds the kinds of attention mask that the model's layers need, and refuses a model with other kinds of layers."""
    kinds = set(getattr(config, "layer_types", None) or getattr(config, "attention_layers", None) or [])
    if getattr(config, "alibi", False) or config.model_type == "bloom":
        kinds.add("alibi_attention")
    if config.model_type in _STATEFUL_TYPES:
        kinds.add("linear_attention")
    if not kinds:
        kinds = {"sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"}
    if unknown := kinds - _MASKED_KINDS:
        raise ModelError(f"model {name!r} has layers of {', '.join(sorted(unknown))}: expected full or sliding attention")
    return sorted(kinds)


@contextlib.contextmanager
def model_errors(name: str) -> Iterator[None]:
    """Turns whatever goes wrong with the checkpoint `name` into a `ModelError` of one line."""
    with _errors(f"model {name!r} cannot be loaded"):
        yield


def _check_nothing_is_offloaded(model: Any) -> None:
    """Weights that come from elsewhere for every pass would make each as slow as reading them."""
    places = {weights.device.type for weights in model.parameters()}
    if len(places) > 1 or "meta" in places:  # where offloaded weights seem to be
        raise ValueError(f"device_map: expected room for all weights on GPUs, got weights on {', '.join(sorted(places))}")


def _quantization_config(quantization: dict[str, Any]) -> Any:
    method = quantization.get("quant_method")
    with _errors(f"quantization {method!r} cannot be used"):
        if method == "bitsandbytes" and not quantization.keys() & {"load_in_4bit", "load_in_8bit"}:
            raise ValueError("bitsandbytes needs load_in_4bit: true or load_in_8bit: true")
        return AutoQuantizationConfig.from_dict(dict(quantization))


def _merge_adapter(model: Any, adapter: str, device: torch.device) -> Any:
    """Adds the adapter's update to the weights, after which the model is as fast as without."""
    if not (Path(adapter) / "adapter_config.json").is_file():
        raise ModelError(f"adapter {adapter!r}: expected a folder with an adapter_config.json")
    try:
        from peft import PeftModel  # an extra that not everyone needs
    except ImportError as error:
        raise ModelError(f"adapter {adapter!r} needs the package peft: pip install 'specdecode[adapters]'") from error
    with _errors(f"adapter {adapter!r} cannot be loaded"):
        return PeftModel.from_pretrained(model, adapter, torch_device=str(device)).merge_and_unload()


@contextlib.contextmanager
def _errors(what: str) -> Iterator[None]:
    try:
        yield
    except ModelError:
        raise
    except Exception as error:  # a checkpoint, or a package that reads it, may be broken in any way
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ModelError(f"{what}: {reason[:600]}") from error


@contextlib.contextmanager
def _quiet_loading() -> Iterator[None]:
    """Keeps transformers' loading bars off a terminal that streams text."""
    was_enabled = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            transformers.utils.logging.enable_progress_bar()

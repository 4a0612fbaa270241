"""Models and tokenizers in and out of Hugging Face folders."""

import copy
import json
from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from specdecode.errors import ModelError


def load_model(name_or_path: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Loads a causal language model by its Hugging Face name or from a local folder.

    Raises:
        ModelError: there is no such model, or it does not load.
    """
    try:
        return AutoModelForCausalLM.from_pretrained(name_or_path, dtype=dtype)
    except (OSError, ValueError) as error:
        raise ModelError(f"model {name_or_path}: does not load: {_first_line(error)}") from error


def load_shape(name_or_path: str) -> PretrainedConfig:
    """Loads what a model says of its layers and vocabulary, without its weights.

    Raises:
        ModelError: there is no such model, or it does not load.
    """
    try:
        return AutoConfig.from_pretrained(name_or_path).get_text_config()
    except (OSError, ValueError) as error:
        raise ModelError(f"model {name_or_path}: does not load: {_first_line(error)}") from error


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase:
    """Loads a tokenizer by its Hugging Face name or from a local folder.

    Raises:
        ModelError: there is no such tokenizer, or it does not load.
    """
    try:
        return AutoTokenizer.from_pretrained(name_or_path)
    except (OSError, ValueError) as error:
        raise ModelError(f"tokenizer {name_or_path}: does not load: {_first_line(error)}") from error


def keep_first_layers(model: PreTrainedModel, num_layers: int) -> PreTrainedModel:
    """Drops in place all but the first `num_layers` decoder layers; embeddings, norm and head stay.

    Raises:
        ModelError: the model has fewer layers.
    """
    check_num_layers(model.config, num_layers)
    decoder = model.get_decoder()
    decoder.layers = decoder.layers[:num_layers]
    model.config.num_hidden_layers = num_layers
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = model.config.layer_types[:num_layers]
    return model


def add_layers(model: PreTrainedModel, num_layers: int) -> PreTrainedModel:
    """Puts copies of the last decoder layer on top, in place, which add nothing to the stream until they are trained.

    What they would add is multiplied by zero, as in block expansion (LLaMA Pro, arXiv 2401.02415), so that training starts from
    the model's own loss.

    Raises:
        ModelError: the layers are not built as Llama's, with `self_attn.o_proj` and `mlp.down_proj`.
    """
    if num_layers == 0:
        return model
    check_new_layers(model)
    layers = model.get_decoder().layers
    for _ in range(num_layers):
        layer = copy.deepcopy(layers[-1])
        for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
            for parameter in projection.parameters():
                nn.init.zeros_(parameter)
        layer.self_attn.layer_idx = len(layers)
        layers.append(layer)
    model.config.num_hidden_layers = len(layers)
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [*model.config.layer_types, *[model.config.layer_types[-1]] * num_layers]
    return model


def check_new_layers(model: PreTrainedModel) -> None:
    """Raises a `ModelError` unless the model's layers are built as Llama's; its weights do not matter."""
    layer = next(iter(getattr(model.get_decoder(), "layers", [])), None)
    if not hasattr(getattr(layer, "self_attn", None), "o_proj") or not hasattr(getattr(layer, "mlp", None), "down_proj"):
        raise ModelError(f"model.new_layers: expected layers built as Llama's, which {type(model).__name__} does not have")


def check_num_layers(shape: PretrainedConfig, num_layers: int) -> None:
    """Raises a `ModelError` if the model has fewer layers."""
    if num_layers > shape.num_hidden_layers:
        raise ModelError(f"model.num_layers: expected at most the model's {shape.num_hidden_layers}, got {num_layers}")


def save_checkpoint(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, state: dict[str, torch.Tensor] | None = None
) -> None:
    """Writes a plain Hugging Face folder with bfloat16 weights; the model in memory keeps its own precision.

    Args:
        model: what to write.
        tokenizer: goes along.
        folder: where to.
        state: the model's weights, where it has only a share of them itself.
    """
    written = AutoModelForCausalLM.from_config(model.config).to(torch.bfloat16)
    written.load_state_dict(model.state_dict() if state is None else state)
    written.generation_config = model.generation_config
    written.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Saves in Hugging Face's format, with `tokenizer.json` on one line: a third of its usual size."""
    tokenizer.save_pretrained(folder)
    path = Path(folder) / "tokenizer.json"
    if path.exists():
        content = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps(content, ensure_ascii=False, separators=(",", ":")), encoding="utf-8")


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0]

"""A model's name in, what it is out: its shape, its vocabulary, its size. Loads no weights."""

from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from transformers import AutoModelForCausalLM

from specdecode.backends.loading import model_errors, read_config
from specdecode.embedded import resolve_model


@dataclass(frozen=True)
class ModelFacts:
    """What a checkpoint says of itself.

    Attributes:
        architecture: the family by transformers' name for it, and its layers and their width.
        num_parameters: tied ones once.
        vocab_size: the width of its logits.
        max_length: the longest sequence that it was made for, in tokens; None if it does not say.
        num_bytes: the files of its folder, or of its copy in the hub's cache; None if there is none.
    """

    architecture: str
    num_parameters: int
    vocab_size: int
    max_length: int | None
    num_bytes: int | None


def read_facts(name: str) -> ModelFacts:
    """Reads what the model `name` is, from its checkpoint's config alone.

    Raises:
        ModelError: there is no such model, or it is no causal language model.
    """
    config = read_config(name)
    text = config.get_text_config()
    with model_errors(name), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return ModelFacts(
        architecture=f"{config.model_type}, {text.num_hidden_layers} x {text.hidden_size}",
        num_parameters=sum(weights.numel() for weights in model.parameters()),
        vocab_size=text.vocab_size,
        max_length=getattr(text, "max_position_embeddings", None),
        num_bytes=size_on_disk(name),
    )


def size_on_disk(name: str) -> int | None:
    """The bytes of a model's folder, or of its copy in the hub's cache; None if there is none."""
    folder = Path(resolve_model(name))
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(name, local_files_only=True))
        except LocalEntryNotFoundError:
            return None
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())

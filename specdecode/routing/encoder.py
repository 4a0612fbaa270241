"""A sentence encoder's name in, a sentence-transformers model out. Knows nothing of drafts or targets."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import cached_file, logging

from specdecode.backends.loading import read_config
from specdecode.embedded import resolve_model
from specdecode.errors import ModelError

_STATIC = "static:"
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"


def load_encoder(name: str, device: str | None) -> SentenceTransformer:
    """Loads an encoder.

    Args:
        name: a sentence-transformers model by name or folder; or `static:` and a causal language model by name or folder,
            whose token embeddings are averaged: no layers, so that a text takes microseconds.
        device: where it runs, such as cpu or cuda; the best there is if None.

    Raises:
        ModelError: it does not load.
    """
    quiet = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        if name.startswith(_STATIC):
            model = name.removeprefix(_STATIC)
            static = StaticEmbedding(
                AutoTokenizer.from_pretrained(resolve_model(model)), embedding_weights=_token_embeddings(model)
            )
            return SentenceTransformer(modules=[static], device=device)
        return SentenceTransformer(name, device=device)
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).strip().split("\n", 1)[0]
        raise ModelError(f"encoder {name}: does not load as a sentence-transformers model: {reason}") from error
    finally:
        if quiet:
            logging.enable_progress_bar()


def _token_embeddings(model: str) -> Tensor:
    """The input embeddings, float32 [vocabulary, width], less their mean, which all texts share (Mu & Viswanath 2018)."""
    name, folder = _embeddings_name(model), resolve_model(model)
    index = cached_file(folder, _INDEX, _raise_exceptions_for_missing_entries=False)
    file = _WEIGHTS if index is None else json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].get(name)
    path = None if file is None else cached_file(folder, file, _raise_exceptions_for_missing_entries=False)
    if path is None:
        raise ModelError(f"encoder {_STATIC}{model}: expected {name} in {_WEIGHTS}, or in a file of {_INDEX}")
    with safe_open(path, framework="pt") as tensors:
        embeddings: Tensor = tensors.get_tensor(name).float()
    return embeddings - embeddings.mean(0)


def _embeddings_name(model: str) -> str:
    """What the weights are called, from the architecture alone: a target's other weights are not read here."""
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(read_config(model))
    embeddings = network.get_input_embeddings().weight
    return next(name for name, parameter in network.named_parameters() if parameter is embeddings)

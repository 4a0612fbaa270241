"""A configuration in, a small target model trained from scratch out."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from specdecode.config import StrictModel
from specdecode.training.blocks import Batch, TokenStream, encode, mix
from specdecode.training.checkpoints import load_tokenizer, save_checkpoint
from specdecode.training.documents import is_held_out, load_documents
from specdecode.training.losses import next_token_loss
from specdecode.training.provenance import write_run
from specdecode.training.tokenizer import END_OF_TEXT, END_OF_TURN
from specdecode.training.trainer import TrainingConfig, TrainingResult, fit


class ArchitectureConfig(StrictModel):
    """The shape of a Llama model; the vocabulary is the tokenizer's."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    max_position_embeddings: int = 2048


class MixtureConfig(StrictModel):
    """What to read: for each domain the weight of each of its sources."""

    data_dir: str
    domains: dict[str, dict[str, float]]


class TargetTrainingConfig(StrictModel):
    """Everything about the training of a target from scratch."""

    tokenizer: str
    architecture: ArchitectureConfig
    data: MixtureConfig
    training: TrainingConfig


def train_target(config: TargetTrainingConfig) -> TrainingResult:
    """Trains a target from scratch; its best checkpoint is in OUTPUT_DIR/best, what it took in OUTPUT_DIR/run.json."""
    torch.manual_seed(config.training.seed)
    tokenizer = load_tokenizer(config.tokenizer)
    model = create_target(config.architecture, tokenizer)
    batches, validation = _load_batches(config, tokenizer)

    def loss(batch: Batch) -> Tensor:
        logits = model(input_ids=batch.ids, use_cache=False).logits
        return next_token_loss(logits, batch.ids, batch.is_scored)

    def save(folder: Path) -> None:
        save_checkpoint(model, tokenizer, folder)

    result = fit(model, loss, batches, validation, config.training, save)
    write_run(Path(config.training.output_dir), config, result)
    return result


def create_target(shape: ArchitectureConfig, tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """A Llama model with random weights; input and output embeddings are one matrix."""
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=shape.hidden_size,
            intermediate_size=shape.intermediate_size,
            num_hidden_layers=shape.num_layers,
            num_attention_heads=shape.num_attention_heads,
            num_key_value_heads=shape.num_key_value_heads,
            max_position_embeddings=shape.max_position_embeddings,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    stops = [tokenizer.convert_tokens_to_ids(token) for token in (END_OF_TURN, END_OF_TEXT)]
    model.generation_config = GenerationConfig(eos_token_id=stops, pad_token_id=tokenizer.pad_token_id)
    return model


def _load_batches(
    config: TargetTrainingConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[Iterator[Batch], dict[str, list[Batch]]]:
    """Endless training batches over all sources, and fixed validation batches for each domain."""
    training, data = config.training, config.data
    rng = np.random.default_rng(training.seed)
    streams: dict[str, TokenStream] = {}
    held_out: dict[str, TokenStream] = {}
    for source in (source for sources in data.domains.values() for source in sources):
        documents = load_documents(source, data.data_dir)
        held_out[source] = TokenStream([encode(d, tokenizer) for d in documents if is_held_out(d)], rng)
        streams[source] = TokenStream([encode(d, tokenizer) for d in documents if not is_held_out(d)], rng)
    weights = {source: weight for sources in data.domains.values() for source, weight in sources.items()}
    shape = (training.per_device_batch_size, training.sequence_length)
    validation = {
        domain: list(itertools.islice(mix(held_out, sources, *shape, rng), training.num_validation_batches))
        for domain, sources in data.domains.items()
    }
    return mix(streams, weights, *shape, rng), validation

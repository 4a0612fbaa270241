"""A configuration and blocks in, a small target model trained from scratch out. One process of perhaps several."""

from pathlib import Path

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, TrainerCallback

from specdecode.config import StrictModel
from specdecode.training.checkpoints import load_tokenizer
from specdecode.training.data import TRAINING, VALIDATION, DataConfig, read_blocks
from specdecode.training.losses import LossConfig
from specdecode.training.reporting import LoggingConfig
from specdecode.training.tokenizer import END_OF_TEXT, END_OF_TURN
from specdecode.training.trainer import DraftTrainer, TrainingConfig, TrainingResult


class ArchitectureConfig(StrictModel):
    """The shape of a Llama model; the vocabulary is the tokenizer's."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    max_position_embeddings: int = 2048


class TargetTrainingConfig(StrictModel):
    """Everything about the training of a target from scratch."""

    tokenizer: str
    architecture: ArchitectureConfig
    data: DataConfig
    training: TrainingConfig
    logging: LoggingConfig = LoggingConfig()


def learn_target(
    config: TargetTrainingConfig, blocks: Path, checkpoint: Path | None = None, callbacks: list[TrainerCallback] | None = None
) -> TrainingResult:
    """Trains a target on blocks that are there, see `draft.learn`."""
    torch.manual_seed(config.training.seed)
    tokenizer = load_tokenizer(config.tokenizer)
    trainer = DraftTrainer(
        create_target(config.architecture, tokenizer),
        None,
        tokenizer,
        LossConfig(divergence_weight=0.0, cross_entropy_weight=1.0),
        read_blocks(blocks / TRAINING),
        read_blocks(blocks / VALIDATION),
        config.training,
        config.logging,
        callbacks=callbacks,
    )
    return trainer.run(checkpoint)


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

"""Documents in, a byte-level BPE tokenizer folder out. Knows nothing of models."""

import itertools
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as tokenizer_models
from transformers import PreTrainedTokenizerFast

from specdecode.config import StrictModel
from specdecode.training.checkpoints import save_tokenizer
from specdecode.training.documents import Document, is_held_out, load_documents

END_OF_TEXT, END_OF_TURN = "<|endoftext|>", "<|end|>"
SPECIAL_TOKENS = (END_OF_TEXT, "<|system|>", "<|user|>", "<|assistant|>", END_OF_TURN)

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)

# Qwen2's pattern: words with their leading space, single digits, runs of punctuation, newlines, and indentation.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


class TokenizerConfig(StrictModel):
    """How to train a tokenizer: `sources` maps each text collection to the number of characters to take from it."""

    data_dir: str
    sources: dict[str, int]
    vocabulary_size: int = 4096
    max_length: int = 2048
    output_dir: str


def train_tokenizer(config: TokenizerConfig) -> Path:
    """Trains a tokenizer as `config` says and saves it; returns the folder.

    Raises:
        ConfigError: a source is unknown or its files are missing.
    """
    documents = {source: load_documents(source, config.data_dir) for source in config.sources}
    texts = itertools.chain.from_iterable(
        _take_characters([document for document in documents[source] if not is_held_out(document)], count)
        for source, count in config.sources.items()
    )
    tokenizer = fit_tokenizer(texts, config.vocabulary_size, config.max_length)
    save_tokenizer(tokenizer, config.output_dir)
    return Path(config.output_dir)


def fit_tokenizer(texts: Iterator[str], vocabulary_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """Learns `vocabulary_size` tokens, special ones and all 256 bytes included, from `texts`."""
    tokenizer = Tokenizer(tokenizer_models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TURN,
        pad_token=END_OF_TEXT,
        additional_special_tokens=["<|system|>", "<|user|>", "<|assistant|>"],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=max_length,
    )


def _take_characters(documents: list[Document], count: int) -> Iterator[str]:
    """Documents in turn, again from the first after the last, until `count` characters are out."""
    for document in itertools.cycle(documents):
        if count <= 0:
            return
        yield document.content[:count]
        count -= len(document.content)

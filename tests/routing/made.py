"""A small encoder, made here; and records of prompts whose best draft can be told from their words."""

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from specdecode.routing.records import NONE, Record, write_records

_TEXTS = {
    "code": "def class import return list parse read file path index self value loop string",
    "chat": "hello please recommend restaurant movie weekend friend coffee music travel advice thanks",
    "reasoning": "how many apples total cost each hours miles twice remaining average price sum left",
}
WORDS = {domain: text.split() for domain, text in _TEXTS.items()}
TRUE = {
    "code": {"code": 0.85, "chat": 0.3, "generic": 0.6},
    "chat": {"code": 0.2, "chat": 0.8, "generic": 0.55},
    "reasoning": {"code": 0.3, "chat": 0.4, "generic": 0.7},
}
K = 4


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A sentence-transformers folder of a random BERT of two small layers."""
    from sentence_transformers import SentenceTransformer  # which takes seconds
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    folder = tmp_path_factory.mktemp("encoder")
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    tokenizer.train_from_iterator([" ".join(words) for words in WORDS.values()], trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=64)
    torch.manual_seed(3)  # of some random weights, a router learns less well than the tests expect
    model = BertModel(
        BertConfig(
            vocab_size=len(wrapped),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=48,
            max_position_embeddings=64,
        )
    )
    model.save_pretrained(folder / "bert")
    wrapped.save_pretrained(folder / "bert")
    transformer = Transformer(str(folder / "bert"))
    SentenceTransformer(modules=[transformer, Pooling(32)]).save(str(folder / "encoder"))
    return str(folder / "encoder")


def made_prompt(domain: str, rng: np.random.Generator) -> str:
    return " ".join(rng.choice(WORDS[domain], 8))


def made_records(count: int, seed: int = 0, true: dict[str, dict[str, float]] = TRUE) -> list[Record]:
    """Every arm on prompts of every domain; a round takes 1 s, and 0.1 s more for each token of a draft."""
    rng = np.random.default_rng(seed)
    records = []
    for number in range(count):
        domain = list(true)[number % len(true)]
        common = {"prompt_id": f"{seed}-{number}", "domain": domain, "prompt": f"{made_prompt(domain, rng)} {number}"}
        common |= {"is_chat": domain != "code", "num_prompt_tokens": 10, "k": K}
        for arm, rate in true[domain].items():
            acceptance = float(np.clip(rate + 0.05 * rng.standard_normal(), 0, 1))
            lengths = [float(sum(acceptance**n for n in range(k + 1))) for k in range(1, 9)]
            speed = lengths[K - 1] / (1 + 0.1 * K)
            records.append(
                Record(
                    **common, arm=arm, acceptance=acceptance, num_verdicts=60, accepted_lengths=lengths, tokens_per_second=speed
                )
            )
        records.append(Record(**common, arm=NONE, tokens_per_second=1.0))
    return records


@pytest.fixture(scope="session")
def checkpoint(encoder: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A router of three drafts that was trained on such records."""
    from specdecode.routing.trainer import RouterTrainingConfig, train_router

    folder = tmp_path_factory.mktemp("trained")
    write_records(folder / "records.parquet", made_records(300))
    train_router(
        RouterTrainingConfig(
            records=[str(folder / "records.parquet")],
            output_dir=str(folder / "router"),
            encoder=encoder,
            device="cpu",
            num_epochs=40,
        )
    )
    return str(folder / "router")

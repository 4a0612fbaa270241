"""A draft replica guesses for whatever target asks, in that target's tokens."""

import asyncio

import pytest
import torch

from serve.channel import Ask, Guess, ModelTokens
from serve.config import DraftModelConfig
from serve.draft import DraftServer
from specdecode.backends.backend import ModelBackend
from specdecode.decoding.drafters import ModelDrafter
from specdecode.decoding.sequence import Route, SamplingParams, Sequence
from specdecode.text import Tokenizer


def sequences(tokenizer: Tokenizer) -> list[Sequence]:
    params = {"temperature": 0.8, "repetition_penalty": 1.2, "max_tokens": 20}
    prompts = [tokenizer.encode(text) for text in ("def read_lines(path):\n", "import os\n\nclass A:\n", "for i in range(")]
    return [Sequence(prompt, SamplingParams(**params, seed=seed), Route("code", 5)) for seed, prompt in enumerate(prompts)]


def ask(server: DraftServer, asked: list[Sequence], target: ModelTokens) -> list[Guess]:
    return asyncio.run(server.propose([Ask.of(sequence) for sequence in asked], target))


@pytest.fixture
def target(models: dict[str, ModelBackend]) -> ModelTokens:
    return ModelTokens.of(models["target"])


def test_a_replica_guesses_as_the_model_does_here(
    models: dict[str, ModelBackend], target: ModelTokens, tokenizer: Tokenizer
) -> None:
    server = DraftServer(DraftModelConfig(model="tiny/draft-code"))
    here = ModelDrafter(models["code"]).propose(sequences(tokenizer))
    there = ask(server, sequences(tokenizer), target)
    assert [guess.tokens.tolist() for guess in there] == [draft.tokens for draft in here]


def test_a_replica_with_another_tokenizer_guesses_the_same_text(
    models: dict[str, ModelBackend], target: ModelTokens, tokenizer: Tokenizer, foreign_draft: str
) -> None:
    server = DraftServer(DraftModelConfig(model=foreign_draft))
    greedy = [Sequence(s.tokens, SamplingParams(max_tokens=20), s.route) for s in sequences(tokenizer)]
    here = ModelDrafter(models["code"]).propose(greedy)
    assert [guess.tokens.tolist() for guess in ask(server, greedy, target)] == [draft.tokens for draft in here]
    here = ModelDrafter(models["code"]).propose(sequences(tokenizer))
    for there, draft in zip(ask(server, sequences(tokenizer), target), here, strict=True):
        assert there.support[0, :10].tolist() == draft.support[0, :10].tolist()
        assert there.q[0, :10].tolist() == pytest.approx(draft.q[0, :10].tolist(), abs=1e-4)


def test_a_replica_compares_vocabularies_once_for_each_target(target: ModelTokens, tokenizer: Tokenizer) -> None:
    server = DraftServer(DraftModelConfig(model="tiny/draft-code"))
    smaller = ModelTokens(target.name, target.vocabulary_id, 300, target.eos_token_ids)
    for _ in range(3):
        ask(server, sequences(tokenizer), target)
        guesses = ask(server, [Sequence([5], SamplingParams(max_tokens=20), Route("code", 5))], smaller)
        assert all(token < 300 for guess in guesses for token in guess.tokens)
    assert len(server._drafters) == 2


def test_a_replica_stops_where_it_is_not_confident(target: ModelTokens, tokenizer: Tokenizer) -> None:
    bold, careful = (DraftServer(DraftModelConfig(model="tiny/draft-code", min_confidence=c)) for c in (0.0, 0.9))
    lengths = [[len(guess.tokens) for guess in ask(server, sequences(tokenizer), target)] for server in (bold, careful)]
    assert lengths[0] == [5, 5, 5]
    assert sum(lengths[1]) < 15
    assert torch.tensor(lengths[1]).min() >= 1

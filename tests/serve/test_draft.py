"""A draft replica guesses for whatever target asks, in that target's tokens."""

from functools import partial

import pytest

from serve.config import DraftModelConfig
from serve.decoder import model_drafter
from serve.models import part
from specdecode.backends.backend import ModelBackend, ModelConfig, open_model
from specdecode.decoding.drafters import ModelDrafter
from specdecode.decoding.sequence import Draft, Route, SamplingParams, Sequence
from specdecode.errors import ModelError
from specdecode.exchange.channel import InProcessChannel
from specdecode.exchange.messages import ModelTokens
from specdecode.exchange.remote import RemoteDrafter
from specdecode.exchange.scheduler import DraftScheduler
from specdecode.text import Tokenizer


def sequences(tokenizer: Tokenizer) -> list[Sequence]:
    params = {"temperature": 0.8, "repetition_penalty": 1.2, "max_tokens": 20}
    prompts = [tokenizer.encode(text) for text in ("def read_lines(path):\n", "import os\n\nclass A:\n", "for i in range(")]
    return [Sequence(prompt, SamplingParams(**params, seed=seed), Route("code", 5)) for seed, prompt in enumerate(prompts)]


def replica(model: str = "tiny/draft-code", **config: object) -> DraftScheduler:
    """What a replica drafts with, as it makes it of its configuration."""
    settings = DraftModelConfig.model_validate({"model": model, **config})
    return DraftScheduler(partial(model_drafter, open_model(part(ModelConfig, settings)), settings))


def ask(schedule: DraftScheduler, asked: list[Sequence], target: ModelTokens) -> list[Draft]:
    remote = RemoteDrafter("code", target.vocab_size, deadline_s=60.0)
    remote.connect(InProcessChannel(schedule, target))
    drafts = remote.propose(asked)
    assert not remote.metrics.num_fallbacks
    remote.disconnect()
    return drafts


@pytest.fixture
def target(models: dict[str, ModelBackend]) -> ModelTokens:
    return ModelTokens.of(models["target"])


def test_a_replica_guesses_as_the_model_does_here(
    models: dict[str, ModelBackend], target: ModelTokens, tokenizer: Tokenizer
) -> None:
    here = ModelDrafter(models["code"]).propose(sequences(tokenizer))
    there = ask(replica(), sequences(tokenizer), target)
    assert [draft.tokens for draft in there] == [draft.tokens for draft in here]


def test_a_replica_with_another_tokenizer_guesses_the_same_text(
    models: dict[str, ModelBackend], target: ModelTokens, tokenizer: Tokenizer, foreign_draft: str
) -> None:
    schedule = replica(foreign_draft)
    greedy = [Sequence(s.tokens, SamplingParams(max_tokens=20), s.route) for s in sequences(tokenizer)]
    here = ModelDrafter(models["code"]).propose(greedy)
    assert [draft.tokens for draft in ask(schedule, greedy, target)] == [draft.tokens for draft in here]
    here = ModelDrafter(models["code"]).propose(sequences(tokenizer))
    for there, draft in zip(ask(schedule, sequences(tokenizer), target), here, strict=True):
        assert there.support[0, :10].tolist() == draft.support[0, :10].tolist()
        assert there.q[0, :10].tolist() == pytest.approx(draft.q[0, :10].tolist(), abs=1e-4)


def test_a_replica_guesses_what_a_target_with_fewer_tokens_has(target: ModelTokens) -> None:
    schedule = replica()
    smaller = ModelTokens(target.name, target.vocabulary_id, 300, target.eos_token_ids)
    params = SamplingParams(temperature=2.0, max_tokens=20)
    for asked_by in (target, smaller, target, smaller):
        drafts = ask(schedule, [Sequence([5, n], params, Route("code", 5)) for n in range(20)], asked_by)
        assert {draft.q.shape[1] for draft in drafts} == {64}
        assert all(token < asked_by.vocab_size for draft in drafts for token in draft.tokens)
    assert schedule.num_sessions == 0


def test_a_replica_stops_where_it_is_not_confident(target: ModelTokens, tokenizer: Tokenizer) -> None:
    bold, careful = (replica(min_confidence=confidence) for confidence in (0.0, 0.9))
    lengths = [[len(draft.tokens) for draft in ask(schedule, sequences(tokenizer), target)] for schedule in (bold, careful)]
    assert lengths[0] == [5, 5, 5]
    assert sum(lengths[1]) < 15
    assert min(lengths[1]) >= 1


@pytest.mark.parametrize("support", [1, 7])
def test_a_replica_says_as_much_of_q_as_its_configuration_wants(
    target: ModelTokens, tokenizer: Tokenizer, support: int
) -> None:
    assert {draft.q.shape[1] for draft in ask(replica(support=support), sequences(tokenizer), target)} == {support}


def test_a_target_with_which_a_replica_has_nothing_in_common_is_refused(tmp_path_factory: pytest.TempPathFactory) -> None:
    stranger = ModelTokens(str(tmp_path_factory.mktemp("nothing")), "another digest", 99, frozenset())
    schedule = replica()
    with pytest.raises(ModelError):
        schedule.open(stranger)
    assert schedule.num_sessions == 0

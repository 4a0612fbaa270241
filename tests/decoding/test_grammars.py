"""Answers that a grammar constrains: always valid, the same however they are decoded, and drafted for as well as others."""

import json

import jsonschema
import pytest

from specdecode import Grammar, create_backend
from specdecode.decoding.drafters import ChainDrafter, ModelDrafter, PromptLookupDrafter
from specdecode.decoding.engine import Engine, EngineConfig
from specdecode.decoding.loop import generate, speculative_decode
from specdecode.decoding.metrics import DecodingMetrics
from specdecode.decoding.sequence import Route, SamplingParams, Sequence
from specdecode.errors import RequestError
from specdecode.exchange.channel import InProcessChannel
from specdecode.exchange.messages import ModelTokens
from specdecode.exchange.remote import RemoteDrafter
from specdecode.exchange.scheduler import DraftScheduler, SchedulerConfig
from specdecode.text import Tokenizer

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "size": {"enum": ["small", "large"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "hot": {"type": "boolean"},
    },
    "required": ["name", "size", "count", "hot"],
    "additionalProperties": False,
}
GRAMMAR = Grammar.json_schema(SCHEMA)
PROMPT = "Can I order a large latte please?"


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer("tiny/target")


@pytest.fixture(scope="module")
def tiny():
    return create_backend("tiny/target")


@pytest.fixture(scope="module")
def tiny_draft():
    return create_backend("tiny/draft-chat")


def sequences(tokenizer, seeds=range(4), *, k=4, grammar=GRAMMAR, **options):
    prompt = tokenizer.encode_chat([{"role": "user", "content": PROMPT}])
    return [
        Sequence(list(prompt), SamplingParams(max_tokens=200, seed=seed, grammar=grammar, **options), Route("draft", k))
        for seed in seeds
    ]


def decoded(batch, drafter, target):
    metrics = DecodingMetrics()
    for rounds in generate(batch, drafter, target):
        for _, round in rounds:
            metrics.add(round, 1.0)
    return metrics


def answer(sequence):
    return sequence.tokens[sequence.num_prompt_tokens :]


@pytest.mark.parametrize(
    ("temperature", "verifier"), [(0.0, "rejection"), (1.0, "rejection"), (5.0, "block"), (1.0, "coupled")]
)
def test_every_answer_that_ends_is_valid(temperature, verifier, tiny, tiny_draft, tokenizer):
    batch = sequences(tokenizer, temperature=temperature, verifier=verifier)
    metrics = decoded(batch, ModelDrafter(tiny_draft), tiny)
    assert metrics.num_accepted > 0
    for sequence in batch:
        text = tokenizer.decode(answer(sequence))
        assert sequence.finish_reason == "stop", text
        jsonschema.validate(json.loads(text), SCHEMA)


def test_a_batch_is_each_alone_and_drafts_change_nothing_that_seeds_promise(tiny, tiny_draft, tokenizer):
    together = sequences(tokenizer, temperature=1.0, verifier="coupled")
    plain = sequences(tokenizer, temperature=1.0, verifier="coupled")
    decoded(together, ChainDrafter([PromptLookupDrafter(), ModelDrafter(tiny_draft)]), tiny)
    for sequence in plain:
        decoded([sequence], ModelDrafter(tiny_draft), tiny)
    assert [answer(sequence) for sequence in together] == [answer(sequence) for sequence in plain]
    free = sequences(tokenizer, temperature=1.0, verifier="coupled", k=0)
    decoded(free, ModelDrafter(tiny_draft), tiny)
    assert [answer(sequence) for sequence in free] == [answer(sequence) for sequence in plain]


@pytest.mark.parametrize("verifier", ["rejection", "block", "coupled"])
def test_an_answer_that_is_taken_up_again_goes_on_as_it_would_have(verifier, tiny, tiny_draft, tokenizer):
    [whole] = sequences(tokenizer, [3], temperature=1.0, verifier=verifier)
    borders = []
    for ((sequence, _),) in generate([whole], ModelDrafter(tiny_draft), tiny):
        borders.append(sequence.num_generated)
    for border in borders[2:-1:4]:
        [rest] = sequences(tokenizer, [3], temperature=1.0, verifier=verifier)
        rest = Sequence(
            whole.tokens[: whole.num_prompt_tokens + border],
            rest.params,
            rest.route,
            num_prompt_tokens=whole.num_prompt_tokens,
        )
        decoded([rest], ModelDrafter(tiny_draft), tiny)
        assert rest.tokens == whole.tokens


@pytest.mark.parametrize("run_ahead", [False, True])
def test_a_draft_elsewhere_keeps_to_the_grammar_too(run_ahead, tiny, tiny_draft, tokenizer):
    here = sequences(tokenizer)
    there = sequences(tokenizer)
    expected = decoded(here, ModelDrafter(tiny_draft), tiny)
    scheduler = DraftScheduler(lambda _: ModelDrafter(tiny_draft), SchedulerConfig(run_ahead=run_ahead))
    remote = RemoteDrafter("draft", tiny.vocab_size, deadline_s=60.0)
    remote.connect(InProcessChannel(scheduler, ModelTokens.of(tiny)))
    metrics = decoded(there, remote, tiny)
    assert [answer(sequence) for sequence in there] == [answer(sequence) for sequence in here]
    if not run_ahead:
        assert (metrics.num_drafted, metrics.num_accepted) == (expected.num_drafted, expected.num_accepted)
    assert metrics.num_accepted > 0


def test_all_of_a_draft_is_allowed_by_the_grammar(tiny, tiny_draft, tokenizer):
    [sequence] = sequences(tokenizer, [0], temperature=1.0, k=8)
    decoded([sequence], ModelDrafter(tiny_draft), tiny)
    [again] = sequences(tokenizer, [0], temperature=1.0, k=8)
    again.matcher = sequence.matcher
    for draft in ModelDrafter(tiny_draft).propose([again]):
        for place, token in enumerate(draft.tokens):
            assert again.matcher.allowed(draft.tokens[:place]).tokens[token]


def test_an_answer_ends_where_nothing_can_follow(tiny, tiny_draft, tokenizer):
    """Also for a request that goes on after end tokens, and although no end token is generated."""
    for text in ("yes", "no"):
        grammar = Grammar.choice([text])
        [sequence] = sequences(tokenizer, [0], grammar=grammar, ignore_eos=True)
        decoded([sequence], ModelDrafter(tiny_draft), tiny)
        assert tokenizer.decode(answer(sequence)) == text
        assert sequence.finish_reason == "stop"
        assert not set(answer(sequence)) & tiny.eos_token_ids


def test_an_end_token_comes_only_where_the_text_is_whole(tiny, tiny_draft, tokenizer):
    ends = tiny.eos_token_ids
    grammar = Grammar("regex", "(ab)+c?")
    batch = sequences(tokenizer, range(6), grammar=grammar, temperature=1.0, logit_bias=dict.fromkeys(ends, 100.0))
    decoded(batch, ModelDrafter(tiny_draft), tiny)
    for sequence in batch:
        assert tokenizer.decode(answer(sequence)) == "ab"
        assert answer(sequence)[-1] in ends


def test_an_answer_that_max_tokens_ends_is_cut_off(tiny, tiny_draft, tokenizer):
    params = SamplingParams(max_tokens=5, grammar=GRAMMAR)
    sequence = Sequence(tokenizer.encode(PROMPT), params, Route("draft", 4))
    decoded([sequence], ModelDrafter(tiny_draft), tiny)
    assert sequence.finish_reason == "length"
    assert len(answer(sequence)) == 5


@pytest.mark.parametrize(
    "options",
    [{"min_tokens": 3}, {"allowed_token_ids": {5}}, {"bad_words_ids": [[1]]}],
    ids=lambda options: next(iter(options)),
)
def test_nothing_else_that_forbids_tokens_stands_beside_a_grammar(options):
    with pytest.raises(RequestError, match="beside grammar"):
        SamplingParams(grammar=GRAMMAR, **options)


def test_the_library_takes_a_grammar(tiny, tiny_draft, tokenizer):
    import torch

    prompt = torch.tensor([tokenizer.encode(PROMPT)])
    output, metrics = speculative_decode(tiny, tiny_draft, prompt, 100, grammar=GRAMMAR, n=2, temperature=1.0)
    assert metrics.num_generated
    for row in output[:, prompt.shape[1] :].tolist():
        jsonschema.validate(json.loads(tokenizer.decode(row)), SCHEMA)


def test_sequences_with_and_without_grammars_share_an_engine(tiny, tiny_draft, tokenizer):
    def run(batch):
        engine = Engine(tiny, ModelDrafter(tiny_draft), EngineConfig(draft_length="fixed"))
        for sequence in batch:
            engine.submit(sequence)
        list(engine.run())
        return [answer(sequence) for sequence in batch]

    mixed = sequences(tokenizer, [0, 1]) + sequences(tokenizer, [2, 3], grammar=None)
    alone = sequences(tokenizer, [0, 1]) + sequences(tokenizer, [2, 3], grammar=None)
    assert run(mixed) == [tokens for sequence in alone for tokens in run([sequence])]

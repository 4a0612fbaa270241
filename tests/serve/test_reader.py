"""A request becomes what the target is asked, with the deployment's defaults where it says nothing."""

from typing import Any

import pytest

from serve.config import RouterConfig
from serve.generation import TargetInfo
from serve.reader import Defaults, Job, Reader
from serve.schema import ChatRequest, CompletionRequest
from specdecode.decoding.sequence import Route, SamplingParams
from specdecode.errors import RequestError
from specdecode.text import Tokenizer


@pytest.fixture(scope="module")
def reader(tokenizer: Tokenizer) -> Reader:
    defaults = Defaults(Route("code", 4), "block")
    return Reader(tokenizer, TargetInfo(2048, 4096), ["code", "chat"], defaults, RouterConfig(max_stop=2, max_logit_bias=3))


def read(reader: Reader, **fields: Any) -> list[Job]:
    return reader.completion(CompletionRequest.model_validate({"model": "m", "prompt": "def", **fields}))


def params(reader: Reader, **fields: Any) -> SamplingParams:
    [(generation, _)] = read(reader, **fields)
    return generation.params


def test_what_is_not_said_is_the_deployments_or_openais_default(reader: Reader) -> None:
    [(generation, wording)] = read(reader)
    assert generation.params == SamplingParams(temperature=1.0, max_tokens=16, verifier="block")
    assert generation.route == Route("code", 4)
    assert (wording.stop, wording.echo, wording.is_echo_only) == ([], None, False)


def test_a_request_chooses_draft_length_and_verifier(reader: Reader) -> None:
    [(generation, _)] = read(reader, speculative_decoding={"draft": "chat", "K": 2, "verifier": "coupled"})
    assert (generation.route, generation.params.verifier) == (Route("chat", 2), "coupled")
    for plain in ({"draft": "none"}, {"K": 0}):
        assert read(reader, speculative_decoding=plain)[0][0].route == Route()


def test_bad_words_are_spelled_with_a_space_and_without(reader: Reader, tokenizer: Tokenizer) -> None:
    expected = tuple(tuple(tokenizer.encode(text)) for text in ("return", " return", "\n", " \n", "a b", " a b"))
    assert params(reader, bad_words=["return", " return", "\n", "a b"]).bad_words_ids == expected


def test_a_bias_is_by_token_id(reader: Reader) -> None:
    assert params(reader, logit_bias={"5": 1, "6": -100.0}).logit_bias == {5: 1.0, 6: -100.0}


def test_an_echo_with_logprobs_needs_the_prompts_too(reader: Reader) -> None:
    asked = [
        {"logprobs": 2},
        {"echo": True},
        {"echo": True, "logprobs": 2},
        {"echo": True, "logprobs": 2, "prompt_logprobs": 5},
    ]
    assert [params(reader, **fields).prompt_logprobs for fields in asked] == [None, None, 2, 5]


def test_no_tokens_is_a_round_that_is_dropped(reader: Reader) -> None:
    [(generation, wording)] = read(reader, prompt=[5, 6], echo=True, max_tokens=0)
    assert generation.params.max_tokens == 1
    assert wording.is_echo_only


def test_choices_differ_in_their_seeds_and_prompts_do_not(reader: Reader) -> None:
    jobs = read(reader, prompt=["a", "b"], n=3, seed=2**64 - 1)
    assert [generation.params.seed for generation, _ in jobs] == [2**64 - 1, 0, 1] * 2


def test_a_chat_goes_on_to_the_end_of_the_context(reader: Reader) -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "logprobs": True}
    [(generation, _)] = reader.chat(ChatRequest.model_validate(body))
    assert len(generation.tokens) + generation.params.max_tokens == 2048
    assert generation.params.logprobs == 0


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"stop": ["a", "b", "c"]}, "stop"),
        ({"logit_bias": {str(token): 1 for token in range(4)}}, "logit_bias"),
        ({"n": 33}, "n"),
        ({"min_tokens": 17}, "min_tokens"),
        ({"max_tokens": 2048}, "max_tokens"),
        ({"prompt": [1] * 2048, "max_tokens": 0, "echo": True}, "prompt"),
    ],
)
def test_what_a_request_may_not_ask_for(reader: Reader, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        read(reader, **fields)
    assert caught.value.param == param


# Messages


TOOLS = (
    "{% for m in messages %}{{ m.role }}{% if m.role == 'tool' %}!{% endif %}"
    "{{ m.tool_calls and m.tool_calls[0]['function'] }}\n{% endfor %}"
)
CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
TOLD = [
    {"role": "developer", "content": "Use tools."},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "4", "tool_call_id": "1"},
]


def chat(tokenizer: Tokenizer, messages: list[dict[str, Any]]) -> str:
    reader = Reader(tokenizer, TargetInfo(2048, 4096), [], Defaults(Route(), "rejection"), RouterConfig())
    [(generation, _)] = reader.chat(ChatRequest.model_validate({"model": "m", "messages": messages}))
    return tokenizer.decode(generation.tokens)


def with_template(template: str) -> Tokenizer:
    tokenizer = Tokenizer("tiny/target")
    tokenizer._tokenizer.chat_template = template
    return tokenizer


def test_a_template_that_knows_tools_is_told_of_them() -> None:
    told = chat(with_template(TOOLS), TOLD)
    assert "system" in told  # it does not know developers
    assert "assistant{'name': 'add', 'arguments': {'a': 1}}" in told
    assert "tool!" in told


def test_developers_are_told_apart_where_the_template_does() -> None:
    template = "{% for m in messages %}{{ 'D' if m.role == 'developer' else m.role }}{% endfor %}"
    assert chat(with_template(template), TOLD[:1]) == "D"


@pytest.mark.parametrize(("turn", "param"), [(1, "messages.0.tool_calls"), (2, "messages.0.role")])
def test_tools_are_refused_by_a_template_that_knows_none(tokenizer: Tokenizer, turn: int, param: str) -> None:
    with pytest.raises(RequestError) as caught:
        chat(tokenizer, [TOLD[turn]])
    assert caught.value.param == param


def test_a_negative_seed_is_a_seed(reader: Reader) -> None:
    assert params(reader, seed=-1).seed == 2**64 - 1

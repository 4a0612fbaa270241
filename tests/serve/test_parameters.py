"""Every parameter of a request does through HTTP what it does in the library, whole and streamed."""

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from openai import OpenAI

from specdecode import DecodingMetrics
from specdecode.decoding.sequence import TokenLogprob
from specdecode.text import Tokenizer
from tests.serve.conftest import DRAFTS, Expect, Library

CODE = "def read_lines(path):\n"
CHAT = [{"role": "user", "content": "Can I order a large latte please?"}]
SAMPLED = {"temperature": 1.0, "seed": 11}

Ask = Callable[..., dict[str, Any]]

# As the request has them, and as the library has them where that differs.
PARAMETERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "top_p": ({"top_p": 0.8}, {}),
    "top_k": ({"top_k": 7}, {}),
    "min_p": ({"min_p": 0.2}, {}),
    "repetition_penalty": ({"repetition_penalty": 1.4}, {}),
    "presence_penalty": ({"presence_penalty": 1.5}, {}),
    "frequency_penalty": ({"frequency_penalty": 0.9}, {}),
    "logit_bias": ({"logit_bias": {"40": 4, "300": -100.0}}, {"logit_bias": {40: 4.0, 300: -100.0}}),
    "allowed_token_ids": ({"allowed_token_ids": list(range(900))}, {}),
    "min_tokens": ({"min_tokens": 20}, {}),
    "stop_token_ids": ({"stop_token_ids": list(range(400, 700))}, {}),
    "stop": ({"stop": ["found when the test runs"]}, {}),
    "stop and min_tokens": ({"stop": ["_get", "\n"], "min_tokens": 9}, {}),
    "ignore_eos": ({"ignore_eos": True, "max_tokens": 60}, {}),
    "block": ({"speculative_decoding": {"verifier": "block"}}, {"verifier": "block"}),
    "coupled": ({"speculative_decoding": {"verifier": "coupled"}}, {"verifier": "coupled"}),
    "many": (
        {"top_k": 30, "repetition_penalty": 1.2, "logit_bias": {"40": 2}, "speculative_decoding": {"verifier": "block"}},
        {"logit_bias": {40: 2.0}, "verifier": "block"},
    ),
}


@pytest.fixture(scope="session")
def ask(http: httpx.Client) -> Ask:
    """Sends a completion request, and returns the one choice of the answer, with its usage and figures."""

    def send(draft: str = "code", path: str = "/v1/completions", **fields: Any) -> dict[str, Any]:
        prompt = {"messages": CHAT} if "chat" in path else {"prompt": CODE}
        options = {"draft": draft, **fields.pop("speculative_decoding", {})}
        body = {"model": "tiny", "max_tokens": 24, "temperature": 0, **prompt, **fields, "speculative_decoding": options}
        response = http.post(path, json=body)
        answer = response.json()
        assert response.status_code == 200, answer
        [choice] = answer["choices"]
        of_prompt = {name: answer[name] for name in ("prompt_logprobs",) if name in answer}  # where a chat has them
        return {**choice, **of_prompt, "usage": answer["usage"], "figures": answer["speculative_decoding"]}

    return send


def as_library(fields: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name != "speculative_decoding"} | changes


def check_answer(answer: dict[str, Any], tokens: list[int], metrics: DecodingMetrics, tokenizer: Tokenizer) -> None:
    """Compares text and counts; equal counts say that the draft, too, saw the parameters."""
    text = tokenizer.decode(tokens)
    assert text.startswith(answer["text"])
    assert answer["usage"]["completion_tokens"] == metrics.num_generated == len(tokens)
    figures = answer["figures"]
    assert figures["num_accepted_tokens"] == metrics.num_accepted
    assert figures["num_draft_tokens"] == metrics.num_drafted


# Equal to the library


@pytest.mark.parametrize("sampling", [{}, SAMPLED], ids=["greedy", "seeded"])
@pytest.mark.parametrize("name", PARAMETERS)
def test_a_parameter_does_what_it_does_in_the_library(
    ask: Ask, library: Library, tokenizer: Tokenizer, name: str, sampling: dict[str, Any]
) -> None:
    fields, changes = PARAMETERS[name]
    if name == "stop":  # in the midst of what would be said, over the bounds of several tokens
        whole = tokenizer.decode(library(tokenizer.encode(CODE), "code", **sampling)[0])
        fields = {"stop": ["never said", whole[len(whole) // 2 :][:7]]}
    answer = ask(**fields, **sampling)
    tokens, metrics = library(tokenizer.encode(CODE), "code", **as_library(fields, changes), **sampling)
    check_answer(answer, tokens, metrics, tokenizer)
    rest = tokenizer.decode(tokens)[len(answer["text"]) :]
    assert rest.startswith(tuple(fields["stop"])) if "stop" in fields else rest == ""


@pytest.mark.parametrize("sampling", [{}, SAMPLED], ids=["greedy", "seeded"])
def test_bad_words_are_the_librarys_bad_words_ids(
    ask: Ask, library: Library, tokenizer: Tokenizer, sampling: dict[str, Any]
) -> None:
    words = [tokenizer.encode(word) for word in ("the", " the", "return", " return")]
    tokens, metrics = library(tokenizer.encode(CODE), "code", bad_words_ids=words, **sampling)
    check_answer(ask(bad_words=["the", " return"], **sampling), tokens, metrics, tokenizer)


@pytest.mark.parametrize("draft", [*DRAFTS, "lookup"])
def test_penalties_are_the_librarys_with_every_draft(ask: Ask, library: Library, tokenizer: Tokenizer, draft: str) -> None:
    penalties = {"repetition_penalty": 1.3, "frequency_penalty": 0.4, **SAMPLED}
    tokens, metrics = library(tokenizer.encode(CODE), draft, max_tokens=40, **penalties)
    check_answer(ask(draft, max_tokens=40, **penalties), tokens, metrics, tokenizer)


def test_null_means_the_default(ask: Ask) -> None:
    names = [
        "top_p",
        "top_k",
        "min_p",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
        "logit_bias",
        "n",
        "stop",
    ]
    names += ["allowed_token_ids", "bad_words", "min_tokens", "stop_token_ids", "logprobs", "prompt_logprobs", "echo", "stream"]
    assert ask(**dict.fromkeys(names))["text"] == ask()["text"]


# What a parameter is seen to do


def test_a_bias_of_100_makes_a_token_the_only_one(ask: Ask, tokenizer: Tokenizer) -> None:
    [token] = tokenizer.encode("def")
    assert ask(logit_bias={str(token): 100}, max_tokens=5)["text"] == "def" * 5


def test_a_bias_of_minus_100_takes_a_token_away(ask: Ask, tokenizer: Tokenizer) -> None:
    first = ask(max_tokens=1)["text"]
    [token] = tokenizer.encode(first)
    assert ask(max_tokens=1, logit_bias={str(token): -100})["text"] != first


def test_only_allowed_tokens_are_generated(ask: Ask, tokenizer: Tokenizer) -> None:
    digits = [token for digit in "0123456789" for token in tokenizer.encode(digit)]
    assert ask(allowed_token_ids=digits, **SAMPLED)["text"].isdigit()


def test_a_bad_word_does_not_appear(ask: Ask) -> None:
    assert "raise" in ask(max_tokens=60)["text"]
    assert "raise" not in ask(max_tokens=60, bad_words=["raise"])["text"]


def test_no_end_comes_before_min_tokens(ask: Ask) -> None:
    ends_early = {"logit_bias": {"4": 60}}
    assert ask(**ends_early)["finish_reason"] == "stop"
    later = ask(**ends_early, min_tokens=12)
    assert (later["finish_reason"], later["usage"]["completion_tokens"]) == ("stop", 13)


def test_the_prompt_lookup_drafts(ask: Ask) -> None:
    figures = ask("lookup", max_tokens=60)["figures"]
    assert figures["draft"] == "lookup"
    assert figures["num_accepted_tokens"] > 0


# Verifiers


def test_a_request_chooses_its_verifier(ask: Ask) -> None:
    for verifier in ("rejection", "block", "coupled"):
        assert ask(speculative_decoding={"verifier": verifier})["figures"]["verifier"] == verifier
    assert ask()["figures"]["verifier"] == "rejection"


def test_coupled_the_text_is_the_same_with_every_draft_and_length(ask: Ask) -> None:
    texts = {
        ask(draft, **SAMPLED, speculative_decoding={"verifier": "coupled", "K": k})["text"]
        for draft in (*DRAFTS, "lookup", "none")
        for k in (1, 4, 7)
    }
    assert len(texts) == 1


# Log-probabilities


def values(logprobs: list[TokenLogprob]) -> list[float]:
    return [logprob.logprob for logprob in logprobs]


@pytest.mark.parametrize("sampling", [{}, SAMPLED], ids=["greedy", "seeded"])
def test_a_completions_logprobs_are_the_librarys(
    ask: Ask, library: Library, tokenizer: Tokenizer, sampling: dict[str, Any]
) -> None:
    answer = ask(logprobs=3, **sampling)
    tokens, metrics = library(tokenizer.encode(CODE), "code", logprobs=3, **sampling)
    [expected] = metrics.logprobs
    shown = answer["logprobs"]
    assert "".join(shown["tokens"]) == answer["text"] == tokenizer.decode(tokens)
    assert shown["token_logprobs"] == pytest.approx(values(expected), abs=1e-3)
    assert [
        answer["text"][start:].startswith(token) for token, start in zip(shown["tokens"], shown["text_offset"], strict=True)
    ]
    for token, top, logprob in zip(shown["tokens"], shown["top_logprobs"], expected, strict=True):
        likely = {tokenizer.decode([id]): value for id, value in logprob.top}
        assert top == pytest.approx({token: logprob.logprob} | likely, abs=1e-3)


def test_a_chats_logprobs_are_the_librarys(ask: Ask, library: Library, tokenizer: Tokenizer) -> None:
    answer = ask("chat", "/v1/chat/completions", logprobs=True, top_logprobs=2, **SAMPLED)
    tokens, metrics = library(tokenizer.encode_chat(CHAT), "chat", logprobs=2, **SAMPLED)
    content = answer["logprobs"]["content"]
    [expected] = metrics.logprobs
    assert [entry["logprob"] for entry in content] == pytest.approx(values(expected), abs=1e-3)
    for entry, logprob in zip(content, expected, strict=True):
        assert [top["token"] for top in entry["top_logprobs"]] == [tokenizer.decode([id]) or "<|end|>" for id, _ in logprob.top]
    without_end = content[: len(tokens) - (answer["finish_reason"] == "stop")]
    assert bytes(byte for entry in without_end for byte in entry["bytes"]).decode() == answer["message"]["content"]


def test_without_top_logprobs_a_chat_shows_the_tokens_own(ask: Ask) -> None:
    content = ask(path="/v1/chat/completions", logprobs=True)["logprobs"]["content"]
    assert all(entry["top_logprobs"] == [] and entry["logprob"] <= 0 for entry in content)


@pytest.mark.parametrize("stop", [None, ["return"]])
def test_a_completions_logprobs_streamed_are_those_whole(client: OpenAI, stop: list[str] | None) -> None:
    options = {"model": "tiny", "prompt": CODE, "max_tokens": 40, "temperature": 0, "logprobs": 2, "echo": True, "stop": stop}
    [whole] = client.completions.create(**options).choices
    chunks = [chunk.choices[0] for chunk in client.completions.create(**options, stream=True)]
    assert whole.logprobs is not None
    streamed = {name: [item for c in chunks for item in getattr(c.logprobs, name)] for name in whole.logprobs.to_dict()}
    assert streamed["tokens"] == whole.logprobs.tokens
    assert streamed["text_offset"] == whole.logprobs.text_offset
    assert streamed["token_logprobs"] == pytest.approx(whole.logprobs.token_logprobs, abs=1e-3)
    assert [top and top.keys() for top in streamed["top_logprobs"]] == [
        top and top.keys() for top in whole.logprobs.top_logprobs
    ]
    text = ""
    for chunk in chunks:
        text += chunk.text
        assert all(offset < len(text) for offset in chunk.logprobs.text_offset)
    assert text == whole.text


def test_a_chats_logprobs_streamed_are_those_whole(client: OpenAI) -> None:
    options = {"model": "tiny", "messages": CHAT, "max_tokens": 24, "temperature": 0, "logprobs": True, "top_logprobs": 1}
    [whole] = client.chat.completions.create(**options).choices
    chunks = [chunk.choices[0] for chunk in client.chat.completions.create(**options, stream=True)]
    assert whole.logprobs is not None
    streamed = [entry.token for chunk in chunks if chunk.logprobs for entry in chunk.logprobs.content or []]
    assert streamed == [entry.token for entry in whole.logprobs.content or []]


def test_tokens_after_a_stop_string_are_left_out(ask: Ask, expect: Expect, tokenizer: Tokenizer) -> None:
    text = expect(tokenizer.encode(CODE))
    stop = text[len(text) // 2 :][:3]
    answer = ask(stop=[stop], logprobs=0)
    assert answer["text"] == text[: text.index(stop)]
    assert max(answer["logprobs"]["text_offset"]) < len(answer["text"])
    assert "".join(answer["logprobs"]["tokens"]).startswith(answer["text"])


# The prompt


@pytest.mark.parametrize("is_ids", [False, True])
def test_an_echo_puts_the_prompt_in_front(ask: Ask, tokenizer: Tokenizer, is_ids: bool) -> None:
    prompt = tokenizer.encode(CODE) if is_ids else CODE
    assert ask(prompt=prompt, echo=True)["text"] == CODE + ask()["text"]


def test_an_echo_shows_the_prompts_logprobs_too(ask: Ask, library: Library, tokenizer: Tokenizer) -> None:
    answer = ask(echo=True, logprobs=2)
    prompt = tokenizer.encode(CODE)
    _, metrics = library(prompt, "code", logprobs=2, prompt_logprobs=2)
    shown = answer["logprobs"]
    assert "".join(shown["tokens"]) == answer["text"]
    assert shown["token_logprobs"][0] is None
    assert shown["top_logprobs"][0] is None
    expected = values(metrics.prompt_logprobs) + values(metrics.logprobs[0])
    assert shown["token_logprobs"][1:] == pytest.approx(expected, abs=1e-3)
    assert shown["text_offset"][len(prompt)] == len(CODE)
    assert "prompt_logprobs" not in answer


@pytest.mark.parametrize("is_stream", [False, True])
def test_no_tokens_and_an_echo_score_a_prompt(client: OpenAI, library: Library, tokenizer: Tokenizer, is_stream: bool) -> None:
    options = {"model": "tiny", "prompt": CODE, "max_tokens": 0, "echo": True, "logprobs": 1, "temperature": 0}
    if is_stream:
        chunks = list(client.completions.create(**options, stream=True, stream_options={"include_usage": True}))
        assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == CODE
        shown, finish_reason, usage = chunks[0].choices[0].logprobs, chunks[-2].choices[0].finish_reason, chunks[-1].usage
    else:
        answer = client.completions.create(**options)
        [choice] = answer.choices
        assert choice.text == CODE
        shown, finish_reason, usage = choice.logprobs, choice.finish_reason, answer.usage
    prompt = tokenizer.encode(CODE)
    _, metrics = library(prompt, prompt_logprobs=1, max_tokens=1)
    assert shown.token_logprobs[1:] == pytest.approx(values(metrics.prompt_logprobs), abs=1e-3)
    assert (finish_reason, usage.completion_tokens, usage.prompt_tokens) == ("length", 0, len(prompt))


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_prompt_logprobs_are_the_librarys(ask: Ask, library: Library, tokenizer: Tokenizer, path: str) -> None:
    prompt = tokenizer.encode_chat(CHAT) if "chat" in path else tokenizer.encode(CODE)
    shown = ask(path=path, prompt_logprobs=2)["prompt_logprobs"]
    _, metrics = library(prompt, "code", prompt_logprobs=2)
    assert shown[0] is None
    for entry, expected in zip(shown[1:], metrics.prompt_logprobs, strict=True):
        assert entry.keys() == {str(expected.token), *(str(token) for token, _ in expected.top)}
        assert next(iter(entry)) == str(expected.token)
        own = entry[str(expected.token)]
        assert own["rank"] == expected.rank
        assert own["logprob"] == pytest.approx(expected.logprob, abs=1e-3)
    if "chat" not in path:
        assert [next(iter(entry.values()))["decoded_token"] for entry in shown[1:]] == [
            tokenizer.decode([token]) for token in prompt[1:]
        ]


def test_prompt_logprobs_come_with_a_streams_first_piece(client: OpenAI, ask: Ask) -> None:
    options = {"model": "tiny", "prompt": CODE, "max_tokens": 8, "temperature": 0}
    chunks = list(client.completions.create(**options, stream=True, extra_body={"prompt_logprobs": 0}))
    shown = [chunk.choices[0].to_dict().get("prompt_logprobs") for chunk in chunks]
    assert shown[0] is not None
    assert [entry and entry.keys() for entry in shown[0]] == [
        entry and entry.keys() for entry in ask(prompt_logprobs=0)["prompt_logprobs"]
    ]
    assert not any(shown[1:])


def test_a_chats_prompt_is_scored_once_however_many_choices(http: httpx.Client) -> None:
    body = {"model": "tiny", "messages": CHAT, "max_tokens": 2, "n": 2, "prompt_logprobs": 0}
    answer = http.post("/v1/chat/completions", json=body).json()
    assert len(answer["prompt_logprobs"]) == answer["usage"]["prompt_tokens"]
    assert not any("prompt_logprobs" in choice for choice in answer["choices"])
    with http.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as response:
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: {")]
    shown = [chunk["prompt_logprobs"] for chunk in map(json.loads, lines) if "prompt_logprobs" in chunk]
    assert [[entry and entry.keys() for entry in part] for part in shown] == [
        [entry and entry.keys() for entry in answer["prompt_logprobs"]]
    ]


def test_a_choice_of_several_has_its_own_seed_and_logprobs(client: OpenAI, library: Library, tokenizer: Tokenizer) -> None:
    answer = client.completions.create(model="tiny", prompt=CODE, max_tokens=12, n=3, logprobs=0, **SAMPLED)
    for number, choice in enumerate(answer.choices):
        sampling = {**SAMPLED, "seed": SAMPLED["seed"] + number}
        tokens, metrics = library(tokenizer.encode(CODE), "generic", max_tokens=12, logprobs=0, **sampling)
        assert choice.text == tokenizer.decode(tokens)
        assert choice.logprobs.token_logprobs == pytest.approx(values(metrics.logprobs[0]), abs=1e-3)

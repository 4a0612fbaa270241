"""What a client can get wrong: each a clear 4xx in OpenAI's error body, and the server goes on."""

from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI

from specdecode.text import Tokenizer

DEF = Tokenizer("tiny/target").encode("def")[0]
GOOD = {"model": "tiny", "prompt": "a", "max_tokens": 2}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}

BAD_COMPLETIONS = [
    ({"model": "other"}, 404, "model"),
    ({"model": None}, 400, "model"),
    ({"prompt": ""}, 400, "prompt"),
    ({"prompt": []}, 400, "prompt"),
    ({"prompt": [[]]}, 400, "prompt"),
    ({"prompt": 5}, 400, "prompt"),
    ({"prompt": [4096]}, 400, "prompt"),
    ({"prompt": [-1]}, 400, "prompt"),
    ({"prompt": "a " * 3000}, 400, "prompt"),
    ({"prompt": ["a"] * 33}, 400, "n"),
    ({"max_tokens": 0}, 400, "max_tokens"),
    ({"max_tokens": -1, "echo": True}, 400, "max_tokens"),
    ({"max_tokens": 10**9}, 400, "max_tokens"),
    ({"max_tokens": "5"}, 400, "max_tokens"),
    ({"temperature": -0.1}, 400, "temperature"),
    ({"temperature": "hot"}, 400, "temperature"),
    ({"top_p": 0}, 400, "top_p"),
    ({"top_p": 1.5}, 400, "top_p"),
    ({"top_k": -2}, 400, "top_k"),
    ({"top_k": 10**30}, 400, "top_k"),
    ({"temperature": 1e300}, 400, "temperature"),
    ({"n": 0}, 400, "n"),
    ({"n": 1000}, 400, "n"),
    ({"seed": -(2**63) - 1}, 400, "seed"),
    ({"stop": [""]}, 400, "stop"),
    ({"unknown": 1}, 400, "unknown"),
    ({"unknown": None}, 400, "unknown"),
    ({"stream_options": {}}, 400, "stream_options"),
    ({"echo": 1}, 400, "echo"),
    ({"min_p": 1.5}, 400, "min_p"),
    ({"repetition_penalty": 0}, 400, "repetition_penalty"),
    ({"presence_penalty": 2.5}, 400, "presence_penalty"),
    ({"frequency_penalty": -2.5}, 400, "frequency_penalty"),
    ({"logit_bias": [5]}, 400, "logit_bias"),
    ({"logit_bias": {"five": 1}}, 400, "logit_bias"),
    ({"logit_bias": {"5": 101}}, 400, "logit_bias.5"),
    ({"logit_bias": {"4096": 1}}, 400, "logit_bias"),
    ({"logit_bias": {"-1": 1}}, 400, "logit_bias"),
    ({"logit_bias": {str(token): 1 for token in range(301)}}, 400, "logit_bias"),
    ({"allowed_token_ids": []}, 400, "allowed_token_ids"),
    ({"allowed_token_ids": [4096]}, 400, "allowed_token_ids"),
    ({"bad_words": "a"}, 400, "bad_words"),
    ({"bad_words": [""]}, 400, "bad_words.0"),
    ({"bad_words": ["a"] * 101}, 400, "bad_words"),
    ({"bad_words": ["def"], "allowed_token_ids": [DEF]}, 400, "bad_words"),
    ({"min_tokens": -1}, 400, "min_tokens"),
    ({"min_tokens": 3}, 400, "min_tokens"),
    ({"stop_token_ids": [4096]}, 400, "stop_token_ids"),
    ({"stop": ["a"] * 17}, 400, "stop"),
    ({"logprobs": 21}, 400, "logprobs"),
    ({"logprobs": True}, 400, "logprobs"),
    ({"prompt_logprobs": -1}, 400, "prompt_logprobs"),
    ({"top_logprobs": 2}, 400, "top_logprobs"),
    ({"speculative_decoding": {"verifier": "maybe"}}, 400, "speculative_decoding.verifier"),
    ({"speculative_decoding": {"draft": "nobody"}}, 400, "speculative_decoding.draft"),
    ({"speculative_decoding": {"K": -1}}, 400, "speculative_decoding.K"),
    ({"speculative_decoding": {"K": 17}}, 400, "speculative_decoding.K"),
    ({"speculative_decoding": {"k": 1}}, 400, "speculative_decoding.k"),
]

BAD_CHATS = [
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "robot", "content": "hi"}]}, "messages.0.role"),
    ({"messages": [{"role": "user"}]}, "messages.0.content"),
    ({"tools": []}, "tools"),
    ({"logprobs": 2}, "logprobs"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"echo": True}, "echo"),
    ({"messages": [{"role": "assistant", "tool_calls": []}]}, "messages.0.tool_calls"),
    ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": None}]}, "messages.1.content"),
]


def check_error(response: httpx.Response, status: int, param: str | None) -> None:
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (status, param), error
    assert error["type"] == "invalid_request_error"
    assert error["message"]
    assert "\n" not in error["message"]


@pytest.fixture(autouse=True)
def still_serves(http: httpx.Client) -> Any:
    yield
    assert http.post("/v1/completions", json=GOOD).status_code == 200


@pytest.mark.parametrize(("change", "status", "param"), BAD_COMPLETIONS, ids=[str(bad[0])[:50] for bad in BAD_COMPLETIONS])
def test_a_bad_completion_request(http: httpx.Client, change: dict[str, Any], status: int, param: str) -> None:
    check_error(http.post("/v1/completions", json={**GOOD, **change}), status, param)


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_bad_request_for_a_stream_still_has_its_status(http: httpx.Client, is_stream: bool) -> None:
    check_error(http.post("/v1/completions", json={**GOOD, "max_tokens": 10**9, "stream": is_stream}), 400, "max_tokens")


@pytest.mark.parametrize(("change", "param"), BAD_CHATS, ids=[str(bad[0])[:50] for bad in BAD_CHATS])
def test_a_bad_chat_request(http: httpx.Client, change: dict[str, Any], param: str) -> None:
    check_error(http.post("/v1/chat/completions", json={**CHAT, **change}), 400, param)


@pytest.mark.parametrize("content", [b"{", b"", b"[1]", b"\xff", b'{"model": '])
def test_a_body_that_is_no_json_object(http: httpx.Client, content: bytes) -> None:
    check_error(http.post("/v1/completions", content=content, headers={"content-type": "application/json"}), 400, None)


def test_a_body_that_is_too_large(http: httpx.Client) -> None:
    check_error(http.post("/v1/completions", json={**GOOD, "prompt": "a" * (5 << 20)}), 413, None)


def test_a_wrong_method_and_a_wrong_path(http: httpx.Client) -> None:
    check_error(http.get("/v1/completions"), 405, None)
    check_error(http.get("/v1/nothing"), 404, None)
    check_error(http.get("/v1/models/other"), 404, "model")


def test_the_openai_client_understands_our_errors(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="tiny", prompt="a", max_tokens=10**9)
    assert caught.value.param == "max_tokens"
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="other", prompt="a")
    assert missing.value.code == "model_not_found"

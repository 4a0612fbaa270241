"""Requests hold what OpenAI's and vLLM's hold, and a null is a default."""

from typing import Any

import pytest
from pydantic import ValidationError

from serve.schema import ChatRequest, CompletionRequest, GenerationRequest
from specdecode.decoding.sequence import SamplingParams

COMPLETION = {"model": "m", "prompt": "a"}
CHAT = {"model": "m", "messages": [{"role": "user", "content": "a"}]}
NOT_OVER_HTTP = {"bad_words_ids", "grammar", "verifier"}  # which have other names there


def test_every_sampling_parameter_is_a_field() -> None:
    assert SamplingParams.__dataclass_fields__.keys() - CompletionRequest.model_fields.keys() == NOT_OVER_HTTP
    assert SamplingParams.__dataclass_fields__.keys() - ChatRequest.model_fields.keys() == NOT_OVER_HTTP


@pytest.mark.parametrize(("kind", "body"), [(CompletionRequest, COMPLETION), (ChatRequest, CHAT)])
def test_null_is_the_default(kind: type[GenerationRequest], body: dict[str, Any]) -> None:
    assert kind.model_validate(dict.fromkeys(kind.model_fields) | body) == kind.model_validate(body)


@pytest.mark.parametrize("name", ["temperature", "min_p", "logit_bias"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_is_finite(name: str, value: float) -> None:
    with pytest.raises(ValidationError, match=name):
        CompletionRequest.model_validate({**COMPLETION, name: {"5": value} if name == "logit_bias" else value})


@pytest.mark.parametrize("key", ["", "a", "1.0", " 1", "1_0", "٣", "9" * 5000])
def test_a_bias_is_for_a_token_id(key: str) -> None:
    with pytest.raises(ValidationError, match="expected token ids as keys"):
        CompletionRequest.model_validate({**COMPLETION, "logit_bias": {key: 1}})


def test_how_many_logprobs_are_asked_for() -> None:
    completions = [CompletionRequest.model_validate({**COMPLETION, "logprobs": number}).num_logprobs for number in (None, 0, 3)]
    assert completions == [None, 0, 3]
    fields = [{}, {"logprobs": False}, {"logprobs": True}, {"logprobs": True, "top_logprobs": 3}]
    assert [ChatRequest.model_validate(CHAT | chat).num_logprobs for chat in fields] == [None, None, 0, 3]


def test_one_stop_string_is_several() -> None:
    assert CompletionRequest.model_validate({**COMPLETION, "stop": "a"}).stop_strings == ["a"]
    assert CompletionRequest.model_validate({**COMPLETION, "stop": ["a", "b"]}).stop_strings == ["a", "b"]

"""Answers in a given form, through the client that its users have."""

import json
import re
from typing import Annotated, Any, Literal

import httpx
import jsonschema
import openai
import pytest
from openai import OpenAI
from pydantic import BaseModel, ConfigDict, Field

from serve.trial import try_grammar
from specdecode.errors import RequestError
from specdecode.grammar import Grammar
from tests.serve.conftest import Library

CHAT: Any = [{"role": "user", "content": "Can I order a large latte please?"}]


class Order(BaseModel):
    model_config = ConfigDict(extra="forbid")

    size: Literal["small", "large"]
    count: Annotated[int, Field(ge=0, le=99)]
    is_hot: bool


SCHEMA = Order.model_json_schema()
FORMAT: Any = {"type": "json_schema", "json_schema": {"name": "order", "schema": SCHEMA, "strict": True}}
OPTIONS: dict[str, Any] = {"model": "tiny", "messages": CHAT, "max_tokens": 120, "response_format": FORMAT}


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 1.5, "seed": 4, "n": 3}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("draft", ["none", "chat"])
def test_every_answer_is_json_of_the_schema(client: OpenAI, draft: str, sampling: dict[str, Any]) -> None:
    body = {"speculative_decoding": {"draft": draft}}
    answer = client.chat.completions.create(**OPTIONS, **sampling, extra_body=body)
    assert len(answer.choices) == sampling.get("n", 1)
    for choice in answer.choices:
        assert choice.finish_reason == "stop"
        jsonschema.validate(json.loads(choice.message.content or ""), SCHEMA)


def test_a_stream_says_the_same_as_the_whole(client: OpenAI) -> None:
    whole = client.chat.completions.create(**OPTIONS, temperature=1, seed=1).choices[0]
    chunks = list(client.chat.completions.create(**OPTIONS, temperature=1, seed=1, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.message.content
    assert chunks[-1].choices[0].finish_reason == whole.finish_reason == "stop"


def test_the_clients_parser_gets_what_it_asks_for(client: OpenAI) -> None:
    parsed = client.chat.completions.parse(model="tiny", messages=CHAT, max_tokens=120, temperature=1, response_format=Order)
    assert isinstance(parsed.choices[0].message.parsed, Order)


def test_an_answer_that_is_cut_off_says_so(client: OpenAI) -> None:
    options = {**OPTIONS, "max_tokens": 4}
    assert client.chat.completions.create(**options, temperature=0).choices[0].finish_reason == "length"
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(model="tiny", messages=CHAT, max_tokens=4, response_format=Order)


def test_the_other_formats(client: OpenAI) -> None:
    free = client.completions.create(model="tiny", prompt="def f", max_tokens=8, temperature=0).choices[0].text
    body = {"response_format": {"type": "text"}}
    text = client.completions.create(model="tiny", prompt="def f", max_tokens=8, temperature=0, extra_body=body)
    assert text.choices[0].text == free
    answer = client.chat.completions.create(
        model="tiny", messages=CHAT, max_tokens=300, seed=2, response_format={"type": "json_object"}
    ).choices[0]
    if answer.finish_reason == "stop":
        assert isinstance(json.loads(answer.message.content or ""), dict)
    assert (answer.message.content or "").startswith("{")


@pytest.mark.parametrize(
    ("outputs", "pattern"),
    [
        ({"regex": "[a-c]{3}-[0-9]{1,4}!"}, "[a-c]{3}-[0-9]{1,4}!"),
        ({"choice": ["tea", "coffee, black"]}, "tea|coffee, black"),
        ({"json": {"type": "integer", "minimum": 10, "maximum": 12}}, "1[0-2]"),
        ({"json": '{"enum": ["x y"]}'}, '"x y"'),
        ({"grammar": 'start: "<" /[a-z]{1,5}/ ">"'}, "<[a-z]{1,5}>"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_vllms_formats(http: httpx.Client, outputs: dict[str, Any], pattern: str) -> None:
    body = {"model": "tiny", "prompt": "def f", "max_tokens": 60, "temperature": 1, "seed": 3, "structured_outputs": outputs}
    [choice] = http.post("/v1/completions", json=body).json()["choices"]
    assert re.fullmatch(pattern, choice["text"])


def test_the_server_answers_as_the_library_does(client: OpenAI, library: Library, tokenizer: Any) -> None:
    tokens = tokenizer.encode_chat(CHAT)
    grammar = Grammar.json_schema(SCHEMA)
    expected, _ = library(tokens, "chat", max_tokens=120, temperature=1.0, seed=9, grammar=grammar)
    answer = client.chat.completions.create(
        **OPTIONS, temperature=1, seed=9, extra_body={"speculative_decoding": {"draft": "chat"}}
    )
    assert answer.choices[0].message.content == tokenizer.decode(expected)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format"),
    ({"response_format": {"type": "json_object", "json_schema": {"name": "x", "schema": {}}}}, "response_format"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}}, "response_format.json_schema.name"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "x"}}}}, "response_format"),
    ({"response_format": {"type": "json_object"}, "min_tokens": 2}, "min_tokens"),
    ({"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}}, "structured_outputs"),
    ({"structured_outputs": {}}, "structured_outputs"),
    ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
    ({"structured_outputs": {"regex": "("}}, "structured_outputs"),
    ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
    ({"guided_json": {}}, "guided_json"),
]


@pytest.mark.parametrize(("fields", "param"), BAD, ids=[json.dumps(fields)[:60] for fields, _ in BAD])
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_done_is_refused(http: httpx.Client, fields: dict[str, Any], param: str, stream: bool) -> None:
    body = {"model": "tiny", "prompt": "a", "max_tokens": 4, "stream": stream, **fields}
    response = http.post("/v1/completions", json=body)
    error = response.json()["error"]
    assert (response.status_code, error["type"], error["param"]) == (400, "invalid_request_error", param), error
    assert error["message"].startswith(param)


def test_strict_refuses_what_cannot_be_enforced(http: httpx.Client) -> None:
    schema = {"type": "array", "items": {"enum": [1]}, "minItems": 2, "maxItems": 2, "uniqueItems": True}
    body = {"model": "tiny", "prompt": "a", "max_tokens": 60, "temperature": 0}
    for strict, status in ((True, 400), (False, 200)):
        wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": strict}}
        response = http.post("/v1/completions", json={**body, "response_format": wanted})
        assert response.status_code == status
    assert json.loads(response.json()["choices"][0]["text"]) == [1, 1]


def _chain(length: int) -> dict[str, Any]:
    """A schema each of whose definitions needs the next one."""
    links = {f"x{n}": {"type": "object", "properties": {"a": {"$ref": f"#/$defs/x{n + 1}"}}} for n in range(length)}
    return {"$defs": {**links, f"x{length}": {"type": "string"}}, "$ref": "#/$defs/x0"}


def test_a_grammar_that_would_end_the_server_is_refused(http: httpx.Client) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": _chain(3000)}}
    response = http.post("/v1/completions", json={"model": "tiny", "prompt": "a", "response_format": wanted})
    assert response.status_code == 400
    assert "less complex" in response.json()["error"]["message"]
    assert http.get("/health").status_code == 200


def test_a_trial_tells_grammars_that_are_too_complex_from_others() -> None:
    try_grammar(Grammar.json_schema(_chain(20)))
    try_grammar(Grammar("regex", "("))  # a mistake is found later
    rules = "\n".join(f"r{number}: r{number + 1}" for number in range(20_000))
    with pytest.raises(RequestError, match="less complex"):
        try_grammar(Grammar("lark", f'start: r0\n{rules}\nr20000: "a"'))

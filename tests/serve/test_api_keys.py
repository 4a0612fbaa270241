"""With keys configured the door is shut to everybody else, and the keys are nowhere to be read; and requests have names."""

import asyncio
import hashlib
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from openai import AsyncOpenAI, AuthenticationError

from serve.config import RouterConfig
from serve.errors import ApiKeyError
from serve.generation import TargetInfo
from serve.keys import ApiKeys
from serve.reader import Defaults, Reader
from serve.schema import ChatRequest, CompletionRequest
from specdecode.decoding.sequence import Route
from specdecode.errors import ConfigError, RequestError
from specdecode.text import Tokenizer
from tests.serve.inprocess import BODY, FakeTarget, routed
from tests.serve.serving import field, small_config

KEY, OTHER = "sk-first-0123456789", "sk-second-abcdefgh"


@pytest.fixture
def key_file(tmp_path: Path) -> str:
    file = tmp_path / "keys.txt"
    file.write_text(f"# of the team\n\n{KEY}\n  {OTHER}  \n")
    return str(file)


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_keys_come_from_a_file_and_from_the_environment(key_file: str) -> None:
    config = RouterConfig(api_keys_file=key_file, api_keys_env="KEYS")
    keys = ApiKeys.load(config, {"KEYS": "sk-third\n"})
    for key in (KEY, OTHER, "sk-third"):
        keys.check(f"Bearer {key}")
        keys.check(f"bearer {key} ")
    assert len(keys.digests) == 3


def test_a_source_may_hold_digests_in_place_of_keys(tmp_path: Path) -> None:
    file = tmp_path / "digests.txt"
    digest = hashlib.sha256(KEY.encode()).hexdigest()
    file.write_text(f"sha256:{digest}\n")
    keys = ApiKeys.load(RouterConfig(api_keys_file=str(file)), {})
    keys.check(f"Bearer {KEY}")
    for wrong in (digest, f"sha256:{digest}", OTHER):
        with pytest.raises(ApiKeyError):
            keys.check(f"Bearer {wrong}")


def test_without_a_source_the_door_is_open() -> None:
    ApiKeys.load(RouterConfig(), {}).check(None)


@pytest.mark.parametrize(
    "header", [None, "", KEY, "Bearer", "Bearer ", f"Basic {KEY}", "Bearer # of the team", f"Bearer {KEY}x", "Bearer é"]
)
def test_nothing_else_opens_it(key_file: str, header: str | None) -> None:
    keys = ApiKeys.load(RouterConfig(api_keys_file=key_file), {})
    with pytest.raises(ApiKeyError):
        keys.check(header)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"api_keys_env": "KEYS"}, "router.api_keys_env: environment variable KEYS: expected at least one API key"),
        ({"api_keys_env": "EMPTY"}, "router.api_keys_env: environment variable EMPTY: expected at least one API key"),
        ({"api_keys_file": "missing.txt"}, "router.api_keys_file: missing.txt cannot be read: No such file"),
        ({"api_keys_file": "comments.txt"}, "router.api_keys_file: comments.txt: expected at least one API key"),
    ],
)
def test_a_source_without_a_key_is_a_mistake(
    config: dict[str, str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("comments.txt").write_text("# nothing\n\n")
    with pytest.raises(ConfigError) as caught:
        ApiKeys.load(RouterConfig(**config), {"EMPTY": " \n# nothing"})
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_the_command_says_so_before_anything_is_started(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(yaml.safe_dump(small_config(lambda args: args["router"].update(api_keys_env="NO_SUCH_VARIABLE"))))
    command = [sys.executable, "-m", "specdecode.cli", "serve", "--config", str(file)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert ended.stderr.startswith("specdecode: router.api_keys_env: environment variable NO_SUCH_VARIABLE")
    assert ended.stderr.count("\n") == 1


def test_who_has_no_key_gets_openais_401(key_file: str) -> None:
    async def run() -> None:
        target = FakeTarget()
        async with routed(target, api_keys_file=key_file) as (client, _):
            assert (await client.get("/health")).status_code == 200
            for headers in ({}, bearer("wrong"), {"Authorization": KEY}):
                for response in (
                    await client.post("/v1/completions", json=BODY, headers=headers),
                    await client.post("/v1/completions", json={**BODY, "stream": True}, headers=headers),
                    await client.get("/v1/models", headers=headers),
                    await client.get("/openapi.json", headers=headers),
                    await client.get("/nothing", headers=headers),
                    await client.get("/health/../v1/models", headers=headers),
                ):
                    error = response.json()["error"]
                    assert (response.status_code, error["code"]) == (401, "invalid_api_key")
                    assert error["type"] == "invalid_request_error"
                    assert response.headers["www-authenticate"] == "Bearer"
                    assert KEY not in response.text
            assert not target.asked
            for key in (KEY, OTHER):
                assert (await client.post("/v1/completions", json=BODY, headers=bearer(key))).status_code == 200
                streamed = await client.post("/v1/completions", json={**BODY, "stream": True}, headers=bearer(key))
                assert streamed.text.endswith("data: [DONE]\n\n")

    asyncio.run(run())


def test_the_openai_client_bears_its_key(key_file: str) -> None:
    async def run() -> None:
        async with routed(FakeTarget(), api_keys_file=key_file) as (http, _):
            options: dict[str, Any] = {"base_url": "http://router/v1", "http_client": http, "max_retries": 0}
            answer = await AsyncOpenAI(api_key=KEY, **options).completions.create(model="tiny", prompt="def", max_tokens=8)
            assert answer.usage is not None
            assert answer.usage.completion_tokens == 8
            stream = await AsyncOpenAI(api_key=KEY, **options).completions.create(model="tiny", prompt="def", stream=True)
            assert len([chunk async for chunk in stream]) > 8
            with pytest.raises(AuthenticationError) as caught:
                await AsyncOpenAI(api_key="wrong", **options).completions.create(model="tiny", prompt="def")
            assert caught.value.code == "invalid_api_key"

    asyncio.run(run())


def test_keys_and_prompts_are_in_no_log_error_or_representation(key_file: str, caplog: pytest.LogCaptureFixture) -> None:
    serve_logger = logging.getLogger("ray.serve")
    serve_logger.addHandler(caplog.handler)
    caplog.set_level(logging.DEBUG)

    async def run() -> str:
        async with routed(FakeTarget(), api_keys_file=key_file) as (client, router):
            body = {**BODY, "prompt": "a secret prompt"}
            texts = [
                (await client.post("/v1/completions", json=body, headers=bearer(KEY))).text,
                (await client.post("/v1/completions", json={**body, "max_tokens": 10**6}, headers=bearer(KEY))).text,
                (await client.post("/v1/completions", json=body, headers=bearer("sk-mistyped"))).text,
            ]
            return repr(texts) + repr(vars(router)) + repr(router._keys)

    try:
        shown = asyncio.run(run()) + caplog.text
    finally:
        serve_logger.removeHandler(caplog.handler)
    for secret in (KEY, OTHER, "sk-mistyped", "a secret prompt"):
        assert secret not in shown
    assert caplog.text.count("request id=") == 3


def test_a_request_has_a_name_everywhere(caplog: pytest.LogCaptureFixture) -> None:
    serve_logger = logging.getLogger("ray.serve")
    serve_logger.addHandler(caplog.handler)
    caplog.set_level(logging.INFO)

    async def run() -> tuple[FakeTarget, list[httpx.Response]]:
        target = FakeTarget()
        async with routed(target) as (client, _):
            named = await client.post("/v1/completions", json={**BODY, "n": 2}, headers={"X-Request-Id": "mine"})
            nameless = await client.post("/v1/completions", json=BODY)
            refused = await client.post("/v1/completions", json={**BODY, "n": 0}, headers={"X-Request-Id": "bad name\tno=1"})
            streamed = await client.post("/v1/completions", json={**BODY, "stream": True}, headers={"X-Request-Id": "s" * 500})
        return target, [named, nameless, refused, streamed]

    try:
        target, (named, nameless, refused, _) = asyncio.run(run())
    finally:
        serve_logger.removeHandler(caplog.handler)
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("request id=")]
    fresh = nameless.headers["x-request-id"]
    assert [generation.id for generation in target.asked] == ["mine-0", "mine-1", f"{fresh}-0", "s" * 64 + "-0"]
    assert named.json()["id"] == "cmpl-mine"
    assert nameless.json()["id"] == f"cmpl-{fresh}"
    assert refused.status_code == 400
    assert [field(line, "id") for line in lines] == ["mine", fresh, "bad_name_no_1", "s" * 64]
    assert [field(line, "status") for line in lines] == ["200", "200", "400", "200"]
    assert [field(line, "tokens") for line in lines] == ["16", "8", "0", "8"]
    assert [field(line, "choices") for line in lines] == ["2", "1", "0", "1"]
    assert {field(line, "route") for line in lines} == {"/v1/completions"}
    assert {field(line, "error") for line in lines} == {"-"}
    assert all(float(field(line, "ttft_ms")) <= float(field(line, "duration_ms")) for line in lines[:2])


def test_each_choice_has_a_seed_of_its_own_that_is_not_in_its_parameters() -> None:
    async def run() -> FakeTarget:
        target = FakeTarget()
        async with routed(target) as (client, _):
            await client.post("/v1/completions", json={**BODY, "n": 2})
            await client.post("/v1/completions", json={**BODY, "seed": 5})
        return target

    first, second, seeded = asyncio.run(run()).asked
    assert first.params.seed is second.params.seed is None
    assert None not in (first.seed, second.seed)
    assert first.seed != second.seed
    assert seeded.params.seed == seeded.sequence().seed == 5


LIMITS: list[tuple[dict[str, Any], str]] = [
    ({"prompt": [1] * 6}, "prompt: expected at most 5 tokens, got 6"),
    ({"prompt": ["a"] * 33}, "n: expected at most 32 generations, got 33"),
    ({"stop": ["a" * 11]}, "stop: expected at most 10 characters each, got 11"),
    ({"bad_words": ["a" * 11]}, "bad_words: expected at most 10 characters each, got 11"),
    ({"allowed_token_ids": [1] * 4097}, "allowed_token_ids: expected at most 4096 tokens, got 4097"),
    ({"stop_token_ids": [1] * 4097}, "stop_token_ids: expected at most 4096 tokens, got 4097"),
]


@pytest.mark.parametrize(("fields", "message"), LIMITS, ids=[limit[1] for limit in LIMITS])
def test_what_a_request_may_hold_at_the_most(tokenizer: Tokenizer, fields: dict[str, Any], message: str) -> None:
    config = RouterConfig(max_prompt_tokens=5, max_stop_length=10)
    reader = Reader(tokenizer, TargetInfo(2048, 4096), [], Defaults(Route(), "rejection"), config)
    with pytest.raises(RequestError) as caught:
        reader.completion(CompletionRequest.model_validate({"model": "m", "prompt": [1], **fields}))
    assert str(caught.value) == message


def test_a_chat_has_the_same_limits(tokenizer: Tokenizer) -> None:
    reader = Reader(tokenizer, TargetInfo(2048, 4096), [], Defaults(Route(), "rejection"), RouterConfig(max_prompt_tokens=5))
    body = {"model": "m", "messages": [{"role": "user", "content": "word " * 50}]}
    with pytest.raises(RequestError, match="prompt: expected at most 5 tokens"):
        reader.chat(ChatRequest.model_validate(body))

"""The server describes itself without help from any other host, and web pages call it only where that is configured."""

import asyncio
import re
from typing import Any

import httpx
import pytest

from serve.description import version
from tests.serve.inprocess import BODY, FakeTarget, routed

PAGE = "https://chat.example.org"


def get(path: str, **config: Any) -> httpx.Response:
    async def run() -> httpx.Response:
        async with routed(FakeTarget(), **config) as (client, _):
            return await client.get(path)

    return asyncio.run(run())


def test_the_page_needs_no_other_host_and_no_script() -> None:
    page = get("/docs").text
    assert "/v1/chat/completions" in page
    assert "speculative_decoding" in page
    assert not re.search(r"(src|href)=[\"']?(https?:)?//|<script|@import|url\(", page)


def test_the_description_names_the_errors_that_there_are_and_no_others() -> None:
    paths = get("/openapi.json").json()["paths"]
    answers = paths["/v1/chat/completions"]["post"]["responses"].keys()
    assert answers == {"200", "400", "401", "404", "413", "429", "503", "504"}
    assert "422" not in str(paths)


def test_a_field_that_may_be_left_out_may_be_null_in_the_description() -> None:
    schemas = get("/openapi.json").json()["components"]["schemas"]
    for name in ("CompletionRequest", "ChatRequest", "Message"):
        schema = schemas[name]
        for field, kind in schema["properties"].items():
            assert ({"type": "null"} in kind.get("anyOf", [])) is (field not in schema["required"]), (name, field)


def test_the_version_is_told() -> None:
    assert get("/version").json() == {"version": version()}


@pytest.mark.parametrize("origins", [[], [PAGE]])
def test_only_configured_pages_may_call(origins: list[str]) -> None:
    async def run() -> tuple[httpx.Response, httpx.Response, httpx.Response]:
        async with routed(FakeTarget(), cors_origins=origins) as (client, _):
            asked = {"Origin": PAGE, "Access-Control-Request-Method": "POST"}
            preflight = await client.options("/v1/completions", headers=asked)
            answer = await client.post("/v1/completions", json=BODY, headers={"Origin": PAGE})
            strange = await client.post("/v1/completions", json=BODY, headers={"Origin": "https://other.example.org"})
            return preflight, answer, strange

    preflight, answer, strange = asyncio.run(run())
    assert answer.status_code == strange.status_code == 200
    expected = PAGE if origins else None
    assert preflight.headers.get("access-control-allow-origin") == expected
    assert answer.headers.get("access-control-allow-origin") == expected
    assert "access-control-allow-origin" not in strange.headers


def test_a_browser_may_ask_before_it_shows_its_key(tmp_path: Any) -> None:
    keys = tmp_path / "keys"
    keys.write_text("sk-a\n")

    async def run() -> httpx.Response:
        async with routed(FakeTarget(), cors_origins=["*"], api_keys_file=str(keys)) as (client, _):
            asked = {"Origin": PAGE, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
            return await client.options("/v1/completions", headers=asked)

    assert asyncio.run(run()).status_code == 200

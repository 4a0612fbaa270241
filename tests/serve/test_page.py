"""The page asks the API as any client does: with its key, and with its errors; and it opens nothing else."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from serve.answer import Answer
from serve.config import RouterConfig
from serve.inside import InsideTransport
from serve.page import EXAMPLES, PATH
from serve.race import Question, race
from specdecode.config import check_config
from specdecode.errors import ConfigError
from tests.serve.inprocess import FakeTarget, routed

QUESTION = Question("tiny", "def", False, "code", 4, "rejection", 0.0, 8)
KEY = "sk-page-0123456789"


@asynccontextmanager
async def asking(target: FakeTarget, **config: object) -> AsyncIterator[httpx.AsyncClient]:
    """A client as the page has one, of a router before the target."""
    async with routed(target, **config) as (_, router):
        transport = InsideTransport(router.__serve_build_asgi_app__())
        async with httpx.AsyncClient(transport=transport, base_url="http://inside") as client:
            while (await client.get("/health")).status_code != 200:
                await asyncio.sleep(0.01)
            yield client


async def ask(client: httpx.AsyncClient, question: Question, **options: bool) -> tuple[Answer, Answer]:
    return [answers async for answers in race(client, question, **options)][-1]


def run(target: FakeTarget, work: Callable[[httpx.AsyncClient], Awaitable[None]], **config: object) -> None:
    async def inside() -> None:
        async with asking(target, **config) as client:
            await work(client)

    asyncio.run(inside())


@pytest.mark.parametrize("is_chat", [False, True])
@pytest.mark.parametrize("in_turns", [False, True])
def test_both_answers_come_to_their_end(is_chat: bool, in_turns: bool) -> None:
    async def work(client: httpx.AsyncClient) -> None:
        plain, speculative = await ask(client, replace(QUESTION, is_chat=is_chat), in_turns=in_turns)
        assert plain.is_done and speculative.is_done
        assert (plain.num_tokens, plain.num_drafted, plain.drafters) == (8, 0, [])
        assert (speculative.num_drafted, speculative.num_accepted) == (32, 8)
        assert {span.kind for span in speculative.spans} == {"accepted", "corrected"}
        assert speculative.figures and speculative.figures["draft"] == "code"

    run(FakeTarget(drafter="code"), work)


def test_an_answer_is_seen_before_it_has_ended() -> None:
    async def work(client: httpx.AsyncClient) -> None:
        seen = [(plain.num_tokens, plain.is_done) async for plain, _ in race(client, QUESTION)]
        assert any(0 < num_tokens < 8 and not is_done for num_tokens, is_done in seen)

    run(FakeTarget(0.03, drafter="code"), work)


def test_whoever_leaves_ends_both_generations() -> None:
    target = FakeTarget(0.02, drafter="code")

    async def work(client: httpx.AsyncClient) -> None:
        looking = race(client, replace(QUESTION, max_tokens=2000))
        async for plain, speculative in looking:
            if plain.num_tokens and speculative.num_tokens:
                break
        assert target.num_open == 2
        await looking.aclose()
        assert target.num_open == 0

    run(target, work)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"draft": "absent"}, "speculative_decoding.draft: expected one of"),
        ({"k": 99}, "speculative_decoding.K: expected at most 16, got 99"),
        ({"max_tokens": 9000}, "this model's maximum context length is 2048 tokens"),
        ({"model": "other"}, "model 'other' is not served here"),
        ({"verifier": "no"}, "speculative_decoding.verifier: "),
    ],
)
def test_what_the_api_refuses_is_said_in_its_words(changed: dict[str, object], message: str) -> None:
    async def work(client: httpx.AsyncClient) -> None:
        _, speculative = await ask(client, replace(QUESTION, **changed))
        assert speculative.error and message in speculative.error
        assert "\n" not in speculative.error

    run(FakeTarget(), work)


@pytest.mark.parametrize(("key", "error"), [("", "no API key"), ("wrong", "not valid"), (KEY, None)])
def test_no_answer_without_a_key_where_one_is_asked_for(tmp_path: Path, key: str, error: str | None) -> None:
    file = tmp_path / "keys"
    file.write_text(KEY)

    async def work(client: httpx.AsyncClient) -> None:
        for answer in await ask(client, replace(QUESTION, key=key)):
            assert (answer.error is None) if error is None else (answer.error and error in answer.error and not answer.text)
        assert (await client.post("/v1/completions", json={})).status_code == 401
        assert (await client.get(f"{PATH}/")).status_code == 200

    run(FakeTarget(), work, api_keys_file=str(file), demo=True)


SHUT = (
    ("GET", "/gradio_api/file=/etc/passwd"),
    ("POST", "/gradio_api/upload"),
    ("GET", "/gradio_api/proxy=http://127.0.0.1/"),
    ("POST", "/gradio_api/run/predict"),
    ("GET", "/gradio_api/runs"),
    ("GET", "/monitoring"),
    ("GET", "/docs"),
    ("GET", "/openapi.json"),
    ("GET", "/gradio_api/startup-events/../upload"),
)


def test_what_gradio_offers_beside_the_page_is_shut() -> None:
    async def work(client: httpx.AsyncClient) -> None:
        statuses = {path: (await client.request(method, f"{PATH}{path}")).status_code for method, path in SHUT}
        assert statuses == dict.fromkeys(statuses, 404)

    run(FakeTarget(), work, demo=True)


def test_the_page_is_there_only_where_it_is_asked_for() -> None:
    async def without(client: httpx.AsyncClient) -> None:
        assert (await client.get(f"{PATH}/")).status_code == 404

    async def with_it(client: httpx.AsyncClient) -> None:
        redirected = await client.get(PATH)
        assert (redirected.status_code, redirected.headers["location"]) == (307, f"{PATH}/")
        text = (await client.get(f"{PATH}/")).text
        assert all(example.title in text for example in EXAMPLES)
        assert (await client.get("/v1/models")).status_code == 200

    run(FakeTarget(), without)
    run(FakeTarget(), with_it, demo=True)


@pytest.mark.parametrize(
    "deployment", [{"num_replicas": 2}, {"num_replicas": "auto"}, {"autoscaling_config": {"max_replicas": 2}}]
)
def test_a_page_takes_a_router_of_one_replica(deployment: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="demo: expected a router of one replica"):
        check_config({"demo": True, "deployment": deployment}, RouterConfig, where="router")

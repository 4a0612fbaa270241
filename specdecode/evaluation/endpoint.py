"""A request in, when each part of its answer came out: a client of any endpoint that speaks OpenAI's API."""

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, Literal

import httpx

from specdecode.errors import ConfigError

Path = Literal["/completions", "/chat/completions"]

# Many servers close a connection that is idle for 5 s, and a request that is sent at that moment fails by no fault of theirs.
_KEEP_OPEN_S = 2.0
_CONNECT_S = 10.0
_MAX_SAID = 300  # of an error


class BadAnswerError(Exception):
    """An answer that is none: an error, or one that ends before its end."""


@dataclass(frozen=True)
class Question:
    """A request, but for what is the same in all."""

    path: Path
    body: dict[str, Any]


@dataclass(frozen=True)
class Answer:
    """When a stream's parts came, on the clock of `time.perf_counter`, and how long it was.

    Attributes:
        chunk_s: when each chunk with text came.
        ended_s: when the last choice came, with its reason to end.
        num_prompt_tokens, num_tokens: as the endpoint counts them.
    """

    chunk_s: list[float]
    ended_s: float
    num_prompt_tokens: int
    num_tokens: int


@dataclass(frozen=True)
class Endpoint:
    """Where requests go.

    Attributes:
        url: with the version, such as http://127.0.0.1:8000/v1.
        http: the client.
        key_name: the environment variable that its API key comes from, if it has one.
        model: which one is asked.
        body: fields of every request.
        timeout_s: for an answer to its end.
    """

    url: str
    http: httpx.AsyncClient
    key_name: str | None
    model: str | None
    body: dict[str, Any]
    timeout_s: float

    @staticmethod
    @asynccontextmanager
    async def open(
        url: str, key_name: str | None, model: str | None, body: dict[str, Any], timeout_s: float
    ) -> "AsyncIterator[Endpoint]":
        """Has connections to the endpoint until the block ends.

        Raises:
            ConfigError: it is not there, refuses the key, or has no such model; or there is no key.
        """
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=_KEEP_OPEN_S)
        timeout = httpx.Timeout(timeout_s, connect=min(timeout_s, _CONNECT_S))
        async with httpx.AsyncClient(headers=_headers(key_name), timeout=timeout, limits=limits) as http:
            endpoint = Endpoint(url.rstrip("/"), http, key_name, model, body, timeout_s)
            yield replace(endpoint, model=await endpoint._known_model())

    async def ask(self, question: Question) -> Answer:
        """Streams an answer to its end.

        Raises:
            BadAnswerError: there is none.
        """
        body = {"model": self.model, "stream": True, "stream_options": {"include_usage": True}}
        request = self.http.build_request("POST", self.url + question.path, json={**body, **question.body, **self.body})
        try:
            return await asyncio.wait_for(self._stream(request), self.timeout_s)
        except asyncio.TimeoutError as error:
            raise BadAnswerError(f"no end after {self.timeout_s:g} s") from error
        except httpx.HTTPError as error:
            raise BadAnswerError(f"{type(error).__name__}: {error}".rstrip(": ")) from error

    async def _stream(self, request: httpx.Request) -> Answer:
        response = await self.http.send(request, stream=True)
        try:
            if response.status_code != httpx.codes.OK:
                raise BadAnswerError(f"{response.status_code}: {_said(await response.aread())}")
            return await _timed(events(response.aiter_lines()))
        finally:
            await response.aclose()

    async def _known_model(self) -> str:
        """The model that is asked: the one that is named, or the only one that there is."""
        response = await self._models()
        if response.status_code in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
            key = "wants an API key: set api_key_env" if self.key_name is None else f"refuses the API key in {self.key_name}"
            raise ConfigError(f"{self.url} {key} ({response.status_code}: {_said(response.content)})")
        try:
            models = [str(card["id"]) for card in response.raise_for_status().json()["data"]]
        except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
            said = f"{response.status_code}: {_said(response.content)}"
            raise ConfigError(
                f"url: expected an endpoint with {self.url}/models, such as http://127.0.0.1:8000/v1, got {said}"
            ) from error
        if self.model is None and len(models) == 1:
            return models[0]
        if self.model not in models:
            raise ConfigError(f"model: expected one of {', '.join(models)} of {self.url}, got {self.model}")
        assert self.model is not None
        return self.model

    async def _models(self) -> httpx.Response:
        try:
            return await self.http.get(f"{self.url}/models")
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise ConfigError(f"url: {self.url} cannot be reached: {str(error) or type(error).__name__}") from error


async def events(lines: AsyncIterator[str]) -> AsyncIterator[dict[str, Any]]:
    """The events of a stream, from its lines.

    Raises:
        BadAnswerError: one of them is an error or rubbish, or the stream ends without saying so.
    """
    is_done = False
    async for line in lines:  # to their end, without which a connection cannot be used again
        name, _, data = line.partition(":")
        if name != "data" or is_done:  # a comment, another field, or the line between two events
            continue
        if data.strip() == "[DONE]":
            is_done = True
        else:
            yield _event(data.strip())
    if not is_done:
        raise BadAnswerError("the stream ended before its end")


def _event(data: str) -> dict[str, Any]:
    try:
        event = json.loads(data)
    except ValueError as error:
        raise BadAnswerError(f"an event that is no JSON: {data[:_MAX_SAID]}") from error
    if not isinstance(event, dict):
        raise BadAnswerError(f"an event that is no object: {data[:_MAX_SAID]}")
    if "error" in event:
        raise BadAnswerError(f"an error in the stream: {event['error']}")
    return event


async def _timed(stream: AsyncIterator[dict[str, Any]]) -> Answer:
    chunk_s: list[float] = []
    ended_s, usage = 0.0, None
    try:
        async for event in stream:
            if event.get("choices"):
                ended_s = time.perf_counter()
                if any(map(_has_text, event["choices"])):
                    chunk_s.append(ended_s)
            usage = event.get("usage") or usage
        if usage is None:
            raise BadAnswerError("a stream without its usage, by which tokens are counted")
        num_prompt_tokens, num_tokens = int(usage["prompt_tokens"]), int(usage["completion_tokens"])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise BadAnswerError(f"an event that is not OpenAI's: {error!r}") from error
    if not ended_s or num_tokens < 1:
        raise BadAnswerError("an answer of no tokens")
    return Answer(chunk_s or [ended_s], ended_s, num_prompt_tokens, num_tokens)  # some tokens have no text


def _has_text(choice: dict[str, Any]) -> bool:
    """Whether a choice says something: in a completion, a chat, or what a model thinks before it answers."""
    delta = choice.get("delta") or {}
    said = (choice.get("text"), delta.get("content"), delta.get("reasoning_content"), delta.get("reasoning"))
    return any(said)


def _headers(key_name: str | None) -> dict[str, str]:
    if key_name is None:
        return {}
    key = os.environ.get(key_name)
    if not key:
        raise ConfigError(f"api_key_env: expected an API key in the environment variable {key_name}, which is not set")
    return {"Authorization": f"Bearer {key}"}


def _said(content: bytes) -> str:
    """What an error's body says, in one line."""
    text = content.decode(errors="replace")
    with suppress(ValueError, KeyError, TypeError):
        text = json.loads(text)["error"]["message"]
    return " ".join(str(text).split())[:_MAX_SAID]

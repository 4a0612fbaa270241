"""A question in, two answers to it out as they grow: the target's alone, and the same with a draft. Knows no page."""

import asyncio
import json
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

import httpx

from serve.answer import Answer
from serve.schema import NO_DRAFT

_FRAME_S = 0.06  # what comes sooner after the last look is shown together


@dataclass(frozen=True)
class Question:
    """What is asked.

    Attributes:
        model: the model's name over HTTP.
        prompt: the text to go on from, or the user's message.
        is_chat: whether it is a message.
        draft: who drafts for the second answer.
        k, verifier: as in `speculative_decoding`.
        temperature, max_tokens: of both.
        key: the API key, if one is needed.
    """

    model: str
    prompt: str
    is_chat: bool
    draft: str
    k: int
    verifier: str
    temperature: float
    max_tokens: int
    key: str = ""

    @property
    def path(self) -> str:
        """The endpoint."""
        return "/v1/chat/completions" if self.is_chat else "/v1/completions"

    def body(self, draft: str) -> dict[str, Any]:
        """The request for an answer with this draft."""
        asked = {"messages": [{"role": "user", "content": self.prompt}]} if self.is_chat else {"prompt": self.prompt}
        return {
            "model": self.model,
            **asked,
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
            "stream": True,
            "speculative_decoding": {"draft": draft, "K": self.k, "verifier": self.verifier, "rounds": True},
        }


async def race(
    client: httpx.AsyncClient, question: Question, *, in_turns: bool = False
) -> AsyncGenerator[tuple[Answer, Answer], None]:
    """Yields the plain and the speculative answer whenever there is more of one; to close it ends both."""
    answers, changed = (Answer(), Answer()), asyncio.Event()
    places = asyncio.Semaphore(1 if in_turns else len(answers))
    tasks = [
        asyncio.create_task(_listen(client, question, draft, answer, places, changed))
        for draft, answer in zip((NO_DRAFT, question.draft), answers, strict=True)
    ]
    try:
        while not all(task.done() for task in tasks):
            await changed.wait()
            changed.clear()
            yield answers
            await asyncio.wait(tasks, timeout=_FRAME_S)
        await asyncio.gather(*tasks)
        yield answers
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _listen(
    client: httpx.AsyncClient, question: Question, draft: str, answer: Answer, places: asyncio.Semaphore, changed: asyncio.Event
) -> None:
    """Fills an answer from its stream, once there is a place; what the API refuses is part of it."""
    headers = {"Authorization": f"Bearer {question.key}"} if question.key else {}
    try:
        async with places:
            started = time.perf_counter()
            async with client.stream("POST", question.path, json=question.body(draft), headers=headers) as response:
                if response.is_error:
                    answer.add(json.loads(await response.aread()), 0.0)
                    return
                async for line in response.aiter_lines():
                    if line.startswith("data: {"):
                        answer.add(json.loads(line.removeprefix("data: ")), time.perf_counter() - started)
                        changed.set()
    finally:
        answer.is_done = True
        changed.set()

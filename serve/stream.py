"""Pieces of answers in, server-sent events out."""

import json
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from serve.access import Access
from serve.choice import Choice
from serve.envelope import Envelope
from serve.errors import describe_error
from serve.schema import Usage
from serve.transcript import Piece


class EventStream(StreamingResponse):
    """Server-sent events; when the client leaves, their source is closed at once, and not when it is found to be garbage."""

    def __init__(self, events: AsyncGenerator[str, None]) -> None:
        super().__init__(events, media_type="text/event-stream")
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the ASGI specification."""
        async with aclosing(self._events):
            await super().__call__(scope, receive, send)


async def events(
    pieces: AsyncGenerator[list[tuple[Choice, Piece]], None],
    choices: list[Choice],
    usage: Callable[[], Usage] | None,
    envelope: Envelope,
    access: Access,
) -> AsyncGenerator[str, None]:
    """The server-sent events of a stream, at its end the usage if it is asked for, or an error body."""
    access.error = "cancelled"  # unless it comes to an end
    async with aclosing(pieces):
        for choice in choices:
            if opening := envelope.opening(choice):
                yield _event(opening)
        try:
            async for ready in pieces:  # in one message, whose way to the client costs more than what is in it
                yield "".join(_event(envelope.chunk(choice, piece)) for choice, piece in ready)
        except Exception as error:
            _, described = describe_error(error)
            access.error = described.error.code or described.error.type
            yield _event(described.model_dump())
            return
        access.error = None
        if usage is not None:
            yield _event(envelope.closing(usage()))
        yield "data: [DONE]\n\n"


async def chain(
    first: list[tuple[Choice, Piece]], rest: AsyncGenerator[list[tuple[Choice, Piece]], None]
) -> AsyncGenerator[list[tuple[Choice, Piece]], None]:
    """Puts what came first before the rest again."""
    async with aclosing(rest):
        yield first
        async for ready in rest:
            yield ready


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"

"""Requests to an ASGI application in the same process, streamed: it meets them as it meets those of any client."""

import asyncio
from collections.abc import AsyncIterator
from contextvars import Context

import httpx
from starlette.types import ASGIApp, Message


class InsideTransport(httpx.AsyncBaseTransport):
    """Carries requests of an `httpx.AsyncClient` to an application; unlike httpx's own, each part of an answer as it comes.

    Args:
        app: the application.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """See httpx."""
        call = _Call(self._app, _scope(request), await request.aread())
        status, headers = await call.start()
        return httpx.Response(status, headers=headers, stream=call)


class _Call(httpx.AsyncByteStream):
    """One request, and the body of its answer; to close it is to leave as a client leaves."""

    def __init__(self, app: ASGIApp, scope: dict[str, object], body: bytes) -> None:
        self._body: bytes | None = body
        self._messages: asyncio.Queue[Message | None] = asyncio.Queue()
        # A context of its own: what runs in one of Serve's is counted to the request that it belongs to.
        self._task: asyncio.Task[None] = Context().run(asyncio.create_task, self._run(app, scope))

    async def _run(self, app: ASGIApp, scope: dict[str, object]) -> None:
        try:
            await app(scope, self._receive, self._messages.put)
        finally:
            self._messages.put_nowait(None)

    async def _receive(self) -> Message:
        if self._body is None:
            await asyncio.Event().wait()  # whoever leaves cancels
        body, self._body = self._body, None
        return {"type": "http.request", "body": body, "more_body": False}

    async def start(self) -> tuple[int, list[tuple[bytes, bytes]]]:
        """Waits for the answer's status and headers."""
        try:
            message = await self._messages.get()
        except BaseException:
            await self.aclose()
            raise
        if message is None:
            await self._task  # raises what went wrong
            raise httpx.RemoteProtocolError("no answer")
        return message["status"], message["headers"]

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while (message := await self._messages.get()) is not None:
            yield message.get("body", b"")

    async def aclose(self) -> None:
        """See httpx."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


def _scope(request: httpx.Request) -> dict[str, object]:
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": request.method,
        "scheme": request.url.scheme,
        "path": request.url.path,
        "raw_path": request.url.raw_path,
        "query_string": request.url.query,
        "root_path": "",
        "headers": [(name.lower(), value) for name, value in request.headers.raw],
        "client": ("127.0.0.1", 0),
        "server": (request.url.host, request.url.port or 80),
    }

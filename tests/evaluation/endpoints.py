"""An OpenAI endpoint of a test's own on the loopback interface, as slow as it is told to be, and with any trouble."""

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass
class FakeEndpoint:
    """What it does, and what it was asked.

    Attributes:
        first_s, gap_s: until the first chunk, and from one to the next.
        num_chunks, tokens_per_chunk: of an answer.
        key: the API key that it wants.
        models: what it has.
        at_once: how many requests it answers at a time; the others wait.
        heard: bodies of the requests for answers, each with its path, arrival and `num_running`, itself included.
    """

    first_s: float = 0.0
    gap_s: float = 0.0
    num_chunks: int = 4
    tokens_per_chunk: int = 2
    key: str | None = None
    models: tuple[str, ...] = ("fake",)
    at_once: int = 1000
    url: str = ""
    heard: list[dict[str, Any]] = field(default_factory=list)
    num_connections: int = 0

    @contextmanager
    def serving(self) -> "Iterator[FakeEndpoint]":
        """Serves in a thread until the block ends."""
        loop, ready = asyncio.new_event_loop(), threading.Event()
        stop = asyncio.Event()

        async def serve() -> None:
            self._free, self._num_running = asyncio.Semaphore(self.at_once), 0
            server = await asyncio.start_server(self._connection, "127.0.0.1", 0)
            self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
            ready.set()
            await stop.wait()
            server.close()
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)

        thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
        thread.start()
        assert ready.wait(10)
        try:
            yield self
        finally:
            loop.call_soon_threadsafe(stop.set)
            thread.join()
            loop.close()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                await self._request(head.decode(), reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _request(self, head: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        arrived = time.perf_counter()
        line, *lines = head.strip().split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        path = line.split()[1]
        body = json.loads(await reader.readexactly(int(headers.get("content-length", 0))) or "{}")
        if self.key is not None and headers.get("authorization") != f"Bearer {self.key}":
            return _whole(writer, "401 Unauthorized", {"error": {"message": "Incorrect API key provided."}})
        if path == "/v1/models":
            return _whole(writer, "200 OK", {"object": "list", "data": [{"id": model} for model in self.models]})
        if path not in ("/v1/completions", "/v1/chat/completions"):
            return _whole(writer, "404 Not Found", "no such page")
        self._num_running += 1
        self.heard.append({"path": path, "arrived": arrived, "num_running": self._num_running, **body})
        try:
            async with self._free:
                await self._answer(path, body, writer)
        finally:
            self._num_running -= 1

    async def _answer(self, path: str, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        trouble = body.get("trouble")
        if trouble == "refuse":
            return _whole(writer, "429 Too Many Requests", {"error": {"message": "The queue\nis full."}})
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        async for line in self._lines(path, trouble):
            data = f"{line}\n\n".encode()
            writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
            await writer.drain()
        if trouble == "cut":
            writer.transport.abort()
        writer.write(b"0\r\n\r\n")
        return None

    async def _lines(self, path: str, trouble: str | None) -> AsyncIterator[str]:
        yield ": a comment"
        if path.startswith("/v1/chat"):
            yield _event([{"delta": {"role": "assistant", "content": ""}, "finish_reason": None}])
        await asyncio.sleep(60 if trouble == "hang" else self.first_s)
        for number in range(self.num_chunks):
            await asyncio.sleep(self.gap_s if number else 0)
            yield _event([{"delta": {"content": "word "}} if path.startswith("/v1/chat") else {"text": "word "}])
            if trouble in ("cut", "end"):
                return
            if trouble == "rubbish":
                yield "data: {rubbish"
            if trouble == "list":
                yield "data: []"
            if trouble == "error":
                yield 'data: {"error": {"message": "out of memory"}}'
        yield _event([{"delta": {}, "text": "", "finish_reason": "length"}])
        num_tokens = 0 if trouble == "nothing" else self.num_chunks * self.tokens_per_chunk
        usage: dict[str, Any] | None = {"prompt_tokens": 7, "completion_tokens": num_tokens}
        if trouble == "strange":
            usage = {"tokens": 1}
        if trouble != "uncounted":
            yield _event([], usage)
        yield "data: [DONE]"


def _event(choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> str:
    return "data: " + json.dumps({"choices": choices, "usage": usage})


def _whole(writer: asyncio.StreamWriter, status: str, body: Any) -> None:
    content = json.dumps(body).encode()
    writer.write(f"HTTP/1.1 {status}\r\nContent-Length: {len(content)}\r\n\r\n".encode() + content)

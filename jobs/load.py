"""Questions in, what became of each request out: clients that ask a server all the time, and compare its answers."""

import asyncio
import json
import socket
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Literal, TextIO

import h11
import httpx
import numpy as np

from jobs.requests import Answer, Question
from specdecode.evaluation.endpoint import BadAnswerError, events

Outcome = Literal["right", "wrong", "failed", "refused", "cut", "left"]

_TIMEOUT_S = 120.0
_RETRY_S = 0.05
_SLOW_READ_S = 0.05


@dataclass
class Attempt:
    """One request, and what became of it.

    Attributes:
        id: its name in all logs.
        form: its kind.
        started, ended: on the clock of `time.time`.
        faults: those that it met, by number.
        outcome: refused: asked to come again later; cut: its connection ended with its router; left: its client did.
        detail: what was wrong.
        num_events: how many events of its stream were read.
        num_drafted: how many tokens were drafted for it.
        k: how many were to be drafted in a round.
    """

    id: str
    form: str
    started: float
    ended: float = 0.0
    faults: list[int] = field(default_factory=list)
    outcome: Outcome = "failed"
    detail: str = ""
    num_events: int = 0
    num_drafted: int = 0
    k: int | None = None


@dataclass
class Heard:
    """What an answer has said so far, for each of its choices."""

    texts: list[str]
    finish_reasons: list[str | None]
    logprobs: list[list[float]]
    rounds: list[list[tuple[int, str]]]
    figures: list[dict[str, Any]] = field(default_factory=list)

    @staticmethod
    def nothing(num_choices: int) -> "Heard":
        """Before the first word."""
        return Heard(
            [""] * num_choices, [None] * num_choices, [[] for _ in range(num_choices)], [[] for _ in range(num_choices)]
        )

    def add(self, body: dict[str, Any]) -> None:
        """Hears an event, or a whole answer."""
        extension = body.get("speculative_decoding", {})
        for choice in body["choices"]:
            self._add_choice(choice, extension)
        if "num_draft_tokens" in extension:
            self.figures.append(extension)

    def _add_choice(self, choice: dict[str, Any], extension: dict[str, Any]) -> None:
        index = choice["index"]
        said = choice.get("delta") or choice.get("message") or {"content": choice.get("text")}
        self.texts[index] += said.get("content") or ""
        self.finish_reasons[index] = choice["finish_reason"] or self.finish_reasons[index]
        logprobs = choice.get("logprobs") or {}
        self.logprobs[index] += logprobs.get("token_logprobs") or [entry["logprob"] for entry in logprobs.get("content", [])]
        if "round" in extension:
            self.rounds[index].append((extension["round"]["num_draft_tokens"], self.texts[index]))

    def answers(self) -> list[Answer]:
        """All that was said."""
        rows = zip(self.texts, self.finish_reasons, self.logprobs, self.rounds, strict=True)
        return [Answer(text, reason, logprobs, rounds) for text, reason, logprobs, rounds in rows]


class SlowConnection:
    """A connection to a server that can be read as slowly as one likes: its receive buffer is the smallest there is.

    Args:
        connection: a connected socket that does not block.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._http = h11.Connection(h11.CLIENT)

    @staticmethod
    @asynccontextmanager
    async def open(url: str) -> "AsyncIterator[SlowConnection]":
        """Connects, and ends the connection at the end."""
        address = httpx.URL(url)
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
            connection.setblocking(False)
            await asyncio.get_running_loop().sock_connect(connection, (address.host, address.port))
            yield SlowConnection(connection)

    async def post(self, path: str, body: dict[str, Any], headers: dict[str, str]) -> tuple[int, dict[str, str]]:
        """Sends a request; returns the status and the headers of the answer."""
        content = json.dumps(body).encode()
        fields = {"Host": "localhost", "Content-Type": "application/json", "Content-Length": str(len(content)), **headers}
        events = [h11.Request(method="POST", target=path, headers=list(fields.items())), h11.Data(content), h11.EndOfMessage()]
        for event in events:
            await asyncio.get_running_loop().sock_sendall(self._socket, self._http.send(event) or b"")
        response = await self._next()
        if not isinstance(response, h11.Response):
            raise BadAnswerError(f"expected an answer, got {response!r}")
        return response.status_code, {name.decode().lower(): value.decode() for name, value in response.headers}

    async def dawdle(self, duration_s: float) -> None:
        """Reads a byte now and then for so long."""
        end = time.monotonic() + duration_s
        while time.monotonic() < end:
            self._http.receive_data(await asyncio.get_running_loop().sock_recv(self._socket, 1))
            await asyncio.sleep(_SLOW_READ_S)

    async def body(self) -> AsyncIterator[bytes]:
        """The rest of the answer."""
        while not isinstance(event := await self._next(), h11.EndOfMessage):
            yield bytes(event.data)

    async def _next(self) -> Any:
        try:
            while (event := self._http.next_event()) is h11.NEED_DATA:
                data = await asyncio.wait_for(asyncio.get_running_loop().sock_recv(self._socket, 1 << 16), _TIMEOUT_S)
                self._http.receive_data(data)
        except h11.RemoteProtocolError as error:
            raise BadAnswerError(f"the connection ended: {error}") from error
        return event


async def _lines(parts: AsyncIterator[bytes]) -> AsyncIterator[str]:
    left = b""
    async for part in parts:
        *whole, left = (left + part).split(b"\n")
        for line in whole:
            yield line.decode()


def _whole(question: Question, content: bytes) -> Heard:
    heard = Heard.nothing(len(question.answers))
    heard.add(json.loads(content))
    return heard


def _judge(attempt: Attempt, question: Question, heard: Heard) -> None:
    """Notes whether an answer that has come to its end is right."""
    difference = question.difference(heard.answers())
    attempt.outcome, attempt.detail = ("right", "") if difference is None else ("wrong", difference)
    attempt.num_drafted = sum(figures["num_draft_tokens"] for figures in heard.figures)
    attempt.k = heard.figures[0]["K"] if heard.figures else None


class Load:
    """Clients that ask one question after the other.

    Args:
        url: of the server.
        questions: what may be asked.
        concurrency: how many clients there are.
        seed: what they ask, and when they leave, follows from it.
        record: is given every request that is over.
        leave_rate: the share of the streams that their client leaves in the middle.
    """

    def __init__(
        self,
        url: str,
        questions: list[Question],
        concurrency: int,
        seed: int,
        record: Callable[[Attempt], None],
        leave_rate: float = 0.0,
    ) -> None:
        self.questions = questions
        self.running: dict[str, Attempt] = {}
        self.fault: int | None = None  # the one that is going on
        self.cutting: set[int] = set()  # the faults that end connections
        self.without: set[str] = set()  # drafts that are not asked for
        self._url = url
        self._concurrency = concurrency
        self._rng = np.random.default_rng(seed)
        self._record = record
        self._leave_rate = leave_rate
        self._may_ask = asyncio.Event()
        self._is_over = False
        self._num_asked = 0
        self._clients: list[asyncio.Task[None]] = []
        self._http = httpx.AsyncClient(
            base_url=url, timeout=_TIMEOUT_S, limits=httpx.Limits(max_connections=None, max_keepalive_connections=0)
        )

    def begin(self) -> None:
        """Has the clients begin, or go on."""
        self._may_ask.set()
        if not self._clients:
            self._clients = [asyncio.create_task(self._client()) for _ in range(self._concurrency)]

    async def pause(self) -> None:
        """Has the clients stop when they have their answers, and waits for that."""
        self._may_ask.clear()
        while self.running:
            await asyncio.sleep(0.01)

    async def end(self) -> None:
        """Has the clients go."""
        self._is_over = True
        self._may_ask.set()
        await asyncio.gather(*self._clients)
        await self._http.aclose()

    def strike(self, number: int, *, cuts: bool) -> None:
        """Notes that a fault begins; all that runs now or begins until `recover` has met it."""
        self.fault = number
        if cuts:
            self.cutting.add(number)
        for attempt in self.running.values():
            attempt.faults.append(number)

    def recover(self) -> None:
        """Notes that the fault is over."""
        self.fault = None

    async def ask(self, question: Question, leave_after: int | None = None, slow_s: float = 0.0) -> Attempt:
        """Asks until there is an answer.

        Args:
            question: what to ask.
            leave_after: after so many events of a stream the client leaves.
            slow_s: for so long it reads next to nothing of it.
        """
        while (attempt := await self.ask_once(question, leave_after, slow_s)).outcome in ("refused", "cut"):
            await asyncio.sleep(_RETRY_S)
        return attempt

    async def ask_once(self, question: Question, leave_after: int | None = None, slow_s: float = 0.0) -> Attempt:
        """The same, but for asking again."""
        send = (
            partial(self._send_slowly, question=question, slow_s=slow_s)
            if slow_s
            else partial(self._send, question=question, leave_after=leave_after)
        )
        attempt = await self._try(question, send)
        self._record(attempt)
        return attempt

    async def _client(self) -> None:
        while True:
            await self._may_ask.wait()
            if self._is_over:
                return
            questions = [question for question in self.questions if question.form.draft not in self.without]
            question = questions[self._rng.integers(len(questions))]
            leaves = question.body["stream"] and self._rng.random() < self._leave_rate
            await self.ask(question, int(self._rng.integers(1, 12)) if leaves else None)

    async def _try(self, question: Question, send: Callable[[Attempt], Coroutine[Any, Any, None]]) -> Attempt:
        self._num_asked += 1
        attempt = Attempt(f"load-{self._num_asked}", question.form.name, time.time())
        if self.fault is not None:
            attempt.faults.append(self.fault)
        self.running[attempt.id] = attempt
        try:
            await send(attempt)
        except BadAnswerError as error:
            attempt.outcome, attempt.detail = "failed", str(error)
        except httpx.HTTPError as error:
            is_cut = isinstance(error, httpx.TransportError) and not isinstance(error, httpx.TimeoutException)
            attempt.outcome = "cut" if is_cut and self.cutting.intersection(attempt.faults) else "failed"
            attempt.detail = repr(error)
        finally:
            attempt.ended = time.time()
            del self.running[attempt.id]
        return attempt

    async def _send(self, attempt: Attempt, question: Question, leave_after: int | None) -> None:
        request = self._http.build_request("POST", question.path, json=question.body, headers={"X-Request-Id": attempt.id})
        response = await self._http.send(request, stream=True)
        try:
            if response.status_code != httpx.codes.OK:
                self._refused(response.status_code, response.headers, await response.aread(), attempt)
                return
            if not question.body["stream"]:
                _judge(attempt, question, _whole(question, await response.aread()))
                return
            heard = Heard.nothing(len(question.answers))
            async for event in events(response.aiter_lines()):
                heard.add(event)
                attempt.num_events += 1
                if attempt.num_events == leave_after:
                    attempt.outcome = "left"
                    return
            _judge(attempt, question, heard)
        finally:
            with suppress(httpx.HTTPError):
                await response.aclose()

    async def _send_slowly(self, attempt: Attempt, question: Question, slow_s: float) -> None:
        async with SlowConnection.open(self._url) as connection:
            status, headers = await connection.post(question.path, question.body, {"X-Request-Id": attempt.id})
            if status != httpx.codes.OK:
                self._refused(status, headers, b"".join([part async for part in connection.body()]), attempt)
                return
            await connection.dawdle(slow_s)
            heard = Heard.nothing(len(question.answers))
            async for event in events(_lines(connection.body())):
                heard.add(event)
                attempt.num_events += 1
            _judge(attempt, question, heard)

    def _refused(self, status: int, headers: Mapping[str, str], content: bytes, attempt: Attempt) -> None:
        """An answer that is none yet, or none at all."""
        body = content.decode(errors="replace")[:300]
        attempt.detail = f"{status}: {body}"
        if status == httpx.codes.TOO_MANY_REQUESTS and "retry-after" in headers:
            attempt.outcome = "refused"
        elif httpx.codes.is_server_error(status) and '"error"' not in body and self.cutting.intersection(attempt.faults):
            attempt.outcome = "cut"  # it is Serve's proxy who says so, and not a router


class Records:
    """A file of JSON lines, one for each thing that happened."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def add(self, kind: str, thing: Any) -> None:
        """Writes a dataclass down."""
        print(json.dumps({"kind": kind, **asdict(thing)}, ensure_ascii=False), file=self._file, flush=True)

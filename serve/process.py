"""An object in a process of its own: here its methods are called and its streams heard, there `serve.host` has it.

An interpreter runs one thread at a time. An engine that shared it with what Ray Serve does would wait for that in every
operation of torch; as a process it tells of its rounds now and then, whatever goes on here.
"""

import asyncio
import itertools
import logging
import os
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from typing import Any

from serve.host import ERROR, ITEM, LOG, START, Reply

logger = logging.getLogger("ray.serve")


class Process:
    """Makes an object elsewhere, and calls it. On an event loop.

    What the other process logs is logged here. It ends with this one.

    Args:
        make: the object's class or function, which the other process imports.
        *args: its arguments; they travel by pickle, as do all that come later.
        on_end: is told why the other process has ended before `close`, after whoever waits for it.
    """

    def __init__(self, make: Callable[..., object], *args: Any, on_end: Callable[[str], None]) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "serve.host", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
        self._connection = Connection(ours.detach())
        self._on_end = on_end
        self._loop = asyncio.get_running_loop()
        self._numbers = itertools.count(START + 1)
        self._waiting: dict[int, asyncio.Queue[Reply]] = {START: asyncio.Queue()}
        self._is_closed = False
        self._ending: ChildProcessError | None = None
        self._connection.send((make, args))
        threading.Thread(target=self._listen, name="replies", daemon=True).start()

    @property
    def pid(self) -> int:
        """The other process."""
        return self._process.pid

    async def started(self) -> None:
        """Waits until the object is made; raises what that has raised."""
        _value_of(await self._waiting[START].get())
        del self._waiting[START]

    async def call(self, method: str, *args: Any) -> Any:
        """What the object's coroutine returns; raises what it raises; to be cancelled cancels it.

        Raises:
            ChildProcessError: the other process has ended.
        """
        with self._ask(method, args) as replies:
            return _value_of(await replies.get())

    async def stream(self, method: str, *args: Any) -> AsyncGenerator[Any, None]:
        """The items of one of its asynchronous generators; raises what it raises; to leave closes it.

        Raises:
            ChildProcessError: the other process has ended.
        """
        with self._ask(method, args) as replies:
            while (reply := await replies.get()).kind == ITEM:
                yield reply.value
            _value_of(reply)

    def close(self) -> None:
        """Ends the other process."""
        self._is_closed = True
        self._process.terminate()
        self._process.wait()

    @contextmanager
    def _ask(self, method: str, args: tuple[Any, ...]) -> Iterator[asyncio.Queue[Reply]]:
        """Begins a call, and ends it if it is not over by then."""
        number = next(self._numbers)
        replies = self._waiting[number] = asyncio.Queue()
        if self._ending is not None:
            replies.put_nowait(Reply(number, ERROR, self._ending))
        self._send((number, method, args))
        try:
            yield replies
        finally:
            del self._waiting[number]
            self._send((number, None, ()))

    def _send(self, message: tuple[int, str | None, tuple[Any, ...]]) -> None:
        with suppress(OSError):  # it has ended, which whoever waits is told
            self._connection.send(message)

    def _listen(self) -> None:
        with suppress(RuntimeError):  # the loop is closed, and nobody waits any more
            while (replies := self._receive()) is not None:
                self._loop.call_soon_threadsafe(self._hand_out, replies)
            self._loop.call_soon_threadsafe(self._lose, self._process.wait())

    def _receive(self) -> list[Reply] | None:
        try:
            replies: list[Reply] = self._connection.recv()
        except (EOFError, OSError):
            return None
        except Exception:  # whatever there may be in it: what follows cannot be read either
            logger.exception("process %d has said what cannot be read", self.pid)
            self._process.kill()
            return None
        return replies

    def _hand_out(self, replies: list[Reply]) -> None:
        for reply in replies:
            if reply.kind == LOG:
                logging.getLogger(reply.value.name).handle(reply.value)
            elif reply.number in self._waiting:
                self._waiting[reply.number].put_nowait(reply)

    def _lose(self, status: int) -> None:
        self._ending = ChildProcessError(f"process {self.pid} has ended with status {status}")
        for number, replies in self._waiting.items():
            replies.put_nowait(Reply(number, ERROR, self._ending))
        if not self._is_closed:
            self._on_end(str(self._ending))


def end_replica(reason: str) -> None:
    """Ends this process. It is replaced then, and what it did is taken up elsewhere; an error would go to the clients."""
    logger.error("the model is lost, and this replica with it: %s", reason)
    os._exit(1)


def _value_of(reply: Reply) -> Any:
    if reply.kind == ERROR:
        raise reply.value
    return reply.value

"""The other end of `serve.process`: calls in, what the object answers out, as much as there is at a time.

Run as a program, with the number of the socket that it was started with. It ends with whoever holds the other end.
"""

import asyncio
import logging
import logging.handlers
import os
import pickle
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import aclosing, contextmanager
from multiprocessing.connection import Connection
from typing import Any, Literal, NamedTuple

START = 0  # the number under which the object is made
ITEM: Literal["item"] = "item"
RESULT: Literal["result"] = "result"
ERROR: Literal["error"] = "error"
LOG: Literal["log"] = "log"


class Reply(NamedTuple):
    """What the object says: an item, the result or an error of the call of this number, or a record for the log."""

    number: int
    kind: Literal["item", "result", "error", "log"]
    value: Any


class Host:
    """Has one object, and does with it what comes over the connection.

    Args:
        connection: to a `Process`.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._replies: queue.SimpleQueue[Reply] = queue.SimpleQueue()
        self._tasks: dict[int, asyncio.Task[None]] = {}
        threading.Thread(target=self._send, name="replies", daemon=True).start()

    def log(self, *names: str) -> None:
        """Has what these loggers are told from now on logged at the other end."""
        handler = _Forwarding(self._replies)
        for name in names:
            logger = logging.getLogger(name)
            logger.setLevel(logging.INFO)
            logger.addHandler(handler)
            logger.propagate = False

    async def serve(self, make: Callable[..., object], args: tuple[Any, ...]) -> None:
        """Makes the object, and calls it for ever."""
        loop = asyncio.get_running_loop()
        threading.Thread(target=self._listen, args=(loop,), name="calls", daemon=True).start()
        try:
            self._object = make(*args)
        except Exception as error:  # is told to whoever wants it
            self._replies.put(Reply(START, ERROR, _portable(error)))
        else:
            self._replies.put(Reply(START, RESULT, None))
        await asyncio.Event().wait()

    def _listen(self, loop: asyncio.AbstractEventLoop) -> None:
        with _ending():  # at once: nobody is there any more, and a pass may take long
            while True:
                loop.call_soon_threadsafe(self._take, *self._connection.recv())

    def _take(self, number: int, method: str | None, args: tuple[Any, ...]) -> None:
        """Begins a call, or ends it where there is no method."""
        if method is not None:
            self._tasks[number] = asyncio.create_task(self._call(number, method, args))
        elif number in self._tasks:
            self._tasks[number].cancel()

    async def _call(self, number: int, method: str, args: tuple[Any, ...]) -> None:
        try:
            called = getattr(self._object, method)(*args)
            if asyncio.iscoroutine(called):
                result = await called
            else:
                result = None
                async with aclosing(called) as items:
                    async for item in items:
                        self._replies.put(Reply(number, ITEM, item))
        except Exception as error:  # is told to whoever called
            self._replies.put(Reply(number, ERROR, _portable(error)))
        else:
            self._replies.put(Reply(number, RESULT, result))
        finally:
            del self._tasks[number]

    def _send(self) -> None:
        with _ending():
            while True:
                replies = [self._replies.get()]
                while not self._replies.empty():
                    replies.append(self._replies.get())
                self._connection.send(replies)


class _Forwarding(logging.handlers.QueueHandler):
    """Sends records to the other end."""

    def __init__(self, replies: "queue.SimpleQueue[Reply]") -> None:
        super().__init__(replies)
        self._replies = replies

    def enqueue(self, record: logging.LogRecord) -> None:
        """See `QueueHandler.enqueue`."""
        self._replies.put(Reply(START, LOG, record))


@contextmanager
def _ending() -> Iterator[None]:
    """Ends this process when the connection ends, or one of its two threads does by mistake: somebody would wait for ever."""
    try:
        yield
    except (EOFError, OSError):
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def _portable(error: Exception) -> Exception:
    """The error, or where it does not survive the way one that says the same."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever an exception's own methods may raise
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def main() -> None:
    """Serves one object."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: whoever started this decides when it ends
    connection = Connection(int(sys.argv[1]))
    host = Host(connection)
    host.log("ray.serve", "specdecode")
    make, args = connection.recv()
    asyncio.run(host.serve(make, args))


if __name__ == "__main__":
    from serve import host  # so that its classes are those that the other end imports

    host.main()

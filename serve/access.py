"""Requests in, one log line for each out: who asked is not in it, and neither is what."""

import logging
import math
import re
import time
import uuid
from dataclasses import dataclass, field

from ray.exceptions import TaskCancelledError
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.choice import Choice
from serve.metrics import Metrics, count_request

logger = logging.getLogger("ray.serve")

_ID_HEADER = "x-request-id"
_MAX_ID_LENGTH = 64
# Serve's proxy keeps to the same header, and its answer is not OpenAI's: ours must come before it.
_TIMEOUT_HEADER = "x-request-timeout-seconds"
_HEAD_START, _MAX_HEAD_START_S = 0.1, 0.25
_QUIET_ROUTES = {"/health"}


@dataclass
class Access:
    """What became of one request, as far as it is known.

    Attributes:
        id: names the request in all logs.
        timeout_s: how long the client waits; None for as long as it takes.
        choices: its generations.
        error: the code of what went wrong after the answer had begun.
    """

    id: str
    timeout_s: float | None = None
    choices: list[Choice] = field(default_factory=list)
    error: str | None = None

    @staticmethod
    def of(scope: Scope) -> "Access":
        """That of a request that has come through `AccessLog`."""
        access: Access = scope["state"]["access"]
        return access

    def line(self, route: str, status: int, duration_s: float) -> str:
        """The log line, as key=value."""
        metrics = [choice.metrics for choice in self.choices]
        first_s = [m.time_to_first_token_s for m in metrics if m.num_target_passes]
        fields = {
            "id": self.id,
            "route": route,
            "status": status,
            "error": self.error or "-",
            "choices": len(metrics),
            "prompt_tokens": sum(len(choice.generation.tokens) for choice in self.choices),
            "tokens": sum(m.num_generated for m in metrics),
            "draft": (self.choices[0].generation.route.drafter or "none") if self.choices else "-",
            "drafted_by": ",".join(f"{name}:{found.num_drafts}" for m in metrics for name, found in m.verdicts.items()) or "-",
            "ttft_ms": f"{1e3 * min(first_s):.1f}" if first_s else "-",
            "duration_ms": f"{1e3 * duration_s:.1f}",
            "resumptions": sum(choice.num_resumptions for choice in self.choices),
        }
        return "request " + " ".join(f"{name}={value}" for name, value in fields.items())


class AccessLog:
    """ASGI middleware that names each request, and writes its line when it has ended, however it did.

    The name is the client's `X-Request-Id` where that is one, and stands in the answer's headers.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the ASGI specification."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        headers = Headers(scope=scope)
        given = headers.get(_ID_HEADER)
        access = Access(_request_id(given), _timeout_s(headers.get(_TIMEOUT_HEADER)))
        scope.setdefault("state", {})["access"] = access
        status = 499  # unless an answer begins, the client has left

        async def named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if given is None:  # else Serve's proxy, which gives one to each request, adds it to the answer itself
                    MutableHeaders(scope=message)[_ID_HEADER] = access.id
            await send(message)

        async def received() -> Message:
            try:
                return await receive()
            except TaskCancelledError:  # which is how it ends at times in Serve when the client has left
                return {"type": "http.disconnect"}

        try:
            await self._app(scope, received, named)
        except Exception:
            status = 500 if status == 499 else status  # the answer comes from further out
            raise
        except BaseException:
            access.error = "cancelled"
            raise
        finally:
            route = getattr(scope.get("route"), "path", "unknown")
            if route not in _QUIET_ROUTES:
                duration_s = time.perf_counter() - started
                logger.info(access.line(route, status, duration_s))
                count_request(self._metrics, access, status, duration_s)


def _request_id(given: str | None) -> str:
    """A name that is fit for logs: at the most as long as another, and of plain characters."""
    return re.sub(r"[^A-Za-z0-9._:-]", "_", given)[:_MAX_ID_LENGTH] if given else uuid.uuid4().hex


def _timeout_s(given: str | None) -> float | None:
    """How long we may take so that the client has an answer in the time it waits; like Serve, takes nonsense for no limit."""
    try:
        timeout_s = float(given or "nan")
    except ValueError:
        return None
    if not math.isfinite(timeout_s) or timeout_s <= 0:
        return None
    return timeout_s - min(_HEAD_START * timeout_s, _MAX_HEAD_START_S)

"""Exceptions in, OpenAI's error bodies out: the one place where an HTTP status is chosen."""

import logging
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.schema import UNSUPPORTED, ErrorBody, ErrorDetail
from specdecode.errors import OverloadedError, RequestError

logger = logging.getLogger("ray.serve")

RETRY_AFTER_S = 1
_HEADERS = {
    401: {"WWW-Authenticate": "Bearer"},
    429: {"Retry-After": str(RETRY_AFTER_S)},
    503: {"Retry-After": str(RETRY_AFTER_S)},
}
_HTTP_NAMES = {"bad_words_ids": "bad_words"}  # what the decoder calls otherwise than the request


class UnknownModelError(RequestError):
    """A request names a model that is not served here."""


class ContextLengthError(RequestError):
    """A prompt and its answer are longer than the model's context."""


class ApiKeyError(Exception):
    """A request bears no valid key."""


class UnavailableError(Exception):
    """There is no target, now; trying again later helps."""


class DeadlineError(Exception):
    """A request took longer than it may.

    Args:
        timeout_s: how long that is.
    """

    def __init__(self, timeout_s: float) -> None:
        super().__init__(f"the request took longer than {timeout_s:g} s, and was cancelled")


_EXPECTED = (
    RequestValidationError,
    StarletteHTTPException,
    RequestError,
    OverloadedError,
    BackPressureError,
    UnavailableError,
    DeploymentUnavailableError,
    DeadlineError,
)


def describe_error(error: Exception) -> tuple[int, ErrorBody]:
    """Chooses the status and the body for whatever went wrong with a request."""
    match error:
        case UnknownModelError():
            return 404, _body(str(error), "invalid_request_error", error.param, "model_not_found")
        case ContextLengthError():
            return 400, _body(str(error), "invalid_request_error", error.param, "context_length_exceeded")
        case RequestError():
            return 400, _refusal(error)
        case RequestValidationError():
            return 400, _invalid_body(error)
        case StarletteHTTPException():
            return error.status_code, _body(str(error.detail), "invalid_request_error")
        case OverloadedError() | BackPressureError():
            return 429, _body(str(error), "rate_limit_error", code="overloaded")
        case ApiKeyError():
            return 401, _body(str(error), "invalid_request_error", code="invalid_api_key")
        case DeploymentUnavailableError():
            return 503, _body("the model could not be deployed", "server_error", code="unavailable")
        case UnavailableError():
            return 503, _body(str(error), "server_error", code="unavailable")
        case DeadlineError():
            return 504, _body(str(error), "server_error", code="timeout")
        case _:
            logger.error("a request failed", exc_info=error)
            return 500, _body("internal error: see the server's log", "server_error")


def error_response(error: Exception) -> JSONResponse:
    """The whole HTTP answer to a request that failed."""
    status, body = describe_error(error)
    headers = _HEADERS.get(status) or getattr(error, "headers", None)
    return JSONResponse(body.model_dump(), status, headers)


def install_error_handlers(app: FastAPI) -> None:
    """Makes every error of the app an OpenAI error body."""

    async def handle(_: Request, error: Exception) -> JSONResponse:
        return error_response(error)

    for kind in _EXPECTED:
        app.add_exception_handler(kind, handle)
    app.add_exception_handler(Exception, handle)  # which Starlette raises once more after the answer, for the log


class BodyLimit:
    """ASGI middleware that refuses a request body of more than `max_bytes`, before it is read whole."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the ASGI specification."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        num_read = 0

        async def limited() -> Message:
            nonlocal num_read
            message = await receive()
            num_read += len(message.get("body", b""))
            if num_read > self._max_bytes:
                raise HTTPException(413, f"the request's body exceeds {self._max_bytes} bytes")
            return message

        await self._app(scope, limited, send)


def _invalid_body(error: RequestValidationError) -> ErrorBody:
    field = error.errors()[0]["loc"][:2]
    # Of a union's members the one that fits best is the one in which something deeper is wrong.
    first = max((each for each in error.errors() if each["loc"][:2] == field), key=lambda each: len(each["loc"]))
    if isinstance(cause := first.get("ctx", {}).get("error"), RequestError):  # a check of several fields names one itself
        return _refusal(cause)
    # pydantic names the member of a union, such as list[str], as if it were a field.
    path = [str(part) for part in first["loc"] if part not in ("body", "str") and "[" not in str(part)]
    if first["type"] == "json_invalid":
        return _body(f"the request's body is not valid JSON: {first['ctx']['error']}", "invalid_request_error")
    unknown = "not supported here" if first["loc"][-1] in UNSUPPORTED else "unknown field"
    expected = {"extra_forbidden": unknown, "missing": "missing"}.get(first["type"], first["msg"])
    expected = expected.removeprefix("Value error, ")
    got = "" if first["type"] == "missing" else f", got {_shorten(first['input'])}"
    return _body(f"{'.'.join(path) or 'body'}: {expected}{got}", "invalid_request_error", ".".join(path) or None)


def _refusal(error: RequestError) -> ErrorBody:
    message, param = str(error), error.param
    for name, http_name in _HTTP_NAMES.items():
        message, param = message.replace(name, http_name), http_name if param == name else param
    return _body(message, "invalid_request_error", param)


def _body(message: str, type: str, param: str | None = None, code: str | None = None) -> ErrorBody:
    return ErrorBody(error=ErrorDetail(message=message, type=type, param=param, code=code))


def _shorten(value: Any, limit: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."

"""What stands beside the API itself: its description, as JSON and as a page, and which web pages may call it.

Everything comes from this server: the page has no script, and needs nothing of another host.
"""

from html import escape
from importlib import metadata
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.responses import HTMLResponse

from serve.errors import install_error_handlers
from serve.schema import ErrorBody

TITLE, DESCRIPTION = "SpecDecode", "Lossless speculative decoding behind OpenAI's API"
_REFUSALS = {
    400: "the request is not one that can be served",
    401: "no valid API key",
    404: "no such model",
    413: "the body is too large",
    429: "the queue is full",
    503: "the model is loading, or lost",
    504: "it took longer than it may",
}
_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:72em;margin:2em auto;padding:0 1em}"
    "table{border-collapse:collapse}td,th{border:1px solid #ccc;padding:.2em .6em;text-align:left;vertical-align:top}"
    "code{font-family:ui-monospace,monospace}@media(prefers-color-scheme:dark){body{background:#111;color:#ddd}}"
)


def version() -> str:
    """The installed version of SpecDecode; "unknown" where its code was copied and not installed."""
    try:
        return metadata.version("specdecode")
    except metadata.PackageNotFoundError:
        return "unknown"


def new_app(models: list[str]) -> FastAPI:
    """An app without routes but for its own description, whose errors are OpenAI's; `models` are those that may be asked."""
    app = FastAPI(title=TITLE, description=DESCRIPTION, version=version(), docs_url=None, redoc_url=None)
    install_error_handlers(app)
    app.openapi = lambda: _description(app, models)  # type: ignore[method-assign]  # FastAPI's own way to change it
    app.get("/docs", include_in_schema=False, response_class=HTMLResponse)(lambda: _page(app.openapi()))
    return app


def answers(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Describes the errors of a route."""
    return {status: {"model": ErrorBody, "description": _REFUSALS[status]} for status in statuses}


def cors(origins: list[str]) -> dict[str, Any]:
    """What lets pages of these origins call, as Starlette's middleware takes it; keys travel in a header, so no cookies do."""
    return {
        "allow_origins": origins,
        "allow_methods": ["GET", "POST"],
        "allow_headers": ["*"],
        "expose_headers": ["x-request-id", "retry-after"],
    }


def _description(app: FastAPI, models: list[str]) -> dict[str, Any]:
    """The OpenAPI document with the models' names, and without FastAPI's own 422, which nobody here answers with."""
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        for path in schema["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        for name in ("HTTPValidationError", "ValidationError"):
            schema["components"]["schemas"].pop(name, None)
        for name in ("CompletionRequest", "ChatRequest"):
            schema["components"]["schemas"][name]["properties"]["model"]["enum"] = models
        app.openapi_schema = schema
    return app.openapi_schema


def _page(schema: dict[str, Any]) -> str:
    """The OpenAPI document as a page."""
    parts = [f"<h1>{escape(TITLE)} {escape(schema['info']['version'])}</h1><p>{escape(DESCRIPTION)}</p>"]
    parts.append('<p>As JSON: <a href="openapi.json">openapi.json</a></p>')
    for path, operations in schema["paths"].items():
        for method, operation in operations.items():
            parts.append(f"<h2><code>{method.upper()} {escape(path)}</code></h2><p>{escape(operation['description'])}</p>")
    for name, model in schema["components"]["schemas"].items():
        parts.append(f"<h2 id={escape(name)}>{escape(name)}</h2><p>{escape(model.get('description', ''))}</p>")
        parts.append(_fields(model))
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(TITLE)}</title><style>{_STYLE}</style>"
        f"{''.join(parts)}</html>"
    )


def _fields(model: dict[str, Any]) -> str:
    rows = [
        f"<tr><td><code>{escape(name)}</code><td>{_kind(field)}<td>{escape(field.get('description', ''))}"
        f"{' (required)' if name in model.get('required', []) else ''}"
        for name, field in model.get("properties", {}).items()
    ]
    return f"<table><tr><th>field<th>kind<th>meaning{''.join(rows)}</table>" if rows else ""


def _kind(field: dict[str, Any]) -> str:
    """A field's JSON schema in a few words."""
    if "$ref" in field:
        name = escape(field["$ref"].rsplit("/", 1)[-1])
        return f"<a href=#{name}>{name}</a>"
    if "anyOf" in field:
        return " or ".join(_kind(each) for each in field["anyOf"])
    if "const" in field or "enum" in field:
        return ", ".join(escape(repr(value)) for value in field.get("enum", [field.get("const")]))
    if field.get("type") == "array":
        return f"list of {_kind(field.get('items', {}))}"
    bounds = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    limits = "".join(f", {sign} {field[name]:g}" for name, sign in bounds.items() if name in field)
    return escape(str(field.get("type", "anything"))) + escape(limits)

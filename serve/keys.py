"""API keys in, yes or no out. Keeps digests only: no key stands in memory for long, in a log or in an error.

A source may hold digests itself, as `sha256:` and 64 hexadecimal digits: then whoever reads it learns no key.
"""

import hashlib
import hmac
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from starlette.types import ASGIApp, Receive, Scope, Send

from serve.config import RouterConfig
from serve.errors import ApiKeyError, error_response
from specdecode.errors import ConfigError

_OPEN_PATHS = {"/health"}


@dataclass(frozen=True)
class ApiKeys:
    """The keys that open the door, as digests; none at all leave it open."""

    digests: tuple[bytes, ...] = field(default=(), repr=False)

    @staticmethod
    def load(config: RouterConfig, environment: Mapping[str, str]) -> "ApiKeys":
        """Reads the keys from where the configuration says: an environment variable, a file, or both.

        Raises:
            ConfigError: a source is missing or holds no key.
        """
        keys: list[str] = []
        if config.api_keys_env is not None:
            text = environment.get(config.api_keys_env, "")
            keys += _parse(text, f"router.api_keys_env: environment variable {config.api_keys_env}")
        if config.api_keys_file is not None:
            keys += _parse(_read(config.api_keys_file), f"router.api_keys_file: {config.api_keys_file}")
        return ApiKeys(tuple(_known_digest(key) for key in keys))

    def check(self, authorization: str | None) -> None:
        """Takes an Authorization header.

        Raises:
            ApiKeyError: it bears none of the keys.
        """
        if not self.digests:
            return
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise ApiKeyError("no API key: expected a header Authorization: Bearer KEY")
        digest = _digest(key.strip())
        # All of them are compared, so that the time says nothing.
        if not any([hmac.compare_digest(digest, known) for known in self.digests]):  # noqa: C419  not lazily
            raise ApiKeyError("the API key is not valid here")


class KeyCheck:
    """ASGI middleware that answers whoever bears no valid key; only `/health` is open to all."""

    def __init__(self, app: ASGIApp, keys: ApiKeys) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the ASGI specification."""
        if scope["type"] == "http" and scope["path"].removeprefix(scope.get("root_path", "")) not in _OPEN_PATHS:
            headers = dict(scope["headers"])
            try:
                self._keys.check(headers.get(b"authorization", b"").decode("latin-1"))
            except ApiKeyError as error:
                await error_response(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _parse(text: str, where: str) -> list[str]:
    lines = [line.strip() for line in text.splitlines()]
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise ConfigError(f"{where}: expected at least one API key, one a line, found none")
    return keys


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigError(f"router.api_keys_file: {path} cannot be read: {reason}") from error


def _known_digest(line: str) -> bytes:
    """The digest of a key, or the one that stands in its place."""
    found = re.fullmatch("sha256:([0-9a-f]{64})", line)
    return bytes.fromhex(found[1]) if found else _digest(line)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()

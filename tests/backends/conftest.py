"""Every test of the backends checks the cache after each operation on it."""

import functools
from collections.abc import Callable
from typing import Any

import pytest

from specdecode.backends.kv_cache import RowCache

OPERATIONS = ("seat", "remembered", "open", "remember", "reserve", "forget", "clear")


@pytest.fixture(autouse=True)
def checked_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in OPERATIONS:
        monkeypatch.setattr(RowCache, name, _then_check(getattr(RowCache, name)))


def _then_check(operation: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(operation)
    def checked(cache: RowCache, *args: Any, **kwargs: Any) -> Any:
        result = operation(cache, *args, **kwargs)
        cache.check()
        return result

    return checked

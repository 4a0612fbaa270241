"""A router in this process, without Ray, over a target that says what the test wants."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx

from serve.canary import CanaryConfig
from serve.config import RouterConfig
from serve.generation import Admission, Generation, Item, TargetInfo
from serve.reader import Defaults
from serve.router import Router
from specdecode.decoding.sequence import Round, Route
from specdecode.routing.router import RoutingConfig

BODY: dict[str, Any] = {"model": "tiny", "prompt": "def", "max_tokens": 8}


class FakeTarget:
    """A handle of a target that generates token 300 over and over, a round every `period_s`.

    Args:
        period_s: how long a round takes.
        is_loaded: whether it describes itself; if not, that takes for ever.
        is_there: whether it takes anything on.
        drafter: who drafts half of the tokens; nobody if None.
    """

    def __init__(
        self, period_s: float = 0.0, *, is_loaded: bool = True, is_there: bool = True, drafter: str | None = None
    ) -> None:
        self.asked: list[Generation] = []
        self.read: list[tuple[list[int], int, list[str]]] = []
        self.num_open = 0
        self._period_s = period_s
        self._is_loaded = is_loaded
        self._is_there = is_there
        self._drafter = drafter
        self._method = ""

    def options(self, method_name: str, **_: Any) -> Any:
        if method_name == "score":
            return _Score(self)
        return _Describe(self._is_loaded) if method_name == "describe" else self

    def remote(self, generation: Generation) -> "_FakeStream":
        self.asked.append(generation)
        self.num_open += 1
        return _FakeStream(self, self._items(generation))

    async def _items(self, generation: Generation) -> AsyncIterator[Item]:
        if not self._is_there:
            await asyncio.sleep(60)
        yield Admission("replica")
        for number in range(1, generation.params.max_tokens + 1):
            await asyncio.sleep(self._period_s)
            finish_reason = "length" if number == generation.params.max_tokens else None
            if self._drafter and generation.route.drafter:  # of four tokens the first is accepted
                yield [Round([300, 300], 4, 1, finish_reason, 0.0, 0.0, drafter=self._drafter)]
            else:
                yield [Round([300], 0, 0, finish_reason, 0.0, 0.0)]


class _Score:
    """Drafts that have read: of ten tokens, nine are right."""

    def __init__(self, owner: FakeTarget) -> None:
        self._owner = owner

    async def remote(self, tokens: list[int], num_prompt_tokens: int, drafts: list[str]) -> dict[str, tuple[int, int]]:
        self._owner.read.append((tokens, num_prompt_tokens, drafts))
        return dict.fromkeys(drafts, (9, 10))


class _Describe:
    def __init__(self, is_loaded: bool) -> None:
        self._is_loaded = is_loaded

    async def remote(self, model: str | None = None) -> TargetInfo:  # noqa: ARG002
        if not self._is_loaded:
            await asyncio.sleep(60)
        return TargetInfo(2048, 4096)


class _FakeStream:
    def __init__(self, owner: FakeTarget, items: AsyncIterator[Item]) -> None:
        self._owner, self._items = owner, items

    def __aiter__(self) -> AsyncIterator[Item]:
        return self._items

    def cancel(self) -> None:
        self._owner.num_open -= 1


@asynccontextmanager
async def routed(
    target: FakeTarget,
    routing: RoutingConfig | None = None,
    canaries: dict[str, CanaryConfig] | None = None,
    idle_readers: tuple[str, ...] = (),
    **config: Any,
) -> AsyncIterator[tuple[httpx.AsyncClient, Router]]:
    """A client of a router before the target, with a learned router if that is configured."""
    router = Router.__new__(Router)
    defaults = Defaults(Route("code" if routing is None else "auto", 4), "rejection")
    drafts = ["code", "chat", "generic"] if routing else ["code", "chat"]
    await Router.__init__(  # type: ignore[misc]
        router,
        "tiny",
        "tiny/target",
        drafts,
        defaults,
        RouterConfig(**config),
        target,  # type: ignore[arg-type]
        routing,
        canaries,
        idle_readers,
    )
    await asyncio.sleep(0)  # for the target's answer
    transport = httpx.ASGITransport(router.__serve_build_asgi_app__(), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://router") as client:
        for _ in range(200):
            if not target._is_loaded or (await client.get("/health")).status_code == 200:
                break
            await asyncio.sleep(0.01)
        yield client, router
    router._meeting.cancel()

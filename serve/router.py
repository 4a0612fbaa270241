"""The ingress: OpenAI's HTTP interface. Text comes in and goes out here, and nowhere else.

A request is read, and sent to a target as ids; the rounds that stream back are written down as text. The router sees no tensor,
and the target sees no text.
"""

import json
import time
from collections.abc import AsyncIterator
from typing import Any, Literal

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response, StreamingResponse
from ray.serve.handle import DeploymentHandle

from serve.choice import Choice, merge
from serve.config import RouterConfig
from serve.envelope import Detail, Envelope, usage
from serve.errors import BodyLimit, UnknownModelError, describe_error, install_error_handlers
from serve.logprobs import TokenNames
from serve.reader import Defaults, Job, Reader
from serve.schema import ChatRequest, CompletionRequest, GenerationRequest, ModelCard, ModelList, Usage
from serve.target import TargetInfo
from serve.transcript import Piece
from specdecode.text import Tokenizer


class Router:
    """Serves one target and its drafts.

    Args:
        model: the model's name over HTTP.
        tokenizer: the model whose tokenizer to use.
        drafts: the drafts that a request may choose.
        defaults: what applies unless a request says otherwise.
        config: what a request may ask for.
        target: the target's deployment.
    """

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self,
        model: str,
        tokenizer: str,
        drafts: list[str],
        defaults: Defaults,
        config: RouterConfig,
        target: DeploymentHandle,
    ) -> None:
        self._model = model
        self._drafts = drafts
        self._max_body_bytes = config.max_body_bytes
        self._tokenizer = Tokenizer(tokenizer)
        self._created = int(time.time())
        self._generate = target.options(method_name="generate", stream=True)
        self._target: TargetInfo = await target.options(method_name="describe").remote()
        self._reader = Reader(self._tokenizer, self._target, drafts, defaults, config)
        self._names = TokenNames(self._tokenizer, self._target.vocab_size)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Makes the HTTP routes of this router."""
        app = FastAPI(title="SpecDecode", description="Lossless speculative decoding behind OpenAI's API")
        install_error_handlers(app)
        app.add_middleware(BodyLimit, max_bytes=self._max_body_bytes)
        app.get("/health")(self.health)
        app.get("/v1/models")(self.models)
        app.get("/v1/models/{model:path}")(self.model)
        app.post("/v1/completions", response_model=None)(self.completions)
        app.post("/v1/chat/completions", response_model=None)(self.chat_completions)
        return app

    async def health(self) -> dict[str, str]:
        """Answers once the target is loaded."""
        return {"status": "ok"}

    async def models(self) -> ModelList:
        """Lists the one model that is served, with its drafts."""
        return ModelList(data=[self._card()])

    async def model(self, model: str) -> ModelCard:
        """Describes the model that is served."""
        self._check_model(model)
        return self._card()

    async def completions(self, body: CompletionRequest) -> Response:
        """Continues one or several prompts."""
        self._check_model(body.model)
        return await self._answer(body, self._reader.completion(body), "text")

    async def chat_completions(self, body: ChatRequest) -> Response:
        """Answers a conversation."""
        self._check_model(body.model)
        return await self._answer(body, self._reader.chat(body), "chat")

    async def _answer(self, body: GenerationRequest, jobs: list[Job], kind: Literal["chat", "text"]) -> Response:
        """Generates all that the request asks for, and answers in one piece or as a stream of events."""
        detail = Detail(body.num_logprobs, body.prompt_logprobs, body.speculative_decoding.rounds)
        envelope = Envelope(kind, self._model, self._names, detail)
        choices = [Choice(index, self._generate, *job, self._tokenizer) for index, job in enumerate(jobs)]
        pieces = merge(choices)
        if body.stream:
            # The first piece is awaited here, so that a request which the target refuses still gets its status.
            first = await anext(pieces)
            events = _events(_chain(first, pieces), choices, body, envelope)
            return StreamingResponse(events, media_type="text/event-stream")
        async for _ in pieces:
            pass
        return JSONResponse(envelope.whole(choices, _usage(choices, body)))

    def _check_model(self, model: str) -> None:
        if model != self._model:
            raise UnknownModelError(f"model {model!r} is not served here: expected {self._model!r}", "model")

    def _card(self) -> ModelCard:
        return ModelCard(id=self._model, created=self._created, max_model_len=self._target.max_length, drafts=self._drafts)


async def _events(
    pieces: AsyncIterator[tuple[Choice, Piece]], choices: list[Choice], body: GenerationRequest, envelope: Envelope
) -> AsyncIterator[str]:
    """The server-sent events of a stream; an error ends it with an error body."""
    for choice in choices:
        if opening := envelope.opening(choice):
            yield _event(opening)
    try:
        async for choice, piece in pieces:
            yield _event(envelope.chunk(choice, piece))
    except Exception as error:
        yield _event(describe_error(error)[1].model_dump())
        return
    if body.stream_options.include_usage:
        yield _event(envelope.closing(_usage(choices, body)))
    yield "data: [DONE]\n\n"


def _usage(choices: list[Choice], body: GenerationRequest) -> Usage:
    return usage([choice.generation.tokens for choice in choices[:: body.n]], choices)


async def _chain(first: tuple[Choice, Piece], rest: AsyncIterator[tuple[Choice, Piece]]) -> AsyncIterator[tuple[Choice, Piece]]:
    yield first
    async for pair in rest:
        yield pair


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"

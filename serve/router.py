"""The ingress: OpenAI's HTTP interface. Text comes in and goes out here, and nowhere else.

A request is read, and sent to a target as ids; the rounds that stream back are written down as text. The router sees no tensor,
and the target sees no text.
"""

import asyncio
import json
import logging
import os
import secrets
import time
from collections.abc import AsyncGenerator, Mapping
from collections.abc import Sequence as Several
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import Any, Literal, NamedTuple

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from starlette.types import Receive, Scope, Send

from serve.access import Access, AccessLog
from serve.canary import CanaryConfig, with_canaries
from serve.choice import Choice, merge
from serve.config import RouterConfig, RouterSettings
from serve.envelope import Detail, Envelope, usage
from serve.errors import BodyLimit, UnavailableError, UnknownModelError, describe_error, install_error_handlers
from serve.forecaster import Forecaster, Subject
from serve.keys import ApiKeys, KeyCheck
from serve.logprobs import TokenNames
from serve.metrics import Metrics
from serve.reader import Defaults, Job, Reader
from serve.recorder import Recorder
from serve.resumption import Failover
from serve.schema import AUTO_DRAFT, NO_DRAFT, ChatRequest, CompletionRequest, GenerationRequest, ModelCard, ModelList, Usage
from serve.target import Generation, TargetInfo
from serve.transcript import Piece, Wording
from specdecode.config import check_config
from specdecode.decoding.metrics import Verdicts
from specdecode.errors import ConfigError
from specdecode.routing.forecast import Forecast
from specdecode.routing.router import AdaptiveRouter, RoutingConfig
from specdecode.text import Tokenizer

logger = logging.getLogger("ray.serve")

_RETRY_PERIOD_S = 1.0


class Router:
    """Serves one target and its drafts.

    Args:
        model: the model's name over HTTP.
        tokenizer: the model whose tokenizer to use.
        drafts: the drafts that a request may choose.
        defaults: what applies unless a request says otherwise.
        config: what a request may ask for.
        target: the target's deployment.
        routing: the learned router, if there is one.
        canaries: drafts that take a share of others' requests.
        idle_readers: drafts that read, while they are idle, answers that they did not draft.
    """

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self,
        model: str,
        tokenizer: str,
        drafts: list[str],
        defaults: Defaults,
        config: RouterConfig,
        target: DeploymentHandle,
        routing: RoutingConfig | None = None,
        canaries: Mapping[str, CanaryConfig] | None = None,
        idle_readers: Several[str] = (),
    ) -> None:
        self._model = model
        self._drafts = drafts
        self._config = config
        self._keys = ApiKeys.load(config, os.environ)
        self._metrics = Metrics()
        self._exporting = asyncio.create_task(self._metrics.keep_exporting())
        self._forecaster = (
            None
            if routing is None
            else Forecaster(await asyncio.to_thread(AdaptiveRouter.from_config, routing, drafts), self._metrics)
        )
        records = config.records
        self._recorder = None if records is None else Recorder(records.folder, keeps_prompts=records.keep_prompts)
        self._failover = Failover(config.failover_timeout_s, config.max_resumptions)
        self._tokenizer = Tokenizer(tokenizer)
        self._created = int(time.time())
        self._canaries = canaries or {}
        self._idle_readers = list(idle_readers)
        self._asking: set[asyncio.Task[None]] = set()
        self._score = target.options(method_name="score")
        self._given_defaults = self._defaults = defaults
        # gRPC: the target notices a router that was killed, which it does not where Ray's own calls carry the stream.
        self._targets = target.options(method_name="generate", stream=True, _by_reference=False)
        self._known: _Known | None = None
        self._meeting = asyncio.create_task(self._meet(target.options(method_name="describe")))

    async def _meet(self, describe: DeploymentHandle) -> None:
        """Waits until the target is loaded; meanwhile every request is told so."""
        while self._known is None:
            try:
                info: TargetInfo = await describe.remote()
                self._known = _Known(info, TokenNames(self._tokenizer, info.vocab_size))
            except (RayError, RayServeException) as error:  # noqa: PERF203  once a second
                logger.warning("the target does not answer yet: %r", error)
                await asyncio.sleep(_RETRY_PERIOD_S)

    # Serve tells of a user_config that is taken away only if the rank is asked for too.
    def reconfigure(self, user_config: dict[str, Any] | None, rank: object = None) -> None:  # noqa: ARG002
        """Changes what applies unless a request says otherwise, see `RouterSettings`; requests that run keep what they have.

        A mistake is an error in the log, and changes nothing: were it raised, Serve would take every router down.
        """
        try:
            settings = check_config(user_config or {}, RouterSettings, where="user_config of Router")
            settings.check(self._choosable, self._config.max_k, where="user_config of Router")
        except ConfigError as error:
            logger.error("refused, all stays as it is: %s", error)
            return
        self._defaults = self._given_defaults.changed(settings)
        logger.info("what applies unless a request says otherwise is now %s", self._defaults)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Makes the HTTP routes of this router."""
        app = FastAPI(title="SpecDecode", description="Lossless speculative decoding behind OpenAI's API")
        install_error_handlers(app)
        app.add_middleware(BodyLimit, max_bytes=self._config.max_body_bytes)
        app.add_middleware(KeyCheck, keys=self._keys)
        app.add_middleware(AccessLog, metrics=self._metrics)  # the last is the first that a request meets
        app.get("/health")(self.health)
        app.get("/v1/models")(self.models)
        app.get("/v1/models/{model:path}")(self.model)
        app.post("/v1/completions", response_model=None)(self.completions)
        app.post("/v1/chat/completions", response_model=None)(self.chat_completions)
        return self._with_page(app) if self._config.demo else app

    def _with_page(self, app: FastAPI) -> FastAPI:
        """The routes, and the page beside them."""
        from serve.page import Offer, with_page  # Gradio, which is there only where it is wanted

        route = self._defaults.route
        offer = Offer(
            model=self._model,
            drafts=[*self._choosable, NO_DRAFT],
            draft=route.drafter or NO_DRAFT,
            k=route.k,
            verifier=self._defaults.verifier,
            max_k=self._config.max_k,
            needs_key=bool(self._keys.digests),
            max_body_bytes=self._config.max_body_bytes,
        )
        return with_page(app, offer)

    async def health(self) -> dict[str, str]:
        """Answers once the target is loaded."""
        self._target()
        return {"status": "ok"}

    async def models(self) -> ModelList:
        """Lists the one model that is served, with its drafts."""
        return ModelList(data=[self._card()])

    async def model(self, model: str) -> ModelCard:
        """Describes the model that is served."""
        self._check_model(model)
        return self._card()

    async def completions(self, body: CompletionRequest, request: Request) -> Response:
        """Continues one or several prompts."""
        self._check_model(body.model)
        access = Access.of(request.scope)
        jobs = await self._routed(self._reader().completion(body), body, access.id)
        return await self._answer(access, body, jobs, "text")

    async def chat_completions(self, body: ChatRequest, request: Request) -> Response:
        """Answers a conversation."""
        self._check_model(body.model)
        access = Access.of(request.scope)
        jobs = await self._routed(self._reader().chat(body), body, access.id)
        return await self._answer(access, body, jobs, "chat")

    async def _routed(self, jobs: list[Job], body: GenerationRequest, id: str) -> "list[_Routed]":
        """Lets the learned router choose where nobody else has."""
        prompts, is_chat = [job.generation.tokens for job in jobs[:: body.n]], isinstance(body, ChatRequest)
        is_heard = self._forecaster is not None or self._recorder is not None
        texts = self._reader().texts(body) if is_heard else [""] * len(prompts)  # to turn ids into text takes a while
        subjects = [Subject(text, len(prompt), is_chat) for text, prompt in zip(texts, prompts, strict=True)]
        forecasts: list[Forecast | None] = [None] * len(subjects)
        if self._forecaster is not None and jobs[0].generation.route.drafter == AUTO_DRAFT:
            forecasts = list(await self._forecaster.forecast(subjects))
        pairs = [pair for pair in zip(subjects, forecasts, strict=True) for _ in range(body.n)]
        canaries = {} if body.speculative_decoding.draft in self._drafts else self._canaries
        return [
            _Routed(_chosen(job.generation, pair[1], canaries, id), job.wording, *pair)
            for job, pair in zip(jobs, pairs, strict=True)
        ]

    async def _answer(
        self, access: Access, body: GenerationRequest, jobs: "list[_Routed]", kind: Literal["chat", "text"]
    ) -> Response:
        """Generates all that the request asks for, and answers in one piece or as a stream of events."""
        detail = Detail(body.num_logprobs, body.prompt_logprobs, body.speculative_decoding.rounds)
        envelope = Envelope(kind, self._model, self._target().names, detail, access.id)
        choices = access.choices = [self._choice(f"{access.id}-{index}", index, job) for index, job in enumerate(jobs)]
        limits = [limit for limit in (access.timeout_s, self._config.request_timeout_s) if limit is not None]
        pieces = merge(choices, min(limits, default=None))
        if body.stream:
            # The first pieces are awaited here, so that a request which the target refuses still gets its status.
            first = await anext(pieces)
            return EventStream(_events(_chain(first, pieces), choices, body, envelope, access))
        async with aclosing(pieces):
            async for _ in pieces:
                pass
        return JSONResponse(envelope.whole(choices, _usage(choices, body)))

    def _choice(self, id: str, index: int, job: "_Routed") -> Choice:
        """One of a request's generations. Its seed is chosen here, so that any replica can go on where another was lost."""
        generation = replace(job.generation, id=id, seed=secrets.randbits(64))
        on_end = partial(self._learn, job, id)
        return Choice(index, self._targets, generation, job.wording, self._tokenizer, self._failover, on_end)

    def _learn(self, job: "_Routed", id: str, choice: Choice) -> None:
        """Hands on what a generation came to."""
        if self._forecaster is not None and job.forecast is not None:
            self._forecaster.learn(job.forecast, choice.metrics.verdicts)
        if self._recorder is not None:
            self._recorder.add(job.subject, job.generation.route, choice.metrics, id)
        if self._idle_readers and choice.tokens and (self._forecaster or self._recorder):
            task = asyncio.create_task(self._ask_others(job, choice, id))
            self._asking.add(task)
            task.add_done_callback(self._asking.discard)

    async def _ask_others(self, job: "_Routed", choice: Choice, id: str) -> None:
        """Has drafts that had nothing to do with an answer read it, those that are idle, and learns from that too."""
        others = [name for name in self._idle_readers if name not in choice.metrics.verdicts]
        prompt = choice.generation.tokens
        try:
            scores = await self._score.remote(prompt + choice.tokens, len(prompt), others)
        except (RayError, RayServeException):  # it is not missed
            return
        for name, (num_right, num_scored) in scores.items():
            verdicts = Verdicts(0, num_right, num_scored - num_right)
            if self._forecaster is not None and job.forecast is not None:
                self._forecaster.learn(job.forecast, {name: verdicts})
            if self._recorder is not None:
                self._recorder.add_score(job.subject, name, verdicts, id)

    def _target(self) -> "_Known":
        if self._known is None:
            raise UnavailableError("the model is still loading: try again later")
        return self._known

    def _reader(self) -> Reader:
        return Reader(
            self._tokenizer,
            self._target().info,
            self._drafts,
            self._defaults,
            self._config,
            has_router=self._forecaster is not None,
        )

    @property
    def _choosable(self) -> list[str]:
        """Who may be the default."""
        return self._drafts + ([] if self._forecaster is None else [AUTO_DRAFT])

    def _check_model(self, model: str) -> None:
        if model != self._model:
            raise UnknownModelError(f"model {model!r} is not served here: expected {self._model!r}", "model")

    def _card(self) -> ModelCard:
        return ModelCard(
            id=self._model, created=self._created, max_model_len=self._target().info.max_length, drafts=self._drafts
        )


class _Routed(NamedTuple):
    """A job, what its prompt is about, and what is expected of the drafts, if the learned router was asked."""

    generation: Generation
    wording: Wording
    subject: Subject
    forecast: Forecast | None


def _chosen(
    generation: Generation, forecast: Forecast | None, canaries: Mapping[str, CanaryConfig], request_id: str
) -> Generation:
    """The generation with who drafts for it."""
    route = generation.route if forecast is None else forecast.route(generation.route.k)
    return replace(generation, route=with_canaries(route, canaries, request_id))


class _Known(NamedTuple):
    """The target, once it is loaded, and what its tokens are called."""

    info: TargetInfo
    names: TokenNames


class EventStream(StreamingResponse):
    """Server-sent events; when the client leaves, their source is closed at once, and not when it is found to be garbage."""

    def __init__(self, events: AsyncGenerator[str, None]) -> None:
        super().__init__(events, media_type="text/event-stream")
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the ASGI specification."""
        async with aclosing(self._events):
            await super().__call__(scope, receive, send)


async def _events(
    pieces: AsyncGenerator[list[tuple[Choice, Piece]], None],
    choices: list[Choice],
    body: GenerationRequest,
    envelope: Envelope,
    access: Access,
) -> AsyncGenerator[str, None]:
    """The server-sent events of a stream; an error ends it with an error body."""
    access.error = "cancelled"  # unless it comes to an end
    async with aclosing(pieces):
        for choice in choices:
            if opening := envelope.opening(choice):
                yield _event(opening)
        try:
            async for ready in pieces:  # in one message, whose way to the client costs more than what is in it
                yield "".join(_event(envelope.chunk(choice, piece)) for choice, piece in ready)
        except Exception as error:
            _, described = describe_error(error)
            access.error = described.error.code or described.error.type
            yield _event(described.model_dump())
            return
        access.error = None
        if body.stream_options.include_usage:
            yield _event(envelope.closing(_usage(choices, body)))
        yield "data: [DONE]\n\n"


def _usage(choices: list[Choice], body: GenerationRequest) -> Usage:
    return usage([choice.generation.tokens for choice in choices[:: body.n]], choices)


async def _chain(
    first: list[tuple[Choice, Piece]], rest: AsyncGenerator[list[tuple[Choice, Piece]], None]
) -> AsyncGenerator[list[tuple[Choice, Piece]], None]:
    async with aclosing(rest):
        yield first
        async for ready in rest:
            yield ready


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"

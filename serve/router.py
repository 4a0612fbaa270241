"""The ingress: OpenAI's HTTP interface. Text comes in and goes out here, and nowhere else.

A request is read, and sent to a target as ids; the rounds that stream back are written down as text. The router sees no tensor,
and the target sees no text.
"""

import asyncio
import hashlib
import logging
import os
import secrets
import time
from collections.abc import Mapping
from collections.abc import Sequence as Several
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import Any, Literal, NamedTuple

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from starlette.middleware.cors import CORSMiddleware

from serve.access import Access, AccessLog
from serve.canary import CanaryConfig, with_canaries
from serve.choice import Choice, merge
from serve.config import RouterConfig, RouterSettings
from serve.description import answers, cors, new_app, version
from serve.envelope import Detail, Envelope, Head, usage
from serve.errors import BodyLimit, UnknownModelError
from serve.forecaster import Forecaster, Subject
from serve.generation import Generation
from serve.keys import ApiKeys, KeyCheck
from serve.metrics import Metrics
from serve.reader import Defaults, Job, Reader
from serve.recorder import Recorder
from serve.resumption import Failover
from serve.schema import AUTO_DRAFT, NO_DRAFT, ChatRequest, CompletionRequest, GenerationRequest, ModelCard, ModelList
from serve.served import DraftModel, Served
from serve.stream import EventStream, chain, events
from serve.transcript import Wording
from specdecode.config import check_config
from specdecode.decoding.metrics import Verdicts
from specdecode.decoding.sequence import Route
from specdecode.errors import ConfigError
from specdecode.routing.forecast import Forecast
from specdecode.routing.router import AdaptiveRouter, RoutingConfig

logger = logging.getLogger("ray.serve")


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
        alone: drafts that answer by themselves when a request names one as its model.
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
        alone: Mapping[str, DraftModel] | None = None,
    ) -> None:
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
        self._target = Served(model, tokenizer, target)
        alone = alone or {}
        self._models = {model: self._target} | {
            name: Served(name, checkpoint, target if replicas is None else replicas, name)
            for name, (checkpoint, replicas) in alone.items()
        }
        self._fingerprint = _fingerprint(model, tokenizer, drafts, {name: draft.checkpoint for name, draft in alone.items()})
        self._created = int(time.time())
        self._canaries = canaries or {}
        self._idle_readers = list(idle_readers)
        self._asking: set[asyncio.Task[None]] = set()
        self._score = target.options(method_name="score")
        self._given_defaults = self._defaults = defaults
        self._meeting = asyncio.create_task(self._meet())

    async def _meet(self) -> None:
        """Waits until the models are loaded, the target first."""
        await self._target.meet()
        await asyncio.gather(*(served.meet() for served in self._models.values()))

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
        app = new_app(list(self._models))
        app.add_middleware(BodyLimit, max_bytes=self._config.max_body_bytes)
        app.add_middleware(KeyCheck, keys=self._keys)
        if self._config.cors_origins:
            app.add_middleware(CORSMiddleware, **cors(self._config.cors_origins))
        app.add_middleware(AccessLog, metrics=self._metrics)  # the last is the first that a request meets
        app.get("/health", responses=answers(503))(self.health)
        app.get("/version")(self.version)
        app.get("/v1/models", responses=answers(401))(self.models)
        app.get("/v1/models/{model:path}", responses=answers(401, 404))(self.model)
        for path, handler in (("/v1/completions", self.completions), ("/v1/chat/completions", self.chat_completions)):
            refusals = answers(400, 401, 404, 413, 429, 503, 504)
            app.post(path, response_model=None, responses=refusals)(handler)
        return self._with_page(app) if self._config.demo else app

    def _with_page(self, app: FastAPI) -> FastAPI:
        """The routes, and the page beside them."""
        from serve.page import Offer, with_page  # Gradio, which is there only where it is wanted

        route = self._defaults.route
        offer = Offer(
            model=self._target.name,
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
        self._target.check_loaded()
        return {"status": "ok"}

    async def version(self) -> dict[str, str]:
        """Says which version of SpecDecode this is."""
        return {"version": version()}

    async def models(self) -> ModelList:
        """Lists the target, and the drafts that answer by themselves."""
        self._target.check_loaded()
        return ModelList(data=[self._card(served) for served in self._models.values()])

    async def model(self, model: str) -> ModelCard:
        """Describes one model."""
        self._target.check_loaded()
        return self._card(self._served(model))

    async def completions(self, body: CompletionRequest, request: Request) -> Response:
        """Continues one or several prompts."""
        served = self._served(body.model)
        return await self._answer(served, Access.of(request.scope), body, self._reader(served).completion(body), "text")

    async def chat_completions(self, body: ChatRequest, request: Request) -> Response:
        """Answers a conversation."""
        served = self._served(body.model)
        return await self._answer(served, Access.of(request.scope), body, self._reader(served).chat(body), "chat")

    async def _routed(self, served: Served, jobs: list[Job], body: GenerationRequest, id: str) -> "list[_Routed]":
        """Lets the learned router choose where nobody else has."""
        if served.draft is not None:
            nobody = Subject("", 0, isinstance(body, ChatRequest))
            return [_Routed(job.generation, job.wording, nobody, None) for job in jobs]
        prompts, is_chat = [job.generation.tokens for job in jobs[:: body.n]], isinstance(body, ChatRequest)
        is_heard = self._forecaster is not None or self._recorder is not None
        texts = self._reader(served).texts(body) if is_heard else [""] * len(prompts)  # to turn ids into text takes a while
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
        self, served: Served, access: Access, body: GenerationRequest, jobs: list[Job], kind: Literal["chat", "text"]
    ) -> Response:
        """Generates all that the request asks for, and answers in one piece or as a stream of events."""
        routed = await self._routed(served, jobs, body, access.id)
        detail = Detail(body.num_logprobs, body.prompt_logprobs, body.speculative_decoding.rounds, body.has_usage)
        head = Head(access.id, served.name, self._fingerprint)
        envelope = Envelope(kind, head, lambda: served.names, detail)
        choices = access.choices = [
            self._choice(served, f"{access.id}-{index}", index, job) for index, job in enumerate(routed)
        ]
        limits = [limit for limit in (access.timeout_s, self._config.request_timeout_s) if limit is not None]
        pieces = merge(choices, min(limits, default=None))
        if body.stream:
            # The first pieces are awaited here, so that a request which the target refuses still gets its status.
            first = await anext(pieces)
            closing = partial(usage, choices, body.n) if body.has_usage else None
            return EventStream(events(chain(first, pieces), choices, closing, envelope, access))
        async with aclosing(pieces):
            async for _ in pieces:
                pass
        return JSONResponse(envelope.whole(choices, usage(choices, body.n)))

    def _choice(self, served: Served, id: str, index: int, job: "_Routed") -> Choice:
        """One of a request's generations. Its seed is chosen here, so that any replica can go on where another was lost."""
        generation = replace(job.generation, id=id, seed=secrets.randbits(64), model=served.draft)
        on_end = partial(self._learn, job, id) if served.draft is None else _forget
        return Choice(index, served.replicas, generation, job.wording, served.tokenizer, self._failover, on_end)

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

    def _reader(self, served: Served) -> Reader:
        is_target = served.draft is None
        return Reader(
            served.tokenizer,
            served.info,
            self._drafts if is_target else [],
            self._defaults if is_target else replace(self._defaults, route=Route()),
            self._config,
            has_router=is_target and self._forecaster is not None,
        )

    @property
    def _choosable(self) -> list[str]:
        """Who may be the default."""
        return self._drafts + ([] if self._forecaster is None else [AUTO_DRAFT])

    def _served(self, model: str) -> Served:
        if model not in self._models:
            raise UnknownModelError(f"model {model!r} is not served here: expected one of {list(self._models)}", "model")
        return self._models[model]

    def _card(self, served: Served) -> ModelCard:
        return served.card(self._created, self._drafts if served.draft is None else [])


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


def _forget(choice: Choice) -> None:
    """What a draft answers by itself says nothing about drafting."""


def _fingerprint(*parts: object) -> str:
    """Names what answers: the models, and this version of the program."""
    return f"fp_{hashlib.sha256(repr((version(), parts)).encode()).hexdigest()[:10]}"

"""The ingress: OpenAI's HTTP interface. Text comes in and goes out here, and nowhere else.

A request is tokenised, routed, and sent to a target as ids; the rounds that stream back are detokenised. The router sees no
tensor, and the target sees no text.
"""

import json
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response, StreamingResponse
from ray.serve.handle import DeploymentHandle

from serve.choice import Choice, Piece, merge
from serve.config import RouterConfig
from serve.errors import BodyLimit, UnknownModelError, describe_error, install_error_handlers
from serve.schema import (
    NO_DRAFT,
    ChatRequest,
    CompletionRequest,
    Envelope,
    GenerationRequest,
    ModelCard,
    ModelList,
    RoundFigures,
    SpeculativeFigures,
    Usage,
)
from serve.target import Generation, TargetInfo
from specdecode.decoding.sequence import Route, SamplingParams
from specdecode.errors import RequestError
from specdecode.text import Tokenizer


class Router:
    """Serves one target and its drafts.

    Args:
        model: the model's name over HTTP.
        tokenizer: the model whose tokenizer to use.
        drafts: the drafts that a request may choose.
        default_route: who drafts, and how much, unless a request says otherwise.
        config: what a request may ask for.
        target: the target's deployment.
    """

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self,
        model: str,
        tokenizer: str,
        drafts: list[str],
        default_route: Route,
        config: RouterConfig,
        target: DeploymentHandle,
    ) -> None:
        self._model = model
        self._drafts = drafts
        self._default_route = default_route
        self._config = config
        self._tokenizer = Tokenizer(tokenizer)
        self._created = int(time.time())
        self._generate = target.options(method_name="generate", stream=True)
        self._target: TargetInfo = await target.options(method_name="describe").remote()

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Makes the HTTP routes of this router."""
        app = FastAPI(title="SpecDecode", description="Lossless speculative decoding behind OpenAI's API")
        install_error_handlers(app)
        app.add_middleware(BodyLimit, max_bytes=self._config.max_body_bytes)
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
        return await self._answer(body, self._encode(body.prompt), body.max_tokens or 16, Envelope("text", self._model))

    async def chat_completions(self, body: ChatRequest) -> Response:
        """Answers a conversation."""
        self._check_model(body.model)
        prompt = self._tokenizer.encode_chat([{"role": turn.role, "content": turn.text} for turn in body.messages])
        max_tokens = body.max_completion_tokens or body.max_tokens or max(1, self._target.max_length - len(prompt))
        return await self._answer(body, [prompt], max_tokens, Envelope("chat", self._model))

    async def _answer(self, body: GenerationRequest, prompts: list[list[int]], max_tokens: int, envelope: Envelope) -> Response:
        """Generates all that the request asks for, and answers in one piece or as a stream of events."""
        generations = self._generations(body, prompts, max_tokens)
        choices = [
            Choice(index, self._generate, generation, self._tokenizer, body.stop_strings)
            for index, generation in enumerate(generations)
        ]
        pieces = merge(choices)
        if body.stream:
            # The first piece is awaited here, so that a request which the target refuses still gets its status.
            first = await anext(pieces)
            events = _events(_chain(first, pieces), choices, body, envelope)
            return StreamingResponse(events, media_type="text/event-stream")
        async for _ in pieces:
            pass
        texts = [(choice.text, choice.finish_reason) for choice in choices]
        return JSONResponse(envelope.whole(texts, _usage(prompts, choices), _figures(choices)))

    def _generations(self, body: GenerationRequest, prompts: list[list[int]], max_tokens: int) -> list[Generation]:
        """Every prompt n times; the choices of one request differ in their seeds."""
        num_choices = len(prompts) * (body.n or 1)
        if num_choices > self._config.max_choices:
            raise RequestError(f"n: expected at most {self._config.max_choices} generations, got {num_choices}", "n")
        for prompt in prompts:
            self._check_prompt(prompt, max_tokens)
        params = _params(body, max_tokens)
        route = self._route(body)
        return [
            Generation(prompt, params if params.seed is None else replace(params, seed=(params.seed + n) % 2**64), route)
            for prompt in prompts
            for n in range(body.n or 1)
        ]

    def _encode(self, prompt: str | list[str] | list[int] | list[list[int]]) -> list[list[int]]:
        if isinstance(prompt, str):
            return [self._tokenizer.encode(prompt)]
        if not prompt:
            raise RequestError("prompt: expected at least one, got none", "prompt")
        if isinstance(prompt[0], int):
            return [prompt]
        return [self._tokenizer.encode(part) if isinstance(part, str) else part for part in prompt]

    def _route(self, body: GenerationRequest) -> Route:
        """Who drafts for this request. A learned router takes the default's place."""
        options = body.speculative_decoding
        if options.draft is not None and options.draft not in (*self._drafts, NO_DRAFT):
            raise RequestError(
                f"speculative_decoding.draft: expected one of {[*self._drafts, NO_DRAFT]}, got {options.draft!r}",
                "speculative_decoding.draft",
            )
        if options.K is not None and self._config.max_k < options.K:
            raise RequestError(
                f"speculative_decoding.K: expected at most {self._config.max_k}, got {options.K}", "speculative_decoding.K"
            )
        drafter = options.draft or self._default_route.drafter
        k = self._default_route.k if options.K is None else options.K
        return Route() if drafter in (None, NO_DRAFT) or k == 0 else Route(drafter, k)

    def _check_model(self, model: str) -> None:
        if model != self._model:
            raise UnknownModelError(f"model {model!r} is not served here: expected {self._model!r}", "model")

    def _check_prompt(self, prompt: list[int], max_tokens: int) -> None:
        limit = self._target.max_length
        if not prompt:
            raise RequestError("prompt: expected at least one token, got none", "prompt")
        if len(prompt) + max_tokens > limit:
            raise RequestError(
                f"the model's context is {limit} tokens, but the prompt has {len(prompt)} and max_tokens is {max_tokens}",
                "prompt" if len(prompt) >= limit else "max_tokens",
            )
        if not 0 <= min(prompt) <= max(prompt) < self._target.vocab_size:
            raise RequestError(f"prompt: expected token ids in [0, {self._target.vocab_size})", "prompt")

    def _card(self) -> ModelCard:
        return ModelCard(id=self._model, created=self._created, max_model_len=self._target.max_length, drafts=self._drafts)


def _params(body: GenerationRequest, max_tokens: int) -> SamplingParams:
    return SamplingParams(
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=max(0, body.top_k or 0),
        max_tokens=max_tokens,
        stop_token_ids=frozenset(body.stop_token_ids or []),
        ignore_eos=body.ignore_eos,
        seed=body.seed,
    )


async def _events(
    pieces: AsyncIterator[Piece], choices: list[Choice], body: GenerationRequest, envelope: Envelope
) -> AsyncIterator[str]:
    """The server-sent events of a stream; an error ends it with an error body."""
    for choice in choices:
        if opening := envelope.opening(choice.index):
            yield _event(opening)
    try:
        async for piece in pieces:
            extension = _extension(piece, choices[piece.index], body.speculative_decoding.rounds)
            yield _event(envelope.chunk(piece.index, piece.text, piece.finish_reason, extension))
    except Exception as error:
        yield _event(describe_error(error)[1].model_dump())
        return
    if body.stream_options and body.stream_options.include_usage:
        prompts = [choice.generation.tokens for choice in choices[:: body.n or 1]]
        yield _event(envelope.closing(_usage(prompts, choices)))
    yield "data: [DONE]\n\n"


def _extension(piece: Piece, choice: Choice, is_each_round: bool) -> dict[str, Any]:
    """What a chunk says of speculation: its round on request, and the choice's figures at the end."""
    figures = _figures([choice]).model_dump() if piece.finish_reason is not None else {}
    round = RoundFigures(
        num_draft_tokens=piece.round.num_drafted,
        num_accepted_tokens=piece.round.num_accepted,
        accepted_text=piece.accepted_text,
    )
    return {**figures, "round": round.model_dump()} if is_each_round else figures


def _figures(choices: list[Choice]) -> SpeculativeFigures:
    """What speculation did for some choices of a request, together."""
    metrics = [choice.metrics for choice in choices]
    route = choices[0].generation.route
    num_drafts = sum(m.num_drafts for m in metrics)
    num_drafted = sum(m.num_drafted for m in metrics)
    num_accepted = sum(m.num_accepted for m in metrics)
    num_generated = sum(m.num_generated for m in metrics)
    num_passes = sum(m.num_target_passes for m in metrics)
    total_time_s = max(m.total_time_s for m in metrics)
    return SpeculativeFigures(
        draft=route.drafter,
        K=route.k,
        num_drafts=num_drafts,
        num_draft_tokens=num_drafted,
        num_accepted_tokens=num_accepted,
        acceptance_rate=num_accepted / max(1, num_drafted),
        mean_acceptance_length=1 + num_accepted / max(1, num_drafts),
        num_target_passes=num_passes,
        tokens_per_target_pass=num_generated / max(1, num_passes),
        tokens_per_second=num_generated / total_time_s if total_time_s else 0.0,
        time_to_first_token_s=min(m.time_to_first_token_s for m in metrics),
        total_time_s=total_time_s,
    )


def _usage(prompts: list[list[int]], choices: list[Choice]) -> Usage:
    num_prompt = sum(map(len, prompts))
    num_generated = sum(choice.metrics.num_generated for choice in choices)
    return Usage(prompt_tokens=num_prompt, completion_tokens=num_generated, total_tokens=num_prompt + num_generated)


async def _chain(first: Piece, rest: AsyncIterator[Piece]) -> AsyncIterator[Piece]:
    yield first
    async for piece in rest:
        yield piece


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"

"""Requests in, generations out: what the target is asked, and what its text is to be. Knows no HTTP."""

import json
from collections.abc import Sequence as Several
from dataclasses import dataclass
from typing import Any, NamedTuple

from serve.config import RouterConfig, RouterSettings
from serve.errors import ContextLengthError
from serve.generation import Generation, TargetInfo
from serve.schema import AUTO_DRAFT, NO_DRAFT, ChatRequest, CompletionRequest, GenerationRequest, Message, ToolCall
from serve.transcript import Wording
from specdecode.decoding.sequence import Route, SamplingParams, VerifierName
from specdecode.errors import RequestError
from specdecode.text import Tokenizer


class Job(NamedTuple):
    """One generation, and what its text is to be."""

    generation: Generation
    wording: Wording


@dataclass(frozen=True)
class Defaults:
    """What applies unless a request says otherwise: who drafts, and how much; and how drafts are accepted."""

    route: Route
    verifier: VerifierName

    def changed(self, settings: RouterSettings) -> "Defaults":
        """These, but for what the settings say."""
        is_drafter_set = "default_draft" in settings.model_fields_set
        drafter = settings.default_draft if is_drafter_set else self.route.drafter
        route = Route(drafter, self.route.k if settings.k is None else settings.k)
        return Defaults(route, settings.verifier or self.verifier)


class Reader:
    """Reads requests to one target.

    Args:
        tokenizer: the target's.
        target: what it takes.
        drafts: the drafts that a request may choose.
        defaults: what applies unless a request says otherwise.
        config: what a request may ask for.
        has_router: whether a request may leave the choice to a learned router.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        target: TargetInfo,
        drafts: list[str],
        defaults: Defaults,
        config: RouterConfig,
        *,
        has_router: bool = False,
    ) -> None:
        self._tokenizer = tokenizer
        self._target = target
        self._drafts = drafts
        self._defaults = defaults
        self._config = config
        self._has_router = has_router

    def completion(self, body: CompletionRequest) -> list[Job]:
        """What a completion is made of: every prompt `n` times.

        Raises:
            RequestError: it asks for what there is not.
        """
        parts = _parts(body.prompt)
        self._check_counts(body, len(parts))
        prompts = [self._tokenizer.encode(part) if isinstance(part, str) else part for part in parts]
        echoes = [self._text(part) if body.echo else None for part in parts]
        return self._jobs(body, prompts, body.max_tokens, echoes)

    def chat(self, body: ChatRequest) -> list[Job]:
        """What a chat's answer is made of; see `completion`."""
        self._check_counts(body, 1)
        prompt = self._tokenizer.encode_chat([self._turn(turn, number) for number, turn in enumerate(body.messages)])
        max_tokens = body.max_completion_tokens or body.max_tokens or max(1, self._target.max_length - len(prompt))
        return self._jobs(body, [prompt], max_tokens, [None])

    def texts(self, body: GenerationRequest) -> list[str]:
        """What each of the prompts is about: itself, or the last message of a chat's user."""
        if isinstance(body, ChatRequest):
            asked = [turn.text for turn in body.messages if turn.role == "user"]
            return [asked[-1] if asked else body.messages[-1].text]
        assert isinstance(body, CompletionRequest)
        return [self._text(part) for part in _parts(body.prompt)]

    def _turn(self, turn: Message, number: int) -> dict[str, Any]:
        """A message as chat templates take it; developers are systems to those that do not tell them apart."""
        if turn.content is None and not turn.tool_calls:
            raise RequestError(f"messages.{number}.content: missing", f"messages.{number}.content")
        if (turn.role == "tool" or turn.tool_calls) and not self._tokenizer.has_role("tool"):
            raise RequestError(
                f"messages.{number}: the chat template of this model knows no tools",
                f"messages.{number}.{'role' if turn.role == 'tool' else 'tool_calls'}",
            )
        role = "system" if turn.role == "developer" and not self._tokenizer.has_role("developer") else turn.role
        rest: dict[str, Any] = {"name": turn.name, "tool_call_id": turn.tool_call_id}
        if turn.tool_calls:
            rest["tool_calls"] = [_call(call, number) for call in turn.tool_calls]
        return {"role": role, "content": turn.text, **{name: value for name, value in rest.items() if value is not None}}

    def _jobs(
        self, body: GenerationRequest, prompts: list[list[int]], max_tokens: int, echoes: Several[str | None]
    ) -> list[Job]:
        for prompt in prompts:
            self._check_prompt(prompt, max_tokens)
        route = self._route(body)
        choices = self._params(body, max_tokens).choices(body.n)
        return [
            Job(Generation(prompt, params, route), Wording(body.stop_strings, body.min_tokens, echo, max_tokens == 0))
            for prompt, echo in zip(prompts, echoes, strict=True)
            for params in choices
        ]

    def _params(self, body: GenerationRequest, max_tokens: int) -> SamplingParams:
        asked = [body.prompt_logprobs, body.num_logprobs if body.is_echoed else None]
        return SamplingParams(
            temperature=body.temperature,
            top_p=body.top_p,
            top_k=max(0, body.top_k),
            min_p=body.min_p,
            repetition_penalty=body.repetition_penalty,
            presence_penalty=body.presence_penalty,
            frequency_penalty=body.frequency_penalty,
            logit_bias={int(token): bias for token, bias in body.logit_bias.items()},
            allowed_token_ids=None if body.allowed_token_ids is None else frozenset(body.allowed_token_ids),
            bad_words_ids=tuple(self._tokenizer.spellings(body.bad_words)),
            grammar=body.grammar,
            min_tokens=body.min_tokens,
            max_tokens=max(1, max_tokens),  # to score a prompt takes a round, and a round generates
            stop_token_ids=frozenset(body.stop_token_ids),
            ignore_eos=body.ignore_eos,
            seed=None if body.seed is None else body.seed % 2**64,
            logprobs=body.num_logprobs,
            prompt_logprobs=max((number for number in asked if number is not None), default=None),
            verifier=body.speculative_decoding.verifier or self._defaults.verifier,
        )

    def _text(self, part: str | list[int]) -> str:
        return part if isinstance(part, str) else self._tokenizer.decode(part)

    def _route(self, body: GenerationRequest) -> Route:
        """Who drafts for this request; `AUTO_DRAFT` where the learned router is still to choose."""
        options, default = body.speculative_decoding, self._defaults.route
        known = [*self._drafts, NO_DRAFT, *([AUTO_DRAFT] if self._has_router else [])]
        if options.draft is not None and options.draft not in known:
            raise RequestError(
                f"speculative_decoding.draft: expected one of {known}, got {options.draft!r}",
                "speculative_decoding.draft",
            )
        _check_at_most("speculative_decoding.K", options.K or 0, self._config.max_k)
        drafter = options.draft or default.drafter
        k = default.k if options.K is None else options.K
        return Route() if drafter in (None, NO_DRAFT) or k == 0 else Route(drafter, k)

    def _check_counts(self, body: GenerationRequest, num_prompts: int) -> None:
        _check_at_most("n", num_prompts * body.n, self._config.max_choices, " generations")
        _check_at_most("stop", len(body.stop_strings), self._config.max_stop, " strings")
        for name, texts in (("stop", body.stop_strings), ("bad_words", body.bad_words)):
            _check_at_most(name, max(map(len, texts), default=0), self._config.max_stop_length, " characters each")
        for name, tokens in (("allowed_token_ids", body.allowed_token_ids or []), ("stop_token_ids", body.stop_token_ids)):
            _check_at_most(name, len(tokens), self._target.vocab_size, " tokens")
        _check_at_most("logit_bias", len(body.logit_bias), self._config.max_logit_bias, " tokens")

    def _check_prompt(self, prompt: list[int], max_tokens: int) -> None:
        limit = self._target.max_length
        if not prompt:
            raise RequestError("prompt: expected at least one token, got none", "prompt")
        if self._config.max_prompt_tokens is not None:
            _check_at_most("prompt", len(prompt), self._config.max_prompt_tokens, " tokens")
        if len(prompt) + max(1, max_tokens) > limit:
            raise ContextLengthError(
                f"this model's maximum context length is {limit} tokens, but the prompt has {len(prompt)} and max_tokens is "
                f"{max_tokens}",
                "prompt" if len(prompt) >= limit else "max_tokens",
            )
        if not 0 <= min(prompt) <= max(prompt) < self._target.vocab_size:
            raise RequestError(f"prompt: expected token ids in [0, {self._target.vocab_size})", "prompt")


def _call(call: ToolCall, number: int) -> dict[str, Any]:
    """A tool's call as chat templates take it, with its arguments as an object."""
    try:
        arguments = json.loads(call.function.arguments)
    except ValueError as error:
        raise RequestError(f"messages.{number}.tool_calls: arguments are no JSON", f"messages.{number}.tool_calls") from error
    return {"id": call.id, "type": call.type, "function": {"name": call.function.name, "arguments": arguments}}


def _parts(prompt: str | list[str] | list[int] | list[list[int]]) -> list[str | list[int]]:
    """The prompts that a field holds."""
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise RequestError("prompt: expected at least one, got none", "prompt")
    return [prompt] if isinstance(prompt[0], int) else prompt  # type: ignore[return-value]


def _check_at_most(name: str, value: int, limit: int, unit: str = "") -> None:
    if value > limit:
        raise RequestError(f"{name}: expected at most {limit}{unit}, got {value}", name)

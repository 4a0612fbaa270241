"""What was generated in, the bodies of OpenAI's answers out."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from serve.choice import Choice
from serve.logprobs import ShownToken, TokenNames, chat_logprobs, completion_logprobs, prompt_logprobs
from serve.schema import PromptDetails, RoundFigures, RoutingFigures, SpeculativeFigures, Usage
from serve.transcript import Piece
from specdecode.decoding.sequence import Round


@dataclass(frozen=True)
class Detail:
    """What the bodies say beside the text.

    Attributes:
        num_logprobs: how many likely tokens stand at each token's place; None for no log-probabilities.
        num_prompt_logprobs: the same for the prompt's tokens.
        has_rounds: whether each chunk says how much of it was drafted.
        has_usage: whether each chunk has a field for the usage, which only the last one fills.
    """

    num_logprobs: int | None = None
    num_prompt_logprobs: int | None = None
    has_rounds: bool = False
    has_usage: bool = False


@dataclass(frozen=True)
class Head:
    """What all bodies of an answer begin with.

    Attributes:
        request_id: names the answer.
        model: the model's name.
        fingerprint: names what answers: the models and the program.
    """

    request_id: str
    model: str
    fingerprint: str


class Envelope:
    """Makes the bodies of one answer: all of them carry the same id, time and model.

    Args:
        kind: "chat" or "text", for the two endpoints.
        head: what all bodies begin with.
        names: tells what tokens are called, where anybody asks.
        detail: what the bodies say beside the text.
    """

    def __init__(self, kind: Literal["chat", "text"], head: Head, names: Callable[[], TokenNames], detail: Detail) -> None:
        self._is_chat = kind == "chat"
        self._names = names
        self._detail = detail
        self._head = {
            "id": f"{'chatcmpl' if self._is_chat else 'cmpl'}-{head.request_id}",
            "created": int(time.time()),
            "model": head.model,
            "system_fingerprint": head.fingerprint,
        }

    def whole(self, choices: list[Choice], usage: Usage) -> dict[str, Any]:
        """The body of an answer in one piece."""
        return {
            **self._head,
            "object": "chat.completion" if self._is_chat else "text_completion",
            "choices": [self._whole_choice(choice) for choice in choices],
            "usage": usage.model_dump(),
            "speculative_decoding": figures(choices).model_dump(),
            **(self._prompt_logprobs(choices[0]) if self._is_chat else {}),  # where vLLM has them: there is one prompt
        }

    def opening(self, choice: Choice) -> dict[str, Any] | None:
        """The first chunk of a choice, which names the speaker in a chat."""
        if not self._is_chat:
            return None
        speaker = {"role": "assistant", "content": ""}
        return self._chunk([{"index": choice.index, "delta": speaker, "logprobs": None, "finish_reason": None}])

    def chunk(self, choice: Choice, piece: Piece) -> dict[str, Any]:
        """A chunk with a piece of a choice's text, and what it says of speculation."""
        delta = {"content": piece.text} if piece.text else {}
        of_prompt = self._prompt_logprobs(choice) if piece.round.prompt_logprobs is not None else {}
        body = {
            "index": choice.index,
            **({"delta": delta} if self._is_chat else {"text": piece.text}),
            "logprobs": self._logprobs(piece.tokens),
            "finish_reason": piece.finish_reason,
            **({} if self._is_chat else of_prompt),
        }
        extension = self._extension(choice, piece)
        of_chat = of_prompt if self._is_chat and choice.index == 0 else {}
        return {**self._chunk([body]), **({"speculative_decoding": extension} if extension else {}), **of_chat}

    def closing(self, usage: Usage) -> dict[str, Any]:
        """The chunk that holds the usage of a stream."""
        return {**self._chunk([]), "usage": usage.model_dump()}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            **self._head,
            "object": "chat.completion.chunk" if self._is_chat else "text_completion",
            "choices": choices,
            **({"usage": None} if self._detail.has_usage else {}),
        }

    def _whole_choice(self, choice: Choice) -> dict[str, Any]:
        text = choice.transcript.text
        return {
            "index": choice.index,
            **({"message": {"role": "assistant", "content": text, "refusal": None}} if self._is_chat else {"text": text}),
            "logprobs": self._logprobs(choice.transcript.tokens),
            "finish_reason": choice.transcript.finish_reason,
            **({} if self._is_chat else self._prompt_logprobs(choice)),
        }

    def _logprobs(self, tokens: list[ShownToken]) -> dict[str, Any] | None:
        num_top = self._detail.num_logprobs
        if num_top is None:
            return None
        return (chat_logprobs if self._is_chat else completion_logprobs)(tokens, num_top, self._names())

    def _prompt_logprobs(self, choice: Choice) -> dict[str, Any]:
        num_top = self._detail.num_prompt_logprobs
        if num_top is None:
            return {}
        return {"prompt_logprobs": prompt_logprobs(choice.metrics.prompt_logprobs, num_top, self._names())}

    def _extension(self, choice: Choice, piece: Piece) -> dict[str, Any]:
        """What a chunk says of speculation: its round on request, and the choice's figures at the end."""
        of_choice = figures([choice]).model_dump() if piece.finish_reason is not None else {}
        return {**of_choice, "round": _round_figures(piece).model_dump()} if self._detail.has_rounds else of_choice


def usage(choices: list[Choice], n: int) -> Usage:
    """How many tokens a request took, whose every prompt has `n` choices; a prompt is counted once."""
    num_prompt = sum(len(choice.generation.tokens) for choice in choices[::n])
    num_generated = sum(choice.metrics.num_generated for choice in choices)
    return Usage(
        prompt_tokens=num_prompt,
        completion_tokens=num_generated,
        total_tokens=num_prompt + num_generated,
        prompt_tokens_details=PromptDetails(cached_tokens=sum(choice.metrics.num_cached for choice in choices[::n])),
    )


def figures(choices: list[Choice]) -> SpeculativeFigures:
    """What speculation did for some choices of a request, together."""
    metrics = [choice.metrics for choice in choices]
    generation = choices[0].generation
    num_drafts = sum(m.num_drafts for m in metrics)
    num_drafted = sum(m.num_drafted for m in metrics)
    num_accepted = sum(m.num_accepted for m in metrics)
    num_generated = sum(m.num_generated for m in metrics)
    num_passes = sum(m.num_target_passes for m in metrics)
    total_time_s = max(m.total_time_s for m in metrics)
    return SpeculativeFigures(
        draft=generation.route.drafter,
        K=generation.route.k,
        verifier=generation.params.verifier,
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
        routing=_routing(choices) if generation.route.arms else None,
    )


def _round_figures(piece: Piece) -> RoundFigures:
    round = piece.round
    return RoundFigures(
        draft=round.drafter,
        num_draft_tokens=round.num_drafted,
        num_accepted_tokens=round.num_accepted,
        num_tokens=len(round.tokens),
        accepted_text=piece.accepted_text,
        own_token=own_token(round),
    )


def own_token(round: Round) -> Literal["corrected", "bonus", "plain"] | None:
    """Why the target added a token of its own; None where the round ended before, or the draft goes on there."""
    if round.num_accepted == len(round.tokens):
        return None
    if round.num_drafted == 0:
        return "plain"
    return "bonus" if round.num_accepted == round.num_drafted else "corrected"


def _routing(choices: list[Choice]) -> RoutingFigures:
    route = choices[0].generation.route
    num_drafts: dict[str, int] = {}
    for choice in choices:
        for name, found in choice.metrics.verdicts.items():
            num_drafts[name] = num_drafts.get(name, 0) + found.num_drafts
    first = route.arms[0]
    others = "".join(f", then {name} {count}" for name, count in num_drafts.items() if name != first.drafter)
    return RoutingFigures(
        expected_acceptance={arm.drafter: round(arm.acceptance, 4) for arm in route.arms},
        num_drafts=num_drafts,
        reason=f"{first.drafter} was expected to be accepted most, {first.acceptance:.0%} of its tokens; it drafted "
        f"{num_drafts.get(first.drafter, 0)} times{others}",
    )

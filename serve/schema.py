"""OpenAI's requests and responses, with one field of our own in each: `speculative_decoding`.

Knows shapes and ranges; neither tokens nor models.
"""

import time
import uuid
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

NO_DRAFT = "none"


_Zero = Annotated[float, Field(ge=0, le=0)]


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(_Request):
    """What a stream carries beside text."""

    include_usage: bool = Field(default=False, description="end the stream with a chunk that holds the usage")


class SpeculativeOptions(_Request):
    """How this request is sped up."""

    draft: str | None = Field(default=None, description="a draft's name, or none; the server's default if unset")
    K: int | None = Field(default=None, ge=0, description="how many tokens to draft in a round; 0 turns drafting off")
    rounds: bool = Field(default=False, description="in a stream, say in each chunk how much of its text was drafted")


class GenerationRequest(_Request):
    """What `/v1/completions` and `/v1/chat/completions` have in common."""

    model: str
    temperature: Annotated[float, Field(ge=0)] | None = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] | None = 1.0
    top_k: Annotated[int, Field(ge=-1)] | None = 0
    n: Annotated[int, Field(ge=1)] | None = 1
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    seed: Annotated[int, Field(ge=0, lt=2**64)] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    presence_penalty: _Zero | None = Field(default=None, description="only 0 is supported")
    frequency_penalty: _Zero | None = Field(default=None, description="only 0 is supported")
    speculative_decoding: SpeculativeOptions = Field(default_factory=SpeculativeOptions)

    @field_validator("temperature", "top_p", "n", mode="after")
    @classmethod
    def _null_is_default(cls, value: float | None) -> float:
        return 1 if value is None else value

    @field_validator("stop", mode="after")
    @classmethod
    def _stop_strings(cls, value: str | list[str] | None) -> list[str]:
        stops = [value] if isinstance(value, str) else value or []
        if not all(stops):
            raise ValueError("a stop string must not be empty")
        return stops

    @property
    def stop_strings(self) -> list[str]:
        """The strings before which the text ends."""
        assert not isinstance(self.stop, str)
        return self.stop or []


class CompletionRequest(GenerationRequest):
    """The body of `/v1/completions`."""

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: Annotated[int, Field(ge=1)] | None = 16
    logprobs: None = Field(default=None, description="not supported")
    echo: Literal[False] | None = Field(default=None, description="not supported")


class TextPart(_Request):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


class Message(_Request):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    @property
    def text(self) -> str:
        """The content's text."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(GenerationRequest):
    """The body of `/v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: Literal[False] | None = Field(default=None, description="only false is supported")


class Usage(BaseModel):
    """How many tokens a request took."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class SpeculativeFigures(BaseModel):
    """What speculation did for a request; counts are named as vLLM names them."""

    draft: str | None
    K: int
    num_drafts: int
    num_draft_tokens: int
    num_accepted_tokens: int
    acceptance_rate: float
    mean_acceptance_length: float
    num_target_passes: int
    tokens_per_target_pass: float
    tokens_per_second: float
    time_to_first_token_s: float
    total_time_s: float


class RoundFigures(BaseModel):
    """What one chunk of a stream is made of."""

    num_draft_tokens: int
    num_accepted_tokens: int
    accepted_text: str = Field(description="the part of the chunk's text, from its start, that was drafted")


class ModelCard(BaseModel):
    """An entry of `/v1/models`."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "specdecode"
    max_model_len: int
    drafts: list[str]


class ModelList(BaseModel):
    """The body that `/v1/models` answers with."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class ErrorDetail(BaseModel):
    """What went wrong, in OpenAI's words."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """The body of every answer that is an error."""

    error: ErrorDetail


class Envelope:
    """Makes the bodies of one answer: all of them carry the same id, time and model.

    Args:
        kind: "chat" or "text", for the two endpoints.
        model: the model's name.
    """

    def __init__(self, kind: Literal["chat", "text"], model: str) -> None:
        self._is_chat = kind == "chat"
        self._head = {
            "id": f"{'chatcmpl' if self._is_chat else 'cmpl'}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, choices: Sequence[tuple[str, str | None]], usage: Usage, figures: SpeculativeFigures) -> dict[str, Any]:
        """The body of an answer in one piece; `choices` are texts and finish reasons."""
        return {
            **self._head,
            "object": "chat.completion" if self._is_chat else "text_completion",
            "choices": [self._choice(index, *choice) for index, choice in enumerate(choices)],
            "usage": usage.model_dump(),
            "speculative_decoding": figures.model_dump(),
        }

    def opening(self, index: int) -> dict[str, Any] | None:
        """The first chunk of a choice, which names the speaker in a chat."""
        return self._chunk([self._delta(index, {"role": "assistant", "content": ""}, None)]) if self._is_chat else None

    def chunk(self, index: int, text: str, finish_reason: str | None, extension: dict[str, Any]) -> dict[str, Any]:
        """A chunk with a piece of a choice's text, and what it says of speculation."""
        if self._is_chat:
            choice = self._delta(index, {"content": text} if text else {}, finish_reason)
        else:
            choice = self._choice(index, text, finish_reason)
        extra = {"speculative_decoding": extension} if extension else {}
        return {**self._chunk([choice]), **extra}

    def closing(self, usage: Usage) -> dict[str, Any]:
        """The chunk that holds the usage of a stream."""
        return {**self._chunk([]), "usage": usage.model_dump()}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            **self._head,
            "object": "chat.completion.chunk" if self._is_chat else "text_completion",
            "choices": choices,
        }

    def _choice(self, index: int, text: str, finish_reason: str | None) -> dict[str, Any]:
        content = {"message": {"role": "assistant", "content": text}} if self._is_chat else {"text": text}
        return {"index": index, **content, "logprobs": None, "finish_reason": finish_reason}

    @staticmethod
    def _delta(index: int, delta: dict[str, Any], finish_reason: str | None) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}

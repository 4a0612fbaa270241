"""OpenAI's requests and responses, with one field of our own in each, `speculative_decoding`, and some of vLLM's.

Knows shapes and ranges; neither tokens nor models. Of what is not done here only the value that asks for nothing is taken.
"""

import re
from abc import ABC, abstractmethod
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from specdecode.decoding.sequence import VerifierName
from specdecode.errors import RequestError
from specdecode.grammar import Grammar

NO_DRAFT, AUTO_DRAFT = "none", "auto"
MAX_LOGPROBS = 20
MAX_BAD_WORDS = 100
# OpenAI's fields that are not served: they are refused by name, but for a null, which asks for nothing.
UNSUPPORTED = frozenset(
    [
        "annotations",
        "audio",
        "function_call",
        "functions",
        "moderation",
        "parallel_tool_calls",
        "prediction",
        "reasoning_effort",
        "refusal",
        "suffix",
        "tools",
        "verbosity",
        "web_search_options",
    ]
)

_NumLogprobs = Annotated[int, Field(ge=0, le=MAX_LOGPROBS)]
_Penalty = Annotated[float, Field(ge=-2, le=2)]


def _show_nulls(schema: dict[str, Any]) -> None:
    """Says in a JSON schema that a field which may be left out may be null as well."""
    for name, field in schema.get("properties", {}).items():
        if name not in schema.get("required", []) and {"type": "null"} not in field.get("anyOf", []):
            kind = {key: field.pop(key) for key in list(field) if key not in ("title", "description", "default")}
            field["anyOf"] = [*kind.pop("anyOf", [kind]), {"type": "null"}]


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, json_schema_extra=_show_nulls)

    @model_validator(mode="before")
    @classmethod
    def _null_is_default(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        nullable = cls.model_fields.keys() | UNSUPPORTED
        return {name: value for name, value in values.items() if value is not None or name not in nullable}


class StreamOptions(_Request):
    """What a stream carries beside text."""

    include_usage: bool = Field(default=False, description="end the stream with a chunk that holds the usage")
    include_obfuscation: Literal[False] = Field(default=False, description="no padding is sent")


class SpeculativeOptions(_Request):
    """How this request is sped up."""

    draft: str | None = Field(
        default=None, description="a draft's name, none, or auto for the learned router's choice; the server's default if unset"
    )
    K: int | None = Field(default=None, ge=0, description="how many tokens to draft in a round; 0 turns drafting off")
    verifier: VerifierName | None = Field(default=None, description="how drafts are accepted; the server's default if unset")
    rounds: bool = Field(default=False, description="in a stream, say in each chunk how much of its text was drafted")


class JsonSchemaFormat(_Request):
    """A schema that the answer is JSON of."""

    name: str = Field(pattern="^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool = Field(default=False, description="refuse a schema with keywords that cannot be enforced, not pass them over")


class ResponseFormat(_Request):
    """What an answer is: free text, any JSON object, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    @property
    def grammar(self) -> Grammar | None:
        """The grammar of the answer; None for free text."""
        if self.type == "json_object":
            return Grammar.json_object("response_format")
        if self.type == "text" or self.json_schema is None:
            return None
        schema = self.json_schema
        return Grammar.json_schema(schema.schema_, is_lenient=not schema.strict, field="response_format")

    @model_validator(mode="after")
    def _has_a_schema(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise RequestError(
                "response_format: expected json_schema beside type json_schema, and only there", "response_format"
            )
        return self


class StructuredOutputs(_Request):
    """What an answer is, in vLLM's words: exactly one of these."""

    json_: dict[str, Any] | str | None = Field(default=None, alias="json", description="a JSON schema, which may be a string")
    regex: str | None = None
    choice: list[Annotated[str, Field(min_length=1)]] | None = Field(default=None, min_length=1)
    grammar: str | None = Field(default=None, description="in llguidance's dialect of Lark")

    def as_grammar(self) -> Grammar:
        """The grammar of the answer."""
        field = "structured_outputs"
        if self.regex is not None:
            return Grammar("regex", self.regex, field=field)
        if self.choice is not None:
            return Grammar.choice(self.choice, field)
        if self.grammar is not None:
            return Grammar("lark", self.grammar, field=field)
        if isinstance(self.json_, str):
            return Grammar("json_schema", self.json_, field=field)
        return Grammar.json_schema(self.json_ or {}, field=field)

    @model_validator(mode="after")
    def _is_one(self) -> "StructuredOutputs":
        if len(self.model_fields_set) != 1:
            expected = "structured_outputs: expected exactly one of json, regex, choice and grammar"
            raise RequestError(expected, "structured_outputs")
        return self


class GenerationRequest(_Request, ABC):
    """What `/v1/completions` and `/v1/chat/completions` have in common."""

    model: str = Field(description="the target's name, or a draft's, which then answers by itself")
    temperature: float = Field(default=1.0, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=-1, description="0 or -1 keeps all")
    min_p: float = Field(default=0.0, ge=0, le=1)
    repetition_penalty: float = Field(default=1.0, gt=0)
    presence_penalty: _Penalty = 0.0
    frequency_penalty: _Penalty = 0.0
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] = Field(default_factory=dict, description="by token id")
    allowed_token_ids: list[int] | None = Field(default=None, min_length=1)
    bad_words: list[Annotated[str, Field(min_length=1)]] = Field(default_factory=list, max_length=MAX_BAD_WORDS)
    n: int = Field(default=1, ge=1)
    min_tokens: int = Field(default=0, ge=0)
    max_tokens: int | None = Field(default=None, ge=1)
    stop: str | list[str] = Field(default_factory=list)
    stop_token_ids: list[int] = Field(default_factory=list)
    ignore_eos: bool = False
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**64)
    prompt_logprobs: _NumLogprobs | None = None
    stream: bool = False
    stream_options: StreamOptions = Field(default_factory=StreamOptions)
    response_format: ResponseFormat = Field(default_factory=lambda: ResponseFormat(type="text"))
    structured_outputs: StructuredOutputs | None = None
    user: str | None = Field(default=None, description="changes nothing")
    service_tier: Literal["auto", "default"] | None = Field(default=None, description="there is one")
    speculative_decoding: SpeculativeOptions = Field(default_factory=SpeculativeOptions)

    @field_validator("stop", mode="after")
    @classmethod
    def _stops_are_not_empty(cls, value: str | list[str]) -> str | list[str]:
        if not all([value] if isinstance(value, str) else value):
            raise ValueError("a stop string must not be empty")
        return value

    @field_validator("logit_bias", mode="after")
    @classmethod
    def _keys_are_token_ids(cls, value: dict[str, float]) -> dict[str, float]:
        for key in value:
            if not re.fullmatch("-?[0-9]{1,18}", key):
                raise ValueError(f"expected token ids as keys, got {key[:40]!r}")
        return value

    @model_validator(mode="after")
    def _check_stream_options(self) -> "GenerationRequest":
        if "stream_options" in self.model_fields_set and not self.stream:
            raise RequestError("stream_options: expected stream to be true beside it", "stream_options")
        return self

    @model_validator(mode="after")
    def _has_one_grammar(self) -> "GenerationRequest":
        if self.structured_outputs is not None and self.response_format.type != "text":
            raise RequestError("structured_outputs: expected no response_format beside it", "structured_outputs")
        return self

    @property
    def grammar(self) -> Grammar | None:
        """What constrains the answer."""
        return self.response_format.grammar if self.structured_outputs is None else self.structured_outputs.as_grammar()

    @property
    def stop_strings(self) -> list[str]:
        """The strings before which the text ends."""
        return [self.stop] if isinstance(self.stop, str) else self.stop

    @property
    def has_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream and self.stream_options.include_usage

    @property
    @abstractmethod
    def num_logprobs(self) -> int | None:
        """How many of the most likely tokens are reported at each generated one's place; None for not even its own."""

    @property
    def is_echoed(self) -> bool:
        """Whether the prompt stands in front of the answer."""
        return False


class CompletionRequest(GenerationRequest):
    """The body of `/v1/completions`."""

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: int = Field(default=16, ge=0)
    logprobs: _NumLogprobs | None = None
    echo: bool = False
    best_of: int | None = Field(default=None, ge=1, description="as many as n: all that is generated is answered")

    @model_validator(mode="after")
    def _check_best_of(self) -> "CompletionRequest":
        if self.best_of not in (None, self.n):
            raise RequestError(f"best_of: expected as many as n, {self.n}, got {self.best_of}", "best_of")
        return self

    @model_validator(mode="after")
    def _check_max_tokens(self) -> "CompletionRequest":
        if self.max_tokens == 0 and not self.echo:
            raise RequestError("max_tokens: expected at least 1, or 0 together with echo, got 0", "max_tokens")
        return self

    @property
    def num_logprobs(self) -> int | None:
        """See `GenerationRequest.num_logprobs`."""
        return self.logprobs

    @property
    def is_echoed(self) -> bool:
        """See `GenerationRequest.is_echoed`."""
        return self.echo


class TextPart(_Request):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


class FunctionCall(_Request):
    """What the assistant called."""

    name: str
    arguments: str = Field(description="a JSON object")


class ToolCall(_Request):
    """A call in an earlier answer of the assistant."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(_Request):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = Field(default=None, description="is shown to the chat template")
    tool_calls: list[ToolCall] | None = Field(default=None, min_length=1)
    tool_call_id: str | None = None

    @property
    def text(self) -> str:
        """The content's text."""
        return "".join(part.text for part in self.content) if isinstance(self.content, list) else self.content or ""


class ChatRequest(GenerationRequest):
    """The body of `/v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool = False
    top_logprobs: _NumLogprobs | None = None
    store: Literal[False] = Field(default=False, description="nothing is stored")
    metadata: Annotated[dict[str, str], Field(max_length=0)] = Field(
        default_factory=dict, description="of what is stored: there is nothing"
    )
    modalities: list[Literal["text"]] | None = Field(default=None, min_length=1, max_length=1)
    tool_choice: Literal["none"] = Field(default="none", description="no tool is ever called")
    safety_identifier: str | None = Field(default=None, description="changes nothing")
    prompt_cache_key: str | None = Field(default=None, description="changes nothing: every known prefix is found")

    @model_validator(mode="after")
    def _check_top_logprobs(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError("top_logprobs: expected logprobs to be true beside it", "top_logprobs")
        return self

    @model_validator(mode="after")
    def _check_max_tokens(self) -> "ChatRequest":
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise RequestError("max_completion_tokens: expected no other max_tokens beside it", "max_completion_tokens")
        return self

    @property
    def num_logprobs(self) -> int | None:
        """See `GenerationRequest.num_logprobs`."""
        return (self.top_logprobs or 0) if self.logprobs else None


class PromptDetails(BaseModel):
    """What is to be known of a prompt's tokens."""

    cached_tokens: int = Field(description="those of a prefix that was computed for another request")


class Usage(BaseModel):
    """How many tokens a request took."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class RoutingFigures(BaseModel):
    """What the learned router expected of a request's first generation, and who drafted."""

    expected_acceptance: dict[str, float] = Field(description="by draft, the best first")
    num_drafts: dict[str, int] = Field(description="rounds in which each draft guessed")
    reason: str


class SpeculativeFigures(BaseModel):
    """What speculation did for a request; counts are named as vLLM names them."""

    draft: str | None
    K: int
    verifier: str
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
    routing: RoutingFigures | None = None


class RoundFigures(BaseModel):
    """What one chunk of a stream is made of."""

    draft: str | None = Field(description="who drafted; null where nothing was")
    num_draft_tokens: int
    num_accepted_tokens: int
    num_tokens: int = Field(description="the accepted ones, and the target's own after them")
    accepted_text: str = Field(description="the part of the chunk's text, from its start, that was drafted")
    own_token: Literal["corrected", "bonus", "plain"] | None = Field(
        description="why the target added a token of its own: in place of a rejected one, after a draft accepted whole, "
        "or because nothing was drafted; null where it added none"
    )


class ModelCard(BaseModel):
    """An entry of `/v1/models`."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "specdecode"
    max_model_len: int | None = Field(description="the longest prompt and answer in tokens; null while the model is loading")
    drafts: list[str] = Field(description="who may draft for it")


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

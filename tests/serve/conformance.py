"""What OpenAI's API is to do here, field by field: what is sent, and what must be seen in the answer.

`.venv/bin/python -m tests.serve.conformance` prints the table of docs/api.md.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import openai
import pytest
from openai import OpenAI

PROMPT = "def read_lines(path):\n"
MESSAGES = [{"role": "user", "content": "Can I order a large latte please?"}]
ENDPOINTS = ("completions", "chat")
TOKEN = 300  # any that is no special one
# What the typed client does not know goes into the body as it is.
EXTRA = {
    "top_k", "min_p", "repetition_penalty", "ignore_eos", "min_tokens", "stop_token_ids", "allowed_token_ids", "bad_words",
    "prompt_logprobs", "response_format", "structured_outputs", "speculative_decoding", "unknown",
}  # fmt: skip


@dataclass(frozen=True)
class Answer:
    """An answer as its reader sees it, whole or streamed.

    Attributes:
        bodies: the one body, or all chunks.
        is_chat: which endpoint it is of.
    """

    bodies: list[dict[str, Any]]
    is_chat: bool

    @property
    def choices(self) -> list[dict[str, Any]]:
        """All choices of all bodies."""
        return [choice for body in self.bodies for choice in body["choices"]]

    @property
    def texts(self) -> list[str]:
        """The text of each choice."""
        found: dict[int, str] = {}
        for choice in self.choices:
            part = choice.get("text") or choice.get("message", choice.get("delta", {})).get("content") or ""
            found[choice["index"]] = found.get(choice["index"], "") + part
        return [found[index] for index in sorted(found)]

    @property
    def text(self) -> str:
        """The text of the only choice."""
        [text] = self.texts
        return text

    @property
    def finish_reasons(self) -> list[str]:
        """How the choices ended."""
        return [choice["finish_reason"] for choice in self.choices if choice["finish_reason"]]

    @property
    def usage(self) -> dict[str, Any]:
        """How many tokens it took."""
        [usage] = [body["usage"] for body in self.bodies if body.get("usage")]
        return usage

    @property
    def logprobs(self) -> list[dict[str, Any]]:
        """The log-probabilities of all choices."""
        return [choice["logprobs"] for choice in self.choices if choice.get("logprobs")]


class Caller:
    """Sends requests to one endpoint through the typed client.

    Args:
        client: whose base URL is the server's.
        model: what to ask.
        endpoint: completions or chat.
        is_stream: whether answers come in chunks.
    """

    def __init__(self, client: OpenAI, model: str, endpoint: str, is_stream: bool) -> None:
        self.model = model
        self.is_chat = endpoint == "chat"
        self.is_stream = is_stream
        self._client = client

    def __call__(self, **fields: Any) -> Answer:
        """Asks for four tokens, the most likely ones, unless the fields say otherwise."""
        asked = {"model": self.model, "max_tokens": 4, "temperature": 0, "stream": self.is_stream}
        asked |= {"messages": MESSAGES} if self.is_chat else {"prompt": PROMPT}
        asked |= {"stream_options": {"include_usage": True}} if self.is_stream else {}
        asked |= fields
        if "max_completion_tokens" in fields:
            del asked["max_tokens"]
        known = {name: value for name, value in asked.items() if name not in EXTRA}
        extra = {name: value for name, value in asked.items() if name in EXTRA}
        api = self._client.chat.completions if self.is_chat else self._client.completions
        answer: Any = api.create(**known, extra_body=extra)
        return Answer([part.to_dict() for part in answer] if self.is_stream else [answer.to_dict()], self.is_chat)

    def refuses(self, param: str, **fields: Any) -> None:
        """Asserts that the request is a mistake, which the error names."""
        extra = {name: fields.pop(name) for name in list(fields) if name in REFUSED or name in EXTRA}
        api: Any = self._client.chat.completions if self.is_chat else self._client.completions
        body = {"model": self.model, "stream": self.is_stream}
        body |= {"messages": MESSAGES} if self.is_chat else {"prompt": PROMPT}
        with pytest.raises(openai.BadRequestError) as caught:
            api.create(**(body | fields), extra_body=extra)
        assert (caught.value.param, caught.value.type) == (param, "invalid_request_error")


Check = Callable[[Caller], None]


@dataclass(frozen=True)
class Case:
    """A field, and what it does.

    Attributes:
        name: the field, and how it is used.
        says: what is checked.
        check: checks it.
        endpoints: where there is such a field.
        is_ours: whether other servers do it otherwise.
    """

    name: str
    says: str
    check: Check = field(repr=False)
    endpoints: tuple[str, ...] = ENDPOINTS
    is_ours: bool = False


COMPLETIONS, CHAT = ("completions",), ("chat",)
REFUSED = {
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
    "functions": [{"name": "f"}],
    "function_call": "auto",
    "parallel_tool_calls": True,
    "audio": {"voice": "alloy", "format": "wav"},
    "prediction": {"type": "content", "content": "a"},
    "reasoning_effort": "low",
    "verbosity": "low",
    "web_search_options": {},
}


def _model(ask: Caller) -> None:
    assert {body["model"] for body in ask().bodies} == {ask.model}


def _object(ask: Caller) -> None:
    answer = ask()
    whole, chunk = ("chat.completion", "chat.completion.chunk") if answer.is_chat else ("text_completion",) * 2
    assert {body["object"] for body in answer.bodies} == {chunk if ask.is_stream else whole}
    assert len({(body["id"], body["created"]) for body in answer.bodies}) == 1


def _one_of_each(ask: Caller) -> None:
    prompts: list[Any] = [PROMPT, "import os\n"]
    separate = [ask(prompt=prompt).text for prompt in prompts]
    assert ask(prompt=prompts).texts == separate


def _ids(ask: Caller) -> None:
    assert ask(prompt=[TOKEN, TOKEN + 1, TOKEN + 2]).usage["prompt_tokens"] == 3


def _lists_of_ids(ask: Caller) -> None:
    answer = ask(prompt=[[TOKEN, TOKEN + 1], [TOKEN + 2]])
    assert (len(answer.texts), answer.usage["prompt_tokens"]) == (2, 3)


def _parts(ask: Caller) -> None:
    content = MESSAGES[0]["content"]
    whole = ask().text
    assert ask(messages=[{"role": "user", "content": [{"type": "text", "text": content}]}]).text == whole


def _roles(ask: Caller) -> None:
    turns = [{"role": "system", "content": "Be brief."}, *MESSAGES, {"role": "assistant", "content": "Yes."}, *MESSAGES]
    assert ask(messages=turns).usage["prompt_tokens"] > ask().usage["prompt_tokens"]


def _developer(ask: Caller) -> None:
    as_system, as_developer = (
        ask(messages=[{"role": role, "content": "Be brief."}, *MESSAGES]) for role in ("system", "developer")
    )
    assert as_developer.text == as_system.text


def _replayed(ask: Caller) -> None:
    nothing = {"refusal": None, "annotations": None, "audio": None, "function_call": None, "tool_calls": None}
    ask(messages=[*MESSAGES, {"role": "assistant", "content": "Yes.", **nothing}, *MESSAGES])


def _max_tokens(ask: Caller) -> None:
    answer = ask(max_tokens=3, ignore_eos=True)
    assert (answer.usage["completion_tokens"], answer.finish_reasons) == (3, ["length"])


def _max_completion_tokens(ask: Caller) -> None:
    assert ask(max_completion_tokens=3, ignore_eos=True).usage["completion_tokens"] == 3


def _temperature(ask: Caller) -> None:
    assert ask(temperature=0).text == ask(temperature=0).text
    assert ask(temperature=1.5).usage["completion_tokens"] <= 4


def _same_as_greedy(**fields: Any) -> Check:
    def check(ask: Caller) -> None:
        assert ask(temperature=1, **fields).text == ask().text

    return check


def _n(ask: Caller) -> None:
    answer = ask(n=2, temperature=1, seed=5)
    assert (len(answer.texts), len(answer.finish_reasons)) == (2, 2)
    assert ask(n=1, temperature=1, seed=5).usage["prompt_tokens"] == answer.usage["prompt_tokens"]


def _stop(is_list: bool) -> Check:
    def check(ask: Caller) -> None:
        whole = ask(max_tokens=8).text
        stop = whole[len(whole) // 2 :][:3]
        answer = ask(max_tokens=8, stop=["never said", stop] if is_list else stop)
        assert (answer.text, answer.finish_reasons) == (whole[: whole.index(stop)], ["stop"])

    return check


def _seed(value: int) -> Check:
    def check(ask: Caller) -> None:
        assert ask(temperature=1, seed=value).text == ask(temperature=1, seed=value).text

    return check


def _stream(ask: Caller) -> None:
    answer = ask()
    assert len(answer.bodies) > 1 if ask.is_stream else len(answer.bodies) == 1
    assert len(answer.finish_reasons) == 1


def _include_usage(ask: Caller) -> None:
    if not ask.is_stream:
        ask.refuses("stream_options", stream_options={"include_usage": True})
        return
    *others, last = ask().bodies
    assert (last["choices"], last["usage"]["completion_tokens"]) == ([], 4)
    assert all(body.get("usage") is None for body in others)
    without = ask(stream_options={"include_usage": False}).bodies
    assert all(body["choices"] and "usage" not in body for body in without)


def _usage(ask: Caller) -> None:
    usage = ask().usage
    assert usage["prompt_tokens"] + usage["completion_tokens"] == usage["total_tokens"]


def _cached(ask: Caller) -> None:
    ask()
    usage = ask().usage
    assert usage["prompt_tokens_details"]["cached_tokens"] == usage["prompt_tokens"] - 1


def _completion_logprobs(ask: Caller) -> None:
    answer = ask(logprobs=2)
    tokens = [token for part in answer.logprobs for token in part["tokens"]]
    assert "".join(tokens) == answer.text
    for part in answer.logprobs:
        assert all(2 <= len(top) <= 3 for top in part["top_logprobs"])
        assert all(value <= 0 for value in part["token_logprobs"])
        assert len(part["text_offset"]) == len(part["tokens"])


def _chat_logprobs(ask: Caller) -> None:
    answer = ask(logprobs=True)
    entries = [entry for part in answer.logprobs for entry in part["content"]]
    assert len(entries) == answer.usage["completion_tokens"]
    assert all(entry["logprob"] <= 0 and entry["top_logprobs"] == [] for entry in entries)


def _top_logprobs(ask: Caller) -> None:
    entries = [entry for part in ask(logprobs=True, top_logprobs=2).logprobs for entry in part["content"]]
    for entry in entries:
        assert entry["token"] == entry["top_logprobs"][0]["token"]
        assert len(entry["top_logprobs"]) == 2
    ask.refuses("top_logprobs", top_logprobs=2)


def _only(token: int) -> dict[str, Any]:
    return {"logit_bias": {str(token): 100}}


def _logit_bias(ask: Caller) -> None:
    answer = ask(**_only(TOKEN))
    assert answer.usage["completion_tokens"] == 4
    assert answer.text == answer.text[: len(answer.text) // 4] * 4


def _penalty(name: str, strongest: float, out_of_range: float) -> Check:
    def check(ask: Caller) -> None:
        # Two tokens are allowed; the one that was said becomes ever less likely, or is as much so as may be.
        answer = ask(logit_bias={str(TOKEN): 100, str(TOKEN + 1): 100}, max_tokens=12, **{name: strongest})
        assert answer.usage["completion_tokens"] == 12
        ask.refuses(name, **{name: out_of_range})

    return check


def _echo(ask: Caller) -> None:
    assert ask(echo=True).text == PROMPT + ask().text
    scored = ask(echo=True, max_tokens=0, logprobs=1)
    assert (scored.text, scored.usage["completion_tokens"]) == (PROMPT, 0)


def _taken(**fields: Any) -> Check:
    def check(ask: Caller) -> None:
        assert ask(**fields).text == ask().text

    return check


def _fingerprint(ask: Caller) -> None:
    [fingerprint] = {body["system_fingerprint"] for body in ask().bodies}
    assert fingerprint.startswith("fp_")


def _ignore_eos(ask: Caller) -> None:
    answer = ask(ignore_eos=True, max_tokens=8)
    assert (answer.usage["completion_tokens"], answer.finish_reasons) == (8, ["length"])


def _min_tokens(ask: Caller) -> None:
    assert ask(min_tokens=3, max_tokens=6, stop_token_ids=[TOKEN], **_only(TOKEN)).usage["completion_tokens"] >= 3


def _stop_token_ids(ask: Caller) -> None:
    answer = ask(stop_token_ids=[TOKEN], **_only(TOKEN))
    assert (answer.usage["completion_tokens"], answer.finish_reasons) == (1, ["stop"])


def _allowed(ask: Caller) -> None:
    assert ask(allowed_token_ids=[TOKEN]).text == ask(**_only(TOKEN)).text


def _bad_words(ask: Caller) -> None:
    word = ask(max_tokens=8).text.split()[0]
    assert word not in ask(max_tokens=8, bad_words=[word]).text


def _prompt_logprobs(ask: Caller) -> None:
    answer = ask(prompt_logprobs=1)
    where = answer.bodies if ask.is_chat else answer.choices  # a chat has one prompt, however many choices
    [shown] = [part["prompt_logprobs"] for part in where if part.get("prompt_logprobs")]
    assert (shown[0], len(shown)) == (None, answer.usage["prompt_tokens"])


def _response_format(ask: Caller) -> None:
    schema = {
        "type": "object",
        "properties": {"is_hot": {"type": "boolean"}},
        "required": ["is_hot"],
        "additionalProperties": False,
    }
    asked = {"type": "json_schema", "json_schema": {"name": "order", "schema": schema}}
    assert type(json.loads(ask(response_format=asked, max_tokens=48).text)["is_hot"]) is bool


def _json_object(ask: Caller) -> None:
    answer = ask(response_format={"type": "json_object"}, max_tokens=300, seed=2, temperature=1)
    assert answer.text.startswith("{")
    if answer.finish_reasons == ["stop"]:  # small models' objects do not always end
        assert isinstance(json.loads(answer.text), dict)


def _structured_outputs(ask: Caller) -> None:
    assert ask(structured_outputs={"choice": ["latte", "mocha"]}, max_tokens=8).text in ("latte", "mocha")


def _speculative(ask: Caller) -> None:
    answer = ask(speculative_decoding={"draft": "code", "K": 3})
    [figures] = [body["speculative_decoding"] for body in answer.bodies if "speculative_decoding" in body]
    assert (figures["draft"], figures["K"]) == ("code", 3)
    assert answer.text == ask(speculative_decoding={"draft": "none"}).text
    ask.refuses("speculative_decoding.draft", speculative_decoding={"draft": "nobody"})


def _model_of(draft: str) -> Check:
    def check(ask: Caller) -> None:
        answer = ask(model=draft)
        assert {body["model"] for body in answer.bodies} == {draft}
        assert answer.usage["completion_tokens"] == 4
        [figures] = [body["speculative_decoding"] for body in answer.bodies if "speculative_decoding" in body]
        assert (figures["draft"], figures["num_draft_tokens"]) == (None, 0)

    return check


def _refused(param: str, **fields: Any) -> Check:
    return lambda ask: ask.refuses(param, **fields)


CASES = [
    Case("`model`", "is the answer's model", _model),
    Case("`model`: a draft in its own deployment", "answers by itself, without speculation", _model_of("code"), is_ours=True),
    Case("`model`: a draft in the target's process", "the same", _model_of("generic"), is_ours=True),
    Case("`id`, `object`, `created`", "OpenAI's names, the same in every chunk", _object),
    Case("`prompt`: list of strings", "a choice for each, in order", _one_of_each, COMPLETIONS),
    Case("`prompt`: token ids", "counted as they are", _ids, COMPLETIONS),
    Case("`prompt`: lists of token ids", "a choice for each", _lists_of_ids, COMPLETIONS),
    Case("`prompt`: empty", "refused", _refused("prompt", prompt=""), COMPLETIONS),
    Case("`messages`: text parts", "the same as their text", _parts, CHAT),
    Case("`messages`: image parts", "refused by name", _refused(
        "messages.0.content.0.type",
        messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}],
    ), CHAT, is_ours=True),
    Case("`messages`: system, user, assistant", "all are part of the prompt", _roles, CHAT),
    Case("`messages`: developer", "a system, unless the chat template tells them apart", _developer, CHAT, is_ours=True),
    Case("`messages`: tool", "refused where the chat template knows no tools", _refused(
        "messages.0.role", messages=[{"role": "tool", "content": "4", "tool_call_id": "1"}]
    ), CHAT, is_ours=True),
    Case("`messages`: an answer sent back", "nulls of other fields are taken", _replayed, CHAT),
    Case("`messages`: none", "refused", _refused("messages", messages=[]), CHAT),
    Case("`max_tokens`", "as many, and `length`", _max_tokens),
    Case("`max_tokens`: beyond the context", "refused", _refused("max_tokens", max_tokens=10**8)),
    Case("`max_completion_tokens`", "the same", _max_completion_tokens, CHAT),
    Case("`max_completion_tokens`: another `max_tokens` beside it", "refused", _refused(
        "max_completion_tokens", max_tokens=3, max_completion_tokens=4
    ), CHAT, is_ours=True),
    Case("`temperature`", "0 is the most likely token, and repeatable", _temperature),
    Case("`temperature`: negative", "refused", _refused("temperature", temperature=-1)),
    Case("`top_p`", "a small one is greedy", _same_as_greedy(top_p=1e-6)),
    Case("`n`", "as many choices; the prompt counts once", _n),
    Case("`stop`: a string", "the text ends before it, with `stop`", _stop(is_list=False)),
    Case("`stop`: a list", "the same", _stop(is_list=True)),
    Case("`seed`", "repeats a sampled answer", _seed(7)),
    Case("`seed`: negative", "the same", _seed(-7)),
    Case("`stream`", "several chunks, one of them with the finish reason", _stream),
    Case("`stream_options.include_usage`", "a last chunk with it, null before; refused without `stream`", _include_usage),
    Case("`usage`", "prompt and answer add up", _usage),
    Case("`usage.prompt_tokens_details.cached_tokens`", "a prompt sent again is cached but for its last token", _cached,
         is_ours=True),
    Case("`logprobs`: a number", "that many likely tokens at each token, beside itself", _completion_logprobs, COMPLETIONS),
    Case("`logprobs`: true", "an entry for each token", _chat_logprobs, CHAT),
    Case("`top_logprobs`", "that many likely tokens at each; refused without `logprobs`", _top_logprobs, CHAT),
    Case("`logit_bias`", "100 makes a token the only one", _logit_bias),
    Case("`presence_penalty`", "in [-2, 2]", _penalty("presence_penalty", 2, 2.5)),
    Case("`frequency_penalty`", "in [-2, 2]", _penalty("frequency_penalty", 2, -2.5)),
    Case("`echo`", "the prompt stands in front; with `max_tokens` 0 it is scored only", _echo, COMPLETIONS),
    Case("`best_of`: `n`", "taken", _taken(best_of=1), COMPLETIONS),
    Case("`best_of`: more", "refused", _refused("best_of", best_of=2), COMPLETIONS, is_ours=True),
    Case("`suffix`", "refused", _refused("suffix", suffix="a"), COMPLETIONS, is_ours=True),
    Case("`user`", "taken; changes nothing", _taken(user="me")),
    Case("`safety_identifier`", "taken; changes nothing", _taken(safety_identifier="me"), CHAT),
    Case("`prompt_cache_key`", "taken; changes nothing, since every known prefix is found", _taken(prompt_cache_key="a"), CHAT),
    Case("`store`: false", "taken", _taken(store=False), CHAT),
    Case("`store`: true", "refused", _refused("store", store=True), CHAT, is_ours=True),
    Case("`metadata`", "refused, as at OpenAI without `store`", _refused("metadata", metadata={"a": "b"}), CHAT, is_ours=True),
    Case("`service_tier`: auto, default", "taken: there is one", _taken(service_tier="auto"), CHAT),
    Case("`service_tier`: others", "refused", _refused("service_tier", service_tier="flex"), CHAT, is_ours=True),
    Case("`modalities`: text", "taken", _taken(modalities=["text"]), CHAT),
    Case("`modalities`: audio", "refused", _refused("modalities.0", modalities=["audio"]), CHAT, is_ours=True),
    Case("`tool_choice`: none", "taken: no tool is ever called", _taken(tool_choice="none"), CHAT),
    *(Case(f"`{name}`", "refused", _refused(name, **{name: value}), CHAT, is_ours=True) for name, value in REFUSED.items()),
    Case("any other field", "refused by its name", _refused("unknown", unknown=1), is_ours=True),
    Case("`system_fingerprint`", "names the models and the version of the program", _fingerprint, is_ours=True),
    Case("`top_k`", "1 is greedy", _same_as_greedy(top_k=1)),
    Case("`min_p`", "1 is greedy", _same_as_greedy(min_p=1)),
    Case("`repetition_penalty`", "above 0", _penalty("repetition_penalty", 1.5, -1)),
    Case("`ignore_eos`", "goes on to `max_tokens`", _ignore_eos),
    Case("`min_tokens`", "no end token before", _min_tokens),
    Case("`stop_token_ids`", "ends the answer, with `stop`", _stop_token_ids),
    Case("`allowed_token_ids`", "nothing else is said", _allowed),
    Case("`bad_words`", "never said", _bad_words),
    Case("`prompt_logprobs`", "an entry for each token of the prompt", _prompt_logprobs),
    Case("`response_format`: json_schema", "JSON of the schema", _response_format),
    Case("`response_format`: json_object", "a JSON object", _json_object),
    Case("`structured_outputs`: choice", "one of the texts", _structured_outputs),
    Case("`speculative_decoding`", "who drafts, and how much; the answer says what it did", _speculative, is_ours=True),
]  # fmt: skip


def table() -> str:
    """The table of docs/api.md."""
    lines = ["| field | completions | chat | what is checked, whole and streamed |", "|---|---|---|---|"]
    for case in CASES:
        marks = " | ".join("✓" if endpoint in case.endpoints else "" for endpoint in ENDPOINTS)
        lines.append(f"| {case.name} | {marks} | {case.says} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())

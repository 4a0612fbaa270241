"""The endpoint, through the client that its users have; answers are compared with the library's."""

import json
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import torch
from openai import OpenAI

from specdecode import speculative_decode
from specdecode.backends.backend import ModelBackend
from specdecode.evaluation.prompts import Prompt
from specdecode.text import Tokenizer
from tests.serve.conftest import DRAFTS, Expect

CODE = "def read_lines(path):\n"
CHAT = [{"role": "user", "content": "Can I order a large latte please?"}]


def speculative(draft: str, **options: object) -> dict[str, object]:
    return {"speculative_decoding": {"draft": draft, **options}}


@pytest.mark.parametrize("draft", [*DRAFTS, "lookup", "none"])
def test_a_completion_is_the_targets_own_whatever_the_draft(
    client: OpenAI, tokenizer: Tokenizer, expect: Expect, draft: str
) -> None:
    answer = client.completions.create(model="tiny", prompt=CODE, max_tokens=24, temperature=0, extra_body=speculative(draft))
    assert answer.choices[0].text == expect(tokenizer.encode(CODE))
    assert answer.object == "text_completion"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(tokenizer.encode(CODE))
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_chat_answer_streamed_is_the_chat_answer_whole(client: OpenAI, tokenizer: Tokenizer, expect: Expect) -> None:
    options = {"model": "tiny", "messages": CHAT, "max_completion_tokens": 24, "temperature": 0}
    whole = client.chat.completions.create(**options).choices[0]
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])
    assert streamed == whole.message.content == expect(tokenizer.encode_chat(CHAT))
    assert chunks[-2].choices[0].finish_reason == whole.finish_reason
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_stream_comes_in_several_pieces(client: OpenAI) -> None:
    chunks = list(client.completions.create(model="tiny", prompt=CODE, max_tokens=24, temperature=0, stream=True))
    assert sum(bool(chunk.choices[0].text) for chunk in chunks) > 2


def test_32_concurrent_streams_are_all_right(
    client: OpenAI, tokenizer: Tokenizer, expect: Expect, prompts: list[Prompt]
) -> None:
    seeds = [200 + number if number != 14 else 314 for number in range(32)]  # no draw is a near tie, which batches may turn

    def stream(number: int) -> str:
        prompt, draft = prompts[number], DRAFTS[number % len(DRAFTS)]
        chunks = client.completions.create(
            model="tiny",
            prompt=prompt.encode(tokenizer),
            max_tokens=24,
            temperature=(number % 3) * 0.5,
            seed=seeds[number],
            stream=True,
            extra_body=speculative(draft),
        )
        return "".join(chunk.choices[0].text for chunk in chunks)

    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(stream, range(32)))
    for number, answer in enumerate(answers):
        draft, temperature = DRAFTS[number % len(DRAFTS)], (number % 3) * 0.5
        tokens = prompts[number].encode(tokenizer)
        assert answer == expect(tokens, draft, temperature=temperature, seed=seeds[number]), number


def test_the_figures_tell_what_speculation_did(client: OpenAI) -> None:
    body = {"model": "tiny", "prompt": CODE, "max_tokens": 24, "temperature": 0}
    figures = client.completions.create(**body, extra_body=speculative("code", K=3)).to_dict()["speculative_decoding"]
    assert (figures["draft"], figures["K"]) == ("code", 3)
    assert figures["num_draft_tokens"] >= figures["num_accepted_tokens"] > 0
    assert figures["num_target_passes"] * (1 + 3) >= 24
    plain = client.completions.create(**body, extra_body=speculative("none")).to_dict()["speculative_decoding"]
    assert (plain["draft"], plain["K"], plain["num_draft_tokens"], plain["num_target_passes"]) == (None, 0, 0, 24)


def test_each_round_says_which_of_its_text_was_drafted(http: httpx.Client) -> None:
    body = {"model": "tiny", "prompt": CODE, "max_tokens": 24, "temperature": 0, "stream": True}
    response = http.post("/v1/completions", json={**body, **speculative("code", rounds=True)})
    events = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]
    rounds = [event["speculative_decoding"]["round"] for event in events]
    assert all(
        event["choices"][0]["text"].startswith(round["accepted_text"]) for event, round in zip(events, rounds, strict=True)
    )
    assert sum(round["num_accepted_tokens"] for round in rounds) == events[-1]["speculative_decoding"]["num_accepted_tokens"]
    assert sum(round["num_tokens"] for round in rounds) == 24
    assert {round["draft"] for round in rounds if round["num_draft_tokens"]} == {"code"}
    assert {"corrected", "bonus"} <= {round["own_token"] for round in rounds}
    assert response.text.endswith("data: [DONE]\n\n")


def test_several_prompts_and_choices_come_back_in_order(client: OpenAI, tokenizer: Tokenizer, expect: Expect) -> None:
    texts = [CODE, "import os\n"]
    answer = client.completions.create(model="tiny", prompt=texts, n=2, max_tokens=12, temperature=1.0, seed=5)
    expected = [
        expect(tokenizer.encode(text), "generic", max_tokens=12, temperature=1.0, seed=5 + n)
        for text in texts
        for n in range(2)
    ]
    assert [choice.text for choice in answer.choices] == expected
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]


def test_a_stop_string_ends_the_text_before_it(client: OpenAI, tokenizer: Tokenizer, expect: Expect) -> None:
    text = expect(tokenizer.encode(CODE), max_tokens=48)
    stop = text[len(text) // 2 :][:3]
    chunks = list(client.completions.create(model="tiny", prompt=CODE, max_tokens=48, temperature=0, stop=[stop], stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == text[: text.index(stop)]
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_models_lists_the_model_and_its_drafts(client: OpenAI) -> None:
    target, *drafts = client.models.list().data
    assert target.id == client.models.retrieve("tiny").id == "tiny"
    assert set(target.to_dict()["drafts"]) == {*DRAFTS, "lookup"}
    assert {draft.id for draft in drafts} == set(DRAFTS)


@pytest.mark.parametrize("draft", ["generic", "code"])
def test_a_draft_asked_by_its_name_says_what_it_says_alone(
    client: OpenAI, models: dict[str, ModelBackend], tokenizer: Tokenizer, draft: str
) -> None:
    tokens = tokenizer.encode(CODE)
    alone, _ = speculative_decode(models[draft], None, torch.tensor([tokens]), 24)
    answer = client.completions.create(model=draft, prompt=CODE, max_tokens=24, temperature=0)
    assert answer.choices[0].text == tokenizer.decode(alone[0, len(tokens) :].tolist())


def test_a_draft_goes_on_drafting_while_it_answers(client: OpenAI, tokenizer: Tokenizer, expect: Expect) -> None:
    def ask(model: str) -> str:
        return client.completions.create(model=model, prompt=CODE, max_tokens=24, temperature=0).choices[0].text

    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(ask, ["generic", "tiny", "generic"] * 4))
    assert set(answers[1::3]) == {expect(tokenizer.encode(CODE))}
    assert len(set(answers[::3] + answers[2::3])) == 1


def test_a_client_that_leaves_frees_its_place(http: httpx.Client) -> None:
    body = {"model": "tiny", "prompt": CODE, "max_tokens": 1500, "ignore_eos": True, "stream": True}
    for _ in range(40):  # more than fit the batch
        with http.stream("POST", "/v1/completions", json=body) as response:
            next(response.iter_lines())
    answer = http.post("/v1/completions", json={**body, "max_tokens": 4, "stream": False}, timeout=20)
    assert answer.json()["usage"]["completion_tokens"] == 4

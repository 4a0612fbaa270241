"""Bodies with log-probabilities are JSON, name each token alone, and hold its bytes."""

import json

import pytest

from serve.logprobs import ShownToken, TokenNames, chat_logprobs, completion_logprobs, prompt_logprobs
from specdecode.decoding.sequence import TokenLogprob
from specdecode.text import Tokenizer

EMOJI = "😀"


@pytest.fixture(scope="module")
def names(tokenizer: Tokenizer) -> TokenNames:
    return TokenNames(tokenizer, 4096)


def shown(tokens: list[int], *, top: int = 0, value: float = -1.0) -> list[ShownToken]:
    return [
        ShownToken(token, 0, TokenLogprob(token, value, 7, tuple((other, -0.5 - other) for other in range(top))))
        for token in tokens
    ]


def test_the_bytes_of_all_tokens_are_the_text(names: TokenNames, tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode(f"a naïve {EMOJI}")
    content = chat_logprobs(shown(tokens), 0, names)["content"]
    assert bytes(byte for entry in content for byte in entry["bytes"]).decode() == f"a naïve {EMOJI}"


def test_half_a_character_is_marked_and_keeps_its_bytes(names: TokenNames, tokenizer: Tokenizer) -> None:
    first = tokenizer.encode(EMOJI)[0]
    [entry] = chat_logprobs(shown([first]), 0, names)["content"]
    assert entry["token"] == "\ufffd"
    assert EMOJI.encode().startswith(bytes(entry["bytes"]))


def test_a_special_token_is_its_name(names: TokenNames) -> None:
    assert completion_logprobs(shown([4]), 0, names)["tokens"] == ["<|end|>"]


def test_the_top_of_a_completion_holds_the_token_itself(names: TokenNames) -> None:
    [top] = completion_logprobs(shown([1000], top=5), 2, names)["top_logprobs"]
    assert list(top.values()) == [-1.0, -0.5, -1.5]


def test_of_tokens_that_look_the_same_the_likeliest_is_shown(names: TokenNames, tokenizer: Tokenizer) -> None:
    first, second = tokenizer.encode(EMOJI)[:2]
    token = ShownToken(first, 0, TokenLogprob(first, -1.0, 1, ((first, -1.0), (second, -2.0))))
    assert completion_logprobs([token], 2, names)["top_logprobs"] == [{"\ufffd": -1.0}]


def test_the_prompt_is_by_ids_the_token_itself_first(names: TokenNames) -> None:
    logprob = TokenLogprob(1000, -3.0, 9, ((5, -0.5), (6, -0.75), (7, -1.0)))
    first, second = prompt_logprobs([logprob], 2, names)
    assert first is None
    assert second is not None
    assert [(id, entry["rank"]) for id, entry in second.items()] == [("1000", 9), ("5", 1), ("6", 2)]


def test_an_impossible_token_is_still_json(names: TokenNames) -> None:
    tokens = shown([5], value=-float("inf"))
    assert completion_logprobs(tokens, 0, names)["token_logprobs"] == [-9999.0]
    assert json.dumps(chat_logprobs(tokens, 0, names), allow_nan=False)


def test_a_tokenizer_whose_bytes_are_unknown_gives_text(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tokenizer, "decoder_steps", [{"type": "WordPiece"}])
    [token] = tokenizer.encode("def")
    assert TokenNames(tokenizer, 4096).text(token) == "def"

"""A transcript is the text of its rounds, however they come, and each token is shown once its text is certain."""

import random

import pytest

from serve.transcript import Transcript, Wording
from specdecode.decoding.sequence import Round, TokenLogprob
from specdecode.text import Tokenizer

TEXT = "def read_lines(path):\n    return [naïve, 😀, 日本語]\n"


def round_of(tokens: list[int], num_accepted: int = 0, finish_reason: str | None = None) -> Round:
    logprobs = [TokenLogprob(token, -float(token), 1, ()) for token in tokens]
    return Round(tokens, num_accepted, num_accepted, finish_reason, 0.0, 0.0, logprobs)  # type: ignore[arg-type]


def rounds_of(tokens: list[int], sizes: list[int]) -> list[Round]:
    rounds, start = [], 0
    while start < len(tokens):
        size = sizes[len(rounds) % len(sizes)]
        end = start + size
        rounds.append(round_of(tokens[start:end], size - 1, "length" if end >= len(tokens) else None))
        start = end
    return rounds


@pytest.mark.parametrize("stop", [[], ["path"], ["n [na"], ["😀"], ["absent", "lines("], ["):", "n"]])
@pytest.mark.parametrize("sizes", [[1], [3], [5, 1], [100]])
def test_pieces_are_the_text_up_to_the_stop_string(tokenizer: Tokenizer, stop: list[str], sizes: list[int]) -> None:
    transcript = Transcript(tokenizer, Wording(stop))
    pieces = []
    for round in rounds_of(tokenizer.encode(TEXT), sizes):
        pieces.append(transcript.add(round))
        if transcript.finish_reason:
            break
    ends = [(TEXT.find(s) + len(s), TEXT.find(s)) for s in stop if s in TEXT]
    assert "".join(piece.text for piece in pieces) == transcript.text == TEXT[: min(ends)[1] if ends else None]
    assert transcript.finish_reason == ("stop" if ends else "length")
    assert all(piece.text.startswith(piece.accepted_text) for piece in pieces)
    assert [shown for piece in pieces for shown in piece.tokens] == transcript.tokens


def test_a_token_is_shown_with_the_text_that_it_begins(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode(TEXT)
    rng = random.Random(0)
    for _ in range(50):
        transcript, shown = Transcript(tokenizer, Wording(["日本語"])), []
        for round in rounds_of(tokens, [rng.randint(1, 5) for _ in range(7)]):
            shown += transcript.add(round).tokens
            assert all(token.offset < len(transcript.text) for token in shown)
            if transcript.finish_reason:
                break
        assert [token.token for token in shown] == tokens[: len(shown)]
        assert tokenizer.decode([token.token for token in shown]).startswith(transcript.text)


def test_the_round_in_which_a_stop_string_ends_is_cut_after_it(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("a b c d e f")
    piece = Transcript(tokenizer, Wording(["c"])).add(round_of(tokens, 5))
    assert piece.round.tokens == tokens[:3]
    assert len(piece.round.logprobs or []) == piece.round.num_accepted == 3
    assert (piece.text, piece.finish_reason) == ("a b ", "stop")


def test_no_stop_string_is_looked_for_before_min_tokens(tokenizer: Tokenizer) -> None:
    transcript = Transcript(tokenizer, Wording([" c"], min_tokens=3))
    assert transcript.add(round_of(tokenizer.encode("a b c d c e"))).text == "a b c d"


def test_the_end_token_shows_nothing_and_is_shown(tokenizer: Tokenizer) -> None:
    transcript = Transcript(tokenizer, Wording())
    piece = transcript.add(round_of([*tokenizer.encode("a"), 4], finish_reason="stop"))
    assert piece.text == "a"
    assert [(shown.token, shown.offset) for shown in piece.tokens][-1] == (4, 1)


def test_an_echo_comes_first_and_moves_the_rest(tokenizer: Tokenizer) -> None:
    prompt = tokenizer.encode("naïve: ")
    transcript = Transcript(tokenizer, Wording(echo="naïve: "))
    echo = transcript.echo(prompt, [TokenLogprob(token, -1.0, 1, ()) for token in prompt[1:]])
    assert (echo.text, echo.finish_reason, echo.round.tokens) == ("naïve: ", None, [])
    assert [shown.logprob is None for shown in echo.tokens] == [True] + [False] * (len(prompt) - 1)
    piece = transcript.add(round_of(tokenizer.encode("b"), finish_reason="length"))
    assert transcript.text == "naïve: b"
    assert piece.tokens[0].offset == len("naïve: ")


def test_an_echo_alone_drops_what_is_generated(tokenizer: Tokenizer) -> None:
    transcript = Transcript(tokenizer, Wording(echo="a", is_echo_only=True))
    transcript.echo(tokenizer.encode("a"), None)
    piece = transcript.add(round_of([4], finish_reason="stop"))
    assert (transcript.text, piece.finish_reason, piece.round.tokens, piece.tokens) == ("a", "length", [], [])

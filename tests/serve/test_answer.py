"""An answer is the text of its chunks, each part marked by where it came from."""

from typing import Any

import pytest

from serve.answer import Answer, Draft, Span
from serve.drawing import draw_answer, draw_chart, draw_choice, draw_figures, draw_legend, draw_verdict
from serve.envelope import own_token
from serve.page import draw
from specdecode.decoding.sequence import Round

FIGURES: dict[str, Any] = {"draft": "code", "routing": None}
ROUTING = {"expected_acceptance": {"code": 0.71, "chat": 0.4}, "num_drafts": {"code": 3}, "reason": "code was expected"}


def chunk(
    text: str, accepted: str, drafted: int, num_accepted: int, own: str | None, draft: str | None = "code"
) -> dict[str, Any]:
    round = {
        "draft": draft if drafted else None,
        "num_draft_tokens": drafted,
        "num_accepted_tokens": num_accepted,
        "num_tokens": num_accepted + (own is not None),
        "accepted_text": accepted,
        "own_token": own,
    }
    return {"choices": [{"text": text}], "speculative_decoding": {"round": round}}


def answer_of(*chunks: dict[str, Any], is_done: bool = True) -> Answer:
    answer = Answer()
    for number, one in enumerate(chunks, start=1):
        answer.add(one, 0.1 * number)
    answer.is_done = is_done
    return answer


CHUNKS = (
    chunk("def ", "", 0, 0, "plain"),
    chunk("read(x", "read(", 4, 2, "corrected"),
    chunk("):\n  ", "):\n", 3, 3, "bonus"),
    chunk("return", "return", 4, 2, None),
)


@pytest.mark.parametrize(
    ("num_tokens", "num_drafted", "num_accepted", "expected"),
    [(1, 0, 0, "plain"), (3, 4, 2, "corrected"), (1, 4, 0, "corrected"), (5, 4, 4, "bonus"), (2, 4, 2, None), (4, 4, 4, None)],
)
def test_a_round_says_why_the_target_added_a_token(
    num_tokens: int, num_drafted: int, num_accepted: int, expected: str | None
) -> None:
    assert own_token(Round([7] * num_tokens, num_drafted, num_accepted, None, 0.0, 0.0)) == expected


def test_the_spans_are_the_text_by_origin() -> None:
    answer = answer_of(*CHUNKS)
    assert answer.text == "def read(x):\n  return"
    assert answer.spans == [
        Span("plain", "def "),
        Span("accepted", "read("),
        Span("corrected", "x"),
        Span("accepted", "):\n"),
        Span("bonus", "  "),
        Span("accepted", "return"),
    ]


def test_a_chat_reads_the_same() -> None:
    chunks = [{**one, "choices": [{"delta": {"content": one["choices"][0]["text"]}}]} for one in CHUNKS]
    opening = {"choices": [{"delta": {"role": "assistant", "content": ""}}]}
    assert answer_of(opening, *chunks).spans == answer_of(*CHUNKS).spans


def test_the_figures_are_sums_divided_once() -> None:
    answer = answer_of(*CHUNKS)
    assert (answer.num_tokens, answer.num_drafted, answer.num_accepted) == (10, 11, 7)
    assert answer.acceptance_rate == 7 / 11
    assert answer.tokens_per_target_pass == 10 / 4
    assert answer.tokens_per_second == pytest.approx(10 / 0.4)
    assert answer.first_token_s == pytest.approx(0.1)
    assert answer.drafts == [Draft(0, 0), Draft(4, 2), Draft(3, 3), Draft(4, 2)]
    assert answer.drafters == ["code"]


def test_before_the_first_chunk_there_are_no_figures() -> None:
    shown = draw_figures(Answer())
    assert shown.count("&ndash;") == 4
    assert "nobody yet" in draw_choice(Answer())
    assert "No rounds yet" in draw_chart([])


def test_text_that_was_held_back_belongs_to_the_draft_that_it_came_with() -> None:
    assert answer_of(chunk("né", "n", 2, 2, None)).spans == [Span("accepted", "n"), Span("accepted", "é")]


@pytest.mark.parametrize("text", ["<script>alert(1)</script>", "</pre><img src=x onerror=a()>", "a & b", '"quoted"'])
def test_no_text_is_taken_for_html(text: str) -> None:
    hostile = answer_of(chunk(text, "", 0, 0, "plain"), {"error": {"message": text}})
    hostile.drafters, hostile.figures = (
        [text],
        {"draft": text, "routing": {**ROUTING, "reason": text, "expected_acceptance": {text: 0.5}}},
    )
    for part in draw(hostile, hostile, is_greedy=True):
        assert text not in part or text == '"quoted"'
        assert "<script" not in part and "<img" not in part


def test_an_error_is_one_line_above_what_there_is() -> None:
    shown = draw_answer(answer_of(CHUNKS[0], {"error": {"message": "prompt: expected at least one token, got none"}}))
    assert shown.index('role="alert"') < shown.index("def ")
    assert "Error: prompt: expected at least one token, got none</p>" in shown


def test_equal_greedy_texts_are_said_to_be_identical() -> None:
    answer, other = answer_of(*CHUNKS), answer_of(*CHUNKS[:3])
    assert "Identical" in draw_verdict(answer, answer_of(*CHUNKS), is_greedy=True)
    assert "The texts differ" in draw_verdict(answer, other, is_greedy=True)
    assert "by chance" in draw_verdict(answer, other, is_greedy=False)
    assert draw_verdict(answer, answer_of(*CHUNKS, is_done=False), is_greedy=True) == ""
    assert draw_verdict(answer, answer_of({"error": {"message": "no"}}), is_greedy=True) == ""


def test_what_the_router_chose_is_shown_with_its_reason() -> None:
    routed = answer_of(*CHUNKS, {"choices": [], "speculative_decoding": {**FIGURES, "routing": ROUTING}})
    shown = draw_choice(routed)
    assert "<b>code</b>: code was expected" in shown
    assert "code 71%, chat 40%" in shown
    named = answer_of(*CHUNKS, {"choices": [], "speculative_decoding": FIGURES})
    assert "Draft: <b>code</b>" in draw_choice(named)


def test_the_chart_has_a_bar_for_each_round_and_says_the_same_in_words() -> None:
    drafts = answer_of(*CHUNKS).drafts
    chart = draw_chart(drafts)
    assert (chart.count('class="drafted"'), chart.count('class="taken"'), chart.count("<circle")) == (3, 3, 1)
    assert chart.count("4 rounds, 3 with a draft: 3.7 tokens drafted on average, 2.3 accepted") == 2
    assert "the last 32 are shown" in draw_chart(drafts * 20)


def test_the_legend_explains_every_mark() -> None:
    for kind in ("accepted", "corrected", "bonus", "plain"):
        assert f'class="{kind}"' in draw_legend()

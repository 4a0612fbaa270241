"""Ways to decode stand beside plain decoding, data set by data set, and the words say what the figures do."""

import pytest

from specdecode.evaluation.contrast import Difference, contrast, in_words, pass_at
from specdecode.evaluation.quality import agreement, overlap, pass_at_k
from specdecode.evaluation.records import Record
from tests.evaluation.test_analysis import drafted, record


def test_each_data_set_has_its_sides_and_plain_decoding_is_first() -> None:
    records = []
    for n in range(3):
        for name in ("a", "b"):
            records += [drafted(n, 1.0, dataset=name), record("baseline", n, 2.0, dataset=name)]
    sides = contrast(sorted(records, key=lambda r: r.experiment))
    assert [(side.dataset, side.cell.experiment) for side in sides] == [
        ("a", "baseline"),
        ("a", "generic_draft"),
        ("b", "baseline"),
        ("b", "generic_draft"),
    ]
    assert [side.is_plain for side in sides] == [True, False] * 2
    assert all(side.speed.speed_up is not None and side.speed.speed_up.value == (1 if side.is_plain else 2) for side in sides)


def test_equal_answers_are_said_to_be_equal() -> None:
    sides = contrast([*(record("baseline", n, 1.0) for n in range(4)), *(drafted(n, 1.0) for n in range(4))])
    [ours] = [side for side in sides if not side.is_plain]
    assert (ours.num_same, ours.num_compared, ours.first_difference) == (4, 4, None)
    assert in_words(ours) == (
        "d, generic_draft generic K 3: all 4 greedy answers are the plain ones, token for token: their quality is equal"
    )


@pytest.mark.parametrize(("tokens", "token"), [([1, 2, 9, 4], 2), ([1, 2, 3], 3), ([1, 2, 3, 4, 5], 4)])
def test_the_first_token_that_is_not_the_plain_one_is_named(tokens: list[int], token: int) -> None:
    plain = [record("baseline", n, 1.0) for n in range(2)]
    ours = contrast([*plain, drafted(0, 1.0), drafted(1, 1.0, tokens=tokens)])[1]
    assert (ours.num_same, ours.first_difference) == (1, Difference("1", token))
    assert in_words(ours).endswith(f"1 of 2 greedy answers are NOT the plain ones, first that to 1, from token {token} on")
    assert ours.agreement is not None
    assert ours.agreement.value == pytest.approx((1 + agreement(tokens, [1, 2, 3, 4])) / 2)
    assert ours.overlap is not None
    assert ours.overlap.value == pytest.approx((1 + overlap(tokens, [1, 2, 3, 4])) / 2)


def test_sampled_answers_are_compared_by_how_many_are_right() -> None:
    plain = [record("baseline", n, 1.0, temperature=1.0, is_right=n < 4) for n in range(8)]
    ours = [drafted(n, 1.0, temperature=1.0, tokens=[9], is_right=4 <= n < 7) for n in range(8)]
    side = contrast([*plain, *ours])[1]
    assert side.to_plain is not None
    assert side.to_plain.value == pytest.approx(-1 / 8)
    assert side.first_difference is None
    assert "are right as often as the plain ones -12.5% [" in in_words(side)
    assert in_words(side).endswith("no difference beyond chance")
    better = contrast([*(record("baseline", n, 1.0, temperature=1.0, is_right=False) for n in range(8)), *ours])[1]
    assert in_words(better).endswith(": a difference beyond chance")
    unjudged = contrast([record("baseline", 0, 1.0, temperature=1.0), drafted(0, 1.0, temperature=1.0)])[1]
    assert in_words(unjudged).endswith("have the plain ones' distribution, and are not compared token for token")


def answers(item: int, *rights: bool | None) -> list[Record]:
    return [record("baseline", item, 1.0, repeat=repeat, is_right=right) for repeat, right in enumerate(rights)]


def test_pass_at_k_is_the_mean_over_questions() -> None:
    records = [*answers(0, True, False, False), *answers(1, False, False, False), *answers(2, True, True, False)]
    for k in (1, 2, 3):
        found = pass_at(records, k)
        assert found is not None
        assert found.value == pytest.approx(sum(pass_at_k(3, right, k) for right in (1, 0, 2)) / 3)
        assert found.low <= found.value <= found.high
    few = pass_at([*records, *answers(3, True)], 2)  # the last has too few answers
    assert few is not None
    assert few.value == pytest.approx(sum(pass_at_k(3, right, 2) for right in (1, 0, 2)) / 3)
    assert pass_at(answers(0, None, None), 1) is None
    assert pass_at(records, 4) is None


def test_perplexity_is_the_geometric_mean_with_its_interval() -> None:
    [side] = contrast([record("baseline", n, 1.0, perplexity=value) for n, value in enumerate((1.0, 4.0))])
    assert side.perplexity is not None
    assert (side.perplexity.low, side.perplexity.value, side.perplexity.high) == pytest.approx((1, 2, 4))


def test_failures_are_counted_and_not_compared() -> None:
    failed = drafted(0, 0.0, tokens=[], error="RuntimeError: out of memory")
    side = contrast([record("baseline", 0, 1.0), failed])[1]
    assert (side.speed.num_errors, side.num_compared) == (1, 0)
    assert in_words(side).endswith("no answer can be compared, as one of both has failed on each question")

"""Figures of a load are sums divided once, and percentiles by nearest rank; intervals are of turns; a failure is in none."""

from collections.abc import Callable

import numpy as np
import pytest

from specdecode.evaluation.figures import Figure
from specdecode.evaluation.load_analysis import Bounds, LoadRow, Percentiles, summarise_load
from specdecode.evaluation.load_records import LoadRecord


def answer(turn: int, ended_s: float, first_s: float = 0.5, num_tokens: int = 11, **values: object) -> LoadRecord:
    told: dict[str, object] = {"kind": "concurrency", "load": 2.0, "arm": "a"}
    return LoadRecord(turn=turn, ended_s=ended_s, first_s=first_s, num_tokens=num_tokens, **(told | values))  # type: ignore[arg-type]


def only_row(records: list[LoadRecord], bounds: Bounds | None = None) -> LoadRow:
    [row] = summarise_load(records, bounds).rows
    return row


def test_throughput_is_of_all_turns_together_and_its_interval_of_resampled_turns() -> None:
    row = only_row([answer(0, 1.0), answer(0, 2.0), answer(1, 3.0)])  # 2 in 2 s, and 1 in 3 s
    assert row.requests_per_second == Figure(3 / 5, 1 / 3, 1.0)  # with one turn twice: 2 / 6 and 4 / 4
    assert row.tokens_per_second == Figure(33 / 5, 11 / 3, 11.0)
    assert (row.num_answers, row.num_errors, row.offered_rate, row.goodput) == (3, 0, None, None)


def test_percentiles_are_by_nearest_rank() -> None:
    row = only_row([answer(turn, 100.0, first_s=n / 1000) for turn in (0, 1) for n in range(1, 101)])
    assert row.ttft_ms == Percentiles(Figure(50.0, 50.0, 50.0), Figure(90.0, 90.0, 90.0), Figure(99.0, 99.0, 99.0))
    assert only_row([answer(0, 4.0, first_s=n) for n in (1.0, 2.0, 3.0)]).ttft_ms == Percentiles(
        Figure(2000.0, 2000.0, 2000.0), Figure(3000.0, 3000.0, 3000.0), Figure(3000.0, 3000.0, 3000.0)
    )


def test_times_count_from_the_arrival() -> None:
    row = only_row([answer(0, 3.5, first_s=1.5, scheduled_s=1.0, started_s=1.25, kind="rate", gaps_s=[0.5, 1.5])])
    assert row.ttft_ms is not None
    assert row.tpot_ms is not None
    assert row.latency_ms is not None
    assert row.itl_ms is not None
    assert (row.ttft_ms.p50.value, row.tpot_ms.p50.value, row.latency_ms.p50.value) == (500, 200, 2500)
    assert (row.itl_ms.p50.value, row.itl_ms.p99.value) == (500, 1500)
    assert (row.late_ms, row.offered_rate) == (250, 1.0)


def test_offered_and_achieved_rate_are_of_the_same_requests() -> None:
    turn = [answer(0, at + 4.0, first_s=at + 1, scheduled_s=at, kind="rate", load=2.0) for at in (0.5, 1.0, 1.5, 2.0)]
    row = only_row([*turn, *(LoadRecord("rate", 2.0, 1, "a", scheduled_s=at, error="no") for at in (1.0, 2.0))])
    assert row.offered_rate == 6 / 4
    assert row.requests_per_second is not None
    assert row.requests_per_second.value == 4 / 6


def test_a_failure_is_counted_and_part_of_no_figure() -> None:
    good = [answer(0, 1.0), answer(1, 2.0)]
    failed = [answer(turn, 100.0, first_s=50.0, num_tokens=99, gaps_s=[9.0], error=f"no {turn % 2}") for turn in (0, 1, 0)]
    row, alone = only_row([*good, *failed]), only_row(good)
    assert (row.num_errors, row.errors) == (3, {"no 0": 2, "no 1": 1})
    names = ("requests_per_second", "tokens_per_second", "ttft_ms", "tpot_ms", "latency_ms", "itl_ms", "num_answers")
    assert [getattr(row, name) for name in names] == [getattr(alone, name) for name in names]
    nothing = only_row(failed, Bounds(ttft_ms=1.0))
    assert [getattr(nothing, name) for name in (*names[:-1], "goodput")] == [None] * 7


@pytest.mark.parametrize(
    ("bounds", "num_good"),
    [
        (Bounds(ttft_ms=500), 2),  # a bound may be reached
        (Bounds(tpot_ms=50), 2),
        (Bounds(ttft_ms=500, tpot_ms=50), 1),
        (Bounds(latency_ms=750), 1),
        (Bounds(latency_ms=700), 0),
    ],
)
def test_goodput_is_of_answers_that_keep_to_all_bounds(bounds: Bounds, num_good: int) -> None:
    quick, slow_to_begin, slow = answer(0, 0.75), answer(0, 2.0, first_s=1.5), answer(1, 2.0)
    row = only_row([quick, slow_to_begin, slow], bounds)
    assert row.goodput is not None
    assert row.goodput.value == num_good / 4  # in twice 2 s


def test_an_answer_of_one_token_has_no_time_between_tokens() -> None:
    row = only_row([answer(0, 0.5, num_tokens=1), answer(1, 0.5, num_tokens=1)], Bounds(tpot_ms=1.0))
    assert row.tpot_ms is None
    assert row.goodput is not None
    assert row.goodput.value == 2


def test_arms_are_compared_with_the_first_over_the_same_turns() -> None:
    drift = (1.0, 5.0, 2.0)  # the machine is slower in some turns
    first = [answer(turn, 2 * slow, first_s=slow) for turn, slow in enumerate(drift)]
    second = [answer(turn, slow, first_s=slow / 2, arm="b") for turn, slow in enumerate(drift)]
    third = [answer(turn, 1.0, arm="c", error="no") for turn in range(3)]
    summary = summarise_load([*first, *second, *third])
    assert [row.arm for row in summary.rows] == ["a", "b", "c"]
    one, other = summary.ratios
    assert (one.arm, one.to, other.arm, other.to) == ("b", "a", "c", "a")
    assert one.tokens_per_second == one.requests_per_second == Figure(2.0, 2.0, 2.0)
    assert one.ttft == one.tpot == one.latency == Figure(0.5, 0.5, 0.5)
    assert other.tokens_per_second is other.ttft is other.tpot is None


def test_loads_stand_in_the_order_in_which_they_were_tried() -> None:
    order = [("concurrency", 8.0), ("concurrency", 2.0), ("rate", 1.0)]
    records = [answer(turn, 1.0, kind=kind, load=load, scheduled_s=0.1) for turn in (0, 1) for kind, load in order]
    assert [(row.kind, row.load) for row in summarise_load(records).rows] == order


def test_an_interval_holds_what_it_is_of(random_turns: Callable[[int], list[LoadRecord]]) -> None:
    held = 0
    for seed in range(40):
        latency = only_row(random_turns(seed)).latency_ms
        assert latency is not None
        held += latency.p50.low <= 1000 <= latency.p50.high
    assert held >= 32  # 38 of many more turns


@pytest.fixture
def random_turns() -> Callable[[int], list[LoadRecord]]:
    """Latencies with a median of 1 s, in turns that are each a little slower or faster."""

    def draw(seed: int) -> list[LoadRecord]:
        rng = np.random.default_rng(seed)
        slow = np.exp(0.2 * rng.standard_normal(8))
        return [answer(turn, float(slow[turn] * np.exp(0.3 * rng.standard_normal()))) for turn in range(8) for _ in range(20)]

    return draw

"""Figures are sums over records, divided once; intervals hold what they should; a failure is part of no figure."""

import random
from collections.abc import Callable
from dataclasses import replace

import pytest

from specdecode.evaluation.analysis import acceptance_by_position, summarise
from specdecode.evaluation.cells import ALL
from specdecode.evaluation.changes import compare_runs
from specdecode.evaluation.figures import speed_up
from specdecode.evaluation.length_curve import length_curves
from specdecode.evaluation.records import Record
from specdecode.evaluation.regret import routing
from specdecode.evaluation.suite import Cell


def record(experiment: str, item: int, seconds: float, **values: object) -> Record:
    told: dict[str, object] = {"draft": "none", "K": 0, "domain": "code", "tokens": [1, 2, 3, 4], "round_tokens": [1, 3]}
    told |= {"latency_s": seconds, "group_time_s": seconds, "ttft_s": seconds / 4, "gaps_s": [seconds * 3 / 4]}
    fixed = {"temperature": 0.0, "verifier": "rejection", "batch": 1, "dataset": "d", "turn": 0, "category": "", "repeat": 0}
    return Record(experiment=experiment, item=str(item), group=str(item), **(told | fixed | values))  # type: ignore[arg-type]


def drafted(item: int, seconds: float, accepted: int = 2, experiment: str = "generic_draft", **values: object) -> Record:
    told: dict[str, object] = {"draft": "generic", "K": 3, "num_drafts": 2, "num_drafted": 6, "num_accepted": accepted}
    told |= {"num_drafted_at": [2, 2, 2], "num_accepted_at": [min(2, accepted), max(0, accepted - 2)]}
    told |= {"draft_time_s": seconds / 4, "verify_time_s": seconds / 2, "drafter": "generic"}
    return record(experiment, item, seconds, **(told | values))


def test_figures_are_sums_divided_once() -> None:
    plain = [record("baseline", n, 1.0 + n) for n in range(4)]  # 10 s for 16 tokens
    ours = [drafted(n, (1.0 + n) / 2, accepted=n) for n in range(4)]
    [base, row] = summarise([*plain, *ours])
    assert base.speed_up is not None
    assert (base.speed_up.value, base.speed_up.low, base.speed_up.high) == (1, 1, 1)
    assert base.tokens_per_second is not None
    assert base.tokens_per_second.value == pytest.approx(1.6)
    assert base.acceptance is None
    assert row.cell == Cell("generic_draft", "generic", 3, 0.0, "rejection", 1)
    assert row.speed_up is not None
    assert row.speed_up.value == row.speed_up.low == row.speed_up.high == pytest.approx(2)  # of every question
    assert row.acceptance is not None
    assert row.acceptance.value == pytest.approx(6 / 24)
    assert row.acceptance.low < 6 / 24 < row.acceptance.high
    assert row.tokens_per_pass is not None
    assert row.tokens_per_pass.value == 2
    assert row.latency_ms is not None
    assert row.latency_ms[0] == pytest.approx(1250)
    assert (row.draft_share, row.verify_share) == (0.25, 0.5)
    assert (row.num_different, row.num_compared) == (0, 4)


def test_domains_stand_beside_all_of_them() -> None:
    rows = summarise([record("baseline", 0, 1.0), record("baseline", 1, 3.0, domain="chat")])
    speeds = {row.domain: row.tokens_per_second.value for row in rows if row.tokens_per_second}
    assert speeds == {"code": 4.0, "chat": pytest.approx(4 / 3), ALL: 2.0}


def test_a_failure_is_counted_and_no_figure() -> None:
    failed = drafted(1, 0.0, tokens=[], error="RuntimeError: out of memory")
    plain = [record("baseline", n, 1.0) for n in range(2)]
    row = summarise([*plain, drafted(0, 0.5), failed])[1]
    assert (row.num_answers, row.num_errors) == (1, 1)
    assert row.speed_up is not None
    assert row.speed_up.value == 2
    only = summarise([*plain, failed])[1]
    assert (only.num_answers, only.num_errors, only.tokens_per_second, only.speed_up) == (0, 1, None, None)


@pytest.mark.parametrize("tokens", [[1, 2, 3], [1, 2, 3, 4, 5], [1, 2, 9, 4]])
def test_answers_are_compared_by_length_and_content(tokens: list[int]) -> None:
    rows = summarise([record("baseline", 0, 1.0), drafted(0, 1.0, tokens=tokens)])
    assert rows[1].num_different == 1


def test_sampled_answers_are_not_compared() -> None:
    plain, ours = record("baseline", 0, 1.0, temperature=1.0), drafted(0, 1.0, tokens=[9], temperature=1.0)
    assert summarise([plain, ours])[1].num_different is None


def test_a_batch_s_time_is_shared() -> None:
    group = [record("baseline", n, 2.0, batch=2, num_together=2, latency_s=1.0 + n) for n in range(2)]
    [row] = summarise(group)
    assert row.tokens_per_second is not None
    assert row.tokens_per_second.value == 4  # 8 tokens in the 2 s that both took together


def test_quality_counts_answers_that_can_be_told() -> None:
    rights = [True, False, True, None]
    [row] = summarise([record("baseline", n, 1.0, is_right=right, perplexity=2.0) for n, right in enumerate(rights)])
    assert row.right is not None
    assert row.right.value == pytest.approx(2 / 3)
    assert row.perplexity == pytest.approx(2.0)


def test_an_interval_holds_the_truth_as_often_as_it_says() -> None:
    """Questions whose speed-up is 1.5 times chance: 95 % intervals hold 1.5 in most of 200 runs."""
    rng = random.Random(0)
    held = 0
    for _ in range(200):
        plain = [record("baseline", n, rng.uniform(1, 3)) for n in range(40)]
        ours = [drafted(n, p.latency_s / 1.5 * rng.choice([0.8, 1.2])) for n, p in enumerate(plain)]
        figure = speed_up(ours, plain)
        assert figure is not None
        held += figure.low <= 1.5 <= figure.high
    assert 176 <= held <= 200


def test_the_same_records_give_the_same_summary() -> None:
    rng = random.Random(1)
    records = [record("baseline", n, rng.uniform(1, 3)) for n in range(9)] + [drafted(n, rng.uniform(1, 2)) for n in range(9)]
    assert repr(summarise(records)) == repr(summarise(list(records)))


def test_acceptance_by_position() -> None:
    assert acceptance_by_position([record("baseline", 0, 1.0), drafted(0, 1.0, 3), drafted(1, 1.0, 0)]) == {
        Cell("generic_draft", "generic", 3, 0.0, "rejection", 1): [0.5, 0.25, 0.0]
    }


def test_a_length_is_predicted_from_acceptance_and_times() -> None:
    """Half of the tokens are accepted, a token takes 1 s to draft and a round 10 s besides: K = 4 gives most for the time."""
    records = []
    for k in (1, 3):
        reached = [512 // 2**place for place in range(k + 1)]  # rounds that accepted so many
        told = {"num_drafted_at": [512] * k, "num_accepted_at": reached[1:], "num_drafts": 512, "num_drafted": 512 * k}
        told |= {"num_accepted": sum(reached[1:]), "round_tokens": [1] * 512, "tokens": [1] * sum(reached)}
        seconds = 512.0 * (k + 10)
        records.append(drafted(0, seconds, 0, "ablation_K", draft="own", K=k, draft_time_s=512.0 * k, **told))
    [curve] = length_curves([record("baseline", 0, 1.0), *records])
    assert curve.acceptance == 0.5
    assert (curve.draft_ms, curve.verify_ms) == (1000, 10000)
    assert {k: figure.value for k, figure in curve.measured.items()} == {k: pytest.approx(curve.predicted[k]) for k in (1, 3)}
    speeds = {k: (2 - 0.5**k) / (k + 10) for k in range(1, 9)}
    assert curve.cell == Cell("ablation_K", "own", max(speeds, key=speeds.__getitem__), 0.0, "rejection", 1)
    assert length_curves([record("baseline", 0, 1.0), drafted(0, 1.0)]) == []


def test_a_router_is_compared_with_the_fastest_of_each_question() -> None:
    domains = ["code", "chat"]
    records = []
    for n in range(8):
        domain = domains[n % 2]
        records.append(record("baseline", n, 2.0, domain=domain))
        for name in domains:
            at_home = name == domain
            records.append(drafted(n, 1.0 if at_home else 3.0, domain=domain, draft=name, experiment="specialized_drafts"))
        wrong = n == 0
        told = {"domain": domain, "draft": "auto", "drafter": "chat" if wrong else domain, "experiment": "adaptive_routing"}
        records.append(drafted(n, 3.0 if wrong else 1.0, **told))
    found = routing(records)
    assert found is not None
    assert found.chosen["code"] == {"none": 0, "code": 0.75, "chat": 0.25}
    assert found.chosen["chat"]["chat"] == 1
    assert found.regret.value == pytest.approx(1 - 8 / 10)
    assert found.regret.low <= found.regret.value <= found.regret.high
    assert found.best_single in ("none", "code", "chat")
    assert found.to_best_single.value == pytest.approx(16 / 10)
    assert routing(records[:3]) is None
    hot = [replace(one, temperature=1.0, latency_s=10 * one.latency_s, group_time_s=one.group_time_s / 10) for one in records]
    assert routing([*records, *hot]) == found  # answers of another setting are not compared with these


@pytest.mark.parametrize(
    ("change", "verdict"),
    [(lambda s: s / 2, "faster"), (lambda s: s * 2, "slower"), (lambda s: s, "no difference")],
)
def test_two_runs_differ_only_where_the_interval_says_so(change: Callable[[float], float], verdict: str) -> None:
    rng = random.Random(2)
    before = [record("baseline", n, rng.uniform(1, 2)) for n in range(20)]
    after = [replace(r, group_time_s=change(r.group_time_s)) for r in before]
    changes = compare_runs(before, after)
    assert [(c.domain, c.verdict, c.num_different) for c in changes] == [("code", verdict, 0), (ALL, verdict, 0)]
    noisy = [replace(r, group_time_s=rng.uniform(1, 2)) for r in before]
    assert {c.verdict for c in compare_runs(before, noisy)} == {"no difference"}


def test_a_slower_machine_is_no_part_of_a_speed_up_to_its_own_baseline() -> None:
    rng = random.Random(3)
    before = [r for n in range(20) for r in (record("baseline", n, rng.uniform(1, 2)), drafted(n, rng.uniform(1, 2)))]
    after = [replace(r, group_time_s=3 * r.group_time_s) for r in before]
    plain, _, ours, _ = compare_runs(before, after)
    assert (plain.verdict, plain.to_baseline) == ("slower", None)
    assert ours.verdict == "slower"
    assert ours.to_baseline is not None
    assert (ours.to_baseline.low, ours.to_baseline.value, ours.to_baseline.high) == pytest.approx((1, 1, 1))
    better = [replace(r, group_time_s=r.group_time_s / 2) if r.experiment != "baseline" else r for r in after]
    found = compare_runs(before, better)[2].to_baseline
    assert found is not None
    assert found.value == pytest.approx(2)


def test_runs_without_a_cell_in_common_have_nothing_to_say() -> None:
    assert compare_runs([record("baseline", 0, 1.0)], [drafted(0, 1.0)]) == []

"""Records of a router and of single drafts in, what it chose and what that cost out."""

from collections import defaultdict
from collections.abc import Sequence as Several
from dataclasses import dataclass

from specdecode.evaluation.figures import Figure, num_tokens, seconds_of, speed_up
from specdecode.evaluation.records import Record
from specdecode.evaluation.suite import BASELINE, NONE


@dataclass(frozen=True)
class Routing:
    """What a router chose, and what that cost.

    Attributes:
        chosen: by domain and draft, the share of answers that it drafted most of.
        regret: to the oracle, which takes the fastest of all single drafts and of none for each question; 0 is none.
        best_single: the draft that is fastest over all, and how many times the router is faster.
    """

    chosen: dict[str, dict[str, float]]
    regret: Figure
    best_single: str
    to_best_single: Figure


def routing(records: Several[Record], experiment: str = "adaptive_routing") -> Routing | None:
    """Compares a router with the experiments of single drafts; None if one of either is missing.

    Of several temperatures and verifiers it takes the lowest and plain decoding's: answers to a question are compared with each
    other, which those of other settings are not to be mixed with.
    """
    good = [record for record in records if record.error is None and record.batch == 1]
    setting = min(((r.temperature, r.verifier) for r in good if r.experiment == BASELINE), default=None)
    good = [record for record in good if (record.temperature, record.verifier) == setting]
    routed = [record for record in good if record.experiment == experiment]
    single: dict[str, list[Record]] = defaultdict(list)
    for record in good:
        if record.experiment in (BASELINE, "generic_draft", "specialized_drafts"):
            single[record.draft].append(record)
    if not routed or len(single) < 2:
        return None
    answers = {name: {r.question: r for r in found} for name, found in single.items()}
    shared = [r for r in routed if all(r.question in found for found in answers.values())]
    if not shared:
        return None
    fastest = [min((found[r.question] for found in answers.values()), key=_pace) for r in shared]
    compared = speed_up(shared, fastest)
    rates = {name: sum(map(num_tokens, found)) / sum(map(seconds_of, found)) for name, found in single.items()}
    best = max(rates, key=rates.__getitem__)
    to_best = speed_up(shared, single[best])
    assert compared is not None
    assert to_best is not None
    chosen: dict[str, dict[str, float]] = {}
    for domain in dict.fromkeys(record.domain for record in routed):
        mine = [record.drafter or NONE for record in routed if record.domain == domain]
        chosen[domain] = {name: mine.count(name) / len(mine) for name in answers}
    regret = Figure(1 - compared.value, 1 - compared.high, 1 - compared.low)
    return Routing(chosen, regret, best, to_best)


def _pace(record: Record) -> float:
    return seconds_of(record) / max(1, num_tokens(record))

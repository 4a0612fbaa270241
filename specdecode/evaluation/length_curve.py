"""Records of drafts of several lengths in, what was reached and what a model of a round expects of each length out."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace

from specdecode.decoding.metrics import expected_tokens
from specdecode.evaluation.cells import cell_of, in_order
from specdecode.evaluation.figures import Figure, num_tokens, ratio, seconds_of
from specdecode.evaluation.records import Record
from specdecode.evaluation.suite import Cell

_MOST_DRAFTED = 16  # to which lengths a speed is predicted


@dataclass(frozen=True)
class LengthCurve:
    """What drafts of different lengths reached in one setting, and what a model of a round expects of them.

    Attributes:
        cell: the setting, and the K of which most is expected.
        measured: tokens per second by K.
        acceptance: the chance that a drafted token is accepted where all before it were.
        draft_ms, verify_ms: to draft a token; and all else that a round takes, mostly the target's pass.
        predicted: tokens per second by K; see `expected_tokens`.
    """

    cell: Cell
    measured: dict[int, Figure]
    acceptance: float
    draft_ms: float
    verify_ms: float
    predicted: dict[int, float]


def length_curves(records: Iterable[Record], experiment: str = "ablation_K") -> list[LengthCurve]:
    """A curve for each setting in which K was varied, all domains together."""
    settings: dict[Cell, dict[int, list[Record]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        if record.experiment == experiment and record.error is None and record.num_drafted:
            settings[replace(cell_of(record), K=0)][record.K].append(record)
    return [_length_curve(cell, settings[cell]) for cell in in_order(settings)]


def _length_curve(cell: Cell, by_k: dict[int, list[Record]]) -> LengthCurve:
    """As many are decoded at once as on average: the answers of a batch do not end together."""
    found = [record for those in by_k.values() for record in those]
    acceptance = sum(record.num_accepted for record in found) / sum(map(_num_verdicts, found))
    draft_s = sum(record.draft_time_s for record in found) / sum(record.num_drafted for record in found)
    rest_s = sum(r.latency_s - r.draft_time_s for r in found) / sum(len(r.round_tokens) for r in found)
    at_once = sum(record.latency_s for record in found) / sum(map(seconds_of, found))
    speed_of = {k: at_once * expected_tokens(acceptance, k) / (k * draft_s + rest_s) for k in range(1, _MOST_DRAFTED + 1)}
    speeds = {k: ratio(those, num_tokens, seconds_of) for k, those in sorted(by_k.items())}
    measured = {k: speed for k, speed in speeds.items() if speed is not None}
    best = replace(cell, K=max(speed_of, key=speed_of.__getitem__))
    return LengthCurve(best, measured, acceptance, 1000 * draft_s, 1000 * rest_s, speed_of)


def _num_verdicts(record: Record) -> int:
    """Drafted tokens that were accepted or the first not to be; what was drafted behind one of those was not looked at."""
    reached = [record.num_drafts, *record.num_accepted_at, *[0] * len(record.num_drafted_at)]
    return sum(min(drafted, before) for drafted, before in zip(record.num_drafted_at, reached, strict=False))

"""Records in, figures with intervals out. Reads records only, and the same records give the same summary byte for byte.

Speeds are generated tokens over wall time, of sums, never a mean of ratios. An interval holds 95 % of what resamples of the
questions give; where two ways to decode are compared, the same questions are taken for both. A failure is counted, and part of
no other figure.
"""

from collections import defaultdict
from collections.abc import Iterable
from collections.abc import Sequence as Several
from dataclasses import astuple, dataclass

import numpy as np

from specdecode.evaluation.cells import ALL, cell_of, in_order, is_baseline_of
from specdecode.evaluation.figures import Figure, num_different, num_tokens, ratio, seconds_of, speed_up
from specdecode.evaluation.length_curve import LengthCurve, length_curves
from specdecode.evaluation.records import Record
from specdecode.evaluation.regret import Routing, routing
from specdecode.evaluation.suite import Cell


@dataclass(frozen=True)
class Row:
    """What one cell did in one domain.

    Attributes:
        cell: what it is.
        domain: a domain, or `all`.
        num_answers, num_errors: how many there are.
        tokens_per_second: of an answer that is decoded alone, or of a batch together.
        speed_up: to the baseline, on the questions that both have answered.
        acceptance: accepted by drafted tokens; None where nothing was drafted, or nobody counted.
        tokens_per_pass: generated tokens by passes of the target for an answer.
        ttft_ms, latency_ms, gap_ms: the median and the 99th percentile, of the first token, of an answer, and of the time from
            the tokens of one round to the next ones.
        draft_share, verify_share: of the time, what went into drafting, and into scoring and accepting.
        num_different: greedy answers that are not the baseline's; None where answers are sampled.
        num_compared: how many there are that the baseline has too.
        right: the share of answers that are right, of those that can be told.
        perplexity: the geometric mean.
    """

    cell: Cell
    domain: str
    num_answers: int
    num_errors: int
    tokens_per_second: Figure | None = None
    speed_up: Figure | None = None
    acceptance: Figure | None = None
    tokens_per_pass: Figure | None = None
    ttft_ms: tuple[float, float] | None = None
    latency_ms: tuple[float, float] | None = None
    gap_ms: tuple[float, float] | None = None
    draft_share: float = 0.0
    verify_share: float = 0.0
    num_different: int | None = None
    num_compared: int | None = None
    right: Figure | None = None
    perplexity: float | None = None


def whole(rows: Iterable[Row]) -> list[Row]:
    """The rows of all domains together, or of the only one."""
    found = list(rows)
    return [row for row in found if row.domain == ALL] or found


def summarise(records: Iterable[Record]) -> list[Row]:
    """A row for each cell and domain, and for all domains together."""
    by_cell: dict[Cell, list[Record]] = defaultdict(list)
    for record in records:
        by_cell[cell_of(record)].append(record)
    domains = list(dict.fromkeys(record.domain for found in by_cell.values() for record in found))
    rows = []
    for cell in in_order(by_cell):
        found = by_cell[cell]
        plain = [r for other, those in by_cell.items() if is_baseline_of(other, cell) for r in those]
        for domain in [*domains, ALL] if len(domains) > 1 else domains:
            mine, theirs = ([record for record in those if domain in (ALL, record.domain)] for those in (found, plain))
            if mine:
                rows.append(_row(cell, domain, mine, theirs))
    return rows


def _row(cell: Cell, domain: str, mine: list[Record], plain: list[Record]) -> Row:
    good = [record for record in mine if record.error is None]
    num_answers, num_errors = len(good), len(mine) - len(good)
    if not good:
        return Row(cell, domain, num_answers, num_errors)
    total_s = sum(record.latency_s for record in good)
    different = num_different(good, plain) if cell.temperature == 0 and plain else None
    perplexities = [record.perplexity for record in good if record.perplexity is not None]
    return Row(
        cell,
        domain,
        num_answers,
        num_errors,
        tokens_per_second=ratio(good, num_tokens, seconds_of),
        speed_up=speed_up(good, plain),
        acceptance=ratio(good, lambda r: r.num_accepted, lambda r: r.num_drafted),
        tokens_per_pass=ratio(good, num_tokens, lambda r: len(r.round_tokens)),
        ttft_ms=_spread([record.ttft_s for record in good]),
        latency_ms=_spread([record.latency_s for record in good]),
        gap_ms=_spread([gap for record in good for gap in record.gaps_s]),
        draft_share=sum(record.draft_time_s for record in good) / total_s,
        verify_share=sum(record.verify_time_s for record in good) / total_s,
        num_different=different,
        num_compared=None if different is None else _num_shared(good, plain),
        right=ratio([r for r in good if r.is_right is not None], lambda r: bool(r.is_right), lambda _: 1),
        perplexity=float(np.exp(np.log(perplexities).mean())) if perplexities else None,
    )


def _num_shared(records: list[Record], plain: list[Record]) -> int:
    theirs = {record.question for record in plain if record.error is None}
    return sum(record.question in theirs for record in records)


def _spread(seconds: list[float]) -> tuple[float, float] | None:
    if not seconds:
        return None
    middle, late = np.percentile(seconds, [50, 99])
    return 1000 * float(middle), 1000 * float(late)


def acceptance_by_position(records: Iterable[Record]) -> dict[Cell, list[float]]:
    """For each cell, of the rounds that drafted so far, the share that accepted up to there."""
    drafted: dict[Cell, np.ndarray] = {}
    accepted: dict[Cell, np.ndarray] = {}
    for record in records:
        if record.num_drafted:
            for table, counts in ((drafted, record.num_drafted_at), (accepted, record.num_accepted_at)):
                room = table.setdefault(cell_of(record), np.zeros(record.K))
                room[: len(counts)] += counts
    return {cell: (accepted[cell] / np.maximum(drafted[cell], 1)).tolist() for cell in in_order(drafted)}


@dataclass(frozen=True)
class Summary:
    """All that is made of a run's records.

    Attributes:
        rows: see `Row`.
        positions: see `acceptance_by_position`, with the cells' parts joined by spaces.
        routing: what a router chose, if one was tried.
        lengths: see `LengthCurve`.
    """

    rows: list[Row]
    positions: dict[str, list[float]]
    routing: Routing | None
    lengths: list[LengthCurve]


def summary(records: Several[Record]) -> Summary:
    """Everything, of the same records always the same."""
    positions = {" ".join(map(str, astuple(cell))): shares for cell, shares in acceptance_by_position(records).items()}
    return Summary(summarise(records), positions, routing(records), length_curves(records))

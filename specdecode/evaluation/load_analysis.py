"""Records of a load in, figures with intervals out. Reads records only, and the same records give the same summary.

An interval holds 95 % of what resamples of the turns give; where two arms are compared, the same turns are taken for both. A
failure is counted, and part of no other figure. Percentiles are by nearest rank: the smallest value that so many do not exceed.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from math import ceil

import numpy as np
from pydantic import Field, model_validator

from specdecode.config import StrictModel
from specdecode.evaluation.figures import Figure
from specdecode.evaluation.load_records import LoadRecord

SHARES = (0.5, 0.9, 0.99)
_NUM_RESAMPLES = 1000
_MAX_ERRORS = 5  # kinds of them that a row names


class Bounds(StrictModel):
    """What an answer keeps to if it is a good one; what is unset is not asked of it."""

    ttft_ms: float | None = Field(default=None, gt=0, description="to the first token")
    tpot_ms: float | None = Field(default=None, gt=0, description="for each token after it")
    latency_ms: float | None = Field(default=None, gt=0, description="to the end")

    @model_validator(mode="after")
    def _check(self) -> "Bounds":
        if self.ttft_ms is self.tpot_ms is self.latency_ms is None:
            raise ValueError("expected one of ttft_ms, tpot_ms and latency_ms")
        return self

    def hold(self, record: LoadRecord) -> bool:
        """Whether an answer is a good one; one of a single token has no time between tokens."""
        kept = ((self.ttft_ms, record.ttft_s), (self.tpot_ms, record.tpot_s or 0.0), (self.latency_ms, record.latency_s))
        return all(bound is None or 1000 * seconds <= bound for bound, seconds in kept)


@dataclass(frozen=True)
class Percentiles:
    """Half, nine tenths and 99 of a hundred are not above these."""

    p50: Figure
    p90: Figure
    p99: Figure


@dataclass(frozen=True)
class LoadRow:
    """What one arm did under one load.

    Attributes:
        kind, load: see `Point`.
        arm: which.
        num_answers, num_errors: how many there are.
        errors: what was said, and how often; only the most frequent.
        offered_rate: requests a second that arrived; None in a closed loop, where the answers say when others are asked.
        requests_per_second, tokens_per_second: answers and their tokens, from a turn's start to the end of its last answer.
        ttft_ms, latency_ms: from the arrival to the first text, and to the end.
        tpot_ms: of an answer, for each token after the first.
        itl_ms: from one chunk of a stream to the next; a chunk may hold several tokens.
        late_ms: 99 of a hundred requests were sent no later than so long after they arrived.
        goodput: good answers a second; None if nobody said what is good.
    """

    kind: str
    load: float
    arm: str
    num_answers: int
    num_errors: int
    errors: dict[str, int]
    offered_rate: float | None = None
    requests_per_second: Figure | None = None
    tokens_per_second: Figure | None = None
    ttft_ms: Percentiles | None = None
    latency_ms: Percentiles | None = None
    tpot_ms: Percentiles | None = None
    itl_ms: Percentiles | None = None
    late_ms: float | None = None
    goodput: Figure | None = None


@dataclass(frozen=True)
class LoadRatio:
    """One arm to another under the same load: of throughput more is better, of times less.

    Attributes:
        kind, load: see `Point`.
        arm, to: which to which.
        tokens_per_second, requests_per_second: ratios of throughput.
        ttft, tpot, latency: ratios of medians.
    """

    kind: str
    load: float
    arm: str
    to: str
    tokens_per_second: Figure | None
    requests_per_second: Figure | None
    ttft: Figure | None
    tpot: Figure | None
    latency: Figure | None


@dataclass(frozen=True)
class LoadSummary:
    """All that is made of a load's records: see `LoadRow` and `LoadRatio`."""

    rows: list[LoadRow]
    ratios: list[LoadRatio]


def summarise_load(records: Iterable[LoadRecord], bounds: Bounds | None = None) -> LoadSummary:
    """A row for each load and arm, and a ratio for each arm but the first, in the order of loads and of arms."""
    groups: dict[tuple[str, float], dict[str, list[LoadRecord]]] = defaultdict(lambda: defaultdict(list))
    for record in sorted(records, key=lambda record: record.turn):
        groups[record.kind, record.load][record.arm].append(record)
    rows, ratios = [], []
    for point, arms in groups.items():
        num_turns = 1 + max(record.turn for found in arms.values() for record in found)
        rows += [_row(found, num_turns, bounds) for found in arms.values()]
        first, *others = arms
        for arm in others:
            figures = [_ratio(value, arms[arm], arms[first], num_turns) for value in _COMPARED]
            ratios.append(LoadRatio(*point, arm, first, *figures))
    return LoadSummary(rows, ratios)


def _row(records: list[LoadRecord], num_turns: int, bounds: Bounds | None) -> LoadRow:
    good = [record for record in records if record.error is None]
    failures = Counter(record.error for record in records if record.error is not None)
    return LoadRow(
        records[0].kind,
        records[0].load,
        records[0].arm,
        len(good),
        len(records) - len(good),
        dict(failures.most_common(_MAX_ERRORS)),
        offered_rate=_offered(records) if records[0].kind == "rate" else None,
        requests_per_second=_figure(_rate(good, num_turns, _one)),
        tokens_per_second=_figure(_rate(good, num_turns, lambda record: record.num_tokens)),
        ttft_ms=_percentiles(good, num_turns, lambda record: [record.ttft_s]),
        latency_ms=_percentiles(good, num_turns, lambda record: [record.latency_s]),
        tpot_ms=_percentiles(good, num_turns, _tpots),
        itl_ms=_percentiles(good, num_turns, lambda record: record.gaps_s),
        late_ms=1000 * _nearest([record.started_s - record.scheduled_s for record in records], SHARES[-1]),
        goodput=None if bounds is None else _figure(_rate(good, num_turns, bounds.hold)),
    )


def _one(_: LoadRecord) -> int:
    return 1


def _tpots(record: LoadRecord) -> list[float]:
    return [] if record.tpot_s is None else [record.tpot_s]


def _offered(records: list[LoadRecord]) -> float:
    """Arrivals by the time until the last one of each turn."""
    last: dict[int, float] = {}
    for record in records:
        last[record.turn] = max(last.get(record.turn, 0.0), record.scheduled_s)
    return len(records) / sum(last.values())


def _nearest(values: list[float], share: float) -> float:
    return sorted(values)[_rank(share, len(values))]


def _rank(share: float, count: int) -> int:
    """The place of the smallest of sorted values that so large a share of them do not exceed."""
    return max(0, ceil(share * count - 1e-9) - 1)


# Of what is said of all turns, and of each resample of them: [1 + resamples] or [1 + resamples, shares], not a number where
# there is nothing to say it of.
_Resampled = np.ndarray


@cache
def _weights(num_turns: int) -> np.ndarray:
    """How often each turn is taken, [1 + resamples, turns]: first each of them once, then as chance has it."""
    drawn = np.random.default_rng(0).multinomial(num_turns, [1 / num_turns] * num_turns, _NUM_RESAMPLES)
    return np.concatenate([np.ones((1, num_turns), dtype=np.int64), drawn])


def _rate(good: list[LoadRecord], num_turns: int, value: Callable[[LoadRecord], float]) -> _Resampled:
    """Sums of a value by the time that it took."""
    sums, elapsed_s = np.zeros(num_turns), np.zeros(num_turns)
    for record in good:
        sums[record.turn] += value(record)
        elapsed_s[record.turn] = max(elapsed_s[record.turn], record.ended_s)
    weights = _weights(num_turns)
    return _divide(weights @ sums, weights @ elapsed_s)


def _quantiles(good: list[LoadRecord], num_turns: int, values: Callable[[LoadRecord], list[float]]) -> _Resampled:
    """Those of `SHARES`."""
    pairs = sorted((value, record.turn) for record in good for value in values(record))
    weights = _weights(num_turns)
    found = np.full((len(weights), len(SHARES)), np.nan)
    if not pairs:
        return found
    ordered, turns = np.array([value for value, _ in pairs]), np.array([turn for _, turn in pairs])
    for place, weight in enumerate(weights):
        counts = np.cumsum(weight[turns])
        if counts[-1]:
            ranks = [1 + _rank(share, int(counts[-1])) for share in SHARES]
            found[place] = ordered[np.searchsorted(counts, ranks)]
    return found


def _percentiles(good: list[LoadRecord], num_turns: int, values: Callable[[LoadRecord], list[float]]) -> Percentiles | None:
    figures = [_figure(1000 * column) for column in _quantiles(good, num_turns, values).T]
    return None if figures[0] is None else Percentiles(*figures)  # type: ignore[arg-type]


def _figure(resampled: _Resampled) -> Figure | None:
    if np.isnan(resampled[0]):
        return None
    low, high = np.nanpercentile(resampled[1:], [2.5, 97.5])
    return Figure(float(resampled[0]), float(low), float(high))


def _divide(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return np.divide(one, other, out=np.full(np.shape(one), np.nan), where=other > 0)


_COMPARED: tuple[Callable[[list[LoadRecord], int], _Resampled], ...] = (
    lambda good, num_turns: _rate(good, num_turns, lambda record: record.num_tokens),
    lambda good, num_turns: _rate(good, num_turns, _one),
    lambda good, num_turns: _quantiles(good, num_turns, lambda record: [record.ttft_s])[:, 0],
    lambda good, num_turns: _quantiles(good, num_turns, _tpots)[:, 0],
    lambda good, num_turns: _quantiles(good, num_turns, lambda record: [record.latency_s])[:, 0],
)
"""What a ratio is of, in the order of its fields."""


def _ratio(
    value: Callable[[list[LoadRecord], int], _Resampled], one: list[LoadRecord], other: list[LoadRecord], num_turns: int
) -> Figure | None:
    mine, theirs = (value([record for record in those if record.error is None], num_turns) for those in (one, other))
    return _figure(_divide(mine, theirs))

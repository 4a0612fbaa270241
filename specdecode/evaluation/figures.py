"""Records in, numbers with intervals out: speeds, ratios and means, questions being resampled."""

from collections.abc import Callable, Iterable
from collections.abc import Sequence as Several
from dataclasses import dataclass

import numpy as np

from specdecode.evaluation.records import Record

_NUM_RESAMPLES = 2000


@dataclass(frozen=True)
class Figure:
    """A number with its interval."""

    value: float
    low: float
    high: float

    def told(self, form: str = ".2f") -> str:
        """As people write it, each number in a form such as `.2f`."""
        return f"{self.value:{form}} [{self.low:{form}}, {self.high:{form}}]"


def num_tokens(record: Record) -> int:
    """Generated ones."""
    return len(record.tokens)


def seconds_of(record: Record) -> float:
    """An answer's share of the time that its group took together."""
    return record.group_time_s / record.num_together


def ratio(records: list[Record], numerator: Callable[[Record], float], denominator: Callable[[Record], float]) -> Figure | None:
    """A sum by a sum, questions being resampled; None if the denominator is 0."""
    if not records:
        return None
    sums = _by_question(records, numerator, denominator)
    if not sums[:, 1].any():
        return None
    return figure_of(sums.sum(0), sums[resamples(len(sums))].sum(1))


def mean(records: Several[Record], value: Callable[[Record], float]) -> Figure | None:
    """Over the answers, with its interval; None of none."""
    return ratio(list(records), value, lambda _: 1)


def _by_question(records: list[Record], *values: Callable[[Record], float]) -> np.ndarray:
    """Sums over the answers to each question, [questions, values]."""
    sums: dict[tuple[str, str], np.ndarray] = {}
    for record in records:
        found = np.array([value(record) for value in values], dtype=np.float64)
        key = (record.dataset, record.item)
        sums[key] = sums[key] + found if key in sums else found
    return np.stack(list(sums.values()))


def resamples(count: int) -> np.ndarray:
    """Places of questions, drawn with repetition, [resamples, count]; the same ones for the same count."""
    return np.random.default_rng(0).integers(0, count, (_NUM_RESAMPLES, count))


def figure_of(value: np.ndarray, resampled: np.ndarray) -> Figure:
    """Of sums [2] and resampled ones [n, 2]: the first by the second."""
    ratios = resampled[:, 0] / np.maximum(resampled[:, 1], 1e-12)
    low, high = np.percentile(ratios, [2.5, 97.5])
    return Figure(float(value[0] / value[1]), float(low), float(high))


def speed_up(records: Iterable[Record], plain: Iterable[Record]) -> Figure | None:
    """How many times the speed of others, on the answers that both gave; None if there are none."""
    mine, theirs = ({r.question: r for r in those if r.error is None} for those in (records, plain))
    shared = [question for question in mine if question in theirs]
    if not shared:
        return None
    parts: dict[tuple[str, str], np.ndarray] = {}
    for question in shared:
        one, other = mine[question], theirs[question]
        found = np.array([num_tokens(one), seconds_of(one), num_tokens(other), seconds_of(other)])
        parts[question[:2]] = parts.get(question[:2], np.zeros(4)) + found
    sums = np.stack(list(parts.values()))
    resampled = sums[resamples(len(sums))].sum(1)
    return figure_of(_speeds(sums.sum(0)), _speeds(resampled))


def _speeds(sums: np.ndarray) -> np.ndarray:
    """Both speeds, [..., 2], of [..., 4] tokens and seconds of the one and the other."""
    return np.stack([sums[..., 0] / sums[..., 1], sums[..., 2] / sums[..., 3]], -1)


def num_different(records: list[Record], plain: list[Record]) -> int:
    """Answers that are not the plain ones, by length and content."""
    theirs = {record.question: record.tokens for record in plain if record.error is None}
    return sum(record.tokens != theirs[record.question] for record in records if record.question in theirs)

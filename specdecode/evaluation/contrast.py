"""Records in, every way to decode beside plain decoding out: how good its answers are, how like the plain ones, and how fast.

Decoding is lossless. Greedy answers with drafts are the plain ones, token for token, so their quality is equal and not merely
close; sampled ones have the same distribution, so a difference is chance, and the interval says how much of it there is.
"""

from collections import defaultdict
from collections.abc import Iterable
from collections.abc import Sequence as Several
from dataclasses import dataclass, replace
from itertools import zip_longest

import numpy as np

from specdecode.evaluation.analysis import Row, summarise
from specdecode.evaluation.cells import ALL, cell_of
from specdecode.evaluation.figures import Figure, mean
from specdecode.evaluation.quality import agreement, overlap, pass_at_k
from specdecode.evaluation.records import Record
from specdecode.evaluation.suite import BASELINE, Cell


@dataclass(frozen=True)
class Difference:
    """The first greedy answer that is not the plain one.

    Attributes:
        item: the question's name.
        token: the first token that differs, from 0.
    """

    item: str
    token: int


@dataclass(frozen=True)
class Side:
    """What one way to decode did on one data set.

    Attributes:
        dataset: its name.
        cell: how it was decoded.
        speed: its figures of speed; the domain in there is the data set.
        pass_at: by k, the chance that one of k answers to a question is right; of data sets whose answers are judged.
        to_plain: how much of the answers are right, less the share of the plain ones, on those that both have given.
        agreement, overlap: with the plain answers: places that have the same token, and ROUGE-L, over the answers.
        perplexity: of the answers under the target, the geometric mean; if that was asked for.
        num_same, num_compared: answers that are the plain ones token for token, and those that both have given.
        first_difference: the first one that is not; None if there is none, or if answers are sampled.
    """

    dataset: str
    cell: Cell
    speed: Row
    pass_at: dict[int, Figure]
    to_plain: Figure | None
    agreement: Figure | None
    overlap: Figure | None
    perplexity: Figure | None
    num_same: int
    num_compared: int
    first_difference: Difference | None

    @property
    def is_plain(self) -> bool:
        """Whether it is what the others stand beside."""
        return self.cell.experiment == BASELINE


def contrast(records: Iterable[Record], ks: Iterable[int] = (1,)) -> list[Side]:
    """A side for each data set and cell, the data sets in turn and plain decoding first; `ks` are those of pass@k."""
    by_dataset = [replace(record, domain=record.dataset) for record in records]
    groups: dict[tuple[str, Cell], list[Record]] = defaultdict(list)
    for record in by_dataset:
        if record.error is None:
            groups[record.dataset, cell_of(record)].append(record)
    rows = [row for row in summarise(by_dataset) if row.domain != ALL]
    names = list(dict.fromkeys(record.dataset for record in by_dataset))
    rows.sort(key=lambda row: names.index(row.domain))
    return [_side(row, groups[row.domain, row.cell], _plain_of(groups, row), list(ks)) for row in rows]


def _plain_of(groups: dict[tuple[str, Cell], list[Record]], row: Row) -> list[Record]:
    same = (row.domain, row.cell.temperature, row.cell.batch)
    return [
        record
        for (dataset, cell), found in groups.items()
        if cell.experiment == BASELINE and (dataset, cell.temperature, cell.batch) == same
        for record in found
    ]


def _side(row: Row, mine: list[Record], plain: list[Record], ks: list[int]) -> Side:
    theirs = {record.question: record for record in plain}
    shared = [record for record in mine if record.question in theirs]
    judged = [record for record in shared if None not in (record.is_right, theirs[record.question].is_right)]
    different = [record for record in shared if record.tokens != theirs[record.question].tokens]
    is_sampled = row.cell.temperature > 0
    return Side(
        row.domain,
        row.cell,
        row,
        pass_at={k: found for k in ks if (found := pass_at(mine, k)) is not None},
        to_plain=mean(judged, lambda r: bool(r.is_right) - bool(theirs[r.question].is_right)),
        agreement=mean(shared, lambda r: agreement(r.tokens, theirs[r.question].tokens)),
        overlap=mean(shared, lambda r: overlap(r.tokens, theirs[r.question].tokens)),
        perplexity=_geometric_mean(mine),
        num_same=len(shared) - len(different),
        num_compared=len(shared),
        first_difference=_difference(different[0], theirs) if different and not is_sampled else None,
    )


def pass_at(records: Several[Record], k: int) -> Figure | None:
    """pass@k over the questions that have at least k judged answers; None if there are none."""
    verdicts: dict[tuple[str, str], list[bool]] = defaultdict(list)
    for record in records:
        if record.is_right is not None:
            verdicts[record.dataset, record.item].append(record.is_right)
    questions = {name: found for name, found in verdicts.items() if len(found) >= k}
    one_of_each = {(record.dataset, record.item): record for record in records}
    told = [record for name, record in one_of_each.items() if name in questions]

    def chance(record: Record) -> float:
        found = questions[record.dataset, record.item]
        return pass_at_k(len(found), sum(found), k)

    return mean(told, chance)


def _geometric_mean(records: list[Record]) -> Figure | None:
    told = [record for record in records if record.perplexity is not None]
    found = mean(told, lambda r: float(np.log(r.perplexity or 1)))
    return found and Figure(*(float(np.exp(value)) for value in (found.value, found.low, found.high)))


def _difference(record: Record, theirs: dict[tuple[str, str, int, int], Record]) -> Difference:
    pairs = zip_longest(record.tokens, theirs[record.question].tokens)
    return Difference(record.item, next(place for place, (one, other) in enumerate(pairs) if one != other))


def in_words(side: Side) -> str:
    """What a side's answers are beside the plain ones, in a sentence."""
    name = f"{side.dataset}, {side.cell.experiment} {side.cell.draft} K {side.cell.K}"
    if side.num_compared == 0:
        return f"{name}: no answer can be compared, as one of both has failed on each question"
    if side.cell.temperature > 0:
        return f"{name}: sampled answers at T {side.cell.temperature:g} {_of_sampled(side)}"
    if side.first_difference is None:
        return f"{name}: all {side.num_compared} greedy answers are the plain ones, token for token: their quality is equal"
    count, first = side.num_compared - side.num_same, side.first_difference
    return (
        f"{name}: {count} of {side.num_compared} greedy answers are NOT the plain ones, "
        f"first that to {first.item}, from token {first.token} on"
    )


def _of_sampled(side: Side) -> str:
    if side.to_plain is None:
        return "have the plain ones' distribution, and are not compared token for token"
    difference = side.to_plain
    told = f"{difference.value:+.1%} [{difference.low:+.1%}, {difference.high:+.1%}]"
    is_told = difference.low > 0 or difference.high < 0
    return f"are right as often as the plain ones {told}: {'a difference' if is_told else 'no difference'} beyond chance"

"""The records of two runs in, what became faster or slower, and whether answers differ, out."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from specdecode.evaluation.cells import ALL, cell_of, is_baseline_of
from specdecode.evaluation.figures import Figure, figure_of, num_different, num_tokens, resamples, seconds_of, speed_up
from specdecode.evaluation.records import Record
from specdecode.evaluation.suite import BASELINE, Cell


@dataclass(frozen=True)
class Change:
    """A cell in two runs: how many times the speed of the first the second has.

    Attributes:
        cell, domain: what is compared.
        speed_up: on the questions that both runs answered.
        verdict: `faster` or `slower` where the interval excludes 1, else `no difference`.
        num_different: greedy answers that differ.
        to_baseline: the same of the speed-ups that each run has to its own baseline, of which a machine that was slower as a
            whole is no part; None for the baseline, or without one.
    """

    cell: Cell
    domain: str
    speed_up: Figure
    verdict: str
    num_different: int | None
    to_baseline: Figure | None = None


def compare_runs(before: Iterable[Record], after: Iterable[Record]) -> list[Change]:
    """Compares what both runs have measured."""
    groups: list[dict[tuple[Cell, str], list[Record]]] = []
    for records in (before, after):
        groups.append(defaultdict(list))
        for record in records:
            if record.error is None:
                groups[-1][cell_of(record), record.domain].append(record)
                groups[-1][cell_of(record), ALL].append(record)
    first, second = groups
    changes = []
    for key in (key for key in first if key in second):
        figure = speed_up(second[key], first[key])
        if figure is not None:
            verdict = "faster" if figure.low > 1 else "slower" if figure.high < 1 else "no difference"
            different = num_different(second[key], first[key]) if key[0].temperature == 0 else None
            relative = _relative(*(_with_plain(those, key) for those in (second, first)))
            changes.append(Change(*key, figure, verdict, different, relative))
    return changes


_Answers = dict[tuple[str, str, int, int], Record]


def _with_plain(groups: dict[tuple[Cell, str], list[Record]], key: tuple[Cell, str]) -> tuple[_Answers, _Answers]:
    """Answers of a cell and the plain ones beside them, by their questions; no plain ones for the baseline itself."""
    cell, domain = key
    is_plain = cell.experiment == BASELINE
    plain = (
        [] if is_plain else [r for (c, d), found in groups.items() if d == domain and is_baseline_of(c, cell) for r in found]
    )
    return {record.question: record for record in groups[key]}, {record.question: record for record in plain}


def _relative(after: tuple[_Answers, _Answers], before: tuple[_Answers, _Answers]) -> Figure | None:
    """The later speed-up by the earlier one, on the questions that all four have answered."""
    four = (*after, *before)
    shared = [question for question in four[0] if all(question in answers for answers in four)]
    if not shared:
        return None
    parts: dict[tuple[str, str], np.ndarray] = {}
    for question in shared:
        found = np.array(
            [value for answers in four for value in (num_tokens(answers[question]), seconds_of(answers[question]))]
        )
        parts[question[:2]] = parts.get(question[:2], np.zeros(8)) + found
    sums = np.stack(list(parts.values()))
    return figure_of(_speed_ups(sums.sum(0)), _speed_ups(sums[resamples(len(sums))].sum(1)))


def _speed_ups(sums: np.ndarray) -> np.ndarray:
    """Both speed-ups, [..., 2], of [..., 8] tokens and seconds of the later way and its baseline, and of the earlier ones."""
    speeds = sums[..., 0::2] / sums[..., 1::2]  # [..., 4]
    return speeds[..., 0::2] / speeds[..., 1::2]

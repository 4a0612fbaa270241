"""Records in, figures with intervals out. Reads records only, and the same records give the same summary byte for byte.

Speeds are generated tokens over wall time, of sums, never a mean of ratios. An interval holds 95 % of what resamples of the
questions give; where two ways to decode are compared, the same questions are taken for both. A failure is counted, and part of
no other figure.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Several
from dataclasses import astuple, dataclass, replace
from typing import cast

import numpy as np

from specdecode.decoding.sequence import VerifierName
from specdecode.evaluation.names import in_order
from specdecode.evaluation.records import Record
from specdecode.evaluation.suite import BASELINE, NONE, Cell, ExperimentName

ALL = "all"  # the domains together
_NUM_RESAMPLES = 2000
_MOST_DRAFTED = 16  # to which lengths a speed is predicted


@dataclass(frozen=True)
class Figure:
    """A number with its interval."""

    value: float
    low: float
    high: float

    def told(self, form: str = ".2f") -> str:
        """As people write it, each number in a form such as `.2f`."""
        return f"{self.value:{form}} [{self.low:{form}}, {self.high:{form}}]"


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


def cell_of(record: Record) -> Cell:
    """The cell that a record is of."""
    experiment, verifier = cast("ExperimentName", record.experiment), cast("VerifierName", record.verifier)
    return Cell(experiment, record.draft, record.K, record.temperature, verifier, record.batch)


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


def is_baseline_of(other: Cell, cell: Cell) -> bool:
    """The plain answers at the same temperature and batch size; of a peer's too."""
    return other.experiment == BASELINE and (other.temperature, other.batch) == (cell.temperature, cell.batch)


def _row(cell: Cell, domain: str, mine: list[Record], plain: list[Record]) -> Row:
    good = [record for record in mine if record.error is None]
    num_answers, num_errors = len(good), len(mine) - len(good)
    if not good:
        return Row(cell, domain, num_answers, num_errors)
    total_s = sum(record.latency_s for record in good)
    different = _num_different(good, plain) if cell.temperature == 0 and plain else None
    perplexities = [record.perplexity for record in good if record.perplexity is not None]
    return Row(
        cell,
        domain,
        num_answers,
        num_errors,
        tokens_per_second=_ratio(good, _num_tokens, _seconds),
        speed_up=speed_up(good, plain),
        acceptance=_ratio(good, lambda r: r.num_accepted, lambda r: r.num_drafted),
        tokens_per_pass=_ratio(good, _num_tokens, lambda r: len(r.round_tokens)),
        ttft_ms=_spread([record.ttft_s for record in good]),
        latency_ms=_spread([record.latency_s for record in good]),
        gap_ms=_spread([gap for record in good for gap in record.gaps_s]),
        draft_share=sum(record.draft_time_s for record in good) / total_s,
        verify_share=sum(record.verify_time_s for record in good) / total_s,
        num_different=different,
        num_compared=None if different is None else _num_shared(good, plain),
        right=_ratio([r for r in good if r.is_right is not None], lambda r: bool(r.is_right), lambda _: 1),
        perplexity=float(np.exp(np.log(perplexities).mean())) if perplexities else None,
    )


def _num_tokens(record: Record) -> int:
    return len(record.tokens)


def _seconds(record: Record) -> float:
    """An answer's share of the time that its group took together."""
    return record.group_time_s / record.num_together


def _ratio(
    records: list[Record], numerator: Callable[[Record], float], denominator: Callable[[Record], float]
) -> Figure | None:
    """A sum by a sum, questions being resampled; None if the denominator is 0."""
    if not records:
        return None
    sums = _by_question(records, numerator, denominator)
    if not sums[:, 1].any():
        return None
    return _figure(sums.sum(0), sums[_resamples(len(sums))].sum(1))


def mean(records: Several[Record], value: Callable[[Record], float]) -> Figure | None:
    """Over the answers, with its interval; None of none."""
    return _ratio(list(records), value, lambda _: 1)


def _by_question(records: list[Record], *values: Callable[[Record], float]) -> np.ndarray:
    """Sums over the answers to each question, [questions, values]."""
    sums: dict[tuple[str, str], np.ndarray] = {}
    for record in records:
        found = np.array([value(record) for value in values], dtype=np.float64)
        key = (record.dataset, record.item)
        sums[key] = sums[key] + found if key in sums else found
    return np.stack(list(sums.values()))


def _resamples(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, count, (_NUM_RESAMPLES, count))


def _figure(value: np.ndarray, resampled: np.ndarray) -> Figure:
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
        found = np.array([_num_tokens(one), _seconds(one), _num_tokens(other), _seconds(other)])
        parts[question[:2]] = parts.get(question[:2], np.zeros(4)) + found
    sums = np.stack(list(parts.values()))
    resampled = sums[_resamples(len(sums))].sum(1)
    return _figure(_speeds(sums.sum(0)), _speeds(resampled))


def _speeds(sums: np.ndarray) -> np.ndarray:
    """Both speeds, [..., 2], of [..., 4] tokens and seconds of the one and the other."""
    return np.stack([sums[..., 0] / sums[..., 1], sums[..., 2] / sums[..., 3]], -1)


def _num_different(records: list[Record], plain: list[Record]) -> int:
    """Answers that are not the plain ones, by length and content."""
    theirs = {record.question: record.tokens for record in plain if record.error is None}
    return sum(record.tokens != theirs[record.question] for record in records if record.question in theirs)


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


def expected_tokens(acceptance: float, k: int) -> float:
    """Tokens of a round that drafts `k`, each accepted with the same chance: (1 - a^(k + 1)) / (1 - a).

    Leviathan et al. 2023, Fast Inference from Transformers via Speculative Decoding, arXiv 2211.17192, equation 1.
    """
    return k + 1.0 if acceptance >= 1 else (1 - acceptance ** (k + 1)) / (1 - acceptance)


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
    at_once = sum(record.latency_s for record in found) / sum(map(_seconds, found))
    speed_of = {k: at_once * expected_tokens(acceptance, k) / (k * draft_s + rest_s) for k in range(1, _MOST_DRAFTED + 1)}
    speeds = {k: _ratio(those, _num_tokens, _seconds) for k, those in sorted(by_k.items())}
    measured = {k: speed for k, speed in speeds.items() if speed is not None}
    best = replace(cell, K=max(speed_of, key=speed_of.__getitem__))
    return LengthCurve(best, measured, acceptance, 1000 * draft_s, 1000 * rest_s, speed_of)


def _num_verdicts(record: Record) -> int:
    """Drafted tokens that were accepted or the first not to be; what was drafted behind one of those was not looked at."""
    reached = [record.num_drafts, *record.num_accepted_at, *[0] * len(record.num_drafted_at)]
    return sum(min(drafted, before) for drafted, before in zip(record.num_drafted_at, reached, strict=False))


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
    rates = {name: sum(map(_num_tokens, found)) / sum(map(_seconds, found)) for name, found in single.items()}
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
    return _seconds(record) / max(1, _num_tokens(record))


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
            different = _num_different(second[key], first[key]) if key[0].temperature == 0 else None
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
        found = np.array([value for answers in four for value in (_num_tokens(answers[question]), _seconds(answers[question]))])
        parts[question[:2]] = parts.get(question[:2], np.zeros(8)) + found
    sums = np.stack(list(parts.values()))
    return _figure(_speed_ups(sums.sum(0)), _speed_ups(sums[_resamples(len(sums))].sum(1)))


def _speed_ups(sums: np.ndarray) -> np.ndarray:
    """Both speed-ups, [..., 2], of [..., 8] tokens and seconds of the later way and its baseline, and of the earlier ones."""
    speeds = sums[..., 0::2] / sums[..., 1::2]  # [..., 4]
    return speeds[..., 0::2] / speeds[..., 1::2]

"""A draft serves many targets at once, remembers what it can, and answers in time with what it has."""

import random
import time
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Several
from typing import Any

import numpy as np
import pytest
import torch

from specdecode.backends.backend import Row
from specdecode.backends.huggingface import HuggingFaceBackend
from specdecode.backends.table import TableModel, random_table
from specdecode.decoding.drafters import ModelDrafter, NoDrafter
from specdecode.decoding.sequence import Draft, SamplingParams, Sequence
from specdecode.errors import ModelError
from specdecode.exchange.channel import InProcessChannel
from specdecode.exchange.frames import HEADER_BYTES, decode_header
from specdecode.exchange.messages import (
    NOTHING_KNOWN,
    Answer,
    Ask,
    ExchangeError,
    Introduction,
    ModelTokens,
    Reply,
    Request,
    checksum,
)
from specdecode.exchange.scheduler import DraftScheduler, SchedulerConfig, Session
from specdecode.vocabulary import SameVocabulary
from tests.decoding.recording import RecordingBackend, counting_model
from tests.exchange.pairs import (
    COUPLED,
    DRAFT,
    GREEDY,
    SAMPLED,
    TARGET,
    TOKENS,
    VOCAB_SIZE,
    assert_same,
    connected,
    decode,
    plain,
    scheduler,
    varied,
)

COUNTING = counting_model(10)
TEN = ModelTokens.of(COUNTING)


def introducing(number: int, tokens: list[int], k: int = 3, **params: Any) -> Ask:
    """Tells of a sequence whole; greedy unless it says otherwise."""
    settings = SamplingParams(**{"max_tokens": 100, **params})
    about = Introduction(str(number), len(tokens), settings, settings.seed or 0)
    return Ask(number, 0, NOTHING_KNOWN, np.array(tokens, dtype=np.int32), k, about)


def going_on(number: int, known: list[int], added: list[int], k: int = 3) -> Ask:
    """Tells only what is new."""
    return Ask(number, len(known), checksum(np.array(known, dtype=np.int32)), np.array(added, dtype=np.int32), k)


def run(schedule: DraftScheduler, most: int = 1000) -> list[tuple[Session, Reply]]:
    """Steps until all requests are answered."""
    replies = []
    for _ in range(most):
        if not schedule.num_pending:
            return replies
        replies += schedule.step()
    raise AssertionError(f"{schedule.num_pending} requests are not answered after {most} steps")


def ask(schedule: DraftScheduler, session: Session, *asks: Ask, round: int = 1, patience_s: float = 60.0) -> list[Answer]:
    schedule.submit(session, Request(round, patience_s, list(asks)))
    ((answered, reply),) = run(schedule)
    assert answered is session
    assert reply.round == round
    return reply.answers


def tokens_of(answers: Iterable[Answer]) -> list[list[int] | None]:
    return [answer.draft.tokens if answer.draft is not None else None for answer in answers]


# Many targets


def test_the_requests_of_several_targets_go_through_the_same_passes() -> None:
    model = RecordingBackend(COUNTING)
    schedule = scheduler(model)
    sessions = [schedule.open(TEN) for _ in range(3)]
    for number, session in enumerate(sessions):
        schedule.submit(session, Request(number, 60.0, [introducing(1, [number], k=3), introducing(2, [number + 5], k=2)]))
    replies = run(schedule)
    assert [len(rows) for rows in model.calls] == [6, 6, 3]
    assert [session for session, _ in replies] == sessions
    assert [reply.round for _, reply in replies] == [0, 1, 2]
    assert [tokens_of(reply.answers) for _, reply in replies] == [
        [[n + 1, n + 2, n + 3], [(n + 6) % 10, (n + 7) % 10]] for n in range(3)
    ]
    assert (schedule.metrics.num_passes, schedule.metrics.num_extended) == (3, 15)


def test_targets_with_other_vocabularies_get_passes_of_their_own() -> None:
    small, large = (ModelTokens("m", "v", size, frozenset()) for size in (4, 10))
    schedule = DraftScheduler(lambda target: ModelDrafter(COUNTING, SameVocabulary(10, target.vocab_size)))
    sessions = [schedule.open(target) for target in (small, large)]
    for session in sessions:
        schedule.submit(session, Request(1, 60.0, [introducing(1, [2], k=2, logit_bias={9: 1.0})]))
    tokens = {session: tokens_of(reply.answers) for session, reply in run(schedule)}
    assert tokens[sessions[1]] == [[3, 4]]
    assert tokens[sessions[0]][0][:1] == [3]  # type: ignore[index]
    assert schedule.metrics.num_passes == 4


def test_a_drafter_is_made_once_for_each_kind_of_target() -> None:
    made = []

    def drafter_for(target: ModelTokens) -> ModelDrafter:
        made.append(target)
        return ModelDrafter(DRAFT)

    schedule = DraftScheduler(drafter_for)
    other = ModelTokens("other", "v", VOCAB_SIZE, frozenset())
    for target in (TOKENS, TOKENS, other, TOKENS, other):
        schedule.open(target)
    assert made == [TOKENS, other]
    assert schedule.num_sessions == 5


def test_a_target_that_does_not_fit_gets_no_session() -> None:
    def drafter_for(target: ModelTokens) -> ModelDrafter:
        raise ModelError(f"nothing in common with {target.name}")

    schedule = DraftScheduler(drafter_for)
    with pytest.raises(ModelError, match="nothing in common with table"):
        schedule.open(TOKENS)
    assert schedule.num_sessions == 0


def test_sequences_of_two_targets_with_one_name_are_not_confused() -> None:
    """Each session counts its sequences from 1, and a target may have taken up another's request, with its id."""
    rows: dict[str, list[int]] = {}

    class Remembering(RecordingBackend):
        def logits(self, asked: Several[Row]) -> torch.Tensor:
            for row in asked:
                before = rows.setdefault(row.id, row.tokens)
                assert row.tokens[0] == before[0], "two sequences share a row"
            return super().logits(asked)

    schedule = scheduler(Remembering(COUNTING))
    first, second = schedule.open(TEN), schedule.open(TEN)
    assert tokens_of(ask(schedule, first, introducing(1, [1, 2]))) == [[3, 4, 5]]
    assert tokens_of(ask(schedule, second, introducing(1, [4, 5]))) == [[6, 7, 8]]
    assert tokens_of(ask(schedule, first, going_on(1, [1, 2], [3]))) == [[4, 5, 6]]
    assert len(rows) == 2


def test_the_oldest_request_is_served_first_where_not_all_fit() -> None:
    model = RecordingBackend(COUNTING)
    schedule = scheduler(model, max_batch=2)
    sessions = [schedule.open(TEN) for _ in range(4)]
    for number, session in enumerate(sessions):
        schedule.submit(session, Request(number, 60.0, [introducing(1, [number], k=2)]))
    replies = run(schedule)
    assert [reply.round for _, reply in replies] == [0, 1, 2, 3]
    assert [len(rows) for rows in model.calls] == [2, 2, 2, 2]


def test_a_target_that_asks_for_much_is_overtaken_by_nobody_and_starves_nobody() -> None:
    schedule = scheduler(COUNTING, max_batch=4)
    greedy_one, modest = schedule.open(TEN), schedule.open(TEN)
    schedule.submit(greedy_one, Request(1, 60.0, [introducing(number, [1], k=8) for number in range(20)]))
    schedule.submit(modest, Request(1, 60.0, [introducing(1, [1], k=1)]))
    schedule.submit(greedy_one, Request(2, 60.0, [introducing(100 + number, [1], k=8) for number in range(20)]))
    assert [session for session, _ in run(schedule)] == [greedy_one, modest, greedy_one]


@pytest.mark.parametrize("max_batch", [1, 3, 64])
def test_drafts_are_the_same_however_many_are_extended_at_a_time(max_batch: int) -> None:
    remote, _ = connected(scheduler(max_batch=max_batch))
    here = ModelDrafter(DRAFT, eos_token_ids=TARGET.eos_token_ids)
    sequences = varied(GREEDY + SAMPLED + COUPLED)
    for one, other in zip(here.propose(sequences), remote.propose(sequences), strict=True):
        assert_same(one, other)


# What is remembered


def test_a_sequence_goes_on_from_what_was_told() -> None:
    model = RecordingBackend(COUNTING)
    schedule = scheduler(model)
    session = schedule.open(TEN)
    ask(schedule, session, introducing(1, [7, 2]))
    assert tokens_of(ask(schedule, session, going_on(1, [7, 2], [3, 4, 9]))) == [[0, 1, 2]]
    assert model.calls[-1][0].tokens == [7, 2, 3, 4, 9, 0, 1]
    assert schedule.metrics.num_forgotten == 0


def test_the_sequence_that_was_asked_for_longest_ago_is_forgotten_first() -> None:
    schedule = scheduler(COUNTING, max_sequences=2)
    session = schedule.open(TEN)
    for number in (1, 2):
        ask(schedule, session, introducing(number, [number]))
    ask(schedule, session, going_on(1, [1], [2]))
    ask(schedule, session, introducing(3, [3]))
    assert schedule.num_sequences == 2
    answers = [ask(schedule, session, going_on(n, known, [5])) for n, known in [(1, [1, 2]), (3, [3]), (2, [2])]]
    assert [tokens_of(answer) for answer in answers] == [[[6, 7, 8]], [[6, 7, 8]], [None]]
    assert schedule.metrics.num_forgotten == 1


def test_a_request_with_more_sequences_than_are_remembered_is_answered_all_the_same() -> None:
    schedule = scheduler(COUNTING, max_sequences=2)
    session = schedule.open(TEN)
    answers = ask(schedule, session, *(introducing(number, [number]) for number in range(6)))
    assert tokens_of(answers) == [[(n + 1) % 10, (n + 2) % 10, (n + 3) % 10] for n in range(6)]
    ask(schedule, session, going_on(5, [5], [1]))
    assert schedule.num_sequences == 2


@pytest.mark.parametrize("run_ahead", [False, True])
def test_what_is_forgotten_is_told_again_in_the_same_round(run_ahead: bool) -> None:
    """More sequences than are remembered, a few of them at a time: the drafts are as if nothing were ever forgotten."""
    remote, channel = connected(scheduler(max_sequences=3, run_ahead=run_ahead))
    here = ModelDrafter(DRAFT, eos_token_ids=TARGET.eos_token_ids)
    sequences, rng = varied(GREEDY + SAMPLED + COUPLED, max_tokens=100), random.Random(0)
    for _ in range(40):
        asked = rng.sample(sequences, rng.randint(1, 4))
        for one, other in zip(here.propose(asked), remote.propose(asked), strict=True):
            assert_same(one, other)
        for sequence in asked:
            sequence.tokens += [rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, 3))]
        for _ in range(rng.randint(0, 3)):
            channel.work()
    assert remote.metrics.num_told_again == channel.scheduler.metrics.num_forgotten > 10
    assert not remote.metrics.num_fallbacks


@pytest.mark.parametrize(
    "asked",
    [
        going_on(9, [1, 2], [3]),  # never told of
        going_on(1, [1, 3], [3]),  # other tokens
        going_on(1, [1, 2, 3], [4]),  # more tokens
        going_on(1, [2], [3, 4, 5]),  # fewer and other tokens
        Ask(1, 2, 12345, np.array([3], dtype=np.int32), 3),
        Ask(1, 0, NOTHING_KNOWN, np.array([], dtype=np.int32), 3),
        Ask(1, 0, NOTHING_KNOWN, np.array([1], dtype=np.int32), 3),  # less than its prompt
    ],
    ids=range(7),
)
def test_an_ask_that_means_other_tokens_is_answered_with_unknown(asked: Ask) -> None:
    schedule = scheduler(COUNTING)
    session = schedule.open(TEN)
    ask(schedule, session, introducing(1, [1, 2]))
    assert tokens_of(ask(schedule, session, asked)) == [None]
    assert schedule.metrics.num_forgotten == 1
    assert tokens_of(ask(schedule, session, introducing(1, [1, 2, 3]))) == [[4, 5, 6]]


@pytest.mark.parametrize(
    "asked",
    [
        Ask(1, 0, NOTHING_KNOWN, np.array([], dtype=np.int32), 3, Introduction("a", 1, SamplingParams(), 0)),
        Ask(1, 0, NOTHING_KNOWN, np.array([1], dtype=np.int32), 3, Introduction("a", 2, SamplingParams(), 0)),
        Ask(1, 0, NOTHING_KNOWN, np.array([1], dtype=np.int32), 3, Introduction("a", 0, SamplingParams(), 0)),
        Ask(1, 0, NOTHING_KNOWN, np.array([1], dtype=np.int32), 3, Introduction("a", -1, SamplingParams(), 0)),
        Ask(1, 1, NOTHING_KNOWN, np.array([1], dtype=np.int32), 3, Introduction("a", 1, SamplingParams(), 0)),
    ],
    ids=range(5),
)
def test_an_introduction_that_contradicts_itself_is_refused(asked: Ask) -> None:
    schedule = scheduler(COUNTING)
    with pytest.raises(ExchangeError, match=r"a sequence of \d tokens with a prompt of") as caught:
        schedule.submit(schedule.open(TEN), Request(1, 60.0, [asked]))
    assert caught.value.cause == "garbled"
    assert not schedule.num_pending


def test_fewer_tokens_than_were_told_are_understood() -> None:
    """As when a target asks again for what it did not get an answer to."""
    schedule = scheduler(COUNTING, run_ahead=True)
    session = schedule.open(TEN)
    ask(schedule, session, introducing(1, [1, 2]))
    ask(schedule, session, going_on(1, [1, 2], [3, 4]))
    assert tokens_of(ask(schedule, session, going_on(1, [1, 2], [7]))) == [[8, 9, 0]]
    assert tokens_of(ask(schedule, session, going_on(1, [1, 2, 7], []))) == [[8, 9, 0]]
    assert schedule.metrics.num_forgotten == 0


def test_penalties_count_what_was_told_once() -> None:
    """A sequence that goes back and on again must not count the tokens that it left."""
    remote, _ = connected(scheduler(run_ahead=True))
    here = ModelDrafter(DRAFT, eos_token_ids=TARGET.eos_token_ids)
    [sequence] = varied([{"frequency_penalty": 1.5, "presence_penalty": 1.0, "repetition_penalty": 1.3}])
    for added in ([1, 1, 2], [1], [3, 3, 3], [0]):
        [one], [other] = here.propose([sequence]), remote.propose([sequence])
        assert_same(one, other)
        sequence.tokens += added


# What goes wrong on the way


class Disturbing:
    """Does something to some frames: loses them, sends them twice, again later, or with a bit turned over."""

    def __init__(self, fault: Callable[["Disturbing", bytes], list[bytes]], seed: int = 0, rate: float = 0.4) -> None:
        self.rng = random.Random(seed)
        self.before: list[bytes] = []
        self.num_faults = 0
        self._fault = fault
        self._rate = rate

    def __call__(self, frame: bytes) -> list[bytes]:
        arriving = [frame]
        if self.rng.random() < self._rate:
            self.num_faults += 1
            arriving = self._fault(self, frame)
        self.before.append(frame)
        return arriving


def lost(_: Disturbing, __: bytes) -> list[bytes]:
    return []


def twice(_: Disturbing, frame: bytes) -> list[bytes]:
    return [frame, frame]


def with_an_older_one(disturbing: Disturbing, frame: bytes) -> list[bytes]:
    """Only of the same kind: a request does not arrive where replies do."""
    kind = decode_header(frame[:HEADER_BYTES]).kind
    older = [one for one in disturbing.before if decode_header(one[:HEADER_BYTES]).kind == kind]
    return [disturbing.rng.choice(older), frame] if older else [frame]


@pytest.mark.parametrize("run_ahead", [False, True])
@pytest.mark.parametrize("fault", [twice, with_an_older_one])
def test_a_frame_that_is_repeated_or_stale_changes_nothing(
    fault: Callable[[Disturbing, bytes], list[bytes]], run_ahead: bool
) -> None:
    kinds = [{**kind, "ignore_eos": True} for kind in GREEDY + SAMPLED + COUPLED]
    expected = decode(varied(kinds, max_tokens=30), connected(scheduler(run_ahead=run_ahead))[0])
    for seed in range(2):
        disturbing = Disturbing(fault, seed)
        remote, channel = connected(scheduler(run_ahead=run_ahead), disturbing)
        assert decode(varied(kinds, max_tokens=30), remote) == expected
        assert disturbing.num_faults > 3
        assert not remote.metrics.num_fallbacks
        assert remote.is_connected
        while channel.scheduler.num_pending:
            channel.work()


@pytest.mark.parametrize("seed", range(4))
def test_a_lost_frame_costs_one_round_and_later_rounds_are_right_again(seed: int) -> None:
    """Whichever way it goes. Greedy and coupled, the output is the target's; whoever looks after the channel connects again."""
    schedule, disturbing = scheduler(run_ahead=True), Disturbing(lost, seed)
    kinds = [{**kind, "ignore_eos": True} for kind in GREEDY + COUPLED]
    remote, _ = connected(schedule, disturbing)

    class Reconnecting:
        def propose(self, asked: list[Sequence]) -> list[Draft]:
            if not remote.is_connected:
                remote.connect(InProcessChannel(schedule, TOKENS, disturbing))
            return remote.propose(asked)

    assert decode(varied(kinds, max_tokens=30), Reconnecting()) == decode(varied(kinds, max_tokens=30), NoDrafter())
    assert set(remote.metrics.num_fallbacks) == {"late"}
    assert remote.metrics.num_rounds > 3
    assert schedule.num_sessions == remote.is_connected  # those whose channel was given up are closed
    remote.disconnect()
    assert (schedule.num_sessions, schedule.num_sequences, schedule.num_pending) == (0, 0, 0)


# The end of a session


def test_a_session_that_is_closed_takes_its_requests_and_sequences_along() -> None:
    schedule = scheduler(COUNTING, run_ahead=True)
    staying, leaving = schedule.open(TEN), schedule.open(TEN)
    for session in (leaving, staying, leaving):
        schedule.submit(session, Request(1, 60.0, [introducing(1, [1])]))
    assert (schedule.num_pending, schedule.num_sequences) == (3, 2)
    schedule.close(leaving)
    schedule.close(leaving)
    assert (schedule.num_sessions, schedule.num_sequences, schedule.num_pending) == (1, 1, 1)
    assert [session for session, _ in run(schedule)] == [staying]
    assert schedule.has_work  # what may be asked for next
    schedule.close(staying)
    assert (schedule.num_sessions, schedule.num_sequences, schedule.has_work) == (0, 0, False)
    assert schedule.step() == []


# Long prompts


def test_a_new_long_prompt_is_computed_in_chunks_and_holds_nobody_up() -> None:
    model = RecordingBackend(COUNTING)
    schedule = scheduler(model, prefill_chunk=8)
    busy, new = schedule.open(TEN), schedule.open(TEN)
    ask(schedule, busy, introducing(1, [1]))
    del model.calls[:]
    long = [number % 10 for number in range(60)]
    schedule.submit(new, Request(1, 60.0, [introducing(1, long)]))
    schedule.submit(busy, Request(2, 60.0, [going_on(1, [1], [2], k=2)]))
    replies = []
    while not replies:
        replies += schedule.step()
    assert [session for session, _ in replies] == [busy]  # though it came later
    assert [[(len(row.tokens), row.num_scored) for row in rows] for rows in model.calls] == [
        [(8, 0)],
        [(2, 1)],
        [(16, 0)],
        [(3, 1)],
    ]
    [(session, reply)] = run(schedule)
    assert session is new
    assert tokens_of(reply.answers) == [[0, 1, 2]]
    lengths = [len(rows[0].tokens) for rows in model.calls]
    assert lengths == [8, 2, 16, 3, 24, 32, 40, 48, 56, 60, 61, 62]


def test_a_new_long_prompt_in_a_batch_gets_an_empty_draft_until_it_is_computed() -> None:
    model = RecordingBackend(COUNTING)
    schedule = scheduler(model, prefill_chunk=8)
    session = schedule.open(TEN)
    long = [number % 10 for number in range(40)]
    first = ask(schedule, session, introducing(1, [1]), introducing(2, long))
    assert tokens_of(first) == [[2, 3, 4], []]
    second = ask(schedule, session, going_on(1, [1], [2]), going_on(2, long, [0]))
    assert tokens_of(second) == [[3, 4, 5], [1, 2, 3]]
    lengths = [len(row.tokens) for rows in model.calls for row in rows if row.num_scored == 0]
    assert lengths == [8, 16, 24, 32, 40]  # nothing was computed twice


def test_a_seed_that_promises_the_same_answer_again_gets_its_draft_however_long_the_prompt_is() -> None:
    """Over frames: whether a seed was given is said in the introduction."""
    long = [number % (VOCAB_SIZE - 1) for number in range(60)]
    here = ModelDrafter(DRAFT, eos_token_ids=TARGET.eos_token_ids)
    for seed, is_waited_for in [(7, True), (None, False)]:
        remote, _ = connected(scheduler(prefill_chunk=4))
        sequences = [plain([1]), plain(long, temperature=1.0, seed=seed)]
        short, drafted = remote.propose(sequences)
        assert len(short.tokens) == 4
        assert drafted.tokens == (here.propose(sequences)[1].tokens if is_waited_for else [])


def test_prompts_in_chunks_change_no_draft(draft_folder: str) -> None:
    there, here = HuggingFaceBackend(draft_folder), HuggingFaceBackend(draft_folder)
    remote, _ = connected(scheduler(there, prefill_chunk=5), target=here)
    rng = random.Random(0)
    sequences = [plain([rng.randrange(61) for _ in range(length)]) for length in (33, 50)]
    for one, other in zip(ModelDrafter(here).propose(sequences), remote.propose(sequences), strict=True):
        assert one.tokens == other.tokens


# Patience


class Slow(RecordingBackend):
    """A model whose passes take so long."""

    def __init__(self, backend: TableModel, seconds: float) -> None:
        super().__init__(backend)
        self.seconds = seconds

    def logits(self, rows: Several[Row]) -> torch.Tensor:
        time.sleep(self.seconds)
        return super().logits(rows)


def test_what_is_there_in_time_is_sent() -> None:
    schedule = scheduler(Slow(COUNTING, 0.02))
    session = schedule.open(TEN)
    started = time.monotonic()
    (answer,) = ask(schedule, session, introducing(1, [0], k=50), patience_s=0.2)
    assert time.monotonic() - started < 0.6
    assert answer.draft is not None
    assert answer.draft.tokens == [number % 10 for number in range(1, len(answer.draft.tokens) + 1)]
    assert 1 <= len(answer.draft.tokens) < 10


def test_a_draft_that_was_cut_short_is_gone_on_from() -> None:
    schedule = scheduler(Slow(COUNTING, 0.02), run_ahead=True)
    session = schedule.open(TEN)
    (answer,) = ask(schedule, session, introducing(1, [0], k=50), patience_s=0.1)
    assert answer.draft is not None and answer.draft.continues
    schedule.step()
    (ahead,) = ask(schedule, session, going_on(1, [0], answer.draft.tokens, k=2))
    count = len(answer.draft.tokens)
    assert tokens_of([ahead]) == [[(count + 1) % 10, (count + 2) % 10]]
    assert ahead.num_ahead == 1


def test_no_patience_gets_an_answer_at_once() -> None:
    schedule = scheduler(COUNTING)
    session = schedule.open(TEN)
    schedule.submit(session, Request(1, 0.0, [introducing(1, [0], k=50)]))
    ((_, reply),) = schedule.step()
    assert tokens_of(reply.answers) == [[1]]


# What the draft cannot do


def test_ids_that_the_draft_does_not_know_get_empty_drafts_and_do_not_hold_others_up() -> None:
    small = TableModel(random_table(4, 0))
    remote, _ = connected(scheduler(small))
    sequences = [plain([1, 5, 2]), plain([1, 3, 2]), plain([6])]
    assert [len(draft.tokens) for draft in remote.propose(sequences)] == [0, 4, 0]
    sequences[1].tokens.append(5)
    assert [len(draft.tokens) for draft in remote.propose(sequences)] == [0, 0, 0]
    assert not remote.metrics.num_fallbacks
    alone = decode([plain([1, 5, 2], max_tokens=12)], NoDrafter())
    assert decode([plain([1, 5, 2], max_tokens=12)], connected(scheduler(small, run_ahead=True))[0]) == alone


def test_a_request_for_nothing_is_answered_with_nothing() -> None:
    schedule = scheduler(COUNTING)
    session = schedule.open(TEN)
    assert ask(schedule, session) == []
    assert tokens_of(ask(schedule, session, introducing(1, [1], k=0), introducing(2, [1], k=2))) == [[], [2, 3]]


def test_a_step_without_work_does_nothing() -> None:
    schedule = DraftScheduler(lambda _: ModelDrafter(COUNTING), SchedulerConfig(run_ahead=True))
    schedule.open(TEN)
    assert not schedule.has_work
    assert schedule.step() == []
    assert schedule.metrics.num_passes == 0


def test_the_time_that_the_model_takes_is_told() -> None:
    schedule = scheduler(Slow(COUNTING, 0.01))
    session = schedule.open(TEN)
    schedule.submit(session, Request(1, 60.0, [introducing(1, [1], k=3)]))
    ((_, reply),) = run(schedule)
    assert 0.03 <= reply.busy_s < 1
    assert schedule.metrics.busy_s >= 0.03

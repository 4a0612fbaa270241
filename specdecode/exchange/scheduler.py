"""Requests of any number of targets in, one batched pass of the draft model after the other, replies out.

Knows neither bytes nor sockets nor threads: whoever calls `step` again and again is the scheduler's clock.

Two kinds of guesses are in the making: those that were asked for, and those that are likely to be asked for next. The latter go
on from the end of the last draft, as if the target had accepted all of it, while nobody waits for anything.
"""

import logging
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np

from specdecode.backends.backend import Row
from specdecode.decoding.constraints import bind_grammar
from specdecode.decoding.drafters import Guess, ModelDrafter
from specdecode.decoding.sequence import Draft, Route, Sequence
from specdecode.errors import RequestError
from specdecode.exchange.messages import Answer, Ask, ExchangeError, ModelTokens, Reply, Request, checksum

logger = logging.getLogger("specdecode.exchange")

# How much of a target's patience is used; the rest is for the way back.
_USED_PATIENCE = 0.8


@dataclass(frozen=True)
class SchedulerConfig:
    """What a scheduler takes on.

    Attributes:
        max_batch: how many guesses one pass of the draft model extends at the most.
        max_sequences: how many sequences a session remembers at the most; the one that was asked for longest ago is forgotten.
        prefill_chunk: how many tokens of a new sequence are computed between two passes.
        run_ahead: whether to draft, while a target verifies, what it will ask for if it accepts everything.
    """

    max_batch: int = 64
    max_sequences: int = 256
    prefill_chunk: int = 256
    run_ahead: bool = False


@dataclass
class SchedulerMetrics:
    """What was done so far.

    Attributes:
        num_passes: forward passes that extended guesses.
        num_extended: guesses that they extended, summed.
        num_ahead: tokens that were drafted before they were asked for.
        num_ahead_used: those of them that were asked for later.
        num_forgotten: asks for sequences that were not remembered.
        busy_s: time spent in the draft model and with its distributions.
    """

    num_passes: int = 0
    num_extended: int = 0
    num_ahead: int = 0
    num_ahead_used: int = 0
    num_forgotten: int = 0
    busy_s: float = 0.0


class Session:
    """One target's conversation with the draft: the drafter for it, and the sequences that it told of, the last one last."""

    def __init__(self, drafter: ModelDrafter, target: ModelTokens, name: str) -> None:
        self.drafter = drafter
        self.target = target
        self.name = name
        self.known: OrderedDict[int, _Known] = OrderedDict()


class DraftScheduler:
    """Drafts for all sessions together.

    Args:
        drafter_for: makes the drafter for a target; all of them draft with one model.
        config: what it takes on.
    """

    def __init__(self, drafter_for: Callable[[ModelTokens], ModelDrafter], config: SchedulerConfig | None = None) -> None:
        self.config = config or SchedulerConfig()
        self.metrics = SchedulerMetrics()
        self._drafter_for = drafter_for
        self._drafters: dict[ModelTokens, ModelDrafter] = {}
        self._sessions: dict[Session, None] = {}
        self._pending: deque[_Pending] = deque()
        self._num_opened = 0

    @property
    def num_sessions(self) -> int:
        """How many sessions are open."""
        return len(self._sessions)

    @property
    def num_sequences(self) -> int:
        """How many sequences are remembered."""
        return sum(len(session.known) for session in self._sessions)

    @property
    def num_pending(self) -> int:
        """How many requests are not answered yet."""
        return len(self._pending)

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._pending) or next(self._ahead(), None) is not None

    def open(self, target: ModelTokens) -> Session:
        """Begins a session.

        Raises:
            ModelError: the draft's vocabulary and the target's have too little in common.
        """
        if target not in self._drafters:  # to compare two vocabularies takes a while
            self._drafters[target] = self._drafter_for(target)
        self._num_opened += 1
        session = Session(self._drafters[target], target, str(self._num_opened))
        self._sessions[session] = None
        return session

    def close(self, session: Session) -> None:
        """Forgets a session, its sequences and what it waits for; one that is closed already is ignored."""
        self._sessions.pop(session, None)
        self._pending = deque(pending for pending in self._pending if pending.session is not session)

    def submit(self, session: Session, request: Request) -> None:
        """Takes a request on; its reply comes out of a later step.

        Raises:
            ExchangeError: a sequence is introduced in a way that contradicts itself.
        """
        reply_by = time.monotonic() + _USED_PATIENCE * request.patience_s
        self._pending.append(_Pending(session, request.round, [self._take(session, ask) for ask in request.asks], reply_by))
        while len(session.known) > max(self.config.max_sequences, len(request.asks)):
            session.known.popitem(last=False)

    def step(self) -> list[tuple[Session, Reply]]:
        """Extends guesses by one token, those that are asked for or else those that may be; returns what replies are due."""
        started = time.perf_counter()
        asked = [part for pending in self._pending for part in pending.parts if part.is_open]
        self._extend(asked or [] if self._pending else list(self._ahead()), is_ahead=not self._pending)
        busy_s = time.perf_counter() - started
        self.metrics.busy_s += busy_s
        due: list[_Pending] = []
        waiting: deque[_Pending] = deque()
        for pending in self._pending:
            pending.busy_s += busy_s
            (due if pending.is_due(self.config.prefill_chunk) else waiting).append(pending)
        self._pending = waiting
        return [(pending.session, self._reply(pending)) for pending in due]

    def _take(self, session: Session, ask: Ask) -> "_Part":
        """Brings what is known of a sequence up to date; the guess at how it goes on may have been begun already."""
        known = session.known.pop(ask.number, None)
        if ask.introduction is not None:
            known = _Known.introduced(ask, session)
            logger.info("session=%s drafts for id=%s tokens=%d", session.name, ask.introduction.id, len(ask.added))
        elif known is None or not known.agrees(ask):
            self.metrics.num_forgotten += 1
            return _Part(session, ask.k)
        else:
            known.follow(ask)
        session.known[ask.number] = known
        known.sequence.k = ask.k
        if known.ahead is None:
            [guess] = session.drafter.begin([known.sequence])
            return _Part(session, ask.k, known, guess)
        guess, known.ahead = session.drafter.resize(known.ahead), None
        num_ahead = min(len(guess.tokens), ask.k)
        self.metrics.num_ahead_used += num_ahead
        return _Part(session, ask.k, known, guess, num_ahead)

    def _ahead(self) -> Iterator["_Part"]:
        """What may be asked for next and is not drafted yet."""
        for session in self._sessions:
            for known in session.known.values():
                if known.ahead is not None and not known.ahead.is_complete:
                    yield _Part(session, known.ahead.k, known, known.ahead)

    def _extend(self, parts: list["_Part"], *, is_ahead: bool) -> None:
        """One forward pass for each kind of target; new sequences have a chunk of their tokens computed first."""
        by_drafter: dict[int, list[_Part]] = {}
        for part in parts[: self.config.max_batch]:
            by_drafter.setdefault(id(part.session.drafter), []).append(part)
        for members in by_drafter.values():
            drafter = members[0].session.drafter
            if guesses := [part.guess for part in members if part.guess and self._is_prefilled(part, drafter)]:
                drafter.extend(guesses)
                self.metrics.num_passes += 1
                self.metrics.num_extended += len(guesses)
                self.metrics.num_ahead += len(guesses) if is_ahead else 0

    def _is_prefilled(self, part: "_Part", drafter: ModelDrafter) -> bool:
        """Computes the next chunk of a new sequence; returns whether what is left fits in a pass with the others."""
        chunk = self.config.prefill_chunk
        if part.num_cold > chunk:
            assert part.known is not None and part.guess is not None
            part.known.num_computed += chunk
            drafter.backend.logits([Row(part.guess.sequence.id, part.guess.context[: part.known.num_computed], 0)])
        return part.num_cold <= chunk

    def _reply(self, pending: "_Pending") -> Reply:
        return Reply(pending.round, pending.busy_s, [self._answer(part) for part in pending.parts])

    def _answer(self, part: "_Part") -> Answer:
        if part.known is None or part.guess is None:
            return Answer(None)
        draft = part.guess.draft().truncate(part.k)
        if draft.tokens:
            part.known.num_computed = len(part.guess.context)
        if (
            self.config.run_ahead
            and draft.tokens
            and not (part.guess.has_ended and len(draft.tokens) == len(part.guess.tokens))
        ):
            [ahead] = part.session.drafter.begin([part.known.continued(draft)])
            if ahead.k:
                part.known.ahead, draft = ahead, replace(draft, continues=True)
        return Answer(draft, part.num_ahead)


class _Known:
    """A sequence as far as the target has told it.

    Attributes:
        sequence: its tokens, with the target's parameters.
        ahead: a guess that goes on from the end of the last draft.
        num_computed: how many of its first tokens the draft model has computed for certain.
    """

    def __init__(self, sequence: Sequence) -> None:
        self.sequence = sequence
        self.ahead: Guess | None = None
        self.num_computed = 0
        self._checksum = checksum(np.array(sequence.tokens, dtype=np.int32))

    @staticmethod
    def introduced(ask: Ask, session: Session) -> "_Known":
        """One that is told whole."""
        about = ask.introduction
        assert about is not None
        if ask.num_known or not 0 < about.num_prompt_tokens <= len(ask.added):
            raise ExchangeError("garbled", f"a sequence of {len(ask.added)} tokens with a prompt of {about.num_prompt_tokens}")
        sequence = Sequence(
            ask.added.tolist(),
            about.params,
            Route(k=ask.k),
            id=f"{session.name}:{about.id}",
            num_prompt_tokens=about.num_prompt_tokens,
        )
        sequence.seed = about.seed
        with suppress(RequestError):  # the target's tokenizer may not be there, without which the draft is only worse
            bind_grammar(sequence, session.target)
        return _Known(sequence)

    def agrees(self, ask: Ask) -> bool:
        """Whether the target means the same tokens; it may mean fewer, as when it asks once more."""
        tokens = self.sequence.tokens
        if ask.num_known + len(ask.added) < self.sequence.num_prompt_tokens:
            return False
        if ask.num_known < len(tokens):
            return ask.checksum == checksum(np.array(tokens[: ask.num_known], dtype=np.int32))
        return ask.num_known == len(tokens) and ask.checksum == self._checksum

    def follow(self, ask: Ask) -> None:
        """Goes on as the target says; a guess that did not expect it is dropped."""
        is_whole = ask.num_known == len(self.sequence.tokens)
        tokens = self.sequence.tokens[: ask.num_known] + ask.added.tolist()
        if self.ahead is not None and self.ahead.sequence.tokens == tokens:
            self.sequence = self.ahead.sequence
        else:
            self.ahead = None
            if is_whole:
                self.sequence.tokens.extend(ask.added.tolist())
            else:
                self.sequence = self._with(tokens)
        so_far = self._checksum if is_whole else checksum(np.array(tokens[: ask.num_known], dtype=np.int32))
        self._checksum = checksum(ask.added, so_far)

    def continued(self, draft: Draft) -> Sequence:
        """The sequence as it will be if all of the draft is accepted."""
        return self._with(self.sequence.tokens + draft.tokens)

    def _with(self, tokens: list[int]) -> Sequence:
        old = self.sequence
        new = Sequence(tokens, old.params, old.route, id=old.id, num_prompt_tokens=old.num_prompt_tokens)
        new.seed, new.k, new.matcher = old.seed, old.k, old.matcher
        return new


@dataclass
class _Part:
    """One ask of a request, and the guess in the making; without a guess if the sequence is not known."""

    session: Session
    k: int
    known: _Known | None = None
    guess: Guess | None = None
    num_ahead: int = 0

    @property
    def is_open(self) -> bool:
        return self.guess is not None and not self.guess.is_complete

    @property
    def num_cold(self) -> int:
        """How many of a new sequence's tokens are still to be computed."""
        if self.known is None or self.guess is None or self.guess.tokens:
            return 0
        return len(self.guess.context) - self.known.num_computed

    def may_be_left_out(self, chunk: int) -> bool:
        """Whether its prompt takes so long that the others need not wait; a seed's promise needs every draft."""
        return self.num_cold > chunk and self.guess is not None and not self.guess.sequence.params.depends_on_k


@dataclass
class _Pending:
    """A request that is not answered yet."""

    session: Session
    round: int
    parts: list[_Part]
    reply_by: float
    busy_s: float = 0.0

    def is_due(self, chunk: int) -> bool:
        """Whether all that is worth waiting for is there."""
        open_ = [part for part in self.parts if part.is_open]
        if not open_ or time.monotonic() >= self.reply_by:
            return True
        return len(open_) < len(self.parts) and all(part.may_be_left_out(chunk) for part in open_)

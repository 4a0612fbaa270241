"""Sequences in, guesses of a draft elsewhere out. A draft that is late, gone or broken costs speed, never a request."""

import logging
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np

from specdecode.decoding.sequence import Draft, Sequence
from specdecode.exchange.channel import Channel
from specdecode.exchange.frames import MAX_K, Kind, decode_reply, encode_request
from specdecode.exchange.messages import NOTHING_KNOWN, Answer, Ask, ExchangeError, Introduction, Reply, Request, checksum

logger = logging.getLogger("specdecode.exchange")


@dataclass
class ExchangeMetrics:
    """What was exchanged so far.

    Attributes:
        num_rounds: requests that were answered.
        num_fallbacks: sequences that were decoded without a draft, by cause.
        num_ahead: tokens that had been drafted before they were asked for.
        num_told_again: sequences that the draft had forgotten.
        last_exchange_s: what the last round took beside the draft model's own work: codec, network, waiting for other targets.
        last_busy_s: that work.
    """

    num_rounds: int = 0
    num_fallbacks: Counter[str] = field(default_factory=Counter)
    num_ahead: int = 0
    num_told_again: int = 0
    last_exchange_s: float = 0.0
    last_busy_s: float = 0.0


class RemoteDrafter:
    """A `Drafter` at the other end of a channel, while there is one. Whoever looks after the channel gives it to `connect`.

    Args:
        name: what the draft is called in the log.
        vocab_size: the target's.
        deadline_s: an answer that takes longer is not waited for.
    """

    def __init__(self, name: str, vocab_size: int, *, deadline_s: float) -> None:
        self.name = name
        self.metrics = ExchangeMetrics()
        self._vocab_size = vocab_size
        self._deadline_s = deadline_s
        self._line: _Line | None = None
        self._lock = threading.Lock()

    @property
    def is_connected(self) -> bool:
        """Whether there is a channel."""
        return self._line is not None

    def connect(self, channel: Channel) -> "Future[ExchangeError]":
        """Drafts over this channel from now on; what is returned is done, with the reason, when the channel is of no use."""
        line = _Line(channel)
        with self._lock:
            self._line, old = line, self._line
        if old is not None:
            old.give_up(ExchangeError("gone", "replaced by another connection"))
        return line.lost

    def disconnect(self) -> None:
        """Gives the channel up, if there is one."""
        self._give_up(self._line, ExchangeError("gone", "the lease ended"))

    def propose(self, sequences: list[Sequence]) -> list[Draft]:
        """See `Drafter.propose`; empty drafts if the draft does not answer."""
        return self.start(sequences)()

    def start(self, sequences: list[Sequence]) -> Callable[[], list[Draft]]:
        """See `DistantDrafter.start`."""
        line, started = self._line, time.perf_counter()
        deadline = time.monotonic() + self._deadline_s
        if line is None:
            return lambda: self._fall_back("absent", sequences)
        try:
            line.ask(sequences, self._deadline_s)
        except ExchangeError as error:
            failure = error  # the name that `except` binds ends with it
            return lambda: self._fail(line, failure, sequences)

        def finish() -> list[Draft]:
            try:
                answers, busy_s = self._answers(line, sequences, deadline)
            except ExchangeError as error:
                return self._fail(line, error, sequences)
            self.metrics.num_rounds += 1
            self.metrics.num_ahead += sum(answer.num_ahead for answer in answers)
            self.metrics.last_busy_s = busy_s
            self.metrics.last_exchange_s = max(0.0, time.perf_counter() - started - busy_s)
            return [answer.draft or Draft.empty() for answer in answers]

        return finish

    def _answers(self, line: "_Line", sequences: list[Sequence], deadline: float) -> tuple[list[Answer], float]:
        """The answers of a round; what the draft has forgotten is told again at once."""
        reply = line.reply(sequences, self._vocab_size, deadline)
        answers, busy_s = reply.answers, reply.busy_s
        if forgotten := [number for number, answer in enumerate(answers) if answer.draft is None]:
            self.metrics.num_told_again += len(forgotten)
            members = [sequences[number] for number in forgotten]
            line.forget(members)
            line.ask(members, max(0.0, deadline - time.monotonic()))
            reply = line.reply(members, self._vocab_size, deadline)
            for number, answer in zip(forgotten, reply.answers, strict=True):
                answers[number] = answer
            busy_s += reply.busy_s
        return answers, busy_s

    def _fail(self, line: "_Line", error: ExchangeError, sequences: list[Sequence]) -> list[Draft]:
        logger.warning("draft %s gave no answer, decoding without it: %s", self.name, error)
        self._give_up(line, error)
        return self._fall_back(error.cause, sequences)

    def _fall_back(self, cause: str, sequences: list[Sequence]) -> list[Draft]:
        self.metrics.num_fallbacks[cause] += len(sequences)
        return [Draft.empty() for _ in sequences]

    def _give_up(self, line: "_Line | None", error: ExchangeError) -> None:
        with self._lock:
            if self._line is line:
                self._line = None
        if line is not None:
            line.give_up(error)


@dataclass(frozen=True)
class _Told:
    """What the draft was told of a sequence: its number, how many tokens, and their checksum."""

    number: int
    num_tokens: int
    checksum: int


class _Line:
    """A channel, and what was said over it."""

    def __init__(self, channel: Channel) -> None:
        self.lost: Future[ExchangeError] = Future()
        self._channel = channel
        self._told: weakref.WeakKeyDictionary[Sequence, _Told] = weakref.WeakKeyDictionary()
        self._num_introduced = 0
        self._round = 0

    def ask(self, sequences: list[Sequence], patience_s: float) -> None:
        """Sends the next request."""
        self._round += 1
        asks = [self._ask(sequence) for sequence in sequences]
        self._channel.send(encode_request(Request(self._round, patience_s, asks)))

    def reply(self, sequences: list[Sequence], vocab_size: int, deadline: float) -> Reply:
        """Waits for the answers to the last request; one to an earlier request, or the same again, is passed over."""
        while True:
            frame = self._channel.receive(deadline)
            if frame.header.kind == Kind.REFUSAL:
                raise ExchangeError("refused", frame.payload.decode(errors="replace"))
            if frame.header.kind != Kind.REPLY or frame.header.round > self._round:
                raise ExchangeError("garbled", f"expected the reply of round {self._round}, got {frame.header}")
            if frame.header.round == self._round:
                break
        reply = decode_reply(self._round, frame.payload, vocab_size)
        if len(reply.answers) != len(sequences):
            raise ExchangeError("garbled", f"expected {len(sequences)} answers, got {len(reply.answers)}")
        for sequence, answer in zip(sequences, reply.answers, strict=True):
            if answer.draft is not None and len(answer.draft.tokens) > sequence.num_wanted:
                raise ExchangeError("garbled", f"expected {sequence.num_wanted} tokens, got {len(answer.draft.tokens)}")
        return reply

    def forget(self, sequences: list[Sequence]) -> None:
        """Has these told whole the next time."""
        for sequence in sequences:
            self._told.pop(sequence, None)

    def give_up(self, error: ExchangeError) -> None:
        """Closes the channel, and says why."""
        self._channel.close()
        if not self.lost.done():
            self.lost.set_result(error)

    def _ask(self, sequence: Sequence) -> Ask:
        told, introduction = self._told.get(sequence), None
        if told is None:
            self._num_introduced += 1
            told = _Told(self._num_introduced, 0, NOTHING_KNOWN)
            introduction = Introduction(sequence.id, sequence.num_prompt_tokens, sequence.params, sequence.seed)
        added = np.array(sequence.tokens[told.num_tokens :], dtype=np.int32)
        self._told[sequence] = _Told(told.number, len(sequence.tokens), checksum(added, told.checksum))
        return Ask(told.number, told.num_tokens, told.checksum, added, min(sequence.num_wanted, MAX_K), introduction)

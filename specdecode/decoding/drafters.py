"""Sequences in, guesses out. A guess may be wrong, late or empty, and costs only speed."""

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Several
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from specdecode.backends.backend import ModelBackend, Row
from specdecode.decoding.constraints import Scored
from specdecode.decoding.distributions import draft_distributions
from specdecode.decoding.sampling import Purpose, sample, uniforms
from specdecode.decoding.sequence import Draft, Sequence
from specdecode.errors import RequestError
from specdecode.vocabulary import HasTokensAndEnds, SameVocabulary, Translation, translate

DEFAULT_SUPPORT = 64


class Drafter(Protocol):
    """Guesses how sequences go on."""

    def propose(self, sequences: list[Sequence]) -> list[Draft]:
        """Drafts at the most `num_wanted` tokens for each sequence."""
        ...


@runtime_checkable
class DistantDrafter(Drafter, Protocol):
    """A drafter that works elsewhere, while this process may do something else."""

    def start(self, sequences: list[Sequence]) -> Callable[[], list[Draft]]:
        """Asks for drafts as `propose` does; what it returns waits for them."""
        ...


def start(drafter: Drafter, sequences: list[Sequence]) -> Callable[[], list[Draft]]:
    """Starts a drafter that works elsewhere; one that works here does so when its drafts are waited for."""
    if isinstance(drafter, DistantDrafter):
        return drafter.start(sequences)
    return partial(drafter.propose, sequences)


class NoDrafter:
    """Guesses nothing, which makes decoding plain."""

    def propose(self, sequences: list[Sequence]) -> list[Draft]:
        """See `Drafter.propose`."""
        return [Draft.empty() for _ in sequences]


class ModelDrafter:
    """Guesses with a smaller model, all sequences together.

    Args:
        backend: the draft model.
        translation: between its vocabulary and the target's; the same one if None.
        eos_token_ids: the target's end tokens, after which there is nothing to draft; the draft model's own if None.
        support: how many tokens each q covers at the most; the fewer, the less there is to send, and the draft stays exact.
        min_confidence: a draft ends where the draft model gives all of it less than this probability; 0 never does.
    """

    def __init__(
        self,
        backend: ModelBackend,
        translation: Translation | None = None,
        *,
        eos_token_ids: frozenset[int] | None = None,
        support: int = DEFAULT_SUPPORT,
        min_confidence: float = 0.0,
    ) -> None:
        self.backend = backend
        self._translation = translation or SameVocabulary(backend.vocab_size, backend.vocab_size)
        self._eos_token_ids = backend.eos_token_ids if eos_token_ids is None else eos_token_ids
        self._support = support
        self._min_confidence = min_confidence

    @staticmethod
    def between(backend: ModelBackend, target: HasTokensAndEnds, **options: Any) -> "ModelDrafter":
        """Makes a drafter of `backend` for another model, of which the tokens are all that matters.

        Raises:
            ModelError: the two models' vocabularies have too little in common.
        """
        return ModelDrafter(backend, translate(backend, target), eos_token_ids=target.eos_token_ids, **options)

    def propose(self, sequences: list[Sequence]) -> list[Draft]:
        """See `Drafter.propose`."""
        guesses = self.begin(sequences)
        while unfinished := [guess for guess in guesses if not guess.is_complete]:
            self.extend(unfinished)
        return [guess.draft() for guess in guesses]

    def begin(self, sequences: list[Sequence]) -> list["Guess"]:
        """Begins a guess at each sequence, without a token yet."""
        return [self._begin(sequence) for sequence in sequences]

    def _begin(self, sequence: Sequence) -> "Guess":
        context = self._translation.context(sequence.tokens)
        if context is None:  # the target may know tokens that the draft does not
            return Guess(sequence, [], 0, has_ended=True)
        return self.resize(Guess(sequence, list(context), 0))

    def resize(self, guess: "Guess") -> "Guess":
        """Makes a guess want as many tokens as its sequence does by now, and the draft model has room for."""
        if not guess.has_ended:
            room = self.backend.max_length - (len(guess.context) - len(guess.tokens))
            guess.k = max(0, min(guess.sequence.num_wanted, room))
        return guess

    @torch.inference_mode()
    def extend(self, guesses: list["Guess"]) -> None:
        """Drafts one more token for each, in one forward pass; a guess that ends here wants no more than it has."""
        size = 1 if all(guess.sequence.params.temperature == 0 for guess in guesses) else self._support
        if short := [guess for guess in guesses if len(guess.u) <= len(guess.tokens)]:
            for guess, numbers in zip(short, _uniforms([g.sequence for g in short], max(g.k for g in short)), strict=True):
                guess.u = numbers
        u = torch.stack([guess.u[len(guess.tokens)] for guess in guesses])
        logits = self._translation.logits(self.backend.logits([Row(g.sequence.id, g.context, 1) for g in guesses]))
        confidence = logits.float().softmax(-1) if self._min_confidence else None
        scored = [Scored(guess.sequence, guess.tokens, 1) for guess in guesses]
        support, q = draft_distributions(logits, scored, self._eos_token_ids, size)
        is_open = q[:, 0].isfinite()  # the request may allow none of the draft's tokens
        drawn = support if size == 1 else support.gather(1, sample(torch.where(is_open[:, None], q, 1.0), u)[:, None])  # [n, 1]
        chances = confidence.gather(1, drawn).squeeze(1).tolist() if confidence is not None else [1.0] * len(guesses)
        support, q = support.cpu(), q.cpu()
        for row, (guess, token, is_drawn) in enumerate(zip(guesses, drawn.squeeze(1).tolist(), is_open.tolist(), strict=True)):
            if is_drawn:
                guess.add(token, self._translation.draft_id(token), chances[row], support[row], q[row])
            if not is_drawn or self._ends(guess):
                guess.k, guess.has_ended = len(guess.tokens), True

    def _ends(self, guess: "Guess") -> bool:
        # Only what was drafted up to here may decide, and nothing of it is taken back: q would not be what it was drawn from.
        ends = guess.sequence.params.end_token_ids(self._eos_token_ids)
        allowed = guess.sequence.allowed_after(guess.tokens)
        is_over = allowed is not None and allowed.is_over
        return is_over or guess.tokens[-1] in ends or guess.confidence < self._min_confidence


@dataclass
class Guess:
    """A draft in the making.

    Attributes:
        sequence: what it goes on from.
        context: the same in the draft model's ids, with what was drafted.
        k: how many tokens are wanted.
        tokens: what was drafted.
        confidence: the probability of all of it, if the drafter asks for it.
        has_ended: whether there is nothing to draft after the last token, or nothing that is likely enough.
        u: the random numbers that the tokens are drawn with, as many as were needed so far.
    """

    sequence: Sequence
    context: list[int]
    k: int
    tokens: list[int] = field(default_factory=list)
    confidence: float = 1.0
    has_ended: bool = False
    u: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    _support: list[torch.Tensor] = field(default_factory=list)
    _q: list[torch.Tensor] = field(default_factory=list)

    @property
    def is_complete(self) -> bool:
        """Whether it has all the tokens that are wanted."""
        return len(self.tokens) >= self.k

    def add(self, token: int, draft_id: int, chance: float, support: torch.Tensor, q: torch.Tensor) -> None:
        """Adds a drafted token, its id in the draft model, its probability there, and the q that it was drawn from, [m]."""
        self.tokens.append(token)
        self.context = [*self.context, draft_id]  # a new list: the backend keeps the old one
        self.confidence *= chance
        self._support.append(support)
        self._q.append(q)

    def draft(self) -> Draft:
        """What was drafted so far."""
        if not self.tokens:
            return Draft.empty()
        if not self.sequence.params.is_sampled:
            return Draft.certain(self.tokens)
        return Draft(self.tokens, torch.stack(self._support), torch.stack(self._q))


def _uniforms(sequences: list[Sequence], count: int) -> torch.Tensor:
    """Random numbers to draft with, [batch, count]; 0 where q is one-hot and nothing depends on them."""
    u = torch.zeros(len(sequences), count, dtype=torch.float64)
    if drawn := [number for number, sequence in enumerate(sequences) if sequence.params.is_sampled]:
        seeds, positions = [sequences[n].seed for n in drawn], [len(sequences[n].tokens) for n in drawn]
        u[drawn] = uniforms(seeds, positions, Purpose.DRAFT, count)
    return u


class PromptLookupDrafter:
    """Guesses that what followed the last few tokens before will follow them again (Saxena 2023; vLLM's ngram method).

    It takes the longest n-gram at the sequence's end that stands in it before, where it stands last, and copies what follows;
    the copy may run into itself, so that a loop goes on.

    Args:
        max_ngram, min_ngram: how many tokens at the end are looked for, at the most and at least.
    """

    def __init__(self, max_ngram: int = 4, min_ngram: int = 2) -> None:
        if not 1 <= min_ngram <= max_ngram:
            raise RequestError(f"min_ngram: expected a number in [1, max_ngram], got {min_ngram} with max_ngram {max_ngram}")
        self._max_ngram = max_ngram
        self._min_ngram = min_ngram

    def propose(self, sequences: list[Sequence]) -> list[Draft]:
        """See `Drafter.propose`."""
        return [self._guess(sequence) for sequence in sequences]

    def _guess(self, sequence: Sequence) -> Draft:
        tokens = np.array(sequence.tokens)
        start = self._continuation(tokens) if sequence.num_wanted > 0 else None
        if start is None:
            return Draft.empty()
        period = len(tokens) - start
        copied = [int(tokens[start + offset % period]) for offset in range(sequence.num_wanted)]
        return Draft.certain(copied)

    def _continuation(self, tokens: np.ndarray) -> int | None:
        """Where what followed the last tokens before begins."""
        for n in range(min(self._max_ngram, len(tokens) - 1), self._min_ngram - 1, -1):
            windows = np.lib.stride_tricks.sliding_window_view(tokens[:-1], n)
            found = (windows == tokens[-n:]).all(-1).nonzero()[0]
            if len(found):
                return int(found[-1]) + n
        return None


class ChainDrafter:
    """A drafter made of drafters: each sequence gets the guess of the first one that has any.

    Args:
        drafters: the quickest first.
    """

    def __init__(self, drafters: Several[Drafter]) -> None:
        self._drafters = list(drafters)

    def propose(self, sequences: list[Sequence]) -> list[Draft]:
        """See `Drafter.propose`."""
        return self.start(sequences)()

    def start(self, sequences: list[Sequence]) -> Callable[[], list[Draft]]:
        """See `DistantDrafter.start`; the last drafter may work elsewhere."""
        *quicker, last = self._drafters or [NoDrafter()]
        drafts = [Draft.empty() for _ in sequences]
        for drafter in quicker:
            _fill(drafts, _open(drafts), drafter.propose([sequences[i] for i in _open(drafts)]))
        open_ = _open(drafts)
        finish = start(last, [sequences[i] for i in open_]) if open_ else list
        return lambda: _fill(drafts, open_, finish())


def _open(drafts: list[Draft]) -> list[int]:
    """Where nothing is drafted yet."""
    return [number for number, draft in enumerate(drafts) if not draft.tokens]


def _fill(drafts: list[Draft], places: list[int], found: list[Draft]) -> list[Draft]:
    for place, draft in zip(places, found, strict=True):
        drafts[place] = draft
    return drafts


class RoutedDrafter:
    """A drafter made of drafters: each sequence goes to the one that its route names.

    Args:
        drafters: by name; a sequence whose route names none of them is not drafted for. All that work elsewhere do so at the
            same time.
    """

    def __init__(self, drafters: Mapping[str, Drafter]) -> None:
        self._drafters = dict(drafters)

    def propose(self, sequences: list[Sequence]) -> list[Draft]:
        """See `Drafter.propose`."""
        drafts = [Draft.empty() for _ in sequences]
        started: list[tuple[list[int], Callable[[], list[Draft]]]] = []
        for name, drafter in self._drafters.items():
            members = [i for i, s in enumerate(sequences) if s.route.drafter == name and s.num_wanted > 0]
            if members:
                started.append((members, start(drafter, [sequences[i] for i in members])))
        for members, finish in started:
            _fill(drafts, members, finish())
        return drafts

"""Logits in; the same logits, changed as the request and the tokens so far demand, out.

Every change but a grammar's touches a few entries of each row, so that the cost grows with the tokens of a sequence and not
with the vocabulary. Tokens that the model at hand does not have, as a draft may lack some of the target's, are passed over.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from specdecode.decoding.sequence import SamplingParams, Sequence
from specdecode.errors import ModelError, RequestError
from specdecode.grammar import Grammars
from specdecode.vocabulary import HasTokensAndEnds


@dataclass(frozen=True)
class Scored:
    """The last `num_scored` positions of a sequence that is taken to go on with `drafted`; each is given one row of logits.

    The token after such a position is processed as if the drafted tokens before it had been accepted.
    """

    sequence: Sequence
    drafted: list[int]
    num_scored: int

    @property
    def tokens(self) -> list[int]:
        """The sequence with the drafted tokens."""
        return self.sequence.tokens + self.drafted

    @property
    def positions(self) -> range:
        """Where the tokens stand that the rows decide on."""
        end = len(self.sequence.tokens) + len(self.drafted) + 1
        return range(end - self.num_scored, end)


def constrain(logits: torch.Tensor, scored: list[Scored], eos_token_ids: frozenset[int]) -> None:
    """Applies the grammar, allowed and bad tokens, `min_tokens`, the logit bias and the penalties, in place.

    Args:
        logits: [sum(num_scored), vocab].
        scored: whose rows they are.
        eos_token_ids: the model's own end tokens.
    """
    penalised: list[_Penalties] = []
    first = 0
    for part in scored:
        params, rows = part.sequence.params, slice(first, first + part.num_scored)
        for row, mask in _grammatical(part, eos_token_ids):
            forbidden = torch.from_numpy(~mask[: logits.shape[1]]).to(logits.device)
            logits[first + row].masked_fill_(forbidden, -torch.inf)
        if params.allowed_token_ids is not None:
            _allow(logits[rows], params.allowed_token_ids)
        for row, token in _bans(part, eos_token_ids):
            if token < logits.shape[1]:
                logits[first + row, token] = -torch.inf
        if params.logit_bias:
            tokens = [token for token in params.logit_bias if token < logits.shape[1]]
            logits[rows, tokens] += logits.new_tensor([params.logit_bias[token] for token in tokens])
        if params.has_penalties:
            penalised.append(_penalties(part, first, logits))
        first = rows.stop
    if penalised:
        _penalise(logits, penalised)


def check_constraints(params: SamplingParams, vocab_size: int, eos_token_ids: frozenset[int]) -> None:
    """Raises a `RequestError` if a token is not in the vocabulary, or if there may come a place where no token is allowed."""
    for name, tokens in [
        ("logit_bias", params.logit_bias),
        ("allowed_token_ids", params.allowed_token_ids or ()),
        ("bad_words_ids", [token for word in params.bad_words_ids for token in word]),
        ("stop_token_ids", params.stop_token_ids),
    ]:
        if unknown := [token for token in tokens if not 0 <= token < vocab_size]:
            raise RequestError(f"{name}: expected token ids in [0, {vocab_size}), got {unknown[0]}", param=name)
    allowed = params.allowed_token_ids if params.allowed_token_ids is not None else range(vocab_size)
    banned = {word[-1] for word in params.bad_words_ids}
    if params.min_tokens:
        banned |= params.end_token_ids(eos_token_ids)
    if all(token in banned for token in allowed):
        name = "bad_words_ids" if params.bad_words_ids else "min_tokens"
        raise RequestError(f"{name}: together with allowed_token_ids, no token may be left to generate", param=name)


def bind_grammar(sequence: Sequence, model: HasTokensAndEnds) -> None:
    """Gives a sequence that has a grammar, and nobody yet who follows it, a matcher for the model's tokens.

    Raises:
        RequestError: the grammar cannot be used.
    """
    grammar = sequence.params.grammar
    if grammar is None or sequence.matcher is not None:
        return
    try:
        grammars = Grammars.of(model.name, model.vocab_size, model.eos_token_ids)
    except ModelError as error:
        raise RequestError(f"{grammar.field}: {error}", grammar.field) from error
    sequence.matcher = grammars.matcher(grammar)


def _grammatical(part: Scored, eos_token_ids: frozenset[int]) -> Iterator[tuple[int, np.ndarray]]:
    """The tokens that the grammar allows, [vocab], in each row but those that no answer comes to."""
    if part.sequence.matcher is None:
        return
    is_text = part.sequence.matcher.is_text
    ends = [token for token in part.sequence.params.end_token_ids(eos_token_ids) if not is_text[token]]
    for row in range(part.num_scored):
        allowed = part.sequence.allowed_after(part.drafted[: len(part.drafted) + 1 - part.num_scored + row])
        if allowed is not None and not allowed.is_over:
            mask = allowed.tokens.copy()
            mask[ends] = allowed.may_end
            yield row, mask


def _allow(logits: torch.Tensor, allowed: Iterable[int]) -> None:
    tokens = [token for token in allowed if token < logits.shape[1]]
    kept = logits[:, tokens]
    logits.fill_(-torch.inf)
    logits[:, tokens] = kept


def _bans(part: Scored, eos_token_ids: frozenset[int]) -> Iterator[tuple[int, int]]:
    """The tokens that must not come next, and in which row."""
    params = part.sequence.params
    if params.min_tokens:
        ends = params.end_token_ids(eos_token_ids)
        for row, position in enumerate(part.positions):
            if position - part.sequence.num_prompt_tokens < params.min_tokens:
                yield from ((row, token) for token in ends)
    if params.bad_words_ids:
        tokens = part.tokens
        for row, position in enumerate(part.positions):
            yield from ((row, token) for token in _ends_of_bad_words(params.bad_words_ids, tokens[:position]))


def _ends_of_bad_words(words: Iterable[tuple[int, ...]], tokens: list[int]) -> Iterator[int]:
    for word in words:
        begun = list(word[:-1])
        if not begun or tokens[-len(begun) :] == begun:
            yield word[-1]


@dataclass(frozen=True)
class _Penalties:
    """Entries of the logits whose tokens are there already; every column has one element for each entry.

    Attributes:
        rows, tokens: which entry.
        factor: by which positive logits are divided and others multiplied.
        penalty: what is taken off then.
    """

    rows: np.ndarray
    tokens: np.ndarray
    factor: np.ndarray
    penalty: np.ndarray


def _penalties(part: Scored, first: int, logits: torch.Tensor) -> _Penalties:
    """The penalties of the tokens before each scored position, drafted ones included; the first of the rows is `first`."""
    ids, factor, penalty = _of_each_token(part)
    if ids.max() >= logits.shape[1]:
        is_known = ids < logits.shape[1]
        ids, factor, penalty = ids[is_known], factor[:, is_known], penalty[:, is_known]
    dtype = np.float64 if logits.dtype == torch.float64 else np.float32
    rows = np.repeat(np.arange(first, first + part.num_scored), len(ids))
    return _Penalties(rows, np.tile(ids, part.num_scored), factor.ravel().astype(dtype), penalty.ravel().astype(dtype))


def _of_each_token(part: Scored) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The different tokens, [m], and before each scored position their factors and penalties, [num_scored, m]."""
    params, counts, drafted = part.sequence.params, part.sequence.counts, part.drafted
    new = [token for token in dict.fromkeys(drafted) if counts.place(token) is None]
    ids = np.concatenate([counts.ids, np.array(new, dtype=np.int64)])
    factor, penalty = np.full((part.num_scored, len(ids)), params.repetition_penalty), np.zeros((part.num_scored, len(ids)))
    factor[:, len(counts.ids) :] = 1.0
    penalty[:, : len(counts.ids)] = counts.penalty(params)
    is_generated: set[int] = set()
    for offset, token in enumerate(drafted):
        known = counts.place(token)
        place = len(counts.ids) + new.index(token) if known is None else known
        after = max(0, offset + part.num_scored - len(drafted))  # the first row that stands after the drafted token
        factor[after:, place] = params.repetition_penalty
        penalty[after:, place] += params.frequency_penalty
        if place not in is_generated and (known is None or counts.num_generated[known] == 0):
            penalty[after:, place] += params.presence_penalty
        is_generated.add(place)
    return ids, factor, penalty


def _penalise(logits: torch.Tensor, parts: list[_Penalties]) -> None:
    """Penalises all entries together, in place."""
    rows, tokens, factor, penalty = (
        torch.from_numpy(np.concatenate([getattr(part, name) for part in parts])).to(logits.device)
        for name in ("rows", "tokens", "factor", "penalty")
    )
    values = logits[rows, tokens]
    logits[rows, tokens] = torch.where(values > 0, values / factor, values * factor) - penalty

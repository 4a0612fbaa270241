"""Logits in, distributions over the next token out: the target's p, and the draft's q.

A distribution is said with as few numbers as will do. Once top-k, top-p, min-p, a temperature of 0 or shared noise has cut it,
a short list of tokens is all there is; the vocabulary is gone over once for the largest logits, and where top-p or no cut at
all needs it, once more for their sum.
"""

from collections.abc import Sequence as Several
from dataclasses import dataclass, replace

import numpy as np
import torch

from specdecode.decoding.constraints import Scored, constrain
from specdecode.decoding.sampling import largest, shared_choice
from specdecode.decoding.sequence import SamplingParams, Sequence

# How many of the most likely tokens are looked at first. Mostly they hold all that the cuts keep.
_NUM_LISTED = 256
# So many rows of a large vocabulary stay in a processor's cache from one operation to the next.
_ROWS_AT_A_TIME = 16


@dataclass(frozen=True)
class Distributions:
    """n distributions over a vocabulary.

    A token with logit z has log-probability (z - largest) / temperature - log_sum if that is not below the floor, and -inf
    otherwise; but in a row that is one-hot only the choice has a probability, 1.

    Attributes:
        logits: [n, vocab], constrained.
        largest, temperature, log_sum, floor: [n, 1].
        choice: [n], the only token of a row that is one-hot, -1 in others.
        tokens, p: [n, m], the most likely tokens and their probabilities, some 0.
        is_listed: [n], whether there are no others.
    """

    logits: torch.Tensor
    largest: torch.Tensor
    temperature: torch.Tensor
    log_sum: torch.Tensor
    floor: torch.Tensor
    choice: torch.Tensor
    tokens: torch.Tensor
    p: torch.Tensor
    is_listed: torch.Tensor

    @staticmethod
    def of(logits: torch.Tensor, scored: list[Scored], eos_token_ids: frozenset[int]) -> "Distributions":
        """Applies the sampling parameters to logits, which may be changed in place.

        Args:
            logits: [sum(num_scored), vocab].
            scored: whose rows they are.
            eos_token_ids: the model's own end tokens.
        """
        logits = _constrained(logits, scored, eos_token_ids)
        rows = [(part.sequence, position) for part in scored for position in part.positions]
        maxima, best = (column.squeeze(1) for column in largest(logits, 1))
        if all(sequence.params.temperature == 0 for sequence, _ in rows):
            return _greedy(logits, maxima, best)
        cuts = Cuts.of([sequence.params for sequence, _ in rows], logits)
        values, tokens = largest(logits, min(_NUM_LISTED, logits.shape[1]))
        p, log_sum, floor, is_listed = _cut(logits, values, maxima, best, cuts)
        choice = torch.where(cuts.is_greedy, best, -1)
        limits = (maxima[:, None], cuts.temperature[:, None], log_sum, floor)
        return Distributions(logits, *limits, choice, tokens, p, is_listed)._with_choices(rows)

    def at(self, rows: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """The probabilities of some tokens, of the same shape as `tokens`; `rows`, broadcast to it, says in which row."""
        choice = self.choice[rows]
        limits = [column[rows, 0] for column in (self.largest, self.temperature, self.log_sum, self.floor)]
        p = _log_p(self.logits[rows, tokens], *limits).exp_()
        return torch.where(choice < 0, p, (tokens == choice).to(p.dtype))

    def candidates(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """All tokens that have a probability in some rows, [len(rows), m], and their probabilities."""
        if bool(self.is_listed[rows].all()):
            return self.tokens[rows], self.p[rows]
        tokens = torch.arange(self.logits.shape[1], device=self.logits.device).expand(len(rows), -1)
        return tokens, self.dense(rows)

    def dense(self, rows: torch.Tensor) -> torch.Tensor:
        """The probability of every token in some rows, [len(rows), vocab]."""
        limits = [column[rows] for column in (self.largest, self.temperature, self.log_sum, self.floor)]
        p = _log_p(self.logits.index_select(0, rows), *limits).exp_()
        if len(one_hot := (self.choice[rows] >= 0).nonzero().squeeze(-1)):
            p[one_hot] = 0.0
            p[one_hot, self.choice[rows[one_hot]]] = _certainty(self.largest[rows[one_hot], 0])
        return p

    def _with_choices(self, rows: list[tuple[Sequence, int]]) -> "Distributions":
        """Draws the tokens of coupled rows, and lists those of one-hot rows; `rows` are sequences and positions."""
        coupled = torch.tensor([n for n, (sequence, _) in enumerate(rows) if sequence.params.is_coupled], dtype=torch.long)
        is_listed = self.is_listed[coupled].cpu()
        for numbers in (coupled[is_listed], coupled[~is_listed]):
            for part in numbers.split(_ROWS_AT_A_TIME) if len(numbers) else ():
                tokens, p = self.candidates(part.to(self.logits.device))
                sequences, positions = zip(*(rows[number] for number in part.tolist()), strict=True)
                self.choice[part] = shared_choice(p.log(), tokens, [s.seed for s in sequences], positions)
        if len(one_hot := (self.choice >= 0).nonzero().squeeze(-1)):
            self.tokens[one_hot, 0] = self.choice[one_hot]
            self.p[one_hot] = 0.0
            self.p[one_hot, 0] = _certainty(self.largest[one_hot, 0])
            self.is_listed[one_hot] = True
        return self


def draft_distributions(
    logits: torch.Tensor, scored: list[Scored], eos_token_ids: frozenset[int], size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Makes sparse distributions to draft from: a draft may draw from any, as long as it says which.

    The sampling parameters are applied to the `size` most likely tokens as if there were no others. A coupled row, whose token
    the shared noise picks, is one-hot, and a greedy one as well.

    Args:
        logits: [n, vocab], which may be changed in place.
        scored: whose rows they are.
        eos_token_ids: the end tokens.
        size: how many tokens may have a probability.

    Returns:
        tokens and their probabilities, both [n, min(size, vocab)]; not a number where the request allows none of the tokens.
    """
    logits = _constrained(logits, scored, eos_token_ids)
    values, tokens = largest(logits, min(size, logits.shape[1]))
    if size == 1:
        return tokens, _certainty(values)
    rows = [(part.sequence, position) for part in scored for position in part.positions]
    cuts = Cuts.of([sequence.params for sequence, _ in rows], logits)
    weights, _, _ = cuts.apply(_scaled(values, values[:, :1], cuts.temperature[:, None]), is_whole=True)
    q = (weights / weights.sum(-1, keepdim=True)).to(values.dtype)
    if coupled := [number for number, (sequence, _) in enumerate(rows) if sequence.params.is_coupled]:
        numbers = torch.tensor(coupled, device=logits.device)
        sequences, positions = zip(*(rows[number] for number in coupled), strict=True)
        tokens[numbers, 0] = shared_choice(q[numbers].log(), tokens[numbers], [s.seed for s in sequences], positions)
    if one_hot := [number for number, (sequence, _) in enumerate(rows) if not sequence.params.is_sampled]:
        q[one_hot] = 0.0
        q[one_hot, 0] = _certainty(values[one_hot, 0])
    return tokens, q


@dataclass(frozen=True)
class Cuts:
    """What n rows keep of their tokens; every column is [n].

    Attributes:
        temperature: 1 where it is 0.
        is_greedy: where it is 0.
        log_min_p: how far below the most likely token a log-probability may be; -inf where it does not matter.
        top_k: how many tokens are kept; 0 for all.
        top_p: how much of the probability; inf for all.
    """

    temperature: torch.Tensor
    is_greedy: torch.Tensor
    log_min_p: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    has_top_k: bool
    has_top_p: bool

    @staticmethod
    def of(params: Several[SamplingParams], like: torch.Tensor) -> "Cuts":
        """Collects the parameters in the dtype and on the device of `like`."""
        temperature = like.new_tensor([row.temperature for row in params])
        top_p = [row.top_p if row.top_p < 1 else torch.inf for row in params]
        return Cuts(
            temperature=temperature.masked_fill(temperature == 0, 1.0).clamp(min=torch.finfo(like.dtype).tiny),
            is_greedy=temperature == 0,
            log_min_p=like.new_tensor([row.min_p for row in params]).log(),
            top_k=torch.tensor([row.top_k for row in params], device=like.device),
            top_p=torch.tensor(top_p, dtype=torch.float64, device=like.device),
            has_top_k=any(row.top_k for row in params),
            has_top_p=any(row.top_p < 1 for row in params),
        )

    def __getitem__(self, rows: torch.Tensor) -> "Cuts":
        names = ("temperature", "is_greedy", "log_min_p", "top_k", "top_p")
        return replace(self, **{name: getattr(self, name)[rows] for name in names})

    @property
    def is_plain(self) -> torch.Tensor:
        """Whether only top-p may cut, to which the sum over the whole vocabulary matters then."""
        return self.log_min_p.isneginf() & (self.top_k == 0)

    @property
    def is_uncut(self) -> torch.Tensor:
        """Whether everything is kept."""
        return self.is_plain & self.top_p.isinf()

    def apply(
        self, scaled: torch.Tensor, *, is_whole: bool, log_total: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Cuts lists of the most likely tokens.

        Args:
            scaled: [n, m], in descending order, log-probabilities but for a constant, the first 0.
            is_whole: whether the lists hold the whole vocabulary, and not only the beginning.
            log_total: [n], the logarithm of the sum of the exponentials over the vocabulary, for plain rows of which the lists
                are the beginning.

        Returns:
            the exponentials of what is kept and 0 elsewhere, float64 [n, m]; the floor, [n, 1]; and whether the list sufficed
            to tell, [n].
        """
        size = scaled.shape[1]
        floor = self.log_min_p[:, None]
        if self.has_top_k:
            has_top_k = (self.top_k > 0) & (self.top_k <= size)
            least = scaled.gather(1, (self.top_k.clamp(1, size) - 1)[:, None])
            floor = torch.where(has_top_k[:, None], torch.maximum(floor, least), floor)
        is_kept = scaled >= floor
        weights = scaled.double().exp() * is_kept
        is_enough = is_whole | ~is_kept[:, -1]
        if self.has_top_p:
            total = weights.sum(-1) if log_total is None else torch.where(is_enough, weights.sum(-1), log_total.double().exp())
            is_kept &= weights.cumsum(-1) - weights < (self.top_p * total)[:, None]
            is_kept[:, 0] = True
            floor = scaled.masked_fill(~is_kept, 0.0).amin(-1, keepdim=True)
            is_kept = scaled >= floor  # also what equals the last one
            weights = weights * is_kept
            is_enough = (is_enough | self.is_plain) & (is_whole | ~is_kept[:, -1])
        return weights, floor, is_enough


def _constrained(logits: torch.Tensor, scored: list[Scored], eos_token_ids: frozenset[int]) -> torch.Tensor:
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    constrain(logits, scored, eos_token_ids)
    return logits


def _greedy(logits: torch.Tensor, maxima: torch.Tensor, best: torch.Tensor) -> Distributions:
    """The distributions of rows that all are greedy."""
    zero, is_listed = torch.zeros_like(maxima)[:, None], torch.ones_like(best, dtype=torch.bool)
    certainty = _certainty(maxima)[:, None]
    return Distributions(logits, maxima[:, None], zero + 1, zero, zero, best, best[:, None], certainty, is_listed)


def _cut(
    logits: torch.Tensor, values: torch.Tensor, maxima: torch.Tensor, best: torch.Tensor, cuts: Cuts
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cuts rows of which the largest logits are given, [n, m]; looks at more of them where these do not suffice.

    Returns:
        the probabilities of the m tokens, [n, m]; log_sum and floor, [n, 1]; and whether the m are all that is kept, [n].
    """
    vocab_size = logits.shape[1]
    is_whole = values.shape[1] == vocab_size
    log_total = None if is_whole else _log_totals(logits, maxima, best, cuts)
    scaled = _scaled(values, maxima[:, None], cuts.temperature[:, None])
    weights, floor, is_listed = cuts.apply(scaled, is_whole=is_whole, log_total=log_total)
    sums = weights.sum(-1, keepdim=True)
    p = (weights / sums).to(values.dtype)
    log_sum = sums.log().to(values.dtype)
    if log_total is None:
        return p, log_sum, floor, is_listed
    is_uncut = cuts.is_uncut
    log_sum = torch.where(is_uncut[:, None], log_total[:, None], log_sum)
    floor = floor.masked_fill(is_uncut[:, None], -torch.inf)
    is_listed &= ~is_uncut
    open_, size = (~(is_listed | is_uncut | cuts.is_greedy)).nonzero().squeeze(-1), values.shape[1]
    ordered = _scaled(_descending(logits[open_]), maxima[open_, None], cuts.temperature[open_, None])
    while len(open_):
        size = min(16 * size, vocab_size)
        weights, floors, is_enough = cuts[open_].apply(
            ordered[:, :size], is_whole=size == vocab_size, log_total=log_total[open_]
        )
        log_sum[open_], floor[open_] = weights.sum(-1, keepdim=True).log().to(values.dtype), floors
        ordered, open_ = ordered[~is_enough], open_[~is_enough]
    return p, log_sum, floor, is_listed


def _descending(values: torch.Tensor) -> torch.Tensor:
    """Sorts each row; on a CPU with numpy, which is many times quicker where places are not wanted."""
    if values.device.type == "cpu":
        return torch.from_numpy(np.sort(values.numpy(), axis=-1)[:, ::-1].copy())
    return values.sort(-1, descending=True).values


def _log_totals(logits: torch.Tensor, maxima: torch.Tensor, best: torch.Tensor, cuts: Cuts) -> torch.Tensor:
    """The logarithm of the vocabulary's sum of exp((logit - largest) / temperature), [n]; 0 where nothing depends on it."""
    log_total = torch.zeros_like(maxima)
    for rows in (cuts.is_plain & ~cuts.is_greedy).nonzero().squeeze(-1).split(_ROWS_AT_A_TIME):
        part = logits if len(rows) == len(logits) else logits[rows]
        scaled = _scaled(part, maxima[rows, None], cuts.temperature[rows, None])
        log_total[rows] = -scaled.log_softmax(-1).gather(1, best[rows, None]).squeeze(1)
    return log_total


def _certainty(maxima: torch.Tensor) -> torch.Tensor:
    """A probability of 1; not a number where the logits are not finite, so that no token is drawn from them."""
    return maxima * 0 + 1


def _scaled(values: torch.Tensor, maxima: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    # The largest logit becomes 0, which no temperature, however small, turns into infinity.
    return (values - maxima.clamp(min=torch.finfo(maxima.dtype).min)).div_(temperature)


def _log_p(
    values: torch.Tensor, maxima: torch.Tensor, temperature: torch.Tensor, log_sum: torch.Tensor, floor: torch.Tensor
) -> torch.Tensor:
    scaled = _scaled(values, maxima, temperature)
    return torch.where(scaled >= floor, scaled - log_sum, -torch.inf)

"""A draft's logits and what its teacher says in, one number to minimise out. p is the target (the teacher), q the draft.

Nothing here knows of models, batches or text: the n positions are those that count, whichever texts they come from. All
tables of a number per token of the vocabulary are made for a few positions at a time, and made anew for the gradient.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F  # noqa: N812  the name that every torch user knows
from pydantic import Field, model_validator
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from specdecode.config import StrictModel
from specdecode.decoding.sampling import largest

DivergenceName = Literal["forward_kl", "reverse_kl", "jensen_shannon", "total_variation"]

# The lowest log-probability of a teacher's token: a logit of -inf would make reverse KL infinite, and 0 * -inf no number.
_LOWEST = -1e5


class LossConfig(StrictModel):
    """What a draft learns from: the teacher's distribution, the teacher's first choice, the text, or a sum of them."""

    divergence: DivergenceName = Field(default="forward_kl", description="how the distance from the teacher is measured")
    beta: float = Field(default=0.5, gt=0, lt=1, description="p's share in the mixture of the Jensen-Shannon divergence")
    temperature: float = Field(
        default=1.0, gt=0, description="divides both models' logits in the divergence, which is multiplied by its square"
    )
    divergence_weight: float = Field(default=1.0, ge=0, description="of the divergence from the teacher")
    cross_entropy_weight: float = Field(default=0.0, ge=0, description="of the cross-entropy at the text's own next token")
    greedy_weight: float = Field(default=0.0, ge=0, description="of the cross-entropy at the teacher's most likely token")
    top_k: int | None = Field(
        default=None, gt=0, description="how many of the teacher's most likely tokens are told apart; all if null"
    )
    chunk_size: int = Field(
        default=1024, gt=0, description="positions whose float32 tables [positions, vocabulary] exist at a time"
    )

    @model_validator(mode="after")
    def _has_a_part(self) -> "LossConfig":
        if not (self.needs_teacher or self.cross_entropy_weight > 0):
            raise ValueError("divergence_weight, cross_entropy_weight, greedy_weight: expected at least one above 0")
        return self

    @property
    def needs_teacher(self) -> bool:
        """Whether any part of the loss is what a teacher says."""
        return self.divergence_weight > 0 or self.greedy_weight > 0


@dataclass(frozen=True)
class Teacher:
    """What the teacher says at n positions: dense, logits of the whole vocabulary, or sparse, its k most likely tokens.

    Of the two forms the tensors of the other one are empty, [n, 0]. In the sparse form all other tokens count as one, "the
    rest", on both sides: p_rest = 1 - sum p and q_rest = 1 - sum q. Merging tokens is a function of the token, so by the
    data-processing inequality every divergence here is then a lower bound of that over the whole vocabulary (and the
    acceptance an upper bound), and equal to it where k is the whole vocabulary.

    Attributes:
        logits: [n, vocab], finite or -inf.
        ids: [n, k], most likely first.
        log_probs: [n, k], normalised over the whole vocabulary.
        temperature: of a sparse teacher's log_probs.
        vocab_size: how many tokens the probabilities are spread over; None for as many as the draft has.
    """

    logits: Tensor
    ids: Tensor
    log_probs: Tensor
    temperature: float = 1.0
    vocab_size: int | None = None

    @staticmethod
    def dense(logits: Tensor) -> "Teacher":
        """A teacher that has just been asked; logits [n, vocab] in any float dtype. No gradient flows back to them."""
        none = logits.new_empty(len(logits), 0)
        return Teacher(logits.detach(), none.long(), none, vocab_size=logits.shape[1])

    @staticmethod
    def sparse(ids: Tensor, log_probs: Tensor, temperature: float = 1.0, vocab_size: int | None = None) -> "Teacher":
        """A teacher whose words were kept; see the attributes for the arguments, which may be of any int and float dtype."""
        return Teacher(log_probs.new_empty(len(ids), 0), ids, log_probs.detach(), temperature, vocab_size)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def is_sparse(self) -> bool:
        """Whether only the most likely tokens are known."""
        return self.ids.shape[1] > 0

    @property
    def first_choice(self) -> Tensor:
        """The most likely token at each position, [n]; the first of equals, as in greedy decoding."""
        return self.ids[:, 0].long() if self.is_sparse else self.logits.argmax(dim=-1)

    def split(self, size: int) -> Iterator["Teacher"]:
        """The teacher at the first `size` positions, at the next ones, and so on."""
        for parts in zip(self.logits.split(size), self.ids.split(size), self.log_probs.split(size), strict=True):
            yield Teacher(*parts, self.temperature, self.vocab_size)

    def cut(self, vocab_size: int) -> "Teacher":
        """The teacher over the first `vocab_size` tokens alone: what else a dense one has is padding.

        Raises:
            ValueError: a sparse teacher's probabilities are already spread over more tokens.
        """
        if self.is_sparse and (self.vocab_size or 0) > vocab_size:
            raise ValueError(f"vocab_size: expected a sparse teacher over {vocab_size} tokens at most, got {self.vocab_size}")
        return Teacher(self.logits[:, :vocab_size], self.ids, self.log_probs, self.temperature, vocab_size)

    def restricted(self, k: int, temperature: float = 1.0, chunk_size: int = 1024) -> "Teacher":
        """The sparse teacher of the `k` most likely tokens, or of as many as there are.

        To keep a teacher whose draft has a shorter vocabulary, `cut` it first.

        Raises:
            ValueError: this teacher is sparse already, and of fewer tokens or of another temperature.
        """
        if not self.is_sparse:
            parts = [_most_likely(logits, k, temperature) for logits in self.logits.split(chunk_size)]
            ids, log_probs = (torch.cat(column) for column in zip(*parts, strict=True))
            return Teacher.sparse(ids, log_probs, temperature, self.vocab_size)
        if min(k, self.vocab_size or k) > self.ids.shape[1]:
            raise ValueError(f"top_k: expected at most the {self.ids.shape[1]} tokens that were kept, got {k}")
        self._check(temperature)
        return Teacher.sparse(self.ids[:, :k], self.log_probs[:, :k], temperature, self.vocab_size)

    def beside(self, log_q: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """log p and log q over the same tokens, both [n, vocab], or [n, k + 1] with the rest last, in log_q's dtype or more.

        Args:
            log_q: [n, vocab], the draft's log-probabilities at `temperature`.
            temperature: to ask a dense teacher at.

        Raises:
            ValueError: a sparse teacher's probabilities are of another temperature.
        """
        if not self.is_sparse:
            return log_softmax(self.logits, temperature).clamp_(min=_LOWEST), log_q
        self._check(temperature)
        log_p, ids = self.log_probs.to(log_q.dtype).clamp(min=_LOWEST), self.ids.long()
        if ids.shape[1] == log_q.shape[1]:
            return log_p, log_q.gather(-1, ids)
        q_rest = log_q.scatter(-1, ids, -torch.inf).logsumexp(dim=-1, keepdim=True)  # [n, 1]
        return torch.cat([log_p, _log_rest(log_p)], dim=-1), torch.cat([log_q.gather(-1, ids), q_rest], dim=-1)

    def _check(self, temperature: float) -> None:
        if self.temperature != temperature:
            raise ValueError(f"temperature: expected {self.temperature}, at which the teacher was kept, got {temperature}")


def forward_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) = sum_x p(x) (log p(x) - log q(x)): q pays where p is and q is not, so it learns to cover all of p.

    It is the cross-entropy of q under samples of p, less p's entropy, which q cannot change. The supervised loss of
    "DistillSpec" (Zhou et al. 2023, arXiv 2310.08461, equation 2).

    Shapes: two of finite log-probabilities, [n, v], to [n]; so for all four divergences.
    """
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)


def reverse_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(q || p) = sum_x q(x) (log q(x) - log p(x)): q pays where it is and p is not, so it learns to keep to p's peaks.

    It is `forward_kl` with the sides changed, and the loss of "MiniLLM" (Gu et al. 2023, arXiv 2306.08543) at one token.
    It grows with -log p(x), without bound, wherever q > 0.
    """
    return forward_kl(log_q, log_p)


def jensen_shannon(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q (GKD, Agarwal et al. 2023, arXiv 2306.13649).

    At beta = 1/2 it is the Jensen-Shannon divergence. It is at most the entropy of beta, as log(p/m) <= -log(beta) and
    log(q/m) <= -log(1 - beta). Near beta = 0, where m is q, it is beta KL(p || q); near 1, where m is p, (1 - beta) KL(q || p).
    """
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    return beta * forward_kl(log_p, log_m) + (1 - beta) * forward_kl(log_q, log_m)


def total_variation(log_p: Tensor, log_q: Tensor) -> Tensor:
    """sum_x |p(x) - q(x)| / 2 = 1 - sum_x min(p(x), q(x)): how often rejection sampling rejects the draft's token.

    A token x comes from q and passes with min(1, p(x) / q(x)), so sum_x min(q(x), p(x)) pass (Leviathan et al. 2023, arXiv
    2211.17192, theorem 3.5 and corollary 3.6); min(p, q) = (p + q - |p - q|) / 2, and p and q sum to 1. TVD in "DistillSpec"
    (arXiv 2310.08461).
    """
    return 0.5 * (log_p.exp() - log_q.exp()).abs().sum(dim=-1)


def draft_losses(q_logits: Tensor, labels: Tensor, teacher: Teacher | None, config: LossConfig) -> Tensor:
    """The loss at each position, the weighted sum of its parts, [n]; to be added up, and divided by all positions of a step.

    The divergence is taken at the temperature T and multiplied by T^2: its gradient with respect to the logits shrinks with
    1 / T^2 (Hinton et al. 2015, arXiv 1503.02531, section 2). The cross-entropies are those of the draft at temperature 1.

    Args:
        q_logits: [n, vocab] in any float dtype, in which their gradient comes back too.
        labels: [n], the text's own next tokens.
        teacher: over a vocabulary that may be padded to another length; both are cut to the shorter.
        config: says which parts there are.

    Raises:
        ValueError: the loss needs a teacher and there is none, or a sparse teacher that was kept for another loss.
    """
    if teacher is None and config.needs_teacher:
        raise ValueError("teacher: expected one, as divergence_weight or greedy_weight is above 0, got None")
    teacher = _over_shared(_silent(len(labels)) if teacher is None else teacher, q_logits)
    if config.top_k is not None and config.needs_teacher:
        teacher = teacher.restricted(config.top_k, config.temperature, config.chunk_size)
    assert len(q_logits) == len(labels) == len(teacher)
    size = config.chunk_size
    return torch.cat(
        [
            checkpoint(_losses, *chunk, config, use_reentrant=False, preserve_rng_state=False)
            for chunk in zip(q_logits.split(size), labels.split(size), teacher.split(size), strict=True)
        ]
    )


@torch.no_grad()
def acceptance(teacher: Teacher | Tensor, q_logits: Tensor, temperature: float = 1.0, chunk_size: int = 1024) -> Tensor:
    """How probably rejection sampling accepts a token that the draft draws: sum_x min(p(x), q(x)), [n].

    It is 1 - `total_variation`, and an upper bound if the teacher is sparse.

    Args:
        teacher: or its logits, [n, vocab].
        q_logits: [n, vocab]; vocabularies of different padding are cut to the shorter.
        temperature: at which both models are sampled.
        chunk_size: as in `LossConfig`.
    """
    teacher = _over_shared(teacher, q_logits)
    parts = []
    for chunk, part in zip(q_logits.split(chunk_size), teacher.split(chunk_size), strict=True):
        log_p, log_q = part.beside(log_softmax(chunk[:, : part.vocab_size], temperature), temperature)
        parts.append(torch.minimum(log_p, log_q).exp_().sum(dim=-1))
    return torch.cat(parts)


@torch.no_grad()
def agreement(teacher: Teacher | Tensor, q_logits: Tensor) -> Tensor:
    """Whether both models put the same token first, bool [n]: what greedy decoding accepts. Shapes as in `acceptance`."""
    teacher = _over_shared(teacher, q_logits)
    return teacher.first_choice == q_logits[:, : teacher.vocab_size].argmax(dim=-1)


def log_softmax(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probabilities over the last dimension, in float32 or, if the logits have more digits, in their own dtype."""
    return F.log_softmax(logits.to(_precise(logits)) / temperature, dim=-1)


def _precise(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def _silent(num_positions: int) -> Teacher:
    """A teacher for losses that ask none."""
    return Teacher.sparse(torch.empty(num_positions, 0, dtype=torch.long), torch.empty(num_positions, 0))


def _over_shared(teacher: Teacher | Tensor, q_logits: Tensor) -> Teacher:
    """The teacher, or one with these logits, over the tokens that the draft knows too; `vocab_size` then says how many."""
    teacher = teacher if isinstance(teacher, Teacher) else Teacher.dense(teacher)
    return teacher.cut(min(teacher.vocab_size or q_logits.shape[1], q_logits.shape[1]))


def _most_likely(logits: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor]:
    """The ids and log-probabilities of the `k` most likely tokens, [n, k] each; the first is that which argmax finds.

    Where several are equally likely, as 8 bits of bfloat16 often make them, topk may put any of them first.
    """
    first = logits.argmax(dim=-1, keepdim=True)
    _, ids = largest(logits.scatter(-1, first, torch.inf), min(k, logits.shape[1]))
    return ids, log_softmax(logits, temperature).gather(-1, ids)


def _log_rest(log_probs: Tensor) -> Tensor:
    """log(1 - sum exp(log_probs)), [n, k] to [n, 1].

    It is off by a rounding error of the sum, and at least one: of a rest below 1e-6, in float32, only the size is known.
    """
    total = log_probs.exp().sum(dim=-1, keepdim=True)
    return torch.log1p(-total.clamp(max=1 - torch.finfo(total.dtype).eps))


def _losses(q_logits: Tensor, labels: Tensor, teacher: Teacher, config: LossConfig) -> Tensor:
    """The loss at each of a few positions; see `draft_losses`."""
    log_q = log_softmax(q_logits[:, : teacher.vocab_size])
    loss = log_q.new_zeros(len(log_q))
    if config.divergence_weight > 0:
        pair = teacher.beside(_tempered(log_q, config.temperature), config.temperature)
        loss = loss + config.divergence_weight * config.temperature**2 * _divergence(*pair, config)
    if config.greedy_weight > 0:
        loss = loss + config.greedy_weight * F.nll_loss(log_q, teacher.first_choice, reduction="none")
    if config.cross_entropy_weight > 0:
        loss = loss + config.cross_entropy_weight * F.nll_loss(log_q, labels, reduction="none")
    return loss


def _tempered(log_q: Tensor, temperature: float) -> Tensor:
    """The log-probabilities at another temperature: they are logits like any others."""
    return log_q if temperature == 1 else log_softmax(log_q, temperature)


def _divergence(log_p: Tensor, log_q: Tensor, config: LossConfig) -> Tensor:
    if config.divergence == "jensen_shannon":
        return jensen_shannon(log_p, log_q, config.beta)
    divergences = {"forward_kl": forward_kl, "reverse_kl": reverse_kl, "total_variation": total_variation}
    return divergences[config.divergence](log_p, log_q)

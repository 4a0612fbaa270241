"""Logits in, one number to minimise out. p is the target (the teacher), q the draft (the student).

Every loss takes `is_scored`, bool [batch, length]: which ids count as predictions. The logits at position i - 1 predict
the id at position i.
"""

import torch
import torch.nn.functional as F  # noqa: N812  the name that every torch user knows
from torch import Tensor


def next_token_loss(logits: Tensor, ids: Tensor, is_scored: Tensor) -> Tensor:
    """Mean cross-entropy, in nats, of the scored ids.

    Shapes: logits [batch, length, vocab]; ids and is_scored [batch, length].
    """
    predicting = predicting_positions(logits, is_scored)  # [scored, vocab]
    return F.cross_entropy(predicting.float(), ids[:, 1:][is_scored[:, 1:]])


def distillation_loss(p_logits: Tensor, q_logits: Tensor, greedy_weight: float = 0.0) -> Tensor:
    """Mean over positions of KL(p || q), plus `greedy_weight` times the cross-entropy of q at p's most likely token.

    KL(p || q) = sum_x p(x) (log p(x) - log q(x)) is the supervised loss of "DistillSpec" (Zhou et al. 2023, arXiv
    2310.08461, equation 2). The second term is what greedy decoding accepts: only p's first choice counts there.

    Shapes: p_logits and q_logits [scored, vocab]; vocabularies of different padding are cut to the shorter.
    """
    vocab_size = min(p_logits.shape[-1], q_logits.shape[-1])
    log_p = F.log_softmax(p_logits[..., :vocab_size].float(), dim=-1)
    log_q = F.log_softmax(q_logits[..., :vocab_size].float(), dim=-1)
    kl = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    if greedy_weight == 0:
        return kl
    return kl + greedy_weight * F.nll_loss(log_q, p_logits[..., :vocab_size].argmax(dim=-1))


def predicting_positions(logits: Tensor, is_scored: Tensor) -> Tensor:
    """The logits that predict the scored ids: [batch, length, vocab] -> [scored, vocab]."""
    return logits[:, :-1][is_scored[:, 1:]]


def agreement(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """The share of positions where both models put the same token first: what greedy decoding accepts.

    Shapes: [scored, vocab] each.
    """
    vocab_size = min(p_logits.shape[-1], q_logits.shape[-1])
    same = p_logits[..., :vocab_size].argmax(dim=-1) == q_logits[..., :vocab_size].argmax(dim=-1)
    return same.to(torch.float32).mean()

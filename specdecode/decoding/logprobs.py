"""Logits in, log-probabilities of tokens out: what the model itself thinks, before any sampling parameter."""

import torch

from specdecode.decoding.sequence import TokenLogprob


def token_logprobs(logits: torch.Tensor, tokens: list[int], num_top: int) -> list[TokenLogprob]:
    """Reports the log-probability of each token, and those of the most likely ones at its place.

    Args:
        logits: [len(tokens), vocab].
        tokens: the token after each position.
        num_top: how many of the most likely ones to report.
    """
    log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    chosen = log_p.gather(-1, torch.tensor(tokens, device=log_p.device)[:, None])  # [n, 1]
    ranks = (log_p >= chosen).sum(-1)
    values, ids = log_p.topk(min(num_top, log_p.shape[-1]), dim=-1)
    return [
        TokenLogprob(token, value, rank, tuple(zip(top, top_values, strict=True)))
        for token, value, rank, top, top_values in zip(
            tokens, chosen.squeeze(-1).tolist(), ranks.tolist(), ids.tolist(), values.tolist(), strict=True
        )
    ]

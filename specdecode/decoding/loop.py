"""Prompt ids in, accepted ids out. Read this file first.

A round drafts a few tokens, scores them all in one forward pass of the target, accepts as many as leave the target's
distribution unchanged, and adds one token of the target's own. Plain decoding is the same round with an empty draft.
"""

import time
from collections.abc import Collection, Iterator

import torch

from specdecode.backends.backend import ModelBackend, Row
from specdecode.decoding.drafters import Drafter, ModelDrafter, NoDrafter
from specdecode.decoding.metrics import DecodingMetrics
from specdecode.decoding.sampling import probabilities
from specdecode.decoding.sequence import Draft, FinishReason, Round, Route, SamplingParams, Sequence
from specdecode.decoding.verification import Block, Verifier, VerifierName, accept, create_verifier
from specdecode.errors import RequestError
from specdecode.text import check_same_vocabulary


@torch.inference_mode()
def step(sequences: list[Sequence], drafter: Drafter, target: ModelBackend, verifier: Verifier) -> list[Round]:
    """Advances every sequence by one round: draft, score, accept."""
    started = time.perf_counter()
    drafts = drafter.propose(sequences)
    drafted = time.perf_counter()
    logits = target.logits([_scored(*pair) for pair in zip(sequences, drafts, strict=True)])  # [sum(k + 1), vocab]
    params = [sequence.params for sequence, draft in zip(sequences, drafts, strict=True) for _ in range(_width(draft))]
    lengths, tokens = accept(verifier, Block.of(drafts, probabilities(logits, params)), sequences)
    verified = time.perf_counter()
    return [
        _extend(sequence, draft, length, token, target, drafted - started, verified - drafted)
        for sequence, draft, length, token in zip(sequences, drafts, lengths, tokens, strict=True)
    ]


def generate(
    sequences: list[Sequence],
    drafter: Drafter,
    target: ModelBackend,
    verifier: Verifier | None = None,
) -> Iterator[list[tuple[Sequence, Round]]]:
    """Decodes all sequences together, and yields after each round what it gave to those that were not finished."""
    for sequence in sequences:
        check_length(sequence, target)
    verifier = verifier or create_verifier("rejection")
    while unfinished := [sequence for sequence in sequences if sequence.finish_reason is None]:
        yield list(zip(unfinished, step(unfinished, drafter, target, verifier), strict=True))


def speculative_decode(
    target: ModelBackend,
    draft: ModelBackend | Drafter | None,
    input_ids: torch.Tensor,
    max_new_tokens: int = 128,
    K: int = 5,  # noqa: N803  the name that the literature uses
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    stop_token_ids: Collection[int] = (),
    ignore_eos: bool = False,
    seed: int | None = None,
    verifier: Verifier | VerifierName = "rejection",
) -> tuple[torch.Tensor, DecodingMetrics]:
    """Decodes one prompt. The output is distributed as if the target had decoded alone; greedy, it is equal.

    Args:
        target: the model whose output it is.
        draft: the model, or any `Drafter`, that guesses; None decodes plainly.
        input_ids: LongTensor [1, n].
        max_new_tokens: generate at the most so many tokens.
        K: how many tokens to draft in a round.
        temperature, top_p, top_k, stop_token_ids, ignore_eos, seed: see `SamplingParams`.
        verifier: "rejection", "block", or any other `Verifier`.

    Returns:
        LongTensor [1, n + generated], and what it took.

    Raises:
        RequestError: a parameter is out of its range, or prompt and `max_new_tokens` exceed the target's context.
        ModelError: the two models do not share a vocabulary.
    """
    if input_ids.dim() != 2 or input_ids.shape[0] != 1 or input_ids.dtype not in (torch.int64, torch.int32):
        raise RequestError(
            f"input_ids: expected a LongTensor of shape [1, n], got {input_ids.dtype} of shape {list(input_ids.shape)}",
            param="input_ids",
        )
    params = SamplingParams(
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        max_tokens=max_new_tokens,
        stop_token_ids=frozenset(stop_token_ids),
        ignore_eos=ignore_eos,
        seed=seed,
    )
    law = create_verifier(verifier) if isinstance(verifier, str) else verifier
    sequence = Sequence(input_ids[0].tolist(), params, Route("draft", K))
    metrics = DecodingMetrics()
    started = time.perf_counter()
    for rounds in generate([sequence], as_drafter(draft, target), target, law):
        metrics.add(rounds[0][1], time.perf_counter() - started)
    return torch.tensor([sequence.tokens], dtype=input_ids.dtype, device=input_ids.device), metrics


def as_drafter(draft: ModelBackend | Drafter | None, target: ModelBackend) -> Drafter:
    """Makes a drafter for `target` of a draft model; a drafter stays as it is, None is `NoDrafter`."""
    if draft is None:
        return NoDrafter()
    if not isinstance(draft, ModelBackend):
        return draft
    check_same_vocabulary(draft, target)
    return ModelDrafter(draft, vocab_size=min(draft.vocab_size, target.vocab_size))


def check_length(sequence: Sequence, target: ModelBackend) -> None:
    """Raises a `RequestError` unless the sequence fits the target's context and vocabulary."""
    length = len(sequence.tokens) + sequence.num_remaining
    if length > target.max_length:
        raise RequestError(
            f"max_tokens: the prompt has {len(sequence.tokens)} tokens and max_tokens is {sequence.num_remaining}, "
            f"together more than the context of {target.max_length}",
            param="max_tokens" if len(sequence.tokens) < target.max_length else "prompt",
        )
    if not 0 <= min(sequence.tokens) <= max(sequence.tokens) < target.vocab_size:
        raise RequestError(f"prompt: expected token ids in [0, {target.vocab_size})", param="prompt")


def _scored(sequence: Sequence, draft: Draft) -> Row:
    return Row(sequence.id, sequence.tokens + draft.tokens, _width(draft))


def _width(draft: Draft) -> int:
    return len(draft.tokens) + 1


def _extend(
    sequence: Sequence,
    draft: Draft,
    num_accepted: int,
    token: int,
    target: ModelBackend,
    draft_time_s: float,
    verify_time_s: float,
) -> Round:
    """Adds the round's tokens to the sequence, up to where it stops."""
    tokens, finish_reason = _until_stop([*draft.tokens[:num_accepted], token], sequence, target)
    sequence.tokens.extend(tokens)
    sequence.finish_reason = finish_reason
    return Round(
        tokens=tokens,
        num_drafted=len(draft.tokens),
        num_accepted=min(num_accepted, len(tokens)),
        finish_reason=finish_reason,
        draft_time_s=draft_time_s,
        verify_time_s=verify_time_s,
    )


def _until_stop(tokens: list[int], sequence: Sequence, target: ModelBackend) -> tuple[list[int], FinishReason | None]:
    params = sequence.params
    stops = params.stop_token_ids if params.ignore_eos else params.stop_token_ids | target.eos_token_ids
    tokens = tokens[: sequence.num_remaining]
    for count, token in enumerate(tokens, start=1):
        if token in stops:
            return tokens[:count], "stop"
    return tokens, "length" if len(tokens) == sequence.num_remaining else None

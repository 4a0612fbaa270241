"""Prompt ids in, accepted ids out. Read this file first.

A round drafts a few tokens, scores them all in one forward pass of the target, accepts as many as leave the target's
distribution unchanged, and adds one token of the target's own. Plain decoding is the same round with an empty draft. Where the
drafter has gone on meanwhile, and all of the draft is accepted, its next token stands for the target's, and is verified next.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from specdecode.backends.backend import ModelBackend, Row
from specdecode.decoding.constraints import Scored, bind_grammar, check_constraints
from specdecode.decoding.control import AdaptiveLength, FixedLength, LengthPolicy
from specdecode.decoding.distributions import Distributions
from specdecode.decoding.drafters import Drafter, ModelDrafter, NoDrafter
from specdecode.decoding.logprobs import token_logprobs
from specdecode.decoding.metrics import DecodingMetrics
from specdecode.decoding.sequence import Draft, FinishReason, Round, Route, SamplingParams, Sequence
from specdecode.decoding.verification import accept
from specdecode.errors import RequestError
from specdecode.text import StopCriterion, Tokenizer

_PROMPT_CHUNK = 256

Verdict = Callable[[list[Sequence], list[Draft], Distributions], tuple[list[int], list[list[int]]]]
"""Sequences, drafts and the target's distributions in; how many tokens are accepted, and what each round adds, out."""


@torch.inference_mode()
def step(sequences: list[Sequence], drafter: Drafter, target: ModelBackend, verdict: Verdict = accept) -> list[Round]:
    """Advances every sequence by one round: draft, score, accept. Only with `accept` is the output the target's."""
    started = time.perf_counter()
    drafts = drafter.propose(sequences)
    drafted = time.perf_counter()
    assert all(s.matcher is not None or s.params.grammar is None for s in sequences)
    scored = [Scored(s, draft.context, len(draft.context) + 1) for s, draft in zip(sequences, drafts, strict=True)]
    logits = target.logits([Row(part.sequence.id, part.tokens, part.num_scored) for part in scored])  # [sum(k + 1), vocab]
    raw = _raw(logits, scored)
    lengths, tokens = verdict(sequences, drafts, Distributions.of(logits, scored, target.eos_token_ids))
    verified = time.perf_counter()
    return [
        _extend(*part, target, drafted - started, verified - drafted)
        for part in zip(sequences, drafts, lengths, tokens, raw, strict=True)
    ]


def generate(
    sequences: list[Sequence], drafter: Drafter, target: ModelBackend, length: LengthPolicy | None = None
) -> Iterator[list[tuple[Sequence, Round]]]:
    """Decodes all sequences together, and yields after each round what it gave to those that were not finished.

    Args:
        sequences: what to decode.
        drafter: whoever guesses.
        target: the model whose output it is.
        length: how many tokens are drafted; always those of the route if None.

    Raises:
        RequestError: a sequence does not fit the target.
    """
    length = length or FixedLength()
    for sequence in sequences:
        check_sequence(sequence, target)
        if sequence.params.prompt_logprobs is not None:
            for start in range(0, len(sequence.tokens) - 1, _PROMPT_CHUNK):
                prefill(sequence, target, start, min(start + _PROMPT_CHUNK, len(sequence.tokens) - 1))
    while unfinished := [sequence for sequence in sequences if sequence.finish_reason is None]:
        length.plan(unfinished)
        rounds = step(unfinished, drafter, target)
        length.observe(unfinished, rounds)
        yield list(zip(unfinished, rounds, strict=True))


@torch.inference_mode()
def prefill(sequence: Sequence, target: ModelBackend, start: int, end: int) -> None:
    """Computes the prompt's tokens from `start` to `end`, and how likely the tokens after them are if that is asked for."""
    num_top = sequence.params.prompt_logprobs
    num_scored = 0 if num_top is None else end - start
    logits = target.logits([Row(sequence.id, sequence.tokens[:end], num_scored)])
    if num_top is not None:
        sequence.prompt_logprobs += token_logprobs(logits, sequence.tokens[start + 1 : end + 1], num_top)


def speculative_decode(
    target: ModelBackend,
    draft: ModelBackend | Drafter | None,
    input_ids: torch.Tensor,
    max_new_tokens: int = 128,
    K: int = 5,  # noqa: N803  the name that the literature uses
    *,
    adaptive: bool | LengthPolicy = False,
    route: Route | None = None,
    n: int = 1,
    stop: str | list[str] | None = None,
    tokenizer: Tokenizer | None = None,
    **sampling: Any,
) -> tuple[torch.Tensor, DecodingMetrics]:
    """Decodes one prompt. The output is distributed as if the target had decoded alone; greedy, it is equal.

    Args:
        target: the model whose output it is.
        draft: the model, or any `Drafter`, that guesses; None decodes plainly.
        input_ids: LongTensor [1, length].
        max_new_tokens: generate at the most so many tokens.
        K: how many tokens to draft in a round.
        adaptive: draft as many as pay, at the most K, and by the arm of the route that pays most; or a policy that says how
            many, such as one `AdaptiveLength` for all calls, which remembers what things take.
        route: who drafts, where `draft` is made of several drafters; its k is not looked at.
        n: how many answers to generate.
        stop: strings at which an answer ends; its last token is the one that completes the string.
        tokenizer: the target's, which `stop` needs.
        **sampling: fields of `SamplingParams`, such as temperature=0.7, top_p=0.9, seed=1 or verifier="block".

    Returns:
        LongTensor [n, length + generated], where an answer that is shorter than others is filled up with the target's end
        token (0 if it has none); and what it took.

    Raises:
        RequestError: a parameter is out of its range, or prompt and `max_new_tokens` exceed the target's context.
        ModelError: the two models' vocabularies have too little in common.
    """
    if input_ids.dim() != 2 or input_ids.shape[0] != 1 or input_ids.dtype not in (torch.int64, torch.int32):
        raise RequestError(
            f"input_ids: expected a LongTensor of shape [1, n], got {input_ids.dtype} of shape {list(input_ids.shape)}",
            param="input_ids",
        )
    if stop and tokenizer is None:
        raise RequestError("stop: expected the target's tokenizer beside it, as tokenizer=", param="stop")
    if unknown := sampling.keys() - SamplingParams.__dataclass_fields__.keys():
        raise TypeError(f"speculative_decode() got an unexpected keyword argument {min(unknown)!r}")
    params = SamplingParams(max_tokens=max_new_tokens, **sampling)
    prompt = input_ids[0].tolist()
    route = replace(route or Route("draft"), k=K)
    sequences = [Sequence(prompt, choice, route) for choice in params.choices(n)]
    number = {sequence.id: place for place, sequence in enumerate(sequences)}
    stops = [StopCriterion(tokenizer, stop, params.min_tokens) for _ in sequences] if tokenizer and stop else []
    metrics = DecodingMetrics()
    started = time.perf_counter()
    length = (AdaptiveLength() if adaptive else None) if isinstance(adaptive, bool) else adaptive
    for rounds in generate(sequences, as_drafter(draft, target), target, length):
        for sequence, round in rounds:
            if stops:
                round = end_at(sequence, round, stops[number[sequence.id]].feed(round.tokens))
            metrics.add(round, time.perf_counter() - started, number[sequence.id])
    longest = max(len(sequence.tokens) for sequence in sequences)
    filler = min(target.eos_token_ids, default=0)
    rows = [sequence.tokens + [filler] * (longest - len(sequence.tokens)) for sequence in sequences]
    return torch.tensor(rows, dtype=input_ids.dtype, device=input_ids.device), metrics


def end_at(sequence: Sequence, round: Round, length: int | None) -> Round:
    """Ends a sequence after the first `length` tokens of its last round, as at a stop string; None changes nothing."""
    if length is None:
        return round
    del sequence.tokens[len(sequence.tokens) - len(round.tokens) + length :]
    sequence.finish_reason = "stop"
    return replace(
        round,
        tokens=round.tokens[:length],
        num_accepted=min(round.num_accepted, length),
        finish_reason="stop",
        logprobs=round.logprobs and round.logprobs[:length],
    )


def as_drafter(draft: ModelBackend | Drafter | None, target: ModelBackend, **options: Any) -> Drafter:
    """Makes a drafter for `target` of a draft model, with `ModelDrafter`'s options; a drafter stays one, None is `NoDrafter`.

    Raises:
        ModelError: the two models' vocabularies have too little in common.
    """
    if draft is None:
        return NoDrafter()
    if not isinstance(draft, ModelBackend):
        return draft
    return ModelDrafter.between(draft, target, **options)


def check_sequence(sequence: Sequence, target: ModelBackend) -> None:
    """Raises a `RequestError` unless the sequence fits the target's context and vocabulary, and can always go on.

    A sequence that has a grammar is given its matcher here, unless it has one.
    """
    length = len(sequence.tokens) + sequence.num_remaining
    if length > target.max_length:
        raise RequestError(
            f"max_tokens: the prompt has {len(sequence.tokens)} tokens and max_tokens is {sequence.num_remaining}, "
            f"together more than the context of {target.max_length}",
            param="max_tokens" if len(sequence.tokens) < target.max_length else "prompt",
        )
    if not 0 <= min(sequence.tokens) <= max(sequence.tokens) < target.vocab_size:
        raise RequestError(f"prompt: expected token ids in [0, {target.vocab_size})", param="prompt")
    check_constraints(sequence.params, target.vocab_size, target.eos_token_ids)
    bind_grammar(sequence, target)


def _raw(logits: torch.Tensor, scored: list[Scored]) -> list[torch.Tensor | None]:
    """Copies of the logits, [k + 1, vocab], of the sequences whose log-probabilities are asked for."""
    parts = logits.split([part.num_scored for part in scored])
    return [
        rows.clone() if part.sequence.params.logprobs is not None else None for part, rows in zip(scored, parts, strict=True)
    ]


def _extend(
    sequence: Sequence,
    draft: Draft,
    num_accepted: int,
    added: list[int],
    raw: torch.Tensor | None,
    target: ModelBackend,
    draft_time_s: float,
    verify_time_s: float,
) -> Round:
    """Adds the round's tokens to the sequence, up to where it stops."""
    is_first = sequence.num_generated == 0
    tokens, finish_reason = _until_stop(added, sequence, target)
    sequence.tokens.extend(tokens)
    sequence.finish_reason = finish_reason
    return Round(
        tokens=tokens,
        num_drafted=len(draft.tokens),
        num_accepted=min(num_accepted, len(tokens)),
        finish_reason=finish_reason,
        draft_time_s=draft_time_s,
        verify_time_s=verify_time_s,
        logprobs=None if raw is None else token_logprobs(raw[: len(tokens)], tokens, sequence.params.logprobs or 0),
        prompt_logprobs=sequence.prompt_logprobs if is_first and sequence.params.prompt_logprobs is not None else None,
        drafter=sequence.route.drafter if draft.tokens else None,
        num_cached=sequence.num_cached if is_first else 0,
    )


def _until_stop(tokens: list[int], sequence: Sequence, target: ModelBackend) -> tuple[list[int], FinishReason | None]:
    ends = sequence.params.end_token_ids(target.eos_token_ids)
    tokens = tokens[: sequence.num_remaining]
    for count, token in enumerate(tokens, start=1):
        if token in ends:
            return tokens[:count], "stop"
        allowed = sequence.allowed_after(tokens[:count])
        if allowed is not None and allowed.is_over:
            return tokens[:count], "stop" if allowed.may_end else "length"
    return tokens, "length" if len(tokens) == sequence.num_remaining else None

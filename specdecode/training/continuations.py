"""Prompts and a target in, the target's own continuations out: the text on which a draft has to be good.

On-policy data in the sense of "DistillSpec" (Zhou et al. 2023, arXiv 2310.08461): acceptance is counted on what the
target says, not on what people wrote.
"""

import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from specdecode.training.blocks import Batch, pad

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Continuation:
    """What the target said after a prompt, both as ids; the end token is part of it where it was reached."""

    prompt: list[int]
    tokens: list[int]


@torch.inference_mode()
def continue_prompts(
    target: PreTrainedModel,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    temperature: float,
    batch_size: int,
    pad_id: int,
) -> list[Continuation]:
    """Lets the target continue every prompt, prompts of like length together; greedily where `temperature` is 0."""
    continuations: list[Continuation] = []
    by_length = sorted(prompts, key=len)
    started = time.perf_counter()
    for first in range(0, len(by_length), batch_size):
        batch = by_length[first : first + batch_size]
        continuations.extend(_continue_batch(target, batch, max_new_tokens, temperature, pad_id))
        num_tokens = sum(len(continuation.tokens) for continuation in continuations)
        rate = num_tokens / (time.perf_counter() - started)
        logger.info("%d of %d prompts continued, %.0f tokens/s", len(continuations), len(by_length), rate)
    return continuations


def continuation_batches(
    continuations: Sequence[Continuation], batch_size: int, pad_id: int, rng: np.random.Generator
) -> Iterator[Batch]:
    """Endless batches of continuations in random order, those of like length together to save padding."""
    while True:
        lengths = np.array([len(c.prompt) + len(c.tokens) for c in continuations]) + rng.uniform(0, 32, len(continuations))
        order = np.argsort(lengths)
        firsts = rng.permutation(range(0, len(order), batch_size))
        for first in firsts:
            chosen = [continuations[index] for index in order[first : first + batch_size]]
            yield pad([(c.prompt, c.tokens) for c in chosen], pad_id)


def remember(path: Path, settings: dict[str, Any], make: Callable[[], list[Continuation]]) -> list[Continuation]:
    """Reads the continuations at `path` if they were made with the same `settings`, or makes them and writes them there."""
    header = json.dumps({"settings": settings}, sort_keys=True)
    if path.exists():
        first, *lines = path.read_text(encoding="utf-8").splitlines()
        if first == header:
            return [Continuation(**json.loads(line)) for line in lines]
    continuations = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.new")
    new.write_text("\n".join([header, *(json.dumps(asdict(c)) for c in continuations)]) + "\n", encoding="utf-8")
    new.replace(path)
    return continuations


def _continue_batch(
    target: PreTrainedModel, prompts: list[list[int]], max_new_tokens: int, temperature: float, pad_id: int
) -> list[Continuation]:
    longest = max(map(len, prompts))
    ids = torch.tensor([[pad_id] * (longest - len(prompt)) + prompt for prompt in prompts], device=target.device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=target.device)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature > 0 else {"do_sample": False}
    output = target.generate(input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, pad_token_id=pad_id, **sampling)
    stops = target.generation_config.eos_token_id
    stop_ids = set(stops) if isinstance(stops, list) else {stops}
    return [
        Continuation(prompt, _until_stop(row, stop_ids))
        for prompt, row in zip(prompts, output[:, longest:].tolist(), strict=True)
    ]


def _until_stop(tokens: list[int], stop_ids: set[int | None]) -> list[int]:
    for index, token in enumerate(tokens):
        if token in stop_ids:
            return tokens[: index + 1]
    return tokens

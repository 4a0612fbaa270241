"""A question and an answer in, whether the answer is right out; and how alike two answers are.

Decoding is lossless: under greedy decoding quality with and without drafts is the same, answer by answer. What is measured here
is the target's quality, and that nothing has changed it.
"""

import math
import re
from collections.abc import Sequence as Several

import numpy as np
import torch

from specdecode.backends.backend import ModelBackend, Row
from specdecode.evaluation.datasets import Item, number_in
from specdecode.evaluation.sandbox import SandboxConfig, run_program

_FENCED = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)


def is_right(item: Item, answer: str, sandbox: SandboxConfig) -> bool | None:
    """Whether an answer is right; None where nobody can tell.

    Raises:
        ConfigError: programs cannot be run here.
    """
    if item.judge == "program":
        return run_program(program_of(item, answer), sandbox).is_passed
    if item.judge == "number":
        return number_in(answer) == item.reference
    return None


def program_of(item: Item, answer: str) -> str:
    """The program that fails unless the answer is right.

    Of an answer in a chat, the code between the first fences, or all of it; imports and helpers of the question come before it.
    """
    if item.format == "raw":
        return f"{item.prefix}{answer}\n{item.reference}"
    return f"{_before_function(item.prefix)}{code_in(item, answer)}\n{item.reference}"


def code_in(item: Item, answer: str) -> str:
    """An answer's code: of one in a chat, what is between the first fences, if there are any."""
    fenced = _FENCED.search(answer) if item.format == "chat" else None
    return fenced.group(1) if fenced else answer


def _before_function(prefix: str) -> str:
    """The lines of a question's code before the last function, which an answer repeats."""
    start = prefix.rfind("\ndef ") + 1
    return prefix[:start]


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """The chance that one of k answers is right, estimated without bias from more of them.

    1 - C(n - c, k) / C(n, k) (Chen et al. 2021, arXiv 2107.03374, equation 1).
    """
    if not 0 < k <= num_samples:
        raise ValueError(f"k: expected at least 1 and at most {num_samples} samples, got {k}")
    return 1 - math.comb(num_samples - num_right, k) / math.comb(num_samples, k)


def agreement(tokens: Several[int], others: Several[int]) -> float:
    """The share of places, of the longer answer, at which both have the same token."""
    longer = max(len(tokens), len(others))
    return sum(one == other for one, other in zip(tokens, others, strict=False)) / longer if longer else 1.0


def overlap(tokens: Several[int], others: Several[int]) -> float:
    """ROUGE-L: twice the longest common subsequence by both lengths (Lin 2004)."""
    if not len(tokens) or not len(others):
        return float(len(tokens) == len(others))
    row = np.zeros(len(others) + 1, dtype=np.int64)
    mask = np.asarray(others)
    for token in tokens:
        longer = np.maximum(row[1:], row[:-1] + (mask == token))
        row[1:] = np.maximum.accumulate(longer)
    return 2 * int(row[-1]) / (len(tokens) + len(others))


@torch.inference_mode()
def perplexity(target: ModelBackend, prompt: Several[int], answer: Several[int]) -> float:
    """exp of the mean surprise of an answer's tokens under the target, 1 for none."""
    if not len(answer):
        return 1.0
    tokens = [*prompt, *answer]
    logits = target.logits([Row("perplexity", tokens[:-1], len(answer))]).float()
    log_probs = torch.log_softmax(logits, -1)
    said = log_probs.gather(1, torch.tensor(answer, device=logits.device)[:, None])
    return float((-said.mean()).exp())

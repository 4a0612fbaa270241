"""Documents in, prompts out: documents that end where a model is to go on. Knows nothing of models."""

import itertools
import re
from collections.abc import Mapping, Sequence

import numpy as np

from specdecode.errors import ConfigError
from specdecode.training.documents import Document, is_held_out
from specdecode.training.examples import Formatter

_DEFINITION = re.compile(r"^[ \t]*(?:async def|def|class)\b", re.MULTILINE)
_MAX_PREFIX_LINES = 16


def sample_all_prompts(
    documents: Mapping[str, Sequence[Document]],
    weights: Mapping[str, float],
    formatter: Formatter,
    num_prompts: int,
    max_length: int,
    rng: np.random.Generator,
    *,
    held_out: bool,
) -> list[Document]:
    """Prompts from each source in proportion to its weight; only of documents that are held out, or only of the others.

    Raises:
        ConfigError: there are none that are short enough.
    """
    prompts: list[Document] = []
    for source, count in share_out(num_prompts, weights).items():
        chosen = [document for document in documents[source] if is_held_out(document) == held_out]
        prompts += sample_prompts(chosen, formatter, count, max_length, rng)
    if not prompts:
        raise ConfigError(f"data: expected prompts of at most {max_length} tokens, found none")
    return prompts


def share_out(count: int, weights: Mapping[str, float]) -> dict[str, int]:
    """How many of `count` fall to each source, in proportion to its weight, rounded."""
    return {source: round(count * weight / sum(weights.values())) for source, weight in weights.items()}


def sample_prompts(
    documents: Sequence[Document],
    formatter: Formatter,
    num_prompts: int,
    max_length: int,
    rng: np.random.Generator,
) -> list[Document]:
    """Draws `num_prompts` prompts of at most `max_length` ids, from documents in random order, again and again."""
    prompts: list[Document] = []
    for _ in range(100):  # passes: documents that never give a short enough prompt must not make this endless
        for index in rng.permutation(len(documents)):
            if len(prompts) == num_prompts:
                return prompts
            prompt = sample_prompt(documents[index], rng)
            if prompt is not None and 0 < len(formatter.prompt(prompt)) <= max_length:
                prompts.append(prompt)
    return prompts


def sample_prompt(document: Document, rng: np.random.Generator) -> Document | None:
    """A conversation up to one of its user turns, ready for the answer; or the first lines of a definition in a text."""
    if document.is_conversation:
        ends = [index + 1 for index, message in enumerate(document.messages) if message.role == "user"]
        return Document(messages=document.messages[: int(rng.choice(ends))]) if ends else None
    return Document(sample_prefix(document.text, rng))


def sample_prefix(text: str, rng: np.random.Generator) -> str:
    """The first lines of a random function or class of source code, dedented, or of a text that has none."""
    starts = [0, *(match.start() for match in _DEFINITION.finditer(text))]
    start = int(rng.choice(starts))
    lines = text[start:].split("\n", _MAX_PREFIX_LINES)[:_MAX_PREFIX_LINES]
    indentation = lines[0][: len(lines[0]) - len(lines[0].lstrip())]
    body = itertools.takewhile(lambda line: not line.strip() or line.startswith(indentation), lines)
    block = [line.removeprefix(indentation) for line in body]
    return "\n".join(block[: int(rng.integers(1, len(block) + 1))]) + "\n"

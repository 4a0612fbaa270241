"""Prompts and a target in, the target's own answers out: the text on which a draft has to be good.

On-policy data in the sense of "DistillSpec" (Zhou et al. 2023, arXiv 2310.08461): acceptance is counted on what the target
says, not on what people wrote. Our own engine answers, in parts that are kept: a run that was stopped goes on where it was.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from specdecode.backends.backend import ModelBackend, ModelConfig, open_model
from specdecode.config import StrictModel
from specdecode.decoding.drafters import Drafter, ModelDrafter, NoDrafter
from specdecode.decoding.engine import Engine, EngineConfig
from specdecode.decoding.sequence import Route, SamplingParams, Sequence
from specdecode.parts import part_path
from specdecode.training.data import DataConfig
from specdecode.training.examples import Example


class CompletionConfig(StrictModel):
    """Which prompts are answered, and how."""

    num_prompts: int = Field(default=2000, gt=0)
    max_prompt_length: int = Field(default=160, gt=0, description="tokens; longer prompts are left out")
    max_new_tokens: int = Field(default=160, gt=0)
    sampled_share: float = Field(default=0.25, ge=0, le=1, description="how many, of 1, are sampled; the others are greedy")
    temperature: float = Field(default=0.8, gt=0)
    seed: int = 0
    batch: int = Field(default=32, gt=0, description="answers that are decoded together")
    part: int = Field(default=256, gt=0, description="prompts of a part, which is kept whole or not at all")
    num_actors: int = Field(default=1, gt=0, description="processes that each hold the models")
    num_gpus: float = Field(default=0.0, ge=0, description="GPUs of each of them")


class CompletionJobConfig(StrictModel):
    """What is asked, of whom, and where the answers go."""

    target: ModelConfig
    draft: ModelConfig | None = Field(default=None, description="guesses, which makes it quicker and changes nothing")
    K: int = Field(default=4, gt=0)
    data: DataConfig
    completions: CompletionConfig = Field(default_factory=CompletionConfig)
    output_dir: str


@dataclass(frozen=True)
class Completion:
    """What the target said after a prompt, both as ids; the end token is part of it where it was reached."""

    prompt: list[int]
    tokens: list[int]

    def example(self) -> Example:
        """To learn from: the answer."""
        return Example.answer(self.prompt, self.tokens)


class Answerer:
    """Holds the models; answers a part's prompts and writes them down.

    Args:
        config: a `CompletionJobConfig` as a dictionary, as it travels between processes.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        self._config = CompletionJobConfig.model_validate(config)
        self._target = open_model(self._config.target)
        self._drafter: Drafter = NoDrafter()
        if self._config.draft is not None:
            self._drafter = ModelDrafter.between(open_model(self._config.draft), self._target)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Takes a part's `number` and its `prompts` as JSON; returns the number, and what it took."""
        started = time.perf_counter()
        settings = self._config.completions
        first = row["number"] * settings.part
        completions = complete(
            json.loads(row["prompts"]),
            self._target,
            self._drafter,
            lambda n: _params(settings, first + n),
            settings.batch,
            self._config.K,
        )
        _write(part_path(self._config.output_dir, row["number"]), completions)
        num_tokens = sum(len(completion.tokens) for completion in completions)
        return {"number": row["number"], "num_tokens": num_tokens, "rate": num_tokens / (time.perf_counter() - started)}


def complete(
    prompts: list[list[int]],
    target: ModelBackend,
    drafter: Drafter,
    params: Callable[[int], SamplingParams],
    batch: int = 32,
    k: int = 4,
) -> list[Completion]:
    """Answers prompts, `batch` of them at a time; `params` says how each of them is answered, by its place in the list."""
    engine = Engine(target, drafter, EngineConfig(max_batch=batch, max_queued=len(prompts), draft_length="fixed"))
    sequences = [Sequence(prompt, params(place), Route("draft", k)) for place, prompt in enumerate(prompts)]
    for sequence in sequences:
        engine.submit(sequence)
    for _ in engine.run():
        pass
    return [Completion(s.tokens[: s.num_prompt_tokens], s.tokens[s.num_prompt_tokens :]) for s in sequences]


def _params(config: CompletionConfig, number: int) -> SamplingParams:
    """How a prompt is answered: a function of its number, so that it is the same whoever does it, and whenever."""
    seed = int.from_bytes(hashlib.sha256(f"{config.seed}:{number}".encode()).digest()[:8], "little")
    is_sampled = np.random.default_rng(seed).random() < config.sampled_share
    return SamplingParams(
        max_tokens=config.max_new_tokens, temperature=config.temperature if is_sampled else 0.0, seed=seed >> 1
    )


def _write(path: Path, completions: list[Completion]) -> None:
    new = path.with_name(f".{path.name}.new")
    pq.write_table(pa.table({"prompt": [c.prompt for c in completions], "tokens": [c.tokens for c in completions]}), new)
    new.replace(path)


def read_part(path: Path) -> Iterator[Completion]:
    """The answers of a part."""
    for row in pq.read_table(path).to_pylist():
        yield Completion(row["prompt"], row["tokens"])

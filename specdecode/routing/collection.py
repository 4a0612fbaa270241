"""Prompts in, a record for each of them and each arm out: by decoding with each draft, or by scoring the target's own answer.

To score is cheap: the target answers once, and each draft reads the answer in one pass. At each of its places a token that the
draft draws is accepted with the chance sum(min(p, q)), greedily where both first choices are the same.
"""

import logging
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator

from specdecode.backends.backend import ModelBackend, ModelConfig, Row, forget, open_model
from specdecode.config import StrictModel
from specdecode.decoding.control import AdaptiveLength
from specdecode.decoding.drafters import Drafter, ModelDrafter, NoDrafter, RoutedDrafter
from specdecode.decoding.loop import generate, speculative_decode
from specdecode.decoding.metrics import DecodingMetrics, expected_length
from specdecode.decoding.sequence import Route, SamplingParams, Sequence
from specdecode.errors import ConfigError, SpecDecodeError
from specdecode.parts import part_path
from specdecode.routing.pending import PendingForecasts
from specdecode.routing.records import ADAPTIVE, NONE, Record, write_records
from specdecode.routing.router import AdaptiveRouter, RoutingConfig

logger = logging.getLogger(__name__)

GENERIC = "generic"  # the arm of router.generic_draft


class ArmsConfig(StrictModel):
    """The drafts that a router is to tell apart."""

    draft_models: dict[str, str] = Field(description="the drafts by name: Hugging Face names or folders")
    generic_draft: str | None = Field(default=None, description=f"one for everything, the arm {GENERIC!r}")

    @property
    def drafts(self) -> dict[str, str]:
        """All of them, by arm."""
        return self.draft_models | ({} if self.generic_draft is None else {GENERIC: self.generic_draft})

    @model_validator(mode="after")
    def _check(self) -> "ArmsConfig":
        if len(self.drafts) < 2:
            raise ValueError(f"draft_models: expected at least two drafts to choose from, got {sorted(self.drafts)}")
        for name in (NONE, ADAPTIVE):
            if name in self.drafts:
                raise ValueError(f"draft_models: {name} is an arm of its own, and cannot be a draft's name")
        return self


class TrialConfig(StrictModel):
    """What is tried on each prompt, and how."""

    router: ArmsConfig
    routing: RoutingConfig | None = Field(
        default=None, description=f"a trained router to try too, by decoding: the arm {ADAPTIVE!r}"
    )
    target: ModelConfig
    mode: Literal["decode", "score"] = Field(
        default="score", description="decode with each draft, or score the target's answer"
    )
    K: int = Field(default=5, gt=0)
    max_new_tokens: int = Field(default=128, gt=0)
    temperature: float = Field(default=0.0, ge=0)
    seed: int = 0

    @model_validator(mode="after")
    def _check_mode(self) -> "TrialConfig":
        if self.routing is not None and self.mode != "decode":
            raise ValueError(f"mode: expected decode to try a router, got {self.mode}")
        return self


@dataclass(frozen=True)
class RouterPrompt:
    """A prompt to try: its ids, and what a router knows of it."""

    id: str
    domain: str
    text: str
    is_chat: bool
    tokens: list[int]

    def record(self, arm: str) -> Record:
        """One without figures."""
        return Record(self.id, self.domain, self.text, self.is_chat, len(self.tokens), arm)


class Collector:
    """Holds the target and all drafts; tries all arms on the prompts of a part and writes their records down.

    Args:
        config: a `TrialConfig` as a dictionary, as it travels between processes.
        folder: where the parts go.
    """

    def __init__(self, config: dict[str, Any], folder: str) -> None:
        self._config = TrialConfig.model_validate(config)
        self._folder = folder
        self._target = open_model(self._config.target)
        self._drafts = {
            name: open_model(self._config.target.model_copy(update={"model": model}))
            for name, model in self._config.router.drafts.items()
        }
        if self._config.mode == "score":
            for name, draft in self._drafts.items():
                if draft.vocabulary_id != self._target.vocabulary_id:
                    raise ConfigError(f"mode score: expected drafts of the target's vocabulary, {name} has another: use decode")
        self._drafters: dict[str, Drafter] = {NONE: NoDrafter()} | {
            name: ModelDrafter.between(draft, self._target) for name, draft in self._drafts.items()
        }
        routing = self._config.routing
        self._router = None if routing is None else AdaptiveRouter.from_config(routing, list(self._drafts))
        self._length = AdaptiveLength()  # learns what things take, as a server does
        self._round_times: dict[str, float] = {}

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Takes a part's `number` and its `prompts`, as dictionaries; returns the number, and how many records and errors."""
        prompts = [RouterPrompt(**prompt) for prompt in row["prompts"]]
        records = list(self.records(prompts))
        write_records(part_path(self._folder, row["number"]), records)
        return {"number": row["number"], "num_records": len(records), "num_errors": sum(r.error is not None for r in records)}

    def records(self, prompts: list[RouterPrompt]) -> Iterator[Record]:
        """A record for each prompt and arm; what fails is a record that says so."""
        if self._config.mode == "decode":
            for number, prompt in enumerate(prompts):
                yield from self._decoded(prompt, number)
            return
        answers = self._answers(prompts)
        for prompt in prompts:
            yield from self._scored(prompt, answers.get(prompt.id))

    def _decoded(self, prompt: RouterPrompt, number: int) -> Iterator[Record]:
        """All arms in turns, of which another begins each time: none is always the one that finds the caches cold."""
        arms = [NONE, *self._drafts, *([ADAPTIVE] if self._router else [])]
        shift = number % len(arms)
        for arm in arms[shift:] + arms[:shift]:
            yield self._decoded_with(prompt, arm)

    def _decoded_with(self, prompt: RouterPrompt, arm: str) -> Record:
        forget(self._target, *self._drafts.values())  # each arm reads the whole prompt, the first and the others
        try:
            if arm == ADAPTIVE:
                return self._routed(prompt)
            metrics = self._decode(prompt, arm, self._config.max_new_tokens)
            return as_record(prompt.record(arm), metrics, self._config.K, arm)
        except (SpecDecodeError, RuntimeError) as error:  # such as torch's, out of memory
            return _failed(prompt.record(arm), error)

    def _decode(self, prompt: RouterPrompt, arm: str, max_new_tokens: int) -> DecodingMetrics:
        _, metrics = speculative_decode(
            self._target,
            RoutedDrafter({arm: self._drafters[arm]}),
            torch.tensor([prompt.tokens]),
            max_new_tokens,
            self._config.K,
            route=Route(arm),
            temperature=self._config.temperature,
            seed=self._config.seed,
        )
        return metrics

    def _routed(self, prompt: RouterPrompt) -> Record:
        """As the router has it, with the target decoding plainly until it has spoken."""
        assert self._router is not None
        started = time.perf_counter()
        pending = self._router.begin([prompt.text], [len(prompt.tokens)], [prompt.is_chat])
        length = PendingForecasts(pending, self._config.K, self._length)
        params = SamplingParams(temperature=self._config.temperature, seed=None, max_tokens=self._config.max_new_tokens)
        sequence, metrics = Sequence(prompt.tokens, params), DecodingMetrics()
        for [(_, round)] in generate([sequence], RoutedDrafter(self._drafters), self._target, length):
            metrics.add(round, time.perf_counter() - started)
        if metrics.verdicts:
            self._router.learn(pending.result()[0], metrics.verdicts)
        return replace(prompt.record(ADAPTIVE), k=self._config.K, tokens_per_second=metrics.tokens_per_second)

    def _answers(self, prompts: list[RouterPrompt]) -> dict[str, list[int]]:
        """What the target says, all at once; nothing if that fails."""
        params = SamplingParams(
            temperature=self._config.temperature, seed=self._config.seed, max_tokens=self._config.max_new_tokens
        )
        sequences = [Sequence(prompt.tokens, params, Route(), id=f"answer {prompt.id}") for prompt in prompts]
        try:
            for _ in generate(sequences, NoDrafter(), self._target):
                pass
        except (SpecDecodeError, RuntimeError) as error:
            logger.warning("no answers to %d prompts: %s", len(prompts), error)
            return {}
        return {p.id: s.tokens[s.num_prompt_tokens :] for p, s in zip(prompts, sequences, strict=True)}

    def _scored(self, prompt: RouterPrompt, answer: list[int] | None) -> Iterator[Record]:
        for arm in (NONE, *self._drafts):
            record = prompt.record(arm)
            if answer is None:
                yield replace(record, error="the target did not answer")
                continue
            try:
                yield self._score(record, prompt, answer)
            except (SpecDecodeError, RuntimeError) as error:
                yield _failed(record, error)

    def _score(self, record: Record, prompt: RouterPrompt, answer: list[int]) -> Record:
        k, arm = self._config.K, record.arm
        round_time = self._round_time(prompt, arm)
        if arm == NONE:
            return replace(record, mode="scored", tokens_per_second=1 / round_time)
        chances = self._chances(prompt.tokens, answer, self._drafts[arm])
        lengths = [expected_length([chances], depth) for depth in range(1, 2 * k + 1)]
        return replace(
            record,
            acceptance=float(chances.mean()),
            num_verdicts=len(chances),
            accepted_lengths=lengths,
            k=k,
            tokens_per_second=lengths[k - 1] / round_time,
            mode="scored",
        )

    @torch.inference_mode()
    def _chances(self, prompt: list[int], answer: list[int], draft: ModelBackend) -> np.ndarray:
        """How likely a guess is accepted at each place of the answer, [n]."""
        row = [Row("scored", (prompt + answer)[:-1], len(answer))]
        p, q = (model.logits(row).float().cpu() for model in (self._target, draft))
        if self._config.temperature == 0:
            chances = (p.argmax(-1) == q.argmax(-1)).float()
        else:
            p, q = ((logits / self._config.temperature).softmax(-1) for logits in (p, q))
            chances = torch.minimum(p, q).sum(-1)
        return chances.numpy()

    def _round_time(self, prompt: RouterPrompt, arm: str) -> float:
        """What a round takes here: measured once, when the first prompt comes, on a few rounds of it."""
        if not self._round_times:
            arms = [NONE, *self._drafts]
            times: dict[str, list[float]] = {name: [] for name in arms}
            for _ in range(3):
                for name in arms:
                    metrics = self._decode(prompt, name, 32)
                    seconds = metrics.total_time_s - metrics.time_to_first_token_s
                    times[name].append(seconds / max(1, metrics.num_target_passes - 1))
            self._round_times = {name: max(1e-6, statistics.median(found[1:])) for name, found in times.items()}
        return self._round_times[arm]


def as_record(record: Record, metrics: DecodingMetrics, k: int, arm: str) -> Record:
    """The record with the figures of one arm of a generation that drafted at the most `k` tokens a round."""
    speed = metrics.tokens_per_second
    found = metrics.verdicts.get(arm)
    if found is None:
        return replace(record, arm=arm, tokens_per_second=speed)
    reached = [count / metrics.num_drafts for count in metrics.num_accepted_at]
    return replace(
        record,
        arm=arm,
        acceptance=found.acceptance,
        num_verdicts=found.num_accepted + found.num_rejected,
        accepted_lengths=[1 + sum(reached[:depth]) for depth in range(1, k + 1)],
        k=k,
        tokens_per_second=speed,
    )


def _failed(record: Record, error: Exception) -> Record:
    return replace(record, error=f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}")


def as_rows(prompts: list[RouterPrompt], size: int) -> list[dict[str, Any]]:
    """Prompts in parts of `size`, as they travel."""
    return [
        {"number": number, "prompts": [asdict(prompt) for prompt in prompts[start : start + size]]}
        for number, start in enumerate(range(0, len(prompts), size))
    ]

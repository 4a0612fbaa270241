"""A configuration in, what is asked of whom and when out."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from pydantic import Field, model_validator

from specdecode.config import StrictModel
from specdecode.evaluation.datasets import Dataset, DatasetConfig, Item
from specdecode.evaluation.endpoint import Question
from specdecode.evaluation.load_analysis import Bounds
from specdecode.evaluation.load_records import Point


class RandomPrompts(StrictModel):
    """Prompts of token ids that mean nothing, and that no endpoint has seen before."""

    min_tokens: int = Field(default=64, gt=0)
    max_tokens: int = Field(default=64, gt=0)
    vocab_size: int = Field(default=1000, gt=0, description="ids are below")

    @model_validator(mode="after")
    def _check(self) -> "RandomPrompts":
        if self.max_tokens < self.min_tokens:
            raise ValueError(f"max_tokens: expected at least min_tokens, {self.min_tokens}, got {self.max_tokens}")
        return self


class ArmConfig(StrictModel):
    """One of several that are compared; what is unset is as in the rest of the file."""

    url: str | None = None
    model: str | None = None
    api_key_env: str | None = None
    extra_body: dict[str, Any] = Field(default={}, description="beside, and over, that of the rest")


class LoadConfig(StrictModel):
    """What is asked of whom, and how fast."""

    url: str = Field(default="http://127.0.0.1:8000/v1", description="any endpoint that speaks OpenAI's API")
    model: str | None = Field(default=None, description="the only one that the endpoint has, if unset")
    api_key_env: str | None = Field(default=None, description="the environment variable that holds the API key")
    arms: dict[str, ArmConfig] = Field(default={"endpoint": ArmConfig()}, min_length=1, description="compared with the first")
    dataset: DatasetConfig | None = Field(default=None, description="whose first turns are asked, raw ones as completions")
    random: RandomPrompts | None = Field(default=None, description="instead of a data set")
    max_tokens: int = Field(default=128, gt=0)
    temperature: float = Field(default=0.0, ge=0)
    ignore_eos: bool = Field(default=False, description="all answers have max_tokens, where the endpoint knows this field")
    extra_body: dict[str, Any] = Field(default={}, description="further fields of every request, such as its own seed")
    concurrency: list[int] = Field(default=[], description="closed loops of so many clients")
    rates: list[float] = Field(default=[], description="open loops of so many requests a second")
    burstiness: float = Field(
        default=1.0, gt=0, description="shape of the gamma distribution between arrivals; 1 is Poisson, less comes in bursts"
    )
    max_concurrency: int = Field(default=256, gt=0, description="of an open loop; what arrives beyond it waits, and is late")
    num_requests: int = Field(default=32, gt=0, description="of each arm in each turn at each load, at the most")
    duration_s: float | None = Field(default=None, gt=0, description="of each of these, after which nothing more is asked")
    num_turns: int = Field(default=5, gt=1, description="of all loads; intervals are of these")
    num_warmup: int = Field(default=4, gt=0, description="requests to each arm before, which are not counted")
    timeout_s: float = Field(default=120.0, gt=0, description="for an answer to its end")
    goodput: Bounds | None = Field(default=None, description="what an answer keeps to if it is a good one")
    seed: int = Field(default=0, ge=0, description="of arrivals, and of what is asked")
    output_dir: str = Field(description="records and summary")

    @model_validator(mode="after")
    def _check(self) -> "LoadConfig":
        if (self.dataset is None) == (self.random is None):
            raise ValueError("dataset: expected either a data set or random prompts")
        if not self.points:
            raise ValueError("concurrency: expected some, or rates")
        if bad := [point.load for point in self.points if not 0 < point.load < float("inf")]:
            raise ValueError(f"concurrency and rates: expected numbers above 0, got {bad[0]:g}")
        if self.num_requests < (most := max(self.concurrency, default=0)):
            raise ValueError(f"num_requests: expected at least {most}, one for each client, got {self.num_requests}")
        return self

    @property
    def points(self) -> list[Point]:
        """All loads, closed loops first."""
        return [*(Point("concurrency", float(c)) for c in self.concurrency), *(Point("rate", r) for r in self.rates)]

    @property
    def num_parts(self) -> int:
        """How many there are: each load in each turn."""
        return self.num_turns * len(self.points)


@dataclass(frozen=True)
class Planned:
    """A request.

    Attributes:
        number: its place in the turn.
        item: the question of the data set.
        question: what is asked.
        at_s: when it arrives, after the turn's start; None for as soon as a client is free.
    """

    number: int
    item: str
    question: Question
    at_s: float | None


class Plan:
    """What is asked in each part of a load.

    Args:
        config: the load.
        dataset: what may be asked; random tokens if None.
    """

    def __init__(self, config: LoadConfig, dataset: Dataset | None) -> None:
        self._config = config
        self._dataset = dataset

    def requests(self, part: int, arm: str) -> list[Planned]:
        """The requests of an arm in a part: at the same times for all arms, and of a data set the same."""
        asked = zip(self._arrivals(part), self._questions(part, arm), strict=False)
        return [Planned(number, item, question, at_s) for number, (at_s, (item, question)) in enumerate(asked)]

    def warm_up(self, arm: str) -> list[Planned]:
        """Requests of no part."""
        asked = islice(self._questions(self._config.num_parts, arm), self._config.num_warmup)
        return [Planned(number, item, question, None) for number, (item, question) in enumerate(asked)]

    def _arrivals(self, part: int) -> list[float | None]:
        config = self._config
        point = config.points[part % len(config.points)]
        if point.kind == "concurrency":
            return [None] * config.num_requests
        times = arrivals(point.load, config.burstiness, config.num_requests, np.random.default_rng([config.seed, part, 0]))
        return [at_s for at_s in times if config.duration_s is None or at_s < config.duration_s]

    def _questions(self, part: int, arm: str) -> Iterator[tuple[str, Question]]:
        """Without an end."""
        if self._dataset is None:
            return self._random(np.random.default_rng([self._config.seed, part, 1 + list(self._config.arms).index(arm)]))
        return self._shuffled(self._dataset, np.random.default_rng([self._config.seed, part, 1]))

    def _random(self, rng: np.random.Generator) -> Iterator[tuple[str, Question]]:
        """Other ones for each arm, as one that is asked the same at the same endpoint would find the prompt in its cache."""
        prompts = self._config.random
        assert prompts is not None
        while True:
            length = rng.integers(prompts.min_tokens, prompts.max_tokens, endpoint=True)
            tokens = rng.integers(0, prompts.vocab_size, length).tolist()
            yield "", Question("/completions", {"prompt": tokens, **self._body()})

    def _shuffled(self, dataset: Dataset, rng: np.random.Generator) -> Iterator[tuple[str, Question]]:
        while True:
            for place in rng.permutation(len(dataset)).tolist():
                item = dataset[place]
                yield item.id, _question(item, self._body())

    def _body(self) -> dict[str, Any]:
        config = self._config
        ignore_eos = {"ignore_eos": True} if config.ignore_eos else {}
        return {"max_tokens": config.max_tokens, "temperature": config.temperature, **ignore_eos}


def arrivals(rate: float, burstiness: float, num: int, rng: np.random.Generator) -> list[float]:
    """Times of so many requests a second: gamma distributed from one to the next, with mean 1 / rate and this shape."""
    times: list[float] = np.cumsum(rng.gamma(burstiness, 1 / (rate * burstiness), num)).tolist()
    return times


def _question(item: Item, body: dict[str, Any]) -> Question:
    text = item.turns[0]
    if item.format == "raw":
        return Question("/completions", {"prompt": text, **body})
    return Question("/chat/completions", {"messages": [{"role": "user", "content": text}], **body})

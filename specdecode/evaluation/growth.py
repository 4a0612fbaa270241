"""A pair in, how the time of a round grows out: with the batch, the context, K and the vocabulary.

Nothing in a round has to grow faster than in proportion to any of them. The exponent of the fit t ~ size^exponent over the
larger sizes says what does; below 1 a part that does not grow is still the larger one.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator

from specdecode.backends.backend import forget
from specdecode.backends.presets import make_backend
from specdecode.config import StrictModel
from specdecode.decoding.drafters import NoDrafter
from specdecode.decoding.loop import step
from specdecode.decoding.sequence import Draft, Route, SamplingParams, Sequence
from specdecode.decoding.verification import accept
from specdecode.evaluation.pairs import Pair
from specdecode.evaluation.stopwatch import (
    ACCEPTANCE,
    BETWEEN,
    DISTRIBUTIONS,
    PHASES,
    VERIFY_PASS,
    Stopwatch,
    WatchedDrafter,
    WatchedModel,
)

Axis = Literal["batch", "context", "K", "vocabulary"]
AXES: tuple[Axis, ...] = ("batch", "context", "K", "vocabulary")
ROUND = "round"
# What is measured varies by so much from run to run.
STEEPEST = 1.15


class GrowthConfig(StrictModel):
    """The sizes at which rounds are measured; all others are as `at_*` says meanwhile."""

    batch: list[int] = Field(default=[1, 2, 4, 8, 16, 32])
    context: list[int] = Field(default=[128, 256, 512, 1024, 2048, 4096], description="tokens of each sequence")
    K: list[int] = Field(default=[0, 1, 2, 4, 8])
    vocabulary: list[int] = Field(
        default=[4096, 32_768, 65_536, 152_064], description="of models with the pair's other shapes and random weights"
    )
    at_batch: int = Field(default=1, gt=0)
    at_context: int = Field(default=128, gt=0)
    at_K: int = Field(default=4, ge=0)  # noqa: N815
    temperature: float = Field(default=1.0, ge=0)
    num_rounds: int = Field(default=9, gt=0, description="rounds at each size, of which the median is taken")
    chart: str | None = Field(default=None, description="a PNG file to draw the times to")

    @model_validator(mode="after")
    def _has_sizes(self) -> "GrowthConfig":
        for axis in AXES:
            if unusable := [size for size in getattr(self, axis) if size < (axis != "K")]:
                raise ValueError(f"{axis}: expected positive sizes, got {unusable[0]}")
        return self

    @property
    def num_points(self) -> int:
        """How many sizes there are."""
        return sum(len(getattr(self, axis)) for axis in AXES)


@dataclass(frozen=True)
class Curve:
    """The milliseconds of one phase, or of the whole round, along one axis.

    Attributes:
        sizes, ms: the points.
        exponent: of the fit over the larger half of the sizes; None with fewer than three of them above 0.
        slope_us: microseconds for one more, by least squares.
    """

    axis: Axis
    phase: str
    sizes: list[int]
    ms: list[float]
    exponent: float | None
    slope_us: float | None

    @property
    def is_too_steep(self) -> bool:
        """Whether it grows faster than in proportion."""
        return self.exponent is not None and self.exponent > STEEPEST


@dataclass(frozen=True)
class Growth:
    """All curves, and sizes that were left out because a model does not reach so far."""

    curves: list[Curve]
    left_out: dict[str, list[int]]
    chart: str | None


def measure_growth(config: GrowthConfig, pair: Pair, tell: Callable[[int], None]) -> Growth:
    """Measures every axis in turn; `tell` hears how many points are done."""
    points: dict[tuple[Axis, str], dict[int, float]] = {}
    left_out: dict[str, list[int]] = {}
    done = 0
    for axis in AXES:
        for size, times in _along(axis, config, pair, left_out):
            for phase, seconds in times.items():
                points.setdefault((axis, phase), {})[size] = 1000 * seconds
            done += 1
            tell(done)
    curves = [_curve(axis, phase, found) for (axis, phase), found in points.items()]
    if config.chart is not None:
        from specdecode.evaluation.growth_chart import draw_growth  # matplotlib is an extra

        draw_growth(curves, Path(config.chart))
    return Growth(curves, left_out, config.chart)


def exponent(sizes: list[int], times: list[float]) -> float | None:
    """Of t ~ size^exponent over the larger half of the sizes, three of them at least."""
    points = [(size, t) for size, t in zip(sizes, times, strict=True) if size > 0 and t > 0]
    points = points[-max(3, -(-len(points) // 2)) :]
    if len(points) < 3:
        return None
    x, y = np.log(np.array(points, dtype=np.float64)).T
    return float(np.polyfit(x, y, 1)[0])


def _along(
    axis: Axis, config: GrowthConfig, pair: Pair, left_out: dict[str, list[int]]
) -> Iterator[tuple[int, dict[str, float]]]:
    for size in sorted(getattr(config, axis)):
        settings = {"batch": config.at_batch, "context": config.at_context, "K": config.at_K}
        measured = pair
        if axis == "vocabulary":
            measured = _with_vocabulary(pair, size)
        else:
            settings[axis] = size
        room = min(measured.target.max_length, measured.draft.max_length) - settings["context"]
        if room < (config.num_rounds + 2) * (settings["K"] + 1) or settings["batch"] > measured.target.cache.max_rows:
            left_out.setdefault(axis, []).append(size)
            continue
        yield size, _measure(measured, settings["batch"], settings["context"], settings["K"], config)


def _measure(pair: Pair, batch: int, context: int, k: int, config: GrowthConfig) -> dict[str, float]:
    """Median seconds of each phase over a few rounds, which add a few tokens to the context."""
    forget(pair.target, pair.draft)
    watch = Stopwatch(pair.target.device)

    def judge(sequences: list[Sequence], drafts: list[Draft], p: Any) -> tuple[list[int], list[list[int]]]:
        watch.lap(DISTRIBUTIONS)
        accept(sequences, drafts, p)
        watch.lap(ACCEPTANCE)
        # All is accepted, so that every round drafts as much; the last token is one that both models have.
        return [len(draft.tokens) for draft in drafts], [[*draft.tokens, 1] for draft in drafts]

    room = (config.num_rounds + 2) * (k + 1)
    params = SamplingParams(temperature=config.temperature, max_tokens=room, ignore_eos=True, seed=0)
    sequences = [Sequence(prompt, params, Route("draft", k)) for prompt in pair.random_prompts(batch, context)]
    rounds = []
    with ExitStack() as stack:
        target = stack.enter_context(WatchedModel(pair.target, watch, VERIFY_PASS, BETWEEN))
        drafter = WatchedDrafter(pair.drafter(watch, stack), watch) if k else NoDrafter()
        for _ in range(config.num_rounds + 1):  # of which the first reads the prompts
            watch.start()
            step(sequences, drafter, target, judge)
            watch.lap(BETWEEN)
            rounds.append(watch.read())
    forget(pair.target, pair.draft)
    times = {phase: median(round.get(phase, 0.0) for round in rounds[1:]) for phase in PHASES}
    return {ROUND: median(sum(round.values()) for round in rounds[1:]), **{p: t for p, t in times.items() if t}}


def _with_vocabulary(pair: Pair, size: int) -> Pair:
    """A pair of the same other shapes with random weights."""
    backends = []
    for backend in (pair.target, pair.draft):
        config = copy.deepcopy(backend.model.config)
        config.vocab_size, config.eos_token_id, config.pad_token_id, config.bos_token_id = size, None, None, None
        backends.append(make_backend(f"{backend.name}, {size} tokens", config, backend.device, backend.model.dtype))
    return Pair(backends[0], backends[1], has_text=False)


def _curve(axis: Axis, phase: str, points: dict[int, float]) -> Curve:
    sizes, ms = list(points), list(points.values())
    slope = 1000 * float(np.polyfit(sizes, ms, 1)[0]) if len(sizes) > 1 else None
    return Curve(axis, phase, sizes, ms, exponent(sizes, ms), slope)

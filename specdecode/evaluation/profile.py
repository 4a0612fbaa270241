"""A pair and prompts in, where the time of a round goes out, and how far each part is from what the device could do.

Plain decoding, drafts of several lengths and transformers' own `generate` answer the same prompts in turns.
"""

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from statistics import mean, median
from typing import Any

import numpy as np
import torch
from pydantic import Field, model_validator

from specdecode.backends.backend import Row, forget
from specdecode.config import StrictModel
from specdecode.decoding.distributions import Distributions
from specdecode.decoding.drafters import Drafter, NoDrafter
from specdecode.decoding.loop import check_sequence, step
from specdecode.decoding.sequence import Draft, Route, SamplingParams, Sequence
from specdecode.decoding.verification import accept
from specdecode.errors import ConfigError
from specdecode.evaluation.growth import Growth, GrowthConfig, measure_growth
from specdecode.evaluation.machine import device_name, machine, versions
from specdecode.evaluation.pairs import Pair, PairConfig, open_pair
from specdecode.evaluation.peers import PEERS, PeerName, peer_generate
from specdecode.evaluation.prompts import DOMAINS
from specdecode.evaluation.roofline import Limits, PassCost, Work, measure_limits
from specdecode.evaluation.stopwatch import (
    ACCEPTANCE,
    BETWEEN,
    DISTRIBUTIONS,
    DRAFT_PASS,
    DRAFTING,
    PHASES,
    VERIFY_PASS,
    Stopwatch,
    WatchedDrafter,
    WatchedModel,
)

PLAIN, HF_PLAIN = "plain", "hf_plain"


class ProfileConfig(StrictModel):
    """What `specdecode profile` measures."""

    pair: PairConfig
    K: list[int] = Field(default=[2, 4, 8], min_length=1, description="tokens drafted in a round, one way to decode for each")
    temperatures: list[float] = Field(default=[0.0, 1.0], min_length=1, description="0 is greedy")
    batch: int = Field(default=1, gt=0, description="how many sequences are decoded together")
    num_samples: int = Field(default=5, gt=0, description="prompts, each answered in every way; medians are over them")
    max_tokens: int = Field(default=64, gt=1, description="tokens of an answer, at the most")
    domain: str = Field(default="code", pattern=f"^({'|'.join(DOMAINS)})$", description="whose built-in prompts are answered")
    num_prompt_tokens: int = Field(default=64, gt=0, description="tokens of a prompt, for models without a tokenizer")
    simulate_acceptance: float | None = Field(
        default=None, ge=0, le=1, description="coin flips in place of verdicts: speed with weights that never agree"
    )
    is_remote: bool = Field(default=False, description="the draft in a process of its own, which adds the exchange")
    peers: list[PeerName] = Field(default=[], description="transformers' ways to generate that are measured beside")
    num_threads: int | None = Field(default=None, gt=0, description="CPU threads; torch's own choice if unset")
    growth: GrowthConfig | None = Field(default=None, description="time per round against batch, context, K and vocabulary")

    @model_validator(mode="after")
    def _is_consistent(self) -> "ProfileConfig":
        if min(self.K) < 1:
            raise ValueError(f"expected every K to be at least 1, as plain decoding is always measured, got {min(self.K)}")
        if min(self.temperatures) < 0:
            raise ValueError(f"expected every temperature to be at least 0, got {min(self.temperatures):g}")
        if self.peers and self.batch > 1:
            raise ValueError(f"peers: answer one prompt at a time, expected batch 1, got {self.batch}")
        return self


@dataclass(frozen=True)
class PhaseRow:
    """A part of a round: the median over rounds, and the least that the device could take for its bytes and operations."""

    temperature: float
    way: str
    phase: str
    ms: float
    share: float
    num_bytes: float
    floor_ms: float

    @property
    def to_floor(self) -> float | None:
        """How many times the floor it takes; None where hardly anything must be moved."""
        return self.ms / self.floor_ms if self.floor_ms else None


@dataclass(frozen=True)
class WayRow:
    """A way to decode; ratios are between answers to the same prompt: their median, and the least and largest.

    Attributes:
        tokens_per_second: the prompt's own pass included.
        to_plain, to_hf_plain: how many times as fast as plain decoding, and as transformers' plain `generate`.
        tokens_per_pass: of the target.
        acceptance: accepted of all drafted tokens; None for ways that do not tell.
        round_ms: the sum of the round's parts.
        pass_to_one: the time of a pass that verifies to that of one over a single token.
        num_different: greedy answers that are not plain decoding's; None where they may differ.
    """

    temperature: float
    way: str
    tokens_per_second: float
    to_plain: tuple[float, float, float]
    to_hf_plain: tuple[float, float, float] | None
    tokens_per_pass: float
    acceptance: float | None
    round_ms: float | None
    pass_to_one: float | None
    num_different: int | None


@dataclass(frozen=True)
class Profile:
    """All figures, and what they were measured on; `simulated_acceptance` is not None where verdicts were coin flips."""

    target: str
    draft: str
    device: str
    dtype: str
    simulated_acceptance: float | None
    limits: dict[str, Limits]
    ways: list[WayRow]
    phases: list[PhaseRow]
    growth: Growth | None
    config: dict[str, Any]
    versions: dict[str, str]
    machine: dict[str, Any]

    def as_json(self) -> dict[str, Any]:
        """As it is printed."""
        values = asdict(self)
        values["phases"] = [{**asdict(row), "to_floor": row.to_floor} for row in self.phases]
        return values


@dataclass
class _Answers:
    """One prompt, or one batch of them, answered one way."""

    tokens: list[list[int]]
    seconds: float
    num_passes: int
    num_drafted: int = 0
    num_accepted: int = 0
    rounds: list[dict[str, float]] = field(default_factory=list)  # seconds by phase, of whole drafts after the first round
    lengths: list[int] = field(default_factory=list)  # of the sequences in those rounds

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.tokens))

    @property
    def speed(self) -> float:
        return self.num_tokens / self.seconds


def measure_profile(config: ProfileConfig, tell: Callable[[int, int], None] | None = None) -> Profile:
    """Measures everything; `tell` hears how many of the answers and points are there, and of how many.

    Raises:
        ConfigError: a peer or the exchange does not fit the pair.
        ModelError: a model does not load.
        RequestError: a prompt and its answer do not fit the target.
    """
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    pair = open_pair(config.pair)
    with ExitStack() as stack:
        profiler = _Profiler(config, pair, stack, tell or (lambda _done, _count: None))
        return profiler.profile()


def simulated(rate: float, vocab_size: int, rng: np.random.Generator) -> Callable[..., tuple[list[int], list[list[int]]]]:
    """A verdict that takes the time of the true one, and then accepts by coin flips; its tokens are nobody's text."""

    def verdict(sequences: list[Sequence], drafts: list[Draft], p: Distributions) -> tuple[list[int], list[list[int]]]:
        _, added = accept(sequences, drafts, p)
        lengths = [int((rng.random(len(draft.tokens)) < rate).cumprod().sum()) for draft in drafts]
        last = [min(tokens[-1], vocab_size - 1) for tokens in added]
        return lengths, [[*d.tokens[:length], token] for d, length, token in zip(drafts, lengths, last, strict=True)]

    return verdict


class _Profiler:
    def __init__(self, config: ProfileConfig, pair: Pair, stack: ExitStack, tell: Callable[[int, int], None]) -> None:
        self._config, self._pair, self._tell = config, pair, tell
        self._check_peers()
        self._watch = Stopwatch(pair.target.device)
        self._target = stack.enter_context(WatchedModel(pair.target, self._watch, VERIFY_PASS, BETWEEN))
        drafter = pair.remote_drafter(config.num_threads, stack) if config.is_remote else pair.drafter(self._watch, stack)
        self._drafter: Drafter = WatchedDrafter(drafter, self._watch)
        self._depths = {PLAIN: 0, **{f"K={k}": k for k in config.K}}
        self._prompts = pair.prompts(config.domain, (1 + config.num_samples) * config.batch, config.num_prompt_tokens)
        rate, vocab_size = config.simulate_acceptance, min(pair.target.vocab_size, pair.draft.vocab_size)
        self._verdict = accept if rate is None else simulated(rate, vocab_size, np.random.default_rng(0))

    def profile(self) -> Profile:
        config, pair = self._config, self._pair
        target, draft = config.pair.names()
        ways = [*self._depths, *config.peers]
        num_answers = len(config.temperatures) * (1 + config.num_samples) * len(ways)
        num_points = config.growth.num_points if config.growth else 0
        answers: dict[tuple[float, str], list[_Answers]] = {}
        costs, limits, done = self._costs(), {}, 0
        for temperature in config.temperatures:
            limits = self._limits(costs)  # just before
            for sample in range(-1, config.num_samples):  # the first of which warms up
                shift = sample % len(ways)
                for way in ways[shift:] + ways[:shift]:
                    found = self._answer(way, temperature, sample)
                    if sample >= 0:
                        answers.setdefault((temperature, way), []).append(found)
                    done += 1
                    self._tell(done, num_answers + num_points)
        rows = [row for temperature in config.temperatures for row in self._ways(temperature, answers)]
        phases = [row for key, found in answers.items() for row in self._phases(*key, found, costs, limits)]
        growth = None
        if config.growth is not None:
            growth = measure_growth(
                config.growth, pair, lambda count: self._tell(num_answers + count, num_answers + num_points)
            )
        return Profile(
            target=target,
            draft=draft,
            device=device_name(pair.target.device),
            dtype=str(pair.target.model.dtype).removeprefix("torch."),
            simulated_acceptance=config.simulate_acceptance,
            limits=limits,
            ways=rows,
            phases=phases,
            growth=growth,
            config=config.model_dump(mode="json"),
            versions=versions(),
            machine=machine(),
        )

    def _check_peers(self) -> None:
        sizes = self._pair.target.vocab_size, self._pair.draft.vocab_size
        if "hf_assisted" in self._config.peers and sizes[0] != sizes[1]:
            raise ConfigError(
                f"peers: hf_assisted takes logits of one width, and the pair has {sizes[0]} and {sizes[1]}: leave it out"
            )

    def _answer(self, way: str, temperature: float, sample: int) -> _Answers:
        forget(self._pair.target, self._pair.draft)  # every way reads the whole prompt
        first = (1 + sample) * self._config.batch
        prompts = self._prompts[first : first + self._config.batch]
        params = SamplingParams(
            temperature=temperature,
            max_tokens=self._config.max_tokens,
            seed=1 + sample,
            ignore_eos=self._config.simulate_acceptance is not None,
        )
        if way not in self._depths:
            return self._answer_of_peer(way, prompts[0], params)
        sequences = [
            Sequence(prompt, replace(params, seed=1 + sample + 1000 * number), Route("draft", self._depths[way]))
            for number, prompt in enumerate(prompts)
        ]
        return self._decode(sequences, self._drafter if self._depths[way] else NoDrafter(), self._depths[way])

    def _decode(self, sequences: list[Sequence], drafter: Drafter, k: int) -> _Answers:
        for sequence in sequences:
            check_sequence(sequence, self._target)
        found = _Answers([], 0.0, 0)
        started = time.perf_counter()
        while unfinished := [sequence for sequence in sequences if sequence.finish_reason is None]:
            lengths = [len(sequence.tokens) for sequence in unfinished]
            is_first = found.num_passes == 0
            self._watch.start()
            rounds = step(unfinished, drafter, self._target, self._judge)
            self._watch.lap(BETWEEN)
            found.num_passes += 1
            found.num_drafted += sum(round.num_drafted for round in rounds)
            found.num_accepted += sum(round.num_accepted for round in rounds)
            if not is_first and len(unfinished) == len(sequences) and all(round.num_drafted == k for round in rounds):
                found.rounds.append(self._watch.read())
                found.lengths += lengths
        found.seconds = time.perf_counter() - started
        found.tokens = [sequence.tokens[sequence.num_prompt_tokens :] for sequence in sequences]
        return found

    def _judge(self, sequences: list[Sequence], drafts: list[Draft], p: Distributions) -> tuple[list[int], list[list[int]]]:
        self._watch.lap(DISTRIBUTIONS)
        found = self._verdict(sequences, drafts, p)
        self._watch.lap(ACCEPTANCE)
        return found

    def _answer_of_peer(self, way: str, prompt: list[int], params: SamplingParams) -> _Answers:
        assert way in PEERS
        models = self._pair.target.model, self._pair.draft.model
        answer = peer_generate(way, *models, prompt, params, max(self._config.K))
        return _Answers([answer.tokens], answer.times_s[-1], len(answer.round_tokens))

    def _costs(self) -> dict[str, PassCost]:
        """Of the target and the draft; the caches know what a token takes once one is in them."""
        costs = {}
        for name, backend in (("target", self._pair.target), ("draft", self._pair.draft)):
            backend.logits([Row("one", self._pair.random_prompts(1, 2)[0], 1)])
            costs[name] = PassCost.of(backend.model, backend.cache.num_bytes_per_token())
        return costs

    def _limits(self, costs: dict[str, PassCost]) -> dict[str, Limits]:
        """The device's, for the bytes of a pass of each model, and of the logits of a round."""
        device, dtype = self._pair.target.device, self._pair.target.model.dtype
        sizes = {name: cost.work(self._config.batch, 1, 0).num_bytes for name, cost in costs.items()}
        sizes["logits"] = 4 * self._pair.target.vocab_size * self._config.batch * (max(self._config.K) + 1)
        return {name: measure_limits(size, device, dtype) for name, size in sizes.items()}

    def _phases(
        self, temperature: float, way: str, answers: list[_Answers], costs: dict[str, PassCost], limits: dict[str, Limits]
    ) -> list[PhaseRow]:
        rounds = [round for found in answers for round in found.rounds]
        if not rounds:
            return []
        batch, k, length = self._config.batch, self._depths[way], mean(n for found in answers for n in found.lengths)
        logits_bytes = 4.0 * batch * self._pair.target.vocab_size
        work = {
            DRAFT_PASS: ("draft", costs["draft"].work(batch, 1, int(length)) * k),
            DRAFTING: ("logits", Work(logits_bytes) * k),
            VERIFY_PASS: ("target", costs["target"].work(batch, k + 1, int(length))),
            DISTRIBUTIONS: ("logits", Work(logits_bytes) * (k + 1)),
        }
        times = {phase: median(round.get(phase, 0.0) for round in rounds) for phase in PHASES}
        rows = []
        for phase in (phase for phase in PHASES if times[phase] and (k or phase != DRAFTING)):
            name, needed = work.get(phase, ("logits", Work()))
            floor_ms = 1000 * limits[name].floor_s(needed)
            share = times[phase] / sum(times.values())
            rows.append(PhaseRow(temperature, way, phase, 1000 * times[phase], share, needed.num_bytes, floor_ms))
        return rows

    def _ways(self, temperature: float, answers: dict[tuple[float, str], list[_Answers]]) -> list[WayRow]:
        mine = {way: found for (t, way), found in answers.items() if t == temperature}
        one = _pass_ms(mine[PLAIN])
        rows = []
        for way in [*self._depths, *self._config.peers]:
            found, spent = mine[way], _pass_ms(mine[way])
            num_drafted = sum(answer.num_drafted for answer in found)
            is_exact = temperature == 0 and self._config.simulate_acceptance is None
            rows.append(
                WayRow(
                    temperature=temperature,
                    way=way,
                    tokens_per_second=median(answer.speed for answer in found),
                    to_plain=_ratios(found, mine[PLAIN]),
                    to_hf_plain=_ratios(found, mine[HF_PLAIN]) if HF_PLAIN in mine else None,
                    tokens_per_pass=sum(a.num_tokens for a in found) / sum(a.num_passes for a in found) / self._config.batch,
                    acceptance=sum(answer.num_accepted for answer in found) / num_drafted if num_drafted else None,
                    round_ms=_round_ms(found),
                    pass_to_one=spent / one if spent and one else None,
                    num_different=_num_different(found, mine[PLAIN]) if is_exact else None,
                )
            )
        return rows


def _pass_ms(answers: list[_Answers]) -> float | None:
    times = [round[VERIFY_PASS] for found in answers for round in found.rounds]
    return 1000 * median(times) if times else None


def _round_ms(answers: list[_Answers]) -> float | None:
    times = [sum(round.values()) for found in answers for round in found.rounds]
    return 1000 * median(times) if times else None


def _ratios(ones: list[_Answers], others: list[_Answers]) -> tuple[float, float, float]:
    ratios = [one.speed / other.speed for one, other in zip(ones, others, strict=True)]
    return median(ratios), min(ratios), max(ratios)


def _num_different(ones: list[_Answers], others: list[_Answers]) -> int:
    return sum(one.tokens != other.tokens for one, other in zip(ones, others, strict=True))

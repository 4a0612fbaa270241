"""Sampling parameters in, milliseconds out: what a round costs beside the models' forward passes.

The models are tables of logits as wide as a real vocabulary, so that all else is as it is with real ones: constraints,
penalties, temperature and cuts, random numbers, drafting token by token, verification, and the Python between.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from pydantic import Field

from specdecode.backends.backend import ModelBackend, Row, create_backend
from specdecode.backends.huggingface import HuggingFaceBackend
from specdecode.config import StrictModel
from specdecode.decoding.constraints import Scored, constrain
from specdecode.decoding.distributions import Distributions
from specdecode.decoding.drafters import ModelDrafter, NoDrafter
from specdecode.decoding.loop import as_drafter, generate, step
from specdecode.decoding.sequence import Route, SamplingParams
from specdecode.decoding.sequence import Sequence as DecodedSequence
from specdecode.decoding.verification import accept
from specdecode.evaluation.prompts import load_prompts
from specdecode.text import Tokenizer


class OverheadConfig(StrictModel):
    """What `specdecode overhead` measures."""

    vocab_size: int = Field(default=152_064, gt=1, description="the width of the logits")
    batch: int = Field(default=16, gt=0, description="how many sequences are decoded together")
    K: int = Field(default=5, ge=0, description="tokens drafted in a round")
    length: int = Field(default=1024, gt=0, description="tokens of each sequence, which penalties look at")
    num_rounds: int = Field(default=15, gt=0, description="rounds measured, of which the median is taken")
    target: str = Field(default="tiny/target", description="the target of the pair whose share is measured")
    draft: str = Field(default="tiny/draft-code", description="its draft")
    num_threads: int | None = Field(default=None, gt=0, description="CPU threads; torch's own choice if unset")


_PENALTIES: dict[str, Any] = {"repetition_penalty": 1.1, "presence_penalty": 0.3, "frequency_penalty": 0.2, "min_tokens": 4}
SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "greedy, all penalties": _PENALTIES,
    "top-p, all penalties": {**_PENALTIES, "temperature": 1.0, "top_p": 0.95},
    "top-p, top-k, min-p, all penalties": {**_PENALTIES, "temperature": 1.0, "top_p": 0.95, "top_k": 50, "min_p": 0.01},
    "temperature, all penalties": {**_PENALTIES, "temperature": 1.0},
    "top-p, all penalties, block": {**_PENALTIES, "temperature": 1.0, "top_p": 0.95, "verifier": "block"},
    "top-p, all penalties, coupled": {**_PENALTIES, "temperature": 1.0, "top_p": 0.95, "verifier": "coupled"},
}


@dataclass(frozen=True)
class OverheadRow:
    """The median milliseconds of one setting's round without forward passes, and of its parts.

    Attributes:
        total_ms: the round.
        draft_ms: drafting.
        constrain_ms: constraints and penalties of the target's logits.
        normalise_ms: temperature, cuts and normalisation of the target's logits.
        accept_ms: verification and the token after it.
        kept: how many tokens the cuts leave, on average.
    """

    setting: str
    total_ms: float
    draft_ms: float
    constrain_ms: float
    normalise_ms: float
    accept_ms: float
    kept: float


@dataclass(frozen=True)
class ShareRow:
    """What a real pair's rounds take, and the part of it that is not in a forward pass."""

    setting: str
    batch: int
    round_ms: float
    other_ms: float


def measure_overhead(config: OverheadConfig) -> Iterator[OverheadRow]:
    """Yields a row for each setting."""
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    logits = zipf_logits(config.batch * (config.K + 1), config.vocab_size)
    for setting, options in SETTINGS.items():
        yield _measure(config, setting, SamplingParams(max_tokens=2 * config.length, seed=0, **options), logits)


def measure_share(config: OverheadConfig) -> Iterator[ShareRow]:
    """Yields what a real pair's rounds take, alone and as a batch, greedy and sampled."""
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    target, draft = (Timed(create_backend(name)) for name in (config.target, config.draft))
    tokenizer = Tokenizer(config.target)
    prompts = [prompt.encode(tokenizer) for prompt in load_prompts("code")]
    drafter = as_drafter(draft, target)
    for batch in (1, config.batch):
        for setting in ("greedy", "greedy, all penalties", "top-p, all penalties"):
            params = SamplingParams(max_tokens=10_000, seed=0, ignore_eos=True, **SETTINGS[setting])
            sequences = [
                DecodedSequence(prompts[number % len(prompts)], params, Route("draft", config.K)) for number in range(batch)
            ]
            round_s: list[float] = []
            other_s: list[float] = []
            for _ in range(2 + config.num_rounds):
                with _measured(round_s), _measured(other_s, target, draft):
                    step(sequences, drafter, target)
            yield ShareRow(setting, batch, 1000 * median(round_s[2:]), 1000 * median(other_s[2:]))


class Timed:
    """A backend that counts the seconds that its forward passes take; of a transformers model, the module's alone."""

    def __init__(self, backend: ModelBackend) -> None:
        self.name = backend.name
        self.vocab_size = backend.vocab_size
        self.max_length = backend.max_length
        self.eos_token_ids = backend.eos_token_ids
        self.vocabulary_id = backend.vocabulary_id
        self.total_s = 0.0
        self._backend = backend
        self._is_hooked = isinstance(backend, HuggingFaceBackend)
        if isinstance(backend, HuggingFaceBackend):
            backend.model.register_forward_pre_hook(self._begin)
            backend.model.register_forward_hook(self._end)

    def logits(self, rows: Sequence[Row]) -> torch.Tensor:
        """See `ModelBackend.logits`."""
        if self._is_hooked:
            return self._backend.logits(rows)
        self._begin()
        logits = self._backend.logits(rows)
        self._end()
        return logits

    def num_remembered(self, tokens: list[int]) -> int:
        """See `ModelBackend.num_remembered`."""
        return self._backend.num_remembered(tokens)

    def _begin(self, *_: object) -> None:
        self.total_s -= time.perf_counter()

    def _end(self, *_: object) -> None:
        self.total_s += time.perf_counter()


class LogitsTable:
    """A `ModelBackend` that returns given logits, [n, vocab], in turn, whatever the tokens."""

    def __init__(self, logits: torch.Tensor) -> None:
        self.name = "table of logits"
        self.vocab_size = logits.shape[1]
        self.max_length = 1 << 20
        self.eos_token_ids = frozenset({0})
        self.vocabulary_id = f"{self.vocab_size} tokens"
        self._logits = logits
        self._room = logits.clone()  # memory that is taken already, as a model's own buffers are
        self._next = 0

    def logits(self, rows: Sequence[Row]) -> torch.Tensor:
        """See `ModelBackend.logits`."""
        count = sum(row.num_scored for row in rows)
        start = self._next if self._next + count <= len(self._logits) else 0
        self._next = start + count
        return self._room[:count].copy_(self._logits[start : self._next])

    def num_remembered(self, tokens: list[int]) -> int:  # noqa: ARG002
        """See `ModelBackend.num_remembered`."""
        return 0


def zipf_logits(num_rows: int, vocab_size: int, exponent: float = 1.5) -> torch.Tensor:
    """Logits, [num_rows, vocab_size], whose tokens are as likely as 1 / rank^exponent, in a random order."""
    generator = torch.Generator().manual_seed(0)
    ordered = -exponent * torch.arange(1, vocab_size + 1, dtype=torch.float64).log().float()
    return torch.stack([ordered[torch.randperm(vocab_size, generator=generator)] for _ in range(num_rows)])


@dataclass(frozen=True)
class PrefixRow:
    """The first token of an answer, where nothing of the prompt is remembered and where another request shared its beginning.

    Attributes:
        num_shared: tokens that the two prompts share.
        num_computed: prompt tokens that went through the model.
        ttft_ms: the median time to the first token.
    """

    num_shared: int
    num_computed: int
    ttft_ms: float


def measure_prefix_reuse(config: OverheadConfig, num_shared: int = 1000, num_new: int = 24) -> Iterator[PrefixRow]:
    """Yields the time to the first token without and with a remembered prefix, taken in turns."""
    target = HuggingFaceBackend(config.target)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(
        target.vocab_size, (num_shared + (2 + 2 * config.num_rounds) * num_new,), generator=generator
    ).tolist()
    shared, rest = tokens[:num_shared], tokens[num_shared:]
    times: dict[int, list[float]] = {0: [], num_shared: []}
    num_computed: dict[int, int] = {}
    for turn in range(1 + config.num_rounds):
        target.cache.clear()
        for place, shares in enumerate((0, num_shared)):
            start = (2 * turn + place) * num_new
            sequence = DecodedSequence(shared + rest[start : start + num_new], SamplingParams(max_tokens=1))
            before = target.num_computed_tokens
            with _measured(times[shares]):
                list(generate([sequence], NoDrafter(), target))
            num_computed[shares] = target.num_computed_tokens - before
    for shares, seconds in times.items():
        yield PrefixRow(shares, num_computed[shares], 1000 * median(seconds[1:]))


def zipf_tokens(num_rows: int, length: int, vocab_size: int) -> list[list[int]]:
    """Sequences whose tokens are as frequent as 1 / rank, as those of texts are."""
    weights = 1 / torch.arange(1, vocab_size + 1, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    return torch.multinomial(weights.expand(num_rows, -1), length, replacement=True, generator=generator).tolist()


def _measure(config: OverheadConfig, setting: str, params: SamplingParams, logits: torch.Tensor) -> OverheadRow:
    target, draft = Timed(LogitsTable(logits)), Timed(LogitsTable(logits))
    drafter = ModelDrafter(draft, eos_token_ids=frozenset())
    prompts = zipf_tokens(config.batch, config.length, config.vocab_size)
    times: dict[str, list[float]] = {name: [] for name in ("total", "draft", "constrain", "both", "accept")}
    kept = 0.0
    for _ in range(2 + config.num_rounds):  # of which the first two warm up
        sequences = [
            DecodedSequence(prompt, params, Route("draft", config.K), num_prompt_tokens=config.length // 2)
            for prompt in prompts
        ]
        for sequence in sequences:
            sequence.counts  # noqa: B018  a sequence that has been decoded for long has counted its tokens
        with _measured(times["total"], target, draft):
            step(sequences, drafter, target)
        with _measured(times["draft"], draft):
            drafts = drafter.propose(sequences)
        scored = [Scored(s, guess.tokens, len(guess.tokens) + 1) for s, guess in zip(sequences, drafts, strict=True)]
        rows = [Row(part.sequence.id, part.tokens, part.num_scored) for part in scored]
        fresh = target.logits(rows)
        with _measured(times["constrain"]):
            constrain(fresh, scored, target.eos_token_ids)
        fresh = target.logits(rows)
        with _measured(times["both"]):
            p = Distributions.of(fresh, scored, target.eos_token_ids)
        with _measured(times["accept"]):
            accept(sequences, drafts, p)
        kept = float((p.dense(torch.arange(config.batch)) > 0).sum()) / config.batch
    medians = {name: 1000 * median(values[2:]) for name, values in times.items()}
    return OverheadRow(
        setting=setting,
        total_ms=medians["total"],
        draft_ms=medians["draft"],
        constrain_ms=medians["constrain"],
        normalise_ms=medians["both"] - medians["constrain"],
        accept_ms=medians["accept"],
        kept=kept,
    )


@contextmanager
def _measured(times: list[float], *models: "Timed") -> Iterator[None]:
    """Appends the seconds that the block takes, without those of the models' forward passes."""
    before, started = sum(model.total_s for model in models), time.perf_counter()
    yield
    times.append(time.perf_counter() - started - sum(model.total_s for model in models) + before)

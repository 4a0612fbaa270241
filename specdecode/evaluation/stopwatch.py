"""Laps in, seconds of each phase of a round out; on a GPU by its own clock, so that nothing has to wait for the host."""

import time
from collections import defaultdict
from collections.abc import Sequence as Several
from typing import Any

import torch

from specdecode.backends.backend import ModelBackend, Row
from specdecode.backends.huggingface import HuggingFaceBackend
from specdecode.decoding.drafters import Drafter
from specdecode.decoding.sequence import Draft, Sequence
from specdecode.exchange.remote import RemoteDrafter

DRAFT_PASS, DRAFTING, EXCHANGE = "draft pass", "draft distributions", "exchange"
VERIFY_PASS, DISTRIBUTIONS, ACCEPTANCE, BETWEEN = "verify pass", "distributions", "acceptance", "Python between"
PHASES = (DRAFT_PASS, DRAFTING, EXCHANGE, VERIFY_PASS, DISTRIBUTIONS, ACCEPTANCE, BETWEEN)


class Stopwatch:
    """Gives the time since the last lap to a phase.

    On a GPU a lap is an event in its stream: the time between two is what the device worked, or waited for the host.
    """

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._laps: list[tuple[str, Any]] = []
        self._moved: list[tuple[str, str, float]] = []

    def start(self) -> None:
        """Begins a round."""
        self._laps, self._moved = [("", self._now())], []

    def lap(self, phase: str) -> None:
        """Ends a part of it that belongs to `phase`."""
        self._laps.append((phase, self._now()))

    def move(self, source: str, phase: str, seconds: float) -> None:
        """Counts a part of a phase under another one."""
        self._moved.append((source, phase, seconds))

    def read(self) -> dict[str, float]:
        """The seconds of each phase of the round."""
        if self._is_cuda:
            torch.cuda.synchronize()
        seconds: dict[str, float] = defaultdict(float)
        for (_, before), (phase, now) in zip(self._laps, self._laps[1:], strict=False):
            seconds[phase] += before.elapsed_time(now) / 1000 if self._is_cuda else now - before
        for source, phase, part in self._moved:
            seconds[source] -= part
            seconds[phase] += part
        return dict(seconds)

    def _now(self) -> Any:
        if not self._is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class WatchedModel:
    """A backend whose passes are laps; of a transformers model, the module's alone, and what is around it is Python between.

    Args:
        backend: the model.
        watch: what is told.
        phase: of its passes.
        before: the phase that ends where it is called.
    """

    def __init__(self, backend: ModelBackend, watch: Stopwatch, phase: str, before: str) -> None:
        self.name = backend.name
        self.vocab_size = backend.vocab_size
        self.max_length = backend.max_length
        self.eos_token_ids = backend.eos_token_ids
        self._backend = backend
        self._watch = watch
        self._phase = phase
        self._before = before
        self._is_hooked = isinstance(backend, HuggingFaceBackend)
        self._hooks: list[Any] = []

    @property
    def vocabulary_id(self) -> str:
        """See `ModelBackend.vocabulary_id`."""
        return self._backend.vocabulary_id

    def logits(self, rows: Several[Row]) -> torch.Tensor:
        """See `ModelBackend.logits`."""
        self._watch.lap(self._before)
        logits = self._backend.logits(rows)
        self._watch.lap(BETWEEN if self._is_hooked else self._phase)
        return logits

    def num_remembered(self, tokens: list[int]) -> int:
        """See `ModelBackend.num_remembered`."""
        return self._backend.num_remembered(tokens)

    def __enter__(self) -> "WatchedModel":
        if isinstance(self._backend, HuggingFaceBackend):
            model = self._backend.model
            self._hooks = [
                model.register_forward_pre_hook(lambda *_: self._watch.lap(BETWEEN)),
                model.register_forward_hook(lambda *_: self._watch.lap(self._phase)),
            ]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()


class WatchedDrafter:
    """A drafter whose end is a lap; of one elsewhere, the draft's own work and the exchange are told apart."""

    def __init__(self, drafter: Drafter, watch: Stopwatch) -> None:
        self._drafter = drafter
        self._watch = watch

    def propose(self, sequences: list[Sequence]) -> list[Draft]:
        """See `Drafter.propose`."""
        drafts = self._drafter.propose(sequences)
        if isinstance(self._drafter, RemoteDrafter):
            self._watch.lap(EXCHANGE)
            self._watch.move(EXCHANGE, DRAFT_PASS, self._drafter.metrics.last_busy_s)
        else:
            self._watch.lap(DRAFTING)
        return drafts

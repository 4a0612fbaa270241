"""Questions in, a record for each answer out: every cell in turns, each of them reading the whole prompt."""

import os
import platform
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch

from specdecode.backends.backend import ModelBackend, forget, open_model
from specdecode.backends.huggingface import HuggingFaceBackend
from specdecode.chance import chance
from specdecode.decoding.control import AdaptiveLength, FixedLength, LengthPolicy
from specdecode.decoding.drafters import Drafter, ModelDrafter, NoDrafter, RoutedDrafter
from specdecode.decoding.loop import end_at, generate
from specdecode.decoding.metrics import DecodingMetrics
from specdecode.decoding.sequence import Route, SamplingParams, Sequence
from specdecode.errors import SpecDecodeError
from specdecode.evaluation.datasets import Item
from specdecode.evaluation.peers import PEERS, peer_generate
from specdecode.evaluation.quality import is_right, perplexity
from specdecode.evaluation.records import Record
from specdecode.evaluation.suite import AUTO, GENERIC, NONE, OWN, BenchmarkConfig, Cell, cells
from specdecode.parts import part_path
from specdecode.routing.forecast import Forecast
from specdecode.routing.pending import PendingForecasts
from specdecode.routing.router import AdaptiveRouter
from specdecode.rows import write_rows
from specdecode.text import StopCriterion, Tokenizer

_WARM_UP_TOKENS = 16


@dataclass
class _Asked:
    """A question that is being answered: the conversation so far."""

    dataset: str
    item: Item
    answers: list[str] = field(default_factory=list)

    def messages(self) -> list[dict[str, str]]:
        """Turns and answers up to the turn that is to be answered next."""
        told = []
        for turn, answer in zip(self.item.turns, self.answers, strict=False):
            told += [{"role": "user", "content": turn}, {"role": "assistant", "content": answer}]
        return [*told, {"role": "user", "content": self.item.turns[len(self.answers)]}]


class Runner:
    """Holds the models; measures a part's cells and writes the records.

    Args:
        config: a `BenchmarkConfig` as a dictionary, as it travels between processes.
        folder: where the parts go.

    Raises:
        ModelError: a model does not load.
    """

    def __init__(self, config: dict[str, Any], folder: str) -> None:
        self._config = settings = BenchmarkConfig.model_validate(config)
        self._folder = folder
        if settings.num_threads is not None:
            torch.set_num_threads(settings.num_threads)
        self._cells = cells(settings)
        self._tokenizer = Tokenizer(settings.target.model)
        self._target = open_model(settings.target)
        named = {cell.draft for cell in self._cells}
        self._drafts = {
            name: open_model(settings.target.model_copy(update={"model": model, "tp": 1}))
            for name, model in settings.drafts.items()
            if name in named or named & {OWN, AUTO}  # which may be any of them
        }
        drafters: dict[str, Drafter] = {name: ModelDrafter.between(draft, self._target) for name, draft in self._drafts.items()}
        self._drafter = RoutedDrafter({NONE: NoDrafter(), **drafters})
        self._router: AdaptiveRouter | None = None
        if AUTO in named:
            assert settings.routing is not None, "BenchmarkConfig has checked it"
            self._router = AdaptiveRouter.from_config(settings.routing, list(self._drafts))
        self._lengths: dict[Cell, LengthPolicy] = {}
        self._verdicts: dict[tuple[str, str, str], bool | None] = {}
        self._worker = f"{platform.node()}:{os.getpid()}"
        self._place = 0
        self._is_warm = False

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Takes a part's `number` and its `items`; returns the number, and how many records and errors there are."""
        items = [(name, Item(**_as_tuples(item))) for name, item in row["items"]]
        records = list(self.records(row["number"], items))
        write_rows(part_path(self._folder, row["number"]), records, Record)
        return {"number": row["number"], "num_records": len(records), "num_errors": sum(r.error is not None for r in records)}

    def records(self, part: int, items: list[tuple[str, Item]]) -> Iterator[Record]:
        """Every cell on every question; each group of questions is begun with another cell."""
        if not self._is_warm:
            for cell in self._cells:
                self._measure(cell, [_Asked(*items[0])], 0, "warm-up", _WARM_UP_TOKENS)
            self._is_warm = True
        number = 0
        for batch in sorted(set(self._config.batches)):
            mine = [cell for cell in self._cells if cell.batch == batch]
            for start in range(0, len(items), batch):
                group = items[start : start + batch]
                for repeat in range(self._config.num_repeats):
                    shift = (part + number) % len(mine)
                    for cell in mine[shift:] + mine[:shift]:
                        asked = [_Asked(*one) for one in group]
                        yield from self._judged(cell, asked, repeat, f"{part}.{number}.{self._cells.index(cell)}")
                    number += 1

    def _judged(self, cell: Cell, asked: list[_Asked], repeat: int, group: str) -> Iterator[Record]:
        for record, one, prompt in self._measure(cell, asked, repeat, group, self._config.max_new_tokens):
            if record.error is None:
                yield replace(record, **self._quality(record, one, prompt))
            else:
                yield record

    def _measure(
        self, cell: Cell, asked: list[_Asked], repeat: int, group: str, max_tokens: int
    ) -> list[tuple[Record, _Asked, list[int]]]:
        """Answers all turns of a group of questions, turn by turn; what fails is a record that says so."""
        found: list[tuple[Record, _Asked, list[int]]] = []
        for turn in range(max(len(one.item.turns) for one in asked)):
            open_ones = [one for one in asked if turn < len(one.item.turns)]
            about = {"turn": turn, "repeat": repeat, "group": f"{group}.{turn}", "num_together": len(open_ones)}
            records = [_empty(cell, one, **about, place=self._place, worker=self._worker) for one in open_ones]
            self._place += 1
            try:
                prompts = [self._encode(one) for one in open_ones]
                records = [replace(r, num_prompt_tokens=len(p)) for r, p in zip(records, prompts, strict=True)]
                measured = self._decode(cell, open_ones, prompts, records, max_tokens)
            except (SpecDecodeError, RuntimeError) as error:  # such as torch's, out of memory
                reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
                return [
                    *found,
                    *((replace(record, error=reason), one, []) for record, one in zip(records, open_ones, strict=True)),
                ]
            for one, record in zip(open_ones, measured, strict=True):
                one.answers.append(self._tokenizer.decode(record.tokens))
            found += zip(measured, open_ones, prompts, strict=True)
        return found

    def _encode(self, one: _Asked) -> list[int]:
        if one.item.format == "raw":
            return self._tokenizer.encode(one.item.turns[0])
        return self._tokenizer.encode_chat(one.messages())

    def _decode(
        self, cell: Cell, asked: list[_Asked], prompts: list[list[int]], records: list[Record], max_tokens: int
    ) -> list[Record]:
        forget(self._target, *self._drafts.values())  # every way to decode reads the whole prompt
        sampled = [self._params(cell, record, max_tokens) for record in records]
        if cell.experiment in PEERS:
            [one], [prompt], [params], [record] = asked, prompts, sampled, records
            return [self._peer(cell, one, prompt, params, record)]
        started = time.perf_counter()
        length, routed = self._length(cell), list[float]()
        if cell.draft == AUTO:
            pending = self._begin(asked, prompts)
            pending.add_done_callback(lambda _: routed.append(time.perf_counter() - started))
            length = PendingForecasts(pending, cell.K, length)
        routes = [Route(self._draft_of(cell, one.item), cell.K) for one in asked]
        sequences = [Sequence(*one) for one in zip(prompts, sampled, routes, strict=True)]
        places = {sequence.id: place for place, sequence in enumerate(sequences)}
        stops = [self._stop(one.item) for one in asked]
        metrics = [DecodingMetrics() for _ in sequences]
        times: list[list[float]] = [[] for _ in sequences]
        round_tokens: list[list[int]] = [[] for _ in sequences]
        for rounds in generate(sequences, self._drafter, self._target, length):
            for sequence, round in rounds:
                place = places[sequence.id]
                if stop := stops[place]:
                    round = end_at(sequence, round, stop.feed(round.tokens))
                elapsed = time.perf_counter() - started
                metrics[place].add(round, elapsed)
                times[place].append(elapsed)
                round_tokens[place].append(len(round.tokens))
        group_time_s = time.perf_counter() - started
        return [
            replace(
                record,
                tokens=sequence.tokens[sequence.num_prompt_tokens :],
                drafter=max(found.verdicts, key=lambda name: found.verdicts[name].num_drafts, default=NONE),
                round_tokens=gave,
                num_drafts=found.num_drafts,
                num_drafted=found.num_drafted,
                num_accepted=found.num_accepted,
                num_drafted_at=found.num_drafted_at,
                num_accepted_at=found.num_accepted_at,
                draft_time_s=found.draft_time_s,
                verify_time_s=found.verify_time_s,
                route_time_s=routed[0] if routed else 0.0,
                ttft_s=found.time_to_first_token_s,
                latency_s=found.total_time_s,
                gaps_s=_gaps(came),
                group_time_s=group_time_s,
            )
            for record, sequence, found, came, gave in zip(records, sequences, metrics, times, round_tokens, strict=True)
        ]

    def _peer(self, cell: Cell, one: _Asked, prompt: list[int], params: SamplingParams, record: Record) -> Record:
        target, draft = (_transformers_model(b) for b in (self._target, self._drafts.get(cell.draft)))
        assert target is not None
        assert cell.experiment in PEERS
        answer = peer_generate(cell.experiment, target, draft, prompt, params, cell.K, self._stop(one.item))
        return replace(
            record,
            tokens=answer.tokens,
            drafter=cell.draft,
            round_tokens=answer.round_tokens,
            ttft_s=answer.times_s[0],
            latency_s=answer.times_s[-1],
            gaps_s=_gaps(answer.times_s),
            group_time_s=answer.times_s[-1],
        )

    def _begin(self, asked: list[_Asked], prompts: list[list[int]]) -> Future[list[Forecast]]:
        assert self._router is not None
        texts = [one.item.turns[len(one.answers)] for one in asked]
        return self._router.begin(texts, [len(prompt) for prompt in prompts], [one.item.format == "chat" for one in asked])

    def _stop(self, item: Item) -> StopCriterion | None:
        return StopCriterion(self._tokenizer, item.stops) if item.stops else None

    def _draft_of(self, cell: Cell, item: Item) -> str:
        if cell.draft != OWN:
            return cell.draft
        if item.domain in self._config.draft_models:
            return item.domain
        return GENERIC if self._config.generic_draft is not None else next(iter(self._config.draft_models))

    def _length(self, cell: Cell) -> LengthPolicy:
        """What has learned from the cell's answers so far, as it would in a server."""
        adapts = cell.draft == AUTO or self._config.draft_length == "adaptive"
        return self._lengths.setdefault(cell, AdaptiveLength() if adapts else FixedLength())

    def _params(self, cell: Cell, record: Record, max_tokens: int) -> SamplingParams:
        """The same random numbers for the same question in every cell; a router's answer may change its draft, and has none."""
        seed = int(chance(f"{self._config.seed}:{record.question}") * 2**62)
        room = self._target.max_length - record.num_prompt_tokens
        return SamplingParams(
            max_tokens=max(1, min(max_tokens, room)),
            temperature=cell.temperature,
            seed=None if cell.temperature == 0 or cell.draft == AUTO else seed,
            verifier=cell.verifier,
        )

    def _quality(self, record: Record, one: _Asked, prompt: list[int]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if self._config.quality.judge and record.turn == len(one.item.turns) - 1:
            answer = one.answers[record.turn]
            key = (record.dataset, record.item, answer)
            if key not in self._verdicts:
                self._verdicts[key] = is_right(one.item, _without_stop(answer, one.item.stops), self._config.quality.sandbox)
            found["is_right"] = self._verdicts[key]
        if self._config.quality.perplexity:
            found["perplexity"] = perplexity(self._target, prompt, record.tokens)
        return found


def _empty(cell: Cell, one: _Asked, **about: Any) -> Record:
    item = one.item
    where: dict[str, Any] = {"dataset": one.dataset, "item": item.id, "domain": item.domain, "category": item.category}
    return Record(**asdict(cell), **where, **about)


def _transformers_model(backend: ModelBackend | None) -> Any:
    return backend.model if isinstance(backend, HuggingFaceBackend) else None


def _as_tuples(item: dict[str, Any]) -> dict[str, Any]:
    """An item's values as they were before they travelled: lists are tuples."""
    return {name: value if isinstance(value, str) else tuple(value) for name, value in item.items()}


def _gaps(times: list[float]) -> list[float]:
    return [after - before for before, after in pairwise(times)]


def _without_stop(answer: str, stops: Iterable[str]) -> str:
    """The answer up to the first text that ends it."""
    ends = [place for stop in stops if (place := answer.find(stop)) >= 0]
    return answer[: min(ends, default=len(answer))]

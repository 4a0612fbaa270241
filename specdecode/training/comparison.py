"""Drafts of one target in, how well each of them guesses in each domain out.

On held-out documents, and on what the target answers to held-out prompts: what each draft would have guessed of it is counted
without decoding; how fast it makes the target is measured by decoding, each draft and none in turns.
"""

import statistics
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
from pydantic import Field

from specdecode.backends.backend import ModelBackend, create_backend
from specdecode.config import StrictModel
from specdecode.decoding.drafters import Drafter, ModelDrafter, NoDrafter
from specdecode.decoding.sequence import SamplingParams
from specdecode.embedded import resolve_model
from specdecode.errors import ConfigError
from specdecode.training.acceptance import Scores, score
from specdecode.training.checkpoints import load_model, load_tokenizer
from specdecode.training.completions import complete
from specdecode.training.data import DataConfig
from specdecode.training.documents import Document, is_held_out, load_documents
from specdecode.training.examples import Example, Formatter
from specdecode.training.prompts import sample_all_prompts, share_out


class ComparisonConfig(StrictModel):
    """Which drafts, on what."""

    target: str
    drafts: dict[str, str] = Field(min_length=1, description="the drafts' models, by the name to show")
    domains: dict[str, DataConfig] = Field(min_length=1, description="where the texts and prompts of each domain come from")
    K: int = Field(default=4, gt=0)
    num_prompts: int = Field(default=60, gt=0, description="prompts, and documents, of each domain")
    max_prompt_length: int = Field(default=160, gt=0)
    max_new_tokens: int = Field(default=128, gt=0)
    max_text_length: int = Field(default=512, gt=1, description="tokens of a document that are read")
    num_timed: int = Field(default=8, ge=0, description="how many of the prompts are decoded to measure the speed")
    seed: int = 0


@dataclass(frozen=True)
class Comparison:
    """A draft in a domain.

    Attributes:
        domain, draft: their names.
        text: on the domain's held-out documents.
        sampled: on what the target answers to held-out prompts at temperature 1.
        greedy: on what it answers greedily.
        speed_up: tokens per second by those of plain decoding, greedily, one stream; None if it was not measured.
    """

    domain: str
    draft: str
    text: Scores
    sampled: Scores
    greedy: Scores
    speed_up: float | None


COLUMNS = (
    "domain",
    "draft",
    "text: loss",
    "text: entropy",
    "text: acceptance",
    "text: tokens",
    "sampled: acceptance",
    "sampled: tokens",
    "greedy: agreement",
    "greedy: tokens",
    "speed",
)


def cells(row: Comparison) -> tuple[str, ...]:
    """A row as it is shown under `COLUMNS`; tokens are those of a round."""
    return (
        row.domain,
        row.draft,
        f"{row.text.loss:.3f}",
        f"{row.text.entropy:.3f}",
        f"{row.text.acceptance:.3f}",
        f"{row.text.accepted_length:.2f}",
        f"{row.sampled.acceptance:.3f}",
        f"{row.sampled.accepted_length:.2f}",
        f"{row.greedy.agreement:.3f}",
        f"{row.greedy.greedy_length:.2f}",
        "" if row.speed_up is None else f"{row.speed_up:.2f}x",
    )


def as_markdown(rows: Iterable[Comparison]) -> str:
    """The rows as a table in Markdown."""
    lines = [COLUMNS, ("---",) * len(COLUMNS), *map(cells, rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def compare(config: ComparisonConfig) -> Iterator[Comparison]:
    """Yields a row for each domain and draft.

    Raises:
        ConfigError: the data are not there.
        ModelError: a model does not load.
    """
    folder = resolve_model(config.target)
    target, backend, formatter = load_model(folder).eval(), create_backend(folder), Formatter(load_tokenizer(folder))
    drafts = {name: load_model(resolve_model(model)).eval() for name, model in config.drafts.items()}
    drafters: dict[str, Drafter] = {
        name: ModelDrafter.between(create_backend(resolve_model(model)), backend) for name, model in config.drafts.items()
    }
    for domain, data in config.domains.items():
        documents = {source: load_documents(source, data.data_dir) for source in data.sources}
        texts = _held_out_texts(documents, data, formatter, config)
        rng = np.random.default_rng(config.seed)
        sampled_prompts = sample_all_prompts(
            documents, data.sources, formatter, config.num_prompts, config.max_prompt_length, rng, held_out=True
        )
        prompts = [formatter.prompt(prompt) for prompt in sampled_prompts]
        sampled, greedy = (
            [answer.example() for answer in complete(prompts, backend, NoDrafter(), partial(_params, config, temperature))]
            for temperature in (1.0, 0.0)
        )
        speed_ups = _speed_ups(prompts, backend, drafters, config)
        for name, draft in drafts.items():
            of_text, of_sampled, of_greedy = (score(draft, target, said, config.K) for said in (texts, sampled, greedy))
            yield Comparison(domain, name, of_text, of_sampled, of_greedy, speed_ups.get(name))


def _held_out_texts(
    documents: dict[str, list[Document]], data: DataConfig, formatter: Formatter, config: ComparisonConfig
) -> list[Example]:
    """Documents of each source in proportion to its weight, as far as there are any; their first tokens."""
    rng = np.random.default_rng([config.seed, 1])
    texts: list[Example] = []
    for source, count in share_out(config.num_prompts, data.sources).items():
        held_out = [document for document in documents[source] if is_held_out(document)]
        examples = (formatter.example(held_out[place]) for place in rng.permutation(len(held_out))[:count])
        cut = [Example(e.ids[: config.max_text_length], e.is_scored[: config.max_text_length]) for e in examples if e]
        texts += [text for text in cut if text.is_scored.any()]
    if not texts:
        raise ConfigError("domains: expected held-out documents with something to learn, found none")
    return texts


def _params(config: ComparisonConfig, temperature: float, place: int) -> SamplingParams:
    return SamplingParams(max_tokens=config.max_new_tokens, temperature=temperature, seed=config.seed * 100_003 + place)


def _speed_ups(
    prompts: list[list[int]], target: ModelBackend, drafters: dict[str, Drafter], config: ComparisonConfig
) -> dict[str, float]:
    """Medians over prompts drawn from all, each of which every drafter and none decode in turns; one more warms up."""
    if config.num_timed == 0:
        return {}
    places = np.random.default_rng([config.seed, 2]).permutation(len(prompts))[: config.num_timed]
    found: dict[str, list[float]] = {name: [] for name in drafters}
    for is_timed, place in [(False, places[0]), *((True, place) for place in places)]:
        plain = _rate(prompts[place], target, NoDrafter(), config)
        for name, drafter in drafters.items():
            rate = _rate(prompts[place], target, drafter, config)
            if is_timed:
                found[name].append(rate / plain)
    return {name: statistics.median(ratios) for name, ratios in found.items()}


def _rate(prompt: list[int], target: ModelBackend, drafter: Drafter, config: ComparisonConfig) -> float:
    started = time.perf_counter()
    [answer] = complete([prompt], target, drafter, partial(_params, config, 0.0), batch=1, k=config.K)
    return len(answer.tokens) / (time.perf_counter() - started)

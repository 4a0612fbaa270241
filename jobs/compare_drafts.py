"""Compares drafts of one target, domain by domain: `python -m jobs.compare_drafts --config configs/tiny/compare_drafts.yaml`.

On prompts that training has held out, the target answers; what each draft would have guessed of that is counted without
decoding, and how fast it makes the target is measured by decoding, each draft and none in turns.
"""

import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from pydantic import Field
from rich.table import Table

from jobs.command import as_text, run_job
from specdecode.backends.backend import ModelBackend, create_backend
from specdecode.config import StrictModel
from specdecode.decoding.drafters import Drafter, ModelDrafter, NoDrafter
from specdecode.decoding.sequence import SamplingParams
from specdecode.embedded import resolve_model
from specdecode.training.acceptance import Scores, score
from specdecode.training.checkpoints import load_model, load_tokenizer
from specdecode.training.completions import complete
from specdecode.training.data import DataConfig
from specdecode.training.examples import Formatter
from specdecode.training.release import held_out_prompts


class ComparisonConfig(StrictModel):
    """Which drafts, on what."""

    target: str
    drafts: dict[str, str] = Field(min_length=1, description="the drafts' models, by the name to show")
    domains: dict[str, DataConfig] = Field(min_length=1, description="where the prompts of each domain come from")
    K: int = Field(default=4, gt=0)
    num_prompts: int = Field(default=60, gt=0, description="of each domain")
    max_prompt_length: int = Field(default=160, gt=0)
    max_new_tokens: int = Field(default=128, gt=0)
    num_timed: int = Field(default=8, ge=0, description="how many of the prompts are decoded to measure the speed")
    seed: int = 0


@dataclass(frozen=True)
class Comparison:
    """A draft in a domain: `sampled` at temperature 1, `greedy`, and tokens per second by those of plain decoding, greedily."""

    domain: str
    draft: str
    sampled: Scores
    greedy: Scores
    speed_up: float | None


def main(arguments: list[str] | None = None) -> int:
    """Runs the job and returns its exit status."""
    return run_job("compare_drafts", "Compare drafts of one target.", ComparisonConfig, _run, arguments)


def _run(config: ComparisonConfig) -> str:
    table = Table(title=f"{config.target}, K {config.K}: of a round's tokens the target's own is one")
    for column in ("domain", "draft", "acceptance", "tokens of a round", "agreement", "greedy tokens of a round", "to plain"):
        table.add_column(column, justify="left" if column in ("domain", "draft") else "right")
    for row in compare(config):
        table.add_row(
            row.domain,
            row.draft,
            f"{row.sampled.acceptance:.3f}",
            f"{row.sampled.accepted_length:.2f}",
            f"{row.greedy.agreement:.3f}",
            f"{row.greedy.greedy_length:.2f}",
            "" if row.speed_up is None else f"{row.speed_up:.2f}x",
        )
    return as_text(table)


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
        prompts = held_out_prompts(data, formatter, config.num_prompts, config.max_prompt_length, config.seed)
        sampled, greedy = (complete(prompts, backend, NoDrafter(), partial(_params, config, t)) for t in (1.0, 0.0))
        speed_ups = _speed_ups(prompts[: config.num_timed], backend, drafters, config)
        for name, draft in drafts.items():
            of_sampled, of_greedy = (score(draft, target, answers, config.K) for answers in (sampled, greedy))
            yield Comparison(domain, name, of_sampled, of_greedy, speed_ups.get(name))


def _params(config: ComparisonConfig, temperature: float, place: int) -> SamplingParams:
    return SamplingParams(max_tokens=config.max_new_tokens, temperature=temperature, seed=config.seed * 100_003 + place)


def _speed_ups(
    prompts: list[list[int]], target: ModelBackend, drafters: dict[str, Drafter], config: ComparisonConfig
) -> dict[str, float]:
    """Medians over the prompts, each of which every drafter and none decode in turns."""
    found: dict[str, list[float]] = {name: [] for name in drafters}
    for place, prompt in enumerate(prompts):
        plain = _rate(prompt, target, NoDrafter(), config)
        for name, drafter in drafters.items():
            rate = _rate(prompt, target, drafter, config)
            if place > 0 or len(prompts) == 1:  # the first warms up
                found[name].append(rate / plain)
    return {name: statistics.median(ratios) for name, ratios in found.items() if ratios}


def _rate(prompt: list[int], target: ModelBackend, drafter: Drafter, config: ComparisonConfig) -> float:
    started = time.perf_counter()
    [answer] = complete([prompt], target, drafter, partial(_params, config, 0.0), batch=1, k=config.K)
    return len(answer.tokens) / (time.perf_counter() - started)


if __name__ == "__main__":
    sys.exit(main())

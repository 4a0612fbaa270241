"""Makes a draft better at what it is asked: `python -m jobs.improve --config FILE [--set key=value ...] [--resume]`.

From records of served requests to a Serve configuration: the target answers their prompts, the draft is distilled on that, and
the old and the new one are compared on prompts that were kept back. Only a draft that is better, by more than chance, is
written into a configuration, in which it takes a share of the old one's requests. Nothing is replaced.
"""

from jobs.training import Run, is_begun  # isort: skip  # before all else that imports Ray

import logging
import sys
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from pydantic import Field

from jobs.command import Verdict, run_job
from jobs.train_draft import check, work
from serve.config import DraftModelConfig, ServeConfig
from serve.local import load_deployment
from specdecode.backends.backend import create_backend
from specdecode.chance import chance
from specdecode.config import StrictModel, check_config, read_yaml
from specdecode.decoding.drafters import NoDrafter
from specdecode.decoding.sequence import SamplingParams
from specdecode.embedded import resolve_model
from specdecode.errors import ConfigError
from specdecode.routing.records import Record, read_records
from specdecode.training.acceptance import score
from specdecode.training.checkpoints import load_model, load_tokenizer
from specdecode.training.completions import complete
from specdecode.training.data import TRAINING, VALIDATION, DataConfig, validation_blocks, write_blocks
from specdecode.training.documents import Document, Message
from specdecode.training.draft import DistillationConfig, DraftTrainingConfig
from specdecode.training.draft import DraftModelConfig as Models
from specdecode.training.examples import Example, Formatter, end_of_text
from specdecode.training.losses import LossConfig
from specdecode.training.packing import cycle, pack
from specdecode.training.trainer import TrainingConfig

logger = logging.getLogger(__name__)

_NUM_RESAMPLES = 2000


class ImproveConfig(StrictModel):
    """Which draft, from what, and how much."""

    serve_config: str = Field(description="the Serve configuration that is deployed")
    draft: str = Field(description="the draft of it to improve")
    records: list[str] = Field(min_length=1, description="records of served requests, with their prompts: files or folders")
    training: TrainingConfig
    loss: LossConfig = LossConfig()
    max_prompts: int = Field(default=5000, gt=0)
    max_prompt_length: int = Field(default=512, gt=0, description="tokens; longer prompts are left out")
    max_new_tokens: int = Field(default=160, gt=0)
    batch: int = Field(default=32, gt=0, description="answers that are decoded together")
    compared_share: float = Field(default=0.2, gt=0, lt=1, description="of the prompts, those that are kept back to compare on")
    min_compared: int = Field(default=30, gt=0, description="fewer prompts to compare on are refused")
    share: float = Field(default=0.1, gt=0, le=1, description="of the old draft's requests, for the new one")
    output_config: str = Field(description="where the Serve configuration with both of them is written")


@dataclass(frozen=True)
class Gain:
    """Tokens of a round with the new draft by those with the old one, greedily, and the interval of 95 % of resamples."""

    old: float
    new: float
    ratio: float
    interval: tuple[float, float]
    num_prompts: int

    @property
    def is_real(self) -> bool:
        """Whether chance alone does not make it."""
        return self.interval[0] > 1

    def summary(self) -> str:
        """One line for people."""
        low, high = self.interval
        return (
            f"{self.old:.3f} tokens of a round before, {self.new:.3f} after: {self.ratio:.3f} [{low:.3f}, {high:.3f}] times, "
            f"on {self.num_prompts} prompts"
        )


def main(arguments: list[str] | None = None) -> int:
    """Runs the job and returns its exit status: 1 if the new draft is not better."""
    return run_job("improve", "Make a draft better at what it is asked.", ImproveConfig, _run, arguments, can_resume=True)


def _run(config: ImproveConfig, resume: bool) -> Verdict:
    gain = improve(config, resume=resume)
    if not gain.is_real:
        return Verdict(f"{gain.summary()}: not better by more than chance; no configuration is written", is_good=False)
    return Verdict(
        f"{gain.summary()}\n{config.output_config} gives it {config.share:.0%} of {config.draft}'s requests", is_good=True
    )


def improve(config: ImproveConfig, *, resume: bool = False) -> Gain:
    """Distils a new draft, compares it with the old one, and writes a configuration if it is better.

    Raises:
        ConfigError: there is no such draft, or there are too few prompts.
        ModelError: a model does not load.
    """
    deployed = load_deployment(config.serve_config).config
    draft = deployed.drafts.get(config.draft)
    if not isinstance(draft, DraftModelConfig):
        raise ConfigError(f"draft: expected one of {sorted(deployed.draft_models)}, got {config.draft!r}")
    target = resolve_model(deployed.target.model)
    learned, compared = _prompts(config, Formatter(load_tokenizer(target)))
    if len(compared) < config.min_compared:
        raise ConfigError(
            f"records: expected at least {config.min_compared} prompts to compare on, got {len(compared)} of "
            f"{len(learned) + len(compared)} (does the configuration have router.records.keep_prompts?)"
        )
    training = _training_config(config, deployed, draft)
    run = Run(training, config.training, resume=resume)
    check(training)
    run.train(partial(_blocks, config, target, learned), work)
    new = Path(config.training.output_dir) / "best"
    gain = _compare(config, target, compared, resolve_model(draft.model), str(new))
    logger.info("%s", gain.summary())
    if gain.is_real:
        _write_config(config, new)
    return gain


def _training_config(config: ImproveConfig, deployed: ServeConfig, draft: DraftModelConfig) -> DraftTrainingConfig:
    """As of `jobs.train_draft`, which it does the same as on other text."""
    return DraftTrainingConfig(
        model=Models(draft_model=draft.model, target_model=deployed.target.model),
        data=DataConfig(domain="generic", dataset_name=",".join(config.records)),
        training=config.training,
        distillation=DistillationConfig(enabled=True, loss=config.loss, target_share=1.0),
    )


def _prompts(config: ImproveConfig, formatter: Formatter) -> tuple[list[list[int]], list[list[int]]]:
    """What the draft was asked, each prompt once: to learn from, and to compare on; which is a function of its text."""
    records = [record for path in config.records for record in read_records(path)]
    asked = {(r.prompt, r.is_chat): r for r in records if r.arm == config.draft and r.prompt}
    parts: tuple[list[list[int]], list[list[int]]] = ([], [])
    for record in list(asked.values())[: config.max_prompts]:
        ids = formatter.prompt(_document(record))
        if 0 < len(ids) <= config.max_prompt_length:
            parts[chance(record.prompt) < config.compared_share].append(ids)
    return parts


def _document(record: Record) -> Document:
    return Document(messages=(Message("user", record.prompt),)) if record.is_chat else Document(record.prompt)


def _answers(config: ImproveConfig, target: str, prompts: list[list[int]]) -> list[Example]:
    """What the target says, greedily."""
    params = SamplingParams(max_tokens=config.max_new_tokens)
    answers = complete(prompts, create_backend(target), NoDrafter(), lambda _: params, config.batch)
    return [answer.example() for answer in answers]


def _blocks(config: ImproveConfig, target: str, prompts: list[list[int]]) -> Path:
    """Makes the blocks that are learned from and validated on, unless they are there; returns their folder."""
    training, folder = config.training, Path(config.training.output_dir) / "data"
    if is_begun(folder.parent):
        return folder
    pad_id = end_of_text(load_tokenizer(target))
    answers = _answers(config, target, prompts)
    num_held_out = max(1, len(answers) // 20)
    held_out, learned = answers[:num_held_out], answers[num_held_out:]
    stream = pack(cycle(learned, np.random.default_rng([training.seed, 8])), training.sequence_length, pad_id)
    write_blocks(folder / TRAINING, [("training", islice(stream, training.num_blocks))])
    validation = validation_blocks(
        {"answers": held_out}, training.num_validation_blocks, training.sequence_length, pad_id, training.seed
    )
    write_blocks(folder / VALIDATION, validation.items())
    return folder


def _compare(config: ImproveConfig, target: str, prompts: list[list[int]], old: str, new: str) -> Gain:
    """Counts the rounds of the target's greedy answers with either draft, and resamples the prompts for both together."""
    answers, judge = _answers(config, target, prompts), load_model(target).eval()
    k = config.training.K
    counts = []  # [2 drafts, prompts]: rounds
    for folder in (old, new):
        draft = load_model(folder).eval()
        counts.append([score(draft, judge, [answer], k).greedy.num_rounds for answer in answers])
    num_rounds, num_tokens = np.array(counts), np.array([int(answer.is_scored.sum()) for answer in answers])
    rows = np.random.default_rng(config.training.seed).integers(0, len(answers), (_NUM_RESAMPLES, len(answers)))
    ratios = num_rounds[0][rows].sum(1) / num_rounds[1][rows].sum(1)
    low, high = np.percentile(ratios, [2.5, 97.5])
    lengths = num_tokens.sum() / num_rounds.sum(1)
    return Gain(float(lengths[0]), float(lengths[1]), float(lengths[1] / lengths[0]), (float(low), float(high)), len(answers))


def _write_config(config: ImproveConfig, new: Path) -> None:
    """The deployed configuration with one draft more, which takes a share of the old one's requests."""
    values = read_yaml(config.serve_config)
    arguments: dict[str, Any] = values["applications"][0]["args"]
    name = f"{config.draft}-next"
    if name in arguments["drafts"]:
        raise ConfigError(f"{config.serve_config}: drafts: {name} is there already: expected the last trial to be over")
    arguments["drafts"][name] = {**arguments["drafts"][config.draft], "model": str(new.absolute())}
    arguments.setdefault("canaries", {})[config.draft] = {"draft": name, "share": config.share}
    check_config(arguments, ServeConfig, where=config.output_config)
    Path(config.output_config).write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())

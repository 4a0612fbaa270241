"""Trains a draft on Ray: `python -m jobs.train_draft --config configs/tiny/distill_code.yaml [--set key=value ...] [--resume]`.

Ray Data reads and tokenizes, the target answers prompts where the draft is to learn from that, Ray Train starts the processes
that train and starts them again where they are lost. In OUTPUT_DIR are `best/`, a plain Hugging Face folder, and `run.json`.
"""

from jobs.training import Run, is_begun, report  # isort: skip  # before all else that imports Ray

import logging
import sys
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jobs.command import run_job
from jobs.generate_data import generate_completions
from jobs.reading import read
from specdecode.backends.backend import ModelConfig
from specdecode.config import check_config
from specdecode.embedded import resolve_model
from specdecode.errors import ConfigError
from specdecode.training.checkpoints import load_tokenizer
from specdecode.training.completions import Completion, CompletionJobConfig
from specdecode.training.data import TRAINING, VALIDATION, training_blocks, validation_blocks, write_blocks
from specdecode.training.draft import (
    PROMPTS,
    DraftTrainingConfig,
    check_models,
    learn,
)
from specdecode.training.examples import Example, end_of_text
from specdecode.training.packing import cycle, interleave, pack
from specdecode.training.teacher_cache import check_teacher
from specdecode.training.trainer import TrainingResult

logger = logging.getLogger(__name__)

_DATA = "data"  # the folder of the blocks, in OUTPUT_DIR
_TEXT, _ANSWERS = "text", "answers"  # the data's own words, and the target's


def main(arguments: list[str] | None = None) -> int:
    """Runs the job and returns its exit status."""
    return run_job("train_draft", "Distil or fine-tune a draft model.", DraftTrainingConfig, _run, arguments, can_resume=True)


def _run(config: DraftTrainingConfig, resume: bool) -> str:
    return train_draft(config, resume=resume).summary()


def train_draft(config: DraftTrainingConfig, *, resume: bool = False) -> TrainingResult:
    """Trains a draft; starts a local Ray unless this process is connected to one.

    Raises:
        ConfigError: the data, a device or an optional package are not there, or OUTPUT_DIR holds another run.
        ModelError: a model does not load, or the two do not share a vocabulary.
    """
    run = Run(config, config.training, resume=resume)
    check(config)
    return run.train(partial(prepare, config), work)


def check(config: DraftTrainingConfig) -> None:
    """Raises for what can be seen to be wrong with models and packages before anything long begins."""
    config.logging.check()
    check_models(config.model)


def prepare(config: DraftTrainingConfig) -> Path:
    """Makes the blocks that are learned from and validated on, unless they are there; returns their folder."""
    if config.distillation.enabled and config.distillation.teacher_cache is not None:
        cache = Path(config.distillation.teacher_cache)
        check_teacher(cache, about_teacher(config))
        return cache
    output_dir = Path(config.training.output_dir)
    return output_dir / _DATA if is_begun(output_dir) else make_blocks(config, output_dir / _DATA)


def about_teacher(config: DraftTrainingConfig) -> dict[str, Any]:
    """What blocks and what is said of them depend on."""
    training, distillation = config.training, config.distillation
    return {
        "target": config.model.target_model,
        "data": config.data.model_dump(),
        "also_validate": {domain: data.model_dump() for domain, data in config.also_validate.items()},
        "top_k": distillation.loss.top_k,
        "temperature": distillation.loss.temperature,
        "target_share": distillation.target_share,
        "completions": distillation.completions.model_dump(exclude={"batch", "num_actors", "num_gpus"}),
        "completions_dir": distillation.completions_dir,
        "blocks": [training.num_blocks, training.sequence_length, training.num_validation_blocks, training.seed],
    }


def make_blocks(config: DraftTrainingConfig, folder: Path) -> Path:
    """Makes the blocks that are learned from and validated on; returns their folder."""
    training, distillation = config.training, config.distillation
    name = resolve_model(config.model.draft_model)
    pad_id = end_of_text(load_tokenizer(name))
    asks = distillation.enabled and distillation.target_share > 0
    reading = read(config.data, name, training.num_blocks * training.sequence_length, needs_all=not asks)
    texts = {source: found for source, found in reading.training.items() if found}
    streams = {_TEXT: training_blocks(texts, config.data.weights, training.sequence_length, pad_id, training.seed)}
    shares = {_TEXT: 1.0}
    held_out = {source: found for source, found in reading.held_out.items() if found}
    if asks:
        answers = _answers(config, held_out=False)
        streams[_ANSWERS] = pack(cycle(answers, np.random.default_rng([training.seed, 8])), training.sequence_length, pad_id)
        shares = {_TEXT: 1 - distillation.target_share, _ANSWERS: distillation.target_share}
    if distillation.enabled:
        held_out = {**held_out, _ANSWERS: _answers(config, held_out=True)}
    for domain, data in config.also_validate.items():
        if domain in held_out:
            raise ConfigError(f"also_validate: {domain}: expected another name than those of data and answers")
        aside = read(data, name, training.num_validation_blocks * training.sequence_length * 50, needs_all=False)
        held_out[domain] = [example for found in aside.held_out.values() for example in found]
    rng = np.random.default_rng([training.seed, 7])
    mixed = islice(interleave(streams, shares, rng), training.num_blocks)
    write_blocks(folder / TRAINING, [("training", mixed)])
    validation = validation_blocks(held_out, training.num_validation_blocks, training.sequence_length, pad_id, training.seed)
    write_blocks(folder / VALIDATION, validation.items())
    if distillation.enabled and distillation.student_share > 0:
        asked = completions(config, held_out=False)
        pq.write_table(pa.table({"prompt": [completion.prompt for completion in asked]}), folder / PROMPTS)
    return folder


def _answers(config: DraftTrainingConfig, *, held_out: bool) -> list[Example]:
    return [completion.example() for completion in completions(config, held_out=held_out)]


def completions(config: DraftTrainingConfig, *, held_out: bool) -> list[Completion]:
    """What the target says after prompts of the data: what is there, or else it is asked now."""
    distillation = config.distillation
    folder = Path(distillation.completions_dir or Path(config.training.output_dir) / "completions")
    settings = distillation.completions
    if held_out:  # few, as they are only looked at, and as the target says them most surely
        few = min(settings.num_prompts, config.training.num_validation_blocks * 4)
        settings = settings.model_copy(update={"num_prompts": few, "sampled_share": 0.0})
    return generate_completions(
        CompletionJobConfig(
            target=ModelConfig(model=config.model.target_model or "", max_rows=settings.batch + 1),
            data=config.data,
            completions=settings,
            output_dir=str(folder / ("held-out" if held_out else "training")),
        ),
        held_out=held_out,
    )


def work(told: dict[str, Any]) -> None:
    """What each process does."""
    config = check_config(told["config"], DraftTrainingConfig, where="train_draft")
    report(told, config.training, partial(learn, config, Path(told["blocks"])))


if __name__ == "__main__":
    sys.exit(main())

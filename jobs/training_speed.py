"""Measures training beside transformers' `Trainer`: `python -m jobs.training_speed --config configs/tiny/training_speed.yaml`.

Each way trains the same model on the same blocks, in a process of its own, all ways in turns: how many tokens a second, and
how much memory at the most. Needs no Ray.
"""

import json
import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pydantic import Field
from rich.table import Table
from transformers import Trainer, TrainerCallback

from jobs.command import as_text, run_job
from specdecode.config import StrictModel, check_config
from specdecode.embedded import resolve_model
from specdecode.training.checkpoints import load_model, load_tokenizer
from specdecode.training.data import TRAINING, VALIDATION, read_blocks, write_blocks
from specdecode.training.draft import DraftModelConfig, DraftTrainingConfig, learn, shared_vocabulary
from specdecode.training.losses import LossConfig
from specdecode.training.packing import Block
from specdecode.training.reporting import LoggingConfig
from specdecode.training.teacher_cache import Annotator
from specdecode.training.trainer import Collator, TrainingConfig, arguments

Way = Literal["transformers alone", "fine-tuning", "distillation", "distillation from a cache"]

_CACHE = "cache"


class TrainingSpeedConfig(StrictModel):
    """What is trained, on blocks of random tokens."""

    draft_model: str = "tiny/target"
    target_model: str = "tiny/target"
    num_steps: int = Field(default=20, gt=2, description="the first two do not count")
    per_device_batch_size: int = Field(default=4, gt=0)
    sequence_length: int = Field(default=512, gt=1)
    precision: Literal["float32", "bfloat16"] = "float32"
    loss: LossConfig = Field(default_factory=LossConfig)
    cached_top_k: int = Field(default=64, gt=0, description="how many tokens of the teacher's the cache holds at each place")
    num_threads: int = Field(default=2, gt=0)
    num_repeats: int = Field(default=5, gt=0)


class _Clock(TrainerCallback):
    """Notes when each step ends."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """See `TrainerCallback.on_step_end`."""
        self.ends.append(time.perf_counter())


def main(arguments: list[str] | None = None) -> int:
    """Runs the job and returns its exit status."""
    return run_job("training_speed", "Measure the speed of training.", TrainingSpeedConfig, _run, arguments)


def _run(config: TrainingSpeedConfig) -> str:
    found: dict[Way, list[dict[str, float]]] = {way: [] for way in _WORK}
    with tempfile.TemporaryDirectory() as folder:
        _write_blocks(config, Path(folder))
        _cache_teacher(config, Path(folder))
        for _ in range(config.num_repeats):
            for way in _WORK:
                found[way].append(_measured(way, config, Path(folder)))
    table = Table(title=f"{config.draft_model}, {config.per_device_batch_size} x {config.sequence_length} tokens a step")
    for column in ("way", "tok/s", "to transformers alone", "peak MiB"):
        table.add_column(column, justify="left" if column == "way" else "right")
    for way, runs in found.items():
        ratios = [run["rate"] / alone["rate"] for run, alone in zip(runs, found["transformers alone"], strict=True)]
        rate, peak = (statistics.median(run[name] for run in runs) for name in ("rate", "peak_mib"))
        table.add_row(way, f"{rate:.0f}", f"{statistics.median(ratios):.2f}x", f"{peak:.0f}")
    return as_text(table)


def _write_blocks(config: TrainingSpeedConfig, folder: Path) -> None:
    rng, length = np.random.default_rng(0), config.sequence_length
    vocab_size = len(load_tokenizer(resolve_model(config.draft_model)))

    def block() -> Block:
        ids = rng.integers(0, vocab_size, length).astype(np.int32)
        return Block(ids, np.arange(length, dtype=np.int32), np.where(np.arange(length) > 0, ids, -100).astype(np.int32))

    write_blocks(folder / TRAINING, [("training", [block() for _ in range(config.num_steps * config.per_device_batch_size)])])
    write_blocks(folder / VALIDATION, [("validation", [block()])])


def _cache_teacher(config: TrainingSpeedConfig, folder: Path) -> None:
    """Writes down what the teacher says of the blocks, as `jobs.cache_teacher` does, before anything is measured."""
    models = DraftModelConfig(draft_model=config.draft_model, target_model=config.target_model)
    annotator = Annotator(config.target_model, _cached(config).model_dump(), shared_vocabulary(models), "cpu")
    (folder / _CACHE).mkdir()
    for name in (TRAINING, VALIDATION):
        blocks = pq.read_table(folder / name)
        batches = [annotator(blocks.slice(first, 8)) for first in range(0, len(blocks), 8)]
        pq.write_table(pa.concat_tables(batches), folder / _CACHE / name)


def _cached(config: TrainingSpeedConfig) -> LossConfig:
    return config.loss.model_copy(update={"top_k": config.cached_top_k})


def _measured(way: Way, config: TrainingSpeedConfig, folder: Path) -> dict[str, float]:
    """Runs one way in a process of its own."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_train, args=(way, config.model_dump(), str(folder), theirs))
    process.start()
    theirs.close()
    try:
        answer: dict[str, float] = json.loads(ours.recv())
    finally:
        process.join()
    return answer


def _train(way: Way, values: dict[str, Any], folder: str, answer: Any) -> None:
    config = check_config(values, TrainingSpeedConfig, where="training_speed")
    torch.set_num_threads(config.num_threads)
    clock = _Clock()
    with tempfile.TemporaryDirectory() as output_dir:
        _WORK[way](config, Path(folder), output_dir, clock)
    seconds = clock.ends[-1] - clock.ends[1]
    num_tokens = (len(clock.ends) - 2) * config.per_device_batch_size * config.sequence_length
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    answer.send(json.dumps({"rate": num_tokens / seconds, "peak_mib": peak_mib}))


def _alone(config: TrainingSpeedConfig, folder: Path, output_dir: str, clock: _Clock) -> None:
    """transformers' `Trainer`, with the loss and the attention that it has of its own."""
    training = _training(config, output_dir)
    collate = Collator([])

    def plain(rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch = collate(rows)
        return {name: batch[name] for name in ("input_ids", "labels")}

    Trainer(
        model=load_model(resolve_model(config.draft_model)),
        args=arguments(training, LoggingConfig()),
        data_collator=plain,
        train_dataset=read_blocks(folder / TRAINING),
        eval_dataset=read_blocks(folder / VALIDATION),
        callbacks=[clock],
    ).train()


def _tuned(config: TrainingSpeedConfig, folder: Path, output_dir: str, clock: _Clock) -> None:
    _learn(config, folder, output_dir, clock, target=None, distillation={"enabled": False})


def _distilled(config: TrainingSpeedConfig, folder: Path, output_dir: str, clock: _Clock) -> None:
    distillation = {"enabled": True, "loss": config.loss.model_dump()}
    _learn(config, folder, output_dir, clock, target=config.target_model, distillation=distillation)


def _distilled_from_cache(config: TrainingSpeedConfig, folder: Path, output_dir: str, clock: _Clock) -> None:
    cache = folder / _CACHE
    distillation = {"enabled": True, "loss": _cached(config).model_dump(), "teacher_cache": str(cache)}
    _learn(config, cache, output_dir, clock, target=config.target_model, distillation=distillation)


def _learn(
    config: TrainingSpeedConfig,
    folder: Path,
    output_dir: str,
    clock: _Clock,
    *,
    target: str | None,
    distillation: dict[str, Any],
) -> None:
    values = {
        "model": {"draft_model": config.draft_model, "target_model": target},
        "data": {"domain": "generic", "dataset_name": "random"},
        "training": _training(config, output_dir).model_dump(),
        "distillation": distillation,
    }
    learn(check_config(values, DraftTrainingConfig, where="training_speed"), folder, callbacks=[clock])


def _training(config: TrainingSpeedConfig, output_dir: str) -> TrainingConfig:
    return TrainingConfig(
        output_dir=output_dir,
        num_train_steps=config.num_steps,
        per_device_batch_size=config.per_device_batch_size,
        sequence_length=config.sequence_length,
        precision=config.precision,
        validate_every=config.num_steps,
        log_every=config.num_steps,
        num_workers=0,
        device="cpu",
    )


_WORK: dict[Way, Callable[[TrainingSpeedConfig, Path, str, _Clock], None]] = {
    "transformers alone": _alone,
    "fine-tuning": _tuned,
    "distillation": _distilled,
    "distillation from a cache": _distilled_from_cache,
}


if __name__ == "__main__":
    sys.exit(main())

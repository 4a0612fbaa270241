"""Writes down what a target says of the blocks that a draft learns from, so that its training needs no target in memory.

`python -m jobs.cache_teacher --config configs/tiny/distill_code.yaml --set distillation.teacher_cache=FOLDER --set
distillation.loss.top_k=64`, and then `jobs.train_draft` with the same configuration. Ray Data spreads the blocks over processes
that hold the target.
"""

from serve.cluster import connected  # isort: skip  # before all else that imports Ray

import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import ray

from jobs.command import run_job
from jobs.reading import keep_order
from jobs.train_draft import about_teacher, check, make_blocks
from specdecode.errors import ConfigError
from specdecode.training.data import TRAINING, VALIDATION
from specdecode.training.draft import DraftTrainingConfig, shared_vocabulary
from specdecode.training.teacher_cache import Annotator, note_teacher

_BATCH = 8  # blocks of a forward pass


def main(arguments: list[str] | None = None) -> int:
    """Runs the job and returns its exit status."""
    return run_job("cache_teacher", "Write down what a target says of blocks.", DraftTrainingConfig, _run, arguments)


def _run(config: DraftTrainingConfig) -> str:
    num_blocks = cache_teacher(config)
    return f"what {config.model.target_model} says of {num_blocks} blocks is in {config.distillation.teacher_cache}"


def cache_teacher(config: DraftTrainingConfig) -> int:
    """Makes the blocks and writes down what the target says of them; returns how many blocks there are.

    Raises:
        ConfigError: the configuration names no cache or no top_k, or the data are not there.
        ModelError: a model does not load, or the two do not share a vocabulary.
    """
    distillation = config.distillation
    if not distillation.enabled or distillation.teacher_cache is None or distillation.loss.top_k is None:
        raise ConfigError("distillation: expected enabled: true with a teacher_cache to write and a loss.top_k")
    check(config)
    folder = Path(distillation.teacher_cache)
    with connected():
        plain = make_blocks(config, folder / "plain")
        num_blocks = sum(_annotate(plain / name, folder / name, config) for name in (TRAINING, VALIDATION))
    note_teacher(folder, about_teacher(config))
    return num_blocks


def _annotate(plain: Path, annotated: Path, config: DraftTrainingConfig) -> int:
    keep_order()
    num_gpus = 1 if ray.cluster_resources().get("GPU", 0) > 0 and config.training.device != "cpu" else 0
    rows = ray.data.read_parquet(str(plain.absolute())).map_batches(
        Annotator,
        fn_constructor_args=(
            config.model.target_model,
            config.distillation.loss.model_dump(),
            shared_vocabulary(config.model),
            "cuda" if num_gpus else "cpu",
        ),
        batch_size=_BATCH,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=max(1, config.training.num_workers)),
        num_gpus=num_gpus or None,
    )
    return _write(annotated, rows.iter_batches(batch_size=_BATCH, batch_format="pyarrow"))


def _write(path: Path, batches: Iterator[pa.Table]) -> int:
    new = path.with_name(f".{path.name}.new")
    writer: pq.ParquetWriter | None = None
    num_rows = 0
    for batch in batches:
        writer = writer or pq.ParquetWriter(new, batch.schema)
        writer.write_table(batch)
        num_rows += batch.num_rows
    assert writer is not None, "there are blocks"
    writer.close()
    new.replace(path)
    return num_rows


if __name__ == "__main__":
    sys.exit(main())

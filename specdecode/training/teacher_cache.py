"""Blocks in, what a teacher says of them out, so that training needs none: its most likely tokens at each scored place."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from specdecode.embedded import resolve_model
from specdecode.errors import ConfigError
from specdecode.training.checkpoints import load_model
from specdecode.training.losses import LossConfig, Teacher
from specdecode.training.trainer import scored_places

_ABOUT = "teacher.json"


class Annotator:
    """Holds a teacher; adds what it says to blocks.

    Args:
        target: the teacher's name or folder.
        loss: its `top_k` says how many tokens are kept, its `temperature` at which temperature.
        vocab_size: how many tokens both models have; what else the teacher has is padding.
        device: where the teacher runs.
    """

    def __init__(self, target: str, loss: dict[str, Any], vocab_size: int, device: str) -> None:
        self._vocab_size = vocab_size
        self._loss = LossConfig.model_validate(loss)
        self._teacher = load_model(resolve_model(target)).eval().to(device)

    @torch.inference_mode()
    def __call__(self, batch: pa.Table) -> pa.Table:
        """Adds `teacher_ids` and `teacher_log_probs`, [length * top_k] of each block; 0 where nothing is scored."""
        k = self._loss.top_k
        assert k is not None
        ids, positions, labels = (torch.tensor(batch[name].to_pylist()) for name in ("input_ids", "position_ids", "labels"))
        device = self._teacher.device
        logits = self._teacher(input_ids=ids.to(device), position_ids=positions.to(device), use_cache=False).logits[:, :-1]
        is_scored = scored_places(labels)
        said = Teacher.dense(logits[is_scored.to(device)]).cut(self._vocab_size).restricted(k, self._loss.temperature)
        k = said.ids.shape[1]
        teacher_ids = torch.zeros(*labels.shape, k, dtype=torch.int32)
        teacher_log_probs = torch.zeros(*labels.shape, k)
        teacher_ids[:, 1:][is_scored] = said.ids.int().cpu()
        teacher_log_probs[:, 1:][is_scored] = said.log_probs.float().cpu()
        for name, values, dtype in (("ids", teacher_ids, pa.int32()), ("log_probs", teacher_log_probs, pa.float32())):
            rows = pa.array(list(values.flatten(1).numpy()), type=pa.list_(dtype))
            batch = batch.append_column(f"teacher_{name}", rows)
        return batch


def note_teacher(folder: Path, about: dict[str, Any]) -> None:
    """Writes down what a cache is made of, once it is whole."""
    (folder / _ABOUT).write_text(json.dumps(about, sort_keys=True), encoding="utf-8")


def check_teacher(folder: Path, about: dict[str, Any]) -> None:
    """Raises a `ConfigError` unless the folder holds a whole cache that is made of this."""
    path = folder / _ABOUT
    if not path.exists():
        raise ConfigError(f"distillation.teacher_cache: {folder} holds no cache: expected one made by jobs.cache_teacher")
    there = json.loads(path.read_text(encoding="utf-8"))
    if there != json.loads(json.dumps(about, sort_keys=True)):
        different = ", ".join(sorted(name for name in about if about[name] != there.get(name)))
        raise ConfigError(f"distillation.teacher_cache: {folder} was made with another {different or 'configuration'}")

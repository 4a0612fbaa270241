"""Any transformers causal language model: a ragged batch of tokens in, logits out, one forward pass."""

import contextlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from specdecode.backends.backend import Row
from specdecode.backends.kv_cache import RowCache
from specdecode.embedded import resolve_model
from specdecode.errors import ModelError
from specdecode.text import Tokenizer

_MASKED_KINDS = {"full_attention", "sliding_attention"}


class HuggingFaceBackend:
    """A `ModelBackend` over a transformers model and a cache of rows; see `create_backend` for the arguments."""

    def __init__(
        self,
        name_or_path: str,
        *,
        dtype: str = "auto",
        device: str = "auto",
        attention: str = "sdpa",
        max_length: int | None = None,
        max_rows: int = 64,
        prefill_chunk: int = 512,
    ) -> None:
        self.name = name_or_path
        self.device = _resolve_device(device)
        self._folder = resolve_model(name_or_path)
        with _quiet_loading(), _model_errors(name_or_path):
            config = AutoConfig.from_pretrained(self._folder)
            text_config = config.get_text_config()
            self._mask_kinds = _mask_kinds(text_config, name_or_path)
            self.model = AutoModelForCausalLM.from_pretrained(
                self._folder, config=config, dtype=_resolve_dtype(dtype, self.device), attn_implementation=attention
            )
        self.model = self.model.to(self.device).eval()
        self.vocab_size: int = self.model.get_output_embeddings().weight.shape[0]
        self.max_length: int = _resolve_length(max_length, text_config, name_or_path)
        self.eos_token_ids = _eos_token_ids(self.model.generation_config, config)
        self._sliding_window: int = getattr(text_config, "sliding_window", None) or self.max_length
        self._prefill_chunk = prefill_chunk
        self.cache = RowCache(text_config.num_hidden_layers, max_rows, self.max_length)

    @cached_property
    def vocabulary_id(self) -> str:
        """A digest of the tokenizer's vocabulary; the vocabulary's size where there is no tokenizer."""
        try:
            return Tokenizer(self.name).vocabulary_id
        except ModelError:
            return f"{self.vocab_size} tokens"

    @torch.inference_mode()
    def logits(self, rows: Sequence[Row]) -> torch.Tensor:
        """Scores the rows, computing only what the cache does not remember; see `ModelBackend.logits`."""
        if len(rows) > self.cache.max_rows:  # more than the cache can remember take several passes
            parts = [rows[i : i + self.cache.max_rows] for i in range(0, len(rows), self.cache.max_rows)]
            return torch.cat([self.logits(part) for part in parts])
        numbers = self.cache.seat([row.id for row in rows], [row.tokens for row in rows])
        starts = [self._start(number, row) for number, row in zip(numbers, rows, strict=True)]
        for index, (number, row) in enumerate(zip(numbers, rows, strict=True)):
            starts[index] = self._prefill(number, row, starts[index])
        return self._forward(rows, numbers, starts)

    def _start(self, number: int, row: Row) -> int:
        """The first position to compute: after what the row remembers, but not after what is to be scored."""
        assert len(row.tokens) >= max(row.num_scored, 1)
        return min(self.cache.remembered(number, row.tokens), len(row.tokens) - row.num_scored)

    def _prefill(self, number: int, row: Row, start: int) -> int:
        """Computes a long row's tokens in chunks, alone, until what is left is short or is to be scored."""
        end = len(row.tokens) - row.num_scored
        while end - start > self._prefill_chunk:
            chunk = Row(row.id, row.tokens[: start + self._prefill_chunk], 0)
            self._forward([chunk], [number], [start])
            start += self._prefill_chunk
        return start

    def _forward(self, rows: Sequence[Row], numbers: Sequence[int], starts: Sequence[int]) -> torch.Tensor:
        """Runs the model over the tokens of each row from its start; the rows are put into the cache's order and back."""
        order = sorted(range(len(rows)), key=numbers.__getitem__)
        first = numbers[order[0]]
        ends = [len(rows[index].tokens) for index in order]
        starts = [starts[index] for index in order]
        num_new = max(end - start for start, end in zip(starts, ends, strict=True))
        num_scored = [row.num_scored for row in rows]
        if num_new == 0:
            return self._empty()
        window = self.cache.open(first, first + len(rows), starts, ends, self.device)
        tokens, positions = self._inputs([rows[index].tokens for index in order], starts, num_new)
        scored = self.model(
            input_ids=tokens,
            position_ids=positions,
            attention_mask=self._masks(positions, window.length),
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=max(max(num_scored), 1),
        ).logits  # [len(rows), max(num_scored), vocab_size]
        for index, end in zip(order, ends, strict=True):
            self.cache.remember(numbers[index], rows[index].tokens[:end])
        return self._ragged(scored, order, num_scored)

    def _inputs(self, sequences: Sequence[list[int]], starts: Sequence[int], num_new: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Aligns the new tokens to the right; padding in front is token 0 at position 0."""
        padding = [num_new - (len(tokens) - start) for tokens, start in zip(sequences, starts, strict=True)]
        tokens = [[0] * pad + seq[start:] for pad, seq, start in zip(padding, sequences, starts, strict=True)]
        positions = [
            [0] * pad + list(range(start, len(seq))) for pad, seq, start in zip(padding, sequences, starts, strict=True)
        ]
        return torch.tensor(tokens, device=self.device), torch.tensor(positions, device=self.device)  # [rows, num_new]

    def _masks(self, positions: torch.Tensor, length: int) -> torch.Tensor | dict[str, torch.Tensor]:
        """Additive masks, [rows, 1, num_new, length]: each token sees its row up to itself, within a sliding window."""
        distance = positions[:, None, :, None] - torch.arange(length, device=self.device)
        masks = {}
        for kind in self._mask_kinds:
            visible = distance >= 0
            if kind == "sliding_attention":
                visible &= distance < self._sliding_window
            hidden = torch.finfo(self.model.dtype).min
            masks[kind] = torch.zeros_like(distance, dtype=self.model.dtype).masked_fill_(~visible, hidden)
        # Models whose config lists a kind for each layer take a mask for each kind, the others take one.
        return masks if getattr(self.model.config, "layer_types", None) else next(iter(masks.values()))

    def _ragged(self, scored: torch.Tensor, order: Sequence[int], num_scored: Sequence[int]) -> torch.Tensor:
        """Takes [rows in the cache's order, max(num_scored), vocab_size] apart into the callers' scored positions."""
        widest = scored.shape[1]
        if order == list(range(len(order))) and set(num_scored) == {widest}:
            return scored.flatten(0, 1)
        place = {index: position for position, index in enumerate(order)}
        keep = [
            place[index] * widest + widest - count + offset for index, count in enumerate(num_scored) for offset in range(count)
        ]
        return scored.flatten(0, 1)[torch.tensor(keep, dtype=torch.long, device=self.device)]

    def _empty(self) -> torch.Tensor:
        return torch.empty(0, self.vocab_size, device=self.device, dtype=self.model.dtype)


@contextlib.contextmanager
def _quiet_loading() -> Iterator[None]:
    """Keeps transformers' loading bars off a terminal that streams text."""
    was_enabled = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            transformers.utils.logging.enable_progress_bar()


@contextlib.contextmanager
def _model_errors(name: str) -> Iterator[None]:
    try:
        yield
    except ModelError:
        raise
    except Exception as error:  # a checkpoint may be broken in any way
        reason = " ".join(str(error).split())
        raise ModelError(f"model {name!r} cannot be loaded: {reason[:600]}") from error


def _resolve_device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise ModelError(f"device {device!r}: expected auto, cpu, cuda or cuda:N") from error
    if resolved.type not in ("cpu", "cuda"):
        raise ModelError(f"device {device!r}: expected auto, cpu, cuda or cuda:N")
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise ModelError(f"device {device!r}: this machine has no CUDA device")
    return resolved


def _resolve_dtype(dtype: str, device: torch.device) -> torch.dtype | str:
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    resolved = getattr(torch, dtype, None)
    if not isinstance(resolved, torch.dtype) or not resolved.is_floating_point:
        raise ModelError(f"dtype {dtype!r}: expected auto, float32, bfloat16 or float16")
    return resolved


def _resolve_length(max_length: int | None, config: Any, name: str) -> int:
    limit: int | None = getattr(config, "max_position_embeddings", None)
    if max_length is not None and max_length < 1:
        raise ModelError(f"max_length: expected at least 1, got {max_length}")
    if limit is None and max_length is None:
        raise ModelError(f"model {name!r} states no context length: give max_length")
    if limit is not None and max_length is not None and max_length > limit:
        raise ModelError(f"max_length {max_length}: model {name!r} takes at most {limit} tokens")
    return max_length or limit or 0


def _eos_token_ids(generation_config: GenerationConfig, config: Any) -> frozenset[int]:
    ids = generation_config.eos_token_id if generation_config.eos_token_id is not None else config.eos_token_id
    return frozenset([ids] if isinstance(ids, int) else ids or [])


def _mask_kinds(config: Any, name: str) -> list[str]:
    """The kinds of attention mask that the model's layers need."""
    kinds = set(getattr(config, "layer_types", None) or getattr(config, "attention_layers", None) or [])
    if getattr(config, "alibi", False) or config.model_type == "bloom":
        kinds.add("alibi_attention")
    if not kinds:
        kinds = {"sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"}
    if unknown := kinds - _MASKED_KINDS:
        raise ModelError(f"model {name!r} has layers of {', '.join(sorted(unknown))}: expected full or sliding attention")
    return sorted(kinds)

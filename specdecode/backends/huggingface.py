"""Any transformers causal language model: a ragged batch of tokens in, logits out, one forward pass."""

import threading
from collections.abc import Sequence
from contextlib import nullcontext
from functools import cached_property
from typing import Any

import torch

from specdecode.backends import flash, grouped
from specdecode.backends.backend import Row, check_devices
from specdecode.backends.kv_cache import RowCache
from specdecode.backends.loading import eos_token_ids, load_model, mask_kinds, read_config, resolve_device, resolve_length
from specdecode.backends.memory import readable_bytes, shape_cache
from specdecode.backends.packing import pack
from specdecode.backends.ranks import Ranks
from specdecode.errors import ModelError
from specdecode.text import Tokenizer


class HuggingFaceBackend:
    """A `ModelBackend` over a transformers model and a cache of rows; see `create_backend` for the arguments.

    With `model` it is that one, which is on its device already, and the name is only what it is called.

    Attributes:
        device: of the logits; that of the output layer where layers are on several.
        num_computed_tokens: how many tokens have gone through the model since it was opened, padding not counted.
    """

    def __init__(
        self,
        name_or_path: str,
        *,
        dtype: str = "auto",
        device: str = "auto",
        device_map: str | dict[str, int | str] | None = None,
        tp: int = 1,
        attn_implementation: str = "auto",
        compile: bool = False,
        quantization: dict[str, Any] | None = None,
        adapter: str | None = None,
        max_length: int | None = None,
        max_rows: int = 64,
        prefill_chunk: int = 512,
        preallocate: bool = False,
        model: Any = None,
    ) -> None:
        self.name = name_or_path
        check_devices(device, device_map, tp, compile, quantization, adapter)
        first_device = resolve_device(device, device_map)
        config = read_config(name_or_path) if model is None else model.config
        text_config = config.get_text_config()
        self._mask_kinds = mask_kinds(text_config, name_or_path)
        self.max_length: int = resolve_length(max_length, text_config, name_or_path)
        self._ranks = Ranks(tp, max_rows) if tp > 1 else None
        self.model = model or load_model(
            name_or_path,
            config,
            dtype=dtype,
            device=first_device,
            device_map=device_map,
            tp=tp,
            attn_implementation=attn_implementation,
            quantization=quantization,
            adapter=adapter,
        )
        grouped.enable(self.model)
        if tp == 1 and not compile:
            pack(self.model)
        self._run = torch.compile(self.model, dynamic=True) if compile else self.model
        head = self.model.get_output_embeddings().weight
        self.vocab_size: int = head.shape[0]
        self.device: torch.device = head.device
        self.eos_token_ids = eos_token_ids(self.model.generation_config, config)
        self.num_computed_tokens = 0
        self._sliding_window: int = getattr(text_config, "sliding_window", None) or self.max_length
        self._takes_kinds = bool(getattr(self.model.config, "layer_types", None))
        self._is_flash = self.model.config.get_text_config()._attn_implementation == flash.NAME
        self._shown = torch.zeros((), dtype=self.model.dtype, device=self.device)
        self._hidden = torch.full_like(self._shown, torch.finfo(self.model.dtype).min)
        self._places = torch.arange(self.max_length, device=self.device)
        self._prefill_chunk = prefill_chunk
        self._lock = threading.Lock()  # a draft drafts on one thread and answers on another
        self.cache = RowCache(text_config.num_hidden_layers, max_rows, self.max_length)
        if preallocate:
            self._preallocate()

    @cached_property
    def vocabulary_id(self) -> str:
        """A digest of the tokenizer's vocabulary; the vocabulary's size where there is no tokenizer."""
        try:
            return Tokenizer(self.name).vocabulary_id
        except ModelError:
            return f"{self.vocab_size} tokens"

    @torch.inference_mode()
    def logits(self, rows: Sequence[Row]) -> torch.Tensor:
        """Scores the rows, computing only what the cache does not remember; see `ModelBackend.logits`. For any thread."""
        with self._lock, self._ranks.step(rows) if self._ranks else nullcontext():
            return self._logits(rows)

    def num_remembered(self, tokens: list[int]) -> int:
        """Counts the leading tokens that a row of the cache holds; see `ModelBackend.num_remembered`."""
        with self._lock:
            return self.cache.longest_prefix(tokens)

    @torch.inference_mode()
    def follow(self) -> None:
        """Makes every pass that the first of the model's processes makes, until that ends; for the others."""
        assert self._ranks is not None and self._ranks.rank > 0, "a model in one process, or the first of several, leads"
        for rows in self._ranks.requests():
            self._logits(rows)

    def check(self) -> None:
        """Raises a `ModelError` if a pass has failed that other processes took part in; the model is then of no more use."""
        if self._ranks:
            self._ranks.check()

    def check_cache(self) -> None:
        """Asserts that the cache agrees with itself."""
        with self._lock:
            self.cache.check()

    def close(self) -> None:
        """Lets the other processes of the model end."""
        if self._ranks:
            self._ranks.end()

    def _logits(self, rows: Sequence[Row]) -> torch.Tensor:
        if len(rows) > self.cache.max_rows:  # more than the cache can remember take several passes
            parts = [rows[i : i + self.cache.max_rows] for i in range(0, len(rows), self.cache.max_rows)]
            return torch.cat([self._logits(part) for part in parts])
        numbers = self.cache.seat([row.id for row in rows], [row.tokens for row in rows])
        starts = [self._start(number, row) for number, row in zip(numbers, rows, strict=True)]
        for index, (number, row) in enumerate(zip(numbers, rows, strict=True)):
            starts[index] = self._prefill(number, row, starts[index])
        return self._forward(rows, numbers, starts)

    def _preallocate(self) -> None:
        """Takes the cache's whole memory, so that a lack of it shows now and not under load."""
        shape_cache(self.cache, self.model)
        try:
            self.cache.reserve()
        except RuntimeError as error:  # torch.OutOfMemoryError is one; a CPU's allocator raises it as it is
            devices = ", ".join(sorted({str(weights.device) for weights in self.model.parameters()}))
            raise ModelError(
                f"model {self.name!r}: {devices} has no room for a cache of {self.cache.num_bytes_reserved()} bytes "
                f"({self.cache.max_rows} rows x {self.max_length} tokens x "
                f"{readable_bytes(self.cache.num_bytes_per_token())}): lower max_rows or max_length"
            ) from error

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
        scored = self._run(
            input_ids=tokens,
            position_ids=positions,
            attention_mask=self._masks(positions, window.length, ends),
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=max(max(num_scored), 1),
        ).logits  # [len(rows), max(num_scored), vocab_size]
        self.num_computed_tokens += sum(ends) - sum(starts)
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

    def _masks(self, positions: torch.Tensor, length: int, ends: list[int]) -> torch.Tensor | dict[str, torch.Tensor]:
        """Additive masks, [rows, 1, num_new, length]: each token sees its row up to itself, within a sliding window."""
        if self._is_flash:
            masks = dict.fromkeys(self._mask_kinds, flash.row_ends(ends, self.device))
        else:
            distance = positions[:, None, :, None] - self._places[:length]
            masks = {kind: self._mask(kind, distance) for kind in self._mask_kinds}
        # Models whose config lists a kind for each layer take a mask for each kind, the others take one.
        return masks if self._takes_kinds else next(iter(masks.values()))

    def _mask(self, kind: str, distance: torch.Tensor) -> torch.Tensor:
        visible = distance >= 0
        if kind == "sliding_attention":
            visible &= distance < self._sliding_window
        return torch.where(visible, self._shown, self._hidden)

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

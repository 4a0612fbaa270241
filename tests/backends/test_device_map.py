"""Layers on several devices: each layer's rows are where it is, and the logits are as on one device."""

from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from transformers import LlamaForCausalLM

from specdecode.backends.backend import ModelConfig, Row, create_backend
from specdecode.backends.huggingface import HuggingFaceBackend
from specdecode.backends.kv_cache import RowCache
from specdecode.backends.memory import estimate_memory
from specdecode.config import check_config
from specdecode.errors import ConfigError, ModelError

MODULES = ("model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.layers.1", "model.norm", "lm_head")
ROUNDS = [
    [Row("a", [5, 6, 7], 2), Row("b", [9, 8, 7, 6, 5], 1)],
    [Row("a", [5, 6, 7, 8, 9], 3), Row("b", [9, 8, 7, 1], 1), Row("c", [3], 1)],
    [Row("c", [3, 4, 5], 3)],
]


def rounds(backend: Any) -> torch.Tensor:
    return torch.cat([backend.logits(rows) for rows in ROUNDS])


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}, dict.fromkeys(MODULES, "cpu")], ids=["auto", "whole", "modules"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="auto would choose the GPU")
def test_a_map_to_one_device_is_that_device(device_map: Any, target_folder: str) -> None:
    backend = create_backend(target_folder, device_map=device_map, max_rows=4)
    assert torch.equal(rounds(backend), rounds(create_backend(target_folder, device="cpu", max_rows=4)))


def test_hooks_between_devices_leave_the_logits_and_the_cache_alone(target_folder: str) -> None:
    backend = create_backend(target_folder, device="cpu", max_rows=4, prefill_chunk=2)
    assert isinstance(backend, HuggingFaceBackend)
    expected = rounds(create_backend(target_folder, device="cpu", max_rows=4, prefill_chunk=2))
    skipped = LlamaForCausalLM._skip_keys_device_placement
    dispatch_model(backend.model, dict.fromkeys(MODULES, "cpu"), force_hooks=True, skip_keys=skipped)
    assert hasattr(backend.model.model.layers[1], "_hf_hook")
    assert torch.equal(rounds(backend), expected)
    backend.cache.check()
    assert backend.num_computed_tokens == 8 + 5 + 3  # what the cache held was not computed again


def test_each_layer_s_rows_are_on_the_device_of_its_keys() -> None:
    cache = RowCache(num_layers=2, max_rows=2, max_length=8)
    devices = (torch.device("cpu"), torch.device("meta"))
    for tokens in ([1, 2], [1, 2, 3]):
        [row] = cache.seat(["a"], [tokens])
        start = cache.remembered(row, tokens)
        cache.open(row, row + 1, [start], [len(tokens)], devices[0])
        for layer, device in zip(cache.layers, devices, strict=True):
            new = torch.ones(1, 2, len(tokens) - start, 4, device=device)  # [rows, num_heads, num_new, head_dim]
            keys, values = layer.update(new, new)
            assert (keys.device, values.device) == (device, device)
            assert keys.shape == (1, 2, len(tokens), 4)
        cache.remember(row, tokens)
    cache.reserve()
    assert [layer.keys.device for layer in cache.layers] == list(devices)
    assert [layer.keys.shape for layer in cache.layers] == [(2, 9, 2, 4)] * 2


def test_a_preallocated_cache_and_its_estimate_are_as_on_one_device(target_folder: str) -> None:
    config = ModelConfig(model=target_folder, device_map={"": "cpu"}, max_rows=3, max_length=32, preallocate=True)
    backend = create_backend(target_folder, device_map={"": "cpu"}, max_rows=3, max_length=32, preallocate=True)
    assert isinstance(backend, HuggingFaceBackend)
    estimate = estimate_memory(config)
    assert backend.cache.num_bytes() == estimate.num_kv_bytes
    assert estimate == estimate_memory(ModelConfig(model=target_folder, device="cpu", max_rows=3, max_length=32))


def test_a_device_beside_a_map_is_refused_in_one_line(target_folder: str) -> None:
    with pytest.raises(ConfigError, match=r"^x: top level: device_map: expected no device beside it, got device 'cpu'"):
        check_config({"model": target_folder, "device": "cpu", "device_map": "auto"}, ModelConfig, "x")
    with pytest.raises(ModelError, match=r"^device_map: expected no device beside it, got device 'cpu'$"):
        create_backend(target_folder, device="cpu", device_map="auto")


@pytest.mark.parametrize(
    ("device_map", "message"),
    [
        ("spread", r"device_map 'spread': expected a mapping, or one of auto, balanced, balanced_low_0, sequential"),
        ({}, r"device_map: expected a device for each module, got none"),
        ({"": "disk"}, r"device 'disk': expected auto, cpu, cuda or cuda:N"),
        ({"": "meta"}, r"device 'meta': expected auto, cpu, cuda or cuda:N"),
    ],
    ids=["unknown", "empty", "disk", "meta"],
)
def test_a_map_that_cannot_be_had_is_refused_in_one_line(device_map: Any, message: str, target_folder: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        create_backend(target_folder, device_map=device_map)
    assert "\n" not in str(caught.value)


def test_a_gpu_that_is_not_there_is_refused(target_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ModelError, match=r"^device 'cuda:1': this machine has no CUDA device$"):
        create_backend(target_folder, device_map={"model": "cpu", "lm_head": 1})


def test_weights_that_are_not_on_their_device_are_refused(target_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = LlamaForCausalLM.from_pretrained(target_folder)
    whole.model.layers[1].to("meta")  # as accelerate leaves what it offloads where the GPUs are too small
    monkeypatch.setattr("specdecode.backends.loading.AutoModelForCausalLM.from_pretrained", lambda *_, **__: whole)
    with pytest.raises(ModelError, match=r"expected room for all weights on GPUs, got weights on cpu, meta$"):
        create_backend(target_folder, device_map="auto")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_layers_on_two_gpus_score_as_on_one(target_folder: str) -> None:
    places = dict(zip(MODULES, (0, 0, 0, 1, 1, 1), strict=True))
    backend = create_backend(target_folder, dtype="float32", device_map=places, max_rows=4)
    assert isinstance(backend, HuggingFaceBackend)
    torch.testing.assert_close(rounds(backend), rounds(create_backend(target_folder, device="cuda:1", max_rows=4)))
    assert [layer.keys.device.index for layer in backend.cache.layers] == [0, 1]
    assert rounds(backend).device == torch.device("cuda:1")

"""What is estimated from the config is what a loaded model with a full cache takes."""

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import Gemma3TextConfig, LlamaConfig

from specdecode.backends.backend import ModelConfig, Row
from specdecode.backends.huggingface import HuggingFaceBackend
from specdecode.backends.kv_cache import RowCache
from specdecode.backends.memory import MemoryEstimate, estimate_memory, readable_bytes
from specdecode.backends.packing import num_packed_bytes
from specdecode.errors import ModelError
from tests.backends.recomputing import assert_equals_recomputed
from tests.backends.test_huggingface import FAMILIES, GROUPED

ROOM = {"max_rows": 3, "max_length": 100}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_estimate_is_what_is_taken(family, save_model):
    folder = save_model(FAMILIES[family], 0)
    estimate = estimate_memory(ModelConfig(model=folder, **ROOM))
    backend = HuggingFaceBackend(folder, **ROOM, preallocate=True)
    assert estimate.num_weight_bytes == sum(weights.nbytes for weights in backend.model.parameters())
    assert estimate.num_packed_bytes == num_packed_bytes(backend.model)
    assert estimate.num_kv_bytes == backend.cache.num_bytes()
    assert (estimate.rows, estimate.length) == (3, 100)
    assert estimate.num_kv_bytes == 3 * (100 + 1) * estimate.num_kv_bytes_per_token


def test_half_precision_takes_half(target_folder):
    full, half = (estimate_memory(ModelConfig(model=target_folder, dtype=dtype)) for dtype in ("float32", "bfloat16"))
    assert full.num_weight_bytes == 2 * half.num_weight_bytes
    assert full.num_kv_bytes == 2 * half.num_kv_bytes


def test_a_gpu_that_is_not_here_gets_the_stored_dtype(save_model):
    folder = save_model(LlamaConfig(**GROUPED, dtype="bfloat16"), 0)
    here, there = (estimate_memory(ModelConfig(model=folder, device=device)) for device in ("cpu", "cuda:3"))
    assert here.num_weight_bytes == 2 * there.num_weight_bytes


def test_tied_weights_are_counted_once(save_model):
    tied, untied = (
        estimate_memory(ModelConfig(model=save_model(Gemma3TextConfig(**GROUPED, tie_word_embeddings=is_tied), 0)))
        for is_tied in (True, False)
    )
    assert untied.num_weight_bytes - tied.num_weight_bytes == 61 * 32 * 4


def test_the_config_alone_is_enough(target_folder, tmp_path):
    shutil.copy(Path(target_folder) / "config.json", tmp_path)
    assert estimate_memory(ModelConfig(model=str(tmp_path))) == estimate_memory(ModelConfig(model=target_folder))


def test_a_large_model_is_estimated_as_its_makers_say(tmp_path):
    LlamaConfig(
        vocab_size=128256,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        dtype="bfloat16",
    ).save_pretrained(tmp_path)
    estimate = estimate_memory(ModelConfig(model=str(tmp_path), device="cuda", max_rows=8))
    assert estimate.num_weight_bytes == 2 * 70_553_706_496  # Llama 3 70B
    assert estimate.describe() == "weights 141 GB + cache 8 rows x 8192 tokens x 328 KB = 163 GB"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "missing/model-folder/at-all"}, "cannot be loaded"),
        ({"device": "gpu"}, "device 'gpu': expected"),
        ({"max_length": 513}, "at most 512"),
    ],
    ids=str,
)
def test_what_cannot_be_opened_cannot_be_estimated(options, message, target_folder):
    with pytest.raises(ModelError, match=message) as caught:
        estimate_memory(ModelConfig(**{"model": target_folder} | options))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 KB"), (13_640_000, "13.6 MB"), (999_600_000, "1.00 GB"), (5 * 10**15, "5000 TB")],
)
def test_bytes_are_written_with_three_digits(num_bytes, text):
    assert readable_bytes(num_bytes) == text


def test_an_estimate_reads_as_a_sum():
    estimate = MemoryEstimate(13_600_000, 16 * 4097 * 16_400, rows=16, length=4096, num_kv_bytes_per_token=16_400)
    assert estimate.describe() == "weights 13.6 MB + cache 16 rows x 4096 tokens x 16.4 KB = 1.09 GB"
    packed = replace(estimate, num_packed_bytes=10_000_000)
    assert packed.describe() == "weights 13.6 MB + packed 10.0 MB + cache 16 rows x 4096 tokens x 16.4 KB = 1.10 GB"


def test_a_preallocated_cache_is_whole_and_empty(target_folder):
    backend = HuggingFaceBackend(target_folder, **ROOM, preallocate=True)
    num_bytes = backend.cache.num_bytes()
    assert (backend.cache.rows, backend.num_computed_tokens) == ([], 0)
    for length in (3, 50, 100):
        assert_equals_recomputed(backend, [Row(name, [ord(name) % 61] * length, 2) for name in "abc"])
    assert backend.cache.num_bytes() == num_bytes


def test_a_growing_cache_takes_no_more_than_the_whole(target_folder):
    backend = HuggingFaceBackend(target_folder, max_rows=9, max_length=300)
    backend.logits([Row("a", [1, 2, 3], 1)])
    whole = estimate_memory(ModelConfig(model=target_folder, max_rows=9, max_length=300)).num_kv_bytes
    assert backend.cache.num_bytes() < whole / 2
    backend.logits([Row(str(number), [number] * 300, 1) for number in range(9)])
    assert backend.cache.num_bytes() == whole


def test_a_cache_that_does_not_fit_is_refused_with_its_bytes(target_folder):
    estimate = estimate_memory(ModelConfig(model=target_folder, max_rows=10**12))
    with pytest.raises(ModelError, match=f"cpu has no room for a cache of {estimate.num_kv_bytes} bytes") as caught:
        HuggingFaceBackend(target_folder, max_rows=10**12, preallocate=True)
    assert "\n" not in str(caught.value)


def test_a_gpus_out_of_memory_is_refused_alike(target_folder, monkeypatch):
    def reserve(_cache: RowCache) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(RowCache, "reserve", reserve)
    with pytest.raises(ModelError, match=r"no room for a cache of 77568 bytes \(3 rows x 100 tokens x 256 B\): lower max_rows"):
        HuggingFaceBackend(target_folder, **ROOM, preallocate=True)


MEASURE = """
import resource, sys
import torch
from specdecode.backends.backend import Row
from specdecode.backends.huggingface import HuggingFaceBackend

torch.set_num_threads(1)
warm = HuggingFaceBackend(sys.argv[1], max_rows=2, max_length=4096)
warm.logits([Row("a", [1] * 600, 1), Row("b", [2] * 600, 1)])  # what a forward pass takes besides is taken
backend = HuggingFaceBackend(sys.argv[1], max_rows=16, max_length=4096)
before = int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
for row in range(16):
    backend.logits([Row(str(row), [row] * 4096, 1)])
backend.logits([Row(str(row), [row] * 4096, 1) for row in range(16)])
print(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_sixteen_rows_of_4096_tokens_take_what_is_stated_beforehand(save_model):
    # Wide keys and values, so that the cache is most of what is taken, and little to compute.
    shape = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 32, "intermediate_size": 64}
    folder = save_model(LlamaConfig(vocab_size=61, num_hidden_layers=16, max_position_embeddings=4096, **shape), 0)
    stated = estimate_memory(ModelConfig(model=folder, max_rows=16, max_length=4096)).num_kv_bytes
    child = subprocess.run([sys.executable, "-c", MEASURE, folder], capture_output=True, text=True, check=True)
    assert stated > 1e9
    assert int(child.stdout) == pytest.approx(stated, rel=0.1)

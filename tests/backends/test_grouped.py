"""Heads that share keys attend to the cache where it lies, as to a copy for each; transformers generates without."""

import random
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from specdecode.backends import grouped
from specdecode.backends.backend import Row
from specdecode.backends.huggingface import HuggingFaceBackend
from specdecode.decoding.sequence import SamplingParams
from specdecode.evaluation import peers
from tests.backends.recomputing import random_tokens
from tests.backends.test_huggingface import GROUPED


@pytest.fixture
def folder(save_model: Any) -> str:
    path: str = save_model(LlamaConfig(**GROUPED), 0)
    return path


@pytest.mark.parametrize("num_new", [1, 2, 7])
@pytest.mark.parametrize("is_bool", [False, True])
def test_each_head_attends_to_the_keys_that_are_its_own(num_new: int, is_bool: bool) -> None:
    torch.manual_seed(0)
    query = torch.randn(3, 6, num_new, 8, dtype=torch.float64)
    key, value = torch.randn(2, 3, 2, 20, 8, dtype=torch.float64)
    visible = torch.rand(3, 1, num_new, 20) < 0.6
    visible[..., 0] = True
    bias = torch.zeros(visible.shape, dtype=torch.float64).masked_fill(~visible, float("-inf"))
    attended, _ = grouped.attend(torch.nn.Module(), query, key, value, visible if is_bool else bias, scaling=0.3)
    for head in range(6):
        scores = query[:, head] @ key[:, head // 3].transpose(1, 2) * 0.3 + bias[:, 0]
        torch.testing.assert_close(attended[:, :, head], scores.softmax(-1) @ value[:, head // 3])


def test_what_sdpa_refuses_is_refused() -> None:
    query, key, mask = torch.randn(1, 4, 2, 8), torch.randn(1, 2, 5, 8), torch.zeros(1, 1, 2, 5)
    with pytest.raises(ValueError, match="does not support `softcap`"):
        grouped.attend(torch.nn.Module(), query, key, key, mask, softcap=5.0)


def test_keys_and_values_are_read_where_they_lie(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backend, seen = HuggingFaceBackend(folder), []
    attend = grouped.scaled_dot_product_attention

    def watched(
        queries: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, **options: Any
    ) -> torch.Tensor:
        seen.append((key.untyped_storage().data_ptr(), value.untyped_storage().data_ptr()))
        attended: torch.Tensor = attend(queries, key, value, mask, **options)
        return attended

    monkeypatch.setattr(grouped, "scaled_dot_product_attention", watched)
    backend.logits([Row("a", [1, 2, 3, 4, 5], 3), Row("b", [7, 8], 2)])
    layers = backend.cache.layers
    assert seen == [(layer.keys.untyped_storage().data_ptr(), layer.values.untyped_storage().data_ptr()) for layer in layers]


def test_ragged_rows_have_the_logits_of_transformers(folder: str) -> None:
    backend, rng = HuggingFaceBackend(folder, dtype="float64"), random.Random(0)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    sequences = [random_tokens(rng, length) for length in (30, 1, 17)]
    for _ in range(4):
        found = backend.logits([Row(str(place), tokens, 1) for place, tokens in enumerate(sequences)])
        with torch.inference_mode():
            expected = torch.cat([model(torch.tensor([tokens])).logits[:, -1] for tokens in sequences])
        torch.testing.assert_close(found, expected)
        sequences = [tokens + random_tokens(rng, rng.randint(1, 5)) for tokens in sequences]


@pytest.mark.parametrize("peer", ["hf_plain", "hf_assisted", "prompt_lookup"])
def test_transformers_generates_without_it(folder: str, monkeypatch: pytest.MonkeyPatch, peer: str) -> None:
    target, draft = HuggingFaceBackend(folder), HuggingFaceBackend(folder)
    monkeypatch.setattr(grouped, "scaled_dot_product_attention", None)
    answer = peers.peer_generate(peer, target.model, draft.model, [1, 2, 3], SamplingParams(max_tokens=4), 2)
    assert len(answer.tokens) == 4
    assert [backend.model.config._attn_implementation for backend in (target, draft)] == [grouped.NAME] * 2


def test_transformers_generates_the_same_with_it(folder: str) -> None:
    ids, options = torch.tensor([[5, 3, 8, 5, 3]]), {"max_new_tokens": 12, "do_sample": False, "prompt_lookup_num_tokens": 3}
    model = HuggingFaceBackend(folder, dtype="float64").model
    with grouped.ungrouped(model):
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    assert torch.equal(model.generate(ids, attention_mask=torch.ones_like(ids), **options), expected)

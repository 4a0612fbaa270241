"""Packed layers compute what they did, each row alike in any company; transformers generates with them as they were."""

import functools
from collections import Counter

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from specdecode.backends.backend import Row
from specdecode.backends.huggingface import HuggingFaceBackend
from specdecode.backends.packing import PackedAttention, PackedMLP, Product, num_packed_bytes, pack, unpacked
from specdecode.decoding.sequence import SamplingParams
from specdecode.evaluation import peers
from tests.conftest import SaveModel

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


PACKED = (Product, PackedAttention, PackedMLP)
SHAPE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
FAMILIES = {
    "llama": LlamaConfig(**SHAPE),
    "llama with biases": LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True),
    "mistral": MistralConfig(**SHAPE, sliding_window=None),
    "qwen2": Qwen2Config(**SHAPE),
    "qwen3": Qwen3Config(**SHAPE),
    "gemma2": Gemma2Config(**SHAPE),  # none of those that are known: each layer is a product of its own
}


def is_packed(module: torch.nn.Module) -> bool:
    return isinstance(module.__dict__.get("forward"), PACKED)


def packed_modules(model: torch.nn.Module) -> dict[str, int]:
    return dict(Counter(type(module).__name__ for module in model.modules() if is_packed(module)))


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("num_rows", [1, 2, 5, 17, 300])
def test_a_packed_layer_computes_the_same(num_rows: int, has_bias: bool) -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(96, 70, bias=has_bias)
    x = torch.randn(2, num_rows, 96)
    with torch.inference_mode():
        torch.testing.assert_close(Product(layer)(x), layer(x))


def test_a_row_is_the_same_to_the_bit_in_any_company() -> None:
    torch.manual_seed(0)
    multiply, x = Product(torch.nn.Linear(256, 704, bias=False)), torch.randn(64, 256)
    with torch.inference_mode():
        alone = torch.cat([multiply(row[None]) for row in x])
        for count in (2, 3, 5, 9, 64):
            assert torch.equal(multiply(x[:count]), alone[:count])


@pytest.mark.parametrize("has_bias", [True, False])
def test_layers_of_one_input_are_one_product(has_bias: bool) -> None:
    torch.manual_seed(0)
    layers = [torch.nn.Linear(96, width, bias=has_bias) for width in (64, 32, 32)]
    x = torch.randn(2, 5, 96)
    with torch.inference_mode():
        expected = torch.cat([layer(x) for layer in layers], -1)
        torch.testing.assert_close(Product(*layers)(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_backend_is_packed_and_scores_what_transformers_does(family: str, save_model: SaveModel) -> None:
    folder = save_model(FAMILIES[family], 0)
    backend, tokens = HuggingFaceBackend(folder), list(range(1, 40))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        expected = model(torch.tensor([tokens])).logits[0]
        close = functools.partial(torch.testing.assert_close, atol=1e-4, rtol=1e-4)
        close(backend.logits([Row("a", tokens[:20], 20)]), expected[:20])
        close(backend.logits([Row("a", tokens[:21], 1)]), expected[20:21])  # after what the cache remembers
        close(backend.logits([Row("a", tokens, 5), Row("b", tokens[:30], 2)]), torch.cat([expected[34:39], expected[28:30]]))
        close(backend.model(torch.tensor([tokens])).logits[0], expected)  # without a cache


def test_families_that_are_known_are_packed_by_attention_and_mlp(save_model: SaveModel) -> None:
    whole = {"Attention": 2, "MLP": 2, "Linear": 1}  # the linear layer is the head
    for family, config in FAMILIES.items():
        model = HuggingFaceBackend(save_model(config, 0)).model
        found = {
            name.removeprefix(type(model).__name__.removesuffix("ForCausalLM")): n for name, n in packed_modules(model).items()
        }
        assert found == ({"Linear": 15} if family == "gemma2" else whole), family


def test_another_attention_is_packed_layer_by_layer(save_model: SaveModel) -> None:
    model = HuggingFaceBackend(save_model(FAMILIES["llama"], 0), attn_implementation="eager").model
    assert packed_modules(model) == {"LlamaMLP": 2, "Linear": 9}


@pytest.mark.parametrize("has_bfloat16", [True, False])
def test_bfloat16_is_packed_where_the_processor_multiplies_it(
    has_bfloat16: bool, save_model: SaveModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    if has_bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this processor does not multiply bfloat16")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_bfloat16)
    folder = save_model(FAMILIES["llama"], 0)
    backend, tokens = HuggingFaceBackend(folder, dtype="bfloat16"), list(range(1, 40))
    assert bool(num_packed_bytes(backend.model)) == bool(packed_modules(backend.model)) == has_bfloat16
    exact = HuggingFaceBackend(folder).logits([Row("a", tokens, 39)])
    torch.testing.assert_close(backend.logits([Row("a", tokens, 39)]).float(), exact, atol=0.02, rtol=0.05)


def test_what_no_product_is_for_stays_as_it_is(target_folder: str) -> None:
    model = HuggingFaceBackend(target_folder, dtype="float64").model
    assert num_packed_bytes(model) == 0
    assert not packed_modules(model)


def test_transformers_generates_without_packing(target_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = HuggingFaceBackend(target_folder)
    seen: list[bool] = []
    generate = backend.model.generate

    def watched(*args: object, **options: object) -> object:
        seen.append(any(map(is_packed, backend.model.modules())))
        return generate(*args, **options)

    monkeypatch.setattr(backend.model, "generate", watched)
    answer = peers.peer_generate("hf_plain", backend.model, None, [1, 2, 3], SamplingParams(max_tokens=4), 0)
    assert len(answer.tokens) == 4
    assert seen == [False]
    assert any(map(is_packed, backend.model.modules()))


def test_layers_are_packed_again_when_what_is_done_without_fails() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    pack(model)
    with pytest.raises(RuntimeError), unpacked(model):
        assert not is_packed(model[0])
        raise RuntimeError
    assert is_packed(model[0])

"""Packed layers compute what they did, each row alike in any company; transformers generates with them as they were."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from specdecode.backends.backend import Row
from specdecode.backends.huggingface import HuggingFaceBackend
from specdecode.backends.packing import PackedLinear, Product, num_packed_bytes, pack, unpacked
from specdecode.decoding.sequence import SamplingParams
from specdecode.evaluation import peers

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


def layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    return [layer for layer in model.modules() if isinstance(layer, torch.nn.Linear)]


def packed(layer: torch.nn.Linear) -> PackedLinear:
    return PackedLinear(Product([layer]), 0)


class Block(torch.nn.Module):
    """Four layers of one input, three of which are usually called with the same, and one of another."""

    def __init__(self, *, has_bias: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q_proj = torch.nn.Linear(96, 64, bias=has_bias)
        self.k_proj = torch.nn.Linear(96, 32, bias=has_bias)
        self.v_proj = torch.nn.Linear(96, 32, bias=has_bias)
        self.o_proj = torch.nn.Linear(64, 96, bias=has_bias)


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("num_rows", [1, 2, 5, 17, 300])
def test_a_packed_layer_computes_the_same(num_rows: int, has_bias: bool) -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(96, 70, bias=has_bias)
    x = torch.randn(2, num_rows, 96)
    with torch.inference_mode():
        torch.testing.assert_close(packed(layer)(x), layer(x))


def test_a_row_is_the_same_to_the_bit_in_any_company() -> None:
    torch.manual_seed(0)
    multiply, x = packed(torch.nn.Linear(256, 704, bias=False)), torch.randn(64, 256)
    with torch.inference_mode():
        alone = torch.cat([multiply(row[None]) for row in x])
        for count in (2, 3, 5, 9, 64):
            assert torch.equal(multiply(x[:count]), alone[:count])


@pytest.mark.parametrize("has_bias", [True, False])
def test_layers_of_one_input_are_one_product_however_they_are_called(has_bias: bool) -> None:
    plain, block = Block(has_bias=has_bias), Block(has_bias=has_bias)
    pack(block)
    one, other = torch.randn(2, 5, 96), torch.randn(2, 5, 96)
    calls = [("q", one), ("k", one), ("v", one)]  # as models do
    calls += [("q", one), ("q", one), ("v", other), ("k", one), ("k", other), ("v", one), ("q", other.clone()), ("v", other)]
    with torch.inference_mode():
        for name, x in calls:
            expected = getattr(plain, f"{name}_proj")(x)
            torch.testing.assert_close(getattr(block, f"{name}_proj")(x), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(block.o_proj(one[..., :64]), plain.o_proj(one[..., :64]), atol=1e-5, rtol=1e-5)


def test_one_product_serves_its_layers_and_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    block, x = Block(), torch.randn(1, 3, 96)
    pack(block)
    product: Product = block.q_proj.forward._product
    assert product is block.k_proj.forward._product is block.v_proj.forward._product
    assert product is not block.o_proj.forward._product
    multiply, seen = product._multiply, []
    monkeypatch.setattr(product, "_multiply", lambda *given: seen.append(1) or multiply(*given))
    with torch.inference_mode():
        for layer in (block.q_proj, block.k_proj, block.v_proj):
            layer(x)
    assert seen == [1]
    assert product._input is None
    assert product._parts == [None, None, None]


def test_layers_that_do_not_fit_together_are_products_of_their_own() -> None:
    block = Block()
    block.k_proj = torch.nn.Linear(48, 32, bias=False)
    pack(block)
    assert block.q_proj.forward._product is not block.v_proj.forward._product
    with torch.inference_mode():
        assert block.k_proj(torch.randn(3, 48)).shape == (3, 32)


def test_a_backend_is_packed_and_scores_what_transformers_does(target_folder: str) -> None:
    backend = HuggingFaceBackend(target_folder)
    assert all(isinstance(layer.forward, PackedLinear) for layer in layers(backend.model))
    tokens = list(range(1, 40))
    model = AutoModelForCausalLM.from_pretrained(target_folder, dtype=torch.float32)
    with torch.inference_mode():
        expected = model(torch.tensor([tokens])).logits[0]
    torch.testing.assert_close(backend.logits([Row("a", tokens, len(tokens))]), expected, atol=1e-4, rtol=1e-4)


def test_what_is_no_float32_stays_as_it_is(target_folder: str) -> None:
    for dtype in ("float64", "bfloat16"):
        model = HuggingFaceBackend(target_folder, dtype=dtype).model
        assert num_packed_bytes(model) == 0
        assert not any(isinstance(layer.forward, PackedLinear) for layer in layers(model))


def test_transformers_generates_without_packing(target_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = HuggingFaceBackend(target_folder)
    seen: list[bool] = []
    generate = backend.model.generate

    def watched(*args: object, **options: object) -> object:
        seen.append(any(isinstance(layer.forward, PackedLinear) for layer in layers(backend.model)))
        return generate(*args, **options)

    monkeypatch.setattr(backend.model, "generate", watched)
    answer = peers.peer_generate("hf_plain", backend.model, None, [1, 2, 3], SamplingParams(max_tokens=4), 0)
    assert len(answer.tokens) == 4
    assert seen == [False]
    assert all(isinstance(layer.forward, PackedLinear) for layer in layers(backend.model))


def test_layers_are_packed_again_when_what_is_done_without_fails() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    pack(model)
    with pytest.raises(RuntimeError), unpacked(model):
        assert not isinstance(model[0].forward, PackedLinear)
        raise RuntimeError
    assert isinstance(model[0].forward, PackedLinear)

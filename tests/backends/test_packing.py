"""Packed layers compute what they did, each row alike in any company; transformers generates with them as they were."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from specdecode.backends.backend import Row
from specdecode.backends.huggingface import HuggingFaceBackend
from specdecode.backends.packing import PackedLinear, num_packed_bytes, pack, unpacked
from specdecode.decoding.sequence import SamplingParams
from specdecode.evaluation import peers

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


def layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    return [layer for layer in model.modules() if isinstance(layer, torch.nn.Linear)]


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("num_rows", [1, 2, 5, 17, 300])
def test_a_packed_layer_computes_the_same(num_rows: int, has_bias: bool) -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(96, 70, bias=has_bias)
    x = torch.randn(2, num_rows, 96)
    with torch.inference_mode():
        torch.testing.assert_close(PackedLinear(layer)(x), layer(x))


def test_a_row_is_the_same_to_the_bit_in_any_company() -> None:
    torch.manual_seed(0)
    packed, x = PackedLinear(torch.nn.Linear(256, 704, bias=False)), torch.randn(64, 256)
    with torch.inference_mode():
        alone = torch.cat([packed(row[None]) for row in x])
        for count in (2, 3, 5, 9, 64):
            assert torch.equal(packed(x[:count]), alone[:count])


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

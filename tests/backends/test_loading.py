"""Each way to load a model changes what it promises to change, or is refused in one line."""

import random
import shutil
import sys
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma3TextConfig

from specdecode.backends import grouped
from specdecode.backends.backend import ModelConfig, Row, create_backend, open_model
from specdecode.backends.huggingface import HuggingFaceBackend
from specdecode.config import check_config
from specdecode.errors import ConfigError, ModelError
from tests.backends.recomputing import random_tokens
from tests.backends.test_huggingface import FAMILIES, GROUPED

# What packages say to each other, and neither to us nor to a user.
PEFT_WARNS = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
TORCH_WARNS = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

ROWS = [Row("a", [3, 1, 4, 1, 5, 9], 3), Row("b", [2, 7, 1], 2)]
CAPPED = {
    "gemma2": Gemma2Config(**GROUPED, head_dim=8, query_pre_attn_scalar=8),
    "gemma3": Gemma3TextConfig(**GROUPED, head_dim=8, query_pre_attn_scalar=8, attn_logit_softcapping=50.0),
}


@pytest.fixture
def adapter_folder(target_folder, tmp_path) -> str:
    """A LoRA with random weights, large enough to matter."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        options = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "up_proj"], "init_lora_weights": False}
        model = get_peft_model(
            AutoModelForCausalLM.from_pretrained(target_folder), LoraConfig(**options, task_type="CAUSAL_LM")
        )
    model.save_pretrained(tmp_path / "adapter")
    return str(tmp_path / "adapter")


@pytest.mark.parametrize("family", [*CAPPED, "gpt-oss", "gpt-j"])
def test_auto_is_eager_where_sdpa_would_change_the_model(family, save_model):
    folder = save_model(CAPPED.get(family) or FAMILIES[family], 0)
    automatic = HuggingFaceBackend(folder)
    assert automatic.model.config._attn_implementation == "eager"
    assert torch.equal(automatic.logits(ROWS), create_backend(folder, attn_implementation="eager").logits(ROWS))


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_auto_is_sdpa_for_all_others(family, save_model):
    assert HuggingFaceBackend(save_model(FAMILIES[family], 0)).model.config._attn_implementation == grouped.NAME


@pytest.mark.parametrize("family", CAPPED)
def test_sdpa_is_refused_for_a_model_that_it_would_change(family, save_model):
    with pytest.raises(ModelError, match="caps its attention logits, which sdpa drops: expected auto or eager") as caught:
        create_backend(save_model(CAPPED[family], 0), attn_implementation="sdpa")
    assert "\n" not in str(caught.value)


def test_another_attention_is_refused_in_one_line(target_folder):
    with pytest.raises(ModelError, match="attn_implementation 'flex': expected auto, sdpa, eager or flash_attention_2"):
        create_backend(target_folder, attn_implementation="flex")
    with pytest.raises(ConfigError, match=r"serve\.yaml: attn_implementation: .*'sdpa'.*, got 'flex'"):
        check_config({"model": target_folder, "attn_implementation": "flex"}, ModelConfig, "serve.yaml")


@TORCH_WARNS
@pytest.mark.skipif(not (shutil.which("c++") or shutil.which("g++")), reason="compiling for a CPU needs a C++ compiler")
def test_a_compiled_model_gives_the_same_logits(target_folder, monkeypatch):
    calls: list[dict[str, Any]] = []
    compile = torch.compile

    def counting(model: torch.nn.Module, **options: Any) -> Any:
        compiled = compile(model, **options)
        return lambda **inputs: calls.append(options) or compiled(**inputs)

    monkeypatch.setattr(torch, "compile", counting)
    compiled, plain = (
        open_model(ModelConfig(model=target_folder, compile=is_compiled, preallocate=True)) for is_compiled in (True, False)
    )
    for count in (6, 9):
        rows = [
            Row("a", random_tokens(random.Random(count), count), 3),
            Row("b", random_tokens(random.Random(0), count - 2), 2),
        ]
        torch.testing.assert_close(compiled.logits(rows), plain.logits(rows), atol=2e-5, rtol=0)
    assert calls == [{"dynamic": True}] * 2


@PEFT_WARNS
@pytest.mark.parametrize("device_map", [None, {"": "cpu"}], ids=["one device", "map"])
def test_an_adapter_is_merged_into_the_weights(device_map, adapter_folder, target_folder):
    backend = open_model(ModelConfig(model=target_folder, adapter=adapter_folder, device_map=device_map))
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(target_folder), adapter_folder).eval()
    logits, plain = backend.logits(ROWS), create_backend(target_folder).logits(ROWS)
    with torch.inference_mode():
        expected = torch.cat([adapted(input_ids=torch.tensor([row.tokens])).logits[0, -row.num_scored :] for row in ROWS])
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=0)
    assert (logits - plain).abs().max() > 0.1
    assert not any("lora" in name for name, _ in backend.model.named_parameters())


def test_an_adapter_that_is_not_there_is_refused(target_folder, tmp_path):
    for folder in (tmp_path / "missing", tmp_path):
        with pytest.raises(ModelError, match=r"adapter '.*': expected a folder with an adapter_config\.json"):
            create_backend(target_folder, adapter=str(folder))


@PEFT_WARNS
def test_an_adapter_of_another_model_is_refused_in_one_line(adapter_folder, save_model):
    with pytest.raises(ModelError, match=r"adapter '.*' cannot be loaded: ") as caught:
        create_backend(save_model(FAMILIES["gpt2"], 0), adapter=adapter_folder)
    assert "\n" not in str(caught.value)


@PEFT_WARNS
def test_an_adapter_without_its_package_is_refused(adapter_folder, target_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ModelError, match=r"needs the package peft: pip install 'specdecode\[adapters\]'"):
        create_backend(target_folder, adapter=adapter_folder)


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ({"quant_method": "int3"}, "quantization 'int3' cannot be used: Unknown quantization type, got int3"),
        ({"bits": 4}, "quantization None cannot be used: .* no `quant_method`"),
        ({"quant_method": "bitsandbytes"}, "bitsandbytes needs load_in_4bit: true or load_in_8bit: true"),
        ({"quant_method": "quanto", "weights": "int3"}, "quantization 'quanto' cannot be used: Only support weights in"),
    ],
    ids=str,
)
def test_a_quantization_that_does_not_exist_is_refused_in_one_line(quantization, message, target_folder):
    with pytest.raises(ModelError, match=message) as caught:
        open_model(ModelConfig(model=target_folder, quantization=quantization))
    assert "\n" not in str(caught.value)


def test_a_quantization_without_its_package_is_refused_in_one_line(target_folder, monkeypatch):
    monkeypatch.setattr("transformers.quantizers.quantizer_quanto.is_optimum_quanto_available", lambda: False)
    with pytest.raises(ModelError, match=r"cannot be loaded: .*requires optimum-quanto library") as caught:
        create_backend(target_folder, quantization={"quant_method": "quanto", "weights": "int8"})
    assert "\n" not in str(caught.value)


def test_quantized_weights_are_loaded_to_their_device(target_folder, monkeypatch):
    load, seen = AutoModelForCausalLM.from_pretrained, {}

    def loading(folder: str, quantization_config: Any, device_map: Any, **options: Any) -> Any:
        seen.update(quantization=quantization_config, device_map=device_map)
        return load(folder, **options)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", loading)
    create_backend(target_folder, quantization={"quant_method": "quanto", "weights": "int4"})
    assert (seen["quantization"].quant_method, seen["quantization"].weights) == ("quanto", "int4")
    assert seen["device_map"] == {"": torch.device("cpu")}

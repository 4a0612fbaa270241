"""Any causal language model of transformers decodes from the cache as without it; what cannot is refused in one line."""

import random
import shutil
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    Cohere2Config,
    DeepseekV3Config,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTBigCodeConfig,
    GPTJConfig,
    GPTNeoConfig,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteConfig,
    JambaConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    MptConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
    RwkvConfig,
    SmolLM3Config,
    StableLmConfig,
    Starcoder2Config,
)

from specdecode.backends.backend import ModelBackend, ModelConfig, Row, create_backend, open_model
from specdecode.backends.huggingface import HuggingFaceBackend
from specdecode.decoding.loop import speculative_decode
from specdecode.errors import ModelError
from tests.backends.recomputing import assert_equals_recomputed, random_tokens

COMMON = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "eos_token_id": None}
COMMON |= {"max_position_embeddings": 128, "initializer_range": 0.3, "pad_token_id": 0, "bos_token_id": 1}
WIDE = COMMON | {"intermediate_size": 48}
GROUPED = WIDE | {"num_key_value_heads": 2}
GPT = {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "initializer_range": 0.3}
GPT |= {"bos_token_id": 1, "eos_token_id": None}
SLIDING = {"sliding_window": 6}
MOE = {"num_local_experts": 2, "num_experts_per_tok": 1}
MIXED_LAYERS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 6}

FAMILIES = {
    "llama": LlamaConfig(**GROUPED),
    "qwen2": Qwen2Config(**GROUPED),
    "qwen2-sliding": Qwen2Config(**GROUPED, use_sliding_window=True, max_window_layers=1, sliding_window=6),
    "qwen3": Qwen3Config(**GROUPED, head_dim=8),
    "qwen3-moe": Qwen3MoeConfig(**GROUPED, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
    "mistral-sliding": MistralConfig(**GROUPED, **SLIDING),
    "mixtral": MixtralConfig(**GROUPED, **MOE),
    "gemma2": Gemma2Config(**GROUPED, **MIXED_LAYERS, head_dim=8, query_pre_attn_scalar=8),
    "gemma3": Gemma3TextConfig(**GROUPED, **MIXED_LAYERS, head_dim=8, query_pre_attn_scalar=8),
    "gpt2": GPT2Config(**GPT),
    "gpt-neox": GPTNeoXConfig(**WIDE),
    "gpt-j": GPTJConfig(**GPT, rotary_dim=4),
    "gpt-bigcode": GPTBigCodeConfig(**GPT),
    "gpt-oss": GptOssConfig(**GROUPED, **MIXED_LAYERS, **MOE, head_dim=8),
    "phi": PhiConfig(**WIDE),
    "phi3": Phi3Config(**GROUPED),
    "phi3-sliding": Phi3Config(**GROUPED, **SLIDING),
    "opt": OPTConfig(**COMMON, ffn_dim=48, word_embed_proj_dim=32, init_std=0.3),
    "falcon": FalconConfig(**COMMON),
    "starcoder2-sliding": Starcoder2Config(**GROUPED, **SLIDING),
    "stablelm": StableLmConfig(**GROUPED),
    "olmo2": Olmo2Config(**GROUPED),
    "smollm3": SmolLM3Config(**GROUPED),
    "granite": GraniteConfig(**GROUPED),
    "cohere2-sliding": Cohere2Config(**GROUPED, **SLIDING),
    "deepseek-v3": DeepseekV3Config(
        **WIDE,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        moe_intermediate_size=16,
        num_key_value_heads=4,
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_cached_equals_recomputed(family, save_model):
    backend = HuggingFaceBackend(save_model(FAMILIES[family], 0), max_rows=3, prefill_chunk=5)
    rng, texts = random.Random(0), {name: [] for name in "abcd"}
    for _ in range(10):
        names = rng.sample("abcd", rng.randint(1, 3))
        for name in names:
            kept = texts[name][: max(0, len(texts[name]) - rng.randint(0, 4))]
            texts[name] = kept + random_tokens(rng, rng.choice([1, 3, 5, 12]))
        assert_equals_recomputed(backend, [Row(name, texts[name], rng.randint(0, min(4, len(texts[name])))) for name in names])
    assert max(map(len, texts.values())) > 2 * 6  # longer than two windows


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_stays_near_full(dtype, target_folder):
    rows = [Row(name, random_tokens(random.Random(name), 20), 3) for name in "ab"]
    logits = create_backend(target_folder, dtype).logits(rows)
    assert logits.dtype == getattr(torch, dtype)
    full = create_backend(target_folder).logits(rows)
    assert (logits.float() - full).abs().mean() < 0.03 * full.abs().mean()


def test_a_backend_says_what_its_model_is(target_folder, save_model):
    backend = create_backend(target_folder, max_length=100)
    assert isinstance(backend, ModelBackend)
    assert (backend.vocab_size, backend.max_length, backend.eos_token_ids) == (61, 100, frozenset())
    ends = create_backend(save_model(LlamaConfig(**GROUPED | {"eos_token_id": [2, 7]}), 0))
    assert (ends.max_length, ends.eos_token_ids) == (128, {2, 7})


def test_a_vocabulary_is_what_its_tokens_mean(target_folder, draft_folder, tokenizer_folder, tmp_path):
    with_tokenizer = shutil.copytree(target_folder, tmp_path / "model")
    shutil.copytree(tokenizer_folder, with_tokenizer, dirs_exist_ok=True, ignore=shutil.ignore_patterns("config.json"))
    bare, same_size, other = (create_backend(folder).vocabulary_id for folder in (target_folder, draft_folder, with_tokenizer))
    assert bare == same_size != other


def test_the_same_config_opens_the_same_model(target_folder):
    opened = open_model(ModelConfig(model=target_folder, dtype="float32", max_length=64, max_rows=2))
    rows = [Row("a", [3, 1, 4, 1, 5], 2)]
    assert opened.max_length == 64
    assert torch.equal(opened.logits(rows), create_backend(target_folder, torch.float32).logits(rows))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float12"}, "dtype 'float12': expected auto, float32, bfloat16 or float16"),
        ({"dtype": "int8"}, "dtype 'int8': expected"),
        ({"device": "gpu"}, "device 'gpu': expected auto, cpu, cuda or cuda:N"),
        ({"device": "mps"}, "device 'mps': expected"),
        ({"attn_implementation": "flash_attention_2"}, "'flash_attention_2' needs a GPU, and the device is cpu"),
        ({"max_length": 0}, "max_length: expected at least 1, got 0"),
        ({"max_length": 513}, "max_length 513: .* at most 512"),
    ],
    ids=str,
)
def test_a_bad_option_is_refused_in_one_line(options, message, target_folder):
    with pytest.raises(ModelError, match=message) as caught:
        create_backend(target_folder, **options)
    assert "\n" not in str(caught.value)


def test_a_device_that_is_not_there_is_refused(target_folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ModelError, match="device 'cuda:1': this machine has no CUDA device"):
        create_backend(target_folder, device="cuda:1")


@pytest.mark.parametrize("name", ["missing", "empty", "no-weights", "cut-off", "not-json", "bad-value"])
def test_a_model_that_does_not_load_is_refused_in_one_line(name, target_folder, tmp_path):
    folder = tmp_path / name
    if name != "missing":
        folder.mkdir()
    if name in ("no-weights", "cut-off", "not-json"):
        shutil.copy(Path(target_folder) / "config.json", folder)
    if name == "cut-off":
        (folder / "model.safetensors").write_bytes((Path(target_folder) / "model.safetensors").read_bytes()[:5000])
    if name == "not-json":
        (folder / "config.json").write_text("{")
    if name == "bad-value":
        (folder / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": "two"}')
    with pytest.raises(ModelError, match=f"model '.*{name}' cannot be loaded: ") as caught:
        create_backend(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MambaConfig(num_hidden_layers=2), "layers of linear_attention: expected full or sliding attention"),
        (
            Qwen3NextConfig(**GROUPED, layer_types=["linear_attention", "full_attention"]),
            "layers of linear_attention: expected",
        ),
        (JambaConfig(**GROUPED, attn_layer_period=2, attn_layer_offset=1), "layers of linear_attention: expected"),
        (RwkvConfig(num_hidden_layers=2), "layers of linear_attention: expected"),
        (GPTNeoConfig(vocab_size=61, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["local"], 2]]), "local"),
        (FalconConfig(**COMMON, alibi=True), "alibi_attention"),
        (BloomConfig(vocab_size=61, hidden_size=32, n_layer=2, n_head=4), "alibi_attention"),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_a_model_that_cannot_be_rolled_back_is_refused_before_its_weights_are_read(config, message, tmp_path):
    config.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=message) as caught:
        create_backend(tmp_path, max_length=64)
    assert "\n" not in str(caught.value)


def test_a_model_without_a_stated_context_needs_one(save_model):
    folder = save_model(MptConfig(vocab_size=61, d_model=32, n_layers=2, n_heads=4, initializer_range=0.3), 0)
    with pytest.raises(ModelError, match="states no context length: give max_length"):
        create_backend(folder, attn_implementation="eager")
    backend = create_backend(folder, attn_implementation="eager", max_length=77)
    assert backend.max_length == 77
    assert_equals_recomputed(backend, [Row("a", [3, 1, 4], 2), Row("b", [1, 5, 9, 2, 6, 5], 1)])


@pytest.fixture(scope="module")
def padded_folders(tokenizer_folder, llama_config, tmp_path_factory) -> list[str]:
    """One model and one tokenizer, with logits for 10 and for 30 ids more than there are tokens."""
    num_tokens = len(AutoTokenizer.from_pretrained(tokenizer_folder))
    folders = []
    for padding in (10, 30):
        with torch.random.fork_rng():
            torch.manual_seed(7)
            model = AutoModelForCausalLM.from_config(LlamaConfig(**llama_config.to_dict() | {"vocab_size": num_tokens}))
        model.resize_token_embeddings(num_tokens + padding, mean_resizing=False)
        with torch.no_grad():  # trained models hardly ever choose the ids that are no tokens
            model.lm_head.weight *= 4
            model.lm_head.weight[num_tokens:] = 0
        folder = tmp_path_factory.mktemp(f"padded-{padding}")
        shutil.copytree(tokenizer_folder, folder, dirs_exist_ok=True)
        model.save_pretrained(folder)
        folders.append(str(folder))
    return folders


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("is_wider", [False, True], ids=["narrow-target", "wide-target"])
def test_models_padded_otherwise_are_target_and_draft_of_each_other(is_wider, temperature, padded_folders):
    narrow, wide = (create_backend(folder) for folder in padded_folders)
    assert wide.vocab_size - narrow.vocab_size == 20
    target, draft = (wide, narrow) if is_wider else (narrow, wide)
    prompt = torch.tensor([[5, 3, 8, 250]])
    output, metrics = speculative_decode(target, draft, prompt, max_new_tokens=40, K=4, temperature=temperature, seed=0)
    assert output.shape == (1, 44)
    assert metrics.num_accepted > 10
    if temperature == 0:
        assert torch.equal(output, speculative_decode(target, None, prompt, max_new_tokens=40)[0])

"""Tiny random models and a tokenizer, saved as checkpoints for all tests."""

import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedTokenizerFast

os.environ.setdefault("RAY_AUTH_MODE", "token")  # as serve.cluster does, and before any test imports Ray

pytest_plugins = ("tests.routing.made",)

VOCAB_SIZE = 61

# (verifier, drafter, K) -> settings, sequences whose probability was compared, and the largest difference from the target's.
EXACTNESS: dict[tuple[str, str, int], tuple[int, int, float]] = defaultdict(lambda: (0, 0, 0.0))

SaveModel = Callable[[PreTrainedConfig, int], str]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Shows what the exact enumeration added up."""
    if not EXACTNESS:
        return
    terminalreporter.section("probability of every sequence against the target's: largest difference")
    depths = sorted({k for _, _, k in EXACTNESS})
    terminalreporter.write_line(f"{'verifier':<11}{'drafter':<21}" + "".join(f"{'K = ' + str(k):>10}" for k in depths))
    for verifier, drafter in dict.fromkeys((verifier, drafter) for verifier, drafter, _ in EXACTNESS):
        cells = [EXACTNESS[verifier, drafter, k] for k in depths]
        terminalreporter.write_line(f"{verifier:<11}{drafter:<21}" + "".join(f"{cell[2]:>10.1e}" for cell in cells))
    num_cells, num_sequences = (sum(cell[field] for cell in EXACTNESS.values()) for field in (0, 1))
    terminalreporter.write_line(f"{num_cells} combinations of verifier, drafter, K and parameters; {num_sequences} sequences")


@pytest.fixture(scope="session", autouse=True)
def one_quiet_thread() -> Iterator[None]:
    transformers.utils.logging.disable_progress_bar()
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="session")
def save_model(tmp_path_factory: pytest.TempPathFactory) -> SaveModel:
    """Saves a model with random weights that depend on the config and the seed alone; returns its folder."""

    def save(config: PreTrainedConfig, seed: int) -> str:
        folder = str(tmp_path_factory.mktemp(config.model_type))
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="session")
def llama_config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.3,
        eos_token_id=None,
    )


@pytest.fixture(scope="session")
def target_folder(save_model: SaveModel, llama_config: LlamaConfig) -> str:
    return save_model(llama_config, 0)


@pytest.fixture(scope="session")
def draft_folder(target_folder: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The target's weights with noise, so that some guesses are right and some are wrong."""
    model = AutoModelForCausalLM.from_pretrained(target_folder, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weights in model.parameters():
            weights += 0.05 * torch.randn(weights.shape, generator=generator)
    folder = str(tmp_path_factory.mktemp("draft"))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A byte-level BPE of few merges, so that most characters outside ASCII take several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|end|>", "<|user|>", "<|assistant|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog: naïve café, 日本語, 😀"] * 4, trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
    wrapped.chat_template = (
        "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    folder = tmp_path_factory.mktemp("tokenizer")
    wrapped.save_pretrained(folder)
    return str(Path(folder))

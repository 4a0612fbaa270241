"""The tokenizer keeps every character, and speaks the chat format."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from specdecode.training.checkpoints import save_tokenizer
from specdecode.training.documents import Document, Message
from specdecode.training.examples import Formatter, end_of_text
from specdecode.training.tokenizer import SPECIAL_TOKENS, TokenizerConfig, train_tokenizer

TEXTS = [
    "def f(x):\n    if x:\n\treturn 'a  b'  \n\n\n        # far right\r\n",
    "  leading and trailing  ",
    "1234567 + 89 = 1234656",
    "Zoë, 日本語 and 🙂 were never seen before",
    "",
]


@pytest.mark.parametrize("text", TEXTS)
def test_every_text_comes_back_exactly(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.decode(Formatter(tokenizer).prompt(Document(text))) == text


def test_digits_are_tokens_of_their_own(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.tokenize("2024") == ["2", "0", "2", "4"]


def test_the_special_tokens_come_first(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == [0, 1, 2, 3, 4]
    assert tokenizer.eos_token == "<|end|>"
    assert end_of_text(tokenizer) == 0


def test_a_conversation_in_the_chat_format(tokenizer: PreTrainedTokenizerFast) -> None:
    document = Document(messages=(Message("user", "Hi"), Message("assistant", "Hello")))

    example = Formatter(tokenizer).example(document)

    assert example is not None
    assert tokenizer.decode(example.ids.tolist()) == "<|user|>\nHi<|end|>\n<|assistant|>\nHello<|end|>\n<|endoftext|>"


def test_the_prompt_for_an_answer(tokenizer: PreTrainedTokenizerFast) -> None:
    turns = [{"role": "user", "content": "Hi"}]

    text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)

    assert text == "<|user|>\nHi<|end|>\n<|assistant|>\n"


def test_a_saved_tokenizer_is_the_same_one(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    save_tokenizer(tokenizer, tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)

    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded.chat_template == tokenizer.chat_template
    assert [loaded(text)["input_ids"] for text in TEXTS] == [tokenizer(text)["input_ids"] for text in TEXTS]


def test_training_from_a_config(data_dir: Path, tmp_path: Path) -> None:
    config = TokenizerConfig(
        data_dir=str(data_dir), sources={"gsm8k": 20_000}, vocabulary_size=280, output_dir=str(tmp_path / "tokenizer")
    )

    folder = train_tokenizer(config)

    assert len(AutoTokenizer.from_pretrained(folder)) == 280

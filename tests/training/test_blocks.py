"""Batches hold every token, in the shares that were asked for."""

import itertools

import numpy as np
from transformers import PreTrainedTokenizerFast

from specdecode.training.blocks import TokenStream, mix, pad
from specdecode.training.documents import Document, Message
from specdecode.training.prompts import sample_prefix, sample_prompt, sample_prompts

CONVERSATION = Document(
    messages=(Message("user", "One"), Message("assistant", "Two"), Message("user", "Three"), Message("assistant", "Four"))
)
SOURCE = "import os\n\nclass A:\n    def f(self):\n        return 1\n\n\ndef g():\n    return 2\n"


def test_a_pass_of_a_stream_has_every_document_once() -> None:
    documents = [[1, 1], [2, 2, 2], [3]]
    stream = TokenStream(documents, np.random.default_rng(0))

    first, second = stream.take(6).tolist(), stream.take(6).tolist()

    assert sorted(first) == sorted(second) == [1, 1, 2, 2, 2, 3]


def test_rows_come_from_the_sources_in_proportion() -> None:
    rng = np.random.default_rng(0)
    streams = {"a": TokenStream([[1]], rng), "b": TokenStream([[2]], rng)}

    batches = list(itertools.islice(mix(streams, {"a": 3, "b": 1}, batch_size=8, length=4, rng=rng), 500))
    share = np.mean([(batch.ids == 1).float().mean().item() for batch in batches])

    assert abs(share - 0.75) < 0.03  # 4,000 rows: four standard deviations
    assert batches[0].is_scored[:, 1:].all() and not batches[0].is_scored[:, 0].any()


def test_only_continuations_are_scored() -> None:
    batch = pad([([1, 2], [3]), ([4], [5, 6, 7])], pad_id=0)

    assert batch.ids.tolist() == [[1, 2, 3, 0], [4, 5, 6, 7]]
    assert batch.is_scored.tolist() == [[False, False, True, False], [False, True, True, True]]


def test_chat_prompts_end_where_the_assistant_speaks(tokenizer: PreTrainedTokenizerFast) -> None:
    rng = np.random.default_rng(0)

    prompts = {tokenizer.decode(sample_prompt(CONVERSATION, tokenizer, rng)) for _ in range(20)}

    assert prompts == {
        "<|user|>\nOne<|end|>\n<|assistant|>\n",
        "<|user|>\nOne<|end|>\n<|assistant|>\nTwo<|end|>\n<|user|>\nThree<|end|>\n<|assistant|>\n",
    }


def test_code_prompts_begin_at_a_definition_or_at_the_top() -> None:
    rng = np.random.default_rng(0)

    prefixes = {sample_prefix(SOURCE, rng) for _ in range(200)}

    assert {prefix.split("\n")[0] for prefix in prefixes} == {"import os", "class A:", "def f(self):", "def g():"}
    assert "def f(self):\n    return 1\n" in prefixes


def test_prompts_are_as_many_and_as_short_as_asked_for(tokenizer: PreTrainedTokenizerFast) -> None:
    prompts = sample_prompts([CONVERSATION], tokenizer, num_prompts=30, max_length=60, rng=np.random.default_rng(0))

    assert len(prompts) == 30
    assert max(map(len, prompts)) <= 60

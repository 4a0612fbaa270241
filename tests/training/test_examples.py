"""What a document becomes, and which of its tokens are learned."""

from dataclasses import replace

import pytest
from transformers import PreTrainedTokenizerFast

from specdecode.errors import ConfigError
from specdecode.training.documents import Document, Message
from specdecode.training.examples import Example, Formatter, end_of_text

TALK = Document(
    messages=(
        Message("system", "Be brief."),
        Message("user", "How many apples are 1 apples and 2 apples?"),
        Message("assistant", "There are 3 apples."),
        Message("user", "And 4 apples?"),
        Message("assistant", "There are 7 apples."),
    )
)


def learned(example: Example | None, tokenizer: PreTrainedTokenizerFast) -> str:
    assert example is not None
    return str(tokenizer.decode(example.ids[example.is_scored].tolist()))


def test_of_a_conversation_the_assistants_turns_are_learned(tokenizer: PreTrainedTokenizerFast) -> None:
    example = Formatter(tokenizer).example(TALK)
    text = learned(example, tokenizer)
    assert "There are 3 apples." in text
    assert "There are 7 apples." in text
    assert "How many" not in text
    assert "brief" not in text
    assert text.count(tokenizer.eos_token) == 2  # that a turn ends is learned too


def test_every_turn_is_learned_where_that_is_asked_for(tokenizer: PreTrainedTokenizerFast) -> None:
    example = Formatter(tokenizer, learn_all=True).example(TALK)
    assert example is not None
    assert example.is_scored.tolist() == [False] + [True] * (len(example.ids) - 1)
    assert example.ids[-1] == end_of_text(tokenizer)


def test_the_prompt_of_a_conversation_is_how_it_is_served_and_how_it_is_learned(tokenizer: PreTrainedTokenizerFast) -> None:
    formatter = Formatter(tokenizer)
    prompt = formatter.prompt(replace(TALK, messages=TALK.messages[:2]))
    whole = formatter.example(TALK)
    assert whole is not None
    assert whole.ids[: len(prompt)].tolist() == prompt
    assert not whole.is_scored[: len(prompt)].any()
    assert whole.is_scored[len(prompt)]


def test_without_a_template_a_question_and_its_answer_are_told_apart(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token=tokenizer.eos_token)
    assert tokenizer.chat_template is None
    example = Formatter(tokenizer).example(Document(messages=(Message("user", "How many?"), Message("assistant", "3 apples."))))
    assert learned(example, tokenizer).strip() == "3 apples."
    assert "Question: How many?" in tokenizer.decode(example.ids.tolist())  # type: ignore[union-attr]


def test_a_turn_that_the_template_tells_otherwise_later_is_not_learned(tokenizer: PreTrainedTokenizerFast) -> None:
    forgetful = (
        "{% for m in messages %}{{ m.role }}: {{ m.content if loop.last or m.role != 'assistant' else '...' }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, eos_token=tokenizer.eos_token, chat_template=forgetful
    )
    assert learned(Formatter(tokenizer).example(TALK), tokenizer) == "There are 7 apples.\n"
    assert Formatter(tokenizer).example(replace(TALK, messages=TALK.messages[:2])) is None  # nobody answers


def test_of_a_text_all_but_the_first_token_is_learned(tokenizer: PreTrainedTokenizerFast) -> None:
    example = Formatter(tokenizer).example(Document("There are 2 apples."))
    assert example is not None
    assert example.is_scored.tolist() == [False] + [True] * (len(example.ids) - 1)
    assert tokenizer.decode(example.ids[:-1].tolist()) == "There are 2 apples."


def test_the_middle_of_a_text_is_filled_in(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ConfigError, match="marks such as"):
        Formatter(tokenizer, fim_rate=0.5)
    marked = PreTrainedTokenizerFast(
        tokenizer_object=type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str()),
        eos_token=tokenizer.eos_token,
    )
    marked.add_special_tokens({"additional_special_tokens": ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"]})
    text = "There are 2 apples and 3 apples."
    example = Formatter(marked, fim_rate=1.0).example(Document(text))
    assert example is not None
    _, rest = marked.decode(example.ids[:-1].tolist()).split("<|fim_prefix|>")
    prefix, rest = rest.split("<|fim_suffix|>")
    suffix, middle = rest.split("<|fim_middle|>")
    assert prefix + middle + suffix == text
    rates = [Formatter(marked, fim_rate=0.3).example(Document(f"{n} apples")) for n in range(300)]
    share = sum(marked.convert_tokens_to_ids("<|fim_prefix|>") in example.ids for example in rates if example) / 300
    assert 0.2 < share < 0.4


def test_an_answer_is_learned_and_its_prompt_is_not() -> None:
    example = Example.answer([1, 2], [3, 4, 5])
    assert example.ids.tolist() == [1, 2, 3, 4, 5]
    assert example.is_scored.tolist() == [False, False, True, True, True]
    assert Example.answer([], [3, 4]).is_scored.tolist() == [False, True]

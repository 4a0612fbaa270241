"""Text streams out as it would be decoded whole, never half a character, and never past a stop string."""

import random
from itertools import product

import pytest
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from specdecode.errors import ModelError, RequestError
from specdecode.text import StopStrings, Tokenizer

TEXTS = [
    "the quick brown fox jumps over the lazy dog",
    "naïve café, über Größe",
    "日本語のテキスト、混ぜて english",
    "😀😃 👩\u200d👩\u200d👧 e\u0301 ÿ",
    "line one\nline two\n\n    indented\ttab ",
]


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder) -> Tokenizer:
    return Tokenizer(tokenizer_folder)


@pytest.fixture(scope="module")
def spaced_tokenizer(tmp_path_factory) -> Tokenizer:
    """Tokens with a mark for the space before them, the first of which is not shown; and bytes for what is no word."""
    words = ["▁the", "▁fox", "▁is", "▁", "s", "."]
    vocabulary = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    inner = RustTokenizer(models.Unigram([(word, 0.0) for word in vocabulary], unk_id=0, byte_fallback=True))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    folder = tmp_path_factory.mktemp("spaced")
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", unk_token="<unk>").save_pretrained(folder)
    return Tokenizer(str(folder))


def stream(tokenizer: Tokenizer, tokens: list[int], rng: random.Random) -> tuple[list[str], str]:
    """Decodes in pieces of random size; returns the pieces and what the end adds."""
    detokenizer, pieces, start = tokenizer.detokenizer(), [], 0
    while start < len(tokens):
        size = rng.choice([1, 1, 1, 2, 5])
        pieces.append(detokenizer.decode(tokens[start : start + size]))
        start += size
    return pieces, detokenizer.flush()


# Detokenizer


@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_back_whole_and_without_half_characters(text, tokenizer):
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    for seed in range(10):
        pieces, rest = stream(tokenizer, tokens, random.Random(seed))
        assert "".join(pieces) == text
        assert rest == ""
        assert not any("\ufffd" in piece for piece in pieces)


def test_some_characters_of_the_examples_are_split_over_tokens(tokenizer):
    assert all(len(tokenizer.encode(character)) > 1 for character in "ß語👧")


@pytest.mark.parametrize("seed", range(30))
def test_random_tokens_come_out_as_they_decode_whole(seed, tokenizer):
    rng = random.Random(seed)
    tokens = [rng.randrange(300) for _ in range(60)]  # mostly no whole characters at all; special tokens among them
    pieces, rest = stream(tokenizer, tokens, rng)
    assert "".join(pieces) + rest == tokenizer.decode(tokens)


@pytest.mark.parametrize("seed", range(30))
def test_random_spaced_tokens_come_out_as_they_decode_whole(seed, spaced_tokenizer):
    rng = random.Random(seed)
    euro = [2 + byte for byte in "€".encode()]
    half = [258, *euro[:2], 259]  # apart from other bytes, which its own would make unreadable in hindsight
    parts = [[word] for word in range(258, 264)] + [euro, half, [1]]
    tokens = [token for _ in range(25) for token in rng.choice(parts)]
    pieces, rest = stream(spaced_tokenizer, tokens, rng)
    assert "".join(pieces) + rest == spaced_tokenizer.decode(tokens)


def test_a_special_token_takes_no_space_from_the_next_word(spaced_tokenizer):
    the, fox, end = 258, 259, 1
    detokenizer = spaced_tokenizer.detokenizer()
    assert [detokenizer.decode([token]) for token in (the, end, fox)] == ["the", "", " fox"]


def test_text_is_shown_as_soon_as_it_is_certain(tokenizer):
    detokenizer = tokenizer.detokenizer()
    *first, last = tokenizer.encode("👧")
    assert first
    assert [detokenizer.decode([token]) for token in first] == [""] * len(first)
    assert detokenizer.decode([last]) == "👧"


def test_a_character_that_never_completes_comes_with_the_flush(tokenizer):
    detokenizer = tokenizer.detokenizer()
    tokens = tokenizer.encode("ok 👧")[:-1]
    shown = "".join(detokenizer.decode([token]) for token in tokens)
    rest = detokenizer.flush()
    assert shown + rest == tokenizer.decode(tokens)
    assert shown.rstrip() == "ok"
    assert rest.strip() == "\ufffd"
    assert detokenizer.flush() == ""


# StopStrings


def stopped(stops: list[str], pieces: list[str]) -> tuple[str, bool]:
    stopper = StopStrings(stops)
    text = "".join([stopper.feed(piece) for piece in pieces])
    return text + stopper.flush(), stopper.is_stopped


def splits(text: str):
    """All ways to cut a text into pieces."""
    for cuts in product([False, True], repeat=len(text) - 1):
        pieces = [text[0]]
        for character, is_cut in zip(text[1:], cuts, strict=True):
            if is_cut:
                pieces.append(character)
            else:
                pieces[-1] += character
        yield pieces


@pytest.mark.parametrize(
    ("stops", "text", "expected"),
    [
        (["END"], "some END x", "some "),
        (["END"], "some ENx", None),
        (["END"], "some EN", None),
        (["aab"], "aaaab", "aa"),
        (["abab"], "xabaabab", "xaba"),
        (["bcd", "abce"], "xabcd", "xa"),
        (["cd", "abcdef"], "xabcdef", "xab"),  # the one that is complete first
        (["cd", "bcd"], "xabcd", "xa"),  # the longer of two that are complete together
        (["b", "b"], "abab", "a"),
        (["x", ""], "abx", "ab"),
        ([], "abc", None),
        (["é\n"], "caféé\ncafé", "café"),
    ],
)
def test_any_split_stops_at_the_same_place(stops, text, expected):
    for pieces in splits(text):
        assert stopped(stops, pieces) == ((text, False) if expected is None else (expected, True))


def test_random_texts_stop_where_the_first_stop_string_is_complete():
    rng, num_stopped = random.Random(0), 0
    for _ in range(500):
        text = "".join(rng.choice("ab") for _ in range(8))
        stops = ["".join(rng.choice("ab") for _ in range(rng.randint(2, 5))) for _ in range(rng.randint(1, 3))]
        ends = [end for end in range(9) if text[:end].endswith(tuple(stops))]
        expected = text if not ends else text[: ends[0] - max(len(s) for s in stops if text[: ends[0]].endswith(s))]
        num_stopped += bool(ends)
        for pieces in ([text], list(text), [text[:3], text[3:]], [text[:6], text[6:]]):
            assert stopped(stops, pieces) == (expected, bool(ends))
    assert 100 < num_stopped < 450


def test_only_what_a_stop_string_may_begin_with_is_held_back():
    stopper = StopStrings(["END"])
    assert [stopper.feed(piece) for piece in ("abc", "E", "N", "x", "END", "more")] == ["abc", "", "", "ENx", "", ""]
    assert stopper.is_stopped
    assert stopper.flush() == ""


# Tokenizer


def test_a_chat_becomes_the_templates_prompt(tokenizer):
    messages = [{"role": "user", "content": "the fox"}]
    expected = [*tokenizer.encode("<|user|>"), *tokenizer.encode("the fox"), *tokenizer.encode("<|end|><|assistant|>")]
    assert tokenizer.encode_chat(messages) == expected
    assert tokenizer.decode(expected) == "the fox"


def test_messages_that_the_template_cannot_take_are_refused(tokenizer, spaced_tokenizer):
    with pytest.raises(RequestError, match="has no chat template") as caught:
        spaced_tokenizer.encode_chat([{"role": "user", "content": "x"}])
    assert caught.value.param == "messages"
    tokenizer._tokenizer.chat_template, saved = "{{ raise_exception('only user') }}", tokenizer._tokenizer.chat_template
    with pytest.raises(RequestError, match="messages: only user"):
        tokenizer.encode_chat([{"role": "system", "content": "x"}])
    tokenizer._tokenizer.chat_template = saved


def test_two_tokenizers_are_the_same_if_their_ids_mean_the_same(tokenizer, spaced_tokenizer, tokenizer_folder):
    assert tokenizer.vocabulary_id == Tokenizer(tokenizer_folder).vocabulary_id != spaced_tokenizer.vocabulary_id


def test_a_missing_tokenizer_is_refused_in_one_line(tmp_path):
    with pytest.raises(ModelError, match=r"tokenizer of '.*' cannot be loaded: ") as caught:
        Tokenizer(str(tmp_path))
    assert "\n" not in str(caught.value)

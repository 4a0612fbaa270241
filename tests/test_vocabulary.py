"""A target's tokens are said in a draft's vocabulary byte for byte, and the draft's logits stand where the target looks."""

import json
import random
import time
from dataclasses import dataclass
from itertools import pairwise, permutations

import pytest
import torch
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from specdecode.errors import ModelError
from specdecode.text import Tokenizer
from specdecode.vocabulary import SameVocabulary, SharedTokens, Translation, Vocabulary, translate

ENGLISH = ["the quick brown fox jumps over the lazy dog", "she said that the other one is there", "naïve café, über Größe"] * 3
CODE = ["def add(left, right):\n    return left + right\n", "for item in items:\n        print(item)\n", "日本語, 😀"] * 3
TEXTS = [
    "the quick brown fox said that",
    "def other(items):\n    for item in items:\n\t\treturn item  # 1234567890\n\n\n",
    "  two spaces first,   three inside, some last   ",
    "naïve café, über Größe, e\u0301 ÿ",
    "日本語のテキスト、混ぜて english",
    "😀😃 👩\u200d👩\u200d👧",
    "\n\n    indented\r\n\ttab ",
    " ",
]
SPECIAL = ["<unk>", "<s>", "</s>", "<|user|>"]
MARK = "\u2581"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
BYTE_LEVEL = ["tiny", "english", "code"]
KINDS = [*BYTE_LEVEL, "pieces", "unigram"]


@dataclass(frozen=True)
class NamedModel:
    name: str
    vocab_size: int
    vocabulary_id: str = ""


def byte_level(texts: list[str], vocab_size: int, end: str) -> PreTrainedTokenizerFast:
    inner = RustTokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = [end, "<|user|>"]
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    inner.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=end, extra_special_tokens=["<|user|>"])


def trained(model: models.Model, trainer: trainers.Trainer, texts: list[str]) -> dict:
    """The description of a model whose tokens are marked with spaces."""
    inner = RustTokenizer(model)
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.train_from_iterator(texts, trainer)
    return json.loads(inner.to_str())["model"]


def pieces(texts: list[str]) -> PreTrainedTokenizerFast:
    """As Llama 2's: BPE, a space before every text that is not shown, bytes for what is no token, and a start of text."""
    found = trained(models.BPE(), trainers.BpeTrainer(vocab_size=200, show_progress=False), texts)
    tokens = dict.fromkeys([*SPECIAL, *BYTES, *found["vocab"]])
    vocab = {token: id for id, token in enumerate(tokens)}
    merges = [tuple(merge) for merge in found["merges"]]
    inner = RustTokenizer(models.BPE(vocab, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend(MARK), normalizers.Replace(" ", MARK)])
    steps = [decoders.Replace(MARK, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    inner.decoder = decoders.Sequence(steps)
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return wrapped(inner)


def unigram(texts: list[str], steps: list[decoders.Decoder], *, has_bytes: bool) -> PreTrainedTokenizerFast:
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False)
    found = trained(models.Unigram(), trainer, texts)["vocab"]
    scores = dict.fromkeys([*SPECIAL, *(BYTES if has_bytes else [])], -20.0) | dict(found[1:])
    inner = RustTokenizer(models.Unigram(list(scores.items()), unk_id=0, byte_fallback=has_bytes))
    is_bare = not any(isinstance(step, decoders.Metaspace | decoders.Strip) for step in steps)
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never" if is_bare else "always")
    inner.decoder = decoders.Sequence(steps)
    return wrapped(inner)


def wrapped(inner: RustTokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>", extra_special_tokens=["<|user|>"]
    )


def word_pieces() -> PreTrainedTokenizerFast:
    inner = RustTokenizer(models.WordPiece({"the": 0, "##s": 1, "[UNK]": 2}, unk_token="[UNK]"))
    inner.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]")


def word_ends() -> PreTrainedTokenizerFast:
    """As CLIP's: bytes, and a mark at the end of each word."""
    inner = RustTokenizer(models.BPE({"a": 0, "a</w>": 1}, [], end_of_word_suffix="</w>"))
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner)


@pytest.fixture(scope="session")
def vocabularies(tmp_path_factory) -> dict[str, NamedModel]:
    """Models, which are no more than their tokenizers, of several kinds."""
    bare = [decoders.Replace(MARK, " "), decoders.ByteFallback(), decoders.Fuse()]
    made = {
        "english": byte_level(ENGLISH, 400, "<|end|>"),
        "code": byte_level(ENGLISH + CODE, 330, "<|stop|>"),
        "pieces": pieces(ENGLISH + CODE),
        "unigram": unigram(ENGLISH, bare, has_bytes=True),
        "metaspace": unigram(ENGLISH, [decoders.Metaspace()], has_bytes=False),
        "word pieces": word_pieces(),
        "word ends": word_ends(),
        "undescribed": PreTrainedTokenizerFast(tokenizer_object=RustTokenizer(models.BPE())),
    }
    named = {"tiny": NamedModel("tiny/target", 4096, "tiny")}
    for kind, tokenizer in made.items():
        folder = str(tmp_path_factory.mktemp("vocabulary"))
        tokenizer.save_pretrained(folder)
        named[kind] = NamedModel(folder, len(tokenizer), kind)
    return named


@pytest.fixture(scope="session")
def tokenizers(vocabularies) -> dict[str, Tokenizer]:
    return {kind: Tokenizer(model.name) for kind, model in vocabularies.items()}


@pytest.fixture(scope="session")
def opened(vocabularies, tokenizers) -> dict[str, Vocabulary]:
    return {kind: Vocabulary(tokenizers[kind], vocabularies[kind].vocab_size) for kind in [*KINDS, "metaspace"]}


@pytest.fixture(scope="session")
def translations(vocabularies) -> dict[tuple[str, str], SharedTokens]:
    """A translation for each pair of a draft and a target."""
    made = {}
    for draft, target in permutations([*KINDS, "metaspace"], 2):
        made[draft, target] = translate(vocabularies[draft], vocabularies[target], min_shared=0.0)
        assert isinstance(made[draft, target], SharedTokens)
    return made


PAIRS = pytest.mark.parametrize(("draft", "target"), list(permutations(KINDS, 2)))


# What is shared


@PAIRS
def test_the_shared_tokens_are_pairs_of_equal_bytes(draft, target, translations, opened):
    translation, ours, theirs = translations[draft, target], opened[target], opened[draft]
    pairs = list(zip(translation.draft_ids.tolist(), translation.target_ids.tolist(), strict=True))
    assert len(pairs) > 50
    ends = (theirs.eos_id, ours.eos_id)
    assert ends in pairs
    for draft_id, target_id in pairs:
        if (draft_id, target_id) != ends:
            assert theirs.pieces[draft_id] == ours.pieces[target_id] != b""


@PAIRS
def test_the_shared_tokens_are_one_to_one_and_all_there_are(draft, target, translations, opened):
    translation, ours, theirs = translations[draft, target], opened[target], opened[draft]
    assert translation.target_ids.tolist() == sorted(translation.target_ids.tolist())
    assert translation.draft_ids.unique().numel() == translation.target_ids.unique().numel() == len(translation.target_ids)
    both = set(ours.pieces.values()) & set(theirs.pieces.values()) - {b""}
    assert len(translation.target_ids) == len(both) + 1  # the end of text


@PAIRS
def test_special_tokens_but_the_end_are_not_shared(draft, target, translations, opened):
    shared_specials = set(translations[draft, target].target_ids.tolist()) & set(opened[target].special)
    assert shared_specials == {opened[target].eos_id}
    shared_specials = set(translations[draft, target].draft_ids.tolist()) & set(opened[draft].special)
    assert shared_specials == {opened[draft].eos_id}


@PAIRS
def test_there_and_back_pairs_the_same_tokens(draft, target, translations):
    there, back = translations[draft, target], translations[target, draft]
    pairs = set(zip(there.draft_ids.tolist(), there.target_ids.tolist(), strict=True))
    assert pairs == set(zip(back.target_ids.tolist(), back.draft_ids.tolist(), strict=True))


def test_a_word_after_a_space_is_shared_however_the_space_is_written(translations, tokenizers):
    there = translations["english", "pieces"]
    pairs = dict(zip(there.draft_ids.tolist(), there.target_ids.tolist(), strict=True))
    english, marked = tokenizers["english"].vocabulary, tokenizers["pieces"].vocabulary
    assert pairs[english["\u0120the"]] == marked[MARK + "the"]
    assert pairs[english["\u010a"]] == marked["\n"]  # the token that a text gets, not <0x0A>
    assert pairs[english["\u00c3"]] == marked["<0xC3>"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_stands_for_the_bytes_that_decoding_shows(kind, opened, tokenizers):
    start = tokenizers[kind].vocabulary.get("x")
    for token, piece in opened[kind].pieces.items():
        assert tokenizers[kind].decode([start, token]) == "x" + piece.decode(errors="replace")


def test_an_added_token_is_taken_before_the_models_own(tmp_path):
    tokenizer = byte_level(ENGLISH + CODE, 400, "<|end|>")
    num_own, texts = len(tokenizer), [" the", "<think>", "caf é"]
    tokenizer.add_tokens(texts)
    tokenizer.save_pretrained(tmp_path)
    vocabulary = Vocabulary(Tokenizer(str(tmp_path)), len(tokenizer))
    assert b" the" in [vocabulary.pieces.get(id) for id in range(num_own)]
    added = range(num_own, num_own + 3)
    assert [vocabulary.ids[text.encode()] for text in texts] == list(added)
    assert [vocabulary.pieces[id] for id in added] == [text.encode() for text in texts]


def test_a_token_of_no_bytes_is_not_shared(tmp_path):
    inner = RustTokenizer(models.BPE({"": 0, "a": 1}, []))
    inner.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=inner).save_pretrained(tmp_path)
    vocabulary = Vocabulary(Tokenizer(str(tmp_path)), 2)
    assert vocabulary.ids == {b"a": 1}
    assert vocabulary.spell(b"") == []


def test_ids_beyond_a_models_logits_are_not_used(vocabularies):
    draft, target = vocabularies["english"], vocabularies["code"]
    translation = translate(NamedModel(draft.name, 300, "a"), NamedModel(target.name, 310, "b"))
    assert translation.draft_ids.max() < 300
    assert translation.target_ids.max() < 310
    tokens = Tokenizer(target.name).encode("the fox said")
    context = translation.context([token for token in tokens if token < 310])
    assert max(context) < 300


# The context


@PAIRS
@pytest.mark.parametrize("text", TEXTS)
def test_the_context_is_the_same_text(draft, target, text, translations, tokenizers):
    tokens = tokenizers[target].encode(text)
    context = translations[draft, target].context(tokens)
    assert tokenizers[draft].decode(context) == tokenizers[target].decode(tokens) == text


@PAIRS
def test_the_context_of_random_texts_is_the_same_text(draft, target, translations, tokenizers):
    rng = random.Random(0)
    alphabet = "theqick  \n\t_(){}é日😀\u0301" + MARK
    texts = ["".join(rng.choices(alphabet, k=rng.randint(1, 30))) for _ in range(100)]
    for text in ["as text: \u2581x, <0x41>, <unk>", *texts]:  # not all of which a target can say
        tokens = tokenizers[target].encode(text)
        context = translations[draft, target].context(tokens)
        assert tokenizers[draft].decode(context) == tokenizers[target].decode(tokens)


@PAIRS
def test_the_context_of_random_tokens_is_the_same_bytes(draft, target, translations, opened):
    """Half characters too, which no text has."""
    rng, ours, theirs = random.Random(0), opened[target], opened[draft]
    for _ in range(100):
        tokens = rng.choices(list(ours.pieces), k=20)
        context = translations[draft, target].context(tokens)
        said = b"".join(theirs.pieces[token] for token in context[len(theirs.start_ids) :])
        shown = b"".join(ours.pieces[token] for token in tokens)
        if ours.drops_space and not theirs.drops_space:
            shown = shown.removeprefix(b" ")
        elif theirs.drops_space and not ours.drops_space:
            shown = b" " + shown
        assert said == shown


@PAIRS
def test_the_context_of_a_prefix_is_a_prefix(draft, target, translations, opened):
    rng, ours = random.Random(1), opened[target]
    for _ in range(20):
        tokens = rng.choices([*ours.pieces, *list(ours.special) * 20], k=20)
        contexts = [translations[draft, target].context(tokens[:length]) or [] for length in range(21)]
        for shorter, longer in pairwise(contexts):
            assert longer[: len(shorter)] == shorter


@PAIRS
def test_a_shared_token_in_the_context_is_its_pair(draft, target, translations, opened):
    translation = translations[draft, target]
    x = opened[target].ids[b"x"]
    num_before = len(translation.context([x]))
    for draft_id, target_id in zip(translation.draft_ids.tolist(), translation.target_ids.tolist(), strict=True):
        assert translation.context([x, target_id])[num_before:] == [draft_id] == [translation.draft_id(target_id)]


def test_a_token_that_is_not_shared_is_said_in_the_drafts_own_words(translations, tokenizers, opened):
    translation = translations["code", "tiny"]
    missing = set(opened["tiny"].pieces) - set(translation.target_ids.tolist())
    whole = [token for token in missing if opened["tiny"].pieces[token].decode(errors="replace").strip().isalpha()]
    assert len(whole) > 1000
    for token in whole:
        text = opened["tiny"].pieces[token].decode()
        assert translation.context([token]) == tokenizers["code"].encode(text)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("piece", ["\u2581x", "<0x41>", "<unk>", "a 日", " \u2581 "])
def test_any_bytes_are_spelled_exactly(kind, piece, opened):
    """What looks like a mark, too."""
    for whole in (piece.encode(), piece.encode()[1:], piece.encode()[:-1]):
        assert b"".join(opened[kind].pieces[token] for token in opened[kind].spell(whole)) == whole


def test_the_space_before_a_text_is_written_where_the_draft_expects_it(translations, tokenizers):
    for target in BYTE_LEVEL:
        tokens = tokenizers[target].encode("the")
        assert translations["pieces", target].context(tokens) == tokenizers["pieces"].encode("the")
        assert translations["metaspace", target].context(tokens) == tokenizers["metaspace"].encode("the")
    tokens = tokenizers["pieces"].encode("the")
    assert translations["english", "pieces"].context(tokens) == tokenizers["english"].encode("the")


def test_special_tokens_are_said_by_use_or_name_or_left_out(translations, tokenizers, opened):
    ours, english = tokenizers["pieces"].vocabulary, tokenizers["english"].vocabulary
    x = [ours["x"]]
    said = translations["english", "pieces"].context
    assert said([ours["</s>"], *x]) == [english["<|end|>"], english["x"]]  # the end of text, whatever its name
    assert said([ours["<|user|>"], *x]) == [english["<|user|>"], english["x"]]
    assert said([ours["<s>"], ours["<unk>"], *x]) == [english["x"]]
    assert opened["english"].start_ids == []


def test_a_draft_gets_the_start_of_text_that_its_tokenizer_writes_and_only_once(translations, tokenizers):
    start = tokenizers["pieces"].vocabulary["<s>"]
    for target in ("english", "unigram"):
        context = translations["pieces", target].context(tokenizers[target].encode("the fox"))
        assert (context[0], context.count(start)) == (start, 1)
    tokens = [tokenizers["unigram"].vocabulary["<s>"], *tokenizers["unigram"].encode("the fox")]
    assert translations["pieces", "unigram"].context(tokens).count(start) == 1


def test_what_the_draft_cannot_say_has_no_context(translations, tokenizers, opened):
    translation = translations["metaspace", "english"]
    assert translation.context(tokenizers["english"].encode("the café")) is not None
    assert translation.context(tokenizers["english"].encode("the 日")) is None
    assert translation.context([tokenizers["english"].vocabulary["\u00c3"]]) is None  # half a character
    assert translation.context([10**6]) is None  # no token of the target
    assert opened["metaspace"].spell("the 日".encode()) is None


def test_a_context_without_any_token_is_none(translations, tokenizers):
    assert translations["english", "pieces"].context([tokenizers["pieces"].vocabulary["<s>"]]) is None


def test_a_token_is_spelled_once():
    asked = []

    def spell(token: int, is_first: bool) -> list[int]:
        asked.append((token, is_first))
        return [token, token]

    translation = SharedTokens(torch.tensor([0]), torch.tensor([0]), 4, spell, special=[3], start=[9])
    for _ in range(2):
        assert translation.context([3, 1, 1, 2, 1]) == [9, 3, 3, 1, 1, 1, 1, 2, 2, 1, 1]
    assert asked == [(3, True), (1, True), (1, False), (2, False)]


# The logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@PAIRS
def test_logits_stand_where_the_target_has_the_token_and_nowhere_else(draft, target, dtype, translations, vocabularies):
    translation = translations[draft, target]
    logits = torch.randn(3, vocabularies[draft].vocab_size, generator=torch.Generator().manual_seed(0)).to(dtype)
    translated = translation.logits(logits)
    assert translated.shape == (3, vocabularies[target].vocab_size)
    assert translated.dtype == dtype
    pairs = dict(zip(translation.target_ids.tolist(), translation.draft_ids.tolist(), strict=True))
    for target_id in range(translated.shape[1]):
        if target_id in pairs:
            assert torch.equal(translated[:, target_id], logits[:, pairs[target_id]])
        else:
            assert torch.isneginf(translated[:, target_id]).all()


@PAIRS
def test_the_drafts_distribution_is_renormalised_over_the_shared_tokens(draft, target, translations, vocabularies):
    translation = translations[draft, target]
    logits = torch.randn(3, vocabularies[draft].vocab_size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    q = logits.softmax(-1)[:, translation.draft_ids]
    translated = translation.logits(logits).softmax(-1)
    torch.testing.assert_close(translated[:, translation.target_ids], q / q.sum(-1, keepdim=True))
    torch.testing.assert_close(translated.sum(-1), torch.ones(3, dtype=torch.float64))


def test_no_logits_are_no_logits(translations):
    translation = translations["english", "tiny"]
    assert translation.logits(torch.empty(0, 400)).shape == (0, 4096)


def test_the_shared_ids_follow_the_logits_to_their_device():
    translation = SharedTokens(torch.tensor([0]), torch.tensor([1]), 4, lambda token, _: [token])
    translated = translation.logits(torch.empty(2, 3, device="meta"))
    assert (translated.shape, translated.device.type) == ((2, 4), "meta")
    assert translation.draft_ids.device == translation.target_ids.device == translated.device


# One vocabulary


def test_equal_vocabularies_need_no_tokenizer():
    draft, target = NamedModel("no such folder", 10, "same"), NamedModel("nor this", 12, "same")
    assert translate(draft, target) == SameVocabulary(10, 12)


def test_a_target_with_more_padding_gets_what_the_draft_has():
    translation: Translation = SameVocabulary(4, 6)
    logits = torch.randn(2, 4)
    assert torch.equal(translation.logits(logits), logits)
    assert translation.context([0, 3]) == [0, 3]
    assert translation.draft_id(3) == 3
    assert translation.context([0, 4]) is None
    assert translation.context([]) == []


def test_a_draft_with_more_padding_loses_its_own_columns():
    translation: Translation = SameVocabulary(6, 4)
    logits = torch.randn(2, 6)
    assert torch.equal(translation.logits(logits), logits[:, :4])
    assert translation.logits(logits).data_ptr() == logits.data_ptr()
    assert translation.context([0, 5]) == [0, 5]


# What is refused


def test_two_vocabularies_that_share_little_are_refused_in_one_line(vocabularies, translations):
    draft, target = vocabularies["metaspace"], vocabularies["tiny"]
    num_shared = len(translations["metaspace", "tiny"].target_ids)
    assert 0 < num_shared < 409
    with pytest.raises(ModelError) as caught:
        translate(draft, target)
    assert str(caught.value) == (
        f"draft {draft.name!r} shares {num_shared} of the 4096 tokens ({num_shared / 4096:.1%}) of target 'tiny/target': "
        "expected at least 10%"
    )
    assert isinstance(translate(draft, target, min_shared=num_shared / 4096), SharedTokens)


def test_nothing_shared_is_always_too_little(vocabularies):
    nothing = NamedModel(vocabularies["english"].name, 0, "none")
    with pytest.raises(ModelError, match=r"shares 0 of the 4096 tokens \(0\.0%\)"):
        translate(nothing, vocabularies["tiny"], min_shared=0.0)


@pytest.mark.parametrize(
    ("kind", "words"),
    [("word pieces", "by WordPiece, ##: "), ("word ends", "by ByteLevel, </w>: "), ("undescribed", "by no steps: ")],
)
def test_a_tokenizer_of_another_kind_is_refused_in_one_line(kind, words, vocabularies):
    for draft, target in permutations([kind, "english"], 2):
        with pytest.raises(ModelError, match=words) as caught:
            translate(vocabularies[draft], vocabularies[target])
        assert repr(vocabularies[kind].name) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_model_without_a_tokenizer_is_refused(vocabularies, tmp_path):
    with pytest.raises(ModelError, match=r"tokenizer of '.*' cannot be loaded: "):
        translate(NamedModel(str(tmp_path), 61, "61 tokens"), vocabularies["tiny"])


# Speed


def test_large_vocabularies_are_compared_in_seconds(tmp_path):
    rng = random.Random(0)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    names = []
    for seed in range(2):
        words = dict.fromkeys(alphabet) | dict.fromkeys("".join(rng.choices("abcdeéĠ", k=6)) for _ in range(60_000))
        inner = RustTokenizer(models.BPE({word: id for id, word in enumerate(words)}, []))
        inner.decoder = decoders.ByteLevel()
        names.append(tmp_path / str(seed))
        PreTrainedTokenizerFast(tokenizer_object=inner).save_pretrained(names[-1])
    opened = [Tokenizer(str(name)) for name in names]
    start = time.perf_counter()
    draft, target = (Vocabulary(tokenizer, 100_000) for tokenizer in opened)
    assert len(draft.ids.keys() & target.ids.keys()) > 1000
    assert time.perf_counter() - start < 10  # half a second alone on a slow core
